"""Parity with the PyTorch reference on the golden fixtures, through our converters."""

import functools
import json

import numpy as np
import pytest

from converters import umt5
from converters.__main__ import main
from converters.parity import fixtures as fixtures_lib
from converters.parity import verify


@pytest.fixture(scope="module")
def fixtures(golden):
    return fixtures_lib.Fixtures(golden, suffixes=(".safetensors",))  # without PyTorch


@pytest.fixture(scope="module")
def run(fixtures):
    """Function group -> its checks, run once."""
    return functools.cache(lambda group: list(verify.run_group(fixtures, group)))


@pytest.mark.parametrize("group", list(verify.GROUPS))
def test_parity(run, group):
    results = run(group)
    done = [check for check in results if isinstance(check, fixtures_lib.Check)]
    failed = [check.row() for check in done if not check.ok]
    assert len(done) > 3
    assert not failed, "\n".join(failed)


def test_manifest_lists_what_is_there(golden):
    manifest = json.loads((golden / "manifest.json").read_text(encoding="utf-8"))
    there = {str(path.relative_to(golden)): path for path in golden.rglob("*") if path.is_file()}
    del there["manifest.json"]
    assert set(manifest["files"]) == set(there)
    for name in [name for name in there if name.endswith(".npz")]:
        with np.load(there[name]) as arrays:
            found = {key: [str(x.dtype), list(x.shape)] for key, x in arrays.items()}
        assert manifest["files"][name] == found, name
    assert sum(path.stat().st_size for path in there.values()) < 8e6


def test_every_recorded_tensor_is_compared(fixtures, run):
    """Nothing of the fixtures is left out by a renamed tensor."""
    given = {"image", "video", "latent", "ids", "mask", "rel_pos"}
    for group in ("b_state_fusion", "f_vae", "g_text"):
        compared = {check.tensor for check in run(group)}
        for path in (fixtures.root / group).glob("*.npz"):
            if path.stem != "inputs":
                recorded = set(fixtures.arrays(f"{group}/{path.name}")) - given
                assert recorded <= compared, recorded - compared


def test_a_wrong_number_fails():
    compare = fixtures_lib.Compare("g", "c")
    check = compare("t", [1.0, 2.0 + 1e-4], [1.0, 2.0])
    assert not check.ok and check.error == pytest.approx(1e-4)
    assert not compare("t", [float("nan")], [1.0]).ok
    assert not compare("t", [1.0], [1.0, 2.0]).ok


def test_verify_lists_what_it_cannot_check(golden, tmp_path, capsys):
    (tmp_path / "c_scheduler").symlink_to(golden / "c_scheduler")
    (tmp_path / "z_unknown").mkdir()
    assert main(["verify", str(tmp_path)]) == 0
    assert "z_unknown: not covered" in capsys.readouterr().out


def test_without_weights_of_the_vae_decoding_is_not_covered(fixtures, golden, tmp_path):
    """What cannot be checked is listed, and the rest is checked all the same."""
    (tmp_path / "f_vae").mkdir()
    (tmp_path / "f_vae" / "vae22.npz").symlink_to(golden / "f_vae" / "vae22.npz")
    results = list(verify.run_group(fixtures_lib.Fixtures(tmp_path), "f_vae"))
    assert results == [fixtures_lib.NotCovered("f_vae/vae22.npz, whose weights are not there")]


def test_verify_fails_on_a_missing_file_and_a_missing_directory(tmp_path, capsys):
    (tmp_path / "c_scheduler").mkdir()
    assert main(["verify", str(tmp_path)]) == 1
    assert "could not be checked" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "absent")]) == 2
    assert "no such directory" in capsys.readouterr().err


@pytest.fixture
def data(golden, tmp_path):
    """A copy of h_data in which files may be replaced, and how to check it."""
    (tmp_path / "h_data").mkdir()
    for path in (golden / "h_data").iterdir():
        (tmp_path / "h_data" / path.name).symlink_to(path)

    def run():
        results = list(verify.run_group(fixtures_lib.Fixtures(tmp_path), "h_data"))
        uncovered = {each.group for each in results if isinstance(each, fixtures_lib.NotCovered)}
        return uncovered, [each for each in results if isinstance(each, fixtures_lib.Check)]

    return tmp_path / "h_data", run


def replace(directory, name, arrays):
    (directory / name).unlink(missing_ok=True)
    np.savez(directory / name, **arrays)


def test_wrong_and_unknown_data_are_found(data):
    directory, run = data
    samples = dict(np.load(directory / "dataset_samples.npz"))
    samples["0.context"] = np.zeros((4, 2), np.float32)
    samples["3.action"][5, 2] += 1e-5
    samples["5.video_frames_8"][0, 0, 3, 40] += 1e-3
    replace(directory, "dataset_samples.npz", samples)
    (directory / "new.npz").touch()
    uncovered, done = run()
    assert uncovered == {"h_data/new.npz", "h_data/dataset_samples.npz/0.context"}
    assert {check.tensor for check in done if not check.ok} == {"action", "5.video_frames_8"}
    (directory / "lerobot").unlink()
    (directory / "dataset_info.json").unlink()
    uncovered, done = run()
    assert len(done) > 20 and all(check.ok for check in done)
    assert {name.split(",")[0] for name in uncovered} == {
        "h_data/new.npz",
        "h_data/dataset_samples.npz",
        "h_data/dataset_stats.json",
        "h_data/delta_mask.npz",
        "h_data/libero_postprocess.npz/normalized",
    }


@pytest.mark.torch
def test_the_references_caches_are_checked(data):
    """Written here as the reference writes them; its own are too large to keep."""
    torch = pytest.importorskip("torch")
    directory, run = data
    rng = np.random.default_rng(0)
    samples = dict(np.load(directory / "dataset_samples.npz"))
    told = json.loads((directory / "dataset_info.json").read_text(encoding="utf-8"))["samples"]
    latents = torch.from_numpy(rng.normal(size=(int(samples["length"]), 4, 3, 2, 4))).bfloat16()
    for name in ("text_cache", "latent_single", "latent_sharded/shards"):
        (directory / name).mkdir(parents=True)
    order, half = torch.from_numpy(rng.permutation(len(latents))), len(latents) // 2
    place = torch.argsort(order).int()
    for shard, rows in enumerate((order[:half], order[half:])):
        torch.save(
            {"sample_indices": rows, "video_latents": latents[rows]},
            directory / "latent_sharded" / "shards" / f"{shard}.pt",
        )
    torch.save(
        {
            "storage_format": "sharded_v1",
            "num_samples": len(latents),
            "sample_to_shard": place // half,
            "sample_to_offset": place % half,
            "shard_paths": ["shards/0.pt", "shards/1.pt"],
        },
        directory / "latent_sharded" / "index.pt",
    )
    for k, index in enumerate(samples["index"]):
        torch.save(
            {"video_latents": latents[index].clone()},
            directory / "latent_single" / f"{index:08d}.pt",
        )
        samples[f"{k}.video_latents"] = latents[index].float().numpy()
        prompt, mask = told[k]["prompt"], torch.arange(6) < 4
        context = torch.full((6, 2), len(prompt)).bfloat16()
        torch.save(
            {"context": context, "mask": mask},
            directory / "text_cache" / umt5.cache_name(prompt, 6, "Wan-AI/Wan2.1-T2V-1.3B"),
        )
        samples[f"{k}.context"] = (context * mask[:, None]).float().numpy()
        samples[f"{k}.context_mask"] = np.ones(6, bool)
    replace(directory, "dataset_samples.npz", samples)
    uncovered, done = run()
    assert not uncovered and all(check.ok for check in done)
    assert {"text_cache", "latent_single", "latent_sharded"} <= {c.component for c in done}
    samples["2.video_latents"][0, 0, 0, 0] += 0.01
    samples["3.context"][1, 1] += 0.1
    replace(directory, "dataset_samples.npz", samples)
    assert [check.component for check in run()[1] if not check.ok] == [
        "latent_sharded",
        "latent_single",
        "text_cache",
    ]


@pytest.mark.torch
def test_verify_command_line_with_pytorch_files(golden, released_pt, tmp_path, capsys):
    """A directory as the reference leaves it: its checkpoint beside ours, its VAE as a .pth."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    for path in golden.iterdir():
        if path.name not in ("ckpt", "f_vae"):
            (tmp_path / path.name).symlink_to(path)
    for group in ("ckpt", "f_vae"):
        (tmp_path / group).mkdir()
        for path in (golden / group).iterdir():
            if path.name != "vae21_tiny.safetensors":
                (tmp_path / group / path.name).symlink_to(path)
    (tmp_path / "ckpt" / released_pt.name).symlink_to(released_pt)
    torch.save(
        {"model_state": load_file(golden / "f_vae" / "vae21_tiny.safetensors")},
        tmp_path / "f_vae" / "vae21_tiny.pth",
    )
    assert main(["verify", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    uncovered = [line for line in out.splitlines() if line.endswith("not covered")]
    assert len(uncovered) == 1 and "idm_teacher_forcing" in uncovered[0]
    for name in ("step_000123_bf16.pt", "vae21", "vae22", "frames_uint8", "rel_bucket", "lerobot"):
        assert name in out
