"""What a page shows and says of imagined video, by the numbers of future.json."""

import itertools

import numpy as np

from lightwam_jax import html_report, svg_chart

_LABELS = {"codec": "codec limit", "predicted": "imagined", "still": "first frame repeated"}
# kind: (name, unit, digits of a difference)
_KINDS = {"psnr": ("PSNR", " dB", 1), "ssim": ("SSIM", "", 3)}


def verdict(numbers):
    """Returns sentences: at which offsets imagined video is nearer than the first frame repeated.

    Args:
      numbers: {"offsets", "windows": [n], "psnr", "ssim": {"predicted", "still": [n]}, "nearer":
        {"psnr", "ssim": [n], in how many windows}, "lambda_video"}, as in future.json.
    """
    said = [_compared(numbers, *each) for each in _KINDS.items()]
    said += [f"At +{numbers['offsets'][0]}: {', '.join(_first(numbers, k) for k in _KINDS)}."]
    if not numbers["lambda_video"]:
        said += ["It was trained without the video loss (config.loss.lambda_video=0)."]
    wins = np.array([_gains(numbers, kind) > 0 for kind in _KINDS])
    if not wins.any():
        first = "The imagined video never beats repeating the first frame."
    elif wins.all():
        first = "The imagined video beats repeating the first frame at every offset."
    else:
        first = "The imagined video beats repeating the first frame at some offsets only."
    return f"{first} {' '.join(said)}"


def _gains(numbers, kind):
    return np.subtract(*(np.asarray(numbers[kind][name], float) for name in ("predicted", "still")))


def _compared(numbers, kind, shown):
    """One measure: "PSNR: better at +3 to +8 (by 0.2 to 1.4 dB), not better at +1 (...)."."""
    name, unit, digits = shown
    gains = _gains(numbers, kind)

    def by(which):
        low, high = (f"{each:.{digits}f}" for each in np.sort(abs(gains[which]))[[0, -1]])
        return (low if low == high else f"{low} to {high}") + unit

    won, lost = gains > 0, gains <= 0
    if won.all():
        said = f"better at every offset (by {by(won)})"
    elif lost.all():
        said = f"better at no offset ({by(lost)} less)"
    else:
        where = (_places(numbers["offsets"], which) for which in (won, lost))
        said = "better at {} (by {}), not better at {} ({} less)".format(
            *itertools.chain(*zip(where, (by(won), by(lost))))
        )
    return f"{name}: {said}."


def _first(numbers, kind):
    """At the first offset: "PSNR 17.3 dB, repeating 18.0 dB (nearer in 5 of 32 windows)"."""
    name, unit, digits = _KINDS[kind]
    made, still = (f"{numbers[kind][who][0]:.{digits}f}{unit}" for who in ("predicted", "still"))
    nearer, windows = numbers["nearer"][kind][0], numbers["windows"][0]
    return f"{name} {made}, repeating {still} (nearer in {nearer} of {windows} windows)"


def _places(offsets, which):
    """[1, 2, 3, 5] of which some: "+1 to +3, +5"."""
    runs = []
    for chosen, run in itertools.groupby(zip(which, offsets), key=lambda pair: pair[0]):
        run = [offset for _, offset in run]
        if chosen:
            runs.append(f"+{run[0]}" if len(run) == 1 else f"+{run[0]} to +{run[-1]}")
    return ", ".join(runs)


def media(directory, numbers):
    """Returns what a page shows of `closed_loop.draw_future`'s files and numbers."""
    charts = [
        svg_chart.Chart(
            f"{name} against what happened, mean of the windows",
            {_LABELS[who]: (numbers["offsets"], numbers[kind][who]) for who in _LABELS},
            "steps ahead",
            marks=tuple(numbers["offsets"]),
        )
        for kind, (name, _, _) in _KINDS.items()
    ]
    future, video = (directory / name for name in ("future.png", "future.mp4"))
    shown = html_report.Media(future, verdict(numbers), drawn=True)
    return shown, html_report.Media(video, drawn=True), *charts
