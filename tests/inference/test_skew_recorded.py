"""The skew check on recorded traffic."""

import contextlib

import numpy as np
import pytest

from lightwam_jax.inference import recorder, skew_check, skew_recorded, skew_windows, wire
from tests.inference.test_skew import MISTAKES, config, policy  # noqa: F401 (fixtures)


def recorded(policy, config, directory, change=None, replay=True):  # noqa: F811
    """What a server records while a robot replays windows, or shows moments of its own."""
    windows = skew_windows.draw(config, policy, 4)
    deployed = skew_windows.deployed_form(policy)
    options = {"limits": "none", "debug": False, "weights_hash": "00000001"}
    kept = recorder.Recorder(directory, 2**30)
    with (
        contextlib.closing(kept),
        contextlib.closing(skew_check.InProcess(deployed, **options)) as server,
    ):
        kept.metadata = lambda: server.service.metadata
        server.service.listeners.append(kept)
        for window in windows:
            moment = window.moment()
            state = moment.state if replay else moment.state + np.float32(0.05)
            request = {f"images.{camera}": image for camera, image in moment.images.items()}
            request |= {"state": state, "prompt": moment.prompt}
            server.infer(change(window, request) if change else request)
    return skew_recorded.check(policy, config, directory, 64, checksum="00000001")


def test_replayed_windows_are_compared_with_themselves(policy, config, tmp_path):  # noqa: F811
    result = recorded(policy, config, tmp_path / "right")
    assert result.verdict == "pass" and result.what == "replayed windows"
    assert len(result.stages[-1].rows) == 4
    assert result.about["server"]["weights_hash"] == "00000001"  # its metadata were kept
    result = recorded(policy, config, tmp_path / "wrong", MISTAKES["BGR"])
    assert (result.verdict, result.first) == ("fail", "raw frame")
    assert "BGR" in result.causes[0].name


def test_other_traffic_is_compared_by_its_replies_and_looks(policy, config, tmp_path):  # noqa: F811
    result = recorded(policy, config, tmp_path / "right", replay=False)
    assert result.verdict == "pass" and result.what == "recorded requests" and not result.causes
    with pytest.raises(ValueError, match="holds no request that was answered"):
        skew_recorded.check(policy, config, tmp_path / "none", 4)
    result = recorded(policy, config, tmp_path / "wrong", MISTAKES["BGR"], replay=False)
    assert "red and blue swapped (BGR)" in result.causes[0].name


def test_stages_are_told_only_where_the_server_may(policy, config):  # noqa: F811
    (window,) = skew_windows.draw(config, policy, 1)
    moment = window.moment()
    request = {"images": moment.images, "state": moment.state, "prompt": moment.prompt}
    deployed = skew_windows.deployed_form(policy)
    with contextlib.closing(skew_check.InProcess(deployed, debug=False)) as server:
        assert "stages" not in server.infer({**request, "stages": True})
        with pytest.raises(wire.WireError, match="stages is 'yes'; send true or false"):
            server.infer({**request, "stages": "yes"})
