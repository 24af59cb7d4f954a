"""How many scenes a policy solves through the policy server and openpi's own client.

    make setup-client
    python -m benchmarks.openpi_client --workdir runs/demo --python .venv-client/bin/python

The server is a process of its own, as `python -m lightwam_jax.inference.server` starts it. The
client is openpi-client 0.1.2 as published, in its own interpreter (openpi_robot.py): Runtime,
PolicyAgent, ActionChunkBroker and WebsocketClientPolicy. It is started before the server is ready.
The environment is in this process; it answers what the robot asks. Episodes, environment and steps
between two plans are those of `evaluate.py`.
"""

import argparse
import collections
import contextlib
import os
import pathlib
import struct
import subprocess
import sys
import threading
import time
import urllib.parse

from benchmarks import results
from lightwam_jax import config as config_lib
from lightwam_jax import interrupts
from lightwam_jax.checkpoint import run as run_lib
from lightwam_jax.checkpoint import storage
from lightwam_jax.evaluation import suites
from lightwam_jax.inference import wire

ROBOT = pathlib.Path(__file__).with_name("openpi_robot.py")
_METADATA = wire.Limits(containers=4096, items=2**16)


class Body:
    """Answers what a robot asks of its body: episodes of an environment, one after the other.

    Attributes:
      actions: {episode: [f32 [A]]} that were executed. successes: {episode: bool}, of those that
        are over. metadata, waited_s: what the client read at the start, and how long it waited.
    """

    def __init__(self, env, episodes, most_steps):
        self._env, self._left, self._most = env, collections.deque(episodes), most_steps
        self._episode = self.metadata = self.waited_s = None
        self.actions, self.successes = {}, {}

    def __call__(self, asked):
        """Returns the answer, a map, to what `openpi_robot.Body` asks."""
        return getattr(self, f"_{asked.pop('ask')}")(**asked) or {}

    def _begin(self):
        pass

    def _connected(self, metadata, waited_s):
        self.metadata, self.waited_s = metadata, waited_s

    def _reset(self):
        self._episode = None
        if self._left:  # Runtime resets once more after its last episode
            self._episode = self._left.popleft()
            self._env.reset(self._episode)
            self.actions[self._episode] = []

    def _observe(self):
        return {"observation": self._env.observe()}

    def _act(self, action):
        executed = self.actions[self._episode]
        executed.append(action)
        _, success, done = self._env.step(action)
        if done or len(executed) >= self._most:
            self.successes[self._episode] = bool(success)

    def _complete(self):
        return {"complete": self._episode in self.successes}


def run(python, url, answer, episodes=0, replan_steps=1, timeout_s=600.0):
    """Runs a robot with openpi's client until it ends.

    Args:
      python: interpreter that has openpi-client. url: of the server, "ws://HOST:PORT".
      answer: function of what the robot asks, a map -> map; see `openpi_robot.py`.
      episodes, replan_steps: of openpi's Runtime; 0 episodes: no Runtime.
      timeout_s: after which the robot is ended.

    Raises:
      RuntimeError: it failed, or took longer; with what it printed.
    """
    where = urllib.parse.urlsplit(url)
    arguments = (where.hostname, where.port, episodes, replan_steps)
    # -I: neither this directory nor PYTHONPATH may stand in for what the client imports.
    process = subprocess.Popen(
        [python, "-I", ROBOT, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "no_proxy": where.hostname},
    )
    printed = []
    reader = threading.Thread(target=lambda: printed.append(process.stderr.read()), daemon=True)
    reader.start()
    watchdog = threading.Timer(timeout_s, process.kill)
    watchdog.start()
    try:
        while len(head := process.stdout.read(4)) == 4:
            frame = process.stdout.read(*struct.unpack(">I", head))
            reply = wire.encode(answer(wire.decode(frame, _METADATA)))
            with contextlib.suppress(BrokenPipeError):  # it died: its status says so
                process.stdin.write(struct.pack(">I", len(reply)) + reply)
                process.stdin.flush()
        status = process.wait()
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        reader.join()
        for pipe in (process.stdin, process.stdout, process.stderr):
            with contextlib.suppress(OSError):
                pipe.close()
    if status:
        raise RuntimeError(f"the robot ended with {status}:\n{printed[0].decode()}")


@contextlib.contextmanager
def server(arguments, log):
    """A policy server in a process of its own, not ready yet; gives (process, url).

    Args:
      arguments: of the server. log: open file for its messages.
    """
    command = [sys.executable, "-m", "lightwam_jax.inference.server", "--port=0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, encoding="utf-8")
    try:
        line = process.stdout.readline()
        if not line.startswith("warming up at "):
            raise RuntimeError(f"the server did not start; it said {line!r} and what is above")
        yield process, line.split()[-1]
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def main():
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", required=True, help="run directory of train.py")
    parser.add_argument("--python", default=".venv-client/bin/python", help="has openpi-client")
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--out", help="JSON file to write")
    given = parser.parse_args()
    if not pathlib.Path(given.python).exists():
        parser.error(f"--python {given.python} is not there: make setup-client")
    checkpoint = run_lib.find_checkpoint(given.workdir)
    config = config_lib.from_config_dict(storage.read_meta(checkpoint)["config"], checkpoint)
    suite_run = suites.of_config(config, config.evaluation.suite)
    episodes, e = suite_run.episodes[: given.episodes], config.evaluation
    body = Body(suite_run.env.make(), episodes, e.max_steps)
    with server([f"--workdir={given.workdir}"], sys.stderr) as (_, url):
        began = time.monotonic()
        run(given.python, url, body, len(episodes), e.replan_steps, timeout_s=3600.0)
        seconds = time.monotonic() - began
    steps = [len(body.actions[episode]) for episode in episodes]
    results.write(
        given.out,
        "openpi_client",
        {
            "config": config.name,
            "suite": e.suite,
            "episodes": len(episodes),
            "solved": sum(body.successes[episode] for episode in episodes),
            "mean_steps": round(sum(steps) / len(steps), 2),
            "replan_steps": e.replan_steps,
            "client_waited_s": round(body.waited_s, 2),
            "seconds": round(seconds, 1),
        },
    )


if __name__ == "__main__":
    interrupts.guard(main)
