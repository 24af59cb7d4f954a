"""Records demonstrations of the demo task: the program of one worker process of `demo.record`.

`python -m lightwam_jax.data.demo_record JOB` takes a JSON object (seeds, path, image_size,
action_noise, most_steps) and prints one JSON line per episode. It is a program of its own because
spawned `multiprocessing` workers would import the parent's main module, and with it jax.
"""

import json
import os
import pathlib
import sys

import numpy as np

from lightwam_jax.data import demo_env, demo_expert

_PUSH = 0.08  # chance per step that a push begins: rare, so that most futures are undisturbed
_PUSH_STEPS = 3
_FUMBLE = 0.004  # chance per step that the gripper does the opposite for _FUMBLE_STEPS steps
_FUMBLE_STEPS = 2


def demonstrate(env, seed, action_noise, most_steps=None):
    """Lets the expert play one episode, disturbed, and returns what a learner needs.

    Now and then a push of standard deviation `action_noise` is added to the executed velocity for
    some steps, and more rarely the gripper fumbles; the recorded action is the clean one for the
    state really reached. So the demonstrations show how to recover (as in DART, Laskey et al.
    2017). Without noise nothing is disturbed.

    Args:
      env: `TabletopEnv`.
      seed: of the episode; it also fixes the disturbances.
      action_noise: standard deviation, in units of the action (1 is full speed).
      most_steps: the recording stops there, whether or not the task is solved; None: at the end.

    Returns:
      success (bool; true for a recording that was stopped), {"state" [n, P] f32, "action" [n, A]
      f32, one uint8 [n, S, S, 3] per camera}.
    """
    rng = np.random.default_rng([demo_env.TASK_VERSION, seed, 1])
    observation, push, pushed, fumble = env.reset(seed), np.zeros(3), 0, 0
    rows = {"state": [], "action": [], **{camera: [] for camera in demo_env.CAMERAS}}
    success = done = False
    while not done:
        action = demo_expert.act(env)
        rows["state"].append(observation["state"])
        rows["action"].append(action)
        for camera in demo_env.CAMERAS:
            rows[camera].append(observation["images"][camera])
        executed = action.copy()
        if action_noise > 0:
            pushed = max(pushed - 1, 0) or _PUSH_STEPS * bool(rng.random() < _PUSH)
            if pushed == _PUSH_STEPS:
                push = rng.normal(0, action_noise, 3)
            executed[:3] += push * bool(pushed)
            fumble = max(fumble - 1, 0) or _FUMBLE_STEPS * bool(rng.random() < _FUMBLE)
            executed[3] *= -1 if fumble else 1
        success, done = env.step(executed)
        if env.steps == most_steps:
            success = done = True
        if not done:
            observation = env.observe()
    return success, {name: np.stack(row) for name, row in rows.items()}


def episode_file(path, seed):
    """Returns the file of one episode."""
    return pathlib.Path(path) / f"episode_{seed:08d}.npz"


def main(job):
    """Records the episodes of `job` (see the module docstring); failed ones leave no file."""
    env = demo_env.TabletopEnv(job["image_size"])
    for seed in job["seeds"]:
        success, arrays = demonstrate(env, seed, job["action_noise"], job["most_steps"])
        if success:
            final = episode_file(job["path"], seed)
            partial = final.with_suffix(".partial")
            with open(partial, "wb") as file:
                np.savez_compressed(file, task=np.array(env.scene.prompt), **arrays)
            os.replace(partial, final)  # a killed recording leaves no half episode
        print(json.dumps({"seed": seed, "success": bool(success), "steps": env.steps}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
