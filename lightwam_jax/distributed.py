"""Joining the processes of a run, before anything else asks JAX for a device.

`share` is for work that is cut into parts in advance: nobody joins.

TPU pods, SLURM, Open MPI and indexed jobs of Kubernetes are recognised; elsewhere (a shell on each
host) the coordinator's address, the number of processes and this one's number are given.
"""

import importlib.util
import os
import pathlib

import jax
import orbax.checkpoint as ocp

# A peer that died is noticed after this long: the others then end instead of waiting for it.
HEARTBEAT_S = 100
# Of `detect`: variables with the number of this process, and of all of them.
_SHARES = {
    "SLURM": ("SLURM_PROCID", "SLURM_NTASKS"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
}


def initialize(coordinator="", num_processes=0, process_id=-1, heartbeat_s=HEARTBEAT_S):
    """Joins the other processes of the run, if there are any. Call it first.

    Args:
      coordinator: "host:port" of process 0; "" where the environment tells (see `detect`).
      num_processes, process_id: given together with `coordinator`. Only
        num_processes=1: this process is alone.
      heartbeat_s: seconds of silence after which a peer counts as dead.

    Returns:
      how the others were found: "flags", a name of `detect`, or "" for a run of one process.

    Raises:
      ValueError: only some of the three are given, or they contradict each other.
    """
    flags = (
        f"--coordinator={coordinator!r} --num_processes={num_processes} --process_id={process_id}"
    )
    given = (bool(coordinator), num_processes > 0, process_id >= 0)
    if given == (False, True, False) and num_processes == 1:
        return ""
    if any(given) and not all(given):
        raise ValueError(
            f"{flags}: give all three, or none where TPU, SLURM, Open MPI or Kubernetes tell them"
        )
    if all(given):
        if process_id >= num_processes or ":" not in coordinator:
            raise ValueError(
                f"{flags}: expected HOST:PORT, and process_id from 0 to num_processes - 1"
            )
        jax.distributed.initialize(
            coordinator, num_processes, process_id, heartbeat_timeout_seconds=heartbeat_s
        )
        return "flags"
    found = detect(os.environ, _tpu_host(), importlib.util.find_spec("kubernetes") is not None)
    if found:
        jax.distributed.initialize(
            local_device_ids=local_gpus(os.environ), heartbeat_timeout_seconds=heartbeat_s
        )
    return found


def wait_for_all(name, timeout_s=3600):
    """Waits until every process has come here.

    `multihost_utils.sync_global_devices` would not do: it is a collective, and collectives give up
    long before the slowest compiler is done. This is a barrier of the coordination service, whose
    patience can be chosen; Orbax has the public way to it.

    Args:
      name: of this place, passed once.
      timeout_s: after which waiting is an error.
    """
    ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=timeout_s * 1000)


def detect(environ, tpu_host, kubernetes=False):
    """Returns what started this process as one of several: "SLURM", "Open MPI", "TPU",
    "Kubernetes", or "".

    Args:
      environ: the environment variables.
      tpu_host: whether this machine has TPU chips; JAX then asks the machine about its peers.
      kubernetes: whether the package is there with which JAX asks Kubernetes.

    Raises:
      ValueError: an indexed job of Kubernetes, and no way to ask about the others.
    """
    if _number(environ, "SLURM_NTASKS") > 1 and "SLURM_STEP_NODELIST" in environ:
        return "SLURM"  # inside srun; a shell of salloc or sbatch is one process
    if _number(environ, "OMPI_COMM_WORLD_SIZE") > 1:
        return "Open MPI"
    platforms = environ.get("JAX_PLATFORMS", "")
    if tpu_host and (not platforms or "tpu" in platforms.split(",")):
        return "TPU"
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        if not kubernetes:
            raise ValueError(
                "this is a pod of an indexed Kubernetes job, and the package that tells how many "
                'there are is missing: pip install "jax[k8s]", or give --coordinator, '
                "--num_processes and --process_id=$JOB_COMPLETION_INDEX (--num_processes=1 alone "
                "for a job of one pod)"
            )
        return "Kubernetes"
    return ""


def share(environ, index=None, count=None):
    """Returns (index, count) of this process among those that share work without talking.

    Args:
      environ: the environment variables; SLURM, Open MPI and GKE's TPU slices tell them there.
      index, count: what flags say, None: nothing. They win.

    Raises:
      ValueError: only one of the two is given.
    """
    if (index is None) != (count is None):
        raise ValueError(
            f"--process_index={index} --process_count={count}: give both, or none where srun, "
            "mpirun or GKE tell them"
        )
    if index is not None:
        return index, count
    if names := _SHARES.get(detect(environ, tpu_host=False, kubernetes=True)):
        return tuple(_number(environ, name) for name in names)
    hosts = environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return (_number(environ, "TPU_WORKER_ID"), len(hosts)) if len(hosts) > 1 else (0, 1)


def local_gpus(environ):
    """Returns which of the GPUs it sees a SLURM task uses, or None where that needs no saying.

    JAX gives each task the GPU of its own number. That is right for one task per GPU where each
    task sees all of them. It is wrong for one task per node (seven of eight GPUs would be idle) and
    for tasks that see their own GPU only.

    Raises:
      ValueError: the GPUs of a node cannot be shared out evenly.
    """
    visible = [x for x in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if x.strip()]
    if not visible or "SLURM_LOCALID" not in environ:
        return None
    tasks, me = _slurm_tasks_here(environ), int(environ["SLURM_LOCALID"])
    if len(visible) == 1 and tasks > 1:
        return [0]
    if len(visible) % tasks:
        raise ValueError(
            f"SLURM runs {tasks} tasks on this node, which see {len(visible)} GPUs "
            f"(CUDA_VISIBLE_DEVICES={','.join(visible)}): make --ntasks-per-node a divisor of "
            "--gpus-per-node, best equal to it"
        )
    share = len(visible) // tasks
    return list(range(me * share, (me + 1) * share))


def _slurm_tasks_here(environ):
    """Tasks of the step on this node, from e.g. "8(x3),4": three nodes with 8, one with 4."""
    node = _number(environ, "SLURM_NODEID")
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        tasks, _, times = part.partition("(x")
        node -= int(times.rstrip(")") or 1)
        if node < 0:
            break
    return int(tasks)


def _number(environ, name):
    text = environ.get(name, "")
    return int(text) if text.isdigit() else 0


def _tpu_host():
    chips = [*pathlib.Path("/dev").glob("accel*"), *pathlib.Path("/dev/vfio").glob("[0-9]*")]
    return bool(chips) and importlib.util.find_spec("libtpu") is not None
