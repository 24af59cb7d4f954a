"""Checks of inference: from latents or pixels to actions, and to the imagined future's frames."""

import jax
import jax.numpy as jnp
import numpy as np

from converters.parity.fixtures import (
    FACTOR,
    Compare,
    NotCovered,
    channels_first,
    channels_last,
    matching,
)
from converters.parity.model import attentions
from lightwam_jax import flow
from lightwam_jax.inference import deploy
from lightwam_jax.models import vae as vae_lib
from lightwam_jax.models.lightwam import pool_latents, resize_velocity

SHIFT = 5.0  # of the recorded schedules


def e_infer(fixtures):
    """The policy and the imagined future, from recorded latents and from pixels."""
    model, tree, config = fixtures.lightwam
    vae = _Vae(fixtures)
    act = jax.jit(
        lambda tree, first, text, proprio, mask, horizon: model.apply(
            {"params": tree}, first, text, proprio, horizon, mask, method="act"
        ),
        static_argnums=5,
    )
    data = fixtures.arrays("e_infer/infer_action.npz")
    yield from _act(act, model.dit.adapter_layers, tree, vae, data)
    yield from _deployed(tree, config, vae, data)
    present = [path.name for path in (fixtures.root / "e_infer").iterdir()]
    for name in matching(present, "infer_joint_factor*.npz"):
        factor = int(name.removeprefix("infer_joint_factor").removesuffix(".npz"))
        yield from _joint(act, model, tree, vae, fixtures.arrays(f"e_infer/{name}"), factor)
    if fixtures.has("e_infer/lowres_rollout.npz"):
        low = fixtures.arrays("e_infer/lowres_rollout.npz")
        steps = fixtures.manifest.get("config", {}).get("infer_steps", 4)
        yield from _lowres(model, tree, vae, data, low, steps)
    if fixtures.has("e_infer/latent_resample.npz"):
        yield from _resample(fixtures.arrays("e_infer/latent_resample.npz"))


class _Vae:
    """The directory's VAE of the backbone, or none."""

    def __init__(self, fixtures):
        model, self._tree = fixtures.vaes.get("wan21", (None, None))
        self._encode, self._decode = (
            jax.jit(lambda tree, x, method=method: model.apply({"params": tree}, x, method=method))
            for method in ("encode", "decode")
        )
        self._noise = fixtures.noise("vae21.decoded_unclamped")
        self._latent_noise = fixtures.noise("vae21.video_latent")

    def first(self, name, data, expected):
        """(latents [1,1,h,w,C] of a fixture's image or None, its checks)."""
        if "image" not in data:
            return None, []
        if self._tree is None:
            return None, [NotCovered(f"e_infer/{name} from pixels")]
        latents = self._encode(self._tree, channels_last(data["image"][:, :, None]))
        got, compare = channels_first(latents), Compare("e_infer", f"{name} pixels")
        return latents, [compare("first_frame_latents", got, expected, self._latent_noise)]

    def still(self, data):
        """Latents of a fixture's image from the kernels' last time taps, or None."""
        if "image" not in data or self._tree is None:
            return None
        image = channels_last(data["image"][:, :, None])
        return self._encode(vae_lib.still_params(self._tree), image)

    def frames(self, name, data):
        """The decoded video of the recorded latents, as floats and as the bytes a viewer gets."""
        recorded = [tensor for tensor in ("decoded", "frames_uint8") if tensor in data]
        if self._tree is None:
            yield from (NotCovered(f"e_infer/{name}/{tensor}") for tensor in recorded)
            return
        if not recorded:
            return
        latents, compare = channels_last(data["final_latents"]), Compare("e_infer", name)
        video = channels_first(self._decode(self._tree, latents))
        # These latents are rougher than those of f_vae, and the noise recorded there is too small
        # here. Theirs: what the decoder makes of moving each value by one rounding.
        coins = np.random.default_rng(0).random(latents.shape) < 0.5
        moved = np.nextafter(latents, np.where(coins, np.inf, -np.inf), dtype=np.float32)
        noise = np.abs(channels_first(self._decode(self._tree, moved)) - video).max()
        noise = max(noise, self._noise or 0.0)
        if "decoded" in data:
            yield compare("decoded", video, data["decoded"], noise)
        if "frames_uint8" in data:
            # Truncation makes a step of any noise at the edge of a byte: there, one is allowed.
            level = (np.moveaxis(video[0], 0, -1).astype(np.float64) + 1) * 127.5
            slack, frames = FACTOR * 127.5 * noise, data["frames_uint8"]
            nearest = np.clip(frames, np.floor(level - slack).clip(0), np.floor(level + slack))
            yield compare.exact("frames_uint8", nearest, frames)


def _context(data, first):
    """(first latents [1,1,h,w,C], text [1,L,Ct], proprio [1,P], mask [1,L]) of a fixture."""
    text, proprio, mask = (data[name][None] for name in ("context", "proprio", "context_mask"))
    return jnp.asarray(first), text, proprio, jnp.asarray(mask)


def _act(act, adapter_layers, tree, vae, data):
    first, text, proprio, mask = _context(data, channels_last(data["first_frame_latents"]))
    horizon = data["action"].shape[0]

    def actions(first=first, proprio=proprio, mask=mask, horizon=horizon):
        return act(tree, first, text, proprio, mask, horizon)[0][0]

    whole, taps = act(tree, first, text, proprio, mask, horizon)
    got = {"action": whole[0], "action_without_proprio": actions(proprio=None)}
    for key in matching(data, "action_horizon*"):
        got[key] = actions(horizon=int(key.removeprefix("action_horizon")))
    if "action_downsampled_action_branch" in data:
        got["action_downsampled_action_branch"] = actions(pool_latents(first, 2))
    for layer in adapter_layers:
        for source, state in taps[f"state_{layer}"].items():
            got[f"state_{source}_{layer}"] = state
    got.update(attentions(taps))
    # The released encoding shows attention the zeroed padding rows; this variant hides them.
    if "action_with_padding_masked" in data:
        real = jnp.asarray((data["context"] != 0).any(axis=-1))[None]
        got["action_with_padding_masked"] = actions(mask=real)
    yield from Compare("e_infer", "infer_action").recorded(got, data)
    seen, checks = vae.first("infer_action", data, data["first_frame_latents"])
    yield from checks
    if seen is not None:
        yield Compare("e_infer", "infer_action pixels")("action", actions(seen), data["action"])


def _deployed(tree, config, vae, data):
    """The deployed form (inference/deploy.py): the same actions and attention."""
    first, text, proprio, mask = _context(data, channels_last(data["first_frame_latents"]))
    weights = deploy.deployed(tree, config, len(data["action"]))

    @jax.jit
    def act(weights, first, mask):
        keys_values = deploy.keys_values(weights, text, config)
        return deploy.act(weights, first, keys_values, mask, proprio, config, taps=True)

    actions, taps = act(weights, first, mask)
    got = {"action": actions[0], **attentions(taps)}
    if "action_with_padding_masked" in data:
        real = jnp.asarray((data["context"] != 0).any(axis=-1))[None]
        got["action_with_padding_masked"] = act(weights, first, real)[0][0]
    yield from Compare("e_infer", "deployed").recorded(got, data)
    seen = vae.still(data)
    if seen is not None:
        actions = act(weights, seen, mask)[0][0]
        yield Compare("e_infer", "deployed pixels")("action", actions, data["action"])


def _joint(act, model, tree, vae, data, factor):
    """Denoising at full latent resolution with the network on a grid pooled by `factor`."""
    name = f"infer_joint_factor{factor}"
    compare = Compare("e_infer", name)
    first = data["latents_in"][0][:, :, :1]
    seen, checks = vae.first(name, data, first)
    yield from checks
    first, *rest = _context(data, channels_last(first) if seen is None else seen)
    noise, steps = channels_last(data["noise"]), len(data["timesteps"])
    yield compare("timesteps", flow.sampling_schedule(steps, SHIFT)[0], data["timesteps"])

    @jax.jit
    def denoise(tree):
        options = dict(steps=steps, shift=SHIFT, factor=factor, method="denoise")
        return model.apply({"params": tree}, first, noise, *rest, **options)

    final, taps = denoise(tree)
    for i in range(steps):
        for tensor, tap in (("latents_in", "latents"), ("preds", "velocity")):
            yield compare(f"{tensor}[{i}]", channels_first(taps[tap][i]), data[tensor][i])
    yield compare("final_latents", channels_first(final), data["final_latents"])
    if "action" in data:
        actions, _ = act(tree, first, *rest, len(data["action"]))
        yield compare("action", actions[0], data["action"])
    yield from vae.frames(name, data)


def _lowres(model, tree, vae, data, low, steps):
    """Denoising on the pooled grid, from the context that the policy's fixture has."""
    noise = channels_last(low["noise"])
    first, *rest = _context(data, channels_last(data["first_frame_latents"]))
    first = pool_latents(first, first.shape[2] // noise.shape[2])

    @jax.jit
    def predict(tree):
        return model.apply(
            {"params": tree}, first, noise, *rest, steps=steps, method="predict_video"
        )

    final = channels_first(predict(tree))
    yield Compare("e_infer", "lowres_rollout")("final_latents", final, low["final_latents"])
    yield from vae.frames("lowres_rollout", low)


def _resample(data):
    compare = Compare("e_infer", "latent_resample")
    z, down = channels_last(data["z"]), channels_last(data["down"])
    pooled = pool_latents(z, z.shape[2] // down.shape[2])
    yield compare("down", channels_first(pooled), data["down"])
    up = resize_velocity(down, z.shape[2], z.shape[3])
    yield compare("up", channels_first(up), data["up"])
