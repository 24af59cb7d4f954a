"""The benchmark of the canvas compares two ways to the same canvas."""

import types

from benchmarks import canvas


def test_both_ways_lead_to_the_same_canvas():
    data = types.SimpleNamespace(
        cameras=("a", "b"), orientation=(), camera_size=(8, 8), layout="horizontal", canvas=(8, 16)
    )
    found = canvas.measure(data, batch=2, size=(12, 10), rounds=1)
    assert found.pop("batch") == 2 and 0 < found.pop("error") < 1e-6
    assert set(found) == {"pillow_ms", "host_ms", "transfer_ms", "device_ms"}
    assert all(0 < times["fastest"] <= times["median"] for times in found.values())
