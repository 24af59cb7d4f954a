"""A checkpoint that only acts, in half the bytes: parameters in bfloat16, checked file by file.

What was float32 is rounded once, when it is written, and computed with in float32 again: so the
rounding is part of the weights, and not of where they run.
"""

import hashlib
import json
import pathlib

import jax.numpy as jnp

from lightwam_jax import params as params_lib
from lightwam_jax.checkpoint import storage


def rounded(params):
    """Returns (params with float32 leaves in bfloat16, {path: dtype} of those leaves)."""
    flat = params_lib.flatten(params)
    wide = [path for path, x in flat.items() if x.dtype == jnp.float32]
    small = {path: jnp.asarray(x, jnp.bfloat16) if path in wide else x for path, x in flat.items()}
    return params_lib.unflatten(small), dict.fromkeys(wide, "float32")


def widened(params, meta):
    """Returns parameters in the dtypes that they had before `rounded`, of a checkpoint's meta."""
    dtypes = meta.get("dtypes", {})
    if not dtypes:
        return params
    flat = params_lib.flatten(params)
    return params_lib.unflatten({p: x.astype(dtypes.get(p, x.dtype)) for p, x in flat.items()})


def sums(directory):
    """Returns {relative path: 16 hex digits} of the files below a directory."""
    directory = pathlib.Path(directory)
    files = [f for f in sorted(directory.rglob("*")) if f.is_file()]
    files = [f for f in files if f.name != storage.COMMIT_FILE]
    return {f.relative_to(directory).as_posix(): _sum(f) for f in files}


def check_assets(directory, meta):
    """Checks the assets of a checkpoint whose meta item lists them.

    Raises:
      storage.DamagedCheckpointError: one is missing or altered.
    """
    wanted = meta.get("files", {})
    found = sums(directory / "assets") if wanted else {}
    if wrong := sorted(name for name in wanted if found.get(name) != wanted[name]):
        missing = [name for name in wrong if name not in found]
        raise storage.DamagedCheckpointError(
            f"{directory}/assets: {', '.join(wrong)} {'missing' if missing else 'altered'}; "
            "restore the directory from a whole copy"
        )


def is_compact(directory):
    """Whether a directory holds such a checkpoint; False where there is none at all."""
    meta = pathlib.Path(directory, "meta", "metadata")
    return meta.exists() and "dtypes" in json.loads(meta.read_text(encoding="utf-8"))


def _sum(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
