"""Which environments mean several processes, and what contradictory flags say."""

import types

import jax
import pytest

from lightwam_jax import distributed


@pytest.mark.parametrize(
    "environ, tpu, expected",
    [
        ({}, False, ""),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "node[01-04]"}, False, "SLURM"),
        ({"SLURM_NTASKS": "4"}, False, ""),  # a shell of salloc
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "node01"}, False, ""),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, False, "Open MPI"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False, ""),
        ({}, True, "TPU"),
        ({"JAX_PLATFORMS": "tpu,cpu"}, True, "TPU"),
        ({"JAX_PLATFORMS": "cpu"}, True, ""),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False, ""),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, False, "Kubernetes"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True, "TPU"),
    ],
)
def test_who_starts_several_processes(environ, tpu, expected):
    assert distributed.detect(environ, tpu, kubernetes=True) == expected


@pytest.mark.parametrize(
    "given, message",
    [
        (("host:1", 0, -1), "give all three"),
        (("", 2, 0), "give all three"),
        (("host:1", 2, 2), "from 0 to num_processes - 1"),
        (("host", 2, 0), "expected HOST:PORT"),
    ],
)
def test_contradictory_flags(given, message):
    with pytest.raises(ValueError, match=message):
        distributed.initialize(*given)


def test_a_kubernetes_job_never_runs_as_so_many_single_processes():
    job = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}
    with pytest.raises(ValueError, match=r"jax\[k8s\].*--process_id=\$JOB_COMPLETION_INDEX"):
        distributed.detect(job, tpu_host=False)


def test_one_process_may_say_so():
    assert distributed.initialize(num_processes=1) == ""


@pytest.mark.parametrize(
    "gpus, tasks, local, node, expected",
    [
        ("0,1,2,3", "4(x2)", 3, 1, [3]),  # a task per GPU, all of them visible
        ("0,1,2,3", "1(x2)", 0, 1, [0, 1, 2, 3]),  # a task per node
        ("0,1,2,3", "2", 1, 0, [2, 3]),
        ("2", "4(x2)", 2, 0, [0]),  # --gpus-per-task=1: each sees its own
        ("0,1,2,3", "4(x3),1", 0, 3, [0, 1, 2, 3]),  # the last node has one task only
        ("", "4", 3, 0, None),  # no GPUs
    ],
)
def test_gpus_of_slurm_tasks(gpus, tasks, local, node, expected):
    environ = {
        "CUDA_VISIBLE_DEVICES": gpus,
        "SLURM_STEP_TASKS_PER_NODE": tasks,
        "SLURM_LOCALID": str(local),
        "SLURM_NODEID": str(node),
    }
    assert distributed.local_gpus(environ) == expected


def test_gpus_that_cannot_be_shared_out():
    environ = {
        "CUDA_VISIBLE_DEVICES": "0,1,2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_LOCALID": "0",
    }
    with pytest.raises(ValueError, match="2 tasks on this node, which see 3 GPUs"):
        distributed.local_gpus(environ)
    assert distributed.local_gpus({"CUDA_VISIBLE_DEVICES": "0,1"}) is None  # not SLURM


class Client:
    """Stands in for JAX's client of several processes: what is told lies in a dictionary."""

    def __init__(self):
        self.values, self.waited = {}, []

    def wait_at_barrier(self, name, timeout_in_ms):
        self.waited.append((name, timeout_in_ms))

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self.values
        self.values[key] = value

    def key_value_dir_get(self, prefix):
        return [(k, v) for k, v in self.values.items() if k.startswith(prefix)]


@pytest.fixture
def client(monkeypatch):
    client = Client()
    monkeypatch.setattr(jax._src.distributed, "global_state", types.SimpleNamespace(client=client))
    return client


def test_waiting_for_all_is_in_milliseconds(client):
    distributed.wait_for_all("here", timeout_s=90)
    distributed.wait_for_all("there")
    assert client.waited == [("here", 90_000), ("there", 3_600_000)]


def test_what_was_told_is_read_by_all_while_it_is_new(client, monkeypatch):
    for process, text, when in ((0, "old news", 100), (3, "after step 3", 200), (12, "now", 300)):
        monkeypatch.setattr(jax, "process_index", lambda p=process: p)
        distributed.tell("standing_still", text, when)
    distributed.tell("other", "something else", 300)
    assert distributed.told("standing_still", 200) == {3: "after step 3", 12: "now"}
    assert distributed.told("standing_still", 201) == {12: "now"}
    distributed.tell("standing_still", "newer", 400.4)
    assert distributed.told("standing_still", 350) == {12: "newer"}, "it replaces the one before"


def test_one_process_neither_waits_nor_tells():
    distributed.wait_for_all("here")
    distributed.tell("standing_still", "here", 1)
    assert distributed.told("standing_still", 0) == {}


@pytest.fixture
def joined(monkeypatch):
    """What JAX was asked to join."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
    return calls


def test_flags_say_whom_to_join(joined):
    assert distributed.initialize("host:1", 3, 2, heartbeat_s=7) == "flags"
    assert distributed.initialize("host:1", 1, 0) == "flags"
    assert joined == [
        (("host:1", 3, 2), {"heartbeat_timeout_seconds": 7}),
        (("host:1", 1, 0), {"heartbeat_timeout_seconds": distributed.HEARTBEAT_S}),
    ]


def test_slurm_tells_which_gpus_are_ours(joined, monkeypatch):
    for name, value in {
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NODELIST": "node[01-02]",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "1",
        "CUDA_VISIBLE_DEVICES": "0,1",
    }.items():
        monkeypatch.setenv(name, value)
    assert distributed.initialize(heartbeat_s=9) == "SLURM"
    assert joined == [((), {"local_device_ids": [0, 1], "heartbeat_timeout_seconds": 9})]
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setattr(distributed, "_tpu_host", lambda: False)
    assert distributed.initialize() == "" and len(joined) == 1
