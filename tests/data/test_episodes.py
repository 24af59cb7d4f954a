"""Windows and splits against the reference's; what a source may not hand over."""

import dataclasses
import json
import pathlib
import re
import types

import numpy as np
import pytest

from lightwam_jax.data import episodes
from lightwam_jax.data import windows as windows_lib
from lightwam_jax.data.formats import lerobot
from tests import synthetic

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "h_data"


@pytest.mark.parametrize(
    "name, length, num_frames, stride",
    [("len40_n33_s1", 40, 33, 1), ("len20_n33_s1", 20, 33, 1), ("len70_n17_s3", 70, 49, 3)],
)
def test_windows_are_the_references(name, length, num_frames, stride):
    golden = np.load(GOLDEN / "frame_indices.npz")
    windows = [
        windows_lib.window_at(length, start, num_frames, stride, 4) for start in range(length)
    ]
    np.testing.assert_array_equal([w.frames for w in windows], golden[f"{name}_frame_index"])
    np.testing.assert_array_equal([w.image_is_pad for w in windows], golden[f"{name}_image_is_pad"])


def test_window_clamps_to_the_last_step():
    window = windows_lib.window_at(length=6, start=3, num_frames=9, stride=2, horizon=5)
    assert window.frames.tolist() == [3, 5, 5, 5, 5]
    assert window.image_is_pad.tolist() == [False, False, True, True, True]
    assert window.actions.tolist() == [3, 4, 5, 5, 5]
    assert window.action_is_pad.tolist() == [False, False, False, True, True]
    with pytest.raises(IndexError, match="step 6 of an episode of 6 steps"):
        windows_lib.window_at(6, 6, 9, 2, 5)


@pytest.mark.parametrize(
    "count, fraction, train, val",
    [
        (10, 0.05, [5, 6, 0, 7, 3, 2, 4, 9, 1], [8]),
        (20, 0.25, [15, 9, 14, 7, 12, 10, 6, 19, 3, 0], [4, 17, 1, 13, 8]),
        (3, 0.34, [2], [1, 0]),
        (4, 0.0, [0, 1, 2, 3], []),
    ],
)
def test_split_is_the_references(count, fraction, train, val):
    members = [types.SimpleNamespace(id=i) for i in range(count)]
    got_train, got_val = ([e.id for e in part] for part in episodes.split(members, fraction))
    assert got_train[: len(train)] == train
    assert got_val == val
    assert sorted(got_train + got_val) == list(range(count))


def test_split_that_leaves_nothing_to_train_on():
    with pytest.raises(ValueError, match=r"0.5 of 1 episode leaves none to train on"):
        episodes.split([types.SimpleNamespace(id=0)], 0.5)


def test_load_episodes_says_what_to_do(tmp_path):
    simulated = {"evaluation.suite": "demo"}
    with pytest.raises(FileNotFoundError, match=r"record some with: .*record --suite demo --out "):
        episodes.load_episodes(synthetic.make_config(tmp_path, **simulated))
    with pytest.raises(FileNotFoundError, match=r"; correct it, or put them there"):
        episodes.load_episodes(synthetic.make_config(tmp_path))
    several = simulated | {"data.path": f"{tmp_path},{tmp_path}/b,{tmp_path}/c"}
    with pytest.raises(FileNotFoundError, match=r"--suite demo --out \S+/b \(with"):
        episodes.load_episodes(synthetic.make_config(tmp_path, **several))
    released = simulated | {"data.codec": "wan21"}
    with pytest.raises(FileNotFoundError, match=r"; correct it, or put them there"):
        episodes.load_episodes(synthetic.make_config(tmp_path, **released))
    with pytest.raises(ValueError, match="source is empty; expected lerobot, "):
        episodes.load_episodes(synthetic.make_config(tmp_path, **{"data.source": ""}))
    with pytest.raises(ValueError, match="'lerbot'; expected one of '', 'lerobot', "):
        episodes.load_episodes(synthetic.make_config(tmp_path, **{"data.source": "lerbot"}))
    with pytest.raises(ValueError, match=r"nothing to precompute, run train.py"):
        episodes.load_episodes(synthetic.make_config(tmp_path, **{"data.source": "fake"}))


def test_check_names_what_is_wrong_and_the_remedy():
    config, good = synthetic.make_config(), synthetic.make_episodes(2)
    assert not episodes.check(good[0], config)

    def found(**changes):
        problems = episodes.check(dataclasses.replace(good[1], **changes), config)
        return [problem.line() for problem in problems]

    (narrow,) = found(action=good[1].action[:, :4])
    assert re.search(
        r"episode_001 .*action has 4 dimensions, .* 7; set config.model.action_dim to "
        "4",
        narrow,
    )
    state = good[1].state.copy()
    state[3, 2] = np.nan
    (broken,) = found(state=state)
    assert "frame 3): not finite: state[2] is nan (1 such" in broken
    (short,) = found(state=good[1].state[:-1])
    assert "wrong length: state has shape" in short
    (empty,) = found(action=good[1].action[:0], state=good[1].state[:0])
    assert "empty episode" in empty
    (narrow,) = found(state=good[1].state[:, :5])
    assert "state has 5 dimensions, the config says 8; set config.model.proprio_dim to 5" in narrow
    assert narrow.endswith("or config.data.state_dim where the model's is larger")
    action = good[1].action.copy()
    action[2, 6] = action[4, 1] = action[4, 3] = -np.inf
    (broken,) = found(action=action)
    assert "frame 2): not finite: action[6] is -inf (3 such" in broken
    both = found(action=action, state=state)
    assert ["state[2]" in line for line in both] == [True, False]
    flat = found(state=good[1].state[:, 0])
    assert f"state has shape [{good[1].length}]; expected [{good[1].length}, 8]" in flat[0]


def test_a_smaller_robot_is_checked_against_its_own_widths():
    narrow = {"data.state_dim": 5, "data.action_dim": 4}
    config, (episode,) = synthetic.make_config("", **narrow), synthetic.make_episodes(1)
    assert [p.kind for p in episodes.check(episode, config)] == ["wrong width"] * 2
    small = dataclasses.replace(episode, state=episode.state[:, :5], action=episode.action[:, :4])
    assert not episodes.check(small, config)


def test_warnings_stop_nothing_and_a_long_list_of_errors_is_cut():
    config = synthetic.make_config("somewhere")

    def problems(count, severity="error"):
        return [
            episodes.Problem(severity, "kind", f"e{i}", "file", None, f"number {i}!")
            for i in range(count)
        ]

    episodes.refuse_errors(problems(3, "warning"), config)
    for count, shown, more in ((1, 1, False), (20, 20, False), (21, 20, True)):
        with pytest.raises(ValueError, match=f"^{count} error{'s' * (count > 1)} in") as error:
            episodes.refuse_errors(problems(count) + problems(5, "warning"), config)
        assert str(error.value).count("number") == shown
        assert ("\n  ... and 1 more\n" in str(error.value)) == more
        assert ("... and" in str(error.value)) == more


def test_images_are_those_of_the_camera_and_steps_asked_for():
    (episode,) = synthetic.make_episodes(1)
    for camera in ("scene", "wrist"):
        got = episode.frames(camera, [3, 0, 3])
        np.testing.assert_array_equal(got, episode.images[camera][[3, 0, 3]])
    assert episode.length == len(episode.action) == len(episode.images["scene"])


def test_directories_are_between_commas():
    assert episodes.directories("a") == ["a"]
    assert episodes.directories(" a/b , c,") == ["a/b", "c"]
    assert episodes.directories("") == []


def test_every_error_is_reported_and_only_what_is_listed_left_out(monkeypatch, tmp_path):
    good = synthetic.make_episodes(3)
    good[1].action[2, 0] = np.inf
    lost = episodes.Problem("error", "missing video", "episode_009", "nine.mp4", None, "gone")
    monkeypatch.setattr(lerobot, "read", lambda config: ([*good, good[0]], [lost]))
    with pytest.raises(ValueError, match="3 errors") as error:
        episodes.load_episodes(make(tmp_path))
    assert all(
        text in str(error.value)
        for text in (
            "missing video: gone",
            "not finite",
            "2 episodes have this id",
            "config.data.exclude",
        )
    )
    monkeypatch.setattr(lerobot, "read", lambda config: (good, [lost]))
    exclude = ("episode_001", "episode_009")
    left = episodes.load_episodes(make(tmp_path, **{"data.exclude": exclude}))
    assert [episode.id for episode in left] == ["episode_000", "episode_002"]
    with pytest.raises(ValueError, match="exclude lists episode_010, and"):
        episodes.load_episodes(make(tmp_path, **{"data.exclude": ("episode_010",)}))
    monkeypatch.setattr(lerobot, "read", lambda config: ([], []))
    with pytest.raises(ValueError, match="holds no episode: correct it, or record some"):
        episodes.load_episodes(make(tmp_path, **{"evaluation.suite": "demo"}))


def test_several_directories_are_one_data_set(monkeypatch, tmp_path):
    paths = [tmp_path / "spatial", tmp_path / "goal"]
    for path in paths:
        path.mkdir()
    lost = episodes.Problem("error", "missing video", "episode_009", "nine.mp4", None, "gone")
    left_out = {}

    def read(config):
        left_out[config.data.path] = config.data.exclude
        if config.data.path.endswith("spatial"):
            return synthetic.make_episodes(2), []
        return synthetic.make_episodes(1), [lost]

    monkeypatch.setattr(lerobot, "read", read)
    both = {"data.path": ", ".join(map(str, paths))}
    found = episodes.load_episodes(
        make(tmp_path, **both, **{"data.exclude": ("spatial/episode_001", "goal/episode_009")})
    )
    assert [episode.id for episode in found] == ["spatial/episode_000", "goal/episode_000"]
    # Each reader gets its own ids, so that it need not open what is left out.
    assert list(left_out.values()) == [("episode_001",), ("episode_009",)]
    assert list(left_out) == list(map(str, paths))
    with pytest.raises(ValueError, match=r"goal/episode_009 \(nine.mp4"):
        episodes.load_episodes(make(tmp_path, **both))
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        episodes.load_episodes(make(tmp_path, **{"data.path": f"{paths[0]},elsewhere"}))
    with pytest.raises(ValueError, match="names a directory twice"):
        episodes.load_episodes(make(tmp_path, **{"data.path": f"{paths[0]},{paths[0]}/"}))


def test_directories_of_one_name_are_told_apart_by_their_parents(tmp_path, monkeypatch):
    paths = [tmp_path / suite / "episodes" for suite in ("spatial", "goal")]
    for path in paths:
        path.mkdir(parents=True)
    monkeypatch.setattr(lerobot, "read", lambda config: (synthetic.make_episodes(1), []))
    found = episodes.load_episodes(make(tmp_path, **{"data.path": ",".join(map(str, paths))}))
    names = [episode.id for episode in found]
    assert names == ["spatial/episodes/episode_000", "goal/episodes/episode_000"]


def make(tmp_path, **overrides):
    return synthetic.make_config(tmp_path, **{"data.path": str(tmp_path), **overrides})


def test_an_unknown_camera_lists_the_known_ones():
    with pytest.raises(KeyError, match="no camera 'front'; it has scene, wrist"):
        synthetic.make_episodes(1)[0].frames("front", [0])


def test_probe_windows_of_the_reference_dataset():
    """Pads of samples that the reference's own dataset class returned."""
    golden = np.load(GOLDEN / "dataset_samples.npz")
    lengths = json.loads((GOLDEN / "dataset_info.json").read_text(encoding="utf-8"))[
        "episode_lengths"
    ]
    ends = np.cumsum(lengths)
    for row, index in enumerate(golden["index"]):
        episode = int(np.searchsorted(ends, index, side="right"))
        start = int(index - (ends[episode] - lengths[episode]))
        window = windows_lib.window_at(lengths[episode], start, 33, 4, 32)
        np.testing.assert_array_equal(window.image_is_pad, golden[f"{row}.image_is_pad"])
        np.testing.assert_array_equal(window.action_is_pad, golden[f"{row}.action_is_pad"])


def test_golden_statistics_count_the_same_episodes():
    statistics = json.loads((GOLDEN / "dataset_stats.json").read_text(encoding="utf-8"))
    assert (statistics["num_episodes"], statistics["num_transition"]) == (3, 96)
