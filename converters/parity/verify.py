"""Proof of parity: runs every check a fixture directory allows and prints one line per check.

The directory holds groups of fixtures made by the PyTorch reference at any sizes (docs/spec.md
section 15 has the layout of this project's own fixtures); models are built from its files.
"""

from pathlib import Path

import jax

from converters.parity import data, flow_action, inference, model, pretrained, training
from converters.parity.fixtures import Fixtures, NotCovered

# Folder of a group -> function (fixtures) that yields its `Check`s and `NotCovered`s.
GROUPS = {
    "a_dit": model.a_dit,
    "b_state_fusion": model.b_state_fusion,
    "c_scheduler": model.c_scheduler,
    "ckpt": training.ckpt,
    "d_train": training.d_train,
    "e_infer": inference.e_infer,
    "f_vae": pretrained.f_vae,
    "g_text": pretrained.g_text,
    "h_data": data.h_data,
    "i_flow_action": flow_action.i_flow_action,
}


def run_group(fixtures, name):
    """Yields the `Check`s and `NotCovered`s of one group, in full float32."""
    with jax.default_matmul_precision("highest"):
        yield from GROUPS[name](fixtures)


def verify(directory, out=print):
    """Checks every group in a directory and prints the table.

    Returns:
      True if every check passed and at least one ran.

    A group that cannot be read (a missing file, PyTorch not installed) counts as failed.

    Raises:
      FileNotFoundError: the directory does not exist.
    """
    root = Path(directory)
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root}: no such directory; expected one laid out like tests/golden"
        )
    fixtures, done, failed, uncovered = Fixtures(root), 0, [], []
    out(
        f"{'group':<15} {'component':<22} {'tensor':<58} {'max abs':>9} {'relative':>9} "
        f"{'tolerance':>9}  ok"
    )
    for folder in sorted(path.name for path in root.iterdir() if path.is_dir()):
        if folder not in GROUPS:
            uncovered.append(folder)
            continue
        try:
            for check in run_group(fixtures, folder):
                if isinstance(check, NotCovered):
                    uncovered.append(check.group)
                    continue
                done += 1
                out(check.row())
                if not check.ok:
                    failed.append(check.row())
        except (ValueError, FileNotFoundError, ModuleNotFoundError, KeyError) as error:
            failed.append(f"{folder}: could not be checked: {error}")
    for name in uncovered:
        out(f"{name}: not covered")
    out(f"{done} checks, {len(failed)} failed")
    for line in failed:
        out(f"FAILED {line}")
    return bool(done) and not failed
