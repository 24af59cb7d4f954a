"""What a command prints at its end: what came out, and the next command to type.

The order is precompute --what stats, precompute --what all, train.py, evaluate.py --mode open_loop,
then a simulator or the server. --config and changed keys are repeated as they were given. No jax
here.
"""

import shlex
import sys

from absl import flags

# Key of the config that is a directory of converted weights: (where, what makes it).
_WEIGHTS = {
    "data.codec_weights": ("weights/vae", "vae"),
    "data.text_weights": ("weights/umt5", "t5 (with --tokenizer tokenizer.json)"),
    "train.init": ("weights/wan21", "dit"),
}


def after_precompute(config, what, splits, argv=None):
    """Returns the lines that end `precompute`.

    Args:
      config: `Config`. what: the steps that were asked for.
      splits: {"train": episodes, "val": episodes} of each dataset.
      argv: of the command; default: sys.argv.
    """
    train, val = (sum(len(split[part]) for split in splits) for part in ("train", "val"))
    said = f"split: {train} training and {val} held-out episodes\n"
    data = config.data
    if {"latents", "all"} & set(what):
        lacks = ["train.init"] * (data.codec != "pca" and not config.train.init)
        workdir = shlex.quote(f"runs/{config.name or 'x'}")
        return said + _with_weights("train.py", f"--workdir {workdir}", lacks, argv)
    lacks = ["data.codec_weights"] * (data.codec != "pca" and not data.codec_weights)
    lacks += ["data.text_weights"] * (data.text_encoder == "umt5" and not data.text_weights)
    return said + _with_weights("-m lightwam_jax.precompute", "--what all", lacks, argv)


def after_training(config, workdir, rows):
    """Returns the lines that end train.py.

    Args:
      config: `Config`. workdir: as it was given. rows: of its metrics.jsonl.
    """
    validated, suite = [row for row in rows if row["kind"] == "eval"], config.evaluation.suite
    said = "validation: none; no episode is held out (config.data.val_fraction)"
    if validated:
        last = validated[-1]
        said = (
            f"validation: L1 {last['l1_mean']:.4f} at step {last['step']}, normalised, mean of all "
            f"dimensions of {last['steps']:,.0f} held-out actions"
        )
    mode = "open_loop" if validated or not suite else suite
    return f"{said}\n{_next('evaluate.py', workdir, '--mode', mode)}"


def after_open_loop(config, workdir):
    """Returns the line that ends evaluate.py --mode open_loop."""
    if suite := config.evaluation.suite:
        return _next("evaluate.py", workdir, "--mode", suite)
    return _next("-m lightwam_jax.inference.server", workdir)


def _next(program, workdir, *more):
    return f"next: python {program} {shlex.join(['--workdir', str(workdir), *more])}"


def _with_weights(program, more, lacks, argv):
    """The next command of the same config; before it, which weights of `lacks` to convert."""
    directories = [f"--config.{key}={_WEIGHTS[key][0]}" for key in lacks]
    given = shlex.join([*_config_flags(argv), *directories])
    command = f"next: python {program} {given} {more}"
    makers = ", ".join(_WEIGHTS[key][1] for key in lacks)
    before = f"convert the weights first (docs/weights.md): python -m converters {makers}\n"
    return before * bool(lacks) + command


def with_config_given(text, argv=None):
    """Returns a message whose advice says --config CONFIG with the config that argv names."""
    given = _config_flags(argv) if "--config CONFIG" in text else []
    return text.replace("--config CONFIG", shlex.join(given)) if given else text


def _config_flags(argv):
    """Returns --config and --config.KEY of a command line, with their values, as they stand."""
    rest, kept = list(sys.argv if argv is None else argv)[1:], []
    while rest:
        argument = rest.pop(0)
        name, equals, _ = argument.lstrip("-").partition("=")
        if not argument.startswith("-") or name.removeprefix("no").split(".")[0] != "config":
            continue
        kept.append(argument)
        boolean = name.startswith("no") or (name in flags.FLAGS and flags.FLAGS[name].boolean)
        if rest and not equals and not boolean:
            kept.append(rest.pop(0))
    return kept
