"""The accelerators that `benchmarks.aot` compiles for: they are described, not there."""

import contextlib
import importlib.util
from unittest import mock

from jax.experimental import topologies

from lightwam_jax.training.chips import CHIPS

GPUS = ("h100",)
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # it cannot read these programs
    "TF_CPP_MIN_LOG_LEVEL": "0",
    # libtpu: no machine to look for, several processes, warnings to stderr
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "0",
    "TPU_STDERR_LOG_LEVEL": "0",
}
# Nothing that a GPU would have to time, nor softmax kernels that this compiler fails on.
_GPU_FLAGS = (
    "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0 "
    "--xla_disable_hlo_passes=triton-softmax-rewriter"
)
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def on_gpu(topology):
    """Whether a topology such as "h100:8" is one of GPUs."""
    return topology.partition(":")[0] in GPUS


def environment(topology):
    """Returns the environment variables that a process needs which compiles for a topology."""
    return _ENVIRONMENT | ({"XLA_FLAGS": _GPU_FLAGS} if on_gpu(topology) else {})


def cudnn_attention(topology):
    """Context in which cuDNN's attention compiles for a topology of GPUs.

    JAX asks the GPUs at hand which of its kernels they run; here, there are none to ask.
    """
    if not on_gpu(topology):
        return contextlib.nullcontext()
    return mock.patch.multiple(
        "jax._src.cudnn.fused_attention_stablehlo",
        check_cudnn_version=lambda: 91000,
        check_compute_capability=lambda at_least: True,
        is_cuda_compute_capability_equal=lambda capability: capability == "9.0",
    )


def check_compiler(topology):
    """Raises ValueError where the compiler of a topology is not installed."""
    names = ("jax_cuda12_plugin", "jax_cuda13_plugin") if on_gpu(topology) else ("libtpu",)
    if not any(map(importlib.util.find_spec, names)):
        raise ValueError(
            f"--topology={topology} needs {names[0]}: pip install -r requirements-aot.txt"
        )


def devices(topology):
    """Returns the chips of a topology such as "v5e:4x4" or "h100:8".

    Raises:
      ValueError: a chip that `CHIPS` lacks.
    """
    chip, _, shape = topology.partition(":")
    if chip not in CHIPS or not shape:
        raise ValueError(
            f"--topology={topology!r}; expected CHIP:SHAPE with a chip of "
            f"{', '.join(CHIPS)}, such as v5e:4x4 or h100:8"
        )
    if on_gpu(topology):
        return topologies.get_topology_desc(
            platform="cuda", target_config=_H100, topology=f"1x1x{shape}"
        ).devices
    return topologies.get_topology_desc(
        topology, "tpu", chip_config_name="default", num_slices=1
    ).devices
