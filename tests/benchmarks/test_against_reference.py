"""The comparison with the PyTorch reference: who runs when, and what is made of it."""

import pytest

from benchmarks import against_reference


def test_turns_alternate_and_medians_are_compared(capsys):
    order = []

    def turn(side, case, dtype):
        order.append((side, case, dtype))
        later = len(order) > 2
        seconds = [1.0 + later, 1.5] if side == "ours" else [4.0, 4.0 + later, 9.0]
        return {"seconds": seconds, "peak_gib": float(len(order))}

    (row,) = against_reference.run(["inference_1"], ["float32"], 2, turn)
    assert order == [(side, "inference_1", "float32") for side in ("ours", "reference") * 2]
    assert row["ours"] == {"median_s": 1.5, "seconds": [[1.0, 1.5], [2.0, 1.5]], "peak_gib": 3.0}
    assert row["reference"]["median_s"] == 4.5 and row["ratio"] == pytest.approx(1.5 / 4.5)
    assert "ours 1.500 s  reference 4.500 s  ratio 0.333" in capsys.readouterr().out


def test_what_one_of_them_cannot_do_is_said_and_has_no_ratio(capsys):
    calls = []

    def turn(side, case, dtype):
        calls.append(side)
        no = {"failed": "NotImplementedError: avg_pool3d"}
        return no if side == "reference" else {"seconds": [1.0], "peak_gib": 1.0}

    (row,) = against_reference.run(["training_1"], ["bfloat16"], 2, turn)
    assert calls == ["ours", "reference"]  # it is not tried again
    assert row["reference"] == {"failed": "NotImplementedError: avg_pool3d"}
    assert "ratio" not in row and "no ratio" in capsys.readouterr().out


@pytest.mark.parametrize("case", against_reference.CASES)
def test_both_get_the_same_sizes(case):
    config = against_reference.config_of(case, "bfloat16", layers=5)
    assert config.model.num_layers == 5 and config.model.adapter_layers == (0, 1, 4)
    assert config.model.dtype == config.model.frozen_dtype == "bfloat16"
    assert config.model.dim == 1536  # nothing else is smaller
    if case == "training_1":
        assert config.train.batch_size == 1
    whole = against_reference.config_of(case, "float32", layers=0)
    assert whole.model.num_layers == 30 and whole.data.canvas == (224, 448)
