"""What the command line of the converters accepts, refuses, and leaves behind."""

import errno
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from converters import files, locate
from converters.__main__ import main
from lightwam_jax.checkpoint import run as checkpoint
from lightwam_jax.checkpoint import storage, streamed

HEADS = ["--head_dim", "20"]


@pytest.fixture(scope="module")
def transformer(golden):
    """Tensors of an official transformer: the fixture's, without LoRA and adapters."""
    tensors = files.read_tensors(golden / "a_dit" / "dit.safetensors")
    return {key: x for key, x in tensors.items() if "lora" not in key and "adapters" not in key}


@pytest.fixture(scope="module")
def text_encoder(golden):
    return golden / "g_text" / "text_encoder_tiny.safetensors"


def save(tensors, path):
    save_file({key: np.ascontiguousarray(x) for key, x in tensors.items()}, path)
    return path


def run(capsys, *args):
    """(exit code, what was printed to stderr without progress bars)."""
    code = main([str(arg) for arg in args])
    return code, capsys.readouterr().err


def shards(tensors, folder, count=2):
    """Writes tensors as Hugging Face shards with an index; returns the index."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = sorted(tensors)
    place = {
        key: f"diffusion_pytorch_model-{i % count + 1:05}-of-{count:05}.safetensors"
        for i, key in enumerate(keys)
    }
    for name in set(place.values()):
        save({key: tensors[key] for key in keys if place[key] == name}, folder / name)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": place}), encoding="utf-8")
    return index


# ---- ways in -------------------------------------------------------------------------------------


def test_shards_folder_and_prefix_give_the_same_checkpoint(transformer, tmp_path):
    single = save(transformer, tmp_path / "single.safetensors")
    prefixed = save(
        {f"model.{key}": x for key, x in transformer.items()}, tmp_path / "prefixed.safetensors"
    )
    index = shards(transformer, tmp_path / "repo" / "transformer")
    wanted = None
    for name, place in (("a", single), ("b", prefixed), ("c", index), ("d", tmp_path / "repo")):
        out = tmp_path / name
        assert main(["dit", "--in", str(place), "--out", str(out), *HEADS]) == 0
        meta = storage.read_meta(out)
        wanted = wanted or meta["arrays"]
        assert meta["arrays"] == wanted  # checksums included
    assert (
        main(
            [
                "export",
                "--in",
                str(tmp_path / "b"),
                "--out",
                str(tmp_path / "x.safetensors"),
            ]
        )
        == 0
    )
    assert (
        files.read_tensors(tmp_path / "x.safetensors").keys() == files.read_tensors(prefixed).keys()
    )


def test_parts_larger_than_memory_allows_are_written_piece_by_piece(
    text_encoder, tmp_path, monkeypatch
):
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert main(["t5", "--in", str(text_encoder), "--out", str(whole)]) == 0
    monkeypatch.setattr(streamed, "PART_BYTES", 5000)  # rows of the table; one layer of a stack
    monkeypatch.setattr(streamed, "_SMALL_BYTES", 100)
    assert main(["t5", "--in", str(text_encoder), "--out", str(pieces), "--verify"]) == 0
    manifests = [storage.read_meta(out)["arrays"] for out in (whole, pieces)]
    assert manifests[0] == manifests[1]
    trees = [checkpoint.load_params(out).params for out in (whole, pieces)]
    for a, b in zip(*map(lambda tree: list(tree["blocks"]["ffn"].values()), trees)):
        np.testing.assert_array_equal(a["kernel"], b["kernel"])


def test_files_beside_the_weights_come_along(text_encoder, tmp_path, capsys):
    shutil.copy(text_encoder, tmp_path / "model.safetensors")
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert run(capsys, "t5", "--in", tmp_path, "--out", tmp_path / "w")[0] == 0
    assert (tmp_path / "w" / "assets" / "tokenizer.json").read_text(encoding="utf-8") == "{}"
    code, error = run(
        capsys,
        "t5",
        "--in",
        tmp_path,
        "--out",
        tmp_path / "x",
        "--tokenizer",
        tmp_path / "absent" / "tokenizer.json",
    )
    assert code == 2 and "tokenizer.json: no such file" in error


def test_statistics_of_another_robot_are_refused(golden, tmp_path, capsys):
    source = golden / "ckpt" / "step_000123.safetensors"
    stats = tmp_path / "dataset_stats.json"
    one = {"min": [0.0], "max": [1.0], "mean": [0.5], "std": [1.0], "q01": [0.0], "q99": [1.0]}
    numbers = {f"global_{key}": value for key, value in one.items()}
    stats.write_text(
        json.dumps({name: {"default": numbers} for name in ("state", "action")}), encoding="utf-8"
    )
    code, error = run(
        capsys,
        "lightwam",
        "--in",
        source,
        "--out",
        tmp_path / "w",
        *HEADS,
        "--pool_heads",
        2,
        "--stats",
        stats,
    )
    assert code == 2 and "dataset_stats.json" in error and not (tmp_path / "w").exists()


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop("blocks.2.ffn.0.bias"), "blocks.2.ffn.0.bias"),
        (lambda t: t.update(extra=np.zeros(1, np.float32)), "extra"),
        (
            lambda t: t.update({"head.head.bias": np.zeros(3, np.float32)}),
            "head.head.bias is [3], expected [64]",
        ),
        (lambda t: t.update({"head.head.bias": np.zeros(64, np.int32)}), "head.head.bias is int32"),
        (
            lambda t: t.update({"head.head.bias": t["head.head.bias"].astype(np.float64)}),
            "head.head.bias is float64",
        ),
    ],
    ids=["missing", "unexpected", "shape", "integers", "float64"],
)
def test_bad_transformers_are_refused(transformer, tmp_path, capsys, change, words):
    tensors = dict(transformer)
    change(tensors)
    path = save(tensors, tmp_path / "bad.safetensors")
    code, error = run(capsys, "dit", "--in", path, "--out", tmp_path / "w", *HEADS)
    assert code == 2 and words in error and "bad.safetensors" in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.safetensors"]


@pytest.mark.parametrize(
    "kind, name, key",
    [
        ("vae", "f_vae/vae21_tiny", "encoder.downsamples.0.residual.6.weight"),
        ("vae", "f_vae/wan22_vae_tiny", "decoder.head.2.bias"),
        ("t5", "g_text/text_encoder_tiny", "blocks.1.ffn.fc2.weight"),
        ("t5", "g_text/text_encoder_tiny", "blocks.2.pos_embedding.embedding.weight"),
    ],
)
def test_incomplete_files_are_refused(golden, tmp_path, capsys, kind, name, key):
    tensors = files.read_tensors(golden / f"{name}.safetensors")
    del tensors[key]
    path = save(tensors, tmp_path / "bad.safetensors")
    code, error = run(capsys, kind, "--in", path, "--out", tmp_path / "w")
    assert code == 2 and f"missing {key}" in error and "bad.safetensors" in error


def test_another_size_is_refused_by_variant(transformer, tmp_path, capsys):
    path = save(transformer, tmp_path / "small.safetensors")
    code, error = run(
        capsys, "dit", "--in", path, "--out", tmp_path / "w", *HEADS, "--variant", "wan21_1_3b"
    )
    assert code == 2 and "small.safetensors" in error
    assert "blocks.0.cross_attn.k.bias is [40], expected [1536]" in error


def test_another_kind_is_refused(text_encoder, tmp_path, capsys):
    code, error = run(capsys, "vae", "--in", text_encoder, "--out", tmp_path / "w")
    assert code == 2 and "is a t5 file" in error and "converters t5" in error
    path = save({"nothing": np.zeros(2, np.float32)}, tmp_path / "odd.safetensors")
    code, error = run(capsys, "inspect", path)
    assert code == 2 and "odd.safetensors" in error and "nothing" in error


def test_bad_indices_are_refused(transformer, tmp_path, capsys):
    index = shards(transformer, tmp_path)
    content = json.loads(index.read_text(encoding="utf-8"))
    second = tmp_path / "diffusion_pytorch_model-00002-of-00002.safetensors"
    kept = second.read_bytes()
    second.unlink()
    code, error = run(capsys, "dit", "--in", index, "--out", tmp_path / "w", *HEADS)
    assert code == 2 and second.name in error and "blocks.0." in error
    second.write_bytes(kept[:1000])
    code, error = run(capsys, "dit", "--in", index, "--out", tmp_path / "w", *HEADS)
    assert code == 2 and second.name in error and "truncated" in error
    second.write_bytes(kept)
    content["weight_map"]["blocks.9.norm3.bias"] = second.name
    index.write_text(json.dumps(content), encoding="utf-8")
    code, error = run(capsys, "dit", "--in", index, "--out", tmp_path / "w", *HEADS)
    assert code == 2 and "blocks.9.norm3.bias" in error
    content["weight_map"]["blocks.9.norm3.bias"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content), encoding="utf-8")
    code, error = run(capsys, "dit", "--in", index, "--out", tmp_path / "w", *HEADS)
    assert code == 2 and "beside the index" in error


def test_a_full_disk_leaves_nothing(text_encoder, tmp_path, capsys, monkeypatch):
    def full(leaf, row, part):
        raise OSError(errno.ENOSPC, "No space left on device")

    real = streamed.save
    monkeypatch.setattr(streamed, "save", lambda directory, tree, done: real(directory, tree, full))
    out = tmp_path / "w"
    code, error = run(capsys, "t5", "--in", text_encoder, "--out", out)
    assert code == 2 and "No space left on device" in error
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert run(capsys, "t5", "--in", text_encoder, "--out", out)[0] == 0
    monkeypatch.setattr(files, "save_file", lambda *_: full(0, 0, 0))
    code, error = run(capsys, "export", "--in", out, "--out", tmp_path / "x.safetensors")
    assert code == 2 and "No space" in error and [p.name for p in tmp_path.iterdir()] == ["w"]


def test_a_wrong_ending_and_an_unknown_layout(text_encoder, tmp_path, capsys):
    out = tmp_path / "w"
    assert main(["t5", "--in", str(text_encoder), "--out", str(out)]) == 0
    code, error = run(capsys, "export", "--in", out, "--out", tmp_path / "x.bin")
    assert code == 2 and ".safetensors, .pt or .pth" in error
    code, error = run(
        capsys, "export", "--in", out, "--out", tmp_path / "x.safetensors", "--layout", "diffusers"
    )
    assert code == 2 and "official or huggingface" in error
    code, error = run(capsys, "t5", "--in", text_encoder, "--out", out)
    assert code == 2 and "exists" in error


def test_bytes_that_change_on_the_way_are_noticed(text_encoder, tmp_path, capsys, monkeypatch):
    real = storage.read_array

    def altered(directory, name, path, meta):
        array = real(directory, name, path, meta)
        if path == "norm/scale":
            array = np.array(array)
            array[3] += np.float32(1e-6)
        return array

    monkeypatch.setattr(storage, "read_array", altered)
    code, error = run(capsys, "t5", "--in", text_encoder, "--out", tmp_path / "w", "--verify")
    assert code == 2 and "norm/scale" in error and not (tmp_path / "w").exists()


# ---- folders and the hub -------------------------------------------------------------------------


def test_a_folder_with_several_candidates_or_none(tmp_path, capsys):
    code, error = run(capsys, "dit", "--in", tmp_path, "--out", tmp_path / "w")
    assert code == 2 and "diffusion_pytorch_model" in error
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).touch()
    code, error = run(capsys, "lightwam", "--in", tmp_path, "--out", tmp_path / "w")
    assert code == 2 and "a.pt" in error and "b.pt" in error


def test_the_hub_gives_the_right_file_and_its_revision(text_encoder, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    names = [
        "README.md",
        "google/umt5-xxl/tokenizer.json",
        "text_encoder/model.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
    ]
    (tmp_path / "text_encoder").mkdir()
    shutil.copy(text_encoder, tmp_path / "text_encoder" / "model.safetensors")
    asked = {}

    def info(self, repo, revision=None):
        asked.update(repo=repo, revision=revision)
        return type(
            "Info",
            (),
            {
                "sha": "abc123",
                "siblings": [type("Sibling", (), {"rfilename": name}) for name in names],
            },
        )

    def download(repo, revision, allow_patterns):
        asked.update(patterns=allow_patterns, got=revision)
        return str(tmp_path)

    monkeypatch.setattr(hub.HfApi, "repo_info", info)
    monkeypatch.setattr(hub, "snapshot_download", download)
    assert main(["t5", "--in", "hf:owner/name@v1", "--out", str(tmp_path / "w")]) == 0
    assert asked["revision"] == "v1" and asked["got"] == "abc123"
    assert asked["patterns"][0] == "text_encoder/model.safetensors"
    assert storage.read_meta(tmp_path / "w")["source"]["revision"] == "abc123"
    path, revision = locate.locate("hf:owner/name:text_encoder/model.safetensors", "t5")
    assert path.is_file() and revision == "abc123"


def test_inspect_tells_kind_sizes_and_types(text_encoder, golden, tmp_path, capsys):
    assert main(["inspect", str(text_encoder)]) == 0
    shown = capsys.readouterr().out
    assert "t5 (official names)" in shown and "vocab=120" in shown and "30,560 float32" in shown
    source = golden / "ckpt" / "step_000123.safetensors"
    assert main(["inspect", str(source), *HEADS, "--pool_heads", "2"]) == 0
    shown = capsys.readouterr().out
    assert "lightwam" in shown and "adapter_layers=(1, 3, 4)" in shown and "lora_rank=4" in shown
    assert main(["t5", "--in", str(text_encoder), "--out", str(tmp_path / "w")]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "w")]) == 0
    shown = capsys.readouterr().out
    assert "converted from text_encoder_tiny.safetensors" in shown and "num_layers=3" in shown


def test_half_precision_survives(transformer, tmp_path):
    half = {key: x.astype(ml_dtypes.bfloat16) for key, x in transformer.items()}
    source = save(half, tmp_path / "half.safetensors")
    assert main(["dit", "--in", str(source), "--out", str(tmp_path / "w"), *HEADS]) == 0
    assert (
        main(["export", "--in", str(tmp_path / "w"), "--out", str(tmp_path / "b.safetensors")]) == 0
    )
    assert source.read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["vae21_tiny", "wan22_vae_tiny"])
def test_vae_round_trip_is_exact(golden, tmp_path, name):
    source = golden / "f_vae" / f"{name}.safetensors"
    assert main(["vae", "--in", str(source), "--out", str(tmp_path / "w")]) == 0
    for layout in ("diffusers", "official"):
        assert (
            main(
                [
                    "export",
                    "--in",
                    str(tmp_path / "w"),
                    "--layout",
                    layout,
                    "--out",
                    str(tmp_path / f"{layout}.safetensors"),
                ]
            )
            == 0
        )
    before, after = (
        files.read_tensors(path) for path in (source, tmp_path / "official.safetensors")
    )
    assert before.keys() == after.keys()
    assert all(before[key].tobytes() == after[key].tobytes() for key in before)
    assert (
        main(["vae", "--in", str(tmp_path / "diffusers.safetensors"), "--out", str(tmp_path / "x")])
        == 0
    )
    a, b = (storage.read_meta(tmp_path / out)["arrays"] for out in "wx")
    assert a == b
