"""Options come from flags of the same names, and contradictions end the start."""

import dataclasses

import numpy as np
import pytest
from absl import flags

from lightwam_jax.inference import server, serving_options
from tests import served


def parsed(*argv):
    values = flags.FlagValues()

    class Defining:
        def __getattr__(self, name):
            return lambda *given: getattr(flags, name)(*given, flag_values=values)

    serving_options.define_flags(Defining())
    values(["server", *argv])
    return serving_options.from_flags(values, weights_hash="abc")


def test_every_option_has_a_flag_with_its_default_and_help():
    assert parsed() == serving_options.Options(weights_hash="abc")
    assert all(f.metadata["help"] for f in dataclasses.fields(serving_options.Options))
    given = parsed("--exact", "--max_batch=4", "--image_sizes=480x640,24x32", "--fps=20")
    assert given.exact and given.max_batch == 4 and given.fps == 20
    assert given.image_sizes == ((480, 640), (24, 32))


def test_what_cannot_be_is_refused():
    for argv, message in (
        ("--max_batch=3", "expected one of"),
        ("--guard=maybe", "guard is 'maybe'"),
        ("--frozen=no", "frozen is 'no'"),
        ("--image_sizes=640", "expected HEIGHTxWIDTH"),
    ):
        with pytest.raises(ValueError, match=message):
            parsed(argv)


def test_a_gripper_is_snapped_once():
    snapped = served.config(gripper_dims=(3,), gripper_snap=True)
    options = serving_options.Options(gripper="snap")
    with pytest.raises(ValueError, match="the policy snaps its grippers itself"):
        serving_options.make_guard(served.StandIn(snapped), options)
    with pytest.raises(ValueError, match=r"needs config\.data\.gripper_dims"):
        serving_options.make_guard(served.StandIn(), options)
    guard = serving_options.make_guard(served.StandIn(served.config(gripper_dims=(3,))), options)
    assert guard.gripper.dims == (3,) and guard.gripper.mode == "snap"


def test_a_position_gripper_closes_fully_near_closed():
    policy = served.StandIn(served.config(gripper_dims=(3,), gripper_closed_open=(0.0, 0.08)))
    options = serving_options.Options(gripper_closed_within=0.005)
    guard = serving_options.make_guard(policy, options)
    chunk = np.full((served.HORIZON, 4), 0.004)
    chunk[1, 3] = 0.006
    plan, changed = guard.check(chunk)
    assert plan[:, 3].tolist() == [0, np.float32(0.006), *[0] * 6] and (plan[:, :3] > 0).all()
    assert changed["snapped"].tolist() == [0, 0, 0, 7]
    with pytest.raises(ValueError, match=r"--gripper_closed_within=0\.005 needs config\.data"):
        serving_options.make_guard(served.StandIn(), options)
    snapped = served.StandIn(served.config(gripper_dims=(3,), gripper_snap=True))
    with pytest.raises(ValueError, match="snaps its grippers itself"):
        serving_options.make_guard(snapped, options)
    with pytest.raises(ValueError, match="gripper_closed_within is -1"):
        parsed("--gripper_closed_within=-1")


def test_the_control_rate_is_the_datas_unless_said():
    recorded, older = (served.StandIn(statistics=s) for s in ({"fps": 10.0}, {}))
    rate = lambda policy, **given: serving_options.control_rate(
        policy, serving_options.Options(**given)
    )
    assert [rate(recorded), rate(recorded, fps=25.0), rate(older)] == [10, 25, 0]


def test_limits_are_the_trainings_range_unless_said(tmp_path):
    policy = served.StandIn(statistics=served.STATISTICS)
    make = lambda **given: serving_options.make_guard(policy, serving_options.Options(**given))
    assert make().limits.as_dict()["high"] == pytest.approx([1.2] * 4)
    assert make(limits="none").limits.as_dict()["high"] == [None] * 4
    path = tmp_path / "limits.json"
    path.write_text('{"high": [0.5, null, null, "none"]}', encoding="utf-8")
    found = make(limits=str(path)).limits.as_dict()["high"]
    assert found == [0.5, pytest.approx(1.2), pytest.approx(1.2), None]


def test_the_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    path = tmp_path / "key"
    path.write_text("secret\n", encoding="utf-8")
    monkeypatch.setenv("LIGHTWAM_API_KEY", "other")
    assert server._key(str(path)) == "secret" and server._key("") == "other"
    monkeypatch.delenv("LIGHTWAM_API_KEY")
    assert server._key("") == ""


def test_image_sizes_named_at_the_start_are_compiled_there():
    policy = served.StandIn()
    with served.serving(policy, image_sizes=((24, 32),)) as running:
        assert policy.sizes == [{"scene": (24, 32), "wrist": (24, 32)}]
        with running.connect() as socket:
            running.ask(socket, served.observe(size=(24, 32)))
        assert len(policy.sizes) == 1
