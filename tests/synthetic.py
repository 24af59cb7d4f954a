"""Small made-up episodes and the config that fits them; shared by the tests of the data part."""

import numpy as np

from configs import base
from lightwam_jax import config as config_lib
from lightwam_jax.data import episodes

TASKS = ("put the red cube in the bowl", "put the blue cube in the bowl")


def make_config(directory="", **overrides):
    """Returns a tiny `Config`; overrides are {"data.path": value}."""
    c = base.get_config("tiny")
    c.loss.downsample = 1
    c.data.update(
        source="lerobot",
        path=f"{directory}/episodes",
        cache=f"{directory}/cache",
        cameras=("scene", "wrist"),
        canvas=(32, 64),
        codec="pca",
        text_encoder="hashed",
        text_len=24,
        num_frames=9,
        frame_stride=2,
        action_horizon=8,
        val_fraction=0.3,
        threads=2,
        prefetch=8,
    )
    c.train.update(batch_size=4, eval_batches=4)
    c.evaluation.replan_steps = 4
    with c.unlocked():
        c.update_from_flattened_dict(overrides)
    return config_lib.from_config_dict(c)


def make_episodes(count=6, size=32, seed=0):
    """Returns `ArrayEpisode`s of 5 to 12 steps: a coloured square moves over a smooth ramp."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(60, 200, size)
    out = []
    for number in range(count):
        n = int(rng.integers(5, 13))
        images = {}
        for camera in ("scene", "wrist"):
            frames = np.empty((n, size, size, 3), np.uint8)
            frames[:] = (ramp[:, None] * 0.5 + ramp * 0.5)[..., None]
            top, left = rng.integers(0, size - 8, 2)
            colour = (220, 20, 20) if number % 2 == 0 else (20, 20, 220)
            for step in range(n):
                frames[step, top : top + 8, (left + step) % (size - 8) :][:, :8] = colour
            images[camera] = frames
        out.append(
            episodes.ArrayEpisode(
                id=f"episode_{number:03d}",
                fps=10.0,
                task=TASKS[number % 2],
                state=rng.standard_normal((n, 8)).astype(np.float32),
                action=rng.uniform(-1, 1, (n, 7)).astype(np.float32),
                images=images,
            )
        )
    return out
