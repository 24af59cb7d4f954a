"""Configs: every file resolves, and every mistake is named."""

import dataclasses
import json

import jax
import pytest

from configs import (
    base,
    demo,
    hdf5_robot,
    lerobot_robot,
    libero,
    libero_scratch,
    libero_standin,
    metaworld,
    rlds,
    rlds_robot,
    robotwin,
    wan22_5b,
)
from lightwam_jax import build, params
from lightwam_jax import config as config_lib
from lightwam_jax.data import cameras, spec
from lightwam_jax.models import variants


@pytest.mark.parametrize(
    "make",
    [
        demo.get_config,
        lambda: demo.get_config("flow_dit"),
        metaworld.get_config,
        robotwin.get_config,
        wan22_5b.get_config,
        *(
            lambda make=module.get_config, name=name: make(name)
            for module, names in (
                (libero, libero.SUITES),
                (rlds, rlds.SUITES),
                (hdf5_robot, hdf5_robot.LAYOUTS),
                (lerobot_robot, lerobot_robot.SIZES),
                (rlds_robot, rlds_robot.SIZES),
                (libero_standin, libero_standin.SUITES),
                (libero_scratch, (*libero_scratch.SUITES, "all")),
            )
            for name in names
        ),
    ],
)
def test_configs_resolve_and_survive_json(make):
    config = config_lib.from_config_dict(make())
    assert config_lib.from_json(config_lib.to_json(config)) == config


@pytest.mark.parametrize("module", [hdf5_robot, lerobot_robot, rlds_robot])
def test_a_robot_starts_small_with_the_edits_of_the_large_model(module):
    """`tiny` needs no weights, is `own` in everything that describes the robot, and builds."""
    own, tiny = (config_lib.from_config_dict(module.get_config(x)) for x in ("own", "tiny"))
    assert (tiny.data.codec, tiny.data.text_encoder) == ("pca", "hashed")
    assert (own.data.codec, own.data.text_encoder) == ("wan21", "umt5")
    assert tiny.data.cache != own.data.cache and tiny.train.trainable == (".*",)
    robot = ("source", "path", "fields", "cameras", "orientation", "layout", "delta_mask",
             "gripper_dims", "gripper_closed_open", "val_fraction")  # fmt: skip
    for key in robot:
        assert getattr(tiny.data, key) == getattr(own.data, key), key
    for c, pixels in ((own, 224), (tiny, 64)):
        assert {box.size for box in cameras.regions(c.data).values()} == {(pixels, pixels)}
    batch, model = spec.batch_spec(tiny, 2), build.build_model(tiny.model)
    shapes = jax.eval_shape(lambda: build.init_params(model, jax.random.key(0), tiny.model))
    table = {name: total for name, total, _ in params.count_table(shapes, tiny.train.trainable)}
    assert table["total"] < 2e6
    actions, _ = jax.eval_shape(
        lambda p, x, text, state: model.apply(
            {"params": p}, x[:, :1], text, state, tiny.data.action_horizon, method="act"
        ),
        *(shapes, batch["latents"], batch["context"], batch["proprio"]),
    )
    assert actions.shape == batch["actions"].shape == (2, 16, 7)
    with pytest.raises(ValueError, match=r"configs/\w+_robot.py:huge: expected one of own"):
        module.get_config("huge")


def test_the_released_recipe():
    """docs/spec.md sections 0 and 6, value by value."""
    c = config_lib.from_config_dict(libero.get_config("spatial"))
    o = c.optimizer
    assert (o.lr, o.warmup_steps, o.final_lr_ratio) == (1e-4, 1000, 0.01)
    assert (o.b1, o.b2, o.eps, o.weight_decay, o.clip_norm) == (0.9, 0.95, 1e-8, 1e-2, 0.0)
    assert (c.train.steps, c.train.batch_size) == (150_000, 64)
    assert (
        c.loss.downsample,
        c.loss.prefix_steps,
        c.loss.prefix_weight,
        c.loss.tail_weight,
        c.loss.shift,
        c.loss.residual_target,
    ) == (2, 8, 1.0, 0.0, 5.0, False)
    assert (c.data.canvas, c.data.video_frames, c.data.latent_frames, c.data.action_horizon) == (
        (224, 448),
        9,
        3,
        32,
    )
    assert (c.model.lora_rank, c.model.lora_alpha, c.model.adapter_layers, c.model.adapter_dim) == (
        64,
        128.0,
        (8, 16, 24),
        256,
    )
    assert c.data.delta_mask == (True,) * 6 + (False,) and c.data.normalization == "min_max"
    r = config_lib.from_config_dict(robotwin.get_config())
    assert (r.train.steps, r.optimizer.accum_steps, r.loss.prefix_steps, r.data.normalization) == (
        500_000,
        2,
        24,
        "z_score_reference",
    )
    assert (r.model.action_dim, r.model.proprio_dim, r.data.canvas) == (14, 14, (384, 320))
    assert [
        config_lib.from_config_dict(libero.get_config(s)).evaluation.max_steps
        for s in ("spatial", "object", "goal", "10")
    ] == [400, 400, 400, 700]
    with pytest.raises(ValueError, match="spatial, object"):
        libero.get_config("kitchen")


def test_the_wan22_backbone():
    """Its published size, latents of 48 channels at a 16th of the canvas, and canvas checks."""
    c = config_lib.from_config_dict(wan22_5b.get_config("spatial"))
    model = build.build_model(c.model)
    shapes = jax.eval_shape(lambda: build.init_params(model, jax.random.key(0), c.model))
    table = {name: total for name, total, _ in params.count_table(shapes, c.train.trainable)}
    assert table["backbone"] + table["video_head"] == 4_999_787_712
    assert round(table["total"] / 1e9, 2) == 5.63
    batch = spec.batch_spec(c, 2)
    assert batch["latents"].shape == (2, 3, 14, 28, 48)
    noisy = batch["latents"].shape
    velocity, actions = jax.eval_shape(
        lambda p, x, t, text, state: model.apply({"params": p}, x, t, x[:, :1], text, state, 32),
        shapes,
        jax.ShapeDtypeStruct(noisy, "float32"),
        jax.ShapeDtypeStruct((2,), "float32"),
        batch["context"],
        batch["proprio"],
    )
    assert (velocity.shape, actions.shape) == (noisy, (2, 32, 7))
    pooled = dataclasses.replace(c, loss=dataclasses.replace(c.loss, downsample=2))
    with pytest.raises(ValueError, match=r"multiples of 64 \(16 pixels per latent cell"):
        spec.batch_spec(pooled, 2)


def _broken(section, key, value):
    tree = json.loads(config_lib.to_json(config_lib.from_config_dict(base.get_config("tiny"))))
    tree[section][key] = value
    return tree


@pytest.mark.parametrize(
    "section, key, value, words",
    [
        ("optimizer", "learning_rate", 1e-3, "config.optimizer.learning_rate is not a config key"),
        ("optimizer", "warmup_step", 3, "did you mean 'warmup_steps'"),
        ("train", "steps", "many", "config.train.steps is 'many'"),
        ("train", "steps", True, "expected int"),
        ("model", "attention_mask", "causal", "expected one of 'first_frame_causal'"),
        ("data", "frame_stride", 5, "video frames"),
        ("data", "codec", "wan23", "expected one of 'wan21', 'wan22', 'pca'"),
        ("data", "action_horizon", 30, "multiple of the 8 future video frames"),
        ("data", "delta_mask", [True], "delta_mask has 1 entries"),
        ("data", "action_kinds", ["delta"], "action_kinds has 1 entries; expected 7"),
        ("data", "action_kinds", ["speed"] * 7, "expected one of 'delta', 'absolute', 'gripper'"),
        ("optimizer", "accum_steps", 3, "must be a multiple"),
        ("evaluation", "replan_steps", 99, "executes more steps than the chunk"),
        ("loss", "downsample", 3, "expected one of 1, 2, 4"),
    ],
)
def test_mistakes_are_named(section, key, value, words):
    with pytest.raises(ValueError, match=words):
        config_lib.from_config_dict(_broken(section, key, value))


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"model.action_head": "state_fusion"},
            "flow_reads='all_frames' is of config.model.action",
        ),
        ({"loss.lambda_video": 0.0}, "nothing teaches the model to imagine them"),
        ({"loss.shift": 3.0}, "loss.shift=3.0 and config.model.flow_shift=5.0 must be equal"),
        ({"model.flow_reads": "first_frame"}, "reads frame 0, which must not depend on later"),
        (
            {"model.action_head": "state_fusion", "model.adapter_layers": ()},
            "adapter_layers, and there are none",
        ),
        ({}, None),
    ],
)
def test_what_actions_read_has_to_be_there(changes, words):
    c = base.get_config("tiny", action_head="flow_dit", flow_reads="all_frames")
    c.model.attention_mask = "bidirectional"
    c.update_from_flattened_dict(changes)
    if words is None:
        assert config_lib.from_config_dict(c).model.imagines
        return
    with pytest.raises(ValueError, match=words):
        config_lib.from_config_dict(c)


def test_missing_keys_are_named():
    tree = _broken("mesh", "data", 1)
    del tree["mesh"]["fsdp"]
    with pytest.raises(ValueError, match=r"config\.mesh lacks fsdp"):
        config_lib.from_config_dict(tree)


def test_variants_fill_every_field_and_refuse_others():
    fields = dataclasses.fields(config_lib.ModelConfig)
    sizes = {f.name for f in fields if f.default is dataclasses.MISSING} - {"variant"}
    for name, table in variants.VARIANTS.items():
        assert set(table) == sizes, name
    with pytest.raises(ValueError, match="'huge' is unknown; expected one of wan21_1_3b, wan22_5b"):
        config_lib.model_variant("huge")
    with pytest.raises(ValueError, match=r"num_head is not a config key; did you mean 'num_heads'"):
        config_lib.model_variant("tiny", num_head=3)
