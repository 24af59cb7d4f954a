"""The skew check: clean where nothing is wrong, and every planted mistake found and named."""

import io
import json

import jax
import numpy as np
import pytest
from PIL import Image

from lightwam_jax import build, precompute
from lightwam_jax.data import assets as assets_lib
from lightwam_jax.data import episodes as episodes_lib
from lightwam_jax.inference import policy as policy_lib
from lightwam_jax.inference import (
    skew_check,
    skew_report,
    skew_windows,
)
from tests import synthetic
from tests.inference.test_policy import random_params

COUNT = 4


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    sizes = {"num_layers": 2, "lora_layers": (0, 1), "adapter_layers": (0, 1), "dtype": "float32"}
    overrides = {f"model.{name}": value for name, value in sizes.items()}
    overrides |= {"data.prompt_template": "do this: {task}", "evaluation.replan_steps": 4}
    made = synthetic.make_config(tmp_path_factory.mktemp("data"), **overrides)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(episodes_lib, "read", lambda config: (synthetic.make_episodes(10), []))
        precompute.precompute(made, ("stats", "text", "latents"))
        yield made


@pytest.fixture(scope="module")
def policy(config):
    model = build.build_model(config.model)
    params = jax.tree_util.tree_map_with_path(_lively, random_params(model, config.model, 1))
    assets = assets_lib.load_assets(assets_lib.assets_directory(config), config)
    return policy_lib.Policy(model, params, config, assets, step=7)


def _lively(path, values):
    """Random weights whose plans depend on every input: no large constants, no small products."""
    if values.ndim >= 2:
        return 1.5 * values
    return values / 3 + np.float32(path[-1].key == "scale")


@pytest.fixture(scope="module")
def server(policy):
    # Random weights plan beyond the training's range, which the guard would cut.
    made = skew_check.InProcess(skew_windows.deployed_form(policy), limits="none")
    yield made
    made.close()


class Silent:
    """A server that tells no stages and makes the mistakes of an adapter by itself."""

    def __init__(self, server, adapter=None):
        self.server, self.metadata, self.adapter = server, server.metadata, adapter
        self.window = None

    def infer(self, request):
        if self.adapter is not None:
            request = self.adapter(self.window, request)
        return self.server.infer({**request, "stages": False})

    def see(self, window, request):
        """The adapter of the check, which changes nothing and tells which window comes."""
        self.window = window
        return request


def each_image(function):
    def adapter(window, request):
        images = {name: function(request[f"images.{name}"]) for name in ("scene", "wrist")}
        return request | {f"images.{name}": image for name, image in images.items()}

    return adapter


def jpeg(image, quality=90):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def smaller_and_back(image):
    how = Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(image).resize((24, 24), how).resize((32, 32), how))


def swapped(window, request):
    scene, wrist = request["images.scene"], request["images.wrist"]
    return request | {"images.scene": wrist, "images.wrist": scene}


def a_step_late(window, request):
    before = window.moment(1)
    images = {f"images.{camera}": image for camera, image in before.images.items()}
    return request | images | {"state": before.state}


MISTAKES = {
    "BGR": each_image(lambda image: image[..., ::-1]),
    "flipped upside down": each_image(lambda image: image[::-1]),
    "cameras 'scene' and 'wrist' swapped": swapped,
    "resized before sending (24x24 and back, bilinear)": each_image(smaller_and_back),
    "JPEG, quality about 90": each_image(jpeg),
    "stale: observation of 1 step before": a_step_late,
    "units of the state: millimetres for metres": lambda window, request: (
        request | {"state": request["state"] * 1000}
    ),
    "another prompt template: 'Task: {task}'": lambda window, request: (
        request | {"prompt": f"Task: {request['prompt']}"}
    ),
}


def check(policy, config, server, adapter=None):
    return skew_check.check(policy, config, server, COUNT, adapter=adapter)


def test_clean_where_nothing_is_wrong(policy, config, server, tmp_path):
    result = check(policy, config, server)
    assert [stage.verdict for stage in result.stages] == ["pass"] * 7
    assert (result.first, result.causes, result.notes) == (None, [], [])
    assert result.stages[-1].largest < 1e-4
    skew_report.write(tmp_path, result, result.canvases)
    assert json.loads((tmp_path / "skew.json").read_text())["verdict"] == "pass"
    assert "The server acts as training would." in (tmp_path / "skew.html").read_text()
    assert skew_report.line(result).startswith("skew        pass: 4 windows in process")
    silent = check(policy, config, Silent(server))
    assert silent.verdict == "pass" and "did not tell" in silent.recomputed


FIRST = {"units": "proprio", "another": "context + mask"}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_robots_mistake_is_found_and_named(name, policy, config, server):
    result = check(policy, config, server, MISTAKES[name])
    assert result.verdict == "fail"
    assert result.first == FIRST.get(name.split()[0], "raw frame")
    cause = result.causes[0]
    assert name in cause.name and cause.stage == result.first and cause.explained > 0.95


@pytest.mark.parametrize("name", MISTAKES)
def test_a_servers_mistake_is_named_from_its_actions_alone(name, policy, config, server):
    silent = Silent(server, MISTAKES[name])
    if name.startswith("another"):  # what the template of the config makes of it, again
        name = "another prompt template"
    result = check(policy, config, silent, silent.see)
    print(skew_report.line(result), skew_report.text(result))
    assert result.first == "actions normalised"
    assert name in result.causes[0].name and result.causes[0].explained > 0.95
