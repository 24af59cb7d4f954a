"""The table of both action heads: sizes as published, FLOPs by hand, and what it does not know."""

import pytest

from benchmarks import paper_table, paper_table_text
from configs import base
from lightwam_jax import config as config_lib
from lightwam_jax.training import step as step_lib

# Parameters, VAE included, and of them trained (docs/spec.md sections 14 and 16).
COUNTS = {
    "light_wam": (1_986_819_434, 441_031_543),
    "flow_dit_frozen": (2_188_864_058 + 87_490_560, 730_566_727),  # and LoRA
    "flow_dit": (2_188_864_058, 2_061_971_527),
    "flow_dit_5b": (6_725_399_267, 6_020_710_599),
}


@pytest.mark.parametrize("row", paper_table.ROWS)
def test_parameters_are_the_published_ones(row):
    config = config_lib.from_config_dict(paper_table.config_dict(row))
    _, _, state = step_lib.state_shapes(config)
    found = paper_table._parameters(config, state)
    assert (found["total"], found["trained"]) == COUNTS[row]


def tiny(**model):
    sizes = dict(action_head="flow_dit", num_layers=2, adapter_layers=(), lora_layers=())
    c = base.get_config("tiny", **sizes | model)
    c.data.update(canvas=(32, 64), num_frames=9, frame_stride=2, action_horizon=8, text_len=6)
    c.evaluation.replan_steps, c.train.trainable = 8, (".*",)
    return config_lib.from_config_dict(c)


def test_a_step_of_the_solver_costs_what_its_products_do():
    config = tiny()
    model, steps, seen, text = config.model, 8, 2 * 4, 6 + 1  # the state is a row of the text
    width, inner, hidden = model.flow_dim, model.num_heads * model.head_dim, model.flow_ffn_dim
    attention = 2 * steps * inner * (seen + steps) + 2 * steps * inner * text
    linears = steps * (3 + 1 + 1 + 1) * width * inner + steps * 2 * width * hidden
    ends = 2 * steps * width * model.action_dim
    by_hand = 2 * (model.num_layers * (attention + linears) + ends)
    few, more = (1e12 * paper_table._tflop_of_plan(config, n) for n in (2, 5))
    assert (more - few) / 3 == pytest.approx(by_hand, rel=1e-6)


def numbers(**more):
    return {
        "parameters": {"total": 2_000_000, "trained": 1_000_000, "action_expert": 500_000},
        "tflop": {"vae": 0.25, "plan": {"1": 1.0, "10": 2.5}, "training_sample": 4.0},
        "acting_gib": 2.0,
        "plan_gib": {"parameters": 1.5, "activations": 2.0},
        **more,
    }


def test_what_is_not_known_is_not_invented():
    lines = paper_table_text.table({"light_wam": numbers()}, {"light_wam": {"cpu": "0.6"}})
    rows = {line.split(" | ")[0].strip("| "): line for line in lines.splitlines()}
    ours, theirs, fast_wam = rows["parameters, VAE included"].strip("|\n ").split(" | ")[1:]
    assert (ours, theirs, fast_wam) == ("2.00 M", "1,986.82 M", "not published")
    assert "| 2.500 (1.000 with 1 step) |" in rows["TFLOP per plan, VAE apart"]
    assert rows["latency of a plan, GPU"].split(" | ")[1] == "not measured"
    assert rows["launches of a plan"].split(" | ")[1] == "not compiled"
    assert rows["CPU time beside the PyTorch reference"].split(" | ")[1] == "0.6"
    assert "3.5 GiB planned" in rows["memory of a training step, 16 samples"]


def test_what_was_compiled_says_so():
    policy = {"memory_gib_per_chip": {"peak": 2.854}, "launches": 1234}
    policy |= {"floor_ms": 1.42, "estimate_ms": 4.44}
    step = {"memory_gib_per_chip": {"peak": 23.2}}
    made = numbers(compiled={"policy": policy, "train": step})
    text = paper_table_text.table({"flow_dit": made})
    for words in (
        "2.85 GiB compiled",
        "1,234",
        "1.4 ms",
        "4.4 ms",
        "23.2 GiB compiled, 3.5 planned",
    ):
        assert f"| {words} |" in text


def test_measured_times_come_from_results_alone(tmp_path):
    assert paper_table_text.measured(tmp_path) == {}
    found = paper_table_text.measured(paper_table.RESULT.parent)
    assert set(found) == {"light_wam"} and found["light_wam"]["cpu"].startswith("0.")


def test_rows_that_are_not_asked_for_stay(monkeypatch):
    monkeypatch.setattr(paper_table, "measure", lambda config: {"name": config.name})
    monkeypatch.setattr(paper_table, "compiled", lambda config, job: job)
    old = {"name": "kept", "compiled": {"policy": "old"}}
    before = {"flow_dit_frozen": {"compiled": {}}, "flow_dit": old, "flow_dit_5b": old}
    found = paper_table.fill(before, ["light_wam", "flow_dit_5b"], ["train"])
    assert found["flow_dit_5b"] == {"name": "kept", "compiled": {"policy": "old", "train": "train"}}
    assert found["flow_dit"] == old and found["flow_dit_frozen"]["compiled"] == {"policy": "old"}
    assert found["light_wam"]["name"] == "libero_spatial", "it was not there"
    # What `benchmarks.aot` compiled of the same config is known already.
    assert found["light_wam"]["compiled"]["policy"]["launches"] > 100
    assert list(found) == list(paper_table.ROWS)
    again = paper_table.fill(before, ["flow_dit_5b"], [])["flow_dit_5b"]
    assert again == {"name": "wan22_5b_libero_spatial", "compiled": {"policy": "old"}}
