"""Checks of Fast-WAM's action head: files, schedule, masks, losses and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np

from converters import files, layouts, lightwam, rules
from converters.parity import flow_parts
from converters.parity.fixtures import (
    FACTOR,
    RELATIVE_NOISE,
    Compare,
    NotCovered,
    channels_first,
    matching,
)
from converters.parity.flow_case import (
    GROUP,
    Case,
    attention_mask,
    back,
    flat_keys,
    inputs_of,
    mask_of,
)
from lightwam_jax import config as config_lib
from lightwam_jax import flow, params
from lightwam_jax.training import losses

RELEASE = dict(downsample=1, temporal_weighting=False, mask_text_padding=True)


def i_flow_action(fixtures):
    """All checks of the group."""
    told = fixtures.json(f"{GROUP}/info.json")
    case = Case(fixtures, told)
    yield from _files(case)
    yield from _schedule(fixtures)
    yield from _masks(fixtures)
    release, run = fixtures.arrays(f"{GROUP}/train_release.npz"), _gradient_function(case)
    for name, data, options in (
        ("train_release", release, {}),
        (
            "train_masked",
            fixtures.arrays(f"{GROUP}/train_masked.npz"),
            told["train_masked_options"],
        ),
    ):
        yield from _training(case, run, name, data, options)
    yield from flow_parts.parts(case, release)
    yield from flow_parts.blocks(case, release)
    yield from _all_frames(case, release, fixtures.arrays(f"{GROUP}/train_joint.npz"))
    action = fixtures.arrays(f"{GROUP}/infer_action.npz")
    yield from flow_parts.infer_action(case, action)
    yield from flow_parts.infer_joint(case, action, fixtures.arrays(f"{GROUP}/infer_joint.npz"))
    yield from flow_parts.first_values(
        case, fixtures.tensors(f"{GROUP}/init_from_video.safetensors")
    )


def _files(case):
    """Every key is claimed, the model is built from the shapes, and the way back is exact."""
    found = [path for path in case.fixtures.root.glob(f"{GROUP}/*") if path.suffix == ".pt"]
    paths = [path for path in found if ".pt" in case.fixtures.suffixes]
    paths += [case.fixtures.root / GROUP / "weights.safetensors"]
    for path in paths:
        if path.suffix == ".pt":
            tensors, _ = files.read_checkpoint(path)
        else:
            tensors = flat_keys(files.read_tensors(path))
        config, compare = case.config_of(tensors), Compare(GROUP, path.name)
        flat = rules.to_params(lightwam.CHECKPOINT, tensors, str(path))
        own = layouts.model_shapes(config)
        unlike = len(own.items() ^ rules.shapes_of(flat).items())
        yield compare.none("parameters unlike the model's", unlike)
        memory = params.segmented(params.unflatten(flat), config)
        returned = back(params.canonical(memory), config)
        content = lambda x: x is not None and (x.dtype, x.tobytes())
        differing = sum(content(returned.get(key)) != content(x) for key, x in tensors.items())
        differing += len(set(returned) - set(tensors))
        yield compare.none("tensors changed by a round trip", differing)
    counts = {"video": "dit", "action": "expert", "proprio": "proprio_encoder"}
    for name, ours in counts.items():
        got, expected = params.count(case.tree[ours]), case.told["parameters"][name]
        yield Compare(GROUP, "parameters").exact(name, got, expected)


def _schedule(fixtures):
    data, compare = fixtures.arrays(f"{GROUP}/scheduler.npz"), Compare(GROUP, "scheduler")
    for key in matching(data, "timesteps_shift*"):
        shift, steps = key.removeprefix("timesteps_shift").split("_n")
        times, deltas = flow.sampling_schedule(int(steps), float(shift))
        yield compare(key, times, data[key], np.abs(data[key]).max() * 1e-7)
        other = key.replace("timesteps", "deltas")
        yield compare(other, deltas, data[other], 1e-7)
    for key in matching(data, "train_t_shift*"):
        shift = float(key.removeprefix("train_t_shift"))
        times = flow.sample_time(data["train_u"], shift)
        yield compare(key, times, data[key], np.abs(data[key]).max() * 1e-7)
        weights = key.replace("train_t", "train_weight")
        yield compare(weights, flow.weight(data[key], shift), data[weights])
        constants = f"weight_constants_shift{key.removeprefix('train_t_shift')}"
        got = flow.weight_constants(shift)
        yield compare(constants, got, data[constants], tolerance=1e-12)


def _masks(fixtures):
    """Which keys change which queries: of the video among themselves, of actions, of both."""
    for path in sorted((fixtures.root / GROUP).glob("masks_*.npz")):
        video, per_frame, actions = (
            int("".join(filter(str.isdigit, part))) for part in path.stem.split("_")[1:]
        )
        for name, mask in fixtures.arrays(f"{GROUP}/{path.name}").items():
            if name == "idm_teacher_forcing":
                yield NotCovered(f"{GROUP}/{path.name}/{name}, a variant that is not built")
                continue
            mode, sees = name.split(".")
            seen = per_frame if sees == "first_frame" else video
            got = mask_of(video, per_frame, actions, mode, seen)
            yield Compare(GROUP, "masks").exact(name, got, mask)


def _gradient_function(case):
    """Returns a jitted run(batch, noise, weight, lambdas) -> (losses, passes, all gradients).

    weight: [B], w of the actions' timesteps, whose shift differs between the recorded batches.
    """

    @jax.jit
    def run(tree, batch, noise, weight, lambdas):
        config = config_lib.LossConfig(**RELEASE, **lambdas)

        def loss(tree):
            out = losses.forward(case.model, tree, batch, noise, config)
            out["own_weight"], out["action_weight"] = out["action_weight"], weight
            total, parts = losses.loss_of(out, batch, noise, config)
            return total, (parts, out)

        (_, aux), grads = jax.value_and_grad(loss, has_aux=True)(tree)
        return *aux, grads

    return lambda *inputs: run(case.tree, *inputs)


def _training(case, run, name, data, options):
    """Losses, predictions and all gradients of a recorded batch."""
    shift = options.get("action_train_shift", 5.0)
    lambdas = {key: options.get(f"loss_{key}", 1.0) for key in ("lambda_video", "lambda_action")}
    config = config_lib.LossConfig(**RELEASE, **lambdas)
    batch, noise = inputs_of(data)
    weight = flow.weight(noise.action_t, shift)
    parts, out, grads = run(batch, noise, weight, lambdas)
    weight = out["own_weight"] if shift == case.model.expert.shift else weight
    per_step = jnp.square(out["velocity"] - out["target"])[:, 1:].mean(axis=(2, 3, 4))
    valid = losses.latent_step_valid(jnp.asarray(batch["image_is_pad"]))
    got = {
        "in_t_video": flow.sample_time(data["in_u_video"], config.shift),
        "in_t_action": flow.sample_time(data["in_u_action"], shift),
        "out_loss_total": parts["loss"],
        "out_loss_video_scaled": config.lambda_video * parts["loss_video"],
        "out_loss_action_scaled": config.lambda_action * parts["loss_action"],
        "out_loss_video_per_sample": losses.weighted_mean(per_step, valid, floor=1.0),
        "out_weight_video": flow.weight(noise.t, config.shift),
        "out_weight_action": weight,
        "out_video_in": channels_first(out["noisy"]),
        "out_action_in": flow.add_noise(batch["actions"], noise.action_noise, noise.action_t),
        "out_pred_video": channels_first(out["velocity"]),
        "out_pred_action": out["actions"],
        "out_attention_mask": attention_mask(case, data, all_frames=False),
    }
    compare = case.compare(name)
    for tensor, value in got.items():
        yield compare(tensor, value, data[tensor])
    yield from _gradients(case, name, data, back(params.canonical(grads), case.config))


def _gradients(case, name, data, grads):
    compare, told = Compare(GROUP, f"{name} gradients"), case.noises["train_release.grads"]
    relative = max(told["max_relative_l2"], RELATIVE_NOISE)
    norm = lambda x: np.linalg.norm(np.asarray(x, np.float64).ravel())
    if "out_grad_norms" in data:
        keys = sorted(grads, key=lambda key: key.removeprefix("mot."))
        yield compare.none("names differing", len(keys) - len(data["out_grad_norms"]))
        for key, expected in zip(keys, data["out_grad_norms"]):
            yield compare(
                f"norm {key}", norm(grads[key]) / expected, 1, tolerance=FACTOR * relative
            )
        return
    expected = flat_keys(case.fixtures.tensors(f"{GROUP}/{name}_grads.safetensors"))
    yield compare.none("names differing", len(set(grads) ^ set(expected)))
    for key in sorted(set(grads) & set(expected)):
        off = norm(grads[key] - expected[key]) / norm(expected[key])
        yield compare(key, off, 0, tolerance=FACTOR * relative)


def _all_frames(case, data, recorded):
    """Fast-WAM's joint variant: actions read all frames of the noised clip."""
    config, (batch, noise) = config_lib.LossConfig(**RELEASE), inputs_of(data)
    model = case.reading_all_frames()
    out = jax.jit(lambda tree: losses.forward(model, tree, batch, noise, config))(case.tree)
    got = {
        "out_loss_total": losses.loss_of(out, batch, noise, config)[0],
        "out_attention_mask": attention_mask(case, data, all_frames=True),
        "out_pred_video": channels_first(out["velocity"]),
        "out_pred_action": out["actions"],
    }
    for tensor, value in got.items():
        yield case.compare("train_joint")(tensor, value, recorded[tensor])
