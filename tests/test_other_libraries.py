"""Our models against diffusers' and transformers', through our command line, and back.

Tiny random models of theirs are saved as their libraries save them, converted by
`python -m converters`, and run on the same inputs; then our checkpoints are exported and loaded
into their classes with strict=True.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters import layouts
from converters.__main__ import main
from lightwam_jax import config as config_lib
from lightwam_jax import params
from lightwam_jax.checkpoint import run as checkpoint
from lightwam_jax.models import dit, t5

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch


def randomised(model):
    """Noise on every parameter, seeded: fresh modules hold zeros and ones that hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval().requires_grad_(False)


def draw(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def channels_last(x):
    return np.moveaxis(np.asarray(x), 1, -1)


def run(function, *args):
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(function)(*args))


def back(directory, tmp_path, model, layout, suffix=".safetensors", tied=None):
    """Exports and loads into the library's model; returns whether every tensor is identical.

    tied: {another name: the name in files} of tensors that a model lists twice.
    """
    out = tmp_path / f"back_{layout}{suffix}"
    assert main(["export", "--in", str(directory), "--out", str(out), "--layout", layout]) == 0
    if suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(out)
    else:
        state = torch.load(out, weights_only=True)
    state.update({alias: state[key] for alias, key in (tied or {}).items()})
    before = {key: value.clone() for key, value in model.state_dict().items()}
    randomised(model)
    model.load_state_dict(state, strict=True)
    return all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
    """(diffusers' model, the folder it was saved to, our checkpoint)."""
    model = randomised(
        diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=20,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=32,
            ffn_dim=48,
            num_layers=3,
        )
    )
    folder = tmp_path_factory.mktemp("pipeline")
    model.save_pretrained(folder / "transformer", max_shard_size="100KB")
    assert (folder / "transformer/diffusion_pytorch_model.safetensors.index.json").exists()
    out = tmp_path_factory.mktemp("dit") / "w"
    assert (
        main(["dit", "--in", str(folder), "--out", str(out), "--head_dim", "20", "--verify"]) == 0
    )
    return model, folder, out


def test_transformer_of_diffusers(transformer, tmp_path):
    model, _, out = transformer
    stored = checkpoint.load_params(out)
    fields = dict(
        stored.meta["config"]["model"],
        attention_mask="bidirectional",
        dtype="float32",
        attention="xla",
    )
    fields = {key: tuple(x) if isinstance(x, list) else x for key, x in fields.items()}
    config = config_lib.model_variant("tiny", **fields)
    module = dit.WanDiT(
        **{
            name: getattr(config, name)
            for name in dit.WanDiT.__dataclass_fields__
            if hasattr(config, name) and name != "dtype"
        },
        dtype=jnp.float32,
    )
    tree = params.segmented(stored.params, config)["dit"]
    latents, text, t = draw(2, 16, 3, 4, 6), draw(2, 7, 32, seed=2), np.float32([731.25, 12.5])
    # Frame 0 is clean in our models: its tokens are at time 0.
    times = np.repeat(np.stack([0 * t, t, t], axis=1), 2 * 3, axis=1)
    expected = model(torch.tensor(latents), torch.tensor(times), torch.tensor(text)).sample

    def velocity(tree, x, t, text):
        def call(module, x, t, text):
            context = module.embed_context(text)
            return module.velocity(x, t, module.keys_values(context))

        return module.apply({"params": tree}, x, t, text, method=call)

    got = run(velocity, tree, channels_last(latents), t, text)
    np.testing.assert_allclose(got, channels_last(expected), rtol=0, atol=1e-5)
    assert np.abs(expected.numpy()).max() > 0.5


def test_transformer_goes_back(transformer, tmp_path):
    model, _, out = transformer
    assert back(out, tmp_path, model, "diffusers")
    # ... and by way of the official names
    official = tmp_path / "official.safetensors"
    assert main(["export", "--in", str(out), "--out", str(official), "--layout", "official"]) == 0
    assert (
        main(["dit", "--in", str(official), "--out", str(tmp_path / "w"), "--head_dim", "20"]) == 0
    )
    assert back(tmp_path / "w", tmp_path, model, "diffusers", ".pt")


@pytest.mark.parametrize(
    "version, options",
    [
        ("wan21", dict(base_dim=4, z_dim=16)),
        (
            "wan22",
            dict(
                base_dim=4,
                decoder_base_dim=6,
                z_dim=48,
                in_channels=12,
                out_channels=12,
                patch_size=2,
                is_residual=True,
                scale_factor_spatial=16,
                temperal_downsample=[False, True, True],
                latents_mean=[0.0] * 48,
                latents_std=[1.0] * 48,
            ),
        ),
    ],
)
def test_vae_of_diffusers(version, options, tmp_path):
    model = randomised(diffusers.AutoencoderKLWan(**options))
    model.save_pretrained(tmp_path / "vae")
    out = tmp_path / "w"
    assert main(["vae", "--in", str(tmp_path / "vae"), "--out", str(out), "--verify"]) == 0
    stored = checkpoint.load_params(out)
    assert stored.meta["config"]["vae"]["version"] == version
    module = layouts.vae_model(stored.meta["config"])
    mean, std = np.float32(module.latent_mean), np.float32(module.latent_std)
    video = np.tanh(draw(1, 3, 9, 32, 48))
    for frames in (1, 9):
        expected = model.encode(torch.tensor(video[:, :, :frames])).latent_dist.mean
        got = run(
            lambda tree, x: module.apply({"params": tree}, x, method="encode"),
            stored.params,
            channels_last(video[:, :, :frames]),
        )
        np.testing.assert_allclose(got * std + mean, channels_last(expected), rtol=0, atol=5e-5)
    latents = expected.numpy()
    expected = model.decode(torch.tensor(latents)).sample
    got = run(
        lambda tree, z: module.apply({"params": tree}, z, method="decode"),
        stored.params,
        (channels_last(latents) - mean) / std,
    )
    np.testing.assert_allclose(got, channels_last(expected), rtol=0, atol=5e-5)
    assert back(out, tmp_path, model, "diffusers")


def test_umt5_of_transformers(tmp_path):
    model = randomised(
        transformers.UMT5EncoderModel(
            transformers.UMT5Config(
                vocab_size=50,
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=3,
                num_heads=4,
                dropout_rate=0.0,
            )
        )
    )
    model.save_pretrained(tmp_path / "text_encoder")
    out = tmp_path / "w"
    assert main(["t5", "--in", str(tmp_path), "--out", str(out), "--verify"]) == 0
    stored = checkpoint.load_params(out)
    module = t5.UMT5Encoder(**stored.meta["config"]["text_encoder"])
    ids = np.random.default_rng(0).integers(0, 50, (2, 20))
    mask = np.arange(20) < np.array([[20], [7]])
    expected = model(torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state
    got = run(
        lambda tree, ids, mask: module.apply({"params": tree}, ids, mask), stored.params, ids, mask
    )
    np.testing.assert_allclose(got[mask], expected.numpy()[mask], rtol=0, atol=1e-5)
    tied = {"encoder.embed_tokens.weight": "shared.weight"}
    assert back(out, tmp_path, model, "huggingface", tied=tied)


def test_umt5_with_its_table_under_both_names(tmp_path, capsys):
    """Some folders hold the token table twice: read once if equal, refused if not."""
    from safetensors.torch import save_file

    model = randomised(
        transformers.UMT5EncoderModel(
            transformers.UMT5Config(
                vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4
            )
        )
    )
    state = {key: value.clone() for key, value in model.state_dict().items()}
    save_file(state, tmp_path / "twice.safetensors")
    assert (
        main(["t5", "--in", str(tmp_path / "twice.safetensors"), "--out", str(tmp_path / "w")]) == 0
    )
    state["encoder.embed_tokens.weight"][3, 3] += 1
    save_file(state, tmp_path / "unlike.safetensors")
    assert (
        main(["t5", "--in", str(tmp_path / "unlike.safetensors"), "--out", str(tmp_path / "x")])
        == 2
    )
    assert "encoder.embed_tokens.weight" in capsys.readouterr().err
