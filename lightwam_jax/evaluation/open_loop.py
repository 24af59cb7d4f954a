"""Action errors of a policy on recorded observations it was not trained on."""

import functools
import json
import pathlib

import jax
import ml_dtypes
import numpy as np

from lightwam_jax import html_report
from lightwam_jax.data import episodes as episodes_lib
from lightwam_jax.evaluation import open_loop_page, stitched
from lightwam_jax.training import gripper_timing as gripper_timing_lib
from lightwam_jax.training import validation


def evaluate(policy, batches):
    """Returns the errors over validation batches.

    Args:
      policy: `Policy`.
      batches: of `data.loader.val_batches`.

    Returns:
      {"l1", "mse": [A], "l1_step": [T], "l1_step_dim": [T,A]} in normalised units over "steps"
      steps, with A of the robot, "l1_physical" [A], "samples" int, "grippers": of
      `gripper_timing.summary`, and the counts behind it, "gripper_...".

    Raises:
      ValueError: no batch, or nothing but padding in them.
    """
    assets = policy.assets
    grippers = gripper_timing_lib.of_data(policy.config, assets.statistics, assets.action)
    noise = functools.partial(validation.noise, policy.config)  # that of the run's own validation
    errors = jax.jit(
        lambda params, batch: validation.open_loop_errors(
            policy.model, params, batch, policy.config.loss, grippers, noise(batch)
        )
    )
    sums, samples = [], 0
    for batch in batches:
        arrays = {name: x for name, x in batch.items() if name != "index"}
        if "video" in arrays:  # acting sees the first frame
            first = assets.codec.encode(arrays.pop("video")[:, :1])
            arrays["latents"] = first.astype(ml_dtypes.bfloat16)
        sums.append(jax.device_get(errors(policy.params, arrays)))
        samples += int(batch["valid"].sum())
    means = validation.mean_errors(sums) if sums else {"steps": 0}
    if not means["steps"]:
        raise ValueError(
            "the validation split is empty: set config.data.val_fraction, "
            "precompute --what latents again, and train"
        )
    own = len(assets.action.scale)  # a wider model has zeros behind the robot's dimensions
    means |= {name: means[name][..., :own] for name in ("l1", "mse", "l1_step_dim")}
    means["l1_step"] = means["l1_step_dim"].mean(axis=-1)
    return {
        **means,
        "l1_physical": means["l1"] / np.abs(assets.action.scale),
        "samples": samples,
        "grippers": gripper_timing_lib.summary(means, grippers),
    }


def report(directory, errors, policy, most=None):
    """Adds whole episodes, and writes the numbers, the images and open_loop.html.

    Args:
      directory: to write into. errors: of `evaluate`. policy: `Policy`.
      most: episodes that are shown, at most; default: `stitched.EPISODES`.

    Returns:
      the printable tables.
    """
    config, directory = policy.config, pathlib.Path(directory)
    episodes, span, missing = [], None, "the batches are random"
    if config.data.source != "fake":
        try:
            splits = episodes_lib.split(
                episodes_lib.load_episodes(config), config.data.val_fraction
            )
        except (ValueError, OSError) as error:  # the cache is enough for all else
            missing = f"the episodes cannot be read. {error}"
        else:
            missing = "no episode is held out"
            episodes, span = stitched.evaluate(policy, *splits, most or stitched.EPISODES)
    said = f"no whole episodes: {missing}"
    if episodes:
        errors = errors | {"whole_episodes": stitched.numbers(episodes, span, config)}
        said = open_loop_page.text_table(stitched.errors(episodes), span, stitched.names(config))
    tables = write(directory, errors)
    open_loop_page.write(directory, errors, episodes, span, policy, missing)
    return f"{tables}\n\n{said}"


def write(directory, errors):
    """Writes open_loop.json and images into `directory`; returns the printable tables.

    open_loop.png: error per step of the chunk; open_loop_dimensions.png: per dimension and step;
    open_loop_gripper.png, where there are grippers: how much later than recorded they move.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    plain = {
        name: value if isinstance(value, dict) else np.asarray(value).tolist()
        for name, value in errors.items()
    }
    (directory / "open_loop.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    steps = np.arange(len(errors["l1_step"]))
    curve, unit = {"mean over dimensions": (steps, errors["l1_step"])}, "L1 error, normalised units"
    html_report.curve_chart(directory / "open_loop.png", curve, unit, xlabel="step of the chunk")
    _heatmap(directory / "open_loop_dimensions.png", errors["l1_step_dim"], errors["l1"])
    if errors["grippers"]:
        _offsets(directory / "open_loop_gripper.png", errors["gripper_offsets"], errors["grippers"])
    tables = (_dimension_table(errors), _step_table(errors), _gripper_table(errors["grippers"]))
    return "\n\n".join("\n".join(table) for table in tables)


def _dimension_table(errors):
    columns = [errors[name] for name in ("l1", "mse", "l1_physical")]
    yield f"{errors['samples']} samples"
    yield f"{'dimension':<10}{'L1':>10}{'MSE':>10}{'L1, physical units':>20}"
    for i, (l1, mse, physical) in enumerate(zip(*columns)):
        yield f"{i:<10}{l1:>10.4f}{mse:>10.4f}{physical:>20.4f}"
    yield f"{'mean':<10}{columns[0].mean():>10.4f}{columns[1].mean():>10.4f}"


def _step_table(errors, most=8):
    """At most `most` steps of the chunk, first and last among them."""
    l1 = errors["l1_step"]
    shown = np.unique(np.linspace(0, len(l1) - 1, most).round().astype(int))
    yield "step      " + "".join(f"{step:>10}" for step in shown)
    yield "L1        " + "".join(f"{l1[step]:>10.4f}" for step in shown)


def _gripper_table(grippers):
    if not grippers:
        yield (
            "gripper timing: no action dimension is known to be a gripper "
            "(config.data.gripper_dims), or none moves in the training data"
        )
        return
    columns = ("changing", "found", "offset", "offset_abs", "still", "spurious")
    yield f"{'gripper':<10}" + "".join(f"{name:>12}" for name in columns)
    for name, numbers in grippers.items():
        cells = (numbers.get(column, "-") for column in columns)
        cells = (f"{cell:.3f}" if isinstance(cell, float) else cell for cell in cells)
        yield f"{name:<10}" + "".join(f"{cell:>12}" for cell in cells)
    yield "changing, still: windows with and without a recorded change"
    yield "found, spurious: share of them where the prediction changes, alike or at all"
    yield "offset: mean steps it changes later than recorded; offset_abs: without the sign"


def _heatmap(path, l1, means):
    """Writes a PNG of the errors [T,A] with the mean of each dimension beside it."""
    with html_report.chart(path, 9.4, 1.2 + 0.3 * len(means)) as axes:
        image = axes.imshow(l1.T, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
        labels = [f"{i}   (mean {mean:.3f})" for i, mean in enumerate(means)]
        axes.set_yticks(range(len(means)), labels)
        axes.set_ylabel("dimension")
        axes.set_xlabel("step of the chunk")
        axes.figure.colorbar(image, ax=axes, label="L1, normalised units")


def _offsets(path, offsets, grippers):
    """Writes a PNG with the distribution of offsets [G,2T-1] of each gripper."""
    with html_report.chart(path, 9.4, 2.6 * len(grippers), rows=len(grippers)) as axes:
        for one, counts, (name, numbers) in zip(np.ravel(axes), offsets, grippers.items()):
            steps = np.arange(len(counts)) - len(counts) // 2
            one.bar(steps, counts, width=0.85, color=html_report.BLUE)
            one.axvline(0, color=html_report.INK, lw=1)
            changes = numbers["changing"]
            title = (
                f"gripper {name}: {changes} recorded changes, {changes - counts.sum():.0f} missed"
            )
            one.set_title(f"{title} by the prediction", fontsize=9)
            one.set_xlabel("steps the predicted change comes later than the recorded one")
            one.set_ylabel("windows")
