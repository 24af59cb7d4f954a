"""The released RoboTwin 2.0 recipe: three cameras, two arms, absolute joint targets.

    python -m lightwam_jax.precompute --config configs/robotwin.py --what all \\
        --config.data.codec_weights=weights/vae --config.data.text_weights=weights/umt5
    python train.py --config configs/robotwin.py --workdir runs/robotwin \\
        --config.train.init=weights/wan21

Convert the weights first: docs/weights.md. The data are the release's LeRobot dataset of RoboTwin
2.0, in data/robotwin2.0; another place: --config.data.path.

500,000 steps with two accumulated micro-batches (the paper: 76.4 % on RoboTwin 2.0).
"""

from configs import base


def get_config():
    c = base.get_config("wan21_1_3b", action_dim=14, proprio_dim=14, remat="linears")
    c.name = "robotwin"
    c.data.source = "lerobot"
    c.data.path = "data/robotwin2.0"
    c.data.cache = "data/robotwin_cache"
    c.data.cameras = ("cam_high", "cam_left_wrist", "cam_right_wrist")
    c.data.camera_size = (240, 320)
    c.data.layout = "robotwin"
    c.data.canvas = (384, 320)
    c.data.action_kinds = (("absolute",) * 6 + ("gripper",)) * 2
    c.data.normalization = "z_score_reference"
    c.data.val_fraction = 0.01

    c.loss.prefix_steps = 24  # for plans that come d steps late: replan_steps + d or more
    c.loss.tail_weight = 0.0

    c.train.steps = 500_000
    c.train.batch_size = 128  # 16 on each of 4 GPUs, twice
    c.optimizer.accum_steps = 2
    c.evaluation.replan_steps = 24
    c.evaluation.max_steps = 1000
    return c
