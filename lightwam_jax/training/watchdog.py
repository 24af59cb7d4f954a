"""Says where a run waits when nothing has moved for a while.

A loader that hangs and a collective whose other half never comes look the same from outside: no
output. A thread beside the loop notices, prints what this process waits for and its Python stacks,
and, where there are several processes, what each of them waits for: the one that does not wait for
the devices is the one to look at.
"""

import faulthandler
import sys
import threading
import time

from lightwam_jax import distributed

ADVICE = {
    "data": "the loader gives no batch: look at the storage of config.data.cache or path, and try "
    "config.data.workers=0",
    "device": "the devices have not finished: with several processes a collective waits until all "
    "of them have come",
    "compile": "the compiler is at work; a large model may take many minutes the first time",
    "save": "a checkpoint is being written: look at the storage of --workdir",
}


class Watchdog:
    """Watches a `metrics.StepTimer`; reports to stderr when it stands still.

    Args:
      timer: its `where()` returns (step, phase, seconds in this phase of this step).
      after_s: seconds of standing still before the first report; each further one comes after
        twice the time. 0: never.
      process: number of this process.
    """

    def __init__(self, timer, after_s, process=0):
        self._timer, self._after, self._process = timer, after_s, process
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self):
        if self._after > 0:
            self._thread.start()
        return self

    def __exit__(self, *error):
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self):
        place, due = None, self._after
        while not self._stop.wait(min(self._after / 4, 10.0)):
            step, phase, seconds = self._timer.where()
            if (step, phase) != place or seconds < due / 2:
                place, due = (step, phase), self._after
            if seconds >= due:
                self._report(step, phase, seconds)
                due = 2 * seconds

    def _report(self, step, phase, seconds):
        lines = [
            f"WARNING: process {self._process} stands still: after step {step}, in {phase!r} "
            f"for {seconds:.0f} s; {ADVICE.get(phase, 'the program itself is busy')}"
        ]
        # The others stand still too, and say so within the same interval.
        distributed.tell("standing_still", f"after step {step}, in {phase!r}", time.time())
        self._stop.wait(min(self._after / 2, 10.0))
        lines += [
            f"  process {other}: {said}"
            for other, said in sorted(
                distributed.told("standing_still", time.time() - 3 * seconds).items()
            )
        ]
        print("\n".join(lines), file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        sys.stderr.flush()
