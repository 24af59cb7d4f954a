"""Which values of a config contradict each other; `config.py` has what each alone may be."""

import re


def check(c, frames_per_latent):
    """Raises ValueError for a `config.Config` that contradicts itself.

    These would otherwise surface minutes later, inside a compiled function.
    """
    _check_ranges(c)
    _check_data(c.data, c.model, frames_per_latent)
    if c.model.attention == "cudnn" and c.model.dtype != "bfloat16":
        raise ValueError(
            f"config.model.attention='cudnn' computes in bfloat16 only, "
            f"config.model.dtype is {c.model.dtype!r}; use 'auto' or 'xla'"
        )
    _check_head(c.model, c.loss)
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


def _check_head(model, loss):
    """What the action head reads has to be there when it acts."""
    generates, everything = model.generates, model.flow_reads == "all_frames"
    if not generates and not model.adapter_layers:
        raise ValueError(
            "config.model.action_head='state_fusion' reads the states at "
            "config.model.adapter_layers, and there are none; without adapters: "
            "adapter_scale=0, or action_head='flow_dit'"
        )
    if generates and not everything and model.attention_mask == "bidirectional":
        raise ValueError(
            "config.model.action_head='flow_dit' reads frame 0, which must not depend on later "
            "frames: use config.model.attention_mask='first_frame_causal'"
        )
    if everything and not generates:
        raise ValueError(
            "config.model.flow_reads='all_frames' is of config.model.action_head='flow_dit'; "
            f"this one is {model.action_head!r}, which reads the current frame"
        )
    if everything and not loss.lambda_video:
        raise ValueError(
            "config.model.flow_reads='all_frames' reads imagined frames, and with "
            "config.loss.lambda_video=0 nothing teaches the model to imagine them: use "
            "flow_reads='first_frame'"
        )
    if everything and loss.shift != model.flow_shift:
        raise ValueError(
            "config.model.flow_reads='all_frames' denoises video and actions by one schedule: "
            f"config.loss.shift={loss.shift} and config.model.flow_shift={model.flow_shift} must "
            "be equal"
        )


# What a number (or each of several) may be: (least, most, whether the most itself is too much).
_COUNT, _ONE, _SOME = (1, None, False), (0, 1, False), (0, None, False)
_RANGES = {
    "data": {
        **dict.fromkeys(("num_frames", "frame_stride", "action_horizon", "text_len"), _COUNT),
        **dict.fromkeys(("canvas", "camera_size", "prefetch"), _COUNT),
        **dict.fromkeys(("workers", "threads", "gripper_dims", "action_state_dims"), _SOME),
        "val_fraction": (0, 1, True),
        "tolerance_s": (0, 1e6, True),
    },
    "data.fields": {"fps": _SOME},
    "data.augment": {
        **dict.fromkeys(("brightness", "contrast", "saturation"), _SOME),
        "crop": _ONE,
    },
    "optimizer": {
        **dict.fromkeys(("warmup_steps", "weight_decay", "clip_norm", "lr"), _SOME),
        **dict.fromkeys(("b1", "b2", "ema_decay"), (0, 1, True)),
        **{"final_lr_ratio": _ONE, "accum_steps": _COUNT, "eps": _SOME},
    },
    "train": {
        **dict.fromkeys(("steps", "batch_size", "log_every"), _COUNT),
        **dict.fromkeys(("eval_every", "eval_batches", "checkpoint_every"), _SOME),
        **dict.fromkeys(("keep_last", "keep_every"), _SOME),
        "stuck_after_s": (0, 1e6, False),
    },
    "loss": {
        **dict.fromkeys(("lambda_video", "lambda_action", "prefix_steps"), _SOME),
        **dict.fromkeys(("prefix_weight", "tail_weight", "shift"), _SOME),
    },
    "evaluation": {
        **dict.fromkeys(("episodes", "replan_steps", "max_steps", "workers", "batch"), _COUNT),
        **dict.fromkeys(("first_seed", "videos"), _SOME),
    },
    "model": {
        **dict.fromkeys(("dim", "num_heads", "head_dim", "ffn_dim", "num_layers"), _COUNT),
        **dict.fromkeys(("text_dim", "freq_dim", "latent_channels", "num_queries"), _COUNT),
        **dict.fromkeys(("pool_heads", "per_layer_dim", "trunk_dim", "action_dim"), _COUNT),
        **dict.fromkeys(("proprio_dim", "scan_unroll", "flow_steps"), _COUNT),
        **dict.fromkeys(("lora_rank", "lora_layers", "adapter_layers", "adapter_dim"), _SOME),
        **dict.fromkeys(("merge_dim", "merge_slots", "trunk_blocks", "step_pos_dim"), _SOME),
        **dict.fromkeys(("flow_dim", "flow_ffn_dim", "flow_shift"), _SOME),
    },
    "mesh": dict.fromkeys(("data", "fsdp"), (-1, None, False)),
}  # fmt: skip
_ABOVE_0 = ("optimizer.lr", "optimizer.eps", "loss.shift", "model.flow_shift", "data.augment.crop")


def _check_ranges(c):
    """Each number alone, and the template of prompts."""
    for path, ranges in _RANGES.items():
        part = c
        for name in path.split("."):
            part = getattr(part, name)
        for key, (least, most, open_end) in ranges.items():
            value, name = getattr(part, key), f"{path}.{key}"
            for x in value if isinstance(value, tuple) else (value,):
                above = x > least if name in _ABOVE_0 else x >= least
                below = most is None or (x < most if open_end else x <= most)
                if not (above and below and x < float("inf")):  # NaN fails too
                    more = f"above {least}" if name in _ABOVE_0 else f"{least}"
                    end = " or more" if most is None else f" to {'below ' * open_end}{most:g}"
                    raise ValueError(f"config.{name} is {value}; expected {more}{end}")
    if c.seed < 0:
        raise ValueError(f"config.seed is {c.seed}; expected 0 or more")
    _check_template(c.data.prompt_template)
    _check_layers(c.model)


def _check_layers(model):
    for key in ("lora_layers", "adapter_layers"):
        wrong = [x for x in getattr(model, key) if x >= model.num_layers]
        if wrong:
            raise ValueError(
                f"config.model.{key} names {wrong}; the {model.num_layers} blocks of "
                f"config.model.num_layers are 0 to {model.num_layers - 1}"
            )


def _check_template(template):
    """Without {task} all instructions would be the same prompt."""
    others = sorted(set(re.findall(r"\{\w*\}", template)) - {"{task}"})
    if others or "{task}" not in template:
        has = f"has {', '.join(others)}" if others else "has no {task}"
        raise ValueError(
            f"config.data.prompt_template is {template!r}; it {has}: expected a text with {{task}} "
            "where the instruction belongs, and no other field"
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
    wrong = sorted(set(d.gripper_dims) - set(range(action_width)))
    if wrong:
        raise ValueError(
            f"config.data.gripper_dims names {wrong}; the actions have dimensions 0 to "
            f"{action_width - 1}"
        )
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
