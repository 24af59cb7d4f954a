"""Wan2.1_VAE.pth (194 tensors) <-> the parameters of `lightwam_jax.models.vae.WanVAE`.

A row is (parameter path, key in the file, layout); `{i}` and `{j}` stand for one number, the same
on both sides, so a row works in both directions. Keys are those of the published file: no `model.`
prefix.

Layouts, file -> parameter: conv3d [O,I,T,H,W] -> [T,H,W,I,O], conv2d [O,I,H,W] -> [H,W,I,O],
point3d [O,I,1,1,1] -> [I,O], point2d [O,I,1,1] -> [I,O], gamma3d [C,1,1,1] -> [C],
gamma2d [C,1,1] -> [C], same: unchanged.
"""

import re

from flax import traverse_util


def _half(half, levels):
    """Rows of the encoder or the decoder, whose resolution levels are listed under `levels`."""
    rows = []
    for stage in (levels, "middle"):
        ours, theirs = f"{half}/{stage}_{{i}}", f"{half}.{stage}.{{i}}"
        rows += [
            (f"{ours}/residual_{{j}}/gamma", f"{theirs}.residual.{{j}}.gamma", "gamma3d"),
            (f"{ours}/residual_{{j}}/kernel", f"{theirs}.residual.{{j}}.weight", "conv3d"),
            (f"{ours}/residual_{{j}}/bias", f"{theirs}.residual.{{j}}.bias", "same"),
        ]
    ours, theirs = f"{half}/{levels}_{{i}}", f"{half}.{levels}.{{i}}"
    return (
        *rows,
        (f"{ours}/shortcut/kernel", f"{theirs}.shortcut.weight", "point3d"),
        (f"{ours}/shortcut/bias", f"{theirs}.shortcut.bias", "same"),
        (f"{ours}/resample_1/kernel", f"{theirs}.resample.1.weight", "conv2d"),
        (f"{ours}/resample_1/bias", f"{theirs}.resample.1.bias", "same"),
        (f"{ours}/time_conv/kernel", f"{theirs}.time_conv.weight", "conv3d"),
        (f"{ours}/time_conv/bias", f"{theirs}.time_conv.bias", "same"),
        (f"{half}/middle_1/norm/gamma", f"{half}.middle.1.norm.gamma", "gamma2d"),
        (f"{half}/middle_1/to_qkv/kernel", f"{half}.middle.1.to_qkv.weight", "point2d"),
        (f"{half}/middle_1/to_qkv/bias", f"{half}.middle.1.to_qkv.bias", "same"),
        (f"{half}/middle_1/proj/kernel", f"{half}.middle.1.proj.weight", "point2d"),
        (f"{half}/middle_1/proj/bias", f"{half}.middle.1.proj.bias", "same"),
        (f"{half}/conv1/kernel", f"{half}.conv1.weight", "conv3d"),
        (f"{half}/conv1/bias", f"{half}.conv1.bias", "same"),
        (f"{half}/head_0/gamma", f"{half}.head.0.gamma", "gamma3d"),
        (f"{half}/head_2/kernel", f"{half}.head.2.weight", "conv3d"),
        (f"{half}/head_2/bias", f"{half}.head.2.bias", "same"),
    )


ROWS = (
    *_half("encoder", "downsamples"),
    *_half("decoder", "upsamples"),
    ("conv1/kernel", "conv1.weight", "point3d"),
    ("conv1/bias", "conv1.bias", "same"),
    ("conv2/kernel", "conv2.weight", "point3d"),
    ("conv2/bias", "conv2.bias", "same"),
)

# layout: (file -> parameter, parameter -> file)
_LAYOUTS = {
    "conv3d": (lambda a: a.transpose(2, 3, 4, 1, 0), lambda a: a.transpose(4, 3, 0, 1, 2)),
    "conv2d": (lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1)),
    "point3d": (lambda a: a[:, :, 0, 0, 0].T, lambda a: a.T[:, :, None, None, None]),
    "point2d": (lambda a: a[:, :, 0, 0].T, lambda a: a.T[:, :, None, None]),
    "gamma3d": (lambda a: a[:, 0, 0, 0], lambda a: a[:, None, None, None]),
    "gamma2d": (lambda a: a[:, 0, 0], lambda a: a[:, None, None]),
    "same": (lambda a: a, lambda a: a),
}


def to_params(tensors):
    """Returns the nested parameters of WanVAE from the file's {key: array}; types are kept.

    Raises:
      ValueError: a key that no row, or more than one row, describes.
    """
    flat = {}
    for key, array in tensors.items():
        path, layout = _translate(key, [(theirs, ours, layout) for ours, theirs, layout in ROWS])
        flat[tuple(path.split("/"))] = _LAYOUTS[layout][0](array)
    return traverse_util.unflatten_dict(flat)


def from_params(params):
    """Returns the file's {key: array} from WanVAE parameters: the inverse of `to_params`.

    Raises:
      ValueError: a path that no row, or more than one row, describes.
    """
    tensors = {}
    for path, array in traverse_util.flatten_dict(params, sep="/").items():
        key, layout = _translate(path, ROWS)
        tensors[key] = _LAYOUTS[layout][1](array)
    return tensors


def _translate(name, rows):
    found = []
    for source, target, layout in rows:
        # re.escape has turned {i} into \{i\}
        pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(source))
        match = re.fullmatch(pattern, name)
        if match:
            found.append((target.format(**match.groupdict()), layout))
    if len(found) != 1:
        raise ValueError(f"{name!r} fits {len(found)} rows of the Wan 2.1 VAE table, expected one: "
                         "is this another model's file, or do its keys have a prefix?")
    return found[0]
