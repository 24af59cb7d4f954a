"""The mean of gradients over devices, of leaves that are split and of leaves that are whole."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lightwam_jax import config as config_lib
from lightwam_jax import sharding


@pytest.mark.parametrize("fsdp", [2, 8])
def test_gradients_are_averaged_over_both_axes_of_the_mesh(fsdp):
    mesh = sharding.make_mesh(config_lib.MeshConfig(-1, fsdp, "sharded"))
    specs = {"whole": PartitionSpec(), "split": PartitionSpec(None, "fsdp")}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    # Device i has a gradient of i everywhere, and 10 i in the last column.
    number = np.arange(8, dtype=np.float32)
    gradient = number[:, None, None] * np.ones((8, 3, 8), np.float32)
    gradient[..., -1] *= 10

    def reduce(mine):
        return sharding.reduce_mean({"whole": mine[0], "split": mine[0]}, shardings)

    out = jax.jit(
        jax.shard_map(
            reduce,
            mesh=mesh,
            in_specs=PartitionSpec(sharding.AXES),
            out_specs=specs,
            check_vma=False,
        )
    )(gradient)
    for name in specs:
        np.testing.assert_allclose(out[name][:, :-1], 3.5, err_msg=name)
        np.testing.assert_allclose(out[name][:, -1], 35, err_msg=name)
