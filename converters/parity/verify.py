"""Proof of parity: runs every check a fixture directory allows and prints one line per check.

The directory holds groups of fixtures made by the PyTorch reference at any sizes (see SPEC
section 15 for the layout this project's own fixtures have); models are built from its files.
"""

from pathlib import Path

import jax

from converters.parity import data as parity_data
from converters.parity import inference as parity_inference
from converters.parity import model as parity_model
from converters.parity import pretrained as parity_pretrained
from converters.parity import training as parity_training
from converters.parity.fixtures import Fixtures, NotCovered

GROUPS = {
    "a_dit": parity_model.a_dit,
    "b_state_fusion": parity_model.b_state_fusion,
    "c_scheduler": parity_model.c_scheduler,
    "ckpt": parity_training.ckpt,
    "d_train": parity_training.d_train,
    "e_infer": parity_inference.e_infer,
    "f_vae": parity_pretrained.f_vae,
    "g_text": parity_pretrained.g_text,
    "h_data": parity_data.h_data,
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
    fixtures, done, failed = Fixtures(root), 0, []
    out(
        f"{'group':<15} {'component':<22} {'tensor':<58} {'max abs':>9} {'relative':>9} "
        f"{'tolerance':>9}  ok"
    )
    uncovered = []
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
