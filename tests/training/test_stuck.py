"""A run that makes no progress says where it stands."""

import time

from lightwam_jax.training import stuck


def hang():
    time.sleep(0.7)


def test_it_says_where_a_run_waits_and_keeps_quiet_otherwise(capfd):
    for step in range(8):  # slow, but moving
        with stuck.watch("device", step, after_s=0.3):
            time.sleep(0.05)
    assert not capfd.readouterr().err
    with stuck.watch("data", 41, after_s=0.3):
        hang()
    said = capfd.readouterr().err
    assert "process 0 has made no progress for 0.3 s: after step 41, in phase 'data'; " in said
    assert "the loader gives no batch" in said
    assert said.index("WARNING") < said.index('test_stuck.py", line'), "the stacks follow"
    assert "in hang" in said and "Thread 0x" in said
    assert said.count("WARNING") == 1
    time.sleep(0.5)
    assert not capfd.readouterr().err


def test_the_report_from_without_is_for_a_held_interpreter_only(monkeypatch):
    """faulthandler's own thread reads frames unlocked, which can crash a run that is only slow."""
    calls = []
    for name in ("dump_traceback_later", "cancel_dump_traceback_later", "dump_traceback"):
        record = lambda *args, name=name, **kwargs: calls.append((name, *args))
        monkeypatch.setattr(stuck.faulthandler, name, record)
    with stuck.watch("save", 3, after_s=0.2):
        time.sleep(0.5)
    names = [name for name, *_ in calls]
    assert names == [
        "dump_traceback_later",
        "dump_traceback",
        "cancel_dump_traceback_later",
        "cancel_dump_traceback_later",
    ]
    assert calls[0][1] > 10 + 0.2


def test_it_can_be_turned_off(capfd):
    with stuck.watch("data", 1, after_s=0):
        time.sleep(0.05)
    assert not capfd.readouterr().err
