"""Key tables: which is chosen for a policy, and what of a request goes where."""

import json

import numpy as np
import pytest

from lightwam_jax.inference import keys, observations, wire
from tests import served

LIBERO = ("image", "wrist_image")
ALOHA = ("cam_high", "cam_left_wrist", "cam_right_wrist")
DROID = ("exterior_image_1_left", "wrist_image_left")
IMAGE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def names(*arguments):
    return [table.name for table in keys.choose(*arguments)]


def test_auto_finds_the_robot_whose_cameras_and_state_fit():
    assert names("auto", LIBERO, 8) == ["openpi_libero", "lightwam"]
    assert names("auto", ALOHA, 14) == ["openpi_aloha", "lightwam"]
    assert names("auto", DROID, 8) == ["openpi_droid", "lightwam"]
    assert names("auto", LIBERO, 9) == ["lightwam"]
    assert names("auto", ("scene", "wrist"), 8) == ["lightwam"]
    assert names("lerobot", ("scene",), 3) == ["lerobot", "lightwam"]
    assert names("lightwam", LIBERO, 8) == ["lightwam"]


def test_auto_does_not_choose_between_two(monkeypatch):
    twin = keys._ROBOTS["openpi_libero"]._replace(name="twin")
    monkeypatch.setitem(keys._ROBOTS, "twin", twin)
    with pytest.raises(ValueError, match="openpi_libero, twin fit this policy: name one"):
        keys.choose("auto", LIBERO, 8)


def test_a_table_that_does_not_fit_is_refused_at_the_start():
    for arguments, message in (
        (("openpi_libero", ("scene",), 8), "it has no camera scene"),
        (("openpi_libero", LIBERO, 7), "its state has 8 numbers, the policy's 7"),
        (
            ("openpi_libero", LIBERO, 8, ("flip_vertical", "")),
            "comes rotate_180, the policy's data are flip_vertical",
        ),
        (("pi0", LIBERO, 8), "is no key table; expected auto, one of lightwam, lerobot"),
    ):
        with pytest.raises(ValueError, match=message):
            keys.choose(*arguments)


def test_a_file_overrides_camera_by_camera(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(
        json.dumps(
            {"images": {"wrist": ["obs.hand", "chw", "flip_vertical"]}, "state": ["a", "b.c"]}
        ),
        encoding="utf-8",
    )
    table = keys.choose(str(path), ("scene", "wrist"), 3)[0]
    request = {"images": {"scene": 1}, "obs/hand": 2, "a": 3, "b": {"c": 4}, "prompt": "go"}
    images, state, prompt, extra = keys.read(request, table, ("scene", "wrist"))
    assert images == {"scene": 1, "wrist": 2} and state == [3, 4]
    assert prompt == "go" and extra == []
    for content, message in (
        ({"cameras": {}}, "other keys than"),
        ({"images": {"wrist": ["x", "bgr"]}}, "images.wrist is"),
        ({"state": "s"}, None),
        ({"state": []}, "expected a list of paths"),
    ):
        path.write_text(json.dumps(content), encoding="utf-8")
        if message:
            with pytest.raises(ValueError, match=message):
                keys.from_file(path, ("scene", "wrist"))


def test_paths_are_flat_or_nested_dotted_or_slashed():
    for request in (
        {"a.b.c": 1},
        {"a/b/c": 1},
        {"a": {"b": {"c": 1}}},
        {"a.b": {"c": 1}},
        {"a": {"b/c": 1}},
        {"a": 2, "a/b": {"c": 1}},
        {"a": {"x": 0}, "a.b": {"c": 1}},
    ):
        assert keys.find(request, "a.b.c")[0] == keys.find(request, "a/b/c")[0] == 1
    for request in ({"a": 1}, {"a": {"b": 1}}, {"b.c": 1}, {}):
        assert keys.find(request, "a.b.c") == (None, None)


def test_a_request_is_read_by_the_table_it_follows():
    tables = keys.choose("auto", LIBERO, 8)
    theirs = {"observation/image": 1, "observation/wrist_image": 2, "observation/state": 3}
    ours = {"images": {"image": 1, "wrist_image": 2}, "state": 3}
    assert keys.table_of(theirs, tables, LIBERO).name == "openpi_libero"
    assert keys.table_of(ours, tables, LIBERO).name == "lightwam"
    assert keys.table_of({}, tables, LIBERO).name == "openpi_libero"
    with pytest.raises(wire.WireError, match=r"no camera 'image'.*table openpi_libero"):
        keys.read({}, tables[0], LIBERO)


def test_edits():
    for a, b, count in (
        ("prompt", "promt", 1),
        ("", "abc", 3),
        ("same", "same", 0),
        ("ab", "ba", 2),
    ):
        assert keys.edits(a, b) == keys.edits(b, a) == count
    rng = np.random.default_rng(0)

    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        least = min(slow(a[1:], b), slow(a, b[1:])) + 1
        return min(least, slow(a[1:], b[1:]) + (a[0] != b[0]))

    for _ in range(50):
        a, b = ("".join(rng.choice(list("abc"), rng.integers(0, 6))) for _ in range(2))
        assert keys.edits(a, b) == slow(a, b)


@pytest.mark.parametrize("orientation", ["", "rotate_180", "rotate_90", "rotate_270"])
def test_what_the_client_has_turned_is_not_turned_again(orientation):
    """The policy turns by config.data.orientation; so the picture must come as recorded."""
    from lightwam_jax.data import cameras

    data = served.config(("a",), orientation=(orientation,)).data
    turned = keys.Camera("images.a", "hwc", orientation)
    for entry, sent in (
        (turned, cameras.ORIENTATIONS[orientation](IMAGE)),
        (turned._replace(turned=""), IMAGE),
    ):
        table = keys.Table("t", {"a": entry}, ("state",), "prompt")
        reader = observations.Reader(observations.Rules((table,), data, 5))
        request = {"images": {"a": sent}, "state": np.zeros(5), "prompt": "go"}
        read = reader.read(request)
        np.testing.assert_array_equal(read.images["a"], IMAGE)
        laid = cameras.oriented({"a": read.images["a"][None]}, data)["a"][0]
        np.testing.assert_array_equal(laid, cameras.ORIENTATIONS[orientation](IMAGE))


def test_data_recorded_as_the_client_sends_them_stay_as_sent():
    data = served.config(LIBERO, state=8).data
    tables = keys.choose("openpi_libero", LIBERO, 8)
    reader = observations.Reader(observations.Rules(tables, data, 8))
    sent = {f"observation/{name}": IMAGE for name in LIBERO}
    read = reader.read(sent | {"observation/state": np.zeros(8), "prompt": "go"})
    np.testing.assert_array_equal(read.images["image"], IMAGE)
