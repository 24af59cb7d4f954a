"""Your robot's HDF5 recordings in five edits: copy this file, change what is marked (1) to (5).

    cp configs/hdf5_robot.py configs/mine.py
    python -m lightwam_jax.precompute --config configs/mine.py --what stats   # then read its report
    python -m lightwam_jax.precompute --config configs/mine.py --what all \\
        --config.data.codec_weights=weights/vae --config.data.text_weights=weights/umt5
    python train.py --config configs/mine.py --workdir runs/mine --config.train.init=weights/wan21

Convert the weights first: docs/weights.md.

Where (3) fits nothing, `--what stats` lists what your files hold. The model and the batch are those
of `configs/libero.py`: so are the hardware and the time per step. There is no number to expect
before you have measured your robot.

Layouts to start from, as :NAME behind the file or by copying the function:
  own              one file per episode, images as arrays or encoded: what is edited below
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


def _own():
    # (1) How many numbers an action and a state have.
    c = base.get_config("wan21_1_3b", action_dim=7, proprio_dim=7, remat="linears")
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
    # (4) Which cameras, how mounted, and where on the canvas (its sides are multiples of 32).
    c.data.update(
        cameras=("front", "wrist"), orientation=("", ""), layout="horizontal", canvas=(224, 448)
    )
    # (5) Which action dimensions are deltas, and which the gripper, with its values.
    c.data.update(delta_mask=(False,) * 7, gripper_dims=(6,), gripper_closed_open=(0.0, 1.0))
    return c


def _libero(action="actions[1:]", rows="[:-1]", task="/data@problem_info#/language_instruction"):
    c = base.get_config("wan21_1_3b", action_dim=7, proprio_dim=8, remat="linears")
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
    c = base.get_config("wan21_1_3b", action_dim=14, proprio_dim=14, remat="linears")
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
    c = base.get_config("wan21_1_3b", action_dim=14, proprio_dim=14, remat="linears")
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
    "libero": _libero,
    "libero_replayed": _libero_replayed,
    "robotwin": _robotwin,
    "aloha": _aloha,
}
