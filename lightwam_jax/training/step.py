"""One optimizer step as a pure function of (state, batch)."""

import functools
import typing

import flax.struct
import jax
import jax.numpy as jnp
import optax

from lightwam_jax import build, sharding
from lightwam_jax import params as params_lib
from lightwam_jax.data import spec
from lightwam_jax.models import action_dit, quantized
from lightwam_jax.training import losses
from lightwam_jax.training import optimizer as optimizer_lib

_AUGMENT = 0x5EED  # folded into the key of a step; `losses.draw_noise` splits the same key


@flax.struct.dataclass
class TrainState:
    """Everything a step reads and writes. Trees are nested dicts in the in-memory layout.

    Attributes:
      step: int32 [], optimizer steps applied.
      halted: bool [], a step was not finite; since then nothing is applied any more.
      trainable: float32 parameters that learn.
      frozen: the other parameters, stored as `config.model.frozen_dtype` says.
      opt_state: optax state of `trainable`.
      ema: moving average of `trainable`, or None.
    """

    step: jax.Array
    halted: jax.Array
    trainable: typing.Any
    frozen: typing.Any
    opt_state: typing.Any
    ema: typing.Any


def batch_shapes(config):
    """Returns {name: ShapeDtypeStruct} of what a step reads of a global batch."""
    shapes = spec.batch_spec(config, config.train.batch_size)
    return {name: x for name, x in shapes.items() if name != "index"}  # only the host reads it


def state_shapes(config):
    """Returns the model, the optimizer and the ShapeDtypeStructs of the `TrainState` of a run."""
    model = build.build_model(config.model)
    optimizer = optimizer_lib.make_optimizer(config.optimizer, config.train.steps)
    return model, optimizer, jax.eval_shape(lambda: start_state(model, config, optimizer))


def start_state(model, config, optimizer, given=None):
    """Returns the `TrainState` at step 0: random from `config.seed`, then `start_params`.

    Args:
      given: base weights, canonical layout, or None. Kernels of a run with int8 kernels are
        made whole first.
    """
    params, given = build.init_params(model, jax.random.key(config.seed), config.model), given or {}
    if given:
        given = params_lib.segmented(quantized.dequantized(given), config.model)
        params = start_params(params, given, config.train.trainable)
    if config.model.generates and config.model.flow_init == "from_video" and "expert" not in given:
        video = params_lib.canonical({"dit": params["dit"]})["dit"]
        params = params | {"expert": action_dit.from_video(video, params["expert"])}
    return init_state(params, config, optimizer)


def init_state(params, config, optimizer):
    """Returns the `TrainState` at step 0 of float32 `params`; works under `jax.eval_shape`."""
    trainable, frozen = params_lib.partition(params, config.train.trainable)
    trainable = jax.tree.map(lambda x: x.astype(jnp.float32), trainable)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        halted=jnp.zeros((), bool),
        trainable=trainable,
        frozen=quantized.stored(frozen, config.model.frozen_dtype),
        opt_state=optimizer.init(trainable),
        ema=jax.tree.map(jnp.copy, trainable) if config.optimizer.ema_decay > 0 else None,
    )


def start_params(random_params, given, patterns):
    """Returns `random_params` with the leaves of `given` in their place.

    Args:
      random_params: all parameters, in-memory layout (arrays, tracers or shapes).
      given: some of them, such as base weights.
      patterns: `config.train.trainable`; only what learns may be missing from `given`.

    Raises:
      ValueError: `given` has leaves the model lacks, other shapes, or lacks a frozen one.
    """
    learns, _ = params_lib.partition(random_params, patterns)
    learns, expected, given = (params_lib.flatten(x) for x in (learns, random_params, given))
    known = params_lib.unflatten(
        {k: x for k, x in expected.items() if k in given or k not in learns}
    )
    params_lib.check_same_structure(params_lib.unflatten(given), known, "config.train.init")
    return params_lib.unflatten(
        {**expected, **{k: x.astype(expected[k].dtype) for k, x in given.items()}}
    )


def eval_params(state):
    """Returns the parameters to evaluate and to deploy: the moving average where there is one."""
    learned = state.trainable if state.ema is None else state.ema
    return params_lib.merge(learned, state.frozen)


# ---- the step ----------------------------------------------------------------------------------


def make_train_step(model, config, optimizer, shardings, loss_fn=losses.training_loss, encode=None):
    """Returns train_step(state, batch) -> (state, metrics), not yet jitted.

    A step whose loss or gradient is not finite leaves the state as it was and halts it: the
    parameters of the last good step survive until the host looks.

    Args:
      model: Linen module.
      config: `Config`.
      optimizer: from `make_optimizer`.
      shardings: of the state, from `sharding.tree_shardings`; the mesh may be of one device.
      loss_fn: as `losses.training_loss`.
      encode: for batches that hold video, `Encoder.train`. The step then takes the encoder's
        arrays as well: train_step(state, batch, arrays).

    The metrics are float32 scalars (those of the loss, grad_norm before clipping, param_norm, lr)
    and `finite`, bool.
    """

    def loss(params, batch, noise):
        return loss_fn(model, params, batch, noise, config.loss)

    specs = jax.tree.map(lambda x: x.spec, shardings)
    mesh, rows = shardings.step.mesh, sharding.batch_sharding(shardings.step.mesh).spec
    mean_gradients = jax.shard_map(
        functools.partial(device_gradients, loss, config.optimizer.accum_steps, shardings),
        mesh=mesh,
        in_specs=(specs.trainable, specs.frozen, rows, rows),
        out_specs=(sharding.replicated(mesh).spec, specs.trainable),
        check_vma=False,  # gradients of local samples stay local until `reduce_mean`
    )

    def train_step(state, batch, *arrays):
        rng = jax.random.fold_in(jax.random.key(config.seed), state.step)
        if encode is not None:
            batch = encode(*arrays, batch, jax.random.fold_in(rng, _AUGMENT))
        # Drawn for the whole global batch, so that neither accumulation nor devices change it.
        noise = losses.draw(rng, batch, config)
        parts, grads = mean_gradients(state.trainable, state.frozen, batch, noise)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(parts["loss"]) & jnp.isfinite(norm) & ~state.halted
        metrics = parts | {
            "grad_norm": norm,
            "param_norm": optax.tree.norm(state.trainable),
            "finite": finite,
            "lr": optimizer_lib.learning_rate(state.step, config.optimizer, config.train.steps),
        }
        return updated(state, grads, finite, optimizer, config.optimizer), metrics

    return train_step


def device_gradients(loss, accum_steps, shardings, trainable, frozen, batch, noise):
    """Runs on each device: gradients of its own samples, then their mean over all devices.

    Args:
      loss: function (params, batch, noise) -> (loss, {name: scalar}).
      accum_steps: micro-batches. shardings: the state's.
      trainable, frozen: this device's parts of the parameters.
      batch, noise: this device's samples.

    Returns:
      what the loss reports, and this device's part of the gradient; both are means.
    """
    # What learns is whole throughout the step; of the frozen blocks, one at a time.
    trainable = sharding.gather(trainable, shardings.trainable)
    frozen = sharding.gather(frozen, shardings.frozen, keep=sharding.BLOCKS)
    of_samples = functools.partial(gradients, loss, trainable, frozen)
    parts, grads = accumulate(of_samples, (batch, noise), accum_steps)
    parts = jax.lax.pmean(parts, sharding.AXES)
    return parts, sharding.reduce_mean(grads, shardings.trainable)


def accumulate(of_samples, samples, steps):
    """Returns the mean of `of_samples(*micro_batch)` over `steps` micro-batches of `samples`."""
    if steps == 1:
        return of_samples(*samples)
    # Micro-batch k takes samples k, k + steps, ... so that each device slices its own samples.
    micros = jax.tree.map(
        lambda x: x.reshape(x.shape[0] // steps, steps, *x.shape[1:]).swapaxes(0, 1), samples
    )
    shapes = jax.eval_shape(of_samples, *jax.tree.map(lambda x: x[0], micros))

    def add(total, micro):
        return jax.tree.map(jnp.add, total, of_samples(*micro)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, micros)
    return jax.tree.map(lambda x: x / steps, total)


def gradients(loss, trainable, frozen, batch, noise):
    """Returns what the loss reports, {name: scalar}, and its gradient in `trainable`."""

    def of_trainable(trainable):
        return loss(params_lib.merge(trainable, frozen), batch, noise)

    (_, parts), grads = jax.value_and_grad(of_trainable, has_aux=True)(trainable)
    return parts, grads


def updated(state, grads, finite, optimizer, config):
    """Returns the state after an optimizer step; unless `finite`, the old one, halted.

    Args:
      config: `OptimizerConfig`.
    """
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    ema = state.ema
    if ema is not None:
        ema = optimizer_lib.update_ema(ema, trainable, config.ema_decay)
    new = (state.step + 1, trainable, opt_state, ema)
    old = (state.step, state.trainable, state.opt_state, state.ema)
    step, trainable, opt_state, ema = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    return TrainState(step, ~finite, trainable, state.frozen, opt_state, ema)


def jit_train_step(train_step, shardings, encode=False):
    """Returns `train_step` jitted, with the state donated and everything placed explicitly.

    Args:
      shardings: of the state.
      encode: the step takes the arrays of an `Encoder`, which every device holds whole.
    """
    mesh = shardings.step.mesh
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(shardings, rows, whole) if encode else (shardings, rows),
        out_shardings=(shardings, whole),
    )


# ---- what a checkpoint keeps -------------------------------------------------------------------


def state_items(state):
    """Returns what a checkpoint stores of a state, frozen parameters apart: {item: tree}."""
    items = {
        "params": params_lib.canonical(state.trainable),
        "optimizer": optimizer_lib.moments(state.opt_state),
    }
    if state.ema is not None:
        items["ema"] = params_lib.canonical(state.ema)
    return items


def state_from_items(items, step, shapes, model_config):
    """Returns the state of `state_items` and the canonical "frozen" tree.

    Args:
      items: {item: tree of arrays}.
      step: int32 [].
      shapes: the state's ShapeDtypeStructs.
      model_config: `ModelConfig`.
    """
    in_memory = {
        name: params_lib.segmented(items[name], model_config)
        for name in items
        if name != "optimizer"
    }
    return TrainState(
        step=step,
        halted=jnp.zeros((), bool),
        trainable=in_memory["params"],
        frozen=in_memory["frozen"],
        opt_state=optimizer_lib.with_moments(shapes.opt_state, items["optimizer"], step),
        ema=in_memory.get("ema"),
    )
