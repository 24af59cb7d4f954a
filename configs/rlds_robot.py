"""Your robot's RLDS dataset in five edits: copy this file, change what is marked (1) to (5).

    cp configs/rlds_robot.py configs/mine.py
    python -m lightwam_jax.precompute --config configs/mine.py:tiny --what stats
    python -m lightwam_jax.precompute --config configs/mine.py:tiny --what all
    python train.py --config configs/mine.py:tiny --workdir runs/tiny
    python evaluate.py --workdir runs/tiny --mode open_loop

Each command ends with the next one to type. `tiny` trains a small model from scratch on your
recordings alone, on two CPU cores, in minutes: it needs no weights, and shows whether data, cameras
and actions are right. `own` is the released model with the same five edits. Convert its weights
first (docs/weights.md), then train it on the hardware of `configs/libero.py`:

    python -m converters vae --in Wan2.1_VAE.pth --out weights/vae
    python -m converters t5 --in models_t5_umt5-xxl-enc-bf16.pth --tokenizer tokenizer.json \\
        --out weights/umt5
    python -m converters dit --in hf:Wan-AI/Wan2.1-T2V-1.3B --out weights/wan21
    python -m lightwam_jax.precompute --config configs/mine.py:own --what all \\
        --config.data.codec_weights=weights/vae --config.data.text_weights=weights/umt5
    python train.py --config configs/mine.py:own --workdir runs/own \\
        --config.train.init=weights/wan21

Where (3) fits nothing, `--what stats` lists the features there are. TensorFlow is not needed. There
is no number to expect before you have measured your robot. `configs/rlds.py` is LIBERO in RLDS.
"""

from configs import base


def get_config(size="own"):
    if size not in SIZES:
        raise ValueError(f"configs/rlds_robot.py:{size}: expected one of {', '.join(SIZES)}")
    c = _robot(*SIZES[size])
    c.name = f"rlds_{size}"
    c.data.source = "rlds"
    c.data.cache = f"data/rlds_{size}_cache"
    c.data.val_fraction = 0.05  # episodes held out for python evaluate.py --mode open_loop
    return c


def _robot(model, side):
    # (1) How many numbers an action and a state have (features.json).
    c = model(action_dim=7, proprio_dim=7)
    # (2) The dataset: the directory of its version, such as data/own_rlds/1.0.0, or the one above.
    c.data.path = "data/own_rlds"
    # (3) Where a step keeps what (lightwam_jax/data/formats/rlds.py and keys.py explain how), and
    #     how many steps a second has, which RLDS does not say.
    c.data.fields.update(
        state=("observation/state",),
        action=("action",),
        image="observation/{camera}",
        task="language_instruction",
        fps=10.0,
    )
    # (4) Which cameras, how mounted, and where on the canvas: (height, width), multiples of 32,
    #     here two squares side by side. One camera: layout "single", canvas (side, side).
    c.data.update(cameras=("front", "wrist"), orientation=("", ""))
    c.data.update(layout="horizontal", canvas=(side, 2 * side))
    # (5) Which action dimensions are deltas, and which the gripper, with its values.
    c.data.update(delta_mask=(False,) * 7, gripper_dims=(6,), gripper_closed_open=(0.0, 1.0))
    return c


SIZES = {"own": (base.pretrained, 224), "tiny": (base.from_scratch, 64)}
