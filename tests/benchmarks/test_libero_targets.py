"""Where LIBERO's targets lie, of made-up scenes."""

import types

import numpy as np
import pytest

from benchmarks import libero_targets

BDDL = """(define (problem P)
  (:fixtures
    floor - floor
  )
  (:objects
    milk_1 - milk
    basket_1 - basket
    soup_1 - soup
  )
  (:obj_of_interest
    {target}
  )
  (:goal
    (And (In {target} basket_1_contain_region))
  )
)"""


def test_things_are_found_in_the_stored_states_without_the_basket(monkeypatch, tmp_path):
    # Time, a robot of two joints, then x, y, z and a rotation of each thing.
    states = np.concatenate([[[9, 0.1, 0.2]] * 2, np.arange(42).reshape(2, 21)], axis=1)
    places, loaded = {"milk_1": 2, "basket_1": 9, "soup_1": 16}, []
    for target in ("milk_1", "soup_1"):
        (tmp_path / target).write_text(BDDL.format(target=target), encoding="utf-8")
    other = (tmp_path / "milk_1").read_text(encoding="utf-8").replace("milk", "butter")
    (tmp_path / "other").write_text(
        other.replace("soup_1 - soup", "tea_1 tea_2 - tea"), encoding="utf-8"
    )
    scene = types.SimpleNamespace(
        objects_dict={name: types.SimpleNamespace(joints=[name]) for name in places},
        sim=types.SimpleNamespace(
            model=types.SimpleNamespace(
                get_joint_qpos_addr=lambda name: (places[name], places[name] + 7)
            )
        ),
    )
    env = types.SimpleNamespace(reset=loaded.append, _env=types.SimpleNamespace(env=scene))
    monkeypatch.setattr(libero_targets.libero_files, "initial_states", lambda task: states)
    monkeypatch.setattr(libero_targets.libero_files, "bddl_file", tmp_path.joinpath)
    found = libero_targets.Places(env)
    target, things = found.of("milk_1")
    assert target == "milk_1" and list(things) == ["milk_1", "soup_1"]
    np.testing.assert_array_equal(things["milk_1"], [[0, 1, 2], [21, 22, 23]])
    np.testing.assert_array_equal(things["soup_1"], [[14, 15, 16], [35, 36, 37]])
    assert found.of("soup_1")[0] == "soup_1" and [each.task for each in loaded] == ["milk_1"]
    with pytest.raises(RuntimeError, match=r"other has the things .*, not .*'tea_1', 'tea_2'"):
        found.of("other")


def test_hands_that_read_nothing_are_counted():
    left = np.array([[-0.1, 0.0, 0.5], [-0.12, 0.0, 0.5]])
    right = np.array([[0.1, 0.0, 0.5], [0.1, 0.04, 0.5]])
    usual = {
        "milk": ("milk_1", {"milk_1": left, "soup_1": right}),
        "soup": ("soup_1", {"milk_1": right, "soup_1": left}),
    }
    same = libero_targets.describe("object", usual, usual)
    assert (same["states"], same["taken_by_place"], same["taken_by_scene"]) == (4, 4, 4)
    swapped = {"milk": ("milk_1", {"milk_1": right, "soup_1": left}), "soup": usual["soup"]}
    found = libero_targets.describe("pro_object_swap", swapped, usual)
    assert (found["taken_by_place"], found["taken_by_scene"]) == (2, 2)
    where = {"target": "milk_1", "mean_cm": [10.0, 2.0, 50.0], "sides_cm": [0.0, 4.0, 0.0]}
    assert found["per_task"]["milk"] == where
    # Where targets lie in two places, one place is right half the time and the scene always.
    several = {
        "milk": ("milk_1", {"milk_1": left, "soup_1": right}),
        "soup": ("soup_1", {"milk_1": left, "soup_1": right}),
    }
    found = libero_targets.describe("spatial", several, several)
    assert (found["taken_by_place"], found["taken_by_scene"]) == (2, 4)
