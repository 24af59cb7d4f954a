"""Meshes over eight fake devices: where parameters and batches go, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lightwam_jax import config as config_lib
from lightwam_jax import sharding

MIB = 2**20


def mesh(data=-1, fsdp=1, devices=None):
    return sharding.make_mesh(config_lib.MeshConfig(data, fsdp, "sharded"), devices)


def test_mesh_uses_all_devices():
    assert dict(mesh().shape) == {"data": 8, "fsdp": 1}
    assert dict(mesh(fsdp=4).shape) == {"data": 2, "fsdp": 4}
    assert dict(mesh(data=1, devices=jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1}


@pytest.mark.parametrize(("sizes", "words"), [
    ({"fsdp": 3}, "fsdp=3 does not divide the 8 devices"),
    ({"data": 2, "fsdp": 2}, "needs 4 devices, this run has 8"),
])  # fmt: skip
def test_impossible_mesh_is_explained(sizes, words):
    with pytest.raises(ValueError, match=words):
        mesh(**sizes)


def test_batch_size_that_cannot_be_split_is_explained():
    sharding.check_batch_size(32, 2, mesh())
    words = r"size=40.*8 devices.*accum_steps=2.*multiple of 16, for example 32"
    with pytest.raises(ValueError, match=words):
        sharding.check_batch_size(40, 2, mesh())
    with pytest.raises(ValueError, match="for example 16"):
        sharding.check_batch_size(8, 2, mesh())


@pytest.mark.parametrize(("path", "shape", "expected"), [
    ("expert/trunk/kernel", (1024, 512), PartitionSpec("fsdp")),
    ("expert/trunk/kernel", (512, 1024), PartitionSpec(None, "fsdp")),
    ("expert/trunk/kernel", (1023, 512), PartitionSpec(None, "fsdp")),
    ("dit/blocks_0/ffn/kernel", (1024, 256, 4), PartitionSpec(None, "fsdp")),  # layers stay whole
    ("mu/dit/blocks/ffn/kernel", (1024, 3, 256), PartitionSpec(None, None, "fsdp")),
    ("expert/odd", (1023, 1023), PartitionSpec()),
    ("expert/small", (64, 64), PartitionSpec()),
    ("expert/just_large_enough", (512, 512), PartitionSpec("fsdp")),  # 1 MiB; of equals the first
    ("expert/just_too_small", (512, 508), PartitionSpec()),
])  # fmt: skip
def test_table_of_parameter_shardings(path, shape, expected):
    assert sharding.leaf_spec(path, shape, 4, fsdp=4) == expected
    assert sharding.leaf_spec(path, shape, 4, fsdp=1) == PartitionSpec()


def test_half_as_many_bytes_are_split_later():
    assert sharding.leaf_spec("w", (512, 512), 2, fsdp=4) == PartitionSpec()
    assert sharding.leaf_spec("w", (1024, 512), 2, fsdp=4) == PartitionSpec("fsdp")


def test_frozen_weights_may_stay_whole():
    leaf = jax.ShapeDtypeStruct((1024, 512), jnp.float32)
    tree = {"trainable": {"w": leaf}, "frozen": {"w": leaf}}
    places = sharding.tree_shardings(mesh(fsdp=4), tree, "replicated")
    assert places["trainable"]["w"].spec == PartitionSpec("fsdp")
    assert places["frozen"]["w"].spec == PartitionSpec()
    assert sharding.tree_shardings(mesh(fsdp=4), tree)["frozen"]["w"].spec == PartitionSpec("fsdp")


def test_arrays_are_born_sharded_and_moments_follow_parameters():
    m = mesh(fsdp=4)
    tree = {"expert": {"kernel": jax.ShapeDtypeStruct((1024, 512), jnp.float32)}}
    places = sharding.tree_shardings(m, {"trainable": tree, "mu": tree})
    made = jax.jit(lambda: jnp.zeros((1024, 512)),
                   out_shardings=places["mu"]["expert"]["kernel"])()  # fmt: skip
    assert places["trainable"] == places["mu"]
    assert made.addressable_shards[0].data.shape == (256, 512)


def test_put_batch_splits_rows_over_all_devices():
    rows = np.arange(16 * 3).reshape(16, 3)
    out = sharding.put_batch({"x": rows}, mesh(fsdp=2))["x"]
    assert [s.data.shape for s in out.addressable_shards] == [(2, 3)] * 8
    np.testing.assert_array_equal(out, rows)


def test_means_are_over_all_devices_and_parts_come_home():
    """Inside a step: leaves are made whole, and what every device found is averaged."""
    m = mesh(fsdp=4)
    places = {
        name: jax.NamedSharding(m, spec)
        for name, spec in {
            "whole": PartitionSpec(),
            "first": PartitionSpec("fsdp"),
            "blocks/second": PartitionSpec(None, "fsdp"),
        }.items()
    }
    rng = np.random.default_rng(0)
    tree = {name: jnp.asarray(rng.standard_normal((8, 4)), jnp.float32) for name in sorted(places)}
    specs = {name: place.spec for name, place in places.items()}

    def one_device(tree):
        kept = sharding.gather(tree, places, keep=sharding.BLOCKS)
        assert isinstance(kept["blocks/second"], sharding.Shard)
        assert kept["blocks/second"].value.shape == (8, 1) and kept["first"].shape == (8, 4)
        whole = sharding.gather(tree, places)
        box = kept["blocks/second"].unbox()
        number = 4 * jax.lax.axis_index("data") + jax.lax.axis_index("fsdp")
        found = jax.tree.map(lambda x: x * (1 + number), whole)  # 1 to 8 times: 4.5 on average
        return whole, box, sharding.reduce_mean(found, places)

    everywhere = {name: PartitionSpec() for name in specs}
    whole, box, means = jax.jit(
        jax.shard_map(
            one_device,
            mesh=m,
            in_specs=(specs,),
            out_specs=(everywhere, PartitionSpec(), specs),
            check_vma=False,
        )
    )(tree)
    jax.tree.map(np.testing.assert_array_equal, whole, tree)
    np.testing.assert_array_equal(box, tree["blocks/second"])
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, 4.5 * np.asarray(y), rtol=1e-5), means, tree
    )
    assert means["first"].sharding.spec == PartitionSpec("fsdp")


def test_the_scan_over_blocks_takes_its_axis_off_the_front():
    """A part knows its axis from the end, so that it holds in the stack and in one block."""
    m = mesh(fsdp=4)
    place = jax.NamedSharding(m, PartitionSpec(None, "fsdp"))
    assert sharding.split_axis(place.spec) == 1 and sharding.split_axis(PartitionSpec()) is None
    shard = sharding.gather({"blocks": {"w": jnp.zeros((2, 3, 5))}}, {"blocks": {"w": place}}, "w")
    assert shard["blocks"]["w"].axis == -2
    assert shard["blocks"]["w"].remove_axis(0, {}).axis == -2


def test_summary_names_devices_and_mesh():
    assert sharding.mesh_summary(mesh(fsdp=4)) == "8 x cpu, mesh data=2 x fsdp=4, 1 process(es)"
    assert dict(sharding.single_device_mesh().shape) == {"data": 1, "fsdp": 1}
