"""What a LeRobot dataset calls the dimensions of its state and its action."""

import pathlib

from lightwam_jax.data.formats import checked, lerobot_meta
from lightwam_jax.data.formats import keys as keys_lib


def of_actions(config):
    """Returns the names of the action's dimensions by meta/info.json; () where it has none.

    Names decide nothing, so what is wrong with them is not reported.
    """
    data = config.data
    keys, path = data.fields.action or lerobot_meta.ACTION, data.path.split(",")[0].strip()
    try:
        info = checked.json_object(pathlib.Path(path) / "meta" / "info.json").values
        features = info["features"]
        names = []
        for text in keys:
            key = keys_lib.parse(text)
            names += list(_leaves(features[key.path].get("names")))[key.dims]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return ()
    return tuple(names)


def _leaves(names):
    """Yields the texts of nested lists and dicts: {"motors": ["x", "y"]} as [["x", "y"]]."""
    if isinstance(names, str):
        yield names
    elif isinstance(names, (list, dict)):
        for name in names.values() if isinstance(names, dict) else names:
            yield from _leaves(name)
