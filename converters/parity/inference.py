"""Checks of inference: from latents or pixels to actions, and to the imagined future's frames."""

import jax
import jax.numpy as jnp
import numpy as np

from converters.parity.fixtures import (
    FACTOR,
    NotCovered,
    channels_first,
    channels_last,
    compare,
    matching,
)
from converters.parity.model import attentions
from lightwam_jax import flow
from lightwam_jax.models.lightwam import pool_latents, resize_velocity

SHIFT = 5.0  # of the recorded schedules


def e_infer(fixtures):
    """The policy and the imagined future, from recorded latents and from pixels."""
    model, tree, _ = fixtures.lightwam()
    vae = _Vae(fixtures)
    act = jax.jit(
        lambda tree, first, text, proprio, mask, horizon: model.apply(
            {"params": tree}, first, text, proprio, horizon, mask, method="act"
        ),
        static_argnums=5,
    )
    data = fixtures.arrays("e_infer/infer_action.npz")
    yield from _act(act, model.dit.adapter_layers, tree, vae, data)
    present = [path.name for path in (fixtures.root / "e_infer").iterdir()]
    for name in matching(present, "infer_joint_factor*.npz"):
        factor = int(name.removeprefix("infer_joint_factor").removesuffix(".npz"))
        yield from _joint(act, model, tree, vae, fixtures.arrays(f"e_infer/{name}"), factor)
    if fixtures.has("e_infer/lowres_rollout.npz"):
        low = fixtures.arrays("e_infer/lowres_rollout.npz")
        first, *rest = _context(data, channels_last(data["first_frame_latents"]))
        first = pool_latents(first, first.shape[2] // low["noise"].shape[-2])
        steps = fixtures.manifest.get("config", {}).get("infer_steps", 4)
        final = jax.jit(
            lambda tree: model.apply(
                {"params": tree},
                first,
                channels_last(low["noise"]),
                *rest,
                steps=steps,
                method="predict_video",
            )
        )(tree)
        yield compare(
            "e_infer",
            "lowres_rollout",
            "final_latents",
            channels_first(final),
            low["final_latents"],
        )
        yield from vae.frames("lowres_rollout", low)
    if fixtures.has("e_infer/latent_resample.npz"):
        yield from _resample(fixtures.arrays("e_infer/latent_resample.npz"))


class _Vae:
    """The directory's VAE of the backbone, or none."""

    def __init__(self, fixtures):
        model, self._tree = fixtures.vae("wan21") or (None, None)
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
        return latents, [
            compare(
                "e_infer",
                f"{name} pixels",
                "first_frame_latents",
                channels_first(latents),
                expected,
                self._latent_noise,
            )
        ]

    def frames(self, name, data):
        """The decoded video of the recorded latents, as floats and as the bytes a viewer gets."""
        recorded = [tensor for tensor in ("decoded", "frames_uint8") if tensor in data]
        if self._tree is None:
            yield from (NotCovered(f"e_infer/{name}/{tensor}") for tensor in recorded)
            return
        if not recorded:
            return
        latents = channels_last(data["final_latents"])
        video = channels_first(self._decode(self._tree, latents))
        # These latents are rougher than those of f_vae, and the noise recorded there is too small
        # here. Theirs: what the decoder makes of moving each value by one rounding.
        moved = np.nextafter(
            latents, np.where(_coins(latents.shape), np.inf, -np.inf), dtype=np.float32
        )
        noise = np.abs(channels_first(self._decode(self._tree, moved)) - video).max()
        noise = max(noise, self._noise or 0.0)
        if "decoded" in data:
            yield compare("e_infer", name, "decoded", video, data["decoded"], noise)
        if "frames_uint8" in data:
            # Truncation makes a step of any noise at the edge of a byte: there, one is allowed.
            level = (np.moveaxis(video[0], 0, -1).astype(np.float64) + 1) * 127.5
            slack = FACTOR * 127.5 * noise
            nearest = np.clip(
                data["frames_uint8"], np.floor(level - slack).clip(0), np.floor(level + slack)
            )
            yield compare(
                "e_infer", name, "frames_uint8", nearest, data["frames_uint8"], tolerance=0.0
            )


def _coins(shape):
    return np.random.default_rng(0).random(shape) < 0.5


def _context(data, first):
    """(first latents [1,1,h,w,C], text [1,L,Ct], proprio [1,P], mask [1,L]) of a fixture."""
    return (
        jnp.asarray(first),
        data["context"][None],
        data["proprio"][None],
        jnp.asarray(data["context_mask"])[None],
    )


def _act(act, adapter_layers, tree, vae, data):
    first, text, proprio, mask = _context(data, channels_last(data["first_frame_latents"]))
    run = lambda first, proprio, mask, horizon: act(tree, first, text, proprio, mask, horizon)
    horizon = data["action"].shape[0]
    actions, taps = run(first, proprio, mask, horizon)
    got = {"action": actions[0], "action_without_proprio": run(first, None, mask, horizon)[0][0]}
    for key in matching(data, "action_horizon*"):
        n = int(key.removeprefix("action_horizon"))
        got[key] = run(first, proprio, mask, n)[0][0]
    if "action_downsampled_action_branch" in data:
        got["action_downsampled_action_branch"] = run(
            pool_latents(first, 2), proprio, mask, horizon
        )[0][0]
    for layer in adapter_layers:
        for source, state in taps[f"state_{layer}"].items():
            got[f"state_{source}_{layer}"] = state
    got.update(attentions(taps))
    # The released encoding shows attention the zeroed padding rows; this variant hides them.
    if "action_with_padding_masked" in data:
        real = jnp.asarray((data["context"] != 0).any(axis=-1))[None]
        got["action_with_padding_masked"] = run(first, proprio, real, horizon)[0][0]
    for tensor, value in got.items():
        if tensor in data:
            yield compare("e_infer", "infer_action", tensor, value, data[tensor])
    seen, checks = vae.first("infer_action", data, data["first_frame_latents"])
    yield from checks
    if seen is not None:
        yield compare(
            "e_infer",
            "infer_action pixels",
            "action",
            run(seen, proprio, mask, horizon)[0][0],
            data["action"],
        )


def _joint(act, model, tree, vae, data, factor):
    """Denoising at full latent resolution with the network on a grid pooled by `factor`."""
    name = f"infer_joint_factor{factor}"
    first = data["latents_in"][0][:, :, :1]
    seen, checks = vae.first(name, data, first)
    yield from checks
    inputs = _context(data, channels_last(first) if seen is None else seen)
    noise, steps = channels_last(data["noise"]), len(data["timesteps"])
    yield compare(
        "e_infer", name, "timesteps", flow.sampling_schedule(steps, SHIFT)[0], data["timesteps"]
    )
    final, taps = jax.jit(
        lambda tree: model.apply(
            {"params": tree},
            inputs[0],
            noise,
            *inputs[1:],
            steps=steps,
            shift=SHIFT,
            factor=factor,
            method="denoise",
        )
    )(tree)
    for i in range(steps):
        for tensor, tap in (("latents_in", "latents"), ("preds", "velocity")):
            yield compare(
                "e_infer", name, f"{tensor}[{i}]", channels_first(taps[tap][i]), data[tensor][i]
            )
    yield compare("e_infer", name, "final_latents", channels_first(final), data["final_latents"])
    if "action" in data:
        actions, _ = act(tree, *inputs, len(data["action"]))
        yield compare("e_infer", name, "action", actions[0], data["action"])
    yield from vae.frames(name, data)


def _resample(data):
    z, down = channels_last(data["z"]), channels_last(data["down"])
    yield compare(
        "e_infer",
        "latent_resample",
        "down",
        channels_first(pool_latents(z, z.shape[2] // down.shape[2])),
        data["down"],
    )
    up = resize_velocity(down, z.shape[2], z.shape[3])
    yield compare("e_infer", "latent_resample", "up", channels_first(up), data["up"])
