"""Command line of the converters.

    python -m converters lightwam --in step_150000.pt --out weights/libero [--verify]
    python -m converters dit|vae|t5 --in FILE_OR_FOLDER --out DIR [--verify]
    python -m converters export --in DIR --out FILE [--layout official|diffusers|huggingface]
    python -m converters policy --weights DIR --config configs/libero.py:all --vae DIR --text DIR
                                --out DIR
    python -m converters latents --in DIR --config configs/libero.py:spatial [--val_in DIR]
    python -m converters texts --in DIR --config configs/libero.py:spatial
    python -m converters inspect FILE_OR_DIR
    python -m converters verify FIXTURE_DIR

`--in` is a weight file, an index of shards, a folder of Wan or of diffusers, or hf:owner/name; of
`latents` and `texts`, which also take --config.data.path=DIR and the like, a cache of the PyTorch
reference.
"""

import argparse
import os
import sys

# Conversion moves bytes, and parity is shown in float32 on the CPU. Models here are tiny and run
# once: compile quickly rather than well.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

KINDS = {
    "lightwam": "a released Light-WAM .pt",
    "dit": "a Wan video transformer",
    "vae": "a Wan 2.1 or 2.2 VAE",
    "t5": "the umT5 text encoder",
}
_PART = "where the weights lie in a .pt that holds several sets, such as ema or model"


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message):
        self.exit(2, f"error: {message}; {self.prog} --help says more\n")


def main(argv=None):
    """Runs one command; returns the exit code."""
    parser = _parser()
    args, args.overrides = parser.parse_known_args(argv)
    config_flag = lambda flag: args.run is _import and flag.startswith("--config.")
    if unknown := [flag for flag in args.overrides if not config_flag(flag)]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    from lightwam_jax import command_line, interrupts

    try:
        if getattr(args, "out", None):
            command_line.check_new(args.out, "--out")
        with interrupts.interruptible("what was half written is removed: run the command again"):
            return args.run(args)
    except (ValueError, ModuleNotFoundError, OSError) as error:  # OSError: files, disk, network
        print(f"error: {error}", file=sys.stderr)
        return 2


def _verify(args):
    from converters.parity.verify import verify

    return 0 if verify(args.directory) else 1


def _convert(args):
    from converters import convert

    names = ("head_dim", "variant", "pool_heads", "lora_alpha", "adapter_scale", "attention_mask")
    names += ("part",)
    told = {name: getattr(args, name) for name in names if hasattr(args, name)}
    if args.command == "lightwam":
        told["sources"] = tuple(args.sources.split(",")) if args.sources else ()
    beside = [args.beside] if args.beside else []
    convert.convert(args.command, getattr(args, "in"), args.out, told, beside, args.verify)
    return 0


def _export(args):
    from converters import convert

    convert.export(getattr(args, "in"), args.out, args.layout)
    return 0


def _policy(args):
    from converters import policy

    policy.assemble(
        args.weights, args.config, args.vae, args.text, args.out, args.stats, args.prompts
    )
    return 0


def _import(args):
    from absl import flags
    from ml_collections import config_flags

    from converters import import_caches
    from lightwam_jax import command_line
    from lightwam_jax import config as config_lib

    argv = ["converters", f"--config={args.config}", *args.overrides]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    command_line.parse(argv, values)
    made, place = config_lib.from_config_dict(values.config), getattr(args, "in")
    if args.command == "latents":
        import_caches.import_latents(place, made, args.val_in, args.trust)
    else:
        import_caches.import_texts(place, made, args.trust)
    return 0


def _inspect(args):
    from converters import inspect as inspect_lib

    told = {"head_dim": args.head_dim, "pool_heads": args.pool_heads, "part": args.part}
    inspect_lib.inspect(args.path, {key: value for key, value in told.items() if value})
    return 0


def _parser():
    parser = _Parser(
        "python -m converters",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, run, text):
        added = commands.add_parser(name, help=text)
        added.set_defaults(run=run)
        return added

    verify = command("verify", _verify, "check parity against a directory of fixtures")
    verify.add_argument("directory")
    for name, text in KINDS.items():
        _conversion(name, command(name, _convert, f"{text} -> checkpoint directory"))
    export = command("export", _export, "checkpoint directory -> weight file")
    export.add_argument("--in", required=True)
    export.add_argument("--out", required=True, help=".safetensors, .pt or .pth")
    export.add_argument("--layout", help="default: the one it came in")
    policy = command("policy", _policy, "converted weights + config -> a policy that acts")
    policy.add_argument("--weights", required=True, help="what `lightwam` wrote")
    policy.add_argument("--config", required=True, help="configs/libero.py:all")
    policy.add_argument("--vae", required=True, help="what `vae` wrote")
    policy.add_argument("--text", required=True, help="what `t5` wrote")
    policy.add_argument("--out", required=True, help="DIR")
    policy.add_argument("--stats", help="dataset_stats.json; default: the one kept with --weights")
    policy.add_argument("--prompts", help="file of instructions to encode now, one per line")
    latents = command("latents", _import, "the reference's cache of video latents -> ours")
    texts = command("texts", _import, "the reference's cache of text embeddings -> ours")
    for each in (latents, texts):
        each.add_argument("--in", required=True)
        each.add_argument("--config", required=True, help="configs/libero.py:spatial")
        each.add_argument("--trust", action="store_true", help="encode nothing to compare with")
    val = "its cache of the validation split; without one, that split is encoded"
    latents.add_argument("--val_in", default="", help=val)
    inspect = command("inspect", _inspect, "what a weight file or a checkpoint is")
    inspect.add_argument("path")
    inspect.add_argument("--head_dim", type=int, help="default: 128")
    inspect.add_argument("--pool_heads", type=int, help="default: 8")
    inspect.add_argument("--part", help=_PART)
    return parser


def _conversion(name, command):
    command.add_argument("--in", required=True)
    command.add_argument("--out", required=True)
    verify = "read the result back and print each module's error"
    command.add_argument("--verify", action="store_true", help=verify)
    command.add_argument("--part", help=_PART)
    command.set_defaults(beside=None)
    if name == "lightwam":
        stats = "dataset_stats.json of the release; default: beside --in"
        command.add_argument("--stats", dest="beside", help=stats)
    if name == "t5":
        tokenizer = "tokenizer.json (google/umt5-xxl); default: beside --in"
        command.add_argument("--tokenizer", dest="beside", help=tokenizer)
    if name not in ("lightwam", "dit"):
        return
    told = command.add_argument_group("what a file does not tell (defaults: the release's)")
    told.add_argument("--variant", help="refuse a backbone of another size (models/variants.py)")
    told.add_argument("--head_dim", type=int)
    if name == "lightwam":
        told.add_argument("--pool_heads", type=int)
        told.add_argument("--lora_alpha", type=float)
        told.add_argument("--adapter_scale", type=float, default=1.0)
        told.add_argument("--attention_mask", default="first_frame_causal")
        told.add_argument("--sources", help="comma-separated, for mean pooling only")


if __name__ == "__main__":
    from lightwam_jax import interrupts

    interrupts.listen()
    sys.exit(main())
