"""Held-out moments for the skew check: as a robot would show them, and as training reads them."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from lightwam_jax import config as config_lib
from lightwam_jax import encoders
from lightwam_jax.data import actions as actions_lib
from lightwam_jax.data import loader
from lightwam_jax.data import windows as windows_lib
from lightwam_jax.inference import rows as rows_lib

_BATCH = 8  # windows of a call of the model
_GOLDEN = 0.6180339887  # places of the windows of an episode: evenly spread, never the same twice


class Moment(typing.NamedTuple):
    """What a robot has at one step.

    Attributes:
      images: {camera: uint8 [h,w,3]}. state: f32 [P], physical units. prompt: the instruction.
    """

    images: dict
    state: np.ndarray
    prompt: str


class Window(typing.NamedTuple):
    """A window of the validation split.

    Attributes:
      name: dataset, episode and step. config: `Config` of the dataset.
      episode: `Episode`. start: step. row: of the split.
      sample: {name: array}, what the loader made of the cached row.
    """

    name: str
    config: typing.Any
    episode: typing.Any
    start: int
    row: int
    sample: dict

    def moment(self, back=0):
        """Returns the `Moment` of the window, or of `back` steps before it (at most the first)."""
        step, cameras = max(0, self.start - back), self.config.data.cameras
        images = {camera: self.episode.frames(camera, [step])[0] for camera in cameras}
        state = self.episode.state[step].astype(np.float32)
        return Moment(images, state, self.episode.task_at(step))


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """What training has and computes, a row per window.

    Attributes:
      canvas: f32 [N,H,W,3] in 0..1. latents: f32 [N,h,w,C], frame 0. context: f32 [N,L,dim].
      mask: bool [N,L]. proprio: f32 [N,P], normalised.
      normalised, physical: f32 [N,T,A], the actions that the checkpoint's whole model plans.
    """

    canvas: np.ndarray
    latents: np.ndarray
    context: np.ndarray
    mask: np.ndarray
    proprio: np.ndarray
    normalised: np.ndarray
    physical: np.ndarray


def draw(run_config, policy, count):
    """Returns `count` windows (fewer where there are fewer), spread over datasets, tasks, episodes.

    Args:
      run_config: `Config` of the run, with its mixture. policy: `Policy`, of one embodiment.

    Raises:
      ValueError: nothing is held out; or the episodes are not those that the cache was made of.
      FileNotFoundError: data or cache are not here.
    """
    if run_config.data.source == "fake":
        raise ValueError("config.data.source='fake' has no recordings to send: nothing to compare")
    sets = [each for each in loader.val_samples(run_config) if fits(each[0], policy)]
    if not sets:
        raise ValueError(
            "no window is held out: set config.data.val_fraction, and run precompute again"
        )
    shares = [len(part) for part in np.array_split(np.arange(count), len(sets))]
    found = []
    for (config, samples), share in zip(sets, shares):
        places, _ = windows_lib.open_windows(config, "val")
        if len(places) != len(samples):
            raise ValueError(
                f"the cache holds {len(samples)} windows, the episodes in {config.data.path} "
                f"{len(places)}: they are others than the cache was made of"
            )
        for row in _rows(places, share):
            found.append(window(config, samples, places, row))
    return found


def fits(config, policy):
    """Returns whether the `Config` of a dataset is of the robot and cameras of a policy."""
    same = "embodiment", "cameras", "orientation"
    return all(getattr(config.data, key) == getattr(policy.config.data, key) for key in same)


def _rows(places, count):
    """Rows of at most `count` windows: tasks in turn, of each its episodes in turn."""
    episodes, row = {}, 0  # task -> [(first row, length)]
    while row < len(places):
        episode, start = places.place(row)
        episodes.setdefault(episode.task_at(start), []).append((row, episode.length))
        row += episode.length
    for of_task in episodes.values():  # recordings of one kind may lie together
        of_task[:] = [of_task[i] for i in np.random.default_rng(0).permutation(len(of_task))]
    tasks, rows = list(episodes.values()), []
    for number in range(4 * count):  # short episodes give fewer
        of_task = tasks[number % len(tasks)]
        first, length = of_task[(number // len(tasks)) % len(of_task)]
        rows.append(first + int(length * ((number + 0.5) * _GOLDEN % 1)))
        if len(set(rows)) == count:
            break
    return sorted(set(rows))


def window(config, samples, places, row):
    """Returns the `Window` of a row.

    Args:
      config, samples: of `loader.val_samples`. places: `windows.Windows` of the same rows.
    """
    episode, start = places.place(row)
    name = "/".join(filter(None, (config.data.dataset, str(episode.id), str(start))))
    return Window(name, config, episode, start, row, samples[row])


def trained(policy, windows):
    """Returns the `Trained` of windows: from the cached rows, and by the whole model.

    Args:
      policy: `Policy`, not deployed.
    """
    samples = [window.sample for window in windows]
    stack = lambda name: np.stack([sample[name] for sample in samples])
    canvas = [_canvas(window) for window in windows]
    if "latents" in samples[0]:
        latents = stack("latents")[:, :1]
    else:  # the run encodes while it trains
        encode = policy.assets.codec.encode
        latents = np.concatenate([np.asarray(encode(s["video"][None, :1])) for s in samples])
        latents = latents.astype(ml_dtypes.bfloat16)
    moments = [window.moment() for window in windows]
    return _planned(
        policy, moments, np.stack(canvas), latents, stack("context"), stack("context_mask"),
        stack("proprio"),
    )  # fmt: skip


def recomputed(policy, moments):
    """Returns the `Trained` of moments that are in no cache, by the way that training takes."""
    config, assets = policy.config, policy.assets
    canvas = np.concatenate(
        [policy.canvas({c: image[None] for c, image in m.images.items()}) for m in moments]
    )
    latents = np.concatenate([np.asarray(assets.codec.encode(one[None, None])) for one in canvas])
    filled = [encoders.text.prompt(m.prompt, config.data.prompt_template) for m in moments]
    context, mask = assets.text_encoder.encode(filled, config.data.text_len)
    states = np.stack([m.state for m in moments])
    proprio = actions_lib.pad(assets.state.normalize(states), config.model.proprio_dim)
    latents = latents.astype(ml_dtypes.bfloat16)
    context = context.astype(ml_dtypes.bfloat16)
    canvas = encoders.base.to_float(canvas)
    return _planned(policy, moments, canvas, latents, context, mask, proprio)


def _canvas(window):
    """f32 [H,W,3]: as the cache's maker laid it out, before it encoded it."""
    canvas = windows_lib.canvases(window.episode, [window.start], window.config)[0]
    if "latents" not in window.sample:
        canvas = encoders.base.to_uint8(canvas)  # what `Windows` hands to the device
    return encoders.base.to_float(canvas)


@functools.lru_cache(maxsize=1)
def deployed_form(policy):
    """Returns `policy.deployed()`, the same one for the same policy: compiled once."""
    return policy.deployed()


@functools.lru_cache(maxsize=1)
def _planner(policy):
    """The whole model on rows of a batch, as validation calls it."""
    horizon, hides = policy.config.data.action_horizon, policy.config.loss.mask_text_padding

    @jax.jit
    def plan(params, latents, context, mask, proprio, seeds=None):
        inputs = [latents.astype(jnp.float32), context, proprio, horizon, mask if hides else None]
        if seeds is not None:
            inputs.append(rows_lib.noise(seeds, latents.shape, policy.config))
        return policy.model.apply({"params": params}, *inputs, method="act")[0]

    return plan


def _noise_seeds(policy, moment):
    """As `Policy.act` has it of a moment, uint32 [1]."""
    images = {camera: image[None] for camera, image in moment.images.items()}
    return rows_lib.noise_seeds(images, moment.state[None], policy.noise_seed)


def _planned(policy, moments, canvas, latents, context, mask, proprio):
    config, plan, states = policy.config, _planner(policy), np.stack([m.state for m in moments])
    rows, inputs = min(_BATCH, len(latents)), [latents, context, mask, proprio]
    if config.model.generates:
        inputs.append(np.concatenate([_noise_seeds(policy, moment) for moment in moments]))
    parts = []
    for start in range(0, len(latents), rows):
        some = [x[start : start + rows] for x in inputs]
        missing = rows - len(some[0])  # one shape: compiled once
        some = [np.concatenate([x, np.repeat(x[:1], missing, axis=0)]) for x in some]
        parts.append(np.asarray(plan(policy.params, *some))[: rows - missing])
    normalised = np.concatenate(parts)[..., : config_lib.action_width(config)]
    physical = actions_lib.from_config(config).inverse(
        policy.assets.action.inverse(normalised), states
    )
    return Trained(
        canvas,
        np.asarray(latents[:, 0], np.float32),
        np.asarray(context, np.float32),
        mask,
        np.asarray(proprio, np.float32),
        normalised,
        np.asarray(physical, np.float32),
    )
