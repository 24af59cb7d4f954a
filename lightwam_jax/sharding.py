"""Devices: the mesh, where arrays live on it, and how host data gets there.

Mesh axes are ("data", "fsdp"). The batch is split over both; parameters over "fsdp" only, following
one table. Nothing here knows the model.

How a training step communicates is written out, not left to the compiler. Every device computes the
gradient of its own samples (`jax.shard_map` in `training/step.py`). For that it gathers the
trainable parameters once, and the frozen weights of a block when the block runs (`Shard`). The
gradients are summed over the devices once, at the end, in float32 (`reduce_mean`).
"""

import math
import os
import pathlib
import re

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")

# Parameter path -> leading axes never split. First match wins. Block stacks keep their layer axis
# whole: the scan over blocks would otherwise gather the stack at every iteration.
BLOCKS = r"(^|/)blocks(_\d+)?/"
UNSPLIT_AXES = (
    (BLOCKS, 1),
    (r"", 0),
)
# Smaller leaves are replicated: gathering them costs more than holding them.
MIN_SPLIT_BYTES = 2**20


def enable_compilation_cache():
    """Keeps compiled programs on disk, so that the second start of a job is quick.

    `JAX_COMPILATION_CACHE_DIR` chooses the place; the default is ~/.cache/lightwam_jax.
    """
    if jax.config.jax_compilation_cache_dir is None:
        path = pathlib.Path(os.path.expanduser("~/.cache/lightwam_jax/compiled"))
        path.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(path))


def make_mesh(config, devices=None):
    """Returns the ("data", "fsdp") mesh of a `MeshConfig` over `devices` (default: all).

    Raises:
      ValueError: the axis sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    count, fsdp = len(devices), config.fsdp
    if fsdp < 1 or count % fsdp:
        raise ValueError(
            f"config.mesh.fsdp={fsdp} does not divide the {count} devices; "
            f"choose one of {[n for n in range(1, count + 1) if count % n == 0]}"
        )
    data = count // fsdp if config.data == -1 else config.data
    if data * fsdp != count:
        raise ValueError(
            f"config.mesh data={data} x fsdp={fsdp} needs {data * fsdp} devices, this run has "
            f"{count}; set config.mesh.data=-1 to use all of them"
        )
    return _mesh(data, fsdp, devices)


def single_device_mesh():
    """Returns the mesh of the first device of this process."""
    return _mesh(1, 1, jax.local_devices()[:1])


def _mesh(data, fsdp, devices):
    return jax.make_mesh((data, fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def check_batch_size(batch_size, accum_steps, mesh):
    """Raises ValueError unless every device gets the same number of samples of a micro-batch."""
    share = mesh.size * accum_steps
    if batch_size % share:
        near = max(share, batch_size // share * share)
        raise ValueError(
            f"config.train.batch_size={batch_size} cannot be split over {mesh.size} devices x "
            f"config.optimizer.accum_steps={accum_steps} micro-batches; use a multiple of {share}, "
            f"for example {near}"
        )


def replicated(mesh):
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh):
    """Returns the sharding of an array whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def leaf_spec(path, shape, itemsize, fsdp):
    """Returns the PartitionSpec of one parameter (or moment) from its path and shape.

    The largest axis that `fsdp` divides is split; a leaf that is small or has none is replicated.
    """
    if fsdp == 1 or math.prod(shape) * itemsize < MIN_SPLIT_BYTES:
        return PartitionSpec()
    first = next(n for pattern, n in UNSPLIT_AXES if re.search(pattern, path))
    axes = [a for a in range(first, len(shape)) if shape[a] % fsdp == 0]
    if not axes:
        return PartitionSpec()
    split = max(axes, key=lambda a: shape[a])
    return PartitionSpec(*(AXES[1] if a == split else None for a in range(split + 1)))


def tree_shardings(mesh, shapes, frozen="sharded"):
    """Returns the shardings of a tree of ShapeDtypeStructs, by the table above.

    Paths are searched, not matched, so that optimizer moments follow their parameters.

    Args:
      frozen: `config.mesh.frozen`: "replicated" leaves what is below "frozen/" whole everywhere.
    """
    fsdp = mesh.shape[AXES[1]]

    def one(path, leaf):
        name = _name(path)
        ways = 1 if frozen == "replicated" and name.startswith("frozen/") else fsdp
        return NamedSharding(mesh, leaf_spec(name, leaf.shape, np.dtype(leaf.dtype).itemsize, ways))

    return jax.tree_util.tree_map_with_path(one, shapes)


def _name(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


class Shard(flax.struct.PyTreeNode, meta.AxisMetadata):
    """A device's part of a parameter that is split over "fsdp", inside `jax.shard_map`.

    Flax unboxes a parameter where a module reads it: in a scan over blocks that is inside the loop,
    so that the weights of one block are gathered at a time, and gathered again, rather than kept,
    where the block is rematerialised in the backward pass.

    Attributes:
      value: the part.
      axis: the split axis, counted from the last (-1): a scan takes the block axis off the front.
    """

    value: jax.Array
    axis: int = flax.struct.field(pytree_node=False)

    def unbox(self):
        """Returns the parameter whole."""
        return jax.lax.all_gather(self.value, AXES[1], axis=self.value.ndim + self.axis, tiled=True)

    def replace_boxed(self, val):
        return self.replace(value=val)

    def add_axis(self, index, params):
        del index, params
        return self

    remove_axis = add_axis


def split_axis(spec):
    """Returns the axis, counted from the first, that a `PartitionSpec` splits, or None."""
    return next((axis for axis, name in enumerate(spec) if name == AXES[1]), None)


def gather(tree, shardings, keep=None):
    """Returns a tree of this device's parts with the leaves whole, inside `jax.shard_map`.

    Args:
      keep: pattern searched in each path; what matches stays split, as a `Shard`.
    """

    def one(path, part, sharding):
        axis = split_axis(sharding.spec)
        if axis is None:
            return part
        shard = Shard(part, axis - part.ndim)
        return shard if keep and re.search(keep, _name(path)) else shard.unbox()

    return jax.tree_util.tree_map_with_path(one, tree, shardings)


def reduce_mean(tree, shardings):
    """Returns the mean over all devices of whole leaves, split by `shardings`.

    Inside `jax.shard_map`; one reduction per leaf, in the dtype of the leaf.
    """

    def one(x, sharding):
        axis = split_axis(sharding.spec)
        if axis is None:
            return jax.lax.pmean(x, AXES)
        # The parts stacked on an axis of their own: along an axis whose parts are no multiple of a
        # TPU's tiles, XLA reduces the whole array to every device, at twice the traffic.
        fsdp = sharding.mesh.shape[AXES[1]]
        x = x.reshape(*x.shape[:axis], fsdp, -1, *x.shape[axis + 1 :])
        x = jax.lax.psum_scatter(jnp.moveaxis(x, axis, 0), AXES[1], scatter_dimension=0)
        return jax.lax.psum(x, AXES[0]) / sharding.mesh.size

    return jax.tree.map(one, tree, shardings)


def with_shardings(shapes, shardings):
    """Returns the ShapeDtypeStructs of `shapes` carrying `shardings`: a restore target."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def one_copy(tree):
    """Returns the tree with arrays that every device holds whole reduced to one device's copy.

    Work on them is then done once, not once per device. Arrays of several processes, and sharded
    ones, stay as they are.
    """
    if jax.process_count() > 1:
        return tree
    return jax.tree.map(lambda x: x.addressable_data(0) if x.is_fully_replicated else x, tree)


def put_batch(batch, mesh):
    """Returns the global batch, on the devices, of which `batch` is this process's part.

    Args:
      batch: {name: numpy [B / processes, ...]}.
      mesh: from `make_mesh`.
    """
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()}


def mesh_summary(mesh: Mesh):
    """Returns one line for the log: devices, kind, mesh, processes."""
    kind = mesh.devices.flat[0].device_kind
    axes = " x ".join(f"{name}={size}" for name, size in mesh.shape.items())
    return f"{mesh.size} x {kind}, mesh {axes}, {jax.process_count()} process(es)"
