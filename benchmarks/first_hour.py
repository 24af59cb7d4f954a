"""The first hour of a robot's owner: from five edits to a trained policy and its open-loop report.

    python -m benchmarks.first_hour [--layouts hdf5,lerobot] [--steps N] [--directory DIR]
        [--out FILE.json] [--docs docs/data.md]

Records 40 demonstrations of the demo's simulated arm with images of 128x128, and writes them as a
robot's owner may have them: one HDF5 file per episode, and a LeRobot v3.0 dataset. Then, for each,
copies configs/NAME_robot.py, makes its five edits (`EDITS`), and types the commands that
docs/data.md has: precompute --what stats, --what all, train.py, evaluate.py --mode open_loop.
Measured are seconds and processor seconds of each; a busy machine changes the first, less the
second, and the load average before tells whether it was busy. What the commands print is in
DIR/NAME.log; --docs writes the transcript of it. DIR is to be new: caches that are there cost
nothing. MuJoCo is needed.
"""

import argparse
import json
import os
import re
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np

from benchmarks import results
from configs import demo
from lightwam_jax import config as config_lib
from lightwam_jax import interrupts
from lightwam_jax.data import episodes as episodes_lib
from lightwam_jax.data.formats import lerobot_write

ROOT = Path(__file__).parent.parent
CAMERAS = ("scene", "wrist")
RECORD = (
    "-m lightwam_jax.envs.record --suite demo --episodes 40 --noise 0.5 --images png "
    "--env '{\"image_size\": 128}' --out"
)
_EDITS = (  # (1), (4) and (5), the same for both: old text, new text
    ("c = model(action_dim=7, proprio_dim=7)", "c = model(action_dim=4, proprio_dim=5)"),
    ('cameras=("front", "wrist")', 'cameras=("scene", "wrist")'),
    (
        "delta_mask=(False,) * 7, gripper_dims=(6,), gripper_closed_open=(0.0, 1.0)",
        "delta_mask=(True,) * 3 + (False,), gripper_dims=(3,), gripper_closed_open=(1.0, -1.0)",
    ),
)
EDITS = {  # (3): LeRobot's features have their usual names; of HDF5, frame rate and instruction
    "hdf5": (
        *_EDITS,
        ('c.data.path = "data/own"', 'c.data.path = "{data}"'),
        ("fps=30.0", "fps=10.0"),
        ('"text:fold the towel"', '"@instruction"'),
    ),
    "lerobot": (*_EDITS, ('c.data.path = "data/own_lerobot"', 'c.data.path = "{data}"')),
}


# Lines of the logs that a transcript shows.
_SHOWN = ("$ ", "No error", "report", "latents:", "split:", "validation:", "written", "next:")


def edited(layout, data):
    """Returns the text of configs/NAME_robot.py after `EDITS`, for recordings in `data`."""
    text = (ROOT / f"configs/{layout}_robot.py").read_text(encoding="utf-8")
    for old, new in EDITS[layout]:
        if text.count(old) != 1:
            raise ValueError(f"configs/{layout}_robot.py has {old!r} {text.count(old)} times")
        text = text.replace(old, new.replace("{data}", str(data)))
    return text


def write_hdf5(episodes, directory):
    """One file per episode: observations/qpos, observations/images/CAMERA, action."""
    directory.mkdir(parents=True)
    for number, episode in enumerate(episodes):
        with h5py.File(directory / f"episode_{number:03d}.hdf5", "w") as file:
            file.attrs["instruction"] = episode.task
            file["observations/qpos"], file["action"] = episode.state, episode.action
            for camera in CAMERAS:
                images = episode.frames(camera, np.arange(episode.length))
                file[f"observations/images/{camera}"] = images


def write_lerobot(episodes, directory):
    """A LeRobot v3.0 dataset with videos."""
    lerobot_write.write(episodes, directory, "3.0", CAMERAS)


def recorded(directory):
    """Returns the episodes of the recording in `directory`, made if it is not there."""
    run(f"{RECORD} {shlex.quote(str(directory))}", sys.stdout)
    c = demo.get_config()
    c.data.path = str(directory)
    return episodes_lib.load_episodes(config_lib.from_config_dict(c))


def run(command, log):
    """Runs `python COMMAND`; returns (its output, {"seconds", "processor_seconds"})."""
    before, start = _processor_seconds(), time.monotonic()
    done = subprocess.run(
        [sys.executable, *shlex.split(command)], cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8"
    )
    seconds = time.monotonic() - start
    print(f"$ python {command}\n{done.stdout}", file=log, flush=True)
    if done.returncode:
        raise SystemExit(f"python {command} ended with exit code {done.returncode}")
    used = _processor_seconds() - before
    return done.stdout, {"seconds": round(seconds, 1), "processor_seconds": round(used, 1)}


def _processor_seconds():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def first_hour(layout, data, directory, steps=0):
    """Types the commands for the recordings in `data`; returns what they took and gave.

    Args:
      steps: of the training; 0: the config's.
    """
    mine, workdir = directory / f"mine_{layout}.py", directory / f"run_{layout}"
    mine.write_text(edited(layout, data), encoding="utf-8")
    config = f"--config {mine}:tiny --config.data.cache={directory / f'cache_{layout}'}"
    load = os.getloadavg()[0]
    shorter = f" --config.train.steps={steps}" * bool(steps)
    commands = {
        "stats": f"-m lightwam_jax.precompute {config} --what stats",
        "all": f"-m lightwam_jax.precompute {config} --what all",
        "train": f"train.py {config}{shorter} --workdir {workdir}",
        "open_loop": f"evaluate.py --workdir {workdir} --mode open_loop",
    }
    found = {"load_average_before": round(load, 1)}
    with (directory / f"{layout}.log").open("w", encoding="utf-8") as log:
        for name, command in commands.items():
            said, found[name] = run(command, log)
            if name == "train":
                l1 = re.search(r"validation: L1 ([\d.]+) at step (\d+)", said)
                found[name] |= {"validation_l1": float(l1[1]), "steps": int(l1[2])}
    for key in ("seconds", "processor_seconds"):
        found[f"all_{key}"] = round(sum(found[name][key] for name in commands), 1)
    return found


def transcript(numbers, directory):
    """Returns the transcript for docs/data.md.

    Args:
      numbers: {layout: what `first_hour` returned}. directory: where it left its logs.
    """
    layouts = [layout for layout in EDITS if layout in numbers]
    parts = []
    for layout in layouts:
        said = (directory / f"{layout}.log").read_text(encoding="utf-8")
        for made, named in (
            (f"{directory}/mine_{layout}.py", "configs/mine.py"),
            (f" --config.data.cache={directory}/cache_{layout}", ""),
            (f"{directory}/cache_{layout}", "CACHE"),
            (f"{directory}/run_{layout}", f"runs/{layout}_tiny"),
            (f"{directory}/data_{layout}", "data/mine"),
        ):
            said = said.replace(made, named)
        edits = [f"-{old}\n+{new.replace('{data}', 'data/mine')}" for old, new in EDITS[layout]]
        kept = [line for line in said.split("\n") if line.startswith(_SHOWN)]
        lines = ["```diff", *edits, "```", "", "```", *kept, "```", ""]
        parts += [f"{layout}, the edits and what the commands end with:", "", *lines]
    parts += [f"| seconds (processor seconds) | {' | '.join(layouts)} |"]
    parts += ["|---" * (1 + len(layouts)) + "|"]
    for stage in ("stats", "all", "train", "open_loop"):
        took = (numbers[layout][stage] for layout in layouts)
        cells = [f"{x['seconds']:.0f} ({x['processor_seconds']:.0f})" for x in took]
        parts.append(f"| {stage} | {' | '.join(cells)} |")
    for name in ("load_average_before", "all_seconds", "all_processor_seconds"):
        cells = [str(numbers[layout][name]) for layout in layouts]
        parts.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join([*parts, ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layouts", default="hdf5,lerobot")
    parser.add_argument("--steps", type=int, default=0, help="of the training; 0: the config's")
    parser.add_argument("--directory", type=Path, default=Path("data/first_hour"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/first_hour.json")
    parser.add_argument("--docs", type=Path, help="page that gets the transcript")
    given = parser.parse_args()
    directory = given.directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    episodes = recorded(directory / "recorded")
    numbers = {"episodes": len(episodes), "steps": sum(e.length for e in episodes)}
    for layout in given.layouts.split(","):
        data = directory / f"data_{layout}"
        if not data.exists():
            {"hdf5": write_hdf5, "lerobot": write_lerobot}[layout](episodes, data)
        numbers[layout] = first_hour(layout, data, directory, given.steps)
        print(json.dumps({layout: numbers[layout]}, indent=2), flush=True)
    results.write(given.out, "first_hour", numbers)
    if given.docs:
        results.insert(given.docs, "first_hour", transcript(numbers, directory))


if __name__ == "__main__":
    interrupts.guard(main)
