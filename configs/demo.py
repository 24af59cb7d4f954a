"""The embedded demo: put the named object in the tray, learned from images and words.

    make demo

does

    python -m lightwam_jax.envs.record --suite demo --episodes 700 --starts 2500 \
        --start_steps 5 --noise 0.5 --images png --out data/demo/episodes
    python -m lightwam_jax.precompute --config configs/demo.py --what all
    python train.py --config configs/demo.py --workdir runs/demo
    python evaluate.py --workdir runs/demo --mode demo

It records demonstrations of a scripted expert in a small MuJoCo scene (starts are cheap: new scenes
teach which object is meant), fits a PCA codec on them (no pretrained weights are needed or
downloaded), trains a tiny Light-WAM from scratch, backbone included, and evaluates it closed-loop
on 50 unseen seeds. It takes minutes on two CPU cores (README.md has them) and solved 50 of 50.
"""

from configs import base

# Fast-WAM's head at about the parameters of the other: 1.02M beside 1.15M.
FLOW = dict(action_head="flow_dit", flow_dim=192, flow_ffn_dim=384)


HEADS = {"state_fusion": {}, "flow_dit": FLOW}


def get_config(head="state_fusion"):
    """The demo; `head="flow_dit"` (`--config configs/demo.py:flow_dit`) denoises its actions."""
    if head not in HEADS:
        raise ValueError(f"configs/demo.py:{head}: expected one of {', '.join(HEADS)}")
    c = base.from_scratch(action_dim=4, proprio_dim=5, **HEADS[head])
    c.name = "demo" if head == "state_fusion" else f"demo_{head}"
    c.data.source = "lerobot"
    c.data.path, c.data.cache = "data/demo/episodes", "data/demo/cache"
    c.data.update(cameras=("scene", "wrist"), canvas=(64, 128), text_len=8)
    c.data.update(num_frames=9, frame_stride=1, action_horizon=8, val_fraction=0.05)
    c.data.action_kinds = ("delta",) * 3 + ("gripper",)  # velocities; docs/realtime.md

    # What is executed before the policy plans anew; for plans d steps late: at least 4 + d.
    c.loss.prefix_steps = 4
    c.train.update(steps=3000, checkpoint_every=1500, eval_every=1000)

    c.evaluation.suite = "demo"
    c.evaluation.env = dict(image_size=64)  # as recorded
    c.evaluation.update(replan_steps=4, max_steps=60)
    return c
