"""Many small episodes, cut into many small shards and parts, for the tests of interruptions.

    python tests/interrupted.py DIRECTORY SEED KILLS PROCESSES

runs precompute in DIRECTORY until it is finished, having killed it KILLS times (SIGKILL), and
prints when it did. Runs are forked, so that a kill finds them at work and not importing.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import random
import signal
import sys
import time

import numpy as np
import pytest

from lightwam_jax import precompute
from lightwam_jax.data import episodes as episodes_lib
from lightwam_jax.data.caches import build_latents
from lightwam_jax.data.caches import text as text_cache
from lightwam_jax.data.doctor import report as doctor_report
from lightwam_jax.encoders import pca as pca_lib
from tests import synthetic

STEPS = ("stats", "text", "latents")
_LONGEST = 1.5  # seconds that a run is let live


def make_config(directory):
    """Returns the config; only data.cache depends on the directory."""
    return synthetic.make_config(directory, **{"data.path": "episodes"})


@contextlib.contextmanager
def small(count=12):
    """Makes episodes, shards and batches of texts small; yields the MonkeyPatch."""
    found = [
        dataclasses.replace(episode, task=f"put the cube on place {i}")
        for i, episode in enumerate(synthetic.make_episodes(count))
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(episodes_lib, "read", lambda config: (list(found), []))
        patch.setattr(doctor_report, "write", lambda report, directory: [directory])  # slow
        patch.setattr(build_latents, "SHARD_BYTES", 64 << 10)
        patch.setattr(build_latents, "_ENCODE_VALUES", 200_000)
        patch.setattr(text_cache, "_BATCH", 2)
        patch.setattr(os, "fsync", lambda file: None)  # slow; what is written survives a SIGKILL
        patch.setattr(pca_lib.PcaCodec, "fit", lambda clips, channels: _codec())  # 0.5 s each
        yield patch


@functools.cache
def _codec():
    return _fit(
        np.concatenate([e.images["scene"][None, :5] for e in synthetic.make_episodes()]),
        synthetic.make_config().model.latent_channels,
    )


_fit = pca_lib.PcaCodec.fit


def contents(directory):
    """Returns {path: bytes} of the files of a cache but for the doctor's report."""
    files = (path for path in pathlib.Path(directory).rglob("*") if path.is_file())
    found = {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}
    return {name: data for name, data in found.items() if not name.startswith("doctor/")}


def _slowly(function, seconds):
    def slow(*args, **kwargs):
        time.sleep(seconds)
        return function(*args, **kwargs)

    return slow


def _start(config, index, count):
    child = os.fork()
    if child:
        return child
    with open(os.devnull, "w", encoding="utf-8") as silent:
        os.dup2(silent.fileno(), 1)
        os.dup2(silent.fileno(), 2)
        try:
            precompute.precompute(config, STEPS, index, count)
        except BaseException:
            os._exit(1)
        os._exit(0)


def _kill_and_restart(config, rng, kills, count):
    """Yields when each kill came; ends when a run is finished."""
    children = {}
    while True:
        for index in set(range(count)) - set(children):
            children[index] = _start(config, index, count)
        if kills:
            time.sleep(delay := rng.uniform(0, _LONGEST))
        index = rng.randrange(count)
        if kills and os.waitpid(children[index], os.WNOHANG) == (0, 0):
            os.kill(children[index], signal.SIGKILL)
            os.waitpid(children.pop(index), 0)
            kills -= 1
            yield delay
        elif kills:
            raise AssertionError(f"finished, or failed, before {kills} kills were done")
        else:
            codes = [os.waitpid(child, 0)[1] for child in children.values()]
            assert not any(codes), codes
            return


def main(directory, seed, kills, processes):
    with small(60) as patch:
        if kills:
            # Long enough for every kill to find work left.
            patch.setattr(
                pca_lib.PcaCodec, "encode", _slowly(pca_lib.PcaCodec.encode, 0.1 * processes)
            )
            work = text_cache._TextBuild
            patch.setattr(work, "_encode", _slowly(work._encode, 0.02))
        _codec()  # once, before forking
        config = make_config(directory)
        for delay in _kill_and_restart(config, random.Random(seed), kills, processes):
            there = [path.suffix for path in pathlib.Path(directory).rglob("*.array_record*")]
            print(
                f"killed after {delay:.2f} s, {len(there)} shards there, "
                f"{there.count('.partial')} of them unfinished",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
