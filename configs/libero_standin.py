"""Ten LIBERO tasks on stand-in assets, learned from scratch: `configs/libero_standin.py:object`.

    python -m lightwam_jax.envs.record --suite libero --tasks object --episodes 20 \
        --env '{"assets": "tests/libero_standins", "rendering": "fast", "image_size": 128}' \
        --out data/libero_standin/object/episodes
    python -m lightwam_jax.precompute --config configs/libero_standin.py:object --what all
    python train.py --config configs/libero_standin.py:object --workdir runs/libero_standin
    python evaluate.py --workdir runs/libero_standin --mode libero

It shows quickly that recording, training and evaluation fit together. No success rate is expected
of it, and none that it gives on the stand-ins is a LIBERO score. The model is that of the demo. On
LIBERO's own meshes, which make setup-sim installs: record without "assets", and evaluate with
`--env '{"assets": null}'`.
"""

from configs import demo

SUITES = ("object", "spatial")


def get_config(suite="object"):
    if suite not in SUITES:
        raise ValueError(f"configs/libero_standin.py:{suite}: expected one of {', '.join(SUITES)}")
    c = demo.get_config()
    c.name = f"libero_standin_{suite}"
    c.model.action_dim, c.model.proprio_dim = 7, 8

    c.data.source = "lerobot"
    c.data.path = f"data/libero_standin/{suite}/episodes"
    c.data.cache = f"data/libero_standin/{suite}/cache"
    c.data.cameras = ("image", "wrist_image")
    c.data.camera_size = (64, 64)
    c.data.text_len = 20
    c.data.num_frames = 17
    c.data.frame_stride = 2
    c.data.action_horizon = 16
    c.data.delta_mask = (True,) * 6 + (False,)  # the gripper is absolute
    c.data.action_kinds = ("delta",) * 6 + ("gripper",)

    c.loss.prefix_steps = 10
    c.evaluation.suite = "libero"
    c.evaluation.tasks = (suite,)
    c.evaluation.env = dict(
        protocol="lightwam", assets="tests/libero_standins", rendering="fast", image_size=128
    )
    c.evaluation.episodes = 5
    c.evaluation.replan_steps = 10
    c.evaluation.max_steps = 400
    return c
