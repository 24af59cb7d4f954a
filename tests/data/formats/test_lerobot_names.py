"""Names of a LeRobot dataset's action dimensions."""

import json

import pytest

from lightwam_jax.data.formats import lerobot_names
from lightwam_jax.evaluation import stitched
from tests.inference.test_policy import make_config


def names(root, features, **fields):
    (root / "meta").mkdir()
    info = json.dumps({"features": features}) if isinstance(features, dict) else features
    (root / "meta" / "info.json").write_text(info, encoding="utf-8")
    given = {"source": "lerobot", "path": f"{root}, {root}/other"}
    if fields:
        given["fields"] = {"action": fields["action"]}
    config = make_config(given)
    return lerobot_names.of_actions(config), stitched.names(config)


@pytest.mark.parametrize(
    "stored", [list("xyzg"), {"motors": list("xyzg")}, [["x", "y"], ["z", "g"]]]
)
def test_names_in_every_shape_they_are_written(tmp_path, stored):
    found, shown = names(tmp_path, {"action": {"names": stored}})
    assert found == tuple("xyzg") and shown == ("x [0]", "y [1]", "z [2]", "g [3]")


def test_names_are_cut_and_joined_as_the_columns_are(tmp_path):
    features = {"arm": {"names": list("abcdef")}, "hand": {"names": ["grip"]}}
    found, _ = names(tmp_path, features, action=("arm[:, 2:5]", "hand"))
    assert found == ("c", "d", "e", "grip")


@pytest.mark.parametrize("features", [{}, {"action": {"names": None}}, {"action": 3}, "{broken"])
def test_without_names_the_dimensions_have_numbers(tmp_path, features):
    found, shown = names(tmp_path, features)
    assert found == () and shown == ("action[0]", "action[1]", "action[2]", "action[3]")


def test_names_of_another_width_are_not_used(tmp_path):
    found, shown = names(tmp_path, {"action": {"names": ["all motors"]}})
    assert found == ("all motors",) and shown[3] == "action[3]"
