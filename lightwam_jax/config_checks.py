"""What the values of a config may be, and which of them contradict each other."""


def _one_of(path, value, choices):
    if value not in choices:
        raise ValueError(f"{path} is {value!r}; expected one of {', '.join(map(repr, choices))}")


def check(c):
    """Raises ValueError for a `config.Config` that contradicts itself.

    These would otherwise surface minutes later, inside a compiled function.
    """
    _one_of(
        "config.model.attention_mask",
        c.model.attention_mask,
        ("first_frame_causal", "per_frame_causal", "bidirectional"),
    )
    _one_of("config.model.pooling", c.model.pooling, ("learned_query", "mean", "concat"))
    _one_of("config.model.attention", c.model.attention, ("xla", "cudnn"))
    _one_of("config.model.remat", c.model.remat, ("none", "full", "dots"))
    _one_of("config.mesh.frozen", c.mesh.frozen, ("sharded", "replicated"))
    _one_of("config.loss.downsample", c.loss.downsample, (1, 2, 4))
    _check_data(c)
    _one_of("config.data.codec", c.data.codec, ("wan21", "wan22", "pca"))
    _one_of("config.data.text_encoder", c.data.text_encoder, ("umt5", "hashed"))
    if c.model.attention == "cudnn" and c.model.dtype != "bfloat16":
        raise ValueError(
            f"config.model.attention='cudnn' computes in bfloat16 only, "
            f"config.model.dtype is {c.model.dtype!r}; use 'xla'"
        )
    if c.train.batch_size % c.optimizer.accum_steps:
        raise ValueError(
            f"config.train.batch_size={c.train.batch_size} must be a multiple of "
            f"config.optimizer.accum_steps={c.optimizer.accum_steps}"
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


def _check_data(c):
    _one_of(
        "config.data.normalization",
        c.data.normalization,
        ("min_max", "quantile", "z_score", "z_score_reference", "constants", "none"),
    )
    _one_of("config.data.layout", c.data.layout, ("single", "horizontal", "vertical", "robotwin"))
    _one_of("config.data.check_frames", c.data.check_frames, ("none", "ends", "all"))
    _one_of("config.data.fields.channel_order", c.data.fields.channel_order, ("rgb", "bgr"))
    for value in c.data.orientation:
        _one_of(
            "config.data.orientation",
            value,
            ("", "rotate_90", "rotate_180", "rotate_270", "flip_vertical", "flip_horizontal"),
        )
    for value in c.data.action_as:
        _one_of("config.data.action_as", value, ("absolute", "delta_state", "delta_previous"))
    d = c.data
    action_width = d.action_dim or c.model.action_dim
    if (d.num_frames - 1) % d.frame_stride or (d.video_frames - 1) % 4:
        raise ValueError(
            f"config.data.num_frames={d.num_frames} with frame_stride={d.frame_stride} gives "
            f"{d.video_frames} video frames; expected 1 + a multiple of 4 (the video codec packs "
            "four frames into one latent frame)"
        )
    if d.video_frames > 1 and d.action_horizon % (d.video_frames - 1):
        raise ValueError(
            f"config.data.action_horizon={d.action_horizon} must be a multiple of the "
            f"{d.video_frames - 1} future video frames"
        )
    for key, width in (
        ("delta_mask", action_width),
        ("action_as", action_width),
        ("action_state_dims", action_width),
        ("orientation", len(d.cameras)),
    ):
        count = len(getattr(d, key))
        if count not in (0, width):
            raise ValueError(
                f"config.data.{key} has {count} entries; expected {width}, one per "
                f"{'camera' if key == 'orientation' else 'action dimension'}, or ()"
            )
    for key, width, most in (
        ("state_dim", d.state_dim, c.model.proprio_dim),
        ("action_dim", d.action_dim, c.model.action_dim),
    ):
        if not 0 <= width <= most:
            raise ValueError(
                f"config.data.{key}={width} is not between 0 and the {most} of the model"
            )
