"""The command that plants slips: Ctrl-C."""

import concurrent.futures
import subprocess
import sys

import pytest

from tests import slips


def test_ctrl_c_ends_the_tests_at_work_and_starts_no_others():
    sleeping = [sys.executable, "-c", "import time; time.sleep(100)"]
    process = subprocess.Popen(sleeping, start_new_session=True)
    slips._at_work.add(process)
    with pytest.raises(KeyboardInterrupt), concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(process.wait)
        waiting = pool.submit(int)
        with slips._interruptible(pool):
            raise KeyboardInterrupt
    slips._at_work.discard(process)
    assert running.result() == -9 and waiting.cancelled()
