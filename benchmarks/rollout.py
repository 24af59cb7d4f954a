"""What the rollout engine costs beside simulator and policy, and what batching saves.

    python -m benchmarks.rollout --suite metaworld --out benchmarks/results/rollout.json

A policy of the demo's size with random parameters, planning every 4 steps, once for one episode at
a time and once for eight. Environments and policy note from when to when they were at work, so
that every moment of a run is one of these:

  simulating   at least one simulator was at work (reset, step, rendering)
  policy       the policy planned, and no simulator was at work
  overhead     neither: sending, waking up, batching, logging. This is what the engine costs

A simulator that is done waits for the slowest of its round: `balance` is how much of the workers'
time while any of them simulated was simulation. The clock starts at the first plan, when all
processes and environments are there. Only numbers of one run are meant to be compared, and only on
a machine that does nothing else: time that other programs take from these processes looks like
overhead. `engine_cpu`, the processor time of the engine's own code in all its processes, and
`simulation_cpu`, that of the simulators' threads that it waits for, are hardly moved by them.
"""

import argparse
import dataclasses
import importlib.util
import os
import pathlib
import struct
import tempfile
import time

import jax
import numpy as np

from benchmarks import results
from configs import demo, metaworld
from lightwam_jax import build, envs, interrupts
from lightwam_jax import config as config_lib
from lightwam_jax.data import assets, normalize
from lightwam_jax.encoders import pca
from lightwam_jax.encoders import text as text_lib
from lightwam_jax.envs import base as envs_base
from lightwam_jax.evaluation import rollout
from lightwam_jax.inference import policy as policy_lib

SUITES = {"demo": (demo, "tabletop"), "metaworld": (metaworld, "reach-v3")}
FIRST_SEED = 2_000_000


class Timed:
    """An environment that writes when it was at work to `<directory>/<process id>`."""

    def __init__(self, directory, factory, kwargs):
        self._env = envs_base.EnvSpec(factory, kwargs).make()
        self._file = os.open(
            pathlib.Path(directory, str(os.getpid())), os.O_WRONLY | os.O_CREAT | os.O_APPEND
        )

    def reset(self, episode):
        """See `envs/base.py`; so are the others."""
        return self._timed(self._env.reset, episode)

    def observe(self):
        """See `reset`."""
        return self._timed(self._env.observe)

    def step(self, action):
        """See `reset`."""
        return self._timed(self._env.step, action)

    def _timed(self, method, *args):
        began = time.monotonic()  # one clock for all processes of a machine
        cpu = time.thread_time()
        result = method(*args)
        os.write(self._file, struct.pack("4d", began, time.monotonic(), cpu, time.thread_time()))
        return result


def make_policy(config):
    """Returns a `Policy` that was never trained; its codec is fitted on noise."""
    rng = np.random.default_rng(0)
    clips = rng.integers(0, 256, (16, 5, *config.data.canvas, 3), np.uint8)
    model = build.build_model(config.model)
    params = build.init_params(model, jax.random.key(0), config.model)
    state, action = (
        normalize.min_max(np.full(width, -1.0), np.full(width, 1.0))
        for width in (config.model.proprio_dim, config.model.action_dim)
    )
    return policy_lib.Policy(
        model,
        params,
        config,
        assets.Assets(
            state=state,
            action=action,
            codec=pca.PcaCodec.fit(clips, config.model.latent_channels),
            text_encoder=text_lib.HashedTextEncoder(config.model.text_dim),
            statistics={},
        ),
    )


def length(spans):
    """Returns how long at least one of the spans [n,2] lasts, in their unit."""
    total, reached = 0.0, -np.inf
    for began, ended in sorted(map(tuple, spans)):
        total += max(0.0, ended - max(began, reached))
        reached = max(reached, ended)
    return total


def between(calls):
    """Returns the processor time of a process between its calls [n,4], from first to last."""
    return (calls[1:, 2] - calls[:-1, 3]).sum()


def split(simulators, plans, start, end):
    """Splits the time from `start` to `end`, as the top of this file says.

    Args:
      simulators: spans [n,2] of each process. plans: spans [m,2] of the policy.

    Returns:
      {"wall", "simulating", "policy", "overhead": seconds, "balance": share}.
    """
    simulators = [np.clip(spans, start, end) for spans in simulators]
    simulating, everything = length(np.concatenate(simulators)), np.clip(plans, start, end)
    busy = length(np.concatenate([*simulators, everything]))
    return {
        "wall": end - start,
        "simulating": simulating,
        "policy": busy - simulating,
        "overhead": end - start - busy,
        "balance": sum(map(length, simulators)) / (len(simulators) * simulating),
    }


def measure(policy, spec, episodes, evaluation):
    """Runs the episodes; returns `split` per episode, with counts of plans and steps."""
    plans = []

    def act(*batch):
        began, cpu = time.monotonic(), time.thread_time()
        actions = policy.act(*batch)
        plans.append((began, time.monotonic(), cpu, time.thread_time()))
        return actions

    with tempfile.TemporaryDirectory() as directory:
        timed = envs_base.EnvSpec(
            "benchmarks.rollout:Timed",
            {"directory": directory, "factory": spec.factory, "kwargs": spec.kwargs},
        )
        log = pathlib.Path(directory, "log.jsonl")
        records = rollout.run(
            act, timed, episodes, evaluation, log, label=f"batch {evaluation.batch}"
        )
        end = time.monotonic()
        spans = [
            np.frombuffer(file.read_bytes()).reshape(-1, 4)
            for file in pathlib.Path(directory).iterdir()
            if file != log
        ]
    if failed := [record for record in records if record.error]:
        raise RuntimeError(
            f"{len(failed)} of {len(records)} episodes could not be run, so nothing "
            f"was measured; the first error:\n{failed[0].error}"
        )
    plans = np.array(plans)
    each = split([own[:, :2] for own in spans], plans[:, :2], plans[0, 0], end)
    counts = {
        "plans": len(plans),
        "steps": sum(record.steps for record in records),
        "engine_cpu": sum(map(between, [plans, *spans])),
        "simulation_cpu": sum((own[:, 3] - own[:, 2]).sum() for own in spans),
    }
    balance = each.pop("balance")
    each = {key: round(value / len(episodes), 5) for key, value in (each | counts).items()}
    return each | {
        "balance": round(balance, 4),
        "overhead_of_simulation": round(each["overhead"] / each["simulating"], 4),
        "engine_cpu_of_simulation_cpu": round(counts["engine_cpu"] / counts["simulation_cpu"], 4),
        "policy_ms_per_plan": round(1000 * length(plans[:, :2]) / len(plans), 3),
        "overhead_ms_per_plan": round(1000 * each["overhead"] / each["plans"], 3),
    }


def main():
    """The command line; see the top of this file."""
    installed = importlib.util.find_spec("metaworld") is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--suite", choices=sorted(SUITES), default="metaworld" if installed else "demo"
    )
    parser.add_argument("--episodes", type=int, default=32)
    parser.add_argument("--steps", type=int, default=60, help="at most, of an episode")
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help="of batch 8; with more than there are free cores they take turns",
    )
    parser.add_argument("--out", help="JSON file to write")
    given = parser.parse_args()
    if given.episodes < 8:
        parser.error(f"--episodes {given.episodes}: a batch of 8 needs at least 8")
    module, task = SUITES[given.suite]
    config = config_lib.from_config_dict(module.get_config())
    policy = make_policy(config)
    spec = envs.spec(given.suite, **config.evaluation.env)
    episodes = envs.suite(given.suite).episodes((task,), given.episodes, FIRST_SEED)
    policy.warm_up([1, 8])
    batches = {}
    for batch in (1, 8):
        evaluation = dataclasses.replace(
            config.evaluation, workers=given.workers, batch=batch, max_steps=given.steps
        )
        batches[batch] = measure(policy, spec, episodes, evaluation)
    one, eight = batches[1], batches[8]
    results.write(
        given.out,
        "rollout",
        {
            "what": "seconds per episode from the first plan on; balance and ratios without unit",
            "suite": given.suite,
            "task": task,
            "episodes": given.episodes,
            "workers": given.workers,
            "replan_steps": config.evaluation.replan_steps,
            "batch_1": one,
            "batch_8": eight,
            "policy_time_batch_8_of_batch_1": round(
                eight["policy_ms_per_plan"]
                * eight["plans"]
                / (one["policy_ms_per_plan"] * one["plans"]),
                4,
            ),
        },
    )


if __name__ == "__main__":
    interrupts.guard(main)
