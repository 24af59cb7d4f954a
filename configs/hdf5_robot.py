"""Your robot's HDF5 recordings in five edits: copy this file, change what is marked (1) to (5).

    cp configs/hdf5_robot.py configs/mine.py
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

Where (3) fits nothing, `--what stats` lists what your files hold. There is no number to expect
before you have measured your robot.

Layouts, as :NAME behind the file; the others are examples to copy the function from:
  own              one file per episode, images as arrays or encoded: what is edited below
  tiny             the same with the small model; its canvas is 64 pixels high, not 224
  libero           LIBERO's original download (robomimic's layout)
  libero_replayed  LIBERO replayed without idle steps, as for OpenVLA: written like the original,
                   but for the order of action and frame and the missing instructions
  robotwin         RoboTwin 2.0's raw episodes of one task and setting
  aloha            ALOHA's episodes, compressed or not
"""

from configs import base


def get_config(layout="own"):
    if layout not in LAYOUTS:
        raise ValueError(f"configs/hdf5_robot.py:{layout}: expected one of {', '.join(LAYOUTS)}")
    c = LAYOUTS[layout]()
    c.name = f"hdf5_{layout}"
    c.data.source = "hdf5"
    c.data.cache = f"data/{layout}_cache"
    c.data.val_fraction = 0.05  # episodes held out for python evaluate.py --mode open_loop
    return c


def _own(model=base.pretrained, side=224):
    # (1) How many numbers an action and a state have.
    c = model(action_dim=7, proprio_dim=7)
    # (2) Where the recordings lie, at any depth.
    c.data.path = "data/own"
    # (3) Where an episode keeps what (lightwam_jax/data/formats/hdf5.py and keys.py explain how),
    #     and how many steps a second has.
    c.data.fields.update(
        state=("observations/qpos",),
        action=("action",),
        fps=30.0,
        image="observations/images/{camera}",
        task="text:fold the towel",
    )
    # (4) Which cameras, how mounted, and where on the canvas: (height, width), multiples of 32,
    #     here two squares side by side. One camera: layout "single", canvas (side, side).
    c.data.update(cameras=("front", "wrist"), orientation=("", ""))
    c.data.update(layout="horizontal", canvas=(side, 2 * side))
    # (5) Which action dimensions are deltas, and which the gripper, with its values.
    c.data.update(delta_mask=(False,) * 7, gripper_dims=(6,), gripper_closed_open=(0.0, 1.0))
    return c


def _libero(action="actions[1:]", rows="[:-1]", task="/data@problem_info#/language_instruction"):
    c = base.pretrained(action_dim=7, proprio_dim=8)
    c.data.path = "data/libero_hdf5/libero_spatial"
    # What LIBERO's script recorded in a row was seen after that row's action: the action that
    # follows a frame stands one row further down.
    c.data.fields.update(
        episodes="data/demo_*",
        action=(action,),
        fps=20.0,
        task=task,
        state=(f"obs/ee_states{rows}", f"obs/gripper_states{rows}"),
        image=f"obs/{{camera}}_rgb{rows}",
    )
    # OpenGL's images are upside down; turning them is the convention of every other LIBERO set.
    c.data.update(
        cameras=("agentview", "eye_in_hand"),
        orientation=("rotate_180",) * 2,
        layout="horizontal",
        canvas=(224, 448),
    )
    c.data.update(
        delta_mask=(True,) * 6 + (False,),
        gripper_dims=(6,),
        gripper_closed_open=(1.0, -1.0),
        gripper_snap=True,
    )
    return c


def _libero_replayed():
    # Replayed, a row holds what was seen before its action. The instruction is only in the file's
    # name: write it into a text file of that name.
    c = _libero(action="actions", rows="", task="file:{name}.txt")
    c.data.path = "data/libero_hdf5/libero_spatial_no_noops"
    return c


def _robotwin():
    c = base.pretrained(action_dim=14, proprio_dim=14)
    c.data.path = "data/robotwin2.0/beat_block_hammer/demo_clean/data"
    # As RoboTwin's own conversions: the action is the joint vector of the next row. Its images
    # were RGB when OpenCV, which takes BGR, encoded them. 250 simulation steps a second, 15 a row.
    c.data.fields.update(
        state=("joint_action/vector[:-1]",),
        action=("joint_action/vector[1:]",),
        image="observation/{camera}/rgb[:-1]",
        channel_order="bgr",
        fps=250 / 15,
        task="file:../instructions/{name}.json#/seen/0",
    )
    c.data.update(
        cameras=("head_camera", "left_camera", "right_camera"),
        camera_size=(240, 320),
        layout="robotwin",
        canvas=(384, 320),
    )
    c.data.update(gripper_dims=(6, 13), gripper_closed_open=(0.0, 1.0), normalization="z_score")
    c.loss.prefix_steps = 24
    c.evaluation.replan_steps = 24
    return c


def _aloha():
    c = base.pretrained(action_dim=14, proprio_dim=14)
    c.data.path = "data/aloha"
    # channel_order: look at the report. Compressed images come in both orders.
    c.data.fields.update(
        state=("observations/qpos",),
        action=("action",),
        fps=50.0,
        image="observations/images/{camera}",
        task="text:transfer the cube",
    )
    c.data.update(
        cameras=("cam_high", "cam_left_wrist", "cam_right_wrist"),
        camera_size=(240, 320),
        layout="robotwin",
        canvas=(384, 320),
    )
    c.data.update(gripper_dims=(6, 13), gripper_closed_open=(0.0, 1.0))
    return c


LAYOUTS = {
    "own": _own,
    "tiny": lambda: _own(base.from_scratch, side=64),
    "libero": _libero,
    "libero_replayed": _libero_replayed,
    "robotwin": _robotwin,
    "aloha": _aloha,
}
