"""Who may import whom: a group imports only from groups above it, and no two files in a circle."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The order of the map in CONTRIBUTING.md: a file may import from its own line and the lines above.
LEVELS = [
    ["atomic", "bucket", "flow", "folders", "html_report", "interrupts", "svg_chart"],
    ["models"],
    ["config", "config_model", "config_read", "config_checks", "config_docs", "next_command"],
    ["command_line"],
    ["params", "build"],
    ["sharding", "distributed"],
    ["checkpoint"],
    ["encoders"],
    ["data"],
    ["training"],
    ["inference"],
    ["envs"],
    ["evaluation"],
    ["precompute"],
]
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}
PROJECT = ("lightwam_jax", "converters", "configs", "benchmarks")


def imports(path):
    """Names of modules a file imports, wherever the import stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def group(path):
    return path.relative_to(ROOT / "lightwam_jax").parts[0].removesuffix(".py")


SOURCES = sorted(
    p for p in (ROOT / "lightwam_jax").rglob("*.py") if p != ROOT / "lightwam_jax" / "__init__.py"
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_import_direction(path):
    here = LEVEL[group(path)]
    for name in imports(path):
        if name.startswith("lightwam_jax."):
            there = name.split(".")[1]
            assert LEVEL[there] <= here, f"{path.name} imports {name}, which is further down"
        outside = ("converters", "configs", "benchmarks", "tests")
        assert name.split(".")[0] not in outside, f"{path.name} imports {name}"


def test_no_two_files_import_each_other_in_a_circle():
    """Imports inside functions count too: a reader follows them just the same."""
    files = [p for folder in PROJECT for p in (ROOT / folder).rglob("*.py")]
    known = {module_name(p) for p in files}
    graph = {}
    for path in files:
        here, found = module_name(path), set()
        for name in imports(path):
            # `from package import name`: a file of that name, or what __init__.py defines.
            module = name if name in known else name.rpartition(".")[0]
            if module in known and module != here:
                found.add(module)
        graph[here] = found
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of files: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_optional_dependencies(path):
    """torch and tensorflow nowhere here; the models need nothing but jax and its relatives."""
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & {"torch", "tensorflow"}
    if group(path) == "models":
        allowed = {"jax", "flax", "einops", "numpy", "chex", "lightwam_jax"}
        allowed |= sys.stdlib_module_names
        assert roots <= allowed, roots - allowed


def test_models_import_only_models():
    for path in (ROOT / "lightwam_jax" / "models").glob("*.py"):
        inner = {name.split(".")[1] for name in imports(path) if name.startswith("lightwam_jax.")}
        assert inner <= {"models", "flow"}, f"{path.name}: {inner}"


def test_training_from_a_cache_needs_no_optional_dependency():
    """Where they are not installed, that is: some packages import PyTorch when they find it."""
    code = (
        "import sys; absent = ('torch', 'tensorflow', 'mujoco', 'av', 'matplotlib');"
        "sys.modules.update(dict.fromkeys(absent));"
        "import lightwam_jax.training.loop, lightwam_jax.data.loader"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def python_files():
    folders = (*PROJECT, "tests")
    yield from (p for folder in folders for p in (ROOT / folder).rglob("*.py"))
    yield from ROOT.glob("*.py")


def test_no_file_is_long_and_none_is_a_drawer():
    lines = {
        str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines())
        for p in python_files()
    }
    assert not {name: n for name, n in lines.items() if n > 400}
    assert not [p for p in python_files() if p.stem in ("utils", "helpers", "misc", "common")]


def test_no_function_is_long():
    """Tests and what they run are lists of cases, and may be longer."""
    long = {}
    for path in python_files():
        if path.is_relative_to(ROOT / "tests"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                lines = node.end_lineno - node.lineno + 1
                long[f"{path.relative_to(ROOT)}:{node.name}"] = lines
    assert not long
