"""What a data set of thousands of hours costs on a pod, computed; and its index, tried.

    python -m benchmarks.scale --hours 10000 --topology v5e:256
    python -m benchmarks.scale --try_index --out benchmarks/results/scale.json
    python -m benchmarks.scale --hours 10000 --topology v5e:256 --docs docs/pods.md

The first command prints a table. Every figure names its source: a result in benchmarks/results,
a formula, or what the command itself measures (how fast video is decoded, what latents take on the
disk). No pod is needed, and nothing about one was measured: times that follow from peak speeds are
floors. The second command makes the latent cache of 10 million windows without pixels (6 GB on the
disk for a while), opens it in a process of its own, and reads from it in shuffled order, from the
start and as after a restart. The last one writes the table of the first, and what the second
found, into docs/pods.md.
"""

import dataclasses
import json
import pathlib
import tempfile

from absl import flags
from ml_collections import config_flags

from benchmarks import results, scale_index, scale_paper
from lightwam_jax import command_line
from lightwam_jax import config as config_lib

LONG_SHARD = 1_400_000  # windows in one of the 512 files of 10,000 hours at 20 steps per second
_RESULT = pathlib.Path(__file__).parent / "results/scale.json"


def main(argv):
    del argv
    f = flags.FLAGS
    stored = json.loads(_RESULT.read_text(encoding="utf-8")) if _RESULT.exists() else {}
    if f.try_index:
        with tempfile.TemporaryDirectory(dir=results.made(f.directory)) as folder:
            tried = scale_index.try_index(folder, f.windows, f.instructions, long_shard=LONG_SHARD)
        results.write(f.out, "scale", {"index": tried})
        return
    asked = {field.name: f[field.name].value for field in dataclasses.fields(scale_paper.Wanted)}
    wanted = scale_paper.Wanted(**asked)
    rows = scale_paper.rows(config_lib.from_config_dict(f.config), wanted, stored.get("index"))
    print(scale_paper.table(rows))
    if f.docs:
        scale_paper.write(f.docs, wanted, rows, stored.get("index"))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", "configs/libero.py:spatial", "As in train.py.")
    flags.DEFINE_float("hours", 10_000, "Of recordings.", lower_bound=0.001)
    flags.DEFINE_string(
        "topology", "v5e:256", "CHIP:CHIPS; a row of benchmarks/results/aot_*.json."
    )
    flags.DEFINE_float("fps", 20, "Steps per second of the recordings.", lower_bound=0.001)
    flags.DEFINE_float("epochs", 1, "How often every window is seen.", lower_bound=0.001)
    flags.DEFINE_integer("episode_steps", 200, "Steps of an episode.", lower_bound=1)
    flags.DEFINE_integer("instructions", 50_000, "Distinct ones.", lower_bound=1)
    flags.DEFINE_integer("chips_per_host", 4, "Chips of one host.", lower_bound=1)
    flags.DEFINE_integer("cores_per_host", 112, "Cores of one host; an assumption.", lower_bound=1)
    flags.DEFINE_bool("try_index", False, "Make and read a cache of --windows windows instead.")
    flags.DEFINE_integer("windows", 10_000_000, "Of the cache that is tried.", lower_bound=1000)
    flags.DEFINE_string("directory", None, "Where that cache goes for a while; default: temporary.")
    flags.DEFINE_string("out", None, "JSON file of --try_index: benchmarks/results/scale.json.")
    flags.DEFINE_string("docs", None, "Markdown file whose table is written.")
    command_line.run(main, again="run the same command again")
