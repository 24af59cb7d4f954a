"""Exports a trained policy in a few megabytes, so that anyone can evaluate it without training.

    python -m lightwam_jax.evaluation.export --workdir runs/demo --out policies/demo
    python evaluate.py --workdir policies/demo --mode demo
    python -m lightwam_jax.evaluation.export --out policies/demo --results runs/policies/demo

The first writes a checkpoint that `Policy.load`, evaluate.py and the server read like any other:
the parameters (their moving average, if the run kept one) in bfloat16, the config, and what turns
images, words and numbers into inputs; no optimizer, no data. It knows which seeds were
demonstrated. The last writes its README.md from results of exactly these weights: rates, controls
that lie beside them, and the command.
"""

import dataclasses
import json
import pathlib
import shlex
import shutil
import tempfile

from absl import app, flags

from lightwam_jax import command_line
from lightwam_jax import params as params_lib
from lightwam_jax.checkpoint import compact, storage
from lightwam_jax.checkpoint import run as checkpoint
from lightwam_jax.data import assets as assets_lib
from lightwam_jax.evaluation import closed_loop, report, side_by_side
from lightwam_jax.evaluation import suites as suites_lib
from lightwam_jax.inference import policy as policy_lib

_NOT_NEEDED = ("example_batch.npz", "fitted_on.json")  # to act
_PATHS = ("path", "cache", "codec_weights", "text_weights")


def export(source, out, max_mb=6.0):
    """Writes the policy of a run or checkpoint; returns its size in bytes.

    Args:
      source: run directory, or one checkpoint. out: directory; must not exist.
      max_mb: largest size, millions of bytes.

    Raises:
      FileExistsError: `out` is there. FileNotFoundError: no checkpoint.
      ValueError: a checkpoint without config and assets, or a policy that is too large.
    """
    out = storage.local_path(out)
    if out.exists():
        raise FileExistsError(f"{out} is there already; delete it, or choose another --out")
    stored = checkpoint.load_params(source)
    if stored.config is None or stored.assets is None:
        raise ValueError(f"{stored.path} holds parameters only; expected a checkpoint of train.py")
    small, dtypes = compact.rounded(stored.params)
    meta = {"step": stored.meta["step"], "dtypes": dtypes, "config": _config(stored.config)}
    meta["demonstrated"] = stored.meta.get(
        "demonstrated", suites_lib.demonstrated_seeds(stored.config)
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as made:
        storage.copy_files(stored.assets, made)
        for name in _NOT_NEEDED:
            for file in pathlib.Path(made).rglob(name):
                file.unlink()
        assets_lib.load_assets(made, stored.config)  # whether the rest is enough
        meta["files"] = compact.sums(made)
        checkpoint.save_params(out, small, meta, made)
    for file in out.rglob(storage.COMMIT_FILE):  # that it is there counts; it names a path of ours
        file.write_text("written by lightwam_jax.evaluation.export\n", encoding="utf-8")
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    if size > 1e6 * max_mb:
        shutil.rmtree(out)
        raise ValueError(
            f"the policy takes {size / 1e6:.1f} MB; expected at most --max_mb={max_mb:g}: "
            f"it has {params_lib.count(small) / 1e6:.1f} M parameters"
        )
    return size


def _config(config):
    """The config as a dict, without places of the machine that it was trained on."""
    content = dataclasses.asdict(config)
    for data in (content["data"], *content["data"]["mixture"].values()):
        for key in _PATHS:
            if pathlib.Path(data.get(key, "")).is_absolute():
                data[key] = ""
    return content


def readme(directory, results):
    """Returns the text of README.md for an exported policy.

    Args:
      directory: of the policy. results: directory of evaluate.py's results.

    Raises:
      ValueError: they are of other weights.
    """
    directory, results = pathlib.Path(directory), pathlib.Path(results)
    summary = json.loads((results / "summary.json").read_text(encoding="utf-8"))
    policy, manifest = policy_lib.Policy.load(directory), summary["manifest"]
    if (weights := closed_loop.manifest_of(policy)["weights"]) != manifest["weights"]:
        raise ValueError(
            f"{results} is of weights {manifest['weights']}, {directory} has {weights}: evaluate "
            "the exported policy, not the run that it comes from"
        )
    table = side_by_side.columns(side_by_side.found(results))
    tasks = len(summary["tasks"])
    names = {"all": f"{tasks} tasks" if tasks > 1 else next(iter(summary["tasks"]))}
    lines = [
        f"| {names.get(label, label)} | {who} | {report.brief(rate)} |"
        for who, rates in table.items()
        for label, rate in rates.items()
        if label == "all" or label not in summary["tasks"]
    ]
    size = sum(f.stat().st_size for f in directory.rglob("*") if f.is_file()) / 1e6
    number = report.brief(table["trained"]["all"])
    name, count = directory.name, params_lib.count(policy.params) / 1e6
    return "\n".join(
        [
            f"`{command(policy.config, manifest, name)}` solves {number} (95 % Wilson interval).",
            "",
            f"Config `{policy.config.name}`, {policy.step:,} steps, {count:.2f} M parameters in "
            f"bfloat16, {size:.1f} MB. Evaluated on {manifest['device']}, in "
            f"{summary['seconds'] / 60:.0f} minutes. The same command gives the same episodes on "
            "the same machine.",
            "",
            "| episodes of | who, or what the policy is told | solved |",
            "| --- | --- | --- |",
            *lines,
            "",
        ]
    )


def command(config, manifest, name):
    """Returns the command that repeats an evaluation, with the flags in which it differs."""
    e, suite = config.evaluation, manifest["suite"]
    first, last = manifest["seeds"]
    parts = ["python evaluate.py", f"--workdir policies/{name}", f"--mode {suite}"]
    flagged = {
        "--episodes": (last - first + 1, e.episodes),
        "--seed": (first, e.first_seed),
        "--env": (json.dumps(manifest["env"]["kwargs"]), json.dumps(e.env)),
    }
    usual = suites_lib.of_config(config, suite, {}).tasks
    flagged["--tasks"] = ",".join(manifest["tasks"]), ",".join(usual)
    parts += [
        f"{flag} {shlex.quote(str(v))}" for flag, (v, default) in flagged.items() if v != default
    ]
    return " ".join(parts)


def main(argv):
    """Exports, or writes README.md."""
    given = flags.FLAGS
    if len(argv) > 1 or not given.out or bool(given.workdir) == bool(given.results):
        raise app.UsageError("--out and either --workdir or --results are needed")
    try:
        if given.workdir:
            size = export(given.workdir, given.out, given.max_mb)
            print(f"{given.out}: {size / 1e6:.2f} MB")
        else:
            text = readme(given.out, given.results)
            pathlib.Path(given.out, "README.md").write_text(text, encoding="utf-8")
            print(text.splitlines()[0])
    except (ValueError, OSError) as error:
        command_line.fail(error)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "", "Run directory of train.py, or one checkpoint.")
    flags.DEFINE_string("out", "", "Directory of the policy: policies/NAME.")
    flags.DEFINE_string("results", "", "Results of --out, from evaluate.py: write README.md.")
    flags.DEFINE_float("max_mb", 6.0, "Largest size, in millions of bytes.")
    command_line.run(main)
