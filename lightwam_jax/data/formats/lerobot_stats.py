"""Statistics as LeRobot keeps them in meta/: of each episode, and from those of all together.

LeRobot uses them; our training does not (`normalize.py` computes its own).
"""

import numpy as np

_QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
_LOWER = ("min", "q01", "q10", "q50")
BASIC = ("min", "max", "mean", "std", "count")  # what v2.1 keeps
ALL = (*BASIC, *_QUANTILES)


def columns(values, names=ALL):
    """Returns {name: [1] or [D]} of a column [n] or [n, D]."""
    values = values.reshape(len(values), -1).astype(np.float64)
    found = {
        "min": values.min(0),
        "max": values.max(0),
        "mean": values.mean(0),
        "std": values.std(0),
        "count": np.array([len(values)]),
    }
    if names != BASIC:  # they take most of the time
        found |= zip(_QUANTILES, np.quantile(values, list(_QUANTILES.values()), axis=0))
    return {name: found[name] for name in names}


def histogram(images):
    """Returns how often each channel of uint8 [k, H, W, 3] has each value, int [3, 256]."""
    return np.stack([np.bincount(images[..., c].reshape(-1), minlength=256) for c in range(3)])


def images(counts, number, names=ALL):
    """Returns {name: [3, 1, 1]} of `number` images, in 0..1, from their `histogram`."""
    levels, share = np.arange(256) / 255, counts / counts.sum(1, keepdims=True)
    below, mean = np.cumsum(share, 1), share @ levels
    found = {
        "min": levels[(counts > 0).argmax(1)],
        "max": levels[255 - (counts > 0)[:, ::-1].argmax(1)],
        "mean": mean,
        "std": np.sqrt(np.maximum(share @ levels**2 - mean**2, 0)),
    }
    # A cumulative share may end a rounding error below 1.
    found |= {name: levels[(below < q - 1e-9).sum(1)] for name, q in _QUANTILES.items()}
    found = {name: value.reshape(3, 1, 1) for name, value in found.items()}
    found["count"] = np.array([number])
    return {name: found[name] for name in names}


def joined(episodes):
    """Returns the statistics of all episodes, from a list of {feature: {name: array or list}}.

    As LeRobot does, a quantile is the outermost of the episodes'.
    """
    out = {}
    for feature, names in episodes[0].items():
        parts = {name: np.stack([stats[feature][name] for stats in episodes]) for name in names}
        count = parts["count"]
        weight = count.reshape(-1, *[1] * (parts["mean"].ndim - 1)) / count.sum()
        mean = (weight * parts["mean"]).sum(0)
        variance = (weight * (parts["std"] ** 2 + (parts["mean"] - mean) ** 2)).sum(0)
        outermost = {n: x.min(0) if n in _LOWER else x.max(0) for n, x in parts.items()}
        out[feature] = outermost | {"mean": mean, "std": np.sqrt(variance), "count": count.sum(0)}
    return out


def lists(tree):
    """Returns nested dicts of arrays as JSON."""
    return {
        key: lists(value) if isinstance(value, dict) else np.asarray(value).tolist()
        for key, value in tree.items()
    }
