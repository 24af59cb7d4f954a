"""The section of the doctor's page in which one episode is played beside its numbers."""

import numpy as np

from lightwam_jax import html_report, svg_chart

_CHARTS = 16  # of state, and of action
_SHORTEST = 160  # pixels of a canvas that is enlarged to be seen


def section(played, directory):
    """Returns the `html_report.Section` of an `images.Played`; its video goes into `directory`."""
    from lightwam_jax.data.formats import video  # needs PyAV; a page without images does not

    path = directory / "episode.mp4"
    frames = played.canvas.repeat(-(-_SHORTEST // played.canvas.shape[1]), 1)
    frames = frames.repeat(frames.shape[1] // played.canvas.shape[1], 2)
    rate = played.fps / played.stride
    video.write(path, frames, rate, crf="20", faststart=True, pad=True)
    every = "" if played.stride == 1 else f", every {played.stride} steps"
    caption = (
        f"{played.episode} · “{played.task}” · the canvas at {rate:g} images per second{every}"
    )
    shown = html_report.Media(path, caption, drawn=True, places=played.fps)
    charts = [
        chart for name in ("state", "action") for chart in _charts(name, getattr(played, name))
    ]
    return html_report.Section(
        "An episode, played",
        "The line in the charts follows the video. Do state and action move when the robot does, "
        "and the gripper when it closes? A delay or another sign shows here.",
        (shown, *charts),
    )


def _charts(name, values):
    steps = np.arange(len(values))
    return [
        svg_chart.Chart(f"{name}[{dim}]", {name: (steps, values[:, dim])}, "step")
        for dim in range(min(values.shape[1], _CHARTS))
    ]
