"""The skew check: clean where nothing is wrong, and every planted mistake found and named."""

import contextlib
import io
import json

import jax
import numpy as np
import pytest
from PIL import Image

from lightwam_jax import build, precompute
from lightwam_jax.data import assets as assets_lib
from lightwam_jax.data import episodes as episodes_lib
from lightwam_jax.inference import keys as keys_lib
from lightwam_jax.inference import observations, skew_check, skew_report, skew_windows, wire
from lightwam_jax.inference import policy as policy_lib
from tests import served, synthetic
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
    assert json.loads((tmp_path / "skew.json").read_text(encoding="utf-8"))["verdict"] == "pass"
    assert "The server acts as training would." in (tmp_path / "skew.html").read_text(
        encoding="utf-8"
    )
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
    assert result.first == "actions normalised"
    assert name in result.causes[0].name and result.causes[0].explained > 0.95


def test_a_servers_own_template_is_named(policy, config):
    other = skew_windows.deployed_form(policy).with_prompt_template("Task: {task}")
    with contextlib.closing(skew_check.InProcess(other, limits="none")) as server:
        result = check(policy, config, server)
    assert (result.verdict, result.first) == ("fail", "context + mask")
    assert "another prompt template: 'Task: {task}'" in result.causes[0].name


class Changed:
    """A server whose replies and metadata are changed on their way."""

    def __init__(self, server, change, **metadata):
        self.server, self.change = server, change
        self.metadata = server.metadata | metadata

    def infer(self, request):
        return self.change(self.server.infer(request))


def test_other_statistics_another_checkpoint_and_nothing_known_are_told_apart(
    policy, config, server
):
    units = Changed(server, lambda reply: reply | {"actions": 0.9 * reply["actions"] + 0.1})
    result = check(policy, config, units)
    assert (result.verdict, result.first) == ("fail", "actions normalised")
    assert "other statistics or units of the actions: action[0] is 0.9 x +0.1" in str(result.causes)
    same = Changed(server, lambda reply: reply, weights_hash="00000001")
    result = skew_check.check(policy, config, same, COUNT, checksum="00000002")
    assert "another checkpoint: the server's is 00000001" in result.causes[0].name
    rng = np.random.default_rng(0)
    noise = lambda reply: reply["actions"] + rng.normal(0, 0.1, reply["actions"].shape)
    odd = Changed(server, lambda reply: reply | {"actions": noise(reply)})
    result = check(policy, config, odd)
    assert result.verdict == "fail" and not result.causes
    assert "no known mistake explains the actions" in result.notes[0]


def test_bfloat16_is_judged_by_its_own_limit(policy, config, server):
    spread = np.ptp(check(policy, config, server).planned)

    def verdict(share, dtype):
        shift = np.float32(share * spread) / np.abs(policy.assets.action.scale)
        moved = Changed(server, lambda r: r | {"actions": r["actions"] + shift}, dtype=dtype)
        stages = {stage.name: stage for stage in check(policy, config, moved).stages}
        return stages["actions normalised"].verdict

    assert [verdict(share, "float32") for share in (5e-4, 5e-3, 2e-2)] == ["pass", "report", "fail"]
    assert [verdict(share, "bfloat16") for share in (5e-3, 2e-2)] == ["pass", "fail"]


def test_what_the_guard_changes_is_reported_and_is_no_failure(policy, config):
    deployed = skew_windows.deployed_form(policy)
    with contextlib.closing(skew_check.InProcess(deployed)) as server:  # training's range
        result = check(policy, config, server)
        assert result.verdict == "report" and "the server's guard changed" in str(result.causes)
        silent = Silent(server)
        result = check(policy, config, silent)
        assert result.verdict == "report" and "the server's guard changed" in str(result.causes)


def test_order_and_units_of_single_numbers_of_the_state(policy, config, server):
    def turned(window, request):
        return request | {"state": np.roll(request["state"], 1)}

    def degrees(window, request):
        state = request["state"].copy()
        state[2] = np.degrees(state[2])
        return request | {"state": state}

    result = check(policy, config, server, turned)
    assert "order of the state: its places hold dimensions [7, 0, 1" in result.causes[0].name
    result = check(policy, config, server, degrees)
    assert "state[2] is 57.3 x" in result.causes[0].name and "degrees" in result.causes[0].name


# ---- windows and requests ------------------------------------------------------------------------


def test_windows_are_spread_over_episodes_and_tasks(policy, config):
    windows = skew_windows.draw(config, policy, 6)
    assert len({window.name for window in windows}) == 6
    assert len({window.episode.id for window in windows}) == 3  # all that are held out
    assert {window.moment().prompt for window in windows} == set(synthetic.TASKS)
    for window in windows:
        moment = window.moment()
        np.testing.assert_array_equal(moment.state, window.episode.state[window.start])
        assert window.moment(100).images["scene"].tobytes() == (
            window.episode.images["scene"][0].tobytes()
        )


@pytest.mark.parametrize("name", ["openpi_libero", "openpi_droid", "openpi_aloha", "lerobot"])
def test_a_composed_request_is_read_back(name):
    rng = np.random.default_rng(0)
    cameras = {
        "openpi_libero": ("image", "wrist_image"),
        "openpi_droid": ("exterior_image_1_left", "wrist_image_left"),
        "openpi_aloha": ("cam_high", "cam_left_wrist", "cam_right_wrist"),
        "lerobot": ("top",),
    }[name]
    width = {"openpi_aloha": 14}.get(name, 8)
    turned = ("rotate_180",) * 2 if name == "openpi_libero" else ()
    data = served.config(cameras=cameras, state=width, orientation=turned).data
    tables = keys_lib.choose(name, cameras, width, turned)
    images = {camera: rng.integers(0, 256, (5, 7, 3), np.uint8) for camera in cameras}
    state = rng.normal(size=width).astype(np.float32)
    described = wire.decode(wire.encode(keys_lib.describe(tables[0], cameras)))
    request = keys_lib.compose(described, images, state, "a task", dict(zip(cameras, turned)))
    reader = observations.Reader(observations.Rules(tables, data, width))
    seen = reader.read(wire.decode(wire.encode(request)))
    for camera, image in images.items():
        np.testing.assert_array_equal(seen.images[camera], image)
    np.testing.assert_array_equal(seen.state, state)
    assert seen.prompt == "a task" and not reader.extra
