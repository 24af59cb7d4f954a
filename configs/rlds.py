"""RLDS data, shown on LIBERO as OpenVLA has it: `configs/rlds.py:spatial|object|goal|10|all`.

    git clone https://huggingface.co/datasets/openvla/modified_libero_rlds data/modified_libero_rlds
    python -m lightwam_jax.precompute --config configs/rlds.py:spatial --what all \\
        --config.data.codec_weights=weights/vae --config.data.text_weights=weights/umt5
    python train.py --config configs/rlds.py:spatial --workdir runs/rlds \\
        --config.train.init=weights/wan21

Convert the weights first: docs/weights.md.

The recipe of `configs/libero.py` (the paper: 4 H100, 2.08 steps/s, 20 hours) on the same
demonstrations, replayed and converted by others: its numbers are not promised here.

For another RLDS dataset start from `configs/rlds_robot.py`. TensorFlow is not needed.
"""

from configs import libero

SUITES = libero.SUITES


def get_config(suite="spatial"):
    c = libero.get_config(suite)
    c.name = f"rlds_libero_{suite}"
    c.data.source = "rlds"
    suites = SUITES[:-1] if suite == "all" else (suite,)  # each directory holds one version, 1.0.0
    c.data.path = ",".join(f"data/modified_libero_rlds/libero_{name}_no_noops" for name in suites)
    c.data.cache = f"data/rlds_cache/libero_{suite}"
    c.data.fields.update(
        state=("observation/state",),
        action=("action",),
        image="observation/{camera}",
        task="language_instruction",
        fps=20.0,
    )
    c.data.gripper_dims = (6,)
    # As the simulator's command. Other conversions of LIBERO hold 0 and 1: the doctor's warning of
    # the gripper range says so, and which values to give here.
    c.data.gripper_closed_open = (1.0, -1.0)
    c.data.gripper_snap = True
    c.evaluation.env = dict(protocol="openpi")  # whose gripper is the simulator's, as in these data
    c.evaluation.replan_steps = 5
    return c
