"""What storing the frozen weights in fewer bits changes: bfloat16 and int8 beside each other.

  python -m benchmarks.frozen_weights --out benchmarks/results/frozen_weights.json

For a model of random weights, 512 wide and 8 blocks deep (kernels normal with variance 1/in, LoRA
as large as after training, gates open): the error of velocity and actions, |a - b| / |b| over all
values, against frozen weights in float32 and arithmetic in float32. "weights" keeps the arithmetic
in float32, so that only the storage differs; "computed in bfloat16" is how a GPU runs it. Random
kernels have no outliers; those of a trained model may, and then int8 is coarser.

Then the bytes of the frozen parameters of the full-size model. Runs on a CPU in a minute.
"""

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import results
from configs import base, libero
from lightwam_jax import build, command_line, params
from lightwam_jax import config as config_lib
from lightwam_jax.models import quantized
from lightwam_jax.training import step as step_lib

STORED = ("float32", "bfloat16", "int8")
SIZES = dict(
    dim=512, num_heads=4, head_dim=128, ffn_dim=2984, num_layers=8, text_dim=512, freq_dim=256,
    lora_rank=16, lora_alpha=32.0, lora_layers=tuple(range(8)), adapter_layers=(2, 5, 7),
    adapter_dim=64, num_queries=4, per_layer_dim=256, trunk_dim=512)  # fmt: skip
ROWS, TEXT, HORIZON, GRID = 2, 16, 16, (8, 16)


def small_config(dtype):
    """Returns the `Config` of the random model, computing in `dtype`."""
    return config_lib.from_config_dict(base.get_config("tiny", dtype=dtype, **SIZES))


def random_params(shapes, rng):
    """Returns numpy parameters of `shapes`: a nested dict like it."""

    def draw(path, x):
        if path.endswith("/scale"):
            return 1 + rng.normal(0, 0.1, x.shape)
        size = x.shape[-2] ** -0.5 if path.endswith(("/kernel", "/lora_a")) else 0.02
        values = rng.normal(0, size, x.shape)
        if path.endswith("/modulation") and x.shape[-2] == 6:
            values[..., [2, 5], :] += 1  # the gates of a block
        return values

    flat = params.flatten(shapes)
    return params.unflatten({path: np.float32(draw(path, x)) for path, x in flat.items()})


def forward(config):
    """Returns a jitted function of parameters and inputs: {"velocity", "actions"}."""
    model = build.build_model(config.model)

    def both(tree, noisy, t, observation, text, proprio):
        inputs = noisy, t, observation, text, proprio, HORIZON
        return dict(zip(("velocity", "actions"), model.apply({"params": tree}, *inputs)))

    return jax.jit(both)


def inputs(config, rng):
    """Returns random inputs of `forward`."""
    m = config.model
    draw = lambda *shape: jnp.float32(rng.normal(size=shape))
    noisy, observation = (draw(ROWS, f, *GRID, m.latent_channels) for f in (3, 1))
    t = jnp.float32([700.0, 150.0])
    return noisy, t, observation, draw(ROWS, TEXT, m.text_dim), draw(ROWS, m.proprio_dim)


def errors(seeds):
    """Returns {arithmetic: {storage: {"velocity", "actions": mean over seeds}}}."""
    configs = {
        "weights": small_config("float32"),
        "computed in bfloat16": small_config("bfloat16"),
    }
    runs = {name: forward(config) for name, config in configs.items()}
    config, found = configs["weights"], {}
    model = build.build_model(config.model)
    shapes = jax.eval_shape(lambda: build.init_params(model, jax.random.key(0), config.model))
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        learns, frozen = params.partition(random_params(shapes, rng), config.train.trainable)
        given, want = inputs(config, rng), None
        for name, run in runs.items():
            for dtype in STORED:
                got = run(params.merge(learns, quantized.stored(frozen, dtype)), *given)
                want = want or got  # the first: all in float32
                for what, x in got.items():
                    one = float(jnp.linalg.norm(x - want[what]) / jnp.linalg.norm(want[what]))
                    found.setdefault(name, {}).setdefault(dtype, {}).setdefault(what, []).append(
                        one
                    )
    return jax.tree.map(
        lambda x: round(float(np.mean(x)), 6), found, is_leaf=lambda x: isinstance(x, list)
    )


def frozen_gib():
    """Returns {storage: GiB of the frozen parameters of the LIBERO recipe}, from shapes."""
    sizes = {}
    for dtype in STORED:
        config = libero.get_config("spatial")
        config.model.frozen_dtype = dtype
        _, _, state = step_lib.state_shapes(config_lib.from_config_dict(config))
        leaves = jax.tree.leaves(state.frozen)
        sizes[dtype] = round(sum(x.size * x.dtype.itemsize for x in leaves) / results.GIB, 3)
    return sizes


def main(argv):
    del argv
    with jax.default_matmul_precision("highest"):
        relative = errors(flags.FLAGS.seeds)
    model = {"dim": SIZES["dim"], "blocks": SIZES["num_layers"], "seeds": flags.FLAGS.seeds}
    numbers = {"model": model, "relative_error": relative, "full_size_frozen_gib": frozen_gib()}
    results.write(flags.FLAGS.out, "frozen_weights", numbers)


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "JSON file to write.")
    flags.DEFINE_integer("seeds", 3, "Random models that are averaged.", lower_bound=1)
    command_line.run(main, again="run the same command again")
