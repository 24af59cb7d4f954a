"""Whole episodes: plans put together as they are executed, and the baselines, by hand."""

import json
import types

import numpy as np
import pytest

from lightwam_jax.data import episodes
from lightwam_jax.evaluation import open_loop_page, stitched
from lightwam_jax.inference import rows as rows_lib
from tests.inference.test_policy import make_config

REPLAN, HORIZON = 2, 3


def episode(name, actions, task="go"):
    actions = np.asarray(actions, np.float32)
    steps = np.arange(len(actions), dtype=np.uint8)
    images = {c: np.tile(steps[:, None, None, None], (1, 8, 8, 3)) for c in ("scene", "wrist")}
    state = np.repeat(steps[:, None], 3, axis=1).astype(np.float32)
    return episodes.ArrayEpisode(name, 10.0, task, state, actions, images)


def policy(**changes):
    """Plans 100 * step + the place in the chunk, for both dimensions."""
    config = make_config({"action_dim": 2, "gripper_dims": (1,)}, action_dim=6, proprio_dim=9)
    data = types.SimpleNamespace(
        action_horizon=HORIZON,
        cameras=("scene", "wrist"),
        source="hdf5",
        val_fraction=0.5,
        path="data",
        action_dim=2,
        gripper_dims=(1,),
    )
    evaluation = types.SimpleNamespace(replan_steps=REPLAN, batch=2)
    calls = []

    def act(images, state, prompts, rows):
        calls.append((state[:, 0].tolist(), list(prompts), rows))
        assert all(image[:, 0, 0, 0].tolist() == state[:, 0].tolist() for image in images.values())
        plan = 100 * state[:, :1] + np.arange(HORIZON)
        return np.repeat(plan[..., None], 2, axis=-1).astype(np.float32)

    config = types.SimpleNamespace(data=data, evaluation=evaluation, model=config.model, name="run")
    return types.SimpleNamespace(config=config, act=act, calls=calls, step=7)


TRAIN = [episode("t", [[0, 0], [4, 0]]), episode("u", [[-2, 0], [2, 0], [2, 0], [0, 0]])]
ACTIONS = [[1, 5], [2, 5], [3, 5], [4, 5], [5, 5]]


def test_plans_are_stitched_as_they_are_executed():
    acting = policy()
    ((one,), span) = stitched.evaluate(acting, TRAIN, [episode("v", ACTIONS)])
    assert one.starts == [0, 2, 4]
    assert one.actions["policy"][:, 0].tolist() == [0, 1, 200, 201, 400], "the third is not used"
    assert one.actions["hold"][:, 0].tolist() == [1, 1, 2, 2, 4]  # 1: the mean of training
    assert one.actions["mean"].tolist() == [[1, 0]] * 5
    assert one.actions["repeat last"][:, 0].tolist() == [1, 1, 1, 1, 201]
    assert (span.low.tolist(), span.high.tolist()) == ([-2, 0], [4, 0])
    assert [call[0] for call in acting.calls] == [[0, 2], [4]]
    assert {call[2] for call in acting.calls} == {rows_lib.padded_size(2)}, "one compilation"
    assert acting.calls[0][1] == ["go", "go"]


def test_errors_are_means_over_all_steps_and_constant_dimensions_do_not_count():
    found, span = stitched.evaluate(
        policy(), TRAIN, [episode("v", ACTIONS), episode("w", [[0, 5]] * 3)]
    )
    l1 = stitched.errors(found)
    assert l1["mean"].tolist() == [(0 + 1 + 2 + 3 + 4 + 3 * 1) / 8, 5]
    assert l1["hold"][0] == pytest.approx((0 + 1 + 1 + 2 + 1 + 1 + 1 + 0) / 8)
    mean, moving = stitched.shares(l1, span)
    assert moving.tolist() == [0] and mean["mean"] == pytest.approx(13 / 8 / 6)
    numbers = json.loads(json.dumps(stitched.numbers(found, span, policy().config)))
    assert (numbers["ids"], numbers["steps"], numbers["plans"]) == (["v", "w"], 8, 5)
    assert numbers["l1"]["mean"] == [13 / 8, 5]


def test_whole_episodes_of_every_instruction_come_first():
    held_out = [
        episode("start", [[0, 0]] * 2, "c"),
        *(episode(f"a{k}", [[0, 0]] * 4, "a") for k in range(3)),
        episode("b0", [[0, 0]] * 3, "b"),
    ]
    chosen = lambda most: [each.id for each in stitched.choose(held_out, HORIZON, most)]
    assert chosen(2) == ["a0", "b0"]
    assert chosen(9) == ["a0", "b0", "a1", "a2", "start"]


def test_the_page_compares_with_the_baselines_and_names_what_is_worse(tmp_path, monkeypatch):
    monkeypatch.setattr(open_loop_page, "_video", lambda *given: ())
    acting, held_out = policy(), [episode(f"v<{k}>", ACTIONS) for k in range(4)]
    found, span = stitched.evaluate(acting, TRAIN, held_out)
    errors = {"l1_step": np.ones(3), "l1_step_dim": np.ones((3, 2)), "samples": 5, "grippers": {}}
    path = open_loop_page.write(tmp_path, errors, found, span, acting)
    text = path.read_text(encoding="utf-8")
    # |0-1| + |1-2| + |200-3| + |201-4| + |400-5| over 5 steps and a range of 6
    assert (
        f"{100 * (1 + 1 + 197 + 197 + 395) / 5 / 6:.1f} %" in text
        and "(a baseline is better)" in text
    )
    assert "better than every baseline in 0 of 1 dimensions" in text
    assert 'class="number bad' in text and "never moves" in text
    assert text.count('class="chart"') == 2 + 4 * 2 and "v&lt;0&gt;" in text
    assert text.count("<section><details><summary>“go”") == 2, "later episodes are folded away"
    assert "action[1], gripper" in text
    table = open_loop_page.text_table(stitched.errors(found), span, stitched.names(acting.config))
    assert table.splitlines()[1].split()[:4] == ["action[0]", "-2", "to", "4"]


def test_the_page_says_why_there_are_no_whole_episodes(tmp_path):
    errors = {"l1_step": np.ones(3), "l1_step_dim": np.ones((3, 2)), "samples": 5, "grippers": {}}
    path = open_loop_page.write(tmp_path, errors, [], None, policy(), "data are <gone>")
    assert "data are &lt;gone&gt;" in path.read_text(encoding="utf-8")


def test_a_video_of_an_episode_has_a_frame_per_step(tmp_path):
    import av

    one = episode("v", ACTIONS)
    (media,) = open_loop_page._video(one, ("scene", "wrist"), tmp_path / "v.mp4")
    assert media.places == 10.0
    with av.open(str(media.path)) as video:
        shown = [frame.to_ndarray(format="gray8") for frame in video.decode(video=0)]
    assert len(shown) == 5
