"""Says where a run stands when it makes no progress.

A loader that hangs and a collective that waits for another process look the same from outside: no
output. Every phase of the loop is therefore watched. With several processes each one reports its
own place; the process that does not wait for the devices is the one to look at.
"""

import contextlib
import faulthandler
import sys
import threading

import jax

ADVICE = {
    "data": "the loader gives no batch: look at the storage of config.data.cache or path, and try "
    "config.data.workers=0",
    "device": "the devices have not finished. With several processes a collective waits for all of "
    "them: look at a process that stands in another phase",
    "compile": "the compiler is at work; a large model may take many minutes the first time",
    "save": "a checkpoint is being written: look at the storage of --workdir",
    "validate": "the policy is being evaluated on held-out windows",
    "log": "metrics are being written: look at the storage of --workdir",
}
_LOCKED_S = 30  # seconds that a report may wait for the interpreter lock


@contextlib.contextmanager
def watch(phase, step, after_s):
    """Reports to stderr, once, if the body takes longer than `after_s` seconds; 0: never.

    One line names the phase and the step; the Python stacks of all threads follow. Phases must
    not be nested.
    """
    if after_s <= 0:
        yield
        return
    message = (
        f"WARNING: process {jax.process_index()} has made no progress for {after_s:g} s: after "
        f"step {step}, in phase {phase!r}; {ADVICE.get(phase, 'the program itself is busy')}. "
        "Its stacks:"
    )
    # A report from Python holds the interpreter lock, so that no frame changes while it is read:
    # in a run that is slow, not stuck, faulthandler's own thread could crash on one that does.
    timer = threading.Timer(after_s, _report, (message,))
    timer.daemon = True
    timer.start()
    # That thread is for C++ code that holds the lock for good: frames stand still then.
    faulthandler.dump_traceback_later(after_s + _LOCKED_S, file=2)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()


def _report(message):
    print(message, file=sys.stderr, flush=True)
    faulthandler.dump_traceback(file=2)
    faulthandler.cancel_dump_traceback_later()
