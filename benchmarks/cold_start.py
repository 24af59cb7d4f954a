"""Times train.py from its start to its first finished step, compilation cache cold and warm.

  python -m benchmarks.cold_start --config configs/demo.py --config.data.source=fake \
      --out benchmarks/results/cold_start.json

Arguments are those of train.py, besides --warm and --out. Each run is a process of its own with a
new --workdir; imports, data, initialisation, compilation and the step itself all count. The first
run fills a compilation cache made for the occasion, the others find it there.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from absl import app, flags

from benchmarks import results
from lightwam_jax import interrupts

ROOT = pathlib.Path(__file__).parent.parent
TIMEOUT_S = 3600


def first_step(arguments, folder, cache):
    """Returns seconds from the start of train.py until its first step is logged.

    Args:
      arguments: of train.py, --workdir aside.
      folder: a new directory for the run. cache: directory of the compilation cache.

    Raises:
      RuntimeError: the run failed; its output is in the message.
    """
    workdir, log = folder / "run", folder / "log"
    folder.mkdir()
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            [
                sys.executable,
                "train.py",
                *arguments,
                f"--workdir={workdir}",
                "--config.train.log_every=1",
                "--config.train.steps=2",
                "--config.train.checkpoint_every=0",
                "--config.train.eval_every=0",
            ],
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    metrics = workdir / "metrics.jsonl"
    try:
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None or time.perf_counter() - start > TIMEOUT_S:
                raise RuntimeError(f"no step was made:\n{log.read_text(encoding='utf-8')[-3000:]}")
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        if process.wait(TIMEOUT_S):
            raise RuntimeError(f"the run failed:\n{log.read_text(encoding='utf-8')[-3000:]}")
        return seconds
    finally:
        process.kill()


def main(argv):
    """The command line; see the top of this file."""
    f = flags.FLAGS
    with tempfile.TemporaryDirectory() as place:
        place = pathlib.Path(place)
        seconds = [first_step(argv[1:], place / str(i), place / "cache") for i in range(1 + f.warm)]
        config = json.loads((place / "0" / "run" / "config.json").read_text(encoding="utf-8"))
    results.write(
        f.out,
        "cold_start",
        {
            "config": config["name"],
            "data": config["data"]["source"],
            "cold_s": seconds[0],
            "warm_s": seconds[1:],
        },
    )


if __name__ == "__main__":  # flags are global: importing this module must not define any
    flags.DEFINE_integer("warm", 2, "Runs with a warm cache.", lower_bound=1)
    flags.DEFINE_string("out", None, "JSON file to write; the numbers are printed in any case.")
    read = lambda argv: flags.FLAGS(argv, known_only=True)  # the others are train.py's
    interrupts.guard(lambda: app.run(main, flags_parser=read))
