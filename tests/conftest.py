"""Before JAX starts: CPU, eight fake devices, quick compilation shared between processes."""

import os
import tempfile

if os.environ.get("JAX_PLATFORMS") != "cuda":  # which is asked for with -m gpu
    os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# The tests compile many tiny functions and run each a few times: compile quickly, not well.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    os.path.join(tempfile.gettempdir(), f"lightwam_jax_tests_{os.getuid()}"),
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden():
    """The directory of fixtures made by the PyTorch reference."""
    return GOLDEN


@pytest.fixture(scope="session")
def released_pt(golden, tmp_path_factory):
    """The checkpoint of the fixtures as the reference's `save_checkpoint` writes it in bfloat16."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    content = {
        "mot": {},
        "state_fusion_action_expert": {},
        "proprio_encoder": {},
        "step": 123,
        "torch_dtype": "torch.bfloat16",
    }
    for key, tensor in load_file(golden / "ckpt" / "step_000123.safetensors").items():
        section, name = key.split(".", 1)
        content[section][name] = tensor.bfloat16()
    path = tmp_path_factory.mktemp("released") / "step_000123_bf16.pt"
    torch.save(content, path)
    return path
