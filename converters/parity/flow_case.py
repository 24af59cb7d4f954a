"""What the checks of Fast-WAM's action head share: the group's model, its inputs, its masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from converters import lightwam, rules, wan_dit
from converters.parity.fixtures import Compare
from converters.parity.training import batch_of
from lightwam_jax import build, params
from lightwam_jax.models import layers
from lightwam_jax.training import losses

GROUP = "i_flow_action"


class Case:
    """The group's model, its parameters, and comparisons with the noise that was recorded."""

    def __init__(self, fixtures, told):
        self.told, self.noises = told, told["noise_f32_vs_f64"]
        self.fixtures = fixtures
        tensors = flat_keys(fixtures.tensors(f"{GROUP}/weights.safetensors"))
        self.config = self.config_of(tensors)
        self.model = build.build_model(self.config)
        self.flat = rules.to_params(lightwam.CHECKPOINT, tensors, GROUP)
        self.tree = params.segmented(params.unflatten(self.flat), self.config)

    def config_of(self, tensors):
        """The `ModelConfig` of {flat key: array}."""
        video = self.told["config"]["video_dit"]
        return lightwam.model_config(
            rules.shapes_of(tensors),
            head_dim=video["attn_head_dim"],
            attention_mask=video["video_attention_mask_mode"],
        )

    def compare(self, name):
        """`Compare` that knows the recorded noise of `name`'s tensors."""
        compare = Compare(GROUP, name)

        def check(tensor, got, expected):
            noise = self.noises.get(f"{name}.{tensor.removeprefix('out_')}", {})
            return compare(tensor, got, expected, noise.get("max_abs_diff"))

        return check

    def reading_all_frames(self, **expert):
        """The model as the joint variant; `expert`: fields of its action stream."""
        return self.model.clone(expert=self.model.expert.clone(reads="all_frames", **expert))

    def run(self, method):
        """A jitted function (*inputs) of the model's submodules, by a function of the model."""
        apply = lambda tree, *inputs: self.model.apply({"params": tree}, *inputs, method=method)
        return functools.partial(jax.jit(apply), self.tree)


def flat_keys(tensors):
    """Keys of the weight and gradient files -> flat keys of a checkpoint."""
    return {f"mot.{key}" if key.startswith("mix") else key: x for key, x in tensors.items()}


def back(tree, config):
    """Canonical tree -> {flat key of a checkpoint: array}."""
    flat = {path: np.asarray(leaf) for path, leaf in params.flatten(tree).items()}
    stacked = wan_dit.stacked_layers(config.num_layers, config.lora_layers)
    return rules.from_params(lightwam.CHECKPOINT, flat, stacked)


def inputs_of(data):
    """A fixture's inputs -> (batch as the loader makes it, `FlowNoise`)."""
    names = {"timestep": "in_t_video", "noise": "in_noise_video", "in_video_latents": "in_latents"}
    batch, noise = batch_of({**data, **{ours: data[theirs] for ours, theirs in names.items()}})
    actions = (jnp.asarray(data[key]) for key in ("in_t_action", "in_noise_action"))
    return batch, losses.FlowNoise(*noise, *actions)


def attention_mask(case, data, all_frames):
    _, _, frames, height, width = data["in_latents"].shape
    per_frame, horizon = height * width // 4, data["in_action"].shape[1]
    seen = per_frame * (frames if all_frames else 1)
    return mask_of(frames * per_frame, per_frame, horizon, case.config.attention_mask, seen)


@functools.partial(jax.jit, static_argnums=range(5))
def mask_of(video, per_frame, actions, mode, seen):
    """[S+T,S+T] as the two attention calls have it: the values of keys are one-hot."""
    total = video + actions
    values = jnp.eye(total)[None, :, None, :]
    keys = jnp.zeros((1, total, 1, total))
    own = layers.frame_attention(
        keys[:, :video], keys[:, :video], values[:, :video], video // per_frame, mode
    )
    read = np.r_[0:seen, video:total]
    other = layers.attention(keys[:, video:], keys[:, read], values[:, read])
    return jnp.concatenate([own, other], axis=1)[0, :, 0] > 0


def contexts(model, text, proprio, mask):
    """(what the video's blocks read, what the action stream's blocks read) of a context."""
    return model.encode_context(text, proprio, mask), model.encode_action_context(text, proprio)


def joint_velocities(model, latents, t, actions, action_t, text, proprio, mask):
    """Velocities of a noised clip, and of actions that read its first frame."""
    context, own = contexts(model, text, proprio, mask)
    tokens, e, seen = model.dit.observe(latents, t, *context)
    first = jax.tree.map(lambda x: x[:, :, : x.shape[2] // latents.shape[1]], seen)
    velocity = model.dit.read_velocity(tokens, e, latents.shape).astype(jnp.float32)
    return velocity, model.expert.velocity(actions, action_t, first, own, context.mask)
