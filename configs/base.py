"""Every key a run can have, with the meaning of each. Other configs import this and change values.

Not runnable by itself: `data.source` is empty. See `configs/demo.py` for the smallest real run.
"""

import ml_collections

from lightwam_jax.models import variants


def get_config(model="wan21_1_3b", **model_overrides):
    """Returns the defaults: the released recipe's values where the paper gives one."""
    c = ml_collections.ConfigDict()
    c.name = ""  # shown in logs and reports
    c.seed = 42  # initialisation, shuffling, noise

    # Sizes, dtypes and the LoRA/adapter/expert layout: models/variants.py explains each key.
    c.model = ml_collections.ConfigDict(variants.variant(model, **model_overrides))

    c.loss = ml_collections.ConfigDict(
        dict(
            downsample=2,  # spatial average pooling of the video latents: 1, 2 or 4
            lambda_video=1.0,
            lambda_action=1.0,
            residual_target=False,  # predict latents minus the first frame
            temporal_weighting=True,  # weight the steps of the action chunk:
            prefix_steps=8,  # ... the first prefix_steps get prefix_weight
            prefix_weight=1.0,
            tail_weight=0.0,  # ... and the others tail_weight
            shift=5.0,  # of the flow-matching schedule
            mask_text_padding=False,  # in the release padding rows (zeros) are seen
        )
    )

    c.data = ml_collections.ConfigDict(
        dict(
            # "lerobot" (v2.1 and v3.0) | "rlds" | "hdf5" | "fake" (random values)
            source="",
            path="",  # directory of the episodes; several, between commas, are read as one data set
            cache="",  # directory of the latent and text caches and of the statistics
            exclude=(),  # ids of episodes to leave out; nothing else is ever left out
            check_frames="ends",  # what `--what stats` decodes of each episode: "none"|"ends"|"all"
            # Where an episode keeps what; "" and (): the source's own names (data/<source>.py).
            fields=dict(
                episodes="",  # hdf5: pattern of the groups that are episodes; "": a file is one
                state=(),  # concatenated, in this order
                action=(),
                image="",  # with {camera}, e.g. "observation.images.{camera}"
                task="",
                fps=0.0,  # where the data do not say
                channel_order="rgb",  # "bgr": images with red and blue swapped (RoboTwin's HDF5)
            ),
            state_dim=0,  # width in the data where it is less than the model's; 0: equal
            action_dim=0,
            # Images to canvas.
            cameras=("",),  # camera names, in layout order
            # Per camera: "" | "rotate_90|180|270" (counter-clockwise) | "flip_vertical|horizontal".
            orientation=(),
            camera_size=(),  # (height, width) each camera is first resized to; (): as its region
            layout="horizontal",  # "single" | "horizontal" | "vertical" | "robotwin"
            canvas=(224, 448),  # height, width in pixels of the laid-out cameras
            # Actions as the model sees them; the policy gives back the data's own.
            action_as=(),  # per dimension: "absolute" | "delta_state" | "delta_previous"; (): as is
            action_state_dims=(),  # per dimension: the state it is a delta to; (): the same number
            gripper_dims=(),  # action dimensions that are grippers
            gripper_closed_open=(0.0, 1.0),  # their values in the data, mapped to 0 and 1
            gripper_snap=False,  # the policy gives fully closed or fully open, nothing between
            codec="wan21",  # "wan21" | "wan22" | "pca" (fitted on the data; for the demo)
            codec_weights="",  # directory of converted VAE weights (python -m converters vae)
            text_encoder="umt5",  # "umt5" | "hashed" (deterministic; for the demo)
            text_weights="",  # directory of converted umT5 weights (python -m converters t5)
            prompt_template=(
                "A video recorded from a robot's point of view executing the following "
                "instruction: {task}"
            ),
            text_len=128,  # rows of the text embedding
            num_frames=33,  # raw frames a window spans
            frame_stride=4,  # raw frames between the video frames of a window
            action_horizon=32,  # actions per chunk
            # "min_max" | "quantile" (1 % to 99 %) | "z_score" | "constants" | "none"; the release's
            # z-score divides by a deviation of 0 too: "z_score_reference".
            normalization="min_max",
            normalization_range=(-1.0, 1.0),  # of "constants": mapped to -1 and 1
            delta_mask=(),  # per action dimension: True where it is a delta (zeroed when padded)
            val_fraction=0.0,  # share of episodes held out for open-loop validation
            # Several data sets: {name: {"weight": 1.0, "embodiment": "", and keys that differ}}.
            # Those of one embodiment (default: its name) share statistics.
            mixture=dict(),
            dataset="",  # set by the program for each of them
            embodiment="",  # names the statistics where there are several
            encode_online=False,  # frames are read and encoded during training; no latent cache
            augment=dict(  # only with pixels
                crop=1.0,  # smallest side of a random crop, as a share; 1: none
                brightness=0.0,  # largest relative change
                contrast=0.0,
                saturation=0.0,
            ),
            workers=0,  # Grain worker processes; 0: threads in this process
            threads=4,  # read threads
            prefetch=256,  # samples buffered ahead of the step
        )
    )

    c.optimizer = ml_collections.ConfigDict(
        dict(
            lr=1e-4,
            warmup_steps=1000,  # linear from lr / warmup_steps
            final_lr_ratio=0.01,  # cosine down to lr * final_lr_ratio
            b1=0.9,
            b2=0.95,
            eps=1e-8,
            weight_decay=1e-2,  # on everything that learns, as in the release
            clip_norm=0.0,  # global gradient norm; 0: no clipping, as the release effectively ran
            accum_steps=1,  # micro-batches per optimizer step; batch_size is the sum over them
            ema_decay=0.0,  # exponential moving average of the trainable parameters; 0: none
        )
    )

    c.train = ml_collections.ConfigDict(
        dict(
            # Regular expressions on parameter paths; what matches learns, the rest is frozen.
            trainable=(
                r"/lora_[ab]$",
                r"^dit/adapters_",
                r"^dit/head/",
                r"^expert/",
                r"^proprio_encoder/",
            ),
            init="",  # checkpoint directory of base weights to start from; "": random
            steps=150_000,
            batch_size=64,  # samples per optimizer step, over all devices and micro-batches
            log_every=50,
            eval_every=2000,  # open-loop validation; 0: never
            eval_batches=16,
            checkpoint_every=2000,
            keep_last=2,  # newest checkpoints on disk; 0: all
            keep_every=0,  # besides, every checkpoint of a multiple of this step for ever; 0: none
            stuck_after_s=300.0,  # seconds without progress until a run says where it is; 0: never
        )
    )

    c.mesh = ml_collections.ConfigDict(
        dict(
            data=-1,  # devices over the batch; -1: all that are left
            fsdp=1,  # devices over the parameters
            # Frozen weights: "sharded" over fsdp too and gathered block by block, or "replicated":
            # whole on every device (3 GiB in bfloat16), nothing to gather.
            frozen="sharded",
        )
    )

    c.evaluation = ml_collections.ConfigDict(
        dict(
            suite="",  # simulated suite, of evaluation/envs/__init__.py; "": none
            tasks=(),  # names of its tasks; (): all
            env=dict(),  # arguments of the suite's make(): image size, protocol, ...
            episodes=50,  # of each task
            first_seed=1_000_000,  # held-out seeds: first_seed, first_seed + 1, ...
            replan_steps=10,  # executed steps per predicted chunk
            max_steps=400,
            workers=2,  # simulator processes
            batch=8,  # episodes at once = rows of the policy's batch, for any number of workers
            videos=4,  # episodes kept as MP4
        )
    )
    return c
