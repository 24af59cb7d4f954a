"""train.py in processes of its own, one or several of a run, to be watched and killed.

They are forked from a server that has imported everything and started nothing, so that a start
costs what it costs JAX and the run, and twenty restarts are affordable.
"""

import atexit
import contextlib
import json
import multiprocessing
import os
import pathlib
import socket
import sys
import threading
import time
import traceback

import jax
import ml_collections
import tensorboardX

import train
from lightwam_jax import config as config_lib
from lightwam_jax.checkpoint import run as checkpoint
from lightwam_jax.checkpoint import storage
from lightwam_jax.training import loop, metrics
from tests import synthetic

HERE = pathlib.Path(__file__).parent
# The server must find this module; before Python 3.12 it is not told sys.path.
os.environ["PYTHONPATH"] = os.pathsep.join((str(HERE), str(HERE.parent)))
_FORK = multiprocessing.get_context("forkserver")
_FORK.set_forkserver_preload(["pod"])
assert loop and tensorboardX  # imported before the forks: train.py imports them late, and slowly


def make_config(**overrides):
    """Returns a `Config` whose steps take milliseconds; overrides are {"train.steps": value}."""
    return synthetic.make_config(
        **{
            "data.source": "fake",
            "data.cache": "",
            "data.canvas": (32, 32),
            "data.text_len": 4,
            "model.num_layers": 1,
            "model.adapter_layers": (0,),
            "model.lora_layers": (0,),
            "model.dtype": "float32",
            "optimizer.lr": 1e-3,
            "optimizer.warmup_steps": 4,
            "optimizer.ema_decay": 0.9,
            "train.batch_size": 8,
            "train.steps": 6,
            "train.log_every": 2,
            "train.checkpoint_every": 3,
            "train.keep_last": 0,
            "train.eval_every": 3,
            "train.eval_batches": 2,
        }
        | overrides
    )


def rows(workdir):
    """Returns the rows of metrics.jsonl without what differs between two equal runs."""
    return [
        {k: v for k, v in row.items() if not k.startswith(("ms_", "samples_per"))}
        for row in metrics.read_rows(pathlib.Path(workdir) / "metrics.jsonl")
    ]


def arrays(workdir):
    """Returns (step, {item: {path: [shape, dtype, checksum]}}) of the newest checkpoint."""
    meta = storage.read_meta(checkpoint.find_checkpoint(workdir))
    return meta["step"], meta["arrays"]


def get_config():
    """The config file of these runs is this one; values come from the environment."""
    return ml_collections.ConfigDict(json.loads(os.environ["LIGHTWAM_TEST_CONFIG"]))


class Pod:
    """The processes of one run of train.py.

    Args:
      config: `Config`.
      workdir: run directory; a list gives each process its own.
      devices: fake devices of each process.
      before: function of a process index, called in each process before train.py.
      flags: more flags for train.py.
      log: beginning of the names of the files that hold what the processes say; default: workdir.
    """

    def __init__(self, config, workdir, processes=1, devices=1, before=None, flags=(), log=None):
        port = _free_port() if processes > 1 else 0
        self.logs, self.processes = [], []
        workdirs = workdir if isinstance(workdir, list) else [workdir] * processes
        for index in range(processes):
            argv = ["train.py", f"--config={__file__}", f"--workdir={workdirs[index]}", *flags]
            if processes > 1:
                argv += [
                    f"--coordinator=localhost:{port}",
                    f"--num_processes={processes}",
                    f"--process_id={index}",
                ]
            self.logs.append(pathlib.Path(f"{log or workdirs[index]}.{index}.log"))
            process = _FORK.Process(
                target=_train,
                args=(argv, config_lib.to_json(config), devices, self.logs[-1], before, index),
            )
            process.start()
            self.processes.append(process)

    def finish(self, seconds=240):
        """Waits for all and returns their exit codes, -N for signal N; kills what hangs."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0))
        hung = [p for p in self.processes if p.exitcode is None]
        for process in hung:
            process.kill()
            process.join()
        assert not hung, f"still running after {seconds} s\n{self.output()}"
        return [process.exitcode for process in self.processes]

    def alive(self):
        """Returns whether any process still runs."""
        return any(process.is_alive() for process in self.processes)

    def output(self):
        """Returns what the processes have said so far, in all runs of this workdir."""
        return "\n".join(
            f"--- {log.name}\n{log.read_text(encoding='utf-8')[-6000:]}"
            for log in self.logs
            if log.exists()
        )


def run(*args, **kwargs):
    """Runs a `Pod` to its end and returns its output; every process must exit with 0."""
    pod = Pod(*args, **kwargs)
    codes = pod.finish()
    assert not any(codes), f"exit codes {codes}\n{pod.output()}"
    return pod.output()


def _free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _train(argv, config, devices, log, before, index):
    """What a forked process does: train.py as a program, its ending included."""
    with log.open("ab", 0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["LIGHTWAM_TEST_CONFIG"] = config
    os.chdir(HERE.parent)
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # most programs are tiny
    if before:
        before(index)
    sys.argv = argv
    try:
        train.command_line.run(train.main)
    except Exception:
        traceback.print_exc()  # now: what follows may wait for the other processes
        raise
    finally:  # a child of multiprocessing leaves without these
        with contextlib.suppress(Exception):
            threading._shutdown()
            atexit._run_exitfuncs()
