"""Wan2.1_VAE.pth (194 tensors) <-> the parameters of `lightwam_jax.models.vae.WanVAE`.

Keys are those of the published file: no `model.` prefix.
"""

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


def _half(half, levels):
    """Rows of the encoder or the decoder, whose resolution levels are listed under `levels`."""
    residual = []
    for stage in (levels, "middle"):
        theirs = f"{half}.{stage}.{{i}}.residual.{{j}}"
        ours = f"{half}/{stage}_{{i}}/residual_{{j}}"
        residual += [Rule(f"{theirs}.gamma", f"{ours}/gamma", GAMMA3D),
                     *linear_rows(theirs, ours, CONV3D)]
    level, our_level = f"{half}.{levels}.{{i}}", f"{half}/{levels}_{{i}}"
    middle, our_middle = f"{half}.middle.1", f"{half}/middle_1"
    return (
        *linear_rows(f"{half}.conv1", f"{half}/conv1", CONV3D),
        *residual,
        *linear_rows(f"{level}.shortcut", f"{our_level}/shortcut", POINT3D),
        *linear_rows(f"{level}.resample.1", f"{our_level}/resample_1", CONV2D),
        *linear_rows(f"{level}.time_conv", f"{our_level}/time_conv", CONV3D),
        Rule(f"{middle}.norm.gamma", f"{our_middle}/norm/gamma", GAMMA2D),
        *linear_rows(f"{middle}.to_qkv", f"{our_middle}/to_qkv", POINT2D),
        *linear_rows(f"{middle}.proj", f"{our_middle}/proj", POINT2D),
        Rule(f"{half}.head.0.gamma", f"{half}/head_0/gamma", GAMMA3D),
        *linear_rows(f"{half}.head.2", f"{half}/head_2", CONV3D),
    )


RULES = (
    *_half("encoder", "downsamples"),
    *_half("decoder", "upsamples"),
    *linear_rows("conv1", "conv1", POINT3D),
    *linear_rows("conv2", "conv2", POINT3D),
)


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
