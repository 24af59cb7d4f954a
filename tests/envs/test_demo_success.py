"""What counts as success on the table."""

import numpy as np
import pytest

from lightwam_jax.envs import base as envs_base
from lightwam_jax.envs.demo import tabletop


@pytest.mark.parametrize(
    ("in_tray", "expected"),
    [
        ("", (False, False)),
        ("target", (True, True)),
        ("other", (False, True)),
        ("both", (False, True)),
    ],
)
def test_success_is_the_named_object_alone_in_the_tray(monkeypatch, in_tray, expected):
    env = tabletop.TabletopEnv(image_size=8)
    env.reset(envs_base.EpisodeSpec("tabletop", 0, 0))
    target = env.scene.target
    other = (target + 1) % len(env.scene.objects)
    resting = {"": (), "target": (target,), "other": (other,), "both": (target, other)}[in_tray]
    monkeypatch.setattr(env, "rests", lambda index: index in resting)
    _, success, done = env.step(np.zeros(len(tabletop.ACTION)))
    assert (bool(success), bool(done)) == expected
