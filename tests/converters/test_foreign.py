"""Weight files from outside: what stands around the weights, and files that hold none."""

import argparse
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from converters import files, foreign, policy, rules, wrapped
from converters.__main__ import main
from lightwam_jax.checkpoint import storage, streamed

HEADS = ["--head_dim", "20"]


@pytest.fixture(scope="module")
def transformer(golden):
    tensors = files.read_tensors(golden / "a_dit" / "dit.safetensors")
    return {key: x for key, x in tensors.items() if "lora" not in key and "adapters" not in key}


def run(capsys, *args):
    """(exit code, stdout, stderr)."""
    code = main([str(arg) for arg in args])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def save(tensors, path, metadata=None):
    save_file({key: np.ascontiguousarray(x) for key, x in tensors.items()}, path, metadata)
    return path


# ---- prefixes ------------------------------------------------------------------------------------

PREFIXES = ("module.", "_orig_mod.", "model.diffusion_model.", "module._orig_mod.")
PREFIXES += ("diffusion_model.", "model.", "pipe.dit.", "_fsdp_wrapped_module.", "net.module.ema.")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_of_all_keys_is_left_out_and_named(transformer, prefix):
    source = rules.InMemory({prefix + key: x for key, x in transformer.items()})
    plain, left_out = wrapped.unwrap(source)
    assert left_out == prefix and list(plain.entries) == list(transformer)
    np.testing.assert_array_equal(plain.read("head.modulation"), transformer["head.modulation"])
    assert prefix in wrapped.told({"prefix": left_out})
    assert wrapped.unwrap(rules.InMemory(transformer))[1] == ""


def test_a_wrapped_file_becomes_the_same_checkpoint_and_gets_its_prefix_back(
    transformer, tmp_path, capsys
):
    plain = save(transformer, tmp_path / "plain.safetensors")
    given = {f"module._orig_mod.{key}": x for key, x in transformer.items()}
    given = save(given, tmp_path / "given.safetensors")
    for name, path in (("a", plain), ("b", given)):
        code, out, _ = run(capsys, "dit", "--in", path, "--out", tmp_path / name, *HEADS)
        assert code == 0 and ("'module._orig_mod.' of all keys" in out) == (name == "b")
    a, b = (storage.read_meta(tmp_path / name)["arrays"] for name in "ab")
    assert a == b  # checksums included
    back = tmp_path / "back.safetensors"
    assert run(capsys, "export", "--in", tmp_path / "b", "--out", back)[0] == 0
    assert files.open_tensors(back).entries.keys() == files.open_tensors(given).entries.keys()


def test_wrappers_inside_keys_are_left_out(transformer):
    """torch.compile and FSDP of each block alone."""
    change = lambda key: key.replace("blocks.1.", "blocks.1._orig_mod._checkpoint_wrapped_module.")
    source = rules.InMemory({change(key): x for key, x in transformer.items()})
    plain, prefix = wrapped.unwrap(source)
    assert prefix == "" and set(plain.entries) == set(transformer)


def test_a_prefix_of_some_keys_or_two_sets_of_keys_are_refused(transformer):
    mixed = {f"model.diffusion_model.{key}": x for key, x in transformer.items()}
    mixed["first_stage_model.conv1.weight"] = np.zeros(2, np.float32)
    with pytest.raises(ValueError, match=r"'model\.diffusion_model\.' and are those of a dit"):
        wrapped.unwrap(rules.InMemory(mixed))
    twice = transformer | {f"module.{key}": x for key, x in transformer.items()}
    with pytest.raises(ValueError, match="twice, as"):
        wrapped.unwrap(rules.InMemory(twice))
    clip = {f"text.embeddings.{key}.weight": np.zeros(2) for key in ("token_embedding", "position")}
    assert wrapped.unwrap(rules.InMemory(clip | {"text.x": np.zeros(1)}))[1] == ""


# ---- PyTorch files -------------------------------------------------------------------------------


def _as_torch(tensors):
    torch = pytest.importorskip("torch")
    return {key: torch.from_numpy(np.array(x)) for key, x in tensors.items()}


@pytest.mark.torch
@pytest.mark.parametrize(
    "nest, place",
    [
        (lambda t: {"state_dict": t, "epoch": 3}, "state_dict"),
        (lambda t: {"model": {f"module.{k}": x for k, x in t.items()}, "lr": 0.1}, "model"),
        (lambda t: {"ema": {"shadow": t}, "args": {"seed": 1}}, "ema.shadow"),
        (lambda t: {**t, "step": 7, "name": "wan"}, ""),
    ],
)
def test_weights_in_dictionaries_are_found(transformer, tmp_path, nest, place):
    torch = pytest.importorskip("torch")
    torch.save(nest(_as_torch(transformer)), tmp_path / "a.pt")
    source = files.open_tensors(tmp_path / "a.pt")
    assert source.rest == {"part": place}
    plain, _ = wrapped.unwrap(source)
    assert list(plain.entries) == list(transformer)
    np.testing.assert_array_equal(plain.read("head.head.bias"), transformer["head.head.bias"])


@pytest.mark.torch
def test_of_several_sets_of_weights_one_has_to_be_named(transformer, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    tensors = _as_torch(transformer)
    other = tensors | {"head.head.bias": tensors["head.head.bias"] + 1}
    path = tmp_path / "two.pt"
    torch.save({"model": tensors, "ema": other, "optimizer": {"state": {0: tensors}}}, path)
    with pytest.raises(ValueError, match=r"two.pt: .*model .*ema .*--part"):
        files.open_tensors(path)
    source = files.open_tensors(path, "ema")
    want = transformer["head.head.bias"] + 1
    np.testing.assert_array_equal(source.read("head.head.bias"), want)
    code, out, _ = run(capsys, "inspect", path, "--part", "ema", *HEADS)
    assert code == 0 and "lie under 'ema'" in out
    code, _, error = run(capsys, "inspect", path, "--part", "nothing")
    assert code == 2 and "model (" in error


class _Config:
    pass


@pytest.mark.torch
@pytest.mark.parametrize(
    "beside, name",
    [
        (argparse.Namespace(lr=1e-4), "argparse.Namespace"),
        (np.float64(0.5), "scalar"),
        (_Config(), "_Config"),
        (np.zeros(3), "_reconstruct"),
    ],
    ids=["namespace", "scalar", "class", "array"],
)
def test_foreign_objects_are_named_and_nothing_unsafe_is_advised(
    transformer, tmp_path, beside, name
):
    torch = pytest.importorskip("torch")
    content = {"model_state": _as_torch(transformer), "config": beside}
    for old in (False, True):
        path = tmp_path / f"{old}.pt"
        torch.save(content, path, _use_new_zipfile_serialization=not old)
        with pytest.raises(ValueError) as caught:
            files.open_tensors(path)
        message = str(caught.value)
        assert name in message and str(path) in message and "state_dict()" in message
        assert "safe_globals" not in message and "weights_only" not in message


@pytest.mark.torch
def test_tensors_alone_have_no_unsafe_names(released_pt):
    assert foreign.unsafe_names(released_pt) == []


@pytest.mark.torch
def test_a_light_wam_checkpoint_in_another_dictionary(released_pt, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    content = torch.load(released_pt, weights_only=True)
    torch.save({"checkpoint": content}, tmp_path / "a.pt")
    flat, rest = files.read_checkpoint(released_pt)
    nested, told = files.read_checkpoint(tmp_path / "a.pt")
    assert list(flat) == list(nested) and told == rest | {"part": "checkpoint"}
    with pytest.raises(ValueError, match="converters lightwam"):
        files.open_tensors(released_pt)
    code, out, _ = run(capsys, "inspect", released_pt, *HEADS, "--pool_heads", 2)
    assert code == 0 and "lightwam" in out and "step 123" in out


@pytest.mark.torch
def test_shards_of_pytorch_files(transformer, tmp_path):
    torch = pytest.importorskip("torch")
    tensors, place = _as_torch(transformer), {}
    for number in range(2):
        name = f"diffusion_pytorch_model-{number + 1:05}-of-00002.bin"
        some = dict(list(tensors.items())[number::2])
        torch.save(some, tmp_path / name)
        place |= dict.fromkeys(some, name)
    index = tmp_path / "diffusion_pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": place}), encoding="utf-8")
    found = files.read_tensors(index)
    assert found.keys() == transformer.keys()
    np.testing.assert_array_equal(found["head.head.bias"], transformer["head.head.bias"])


# ---- files that hold no weights ------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.gguf", b"GGUF\x03\0\0\0", "GGUF"),
        ("b.bin", b"GGUF\x03\0\0\0", "GGUF"),
        ("c.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("d.pth", b"<!DOCTYPE html><html>", "web page"),
        ("e.pt", b"", "is empty"),
        ("f.onnx", b"\x08\x07", "ONNX"),
        ("g.h5", b"\x89HDF\r\n", "HDF5"),
        ("h.json", b"{}", "holds text and no weights"),
    ],
)
def test_files_of_other_programs_are_named(tmp_path, capsys, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    for command in (("inspect", path), ("dit", "--in", path, "--out", tmp_path / "w")):
        code, _, error = run(capsys, *command)
        assert code == 2 and words in error and str(path) in error


def test_archives_of_numpy_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros(2))
    (tmp_path / "a.npz").rename(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="arrays of numpy"):
        files.open_tensors(tmp_path / "a.pt")


def test_safetensors_under_another_name_are_read(transformer, tmp_path):
    path = save(transformer, tmp_path / "weights.bin")
    assert files.open_tensors(path).entries.keys() == transformer.keys()


ADAPTERS = {
    "peft": "base_model.model.blocks.{}.self_attn.q.lora_A.weight",
    "diffusers": "transformer.blocks.{}.attn1.to_q.lora_B.weight",
    "kohya": "lora_unet_blocks_{}_self_attn_q.lora_down.weight",
}


@pytest.mark.parametrize("names", ADAPTERS)
def test_adapters_alone_are_named(tmp_path, capsys, names):
    tensors = {ADAPTERS[names].format(i): np.ones((4, 8), np.float32) for i in range(2)}
    path = save(tensors, tmp_path / "adapter_model.safetensors")
    for command in (("inspect", path), ("dit", "--in", path, "--out", tmp_path / "w")):
        code, _, error = run(capsys, *command)
        assert code == 2 and "LoRA adapters alone" in error and "merge" in error
    config = tmp_path / "adapter_config.json"
    config.write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x/y"}), encoding="utf-8"
    )
    for place in (tmp_path, path, config):
        code, _, error = run(capsys, "inspect", place)
        assert code == 2 and "of x/y" in error
    both = tensors | {"base_model.model.blocks.0.self_attn.q.base_layer.weight": np.ones((2, 2))}
    save(both, path)
    assert "not merged" in run(capsys, "inspect", path)[2]


# ---- what is there, and what to pass -------------------------------------------------------------


def test_all_missing_flags_are_asked_for_at_once_after_what_is_there(golden, tmp_path, capsys):
    source = golden / "ckpt" / "step_000123.safetensors"
    code, out, _ = run(capsys, "inspect", source, "--pool_heads", 7)
    assert code == 0 and "lightwam" in out and "values in" in out
    assert "--head_dim" in out and "--pool_heads" in out
    code, _, error = run(
        capsys, "lightwam", "--in", source, "--out", tmp_path / "w", "--pool_heads", 7
    )
    assert code == 2 and "--head_dim" in error and "--pool_heads" in error


def test_incomplete_and_quantised_files_are_listed_before_they_are_refused(
    transformer, tmp_path, capsys
):
    less = {key: x for key, x in transformer.items() if key != "blocks.1.ffn.0.bias"}
    path = save(less, tmp_path / "less.safetensors")
    code, out, error = run(capsys, "inspect", path, *HEADS)
    assert code == 2 and "dit (official names)" in out and "values in" in out
    assert "blocks.1.ffn.0.bias" in error
    small = {key: x.astype(ml_dtypes.float8_e4m3fn) for key, x in transformer.items()}
    path = save(small, tmp_path / "fp8.safetensors")
    code, out, error = run(capsys, "inspect", path, *HEADS)
    assert code == 2 and "float8_e4m3fn" in out and "quantised" in error


def test_shards_that_are_missing_are_all_named_after_what_the_index_lists(
    transformer, tmp_path, capsys
):
    names = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    place = {key: names[i % 3] for i, key in enumerate(transformer)}
    save({key: x for key, x in transformer.items() if place[key] == names[0]}, tmp_path / names[0])
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": place}), encoding="utf-8")
    code, out, error = run(capsys, "inspect", index)
    assert code == 2 and f"index of {len(place)} tensors in 3 shards, of a dit" in out
    assert names[1] in error and names[2] in error and "2 of its 3" in error
    some = {"blocks.0.norm3.bias": transformer["blocks.0.norm3.bias"]}
    alone = save(some, tmp_path / "model-00002-of-00003.safetensors")
    assert "shard 2 of 3" in run(capsys, "inspect", alone)[2]


# ---- the command line ----------------------------------------------------------------------------


def test_without_a_network_the_hub_says_which_file_to_place(tmp_path, capsys, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    errors = pytest.importorskip("huggingface_hub.errors")
    of_http = errors.HfHubHTTPError.__bases__[0]  # as a host that is not found gives it
    for raised in (
        ConnectionError("Name or service not known"),
        of_http("Name or service not known"),
        errors.LocalEntryNotFoundError("not on this disk"),
        errors.OfflineModeIsEnabled("offline mode is enabled"),
    ):

        def offline(*args, raised=raised, **kwargs):
            raise raised

        monkeypatch.setattr(hub.HfApi, "repo_info", offline)
        place = "hf:Wan-AI/Wan2.1-T2V-1.3B"
        code, _, error = run(capsys, "vae", "--in", place, "--out", tmp_path / "w")
        assert code == 2 and "Wan2.*_VAE.pth" in error and "--in" in error
        assert error.count("\n") == 1 and "could not be downloaded" in error
    code, _, error = run(capsys, "vae", "--in", "hf:nonsense", "--out", tmp_path / "w")
    assert code == 2 and "hf:owner/name" in error


def test_ctrl_c_is_one_line_and_leaves_nothing(transformer, tmp_path, capsys, monkeypatch):
    path = save(transformer, tmp_path / "a.safetensors")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(streamed, "save", interrupted)
    with pytest.raises(SystemExit) as ended:
        run(capsys, "dit", "--in", path, "--out", tmp_path / "w", *HEADS)
    assert ended.value.code == 130 and "run the command again" in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]


def test_wrong_arguments_are_one_line(tmp_path, capsys):
    for arguments, words in (
        (["dit"], "required: --in, --out"),
        (["dit", "--in", "x", "--out", "y", "--head_dim", "big"], "invalid int value: 'big'"),
        (["dit", "--in", "x", "--out", "y", "--zzz"], "unrecognized arguments: --zzz"),
        (["dot"], "invalid choice: 'dot'"),
        ([], "required: command"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.count("\n") == 1 and words in said
    (tmp_path / "file").touch()
    code, _, error = run(capsys, "dit", "--in", "x", "--out", tmp_path / "file" / "w")
    assert code == 2 and "file is no directory" in error
    for config, words in (
        ("absent.py", "no such file"),
        ("configs/libero.py:x", "expected one of"),
    ):
        code, _, error = run(capsys, "texts", "--in", tmp_path, "--config", config)
        assert code == 2 and words in error and error.count("\n") == 1


def test_a_policy_without_statistics_says_where_they_come_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dataset_stats.json").write_text("{}", encoding="utf-8")  # of somebody else
    for assets in (None, tmp_path / "assets"):
        with pytest.raises(FileNotFoundError, match=r"weights/w keeps no .* --stats FILE"):
            policy._statistics(None, assets, "weights/w")
    with pytest.raises(FileNotFoundError, match=r"absent\.json: no such file"):
        policy._statistics("absent.json", None, "weights/w")
    assert policy._statistics(None, tmp_path, "w") == tmp_path / "dataset_stats.json"
