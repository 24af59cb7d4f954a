"""Parity with the PyTorch reference on the golden fixtures, through our converters."""

import json

import numpy as np
import pytest

from converters import checks, verify
from converters.__main__ import main


@pytest.fixture(scope="module")
def fixtures(golden):
    return checks.Fixtures(golden, suffixes=(".safetensors",))  # without PyTorch


@pytest.mark.parametrize("group", list(verify.GROUPS))
def test_parity(fixtures, group):
    results = list(verify.run_group(fixtures, group))
    done = [check for check in results if isinstance(check, checks.Check)]
    failed = [check.row() for check in done if not check.ok]
    assert len(done) > 3
    assert not failed, "\n".join(failed)


def test_manifest_lists_what_is_there(golden):
    manifest = json.loads((golden / "manifest.json").read_text())
    there = {str(path.relative_to(golden)): path for path in golden.rglob("*") if path.is_file()}
    del there["manifest.json"]
    assert set(manifest["files"]) == set(there)
    for name in [name for name in there if name.endswith(".npz")]:
        with np.load(there[name]) as arrays:
            found = {key: [str(x.dtype), list(x.shape)] for key, x in arrays.items()}
        assert manifest["files"][name] == found, name
    assert sum(path.stat().st_size for path in there.values()) < 8e6


def test_every_recorded_tensor_is_compared(fixtures):
    """Nothing of the training fixtures is left out by a renamed tensor."""
    compared = {c.tensor for c in verify.run_group(fixtures, "b_state_fusion")}
    for path in (fixtures.root / "b_state_fusion").glob("*.npz"):
        if path.stem != "inputs":
            recorded = set(fixtures.arrays(f"b_state_fusion/{path.name}"))
            assert recorded <= compared, recorded - compared


def test_a_wrong_number_fails():
    check = checks.compare("g", "c", "t", [1.0, 2.0 + 1e-4], [1.0, 2.0])
    assert not check.ok and check.error == pytest.approx(1e-4)
    assert not checks.compare("g", "c", "t", [float("nan")], [1.0]).ok
    assert not checks.compare("g", "c", "t", [1.0], [1.0, 2.0]).ok


def test_verify_lists_what_it_cannot_check(golden, tmp_path, capsys):
    (tmp_path / "c_scheduler").symlink_to(golden / "c_scheduler")
    (tmp_path / "z_unknown").mkdir()
    assert main(["verify", str(tmp_path)]) == 0
    assert "z_unknown: not covered" in capsys.readouterr().out


def test_verify_fails_on_a_missing_file_and_a_missing_directory(tmp_path, capsys):
    (tmp_path / "c_scheduler").mkdir()
    assert main(["verify", str(tmp_path)]) == 1
    assert "could not be checked" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "absent")]) == 2
    assert "no such directory" in capsys.readouterr().err


@pytest.mark.torch
def test_verify_command_line_with_pytorch_files(golden, capsys):
    pytest.importorskip("torch")
    assert main(["verify", str(golden)]) == 0
    out = capsys.readouterr().out
    assert "step_000123_bf16.pt" in out and "h_data: not covered" in out
