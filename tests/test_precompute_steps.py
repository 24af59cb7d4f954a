"""Which steps precompute runs, in which order, on which episodes: with stand-ins for the work."""

import dataclasses
import os
import types

import numpy as np
import pytest

from lightwam_jax import atomic, precompute
from lightwam_jax import encoders as encoders_lib
from lightwam_jax.data import actions, assets
from lightwam_jax.data import episodes as episodes_lib
from lightwam_jax.data import windows as windows_lib
from lightwam_jax.data.caches import latents as latent_cache
from lightwam_jax.encoders import pca as pca_lib
from lightwam_jax.encoders import text as text_lib
from tests import synthetic
from tests.data.caches.test_fingerprint import recorded


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Of six episodes, four of them to train on, with a change of instruction in each."""
    found = recorded(6)
    monkeypatch.setattr(episodes_lib, "read", lambda config: (list(found), []))
    return synthetic.make_config(tmp_path)


def changed(config, section, **values):
    return dataclasses.replace(
        config, **{section: dataclasses.replace(getattr(config, section), **values)}
    )


@pytest.mark.parametrize(
    "what, ran",
    [
        (("latents", "text", "stats"), ["stats", "text", "latents"]),
        (("latents", "stats"), ["stats", "latents"]),
        (("text",), ["text"]),
        (("text", "text"), ["text"]),
        (("all",), ["stats", "text", "latents"]),
        (("latents", "all"), ["stats", "text", "latents"]),
    ],
)
def test_steps_run_once_in_their_own_order(config, monkeypatch, capsys, what, ran):
    done = []
    for name in ("statistics", "text", "latents"):
        step = name.replace("statistics", "stats")
        work = lambda data, step=step: done.append(step) or f"note of {step}"
        monkeypatch.setattr(precompute, f"_{name}", work)
    precompute.precompute(config, what)
    assert done == ran
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0] for line in said] == [f"{step}: note of {step}" for step in ran]


def test_unknown_steps_and_processes_are_refused(config):
    for index, count in ((-1, 2), (2, 2), (1, 1), (0, 0)):
        with pytest.raises(ValueError, match="expected 0 to process_count - 1"):
            precompute.precompute(config, ("stats",), index, count)
    for what, named in (((), "nothing"), (("stats", "latent", "b"), "b, latent")):
        with pytest.raises(ValueError, match=f"{named} is not a step"):
            precompute.precompute(config, what)


def test_validation_episodes_are_in_no_fingerprint_of_the_training(config):
    one = precompute.SourceEpisodes(config)
    assert {name: len(found) for name, found in one.splits.items()} == {"train": 4, "val": 2}
    train, val = episodes_lib.split(one.found, config.data.val_fraction)
    assert one.splits == {"train": train, "val": val}
    assert one.training == latent_cache.fingerprint(one.splits["train"], config)
    assert one.everything == latent_cache.fingerprint(
        one.splits["train"] + one.splits["val"], config
    )
    other = precompute.SourceEpisodes(config)
    held = other.splits["val"][-1]
    other.splits["val"][-1] = dataclasses.replace(held, state=held.state + 1)
    assert other.training == one.training and other.everything != one.everything


def test_every_instruction_of_every_episode_is_encoded(config):
    data = precompute.Data(config)
    ids = [e for split in ("train", "val") for e in data.sets[0].splits[split]]
    data.sets[0].splits["val"][-1] = dataclasses.replace(ids[-1], then="stop")
    first = ids[0].task
    (other,) = {*synthetic.TASKS} - {first}
    template = config.data.prompt_template
    want = [text_lib.prompt(task, template) for task in (first, "go home", other, "stop")]
    assert precompute.data_prompts(data) == want


class Codec:
    """A codec that remembers what it was fitted on."""

    id, latent_channels = "stand-in", 16

    def save(self, directory):
        os.makedirs(directory)


@pytest.mark.parametrize("train, clips", [(None, 96), (64, 6), (65, 6), (50, 8), (1, 384)])
def test_the_codec_is_fitted_on_training_episodes_only(config, monkeypatch, train, clips):
    asked, fitted = [], []

    def take(found, config, most, each):
        asked.append(([e.id for e in found], most, each))
        return np.zeros((2, 5, 32, 64, 3), np.uint8)

    def fit(videos, channels):
        fitted.append((len(videos), channels))
        return Codec()

    monkeypatch.setattr(windows_lib, "clips", take)
    monkeypatch.setattr(pca_lib.PcaCodec, "fit", fit)
    monkeypatch.setattr(encoders_lib, "load_codec", lambda directory: "there")
    data = precompute.Data(config)
    if train:
        many = [types.SimpleNamespace(id=str(k)) for k in range(train)]
        data.sets[0].splits["train"] = many
        data.sets[0].training = "fingerprint of many"
    assert precompute.make_codec(data)[1] == "fitted now"
    ids = [e.id for e in data.sets[0].splits["train"]]
    assert asked == [(ids, 64, clips)] and fitted == [(2, config.model.latent_channels)]
    assert precompute.make_codec(data) == ("there", "kept")
    # The same episodes elsewhere, other episodes to validate on: nothing to fit anew.
    data.sets[0].everything = "others"
    data.sets[0].config = changed(data.sets[0].config, "data", path="elsewhere")
    assert precompute.make_codec(data)[1] == "kept"
    data.sets[0].training = "others"
    assert precompute.make_codec(data)[1] == "fitted now" and len(fitted) == 2


def test_statistics_are_fitted_on_the_training_episodes_of_one_embodiment(
    config, monkeypatch, capsys, tmp_path
):
    asked = []

    def fit(found, horizon, transform):
        asked.append(([e.id for e in found], horizon, transform))
        return {"number": len(asked)}

    monkeypatch.setattr(precompute.normalize, "fit_statistics", fit)
    monkeypatch.setattr(precompute.normalize, "describe", lambda statistics: "table")
    monkeypatch.setattr(precompute.normalize, "unsafe_dimensions", lambda *arguments: [])
    config = changed(config, "data", gripper_dims=(6,), gripper_closed_open=(1.0, -1.0))
    one, two = precompute.SourceEpisodes(config), precompute.SourceEpisodes(config)
    path = str(tmp_path / "dataset_stats.json")
    assert precompute._fit(path, [one, two]) == f"wrote {path}"
    ids = [e.id for e in one.splits["train"]]
    assert asked == [(ids + ids, config.data.action_horizon, actions.from_config(config))]
    written = atomic.read_json(path)
    assert written["number"] == 1 and written["made_from"]["data"] == "+".join([one.training] * 2)
    assert written["made_from"]["config"] == assets.statistics_keys(config)
    assert written["fps"] == one.splits["train"][0].fps > 0
    assert precompute._fit(path, [one, two]) == f"up to date in {path}"
    two.training = "others"
    assert precompute._fit(path, [one, two]) == f"wrote {path}"
    two.config = changed(config, "data", gripper_closed_open=(0.0, 1.0))
    with pytest.raises(ValueError, match=r"differ in .*gripper_closed_open"):
        precompute._fit(path, [one, two])
    assert len(asked) == 2 and capsys.readouterr().out.count("table") == 2


@pytest.mark.parametrize(
    "changes, again",
    [
        ({}, False),
        ({"text_len": 30}, True),
        ({"prompt_template": "do {task}"}, True),
        ({"threads": 5, "text_weights": "elsewhere"}, False),
    ],
)
def test_texts_are_made_again_where_their_form_changed(config, capsys, changes, again):
    precompute.precompute(config, ("text",))
    other = changed(config, "data", **changes)
    capsys.readouterr()
    precompute.precompute(other, ("text",))
    assert ("wrote 3 prompts" if again else "up to date, 3 prompts") in capsys.readouterr().out
    stored = assets.load_text(assets.assets_directory(other), other)
    assert stored.text_len == other.data.text_len
    assert stored.prompts == tuple(precompute.data_prompts(precompute.Data(other)))


def test_a_new_instruction_is_added_to_the_texts(config, monkeypatch, capsys):
    precompute.precompute(config, ("text",))
    found = recorded(6)
    found[2] = dataclasses.replace(found[2], then="stop")
    monkeypatch.setattr(episodes_lib, "read", lambda config: (found, []))
    capsys.readouterr()
    precompute.precompute(config, ("text",))
    assert "wrote 4 prompts" in capsys.readouterr().out
    wide = changed(config, "model", text_dim=2 * config.model.text_dim)
    precompute.precompute(wide, ("text",))
    assert assets.load_text(assets.assets_directory(wide), wide).dim == wide.model.text_dim
