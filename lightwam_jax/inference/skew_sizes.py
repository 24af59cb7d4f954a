"""How much each usual mistake changes a policy's actions, and whether the skew check names it."""

import numpy as np

from lightwam_jax.inference import keys as keys_lib
from lightwam_jax.inference import skew_check, skew_mistakes, skew_stages, skew_windows

_HEAD = "mistake", "median change", "largest", "first stage", "named", "from the actions alone"


class _Silent:
    """A server that makes a mistake itself, and tells no stages."""

    def __init__(self, server, mistaken):
        self.metadata, self._server, self._mistaken = server.metadata, server, iter(mistaken)

    def infer(self, request):
        return self._server.infer(next(self._mistaken) | {"stages": False})


def table(policy, windows, server):
    """Returns printable rows: of each mistake, its size as a share of the actions' range.

    Args:
      policy: `Policy`, not deployed. windows: `Window`s. server: see `skew_check.check`.
    """
    rows = [_HEAD]
    for mistake in _usual(windows):
        rows.append(_measure(policy, windows, server, mistake))
    widths = [max(len(row[i]) for row in rows) + 2 for i in range(len(_HEAD))]
    spread = float(np.ptp(skew_windows.trained(policy, windows).normalised))
    lines = ["".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
    return [*lines, f"as shares of the range of the actions, which is {spread:.2f}, normalised"]


def _usual(windows):
    """The mistakes of the documentation: one of each kind."""
    image = next(iter(windows[0].moment().images.values()))
    size = tuple(round(0.75 * side) for side in image.shape[:2])
    wanted = (
        skew_mistakes.resized(size, "bilinear", back=True).name,
        "JPEG, quality about 95",
        "JPEG, quality about 75",
        "stale: observation of 1 step before",
        "cameras",
        "pictures flipped upside down",
        "units of the state: millimetres",
        "red and blue swapped (BGR)",
        "another prompt template: 'Task: {task}'",
    )
    every = skew_mistakes.every(windows)
    found = [next((m for m in every if m.name.startswith(name)), None) for name in wanted]
    return [mistake for mistake in found if mistake is not None]


def _measure(policy, windows, server, mistake):
    orientation = dict(zip(policy.config.data.cameras, policy.config.data.orientation))

    def adapter(window, request):
        sent = mistake.apply(window)
        prompt = sent.prompt
        if sent.template != window.config.data.prompt_template:
            prompt = sent.template.replace("{task}", prompt)  # the server's goes around it
        described = server.metadata["keys"]
        return keys_lib.compose(described, sent.images, sent.state, prompt, orientation)

    result = skew_check.check_windows(policy, windows, server, adapter=adapter)
    rows = next(s.rows for s in result.stages if s.name == "actions normalised")
    silent = _Silent(server, [adapter(window, None) for window in windows])
    alone = skew_check.check_windows(policy, windows, silent)
    return (
        mistake.name,
        f"{np.median(rows):.2g}",
        f"{rows.max():.2g}",
        result.first or "none",
        _named(result, mistake),
        _named(alone, mistake),
    )


def _named(result, mistake):
    if result.verdict == skew_stages.PASS:
        return "passes"
    cause = result.causes[0] if result.causes else None
    if cause is None:
        return "no"
    kind = mistake.name.split("{")[0][:12]
    sure = "" if cause.explained > 0.95 else f", {100 * cause.explained:.0f} %"
    return f"yes{sure}" if cause.name.startswith(kind) else f"as {cause.name}"
