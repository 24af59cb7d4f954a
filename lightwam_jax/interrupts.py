"""Ctrl-C ends a program with one line and exit code 130, whatever it is doing.

Python's own handler raises KeyboardInterrupt wherever the program is. That is not enough: in an
import of compiled code it may crash the process, in a callback of the garbage collector (jax has
one) it is printed and lost, in a library's bare `except:` (jax has some) it is only lost, and in a
process that is just being started it is a traceback.
"""

import _thread
import contextlib
import multiprocessing
import multiprocessing.context
import os
import signal
import sys
import threading
import time
import weakref
from multiprocessing import resource_tracker

EXIT_CODE = 130  # 128 + SIGINT
_RETRY_S = 0.05
_running = False  # whether `interruptible` would catch a KeyboardInterrupt
_rest = "; run the same command again"  # of the line
_raised = None  # weak reference to the interrupt on its way to `interruptible`


class _Interrupt(KeyboardInterrupt):
    """One that can be seen to be lost: it is freed before it has arrived."""


def listen():
    """Handles SIGINT from now on, where Python's handler did.

    Outside `interruptible`, and while something is imported, the process ends at once.
    """
    mine = threading.current_thread() is threading.main_thread()
    # Another handler is another's business; ignored (nohup, a job in the background) it stays.
    if mine and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _handle)
        before = sys.unraisablehook
        sys.unraisablehook = lambda lost: issubclass(lost.exc_type, _Interrupt) or before(lost)


@contextlib.contextmanager
def interruptible(again):
    """Ends the program with one line and exit code 130 at Ctrl-C.

    Args:
      again: what Ctrl-C leaves behind and how to go on.
    """
    global _running, _rest
    _running, _rest = True, f"; {again}"
    try:
        yield
    except KeyboardInterrupt:
        if signal.getsignal(signal.SIGINT) is not _handle:
            print(f"\ninterrupted{_rest}", file=sys.stderr)
            sys.exit(EXIT_CODE)
        _leave()  # a thread that compiles would crash the interpreter's end
    finally:
        _running, _rest = False, ""


def guard(main, again="run the same command again"):
    """Calls main() so that Ctrl-C is one line; for programs without `command_line.run`."""
    listen()
    with interruptible(again):
        return main()


def _handle(number, frame):
    del number
    for child in multiprocessing.active_children():
        child.kill()  # a pool would wait for what they do: minutes, in a simulator
    if _running and not _is_importing(frame):
        raise _interrupt()  # no local variable here: its traceback would keep itself alive
    _leave()


def _interrupt():
    global _raised
    new = _Interrupt()
    _raised = weakref.ref(new, _again)
    return new


def _leave():
    """Says it and ends the process at once."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # it may be in the middle of a write
            stream.flush()
    os.write(2, f"\ninterrupted{_rest}\n".encode())
    os._exit(EXIT_CODE)


def _is_importing(frame):
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _again(lost):
    """Repeats an interrupt that was lost on its way."""
    del lost
    if _running:
        # A bare thread: the locks of `threading` may be held by what was interrupted.
        _thread.start_new_thread(_interrupt_soon, ())


def _interrupt_soon():
    time.sleep(_RETRY_S)
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # wakes it if it sleeps


# ---- processes -----------------------------------------------------------------------------------


class _Process(multiprocessing.context.SpawnProcess):
    """A process that Ctrl-C does not reach: its parent ends it."""

    def start(self):
        resource_tracker.ensure_running()  # its start would let the signal in again
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # the child inherits it
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Spawn(multiprocessing.context.SpawnContext):
    Process = _Process


SPAWN = _Spawn()  # for `multiprocessing` and pools of processes
