"""The converter tables: completeness in both directions, exact round trips, clear refusals."""

import gzip
import json

import jax
import numpy as np
import pytest

from converters import files, lightwam, rules, wan_dit
from converters.__main__ import main
from lightwam_jax import build, params
from lightwam_jax.checkpoint import run as checkpoint
from lightwam_jax.checkpoint import storage

SECTIONS = ("mot", "state_fusion_action_expert", "proprio_encoder")
TOLD = ["--head_dim", "20", "--pool_heads", "2"]


@pytest.fixture(scope="module")
def full_size(golden):
    with gzip.open(golden / "full_size_keys.json.gz") as file:
        return json.load(file)


@pytest.fixture(scope="module")
def released(golden):
    return golden / "ckpt" / "step_000123.safetensors"


@pytest.mark.parametrize("suite", ["libero", "robotwin"])
def test_full_size_keys_map_one_to_one_in_both_directions(full_size, golden, suite):
    shapes, _ = lightwam.flatten_checkpoint(full_size[suite])
    shapes = {key: tuple(shape) for key, shape in shapes.items()}
    config = lightwam.model_config(shapes)
    assert config.variant == "wan21_1_3b"
    targets = rules.target_shapes(lightwam.CHECKPOINT, shapes)
    model = build.build_model(config)
    own = jax.eval_shape(
        lambda key: params.canonical(build.init_params(model, key, config)), jax.random.key(0)
    )
    own_shapes = {path: tuple(leaf.shape) for path, leaf in params.flatten(own).items()}
    assert targets == own_shapes
    layers = wan_dit.stacked_layers(config.num_layers, config.lora_layers)
    assert rules.source_shapes(lightwam.CHECKPOINT, targets, layers) == shapes


@pytest.mark.parametrize("suite", ["libero", "robotwin"])
def test_full_size_trainable_names(full_size, suite):
    """What the released recipe trains is, name by name, what the reference trains."""
    from configs import libero, robotwin

    config = (libero if suite == "libero" else robotwin).get_config()
    shapes, _ = lightwam.flatten_checkpoint(full_size[suite])
    own = params.unflatten(rules.target_shapes(lightwam.CHECKPOINT, shapes))
    trainable, _ = params.partition(own, config.train.trainable)
    model_config = lightwam.model_config({key: tuple(s) for key, s in shapes.items()})
    layers = wan_dit.stacked_layers(model_config.num_layers, model_config.lora_layers)
    names = rules.source_shapes(lightwam.TRAINING, params.flatten(trainable), layers)
    told = full_size[suite]["trainable"]
    assert set(names) == set(told)


def test_command_line_round_trip_is_exact(released, tmp_path, capsys):
    assert (
        main(["lightwam", "--in", str(released), "--out", str(tmp_path / "w"), "--verify", *TOLD])
        == 0
    )
    assert "byte for byte" in capsys.readouterr().out
    back = tmp_path / "b.safetensors"
    assert main(["export", "--in", str(tmp_path / "w"), "--out", str(back)]) == 0
    assert back.read_bytes() == released.read_bytes()


def test_dit_round_trip_is_exact(golden, tmp_path):
    source = golden / "a_dit" / "dit.safetensors"
    assert (
        main(
            [
                "dit",
                "--in",
                str(source),
                "--out",
                str(tmp_path / "w"),
                "--head_dim",
                "20",
                "--verify",
            ]
        )
        == 0
    )
    back = tmp_path / "b.safetensors"
    assert main(["export", "--in", str(tmp_path / "w"), "--out", str(back)]) == 0
    before, after = files.read_tensors(source), files.read_tensors(back)
    assert before.keys() == after.keys()
    assert all(before[k].tobytes() == after[k].tobytes() for k in before)


@pytest.mark.torch
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_pt_round_trip_keeps_keys_dtypes_and_bytes(released_pt, tmp_path, precision):
    torch = pytest.importorskip("torch")
    before = torch.load(released_pt, weights_only=True)
    before["torch_dtype"] = f"torch.{precision}"
    for section in SECTIONS:
        for key, value in before[section].items():
            before[section][key] = value.to(getattr(torch, precision))
    torch.save(before, tmp_path / "a.pt")
    assert (
        main(["lightwam", "--in", str(tmp_path / "a.pt"), "--out", str(tmp_path / "w"), *TOLD]) == 0
    )
    assert main(["export", "--in", str(tmp_path / "w"), "--out", str(tmp_path / "b.pt")]) == 0
    after = torch.load(tmp_path / "b.pt", weights_only=True)
    assert (before["step"], before["torch_dtype"]) == (after["step"], after["torch_dtype"])
    for section in SECTIONS:
        assert set(before[section]) == set(after[section])
        for key, value in before[section].items():
            assert value.dtype == after[section][key].dtype == getattr(torch, precision)
            assert torch.equal(value, after[section][key])


def test_checkpoint_sections_become_prefixes_and_back():
    """Also of the legacy layout: a top-level "dit" without prefixes instead of "mot"."""
    rest = {"state_fusion_action_expert": {"b": 2}, "proprio_encoder": {"weight": 3}}
    told = {"step": 7, "torch_dtype": "torch.bfloat16"}
    new = {"mot": {"mixtures.video.head.w": 1, "mixtures.video.x": 4}, **rest}
    old = {"dit": {"head.w": 1, "x": 4}, **rest}
    flat = {
        "mot.mixtures.video.head.w": 1,
        "mot.mixtures.video.x": 4,
        "state_fusion_action_expert.b": 2,
        "proprio_encoder.weight": 3,
    }
    assert lightwam.flatten_checkpoint({**new, **told}) == (flat, told)
    assert lightwam.flatten_checkpoint({**old, **told}) == (flat, told)
    assert lightwam.flatten_checkpoint({**old, "mot": {}, **told}) == (flat, told)
    assert lightwam.unflatten_checkpoint(flat, told) == {**new, **told}
    for name in new:
        broken = {key: section for key, section in new.items() if key != name}
        with pytest.raises(ValueError, match=f"section {name} is missing"):
            lightwam.flatten_checkpoint(broken)


@pytest.mark.torch
def test_the_legacy_layout_is_read(released_pt, tmp_path):
    """A top-level "dit" without prefixes instead of "mot"."""
    torch = pytest.importorskip("torch")
    content = torch.load(released_pt, weights_only=True)
    content["dit"] = {
        key.removeprefix("mixtures.video."): value for key, value in content.pop("mot").items()
    }
    torch.save(content, tmp_path / "legacy.pt")
    for name, path in (("a", released_pt), ("b", tmp_path / "legacy.pt")):
        assert main(["lightwam", "--in", str(path), "--out", str(tmp_path / name), *TOLD]) == 0
    a, b = (storage.read_meta(tmp_path / name)["arrays"] for name in "ab")
    assert a == b


@pytest.mark.torch
def test_pickles_with_code_are_refused(tmp_path, capsys):
    torch = pytest.importorskip("torch")

    class Evil:
        def __reduce__(self):
            return (print, ("code ran",))

    torch.save({"mot": {}, "x": Evil()}, tmp_path / "evil.pt")
    assert main(["lightwam", "--in", str(tmp_path / "evil.pt"), "--out", str(tmp_path / "w")]) == 2
    shown = capsys.readouterr()
    assert "evil.pt" in shown.err and "refused" in shown.err and "code ran" not in shown.out


def _changed(released, tmp_path, change):
    tensors = files.read_tensors(released)
    change(tensors)
    path = tmp_path / "changed.safetensors"
    files.write_tensors(path, tensors)
    return path


VIDEO = "mot.mixtures.video."


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop("proprio_encoder.weight"), "proprio_encoder.weight"),
        (lambda t: t.pop(f"{VIDEO}head.modulation"), "head.modulation"),
        (lambda t: t.update({f"{VIDEO}extra.weight": np.zeros(2, np.float32)}), "extra.weight"),
        (
            lambda t: t.update({f"{VIDEO}head.modulation": np.zeros((1, 2, 3), np.float32)}),
            "head.modulation is [1, 2, 3], expected [1, 2, 40]",
        ),
        (
            lambda t: t.update({f"{VIDEO}blocks.1.ffn.0.bias": np.zeros(96, np.float16)}),
            "blocks.1.ffn.0.bias",
        ),
        (lambda t: t.pop(f"{VIDEO}blocks.1.ffn.0.bias"), "blocks.1.ffn.0.bias"),
    ],
    ids=["no proprio", "missing", "unexpected", "shape", "dtype", "gap in a stack"],
)
def test_bad_files_are_refused_by_key_and_leave_nothing(released, tmp_path, capsys, change, words):
    path = _changed(released, tmp_path, change)
    out = tmp_path / "w"
    assert main(["lightwam", "--in", str(path), "--out", str(out), *TOLD]) == 2
    message = capsys.readouterr().err
    assert words in message and "changed.safetensors" in message
    assert not out.exists()


def test_truncated_absent_and_headless_files(released, tmp_path, capsys):
    short = tmp_path / "short.safetensors"
    short.write_bytes(released.read_bytes()[:5000])
    for path, words in ((short, "truncated"), (tmp_path / "absent.pt", "no such file")):
        assert main(["lightwam", "--in", str(path), "--out", str(tmp_path / "w"), *TOLD]) == 2
        assert words in capsys.readouterr().err
    assert main(["lightwam", "--in", str(released), "--out", str(tmp_path / "w")]) == 2
    assert "--head_dim" in capsys.readouterr().err


def test_export_of_something_else_is_refused(tmp_path, capsys):
    assert main(["export", "--in", str(tmp_path), "--out", str(tmp_path / "x.pt")]) == 2
    assert "no checkpoint" in capsys.readouterr().err


def test_converted_weights_know_their_model(released, tmp_path):
    main(["lightwam", "--in", str(released), "--out", str(tmp_path / "w"), *TOLD])
    stored = checkpoint.load_params(tmp_path / "w")
    model = stored.meta["config"]["model"]
    assert (model["dim"], model["num_heads"], model["adapter_layers"]) == (40, 2, [1, 3, 4])
