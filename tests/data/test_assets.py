"""Which statistics and texts belong to a config; the two normalisers of a run are not mixed up."""

import dataclasses

import numpy as np
import pytest

from lightwam_jax import atomic
from lightwam_jax.data import assets, normalize
from lightwam_jax.data.caches import text as text_cache
from lightwam_jax.encoders import text as text_lib
from tests import synthetic


def changed(config, **values):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **values))


@pytest.fixture
def config(tmp_path):
    """With statistics of eight states and seven actions in its assets."""
    made = synthetic.make_config(tmp_path)
    statistics = normalize.fit_statistics(synthetic.make_episodes(3), 8)
    statistics["made_from"] = {"config": assets.statistics_keys(made)}
    atomic.write_json(str(tmp_path / "dataset_stats.json"), statistics)
    return made


def test_states_and_actions_have_statistics_of_their_own(config, tmp_path):
    statistics, state, action = assets.load_normalizers(str(tmp_path), config)
    for name, made in (("state", state), ("action", action)):
        low = np.float32(statistics[name]["default"]["global_min"])
        high = np.float32(statistics[name]["default"]["global_max"])
        np.testing.assert_allclose(made.normalize(low), -1, atol=1e-5)
        np.testing.assert_allclose(made.normalize(high), 1, atol=1e-5)
    assert (len(state.scale), len(action.scale)) == (8, 7)


@pytest.mark.parametrize(
    "key, value",
    [
        ("action_horizon", 16),
        ("action_as", ("delta_state",) * 7),
        ("action_state_dims", (0,) * 7),
        ("gripper_dims", (6,)),
        ("gripper_closed_open", (1.0, -1.0)),
    ],
)
def test_statistics_of_actions_in_another_form_are_refused(config, tmp_path, key, value):
    with pytest.raises(ValueError) as error:
        assets.load_normalizers(str(tmp_path), changed(config, **{key: value}))
    lines = str(error.value).splitlines()[1:-1]
    (line,) = lines
    assert line.strip().startswith(f"config.data.{key}: statistics ")
    shown = list(value) if isinstance(value, tuple) else value
    assert line.endswith(f", config {shown!r}")
    statistics = normalize.read_statistics(str(tmp_path / "dataset_stats.json"), 8, 7)
    del statistics["made_from"]
    atomic.write_json(str(tmp_path / "dataset_stats.json"), statistics)
    assets.load_normalizers(str(tmp_path), changed(config, **{key: value}))  # put there by hand


def test_an_embodiment_has_a_file_of_its_own():
    config = synthetic.make_config("there")
    assert assets.statistics_file(config) == "dataset_stats.json"
    arm = changed(config, embodiment="arm")
    assert assets.statistics_file(arm) == "dataset_stats_arm.json"
    assert assets.assets_directory(config) == "there/cache/assets"
    assert assets.assets_directory(changed(config, source="fake")) is None


def test_texts_of_another_encoder_width_or_template_are_refused(tmp_path):
    config = synthetic.make_config(tmp_path)
    width, template = config.model.text_dim, config.data.prompt_template
    encoder = text_lib.HashedTextEncoder(width)
    text_cache.write_cache(str(tmp_path / "text"), encoder, ["go"], 24, "hashed", template)
    assert assets.load_text(str(tmp_path), config).prompts == ("go",)
    wide = dataclasses.replace(config.model, text_dim=2 * width)
    for other, line in (
        (changed(config, text_encoder="umt5"), "text_encoder: cache 'hashed', config 'umt5'"),
        (changed(config, prompt_template="{task}!"), "config '{task}!'"),
        (dataclasses.replace(config, model=wide), f"text_dim: cache {width}, config {2 * width}"),
    ):
        with pytest.raises(ValueError) as error:
            assets.load_text(str(tmp_path), other)
        assert str(error.value).count("config.") == 1 and line in str(error.value)
