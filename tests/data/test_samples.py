"""How a record becomes a sample, and which rows validate: by hand, with records made up here."""

import dataclasses
import types

import grain
import numpy as np
import pytest

from lightwam_jax.data import actions as actions_lib
from lightwam_jax.data import loader, normalize
from tests import synthetic


def record(task, state, actions, pad):
    return {
        "latents": np.full((1, 2, 2, 3), task, np.float32),
        "proprio": np.float32(state),
        "actions": np.float32(actions),
        "action_is_pad": np.array(pad),
        "image_is_pad": np.array([False, task > 1]),
        "task": task,
        "start": 99,  # not part of a sample
    }


def samples(**changes):
    """Two records of tasks 2 and 1, a robot of two states and three actions in a larger model."""
    lengths = np.array([1, 2, 3])  # of the prompts
    mask = np.arange(4) < lengths[:, None]
    values = {
        "records": [
            record(2, [1, 2], [[1, 10, 0], [3, 20, 1]], [False, True]),
            record(1, [-4, 100], [[2, 0, 1], [2, 30, 1]], [False, False]),
        ],
        "texts": list(zip(mask[..., None] * np.arange(1, 4)[:, None, None] * np.ones(5), mask)),
        "state": normalize.Normalizer(np.float32([0.5, 0.25]), np.float32([0, 1])),
        "action": normalize.Normalizer(np.float32([2, 0.1, 1]), np.float32([0, 0, -1])),
        "transform": actions_lib.ActionTransform(delta_mask=(True, False, False)),
        "widths": (4, 5),
        "keys": {"dataset": np.int32(6)},
    }
    return loader._Samples(**values | changes)


def test_a_sample_is_its_own_record_text_and_units():
    first, second = samples()[0], samples()[1]
    assert len(samples()) == 2
    assert set(first) == {
        "latents",
        "context",
        "context_mask",
        "proprio",
        "actions",
        "action_is_pad",
        "image_is_pad",
        "index",
        "dataset",
    }
    assert first["context_mask"].tolist() == [True, True, True, False]
    assert second["context_mask"].tolist() == [True, True, False, False]
    assert first["context"][:, 0].tolist() == [3, 3, 3, 0]
    assert second["context"][:, 0].tolist() == [2, 2, 0, 0]
    assert first["proprio"].tolist() == [0.5, 1.5, 0, 0]
    assert second["proprio"].tolist() == [-2, 5, 0, 0]  # clipped
    # The delta of the padded step is 0, the rest as recorded; then the statistics of actions.
    np.testing.assert_allclose(first["actions"], [[2, 1, -1, 0, 0], [0, 2, 0, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(second["actions"], [[4, 0, 0, 0, 0], [4, 3, 0, 0, 0]], rtol=1e-6)
    assert [one["index"] for one in (first, second)] == [0, 1]
    assert [one["dataset"] for one in (first, second)] == [6, 6]
    assert first["latents"][0, 0, 0, 0] == 2 and second["latents"][0, 0, 0, 0] == 1
    assert first["action_is_pad"].tolist() == [False, True]
    assert first["image_is_pad"].tolist() == [False, True]
    assert second["image_is_pad"].tolist() == [False, False]


def test_actions_are_transformed_from_their_own_state_in_physical_units():
    kinds = ("delta_state", "absolute", "delta_previous")
    transform = actions_lib.ActionTransform(action_as=kinds, state_dims=(1, 0, 0))
    got = samples(transform=transform)[0]["actions"]
    # 1 - 2, 3 - 2; as is; 0 - 1, 1 - 0: and then the normaliser
    np.testing.assert_allclose(got, [[-2, 1, -2, 0, 0], [2, 2, 0, 0, 0]], rtol=1e-6)


def run(sets, monkeypatch, **train):
    """A config whose validation sets have so many windows each; their rows are numbers."""
    members = [
        (1.0, [{"dataset": m, "index": i} for i in range(size)]) for m, size in enumerate(sets)
    ]
    monkeypatch.setattr(loader, "_datasets", lambda config, split: members)
    return types.SimpleNamespace(train=types.SimpleNamespace(**train))


def rows(batches):
    return [
        [(int(m), int(i)) if v else None for m, i, v in zip(b["dataset"], b["index"], b["valid"])]
        for b in (batches[k] for k in range(len(batches)))
    ]


def test_validation_windows_are_spread_evenly(monkeypatch):
    config = run([64], monkeypatch, batch_size=8, eval_batches=2)
    # 63 / 15 apart, rounded down
    want = [0, 4, 8, 12, 16, 21, 25, 29, 33, 37, 42, 46, 50, 54, 58, 63]
    got = rows(loader.val_batches(config))
    assert got == [[(0, i) for i in want[:8]], [(0, i) for i in want[8:]]]
    second = rows(loader.val_batches(config, process_index=1, process_count=4))
    assert second == [[(0, 8), (0, 12)], [(0, 42), (0, 46)]]


def test_members_share_validation_and_the_last_batch_is_filled(monkeypatch):
    config = run([3, 9], monkeypatch, batch_size=4, eval_batches=3)  # at most 6 of each
    want = [(0, 0), (0, 1), (0, 2), *((1, i) for i in (0, 1, 3, 4, 6, 8))]
    batches = loader.val_batches(config)
    assert rows(batches) == [want[:4], want[4:8], [want[8], None, None, None]]
    filler = [(int(m), int(i)) for m, i in zip(batches[2]["dataset"], batches[2]["index"])]
    assert filler == [want[8], *want[:3]]
    last = loader.val_batches(config, process_index=1, process_count=2)
    assert rows(last) == [want[2:4], want[6:8], [None, None]]
    one = run([3, 9], monkeypatch, batch_size=1, eval_batches=1)
    assert rows(loader.val_batches(one)) == [[(0, 0)], [(1, 0)]], "each member shows something"
    for sets, batches in (([], 3), ([5], 0)):
        nothing = run(sets, monkeypatch, batch_size=4, eval_batches=batches)
        assert len(loader.val_batches(nothing)) == 0


def test_members_without_windows_are_left_out_and_numbers_stay(monkeypatch):
    entries = {name: {"path": name, "weight": w} for name, w in (("a", 1.0), ("b", 2.5))}
    config = synthetic.make_config("", **{"data.mixture": entries})
    held = {"a": [], "b": [1, 2]}
    monkeypatch.setattr(loader, "_records", lambda config, split: (held[config.data.path], [split]))
    monkeypatch.setattr(
        loader, "_samples", lambda config, _, records, tasks, keys: (config.data.path, tasks, keys)
    )
    assert loader._datasets(config, "val") == [(2.5, ("b", ["val"], {"dataset": np.int32(1)}))]
    assert [name for _, (name, *_) in loader._datasets(config, "train")] == ["b"]
    held["a"] = [7]
    weights, found = zip(*loader._datasets(config, "train"))
    assert weights == (1.0, 2.5)
    assert found == (("a", ["train"], {"dataset": 0}), ("b", ["train"], {"dataset": 1}))


def test_random_records_are_functions_of_seed_split_and_row():
    config = synthetic.make_config("", **{"data.source": "fake"})
    train, val = (loader._FakeRecords(config, split) for split in ("train", "val"))
    other = loader._FakeRecords(dataclasses.replace(config, seed=config.seed + 1), "train")
    assert (len(train), len(val)) == (1024, 64)
    states = [
        records[row]["proprio"].tolist()
        for records, row in ((train, 0), (train, 1), (val, 0), (other, 0))
    ]
    assert len({tuple(state) for state in states}) == 4
    assert train[0]["proprio"].tolist() == states[0]


@pytest.mark.parametrize(
    "workers, threads, prefetch, batches",
    [(0, 2, 8, 2), (0, 2, 9, 3), (0, 5, 8, 5), (2, 0, 40, 5), (2, 0, 41, 6), (0, 0, 0, 2)],
)
def test_samples_are_read_ahead_by_whole_batches(monkeypatch, workers, threads, prefetch, batches):
    """Four samples each; every worker process has a buffer of its own."""
    config = synthetic.make_config("", **{"data.source": "fake", "train.batch_size": 4})
    data = dataclasses.replace(config.data, workers=workers, threads=threads, prefetch=prefetch)
    asked = []

    class Stop(Exception):
        pass

    def options(**given):
        asked.append(given)
        raise Stop

    monkeypatch.setattr(grain, "ReadOptions", options)
    with pytest.raises(Stop):
        loader.train_loader(dataclasses.replace(config, data=data))
    assert asked == [{"num_threads": threads, "prefetch_buffer_size": batches}]


@pytest.mark.parametrize("size, processes, rows", [(8, 1, 8), (8, 4, 2), (8, 8, 1)])
def test_processes_have_equally_many_rows(size, processes, rows):
    config = types.SimpleNamespace(train=types.SimpleNamespace(batch_size=size))
    assert loader._rows_per_process(config, processes) == rows
    with pytest.raises(ValueError, match="batch_size=8 does not divide over 16 processes"):
        loader._rows_per_process(config, 16)
