"""The Wan VAEs, 2.1 and 2.2, as published and as diffusers names them.

Official keys are those of Wan2.1_VAE.pth and Wan2.2_VAE.pth: no `model.` prefix. Ours are the
parameters of `models.vae.WanVAE` and `models.vae22.Wan22VAE`.
"""

import itertools
import re

from converters import rules
from converters.rules import Rule, Transform, linear_rows
from lightwam_jax import params as params_lib

# Convolutions [O,I,T,H,W] <-> [T,H,W,I,O] and [O,I,H,W] <-> [H,W,I,O].
CONV3D = Transform(lambda w: w.transpose(2, 3, 4, 1, 0), lambda k: k.transpose(4, 3, 0, 1, 2))
CONV2D = Transform(lambda w: w.transpose(2, 3, 1, 0), lambda k: k.transpose(3, 2, 0, 1))
# Pointwise convolutions [O,I,1,1,1] or [O,I,1,1] <-> linear [I,O].
POINT3D = Transform(lambda w: w[:, :, 0, 0, 0].T, lambda k: k.T[:, :, None, None, None])
POINT2D = Transform(lambda w: w[:, :, 0, 0].T, lambda k: k.T[:, :, None, None])
# Scales of norms [C,1,1,1] or [C,1,1] <-> [C].
GAMMA3D = Transform(lambda g: g[:, 0, 0, 0], lambda g: g[:, None, None, None])
GAMMA2D = Transform(lambda g: g[:, 0, 0], lambda g: g[:, None, None])


def _res_block(theirs, ours, names):
    """Rows of a residual block; `names`: its two norms, two convolutions and its shortcut."""
    norm1, conv1, norm2, conv2, shortcut = names
    return [
        Rule(f"{theirs}.{norm1}.gamma", f"{ours}/residual_0/gamma", GAMMA3D),
        *linear_rows(f"{theirs}.{conv1}", f"{ours}/residual_2", CONV3D),
        Rule(f"{theirs}.{norm2}.gamma", f"{ours}/residual_3/gamma", GAMMA3D),
        *linear_rows(f"{theirs}.{conv2}", f"{ours}/residual_6", CONV3D),
        *linear_rows(f"{theirs}.{shortcut}", f"{ours}/shortcut", POINT3D),
    ]


def _resample(theirs, ours):
    return [
        *linear_rows(f"{theirs}.resample.1", f"{ours}/resample_1", CONV2D),
        *linear_rows(f"{theirs}.time_conv", f"{ours}/time_conv", CONV3D),
    ]


def _attention(theirs, ours):
    return [
        Rule(f"{theirs}.norm.gamma", f"{ours}/norm/gamma", GAMMA2D),
        *linear_rows(f"{theirs}.to_qkv", f"{ours}/to_qkv", POINT2D),
        *linear_rows(f"{theirs}.proj", f"{ours}/proj", POINT2D),
    ]


_OFFICIAL = ("residual.0", "residual.2", "residual.3", "residual.6", "shortcut")
_DIFFUSERS = ("norm1", "conv1", "norm2", "conv2", "conv_shortcut")
_LEVELS = 4  # of every Wan VAE, with two residual blocks each (three in the decoder)


def _official(level):
    """Rows of a whole VAE; a member of a level is `level` with its half's list name filled in."""
    rows = [*linear_rows("conv1", "conv1", POINT3D), *linear_rows("conv2", "conv2", POINT3D)]
    for half, listed in (("encoder", "downsamples"), ("decoder", "upsamples")):
        theirs = f"{half}.{level.replace('LIST', listed)}"
        ours = theirs.replace(f"{listed}.", f"{listed}_").replace(".", "/")
        rows += [
            *linear_rows(f"{half}.conv1", f"{half}/conv1", CONV3D),
            *_res_block(theirs, ours, _OFFICIAL),
            *_resample(theirs, ours),
            Rule(f"{half}.head.0.gamma", f"{half}/head_0/gamma", GAMMA3D),
            *linear_rows(f"{half}.head.2", f"{half}/head_2", CONV3D),
        ]
        for i in (0, 2):
            rows += _res_block(f"{half}.middle.{i}", f"{half}/middle_{i}", _OFFICIAL)
        rows += _attention(f"{half}.middle.1", f"{half}/middle_1")
    return tuple(rows)


def _diffusers(members):
    """Rows of a whole VAE in diffusers' naming.

    Args:
      members: function half -> [(their member of a level, ours, is it a residual block)].
    """
    rows = [
        *linear_rows("quant_conv", "conv1", POINT3D),
        *linear_rows("post_quant_conv", "conv2", POINT3D),
    ]
    for half in ("encoder", "decoder"):
        rows += [
            *linear_rows(f"{half}.conv_in", f"{half}/conv1", CONV3D),
            Rule(f"{half}.norm_out.gamma", f"{half}/head_0/gamma", GAMMA3D),
            *linear_rows(f"{half}.conv_out", f"{half}/head_2", CONV3D),
        ]
        for theirs, ours in ((0, 0), (1, 2)):
            rows += _res_block(
                f"{half}.mid_block.resnets.{theirs}", f"{half}/middle_{ours}", _DIFFUSERS
            )
        rows += _attention(f"{half}.mid_block.attentions.0", f"{half}/middle_1")
        for theirs, ours, is_block in members(half):
            theirs, ours = f"{half}.{theirs}", f"{half}/{ours}"
            rows += _res_block(theirs, ours, _DIFFUSERS) if is_block else _resample(theirs, ours)
    return tuple(rows)


def _members21(half):
    """diffusers keeps the encoder's flat list and cuts the decoder's into levels."""
    per_level = 3 if half == "encoder" else 4  # residual blocks and the resampling after them
    for level, i in itertools.product(range(_LEVELS), range(per_level)):
        position, is_block = level * per_level + i, i < per_level - 1
        if not is_block and level == _LEVELS - 1:
            continue
        if half == "encoder":
            yield f"down_blocks.{position}", f"downsamples_{position}", is_block
        else:
            place = f"resnets.{i}" if is_block else "upsamplers.0"
            yield f"up_blocks.{level}.{place}", f"upsamples_{position}", is_block


def _members22(half):
    ours, theirs = ("downsamples", "down") if half == "encoder" else ("upsamples", "up")
    blocks = 2 if half == "encoder" else 3
    for level, i in itertools.product(range(_LEVELS), range(blocks + 1)):
        place = f"resnets.{i}" if i < blocks else f"{theirs}sampler"
        yield f"{theirs}_blocks.{level}.{place}", f"{ours}_{level}/{ours}_{i}", i < blocks


RULES = _official("LIST.{i}")
RULES22 = _official("LIST.{i}.LIST.{j}")
DIFFUSERS = _diffusers(_members21)
DIFFUSERS22 = _diffusers(_members22)


_MEMBER = re.compile(
    r"encoder/downsamples_(\d+)(?:/downsamples_(\d+))?/"
    r"(residual_2|residual_6|resample_1|time_conv)/kernel"
)


def model_fields(shapes):
    """What the shapes of a VAE's parameters tell: "version" and the fields of its module.

    Args:
      shapes: {path: shape} of `WanVAE` ("wan21") or `Wan22VAE` ("wan22") parameters.

    Raises:
      ValueError: they are neither's.
    """
    members = {}  # place in the encoder -> {what is there: its output channels}
    for path, shape in shapes.items():
        if match := _MEMBER.fullmatch(path):
            place = tuple(int(number) for number in match.groups()[:2] if number)
            members.setdefault(place, {})[match[3]] = shape[-1]
    ends = ("encoder/conv1/kernel", "decoder/conv1/kernel", "conv2/kernel")
    if not members or any(path not in shapes for path in ends):
        raise ValueError(f"these are no parameters of a Wan VAE: {rules.some_of(shapes)}")
    dim, top, z_dim = (shapes[path][-1] for path in ends)
    levels, times = [[]], []  # channels of each level's residual blocks; where time is halved
    for _, found in sorted(members.items()):
        if "resample_1" in found:
            times.append("time_conv" in found)
            levels.append([])
        else:
            levels[-1].append(found.get("residual_6") or found["residual_2"])  # one may be missing
    fields = dict(
        dim=dim,
        z_dim=z_dim,
        dim_mult=tuple(level[0] // dim for level in levels),
        num_res_blocks=len(levels[0]),
        time_downsample=tuple(times),
    )
    if len(next(iter(members))) == 1:
        return {"version": "wan21", **fields}
    return {"version": "wan22", **fields, "decoder_dim": top // fields["dim_mult"][-1]}


def to_params(tensors):
    """Returns the nested parameters of WanVAE from the file's {key: array}; types are kept.

    Raises:
      ValueError: a key that no row, or more than one row, describes.
    """
    return params_lib.unflatten(rules.to_params(RULES, tensors, "the Wan 2.1 VAE's file"))


def from_params(params):
    """Returns the file's {key: array} from WanVAE parameters: the inverse of `to_params`.

    Raises:
      ValueError: a path that no row, or more than one row, describes.
    """
    return rules.from_params(RULES, params_lib.flatten(params), layers={})
