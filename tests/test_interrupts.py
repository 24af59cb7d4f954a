"""Ctrl-C is one line and exit code 130, wherever it finds a program."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
_BEGIN = """
import gc, os, signal, sys, time
from lightwam_jax import interrupts
strike = lambda: signal.raise_signal(signal.SIGINT)
"""
_CASES = {
    "at work": (
        """
interrupts.listen()
with interrupts.interruptible("it continues"):
    strike()
""",
        "interrupted; it continues",
    ),
    "before": ("interrupts.listen(); strike()", "interrupted; run the same command again"),
    # jax calls into Python whenever garbage is collected: what is raised there is lost.
    "collecting garbage": (
        """
interrupts.listen()
gc.disable()
gc.callbacks.append(lambda phase, info: gc.callbacks.clear() or strike())
with interrupts.interruptible("it continues"):
    gc.collect()
    time.sleep(60)
""",
        "interrupted; it continues",
    ),
    "where a library catches everything": (
        """
interrupts.listen()
gc.disable()
with interrupts.interruptible("it continues"):
    try:
        strike()
    except:
        pass
    time.sleep(60)
""",
        "interrupted; it continues",
    ),
    # As numpy does: what goes wrong in its compiled code becomes an ImportError.
    "importing": (
        """
open("half.py", "w").write("import __main__\\ntry:\\n    __main__.strike()\\n"
                           "except KeyboardInterrupt:\\n    raise ImportError")
sys.path.insert(0, ".")
interrupts.listen()
with interrupts.interruptible("it continues"):
    import half
""",
        "interrupted; it continues",
    ),
}


def run(script, directory, begin=_BEGIN):
    return subprocess.run(
        [sys.executable, "-c", begin + script],
        cwd=directory,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        encoding="utf-8",
        timeout=50,
    )


@pytest.mark.parametrize("case", _CASES)
def test_one_line_and_its_exit_code(case, tmp_path):
    script, line = _CASES[case]
    done = run(script, tmp_path)
    assert done.returncode == 130 and done.stdout == ""
    assert done.stderr.startswith(f"\n{line}") and done.stderr.count("\n") == 2, done.stderr


def test_what_processes_are_doing_is_not_waited_for(tmp_path):
    script = """
import concurrent.futures, threading
interrupts.listen()
with interrupts.interruptible("it continues"):
    with concurrent.futures.ProcessPoolExecutor(1, interrupts.SPAWN) as pool:
        pool.submit(abs, 1).result()
        pool.submit(time.sleep, 60)
        strike()
"""
    done = run(script, tmp_path)
    assert (done.returncode, done.stderr) == (130, "\ninterrupted; it continues\n")


def test_a_job_that_ignores_interrupts_goes_on(tmp_path):
    script = "signal.signal(signal.SIGINT, signal.SIG_IGN)\ninterrupts.listen()\nstrike()\nprint(1)"
    assert run(script, tmp_path).stdout == "1\n"


def test_processes_are_left_to_their_parent(tmp_path):
    script = """
with interrupts.SPAWN.Pool(1) as pool:
    print(signal.SIGINT in pool.apply(signal.pthread_sigmask, (signal.SIG_BLOCK, [])))
print(signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""
    assert run(script, tmp_path).stdout == "True\nset()\n"


@pytest.mark.parametrize("package", ["lightwam_jax", "benchmarks"])
def test_a_module_that_is_run_listens_before_its_imports(package, tmp_path):
    script = f"""
import signal, sys
sys.argv = ["-m"]  # as python -m has it while it imports the package
import {package}
from lightwam_jax import interrupts
print(signal.getsignal(signal.SIGINT) is interrupts._handle)
"""
    assert run(script, tmp_path, begin="").stdout == "True\n"
    unasked = script.replace('["-m"]', '["a_program_that_uses_the_package.py"]')
    assert run(unasked, tmp_path, begin="").stdout == "False\n"
