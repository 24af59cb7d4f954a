"""A run that stands still says where."""

import time

from lightwam_jax.training import metrics, watchdog


def test_it_says_where_a_run_waits_and_keeps_quiet_otherwise(capfd):
    timer = metrics.StepTimer(step=41)
    with watchdog.Watchdog(timer, after_s=0.2):
        for _ in range(8):  # slow, but moving
            with timer("device"):
                time.sleep(0.05)
        assert not capfd.readouterr().err
        with timer("data"):
            time.sleep(0.7)
    said = capfd.readouterr().err
    assert "process 0 stands still: after step 41, in 'data' for " in said
    assert "the loader gives no batch" in said
    assert "test_watchdog.py" in said and "_watch" in said  # the stacks of all threads
    assert said.count("WARNING") in (1, 2)  # after 0.2 s, and perhaps after twice the time


def test_it_can_be_turned_off(capfd):
    timer = metrics.StepTimer()
    with watchdog.Watchdog(timer, after_s=0):
        time.sleep(0.05)
    assert not capfd.readouterr().err
