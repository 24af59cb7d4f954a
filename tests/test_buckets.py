"""A run in a bucket, from start to evaluation: killed, continued, damaged; S3 and Google's."""

import os
import subprocess
import sys
import time

import fsspec
import pytest

from configs import demo
from lightwam_jax import bucket as bucket_lib
from lightwam_jax import config as config_lib
from lightwam_jax.data import loader
from tests import buckets, pod
from tests.test_end_to_end import ROOT, SMALL
from tests.test_end_to_end import run as command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * 3600)]
STEPS = {"train.steps": 12, "train.checkpoint_every": 4, "train.eval_every": 4,
         "train.keep_last": 2}  # fmt: skip

LESS = {"model.num_layers": 1, "model.adapter_layers": (0,), "model.dtype": "float32"}
SECONDS = 1200  # that a run may take where others are busy too


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Of the demo, next to nothing; its data are recorded and cached."""
    place = tmp_path_factory.mktemp("demo")
    paths = {"data.path": str(place / "episodes"), "data.cache": str(place / "cache")}
    record = ["-m", "lightwam_jax.envs.record", "--suite", "demo", "--episodes", "6"]
    record += ["--starts", "4", "--noise", "0.5", "--images", "png"]
    command(*record, "--out", paths["data.path"])
    changes = [f"--config.{key}={value}" for key, value in (SMALL | paths).items()]
    precompute = ["-m", "lightwam_jax.precompute", "--config", "configs/demo.py"]
    command(*precompute, *changes, "--what", "all")
    tree = demo.get_config()
    tree.update_from_flattened_dict(SMALL | LESS | paths | STEPS)
    return config_lib.from_config_dict(tree)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """metrics.jsonl of a run in a directory that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    started = pod.Pod(config, workdir)
    assert started.finish(SECONDS) == [0], started.output()
    return pod.rows(workdir)


@pytest.fixture(params=buckets.EMULATORS)
def storage(request, monkeypatch):
    """The scheme of an emulator that runs; it is reached from here and from what is started."""
    if package := buckets.missing(request.param):
        pytest.skip(f"{package} is not installed: make setup-bucket")
    with buckets.emulated(request.param) as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        before = {name: dict(values) for name, values in fsspec.config.conf.items()}
        fsspec.config.set_conf_env(fsspec.config.conf)
        yield request.param
        fsspec.config.conf.clear()
        fsspec.config.conf.update(before)


class Reached:
    """For `Pod`: what a process needs to reach the emulator; with `wait_s` it is slow at its steps.

    The server that the processes are forked from was started before the emulator was.
    """

    def __init__(self, wait_s=0.0):
        names = ("AWS_", "STORAGE_", "FSSPEC_", "GCSFS_")
        self.variables = {k: v for k, v in os.environ.items() if k.startswith(names)}
        self.wait_s = wait_s

    def __call__(self, index):
        os.environ.update(self.variables)
        fsspec.config.set_conf_env(fsspec.config.conf)
        if self.wait_s:
            loader.train_loader = self._slow(loader.train_loader)

    def _slow(self, original):
        def made(*args):
            batches = original(*args)
            while True:
                time.sleep(self.wait_s)
                yield next(batches)

        return made


def committed(bucket):
    return {int(n.split("/")[1]) for n in bucket.sizes() if n.endswith("/committed.json")}


def metrics(bucket, tmp_path):
    bucket.get({"metrics.jsonl": tmp_path / "copied" / "metrics.jsonl"})
    return pod.rows(tmp_path / "copied")


@pytest.mark.parametrize("end", [b"\r", b"\n", b"\r\n", b"\0", b" "])
def test_objects_keep_their_last_byte(storage, tmp_path, end):
    bucket = bucket_lib.Bucket(f"{storage}://{buckets.BUCKET}/ends")
    (tmp_path / "sent").write_bytes(b"sent" + end)
    bucket.put({"put": tmp_path / "sent"})
    bucket.write("written", b"written" + end)
    assert bucket.read("put") == b"sent" + end and bucket.read("written") == b"written" + end
    assert bucket.sizes() == {"put": 4 + len(end), "written": 7 + len(end)}


def test_train_kill_continue_damage_evaluate(storage, config, whole, tmp_path):
    address = f"{storage}://{buckets.BUCKET}/runs/demo"
    bucket = bucket_lib.Bucket(address)
    start = lambda scratch, wait_s=0.0: pod.Pod(
        config, address, before=Reached(wait_s), log=tmp_path / "run",
        flags=[f"--scratch={tmp_path / scratch}"],
    )  # fmt: skip

    # Killed once a checkpoint counts, before the next does.
    killed = start("first", wait_s=1.0)
    deadline = time.monotonic() + SECONDS
    while not committed(bucket):
        assert killed.alive() and time.monotonic() < deadline, killed.output()
        time.sleep(0.1)
    killed.processes[0].kill()
    assert killed.finish() == [-9]
    assert committed(bucket) == {4}

    # Continued on a machine that has nothing of it.
    again = start("second")
    assert again.finish(SECONDS) == [0], again.output()
    assert f"Continuing from step 4 ({address}/checkpoints)" in again.output()
    assert committed(bucket) == {8, 12}
    assert metrics(bucket, tmp_path) == whole

    # One byte of the newest is altered: it is said, and the one before is used.
    name = max((n for n in bucket.sizes("checkpoints/12/params")), key=bucket.sizes().get)
    content = bytearray(bucket.read(name))
    content[len(content) // 2] ^= 0x10
    bucket.write(name, bytes(content))
    again = start("third")
    assert again.finish(SECONDS) == [0], again.output()
    said = again.output()
    assert f"Checkpoint 12 is damaged: {address}/{name} is not what was committed" in said
    assert "Continuing from step 8" in said
    assert committed(bucket) == {8, 12}
    assert metrics(bucket, tmp_path) == whole

    # Evaluated where nothing of it is; the results are in the bucket.
    evaluate = ["evaluate.py", "--workdir", address, "--scratch", str(tmp_path / "evaluated")]
    assert f"copied to   {address}" in command(*evaluate, "--mode", "open_loop")
    assert "trained" in command(*evaluate, "--mode", "demo", "--workers", "1")
    assert {"open_loop/open_loop.html", "summary.json", "report.html"} <= set(bucket.sizes())


def test_no_checkpoint_is_one_line(storage, tmp_path):
    address = f"{storage}://{buckets.BUCKET}/nothing"
    done = subprocess.run(
        [sys.executable, "evaluate.py", "--workdir", address, "--mode", "demo",
         "--scratch", tmp_path],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"error: no checkpoint in {address}/checkpoints: none are committed" in done.stderr
    assert "Traceback" not in done.stderr
