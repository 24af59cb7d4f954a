"""Checks of training: losses, every gradient, AdamW steps, learning rates; and checkpoint files."""

import jax
import jax.numpy as jnp
import numpy as np

from converters import files, layouts, lightwam, rules, wan_dit
from converters.parity.fixtures import (
    FACTOR,
    RELATIVE_NOISE,
    Compare,
    NotCovered,
    channels_first,
    channels_last,
)
from lightwam_jax import config as config_lib
from lightwam_jax import flow, params
from lightwam_jax.training import losses, optimizer

RECORDED = ("release", "plain", "residual")


def d_train(fixtures):
    """Losses and gradients of each recorded batch, optimizer steps, the learning-rate table."""
    info = fixtures.json("d_train/info.json")
    for name in RECORDED:
        data, told = fixtures.arrays(f"d_train/{name}.npz"), info[name]
        config = _loss_config(told["options"])
        differentiate = fixtures.has(f"d_train/{name}_grads.safetensors")
        run, trainable = _gradient_function(fixtures, config, differentiate)
        batch, noise = batch_of(data)
        recorded = info.get("grad_noise_f32_vs_f64", {}).get(name, {})
        parts, out, grads = run(trainable, batch, noise)
        yield from _losses(fixtures, name, data, config, (batch, noise, parts, out))
        if differentiate:
            grads = _by_training_name(fixtures, grads)
            yield from _gradients(fixtures, name, grads, told, recorded)
        if name == "release":  # the optimizer's steps were recorded with the same options
            yield from _optimizer(fixtures, info["optimizer"], run, trainable, recorded)
    # What learns here is what learned there.
    ours, theirs = set(_by_training_name(fixtures, trainable)), info["trainable_parameter_names"]
    yield Compare("d_train", "trainable").none("names differing", len(ours ^ set(theirs)))
    for name, table in info.items():
        if name.startswith("lr_schedule_base_"):
            yield from _learning_rates(name, table)


def _loss_config(options):
    return config_lib.LossConfig(
        downsample=options["downsample"],
        lambda_video=options["lambda_video"],
        lambda_action=options["lambda_action"],
        residual_target=options["residual_target"],
        temporal_weighting=options["temporal_weighting"],
        prefix_steps=options["prefix_steps"] or 0,
        prefix_weight=options["prefix_weight"],
        tail_weight=options["tail_weight"],
        shift=5.0,
        mask_text_padding=True,  # the fixtures carry their masks: all true, or real
    )


def batch_of(data):
    """A fixture's inputs -> (batch as the loader makes it, Noise)."""
    latents = data.get("input_latents", data.get("in_video_latents"))
    batch = {
        "latents": channels_last(latents),
        "context": data["in_context"],
        "context_mask": data["in_context_mask"],
        "proprio": data["in_proprio"][:, 0],
        "actions": data["in_action"],
        "action_is_pad": data["in_action_is_pad"],
        "image_is_pad": data["in_image_is_pad"],
    }
    noise = losses.Noise(jnp.asarray(data["timestep"]), jnp.asarray(channels_last(data["noise"])))
    return batch, noise


def _losses(fixtures, name, data, config, ran):
    batch, noise, parts, out = ran
    got = {
        "loss_total": parts["loss"],
        "loss_video": parts["loss_video"],
        "loss_action": parts["loss_action"],
        "loss_video_weighted": config.lambda_video * parts["loss_video"],
        "loss_action_weighted": config.lambda_action * parts["loss_action"],
        "pred_video": channels_first(out["velocity"]),
        "pred_action": out["actions"],
        "noisy_latents": channels_first(out["noisy"]),
        "target_video": channels_first(out["target"]),
        "timestep": flow.sample_time(data["u"], config.shift),
        "training_weight": flow.weight(noise.t, config.shift),
    }
    per_step = jnp.square(out["velocity"] - out["target"])[:, 1:].mean(axis=(2, 3, 4))
    valid = losses.latent_step_valid(jnp.asarray(batch["image_is_pad"]))
    got["loss_video_per_sample"] = losses.weighted_mean(per_step, valid, floor=1.0)
    weights = losses.action_weights(jnp.asarray(batch["action_is_pad"]), config)
    error = jnp.square(out["actions"] - batch["actions"]).mean(axis=-1)
    got["loss_action_per_sample"] = losses.weighted_mean(error, weights)
    compare = Compare("d_train", name)
    for tensor, value in got.items():
        yield compare(tensor, value, data[tensor], fixtures.noise(f"d_train/{name}.{tensor}"))


def _gradient_function(fixtures, config, differentiate):
    """Returns (jitted run, the parameters that learn).

    run(trainable, batch, noise) -> (losses, what the passes gave, gradients of what learns or,
    where they are not wanted, None: they take most of the time).
    """
    from configs import base  # the released recipe's own list of what learns

    model, tree, _ = fixtures.lightwam
    trainable, frozen = params.partition(tree, base.get_config("tiny").train.trainable)

    @jax.jit
    def run(trainable, batch, noise):
        def loss(t):
            out = losses.forward(model, params.merge(t, frozen), batch, noise, config)
            total, parts = losses.loss_of(out, batch, noise, config)
            return total, (parts, out)

        if not differentiate:
            return *loss(trainable)[1], None
        (_, (parts, out)), grads = jax.value_and_grad(loss, has_aux=True)(trainable)
        return parts, out, grads

    return run, trainable


def _by_training_name(fixtures, tree):
    """In-memory tree -> {named_parameters() name: array in torch layout}."""
    _, _, config = fixtures.lightwam
    flat = {path: np.asarray(leaf) for path, leaf in params.flatten(params.canonical(tree)).items()}
    layers = wan_dit.stacked_layers(config.num_layers, config.lora_layers)
    return rules.from_params(lightwam.TRAINING, flat, layers)


def _relative_noise(recorded, name):
    """The reference's float32 noise of a gradient tensor, relative to its largest entry.

    Args:
      recorded: info.json's grad_noise_f32_vs_f64 of a batch; it lists the tensors where this is
        greatest, so that any other has at most the least of the list.
    """
    listed = {
        key: told["max_abs_diff"] / told["tensor_max"]
        for key, told in recorded.get("worst_relative_to_tensor_max", {}).items()
        if told["tensor_max"]
    }
    return listed.get(name, min(listed.values(), default=RELATIVE_NOISE))


def _gradients(fixtures, name, grads, told, recorded):
    expected = fixtures.tensors(f"d_train/{name}_grads.safetensors")
    compare = Compare("d_train", f"{name} gradients")
    yield compare.none("names differing", len(set(grads) ^ set(expected)))
    for key in sorted(set(grads) & set(expected)):
        size = float(np.abs(expected[key]).max(initial=0.0))
        noise = min(_relative_noise(recorded, key) * size, recorded.get("max_abs_diff", np.inf))
        yield compare(key, grads[key], expected[key], tolerance=FACTOR * noise)
    yield compare("global norm", _norm(grads), told["grad_norm"])


def _norm(arrays):
    """Global norm of a dict of arrays, float64."""
    return np.sqrt(sum(np.square(x.astype(np.float64)).sum() for x in arrays.values()))


_ADAMW = dict(
    warmup_steps=0,
    final_lr_ratio=1.0,
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.0,
    clip_norm=0.0,
    accum_steps=1,
    ema_decay=0.0,
)


def _optimizer(fixtures, told, run, start, recorded):
    """AdamW from the checkpoint over the recorded batches, with and without clipping."""
    batches = [batch_of(fixtures.arrays(f"d_train/opt_step{i}.npz")) for i in (1, 2)]
    fields = {name: told[name] for name in ("lr", "eps", "weight_decay")}
    fields = {**_ADAMW, **fields, **dict(zip(("b1", "b2"), told["betas"]))}
    for label, clip in ((f"clip{told['max_norm']}", told["max_norm"]), ("noclip", 0.0)):
        config = config_lib.OptimizerConfig(**{**fields, "clip_norm": clip})
        tx, compare = optimizer.make_optimizer(config, 10**9), Compare("d_train", f"adamw {label}")
        trainable, state = start, tx.init(start)
        relative = {}  # noise of each gradient relative to its size, the most of the steps so far
        for step, (batch, noise) in enumerate(batches, 1):
            _, _, grads = run(trainable, batch, noise)
            size = {key: np.abs(x) for key, x in _by_training_name(fixtures, grads).items()}
            if clip:
                expected = told["grad_norms_before_clip"][step - 1]
                yield compare(f"gradient norm {step}", _norm(size), expected)
            for key, x in size.items():
                floor = _relative_noise(recorded, key) * x.max(initial=0.0)
                relative[key] = np.maximum(floor / np.maximum(x, 1e-30), relative.get(key, 0.0))
            updates, state = jax.jit(tx.update)(grads, state, trainable)
            trainable = jax.tree.map(jnp.add, trainable, updates)
            path = f"d_train/params_after_step{step}_{label}.safetensors"
            if fixtures.has(path):
                got, expected = _by_training_name(fixtures, trainable), fixtures.tensors(path)
                yield from _after_step(label, step, got, expected, relative, told["lr"])


def _after_step(label, step, got, expected, noise, lr):
    """The parameters after a step, up to rounding and what noise the gradients have.

    Args:
      noise: of the reference's gradients, relative to every element.

    Adam divides a gradient by its own size: an element with relative error r moves a step by up to
    2 r lr, and by up to 2 lr where all of it is noise (the key third of every pooling bias, whose
    true gradient is zero).
    """
    compare = Compare("d_train", f"adamw {label} step {step}")
    for key in sorted(set(got) | set(expected)):
        error = np.abs(got[key].astype(np.float64) - expected[key])
        size = np.maximum(np.abs(expected[key]), lr)
        rounding = FACTOR * np.finfo(np.float32).eps * size
        allowed = rounding + 2 * lr * step * np.minimum(noise[key], 1.0)
        worst = np.unravel_index(np.argmax(error / allowed), error.shape)
        yield compare(key, got[key][worst], expected[key][worst], tolerance=float(allowed[worst]))


def _learning_rates(name, table):
    base, compare = (
        float(name.removeprefix("lr_schedule_base_")),
        Compare("d_train", "learning rate"),
    )
    for case, values in table.items():
        if not case.startswith("total"):
            continue
        total, warmup = (int("".join(filter(str.isdigit, part))) for part in case.split("_")[:2])
        fields = {**_ADAMW, "lr": base, "warmup_steps": warmup, "final_lr_ratio": 0.01}
        config = config_lib.OptimizerConfig(**fields)
        steps = np.array([int(i) for i in values])
        got = np.asarray(optimizer.learning_rate(steps, config, total), np.float64)
        expected = np.array(list(values.values()))
        yield compare(case, got / expected, np.ones_like(expected), tolerance=1e-6)


# ---- ckpt --------------------------------------------------------------------------------------


def ckpt(fixtures):
    """Checkpoint files: every key claimed, the model built from the shapes, exact way back."""
    for path in fixtures.checkpoint_files():
        tensors, _ = files.read_checkpoint(path)
        config, compare = fixtures.model_config(tensors), Compare("ckpt", path.name)
        flat = rules.to_params(lightwam.CHECKPOINT, tensors, str(path))
        own = layouts.model_shapes(config)
        unlike = len(own.items() ^ rules.shapes_of(flat).items())
        yield compare.none("parameters unlike the model's", unlike)
        memory = params.segmented(params.unflatten(flat), config)
        back = rules.from_params(
            lightwam.CHECKPOINT,
            params.flatten(params.canonical(memory)),
            wan_dit.stacked_layers(config.num_layers, config.lora_layers),
        )
        content = lambda x: x is not None and (x.dtype, x.tobytes())
        differing = sum(content(back.get(key)) != content(x) for key, x in tensors.items())
        extra = len(set(back) - set(tensors))
        yield compare.none("tensors changed by a round trip", differing + extra)
        if fixtures.has("ckpt/keys.json"):
            told, _ = lightwam.flatten_checkpoint(fixtures.json("ckpt/keys.json"))
            told = {key: tuple(shape) for key, shape in told.items()}
            unlike = len(told.items() ^ rules.shapes_of(tensors).items())
            yield compare.none("keys unlike keys.json", unlike)
        else:
            yield NotCovered("ckpt/keys.json")
    # The float32 checkpoint holds the transformer of a_dit.
    path = fixtures.checkpoint_files()[0]
    tensors, _ = files.read_checkpoint(path)
    expected, prefix = fixtures.tensors("a_dit/dit.safetensors"), f"mot.{lightwam.MOT_PREFIX}"
    differing = sum(not np.array_equal(tensors.get(prefix + k), x) for k, x in expected.items())
    yield Compare("ckpt", path.name).none("tensors unlike a_dit", differing)
