"""Which values of a config contradict each other; `config.py` has what each alone may be."""


def check(c, frames_per_latent):
    """Raises ValueError for a `config.Config` that contradicts itself.

    These would otherwise surface minutes later, inside a compiled function.
    """
    _check_data(c.data, c.model, frames_per_latent)
    if c.model.attention == "cudnn" and c.model.dtype != "bfloat16":
        raise ValueError(
            f"config.model.attention='cudnn' computes in bfloat16 only, "
            f"config.model.dtype is {c.model.dtype!r}; use 'auto' or 'xla'"
        )
    if c.model.flow_steps < 1:
        raise ValueError(f"config.model.flow_steps={c.model.flow_steps}: expected 1 or more")
    if c.model.generates and c.model.attention_mask == "bidirectional":
        raise ValueError(
            "config.model.action_head='flow_dit' reads frame 0, which must not depend on later "
            "frames: use config.model.attention_mask='first_frame_causal'"
        )
    if c.train.batch_size % c.optimizer.accum_steps:
        raise ValueError(
            f"config.train.batch_size={c.train.batch_size} must be a multiple of "
            f"config.optimizer.accum_steps={c.optimizer.accum_steps}"
        )
    if not 0 <= c.train.stuck_after_s <= 1e6:
        raise ValueError(
            f"config.train.stuck_after_s={c.train.stuck_after_s}: expected 0 (never) to 1e6 seconds"
        )
    every = c.train.checkpoint_every
    if c.train.keep_every and (not every or c.train.keep_every % every):
        raise ValueError(
            f"config.train.keep_every={c.train.keep_every} must be a multiple of "
            f"config.train.checkpoint_every={every}, the steps that are saved"
        )
    if c.evaluation.replan_steps > c.data.action_horizon:
        raise ValueError(
            f"config.evaluation.replan_steps={c.evaluation.replan_steps} executes more steps than "
            f"the chunk of config.data.action_horizon={c.data.action_horizon} has"
        )


def _check_data(d, model, frames_per_latent):
    action_width = d.action_dim or model.action_dim
    if (d.num_frames - 1) % d.frame_stride or (d.video_frames - 1) % frames_per_latent:
        raise ValueError(
            f"config.data.num_frames={d.num_frames} with frame_stride={d.frame_stride} gives "
            f"{d.video_frames} video frames; expected 1 + a multiple of {frames_per_latent} (the "
            "video codec packs so many frames into one latent frame)"
        )
    if d.video_frames > 1 and d.action_horizon % (d.video_frames - 1):
        raise ValueError(
            f"config.data.action_horizon={d.action_horizon} must be a multiple of the "
            f"{d.video_frames - 1} future video frames"
        )
    for key, width in (
        ("delta_mask", action_width),
        ("action_as", action_width),
        ("action_kinds", action_width),
        ("action_state_dims", action_width),
        ("orientation", len(d.cameras)),
    ):
        count = len(getattr(d, key))
        if count not in (0, width):
            raise ValueError(
                f"config.data.{key} has {count} entries; expected {width}, one per "
                f"{'camera' if key == 'orientation' else 'action dimension'}, or ()"
            )
    _check_kinds(d)
    for key, width, most in (
        ("state_dim", d.state_dim, model.proprio_dim),
        ("action_dim", d.action_dim, model.action_dim),
    ):
        if not 0 <= width <= most:
            raise ValueError(
                f"config.data.{key}={width} is not between 0 and the {most} of the model"
            )


def _check_kinds(d):
    """What config.data.action_kinds says of a dimension has to fit what the other keys say."""
    for dim, kind in enumerate(d.action_kinds):
        said = {
            "gripper_dims": dim in d.gripper_dims and "gripper",
            "delta_mask": dim < len(d.delta_mask) and d.delta_mask[dim] and "delta",
            "action_as": d.action_as[dim : dim + 1] not in ((), ("absolute",)) and "absolute",
        }
        for key, expected in said.items():
            if expected and kind != expected:
                raise ValueError(
                    f"config.data.action_kinds says that action {dim} is {kind!r}, "
                    f"config.data.{key} makes it {expected!r}: change one of them"
                )
