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

MODEL = dict(
    dim=128,
    num_heads=4,
    head_dim=32,
    ffn_dim=256,
    num_layers=2,
    text_dim=64,
    freq_dim=64,
    latent_channels=32,
    lora_rank=0,
    lora_layers=(),
    lora_targets=(),
    adapter_layers=(0, 1),
    adapter_dim=32,
    num_queries=8,
    pool_heads=4,
    per_layer_dim=256,
    trunk_dim=384,
    step_pos_dim=64,
    query_init=1.0,  # at the release's 0.02, queries from scratch look everywhere for long
    gate_init=1.0,  # ... and at 0 the blocks' own contribution takes hundreds of steps to grow
    action_dim=4,
    proprio_dim=5,
    dtype="float32",
    frozen_dtype="float32",
)


# Fast-WAM's head at about the parameters of the other: 1.02M beside 1.15M.
FLOW = dict(action_head="flow_dit", flow_dim=192, flow_ffn_dim=384)


HEADS = {"state_fusion": {}, "flow_dit": FLOW}


def get_config(head="state_fusion"):
    """The demo; `head="flow_dit"` (`--config configs/demo.py:flow_dit`) denoises its actions."""
    if head not in HEADS:
        raise ValueError(f"configs/demo.py:{head}: expected one of {', '.join(HEADS)}")
    c = base.get_config("tiny", **MODEL | HEADS[head])
    c.name = "demo" if head == "state_fusion" else f"demo_{head}"
    c.data.source = "lerobot"
    c.data.path, c.data.cache = "data/demo/episodes", "data/demo/cache"
    c.data.update(cameras=("scene", "wrist"), canvas=(64, 128), codec="pca")
    c.data.update(text_encoder="hashed", prompt_template="{task}", text_len=8)
    c.data.update(num_frames=9, frame_stride=1, action_horizon=8, val_fraction=0.05)
    c.data.action_kinds = ("delta",) * 3 + ("gripper",)  # velocities; docs/realtime.md

    c.loss.downsample = 2
    c.loss.lambda_video = 0.25  # from scratch, the actions must not wait for the video
    # What is executed before the policy plans anew; for plans d steps late: at least 4 + d.
    c.loss.prefix_steps = 4
    c.loss.tail_weight = 0.1
    c.optimizer.update(lr=1e-3, warmup_steps=200, clip_norm=1.0, ema_decay=0.995)

    # Nothing is pretrained here, so everything learns.
    c.train.trainable = (".*",)
    c.train.update(steps=3000, batch_size=32, checkpoint_every=1500)
    c.train.update(eval_every=1000, eval_batches=4)

    c.evaluation.suite = "demo"
    c.evaluation.env = dict(image_size=64)  # as recorded
    c.evaluation.update(replan_steps=4, max_steps=60)
    return c
