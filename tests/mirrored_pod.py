"""One of two processes that save and restore checkpoints of a few numbers in a bucket.

python -m tests.mirrored_pod PORT INDEX SCRATCH save|damaged     (in the directory of the "bucket")

The bucket is a directory that both see; their working copies are not.
"""

import sys

import fsspec
import jax
import jax.numpy as jnp
import numpy as np

from lightwam_jax import bucket
from lightwam_jax.checkpoint import places
from tests import synthetic

ADDRESS = "local://bucket/run"
VALUES = np.arange(8, dtype=np.float32)


def main(port, index, scratch, what):
    jax.config.update("jax_num_cpu_devices", 1)
    jax.distributed.initialize(f"localhost:{port}", 2, int(index))
    bucket.SCHEMES["local"] = "fsspec"
    fsspec.config.conf["file"] = {"auto_mkdir": True}
    mesh = jax.make_mesh((2,), ("x",))
    split, whole = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("x",), ()))
    config = synthetic.make_config(**{"data.source": "fake", "data.cache": "",
                                      "train.keep_last": 2})  # fmt: skip
    place = places.opened(ADDRESS, scratch)
    (place.path / "assets").mkdir(exist_ok=True)
    checkpoints = place.checkpoints(config, place.path / "assets")

    def save(*steps):
        for step in steps:
            params = {"w": jax.device_put(VALUES + step, split), "s": jnp.float32(step)}
            params["s"] = jax.device_put(params["s"], whole)
            frozen = lambda: {"f": jax.device_put(VALUES, split)}
            checkpoints.save(step, {"params": params}, frozen, {"window": []})
        checkpoints.wait()

    like = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=split)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    restored = checkpoints.restore({"params": {"w": like, "s": scalar}, "frozen": {"f": like}})
    if what == "save":
        assert restored is None
        save(1, 2, 3)
    else:
        items, meta = restored
        here = [s.data for s in items["params"]["w"].addressable_shards]
        expected = (VALUES + 2)[4 * int(index) :][:4]
        np.testing.assert_array_equal(here, [expected])
        assert meta["step"] == 2 and checkpoints.steps() == [2]
        save(3, 4)
    checkpoints.close()
    place.close()
    print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
