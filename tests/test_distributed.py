"""Which environments mean several processes, and what contradictory flags say."""

import pathlib

import jax
import orbax.checkpoint as ocp
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


STEP = {"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "node[01-04]", "SLURM_PROCID": "3"}


@pytest.mark.parametrize(
    "environ, flags, expected",
    [
        ({}, (), (0, 1)),
        (STEP, (), (3, 4)),
        (STEP, (0, 2), (0, 2)),  # flags win
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, (), (0, 1)),  # a shell of salloc
        (STEP | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, (), (0, 1)),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, (), (1, 2)),
        ({"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a,b,c"}, (), (1, 3)),
        ({"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}, (), (0, 1)),
    ],
)
def test_which_share_of_the_work_is_this_process_s(environ, flags, expected):
    assert distributed.share(environ, *flags) == expected


@pytest.mark.parametrize("flags", [(0, None), (None, 2)])
def test_half_a_share_is_refused(flags):
    with pytest.raises(ValueError, match="give both, or none where srun"):
        distributed.share(STEP, *flags)


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


def test_waiting_for_all_is_in_milliseconds(monkeypatch):
    waited = []
    monkeypatch.setattr(
        ocp.multihost, "get_barrier_sync_fn", lambda: lambda **given: waited.append(given)
    )
    distributed.wait_for_all("here", timeout_s=90)
    distributed.wait_for_all("there")
    assert waited == [
        {"key": "here", "timeout_ms": 90_000},
        {"key": "there", "timeout_ms": 3_600_000},
    ]


def test_one_process_does_not_wait():
    distributed.wait_for_all("here")


def test_nothing_private_of_jax_is_used():
    package = pathlib.Path(distributed.__file__).parent
    assert not [
        path for path in package.rglob("*.py") if "jax._src" in path.read_text(encoding="utf-8")
    ]


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
