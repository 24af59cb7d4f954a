"""What `pip install .` installs: the package alone, with dependencies that are declared once."""

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lightwam_jax"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = {"cuda", "tpu", "torch", "hdf5", "rerun", "wandb", "bucket", "sim", "dev"}
# Modules whose distribution has another name.
DISTRIBUTIONS = {
    "absl": "absl-py",
    "google": "protobuf",
    "OpenGL": "PyOpenGL",
    "orbax": "orbax-checkpoint",
    "PIL": "pillow",
    "rerun": "rerun-sdk",
}
# `make setup-sim` installs these without their dependencies: see requirements-libero.txt.
SIMULATORS = {"libero", "metaworld", "robosuite"}
# Asks questions of configs/ and therefore runs in a checkout only.
IN_A_CHECKOUT = {"ablations.py"}


def requirements(name):
    """The `Requirement`s of a file: as setuptools reads it, without full-line and end comments."""
    lines = [
        line.partition(" #")[0].strip()
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
    ]
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def files_of(entry):
    """Names of the files of an entry of [tool.setuptools.dynamic]."""
    return [entry["file"]] if isinstance(entry["file"], str) else entry["file"]


def dynamic():
    """{extra: names of its files}; "" for the dependencies."""
    table = PYPROJECT["tool"]["setuptools"]["dynamic"]
    extras = {name: files_of(entry) for name, entry in table["optional-dependencies"].items()}
    return {"": files_of(table["dependencies"]), **extras}


def imports(path):
    """First parts of the names of modules that a file imports, wherever the import stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", sorted(ROOT.glob("requirements*.txt")), ids=lambda path: path.name)
def test_requirement_files_parse(path):
    found = requirements(path.name)
    names = [canonicalize_name(requirement.name) for requirement in found]
    assert names and len(set(names)) == len(names)
    assert all(requirement.url is None for requirement in found)


def test_dependencies_and_extras_come_from_requirement_files():
    assert set(PYPROJECT["project"]["dynamic"]) == {"dependencies", "optional-dependencies"}
    assert set(dynamic()) == {"", *EXTRAS}
    for names in dynamic().values():
        assert all((ROOT / name).is_file() for name in names), names


def test_every_third_party_import_is_declared():
    declared = {
        canonicalize_name(requirement.name)
        for names in dynamic().values()
        for name in names
        for requirement in requirements(name)
    }
    undeclared = {
        (str(path.relative_to(ROOT)), module)
        for path in PACKAGE.rglob("*.py")
        for module in {*imports(path)} - {*sys.stdlib_module_names, "lightwam_jax"} - SIMULATORS
        if canonicalize_name(DISTRIBUTIONS.get(module, module)) not in declared
        and not (module == "configs" and path.name in IN_A_CHECKOUT)
    }
    assert not undeclared


def test_every_directory_of_the_package_is_found():
    options = PYPROJECT["tool"]["setuptools"]["packages"]["find"]
    assert options["namespaces"] is False
    found = setuptools.find_packages(str(ROOT), include=options["include"])
    directories = {path.parent for path in PACKAGE.rglob("*.py")}
    assert sorted(found) == sorted(
        ".".join(directory.relative_to(ROOT).parts) for directory in directories
    )


def data_files():
    """The files that pyproject.toml declares beside the modules."""
    declared = PYPROJECT["tool"]["setuptools"]["package-data"]
    return {
        path
        for package, patterns in declared.items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }


def test_every_data_file_of_the_package_is_declared():
    """The wheel would lack the others."""
    other = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".py"}
    assert {path for path in other if "__pycache__" not in path.parts} == data_files() != set()


@pytest.mark.slow
def test_a_wheel_holds_the_package_alone(tmp_path):
    """Built from a copy, because a build writes into the tree it is made of."""
    least = Requirement(PYPROJECT["build-system"]["requires"][0]).specifier
    if Version(setuptools.__version__) not in least:
        pytest.skip(f"setuptools{least} builds this package; {setuptools.__version__} is installed")
    source = tmp_path / "source"
    shutil.copytree(PACKAGE, source / "lightwam_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("configs", "converters", "tests"):  # they must stay out
        (source / name).mkdir()
        (source / name / "__init__.py").touch()
    for path in [ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "LICENSE"]:
        shutil.copy(path, source)
    for path in ROOT.glob("requirements*.txt"):
        shutil.copy(path, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", tmp_path, source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]

    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        about = next(name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = wheel.read(about).decode().partition("\n\n")[0].splitlines()
    files = [name for name in names if ".dist-info/" not in name]
    wanted = {*PACKAGE.rglob("*.py"), *data_files()}
    assert sorted(files) == sorted(str(path.relative_to(ROOT)) for path in wanted)

    assert f"Version: {PYPROJECT['project']['version']}" in metadata
    assert {line for line in metadata if line.startswith("Provides-Extra: ")} == {
        f"Provides-Extra: {extra}" for extra in EXTRAS
    }
    stated = [
        Requirement(line.removeprefix("Requires-Dist: "))
        for line in metadata
        if line.startswith("Requires-Dist: ")
    ]
    for extra, files in dynamic().items():
        here = [r for r in stated if (f'extra == "{extra}"' in str(r.marker)) == bool(extra)]
        if not extra:
            here = [r for r in stated if r.marker is None]
        told = [requirement for name in files for requirement in requirements(name)]
        assert [(r.name, r.extras, r.specifier) for r in here] == [
            (r.name, r.extras, r.specifier) for r in told
        ]
