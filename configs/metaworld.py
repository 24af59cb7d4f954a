"""One policy for four Meta-World tasks, told apart by their instructions; trained from scratch.

    make setup-sim
    python -m lightwam_jax.envs.record --suite metaworld --noise 0.5 --episodes 150 \
        --tasks reach-v3,push-v3,drawer-open-v3,button-press-topdown-v3 \
        --out data/metaworld/episodes
    python -m lightwam_jax.precompute --config configs/metaworld.py --what all
    python train.py --config configs/metaworld.py --workdir runs/metaworld
    python evaluate.py --workdir runs/metaworld --mode metaworld

The model is the demo's. It solved 71 of 80 unseen episodes after 6,000 steps, 13 minutes of two CPU
cores. That policy is policies/metaworld (README.md).
"""

from configs import demo

TASKS = ("reach-v3", "push-v3", "drawer-open-v3", "button-press-topdown-v3")


def get_config():
    c = demo.get_config()
    c.name = "metaworld"
    c.model.action_dim, c.model.proprio_dim = 4, 4

    c.data.source = "lerobot"
    c.data.path = "data/metaworld/episodes"
    c.data.cache = "data/metaworld/cache"
    c.data.cameras = ("corner2", "gripperPOV")
    c.data.camera_size = (64, 64)  # halved: what a pixel of 128 shows is not lost but averaged
    c.data.text_len = 12

    c.train.steps = 6000
    c.evaluation.suite = "metaworld"
    c.evaluation.tasks = TASKS
    c.evaluation.env = dict(image_size=128)  # as recorded
    c.evaluation.episodes = 20
    c.evaluation.max_steps = 200  # the experts need at most 95
    c.evaluation.videos = 8
    return c
