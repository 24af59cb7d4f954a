"""Shuffled places for LIBERO's suite object."""

import numpy as np
import pytest

from lightwam_jax.envs.libero import env as libero_lib
from lightwam_jax.envs.libero import places
from tests.envs.test_libero import DRAWER, MILK, episode, make

GRID = np.stack(np.meshgrid([-0.2, 0.0, 0.2], [-0.1, 0.1]), axis=-1).reshape(-1, 2)


def test_every_thing_may_go_to_every_place_and_none_is_near_another():
    rng, taken = np.random.default_rng(0), set()
    for _ in range(100):
        moved = places.drawn(GRID, rng)
        distances = np.linalg.norm(moved[:, None] - GRID[None], axis=-1)
        nearest = distances.argmin(axis=1)
        assert sorted(nearest) == list(range(6))
        assert np.abs(moved - GRID[nearest]).max() <= places.SHIFT
        apart = np.linalg.norm(moved[:, None] - moved[None], axis=-1) + np.eye(6)
        assert apart.min() >= places.APART
        taken.add(nearest[0])
    assert taken == set(range(6))


def test_no_room_is_said():
    with pytest.raises(RuntimeError, match=r"2 things found no places 0.1 m apart"):
        places.drawn(np.zeros((2, 2)), np.random.default_rng(0))


def test_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="places is 'mine'; expected 'suite' or 'shuffled'"):
        libero_lib.make(places="mine")


@pytest.mark.sim
def test_drawn_scenes_are_shuffled_by_their_seed_and_stored_ones_are_not():
    def layout(choice, init, seed):
        env = make(places=choice)
        env.reset(episode(MILK, init, seed))
        scene = env._env.env
        found = {name: scene.sim.data.body_xpos[body] for name, body in scene.obj_body_id.items()}
        found = {name: at[:2].copy() for name, at in found.items()}
        said = env.describe().get("places")
        env.close()
        return found, said

    (plain, nothing), (first, said) = layout("suite", -1, 5), layout("shuffled", -1, 5)
    assert (nothing, said) == (None, "shuffled")
    again, other = layout("shuffled", -1, 5)[0], layout("shuffled", -1, 6)[0]
    far = lambda a, b: {name: np.linalg.norm(a[name] - b[name]) for name in a}
    assert max(far(first, again).values()) == 0
    assert far(first, plain)["basket_1"] < 1e-3  # as the suite draws it
    for different in (far(first, plain), far(first, other)):
        assert sorted(different.values())[-3] > 0.05  # of seven things, three at least
    assert max(far(layout("suite", 0, 5)[0], layout("shuffled", 0, 5)[0]).values()) == 0
    with pytest.raises(ValueError, match="places='shuffled' is for suite object"):
        make(places="shuffled").reset(episode(DRAWER, -1))
