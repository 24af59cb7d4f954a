"""What a policy server says about itself before the first request: plain values, fixed order."""

from lightwam_jax import config as config_lib
from lightwam_jax.data import actions
from lightwam_jax.inference import keys as keys_lib
from lightwam_jax.inference import latency, realtime
from lightwam_jax.inference import serving_options as options_lib

VERSION = 1  # of the server's side of the protocol: of metadata, optional keys, error codes
_PROMPTS = 256  # that are listed


def describe(policy, options, rules, guard, seconds):
    """Returns the metadata: numbers, text, lists and maps, no arrays.

    Args:
      policy: `Policy`. options: `service.Options`. rules: `observations.Rules`.
      guard: `safety.Guard`. seconds: of calls of the policy, measured at the start.
    """
    config, data = policy.config, policy.config.data
    width = config_lib.action_width(config)
    cameras = list(data.cameras)
    orientation = list(data.orientation) or [""] * len(cameras)
    known = list(policy.known_prompts)
    made = {"protocol": "openpi", "server_version": VERSION}
    if options.metadata == "full":  # what names the checkpoint, or was measured
        made |= {
            "config": options.name or config.name,
            "step": policy.step,
            "weights_hash": options.weights_hash,
            "latency": {k: round(v, 3) for k, v in latency.percentiles(seconds).items()},
        }
    return made | {
        "dtype": config.model.dtype,
        "embodiment": data.embodiment,
        "cameras": cameras,
        "images": "uint8, RGB, of any size: send pictures as the camera gives them",
        "orientation": dict(zip(cameras, orientation)),
        "state_dim": rules.state_width,
        "state_names": list(data.fields.state),
        "action_dim": width,
        "action_names": list(data.fields.action),
        "action_kinds": list(actions.kinds(config)),
        "action_horizon": data.action_horizon,
        "trained_steps": realtime.trained_depth(config.loss, data.action_horizon)[0],
        "replan_steps": min(config.evaluation.replan_steps, data.action_horizon),
        "fps": options_lib.control_rate(policy, options),
        "keys": keys_lib.describe(rules.tables[0], data.cameras),
        "optional_keys": list(keys_lib.OPTIONAL),
        "default_prompt": options.default_prompt,
        "new_prompts": options.new_prompts,
        "prompts": known[:_PROMPTS],
        "prompt_count": len(known),
        "max_frame": options.max_frame,
        "batching": {"max": options.max_batch, "exact": options.exact},
        "max_age_ms": options.max_age_ms,
        "limits": guard.limits.as_dict(),
        "gripper": guard.gripper.mode,
        "gripper_closed_within": guard.gripper.closed_within,
        "guard": options.guard,
    }
