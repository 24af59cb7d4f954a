"""Command line of the converters.

    python -m converters lightwam --in step_150000.pt --out weights/libero [--verify]
    python -m converters dit --in diffusion_pytorch_model.safetensors --out weights/wan21
    python -m converters export --in weights/libero --out step_150000.pt
    python -m converters verify FIXTURE_DIR
"""

import argparse
import os
import sys

# Conversion moves bytes, and parity is shown in float32 on the CPU. Models here are tiny and run
# once: compile quickly rather than well.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 "
                                   "--xla_llvm_disable_expensive_passes=true")


def main(argv=None):
    """Runs one command; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, FileNotFoundError, FileExistsError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _verify(args):
    from converters.verify import verify
    return 0 if verify(args.directory) else 1


def _convert(args):
    from converters import convert
    convert.convert(args.command, getattr(args, "in"), args.out, verify=args.verify, told=dict(
        head_dim=args.head_dim, pool_heads=args.pool_heads, lora_alpha=args.lora_alpha,
        adapter_scale=args.adapter_scale, attention_mask=args.attention_mask,
        sources=tuple(args.sources.split(",")) if args.sources else ()))
    return 0


def _export(args):
    from converters import convert
    convert.export(getattr(args, "in"), args.out)
    return 0


def _parser():
    parser = argparse.ArgumentParser("python -m converters", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify", help="check parity against a directory of fixtures")
    verify.add_argument("directory")
    verify.set_defaults(run=_verify)
    kinds = {"lightwam": "a released Light-WAM .pt", "dit": "an official Wan transformer"}
    for name, text in kinds.items():
        command = commands.add_parser(name, help=f"{text} -> checkpoint directory")
        command.add_argument("--in", required=True)
        command.add_argument("--out", required=True)
        command.add_argument("--verify", action="store_true",
                             help="read the result back and compare bytes")
        told = command.add_argument_group("what a file does not tell (defaults: the release's)")
        told.add_argument("--head_dim", type=int)
        told.add_argument("--pool_heads", type=int)
        told.add_argument("--lora_alpha", type=float)
        told.add_argument("--adapter_scale", type=float, default=1.0)
        told.add_argument("--attention_mask", default="first_frame_causal")
        told.add_argument("--sources", help="comma-separated, for mean pooling only")
        command.set_defaults(run=_convert)
    export = commands.add_parser("export", help="checkpoint directory -> Light-WAM .pt")
    export.add_argument("--in", required=True)
    export.add_argument("--out", required=True)
    export.set_defaults(run=_export)
    return parser


if __name__ == "__main__":
    sys.exit(main())
