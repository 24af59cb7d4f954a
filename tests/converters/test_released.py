"""The way of a released checkpoint: three PyTorch-side files become a policy that acts."""

import json

import jax
import numpy as np
import pytest
import tokenizers

from converters.__main__ import main
from lightwam_jax.inference.policy import Policy
from lightwam_jax.models import lightwam

pytestmark = pytest.mark.slow

CONFIG = """
from configs import base

def get_config(suite):
    c = base.get_config("tiny", action_dim=7, proprio_dim=8, dtype="float32")
    c.name = f"tiny_{suite}"
    c.data.source, c.data.path, c.data.cache = "lerobot", "absent", "absent"
    c.data.cameras, c.data.layout, c.data.canvas = ("image", "wrist_image"), "horizontal", (32, 64)
    c.data.text_len = 32
    return c
"""


@pytest.fixture(scope="module")
def policy_directory(golden, tmp_path_factory):
    root = tmp_path_factory.mktemp("release")
    words = ["<pad>", "</s>", "<unk>", *["open", "the", "top", "drawer", "a", "video", "robot"]]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.save(str(root / "tokenizer.json"))
    ends = {"min": -1.0, "max": 1.0, "mean": 0.0, "std": 1.0, "q01": -1.0, "q99": 1.0}
    stats = {
        name: {"default": {f"global_{key}": [value] * width for key, value in ends.items()}}
        for name, width in (("state", 8), ("action", 7))
    }
    (root / "dataset_stats.json").write_text(
        json.dumps({**stats, "num_episodes": 1}), encoding="utf-8"
    )
    (root / "tiny.py").write_text(CONFIG, encoding="utf-8")
    (root / "prompts.txt").write_text("open the top drawer\n", encoding="utf-8")
    told = ["--head_dim", 20, "--pool_heads", 2, "--stats", root / "dataset_stats.json"]
    parts = ["--vae", root / "vae", "--text", root / "t5", "--prompts", root / "prompts.txt"]
    config, tokens = f"{root}/tiny.py:all", ["--tokenizer", root / "tokenizer.json"]
    for name, *command in (
        ["w", "lightwam", "--in", golden / "ckpt" / "step_000123.safetensors", *told],
        ["vae", "vae", "--in", golden / "f_vae" / "vae21_tiny.safetensors"],
        ["t5", "t5", "--in", golden / "g_text" / "text_encoder_tiny.safetensors", *tokens],
        ["policy", "policy", "--weights", root / "w", "--config", config, *parts],
    ):
        command += ["--out", root / name]
        assert main([str(word) for word in command]) == 0
    return root / "policy"


def test_a_converted_release_acts(policy_directory):
    policy = Policy.load(policy_directory)
    rng = np.random.default_rng(0)
    images = {
        name: rng.integers(0, 256, (2, 32, 32, 3), np.uint8) for name in ("image", "wrist_image")
    }
    state = rng.normal(size=(2, 8)).astype(np.float32)
    prompts = ["open the top drawer", "open a drawer"]  # one cached, one encoded now
    actions = policy.act(images, state, prompts)
    assert actions.shape == (2, 32, 7) and np.isfinite(actions).all()
    deployed = Policy.load(policy_directory, deploy=True)
    np.testing.assert_allclose(deployed.act(images, state, prompts), actions, rtol=0, atol=2e-5)
    # The same by hand: encode, look up the text, act, undo the normalisation.
    canvas = np.concatenate([images["image"], images["wrist_image"]], axis=2)
    latents = policy.assets.codec.encode(canvas[:, None])
    text = [policy.config.data.prompt_template.replace("{task}", task) for task in prompts]
    context, _ = policy.assets.text_encoder.encode(text, 32)
    rounded = np.asarray(jax.numpy.bfloat16(latents), np.float32)
    expected, _ = policy.model.apply(
        {"params": policy.params},
        rounded,
        context,
        policy.assets.state.normalize(state),
        32,
        method=lightwam.LightWAM.act,
    )
    np.testing.assert_allclose(
        actions, policy.assets.action.inverse(np.asarray(expected)), rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("resolution", ["pooled", "full"])
def test_a_converted_release_imagines(policy_directory, resolution):
    policy = Policy.load(policy_directory)
    images = {name: np.zeros((1, 32, 32, 3), np.uint8) for name in ("image", "wrist_image")}
    video = policy.predict_video(
        images, np.zeros((1, 8)), ["open the top drawer"], steps=2, resolution=resolution
    )
    shape = (16, 32) if resolution == "pooled" else (32, 64)
    assert video.shape == (1, 9, *shape, 3) and video.dtype == np.uint8


def test_what_does_not_fit_is_refused(policy_directory, tmp_path, capsys):
    root = policy_directory.parent
    rest = ["--vae", root / "vae", "--text", root / "t5", "--out", tmp_path / "p"]
    config = ["--config", f"{root}/tiny.py:all"]
    whole = ["--weights", root / "w", *config]
    for words, command in {
        "absent.py: no such file": ["--weights", root / "w", "--config", "absent.py", *rest],
        "holds no whole Light-WAM": ["--weights", root / "vae", *config, *rest],
        "exists": [*whole, *rest[:-1], root / "policy"],
        "data.codec_weights": [*whole, "--vae", root / "t5", *rest[2:]],
    }.items():
        assert main(["policy", *map(str, command)]) == 2
        assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
