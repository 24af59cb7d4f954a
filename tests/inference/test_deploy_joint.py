"""A head whose actions read all frames of the clip: whole and deployed, from noise to the plan."""

import copy
import dataclasses

import jax
import numpy as np
import pytest

from lightwam_jax import params as params_lib
from lightwam_jax.inference import deploy_flow, deploy_joint, rows
from lightwam_jax.inference.deployment import form
from lightwam_jax.training import losses
from tests.inference.test_policy import make_config, make_policy, observe, take

CONFIG = make_config(action_head="flow_dit", flow_reads="all_frames", flow_steps=2)


@pytest.fixture(scope="module")
def whole():
    return make_policy(CONFIG)


def test_a_deployed_policy_plans_as_the_whole_one(whole):
    """With LoRA and adapters, which the reference's own joint variant has not."""
    seen = observe(3)
    want, got = whole.act(*seen), whole.deployed().act(*seen)
    assert want.shape == (3, 8, 4) and want.std() > 0.1
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * float(np.ptp(want)))
    alone = whole.deployed().act(*take(seen, [2]), rows=4)
    np.testing.assert_array_equal(alone[0], got[2])
    paths = params_lib.flatten(whole.deployed().params)
    assert not [path for path in paths if "lora" in path]


def test_what_is_imagined_changes_the_plan(whole):
    """The video head moves the later frames, and only what reads them can notice."""
    seen, other = observe(3), copy.copy(whole)
    flat = params_lib.flatten(whole.params)
    still = {path: 0 * x for path, x in flat.items() if path.startswith("dit/head/head")}
    assert still
    other.params = params_lib.unflatten(flat | still)
    assert np.abs(other.act(*seen) - whole.act(*seen)).max() > 1e-3


def test_each_stream_of_each_row_has_noise_of_its_own():
    seeds = np.arange(2, dtype=np.uint32)
    video, actions = rows.noise(seeds, (2, 1, 4, 8, 8), CONFIG)
    # 9 frames, every second: 5 video frames, 2 latent ones; pooled by 2
    assert (video.shape, actions.shape) == ((2, 2, 2, 4, 8), (2, 8, 4))
    few = min(video[0].size, actions[0].size)
    for one, another in ((video[0], video[1]), (video[0], actions[0])):
        assert abs(np.corrcoef(one.ravel()[:few], another.ravel()[:few])[0, 1]) < 0.7
    first = dataclasses.replace(CONFIG.model, flow_reads="first_frame")
    alone = losses.plan_noise(
        jax.random.key(1), (1, 1, 4, 8, 8), dataclasses.replace(CONFIG, model=first)
    )
    np.testing.assert_array_equal(alone, actions[1])  # the actions' is that of the other variant


def test_each_way_of_reading_has_its_form():
    assert form(CONFIG.model) is deploy_joint
    assert form(dataclasses.replace(CONFIG.model, flow_reads="first_frame")) is deploy_flow
