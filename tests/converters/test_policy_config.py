"""What a policy made of converted weights takes of its config file, and what of the weights."""

import dataclasses

from converters import policy
from lightwam_jax import config as config_lib

FILE = """
from configs import base

def get_config(name):
    c = base.get_config("tiny", action_head="flow_dit", flow_steps=3, flow_reads="all_frames")
    c.model.flow_noise, c.model.dim = "constant", 96
    c.data.source, c.data.path, c.data.cache = "lerobot", "absent", "absent"
    return c
"""


def test_how_actions_are_drawn_is_the_config_files_choice(tmp_path):
    (tmp_path / "own.py").write_text(FILE, encoding="utf-8")
    weights = config_lib.model_variant("tiny", action_head="flow_dit", flow_dim=24)
    fields = dataclasses.asdict(weights)
    model = policy._config(f"{tmp_path}/own.py:x", fields, "vae", "text").model
    assert (model.dim, model.flow_dim) == (weights.dim, 24), "sizes are those of the weights"
    chosen = model.flow_steps, model.flow_reads, model.flow_noise
    assert chosen == (3, "all_frames", "constant")
