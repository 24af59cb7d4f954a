"""Checks of Fast-WAM's action head: both streams' parts and blocks, rollouts, first values."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from converters import lightwam
from converters.parity.fixtures import Compare, channels_first, channels_last
from converters.parity.flow_case import GROUP, back, contexts, joint_velocities
from lightwam_jax import flow, params
from lightwam_jax.inference import deploy_flow, deploy_joint
from lightwam_jax.models import action_dit, layers
from lightwam_jax.models import blocks as blocks_lib

# ---- parts -------------------------------------------------------------------------------------


def parts(case, data):
    """What enters the blocks of both streams."""
    patches = channels_last(data["out_video_in"])
    b, f, h, w, c = patches.shape
    patches = patches.reshape(b, f, h // 2, 2, w // 2, 2, c).swapaxes(3, 4).reshape(b, -1, 4 * c)
    times = np.stack([0 * data["in_t_video"], data["in_t_video"]], axis=1), data["in_t_action"]
    inputs = patches, data["out_action_in"], data["in_context"], data["in_proprio"][:, 0]
    got = case.run(_entries)(*times, *inputs)
    for name, tables in (
        ("video", layers.rope_table(f, h // 2, w // 2, case.config.head_dim)),
        ("action", layers.line_rope_table(data["in_action"].shape[1], case.config.head_dim)),
    ):
        for kind, table in zip(("cos", "sin"), tables):
            got[f"{name}_rope_{kind}"] = table.reshape(-1, table.shape[-1])
    for tensor, value in got.items():
        yield case.compare("train_release")(f"out_{tensor}", value, data[f"out_{tensor}"])


def _entries(model, t_video, t_action, patches, actions, text, proprio):
    rows, got = jnp.concatenate([text, model.proprio_encoder(proprio)[:, None]], axis=1), {}
    for name, stream, t in (("video", model.dit, t_video), ("action", model.expert, t_action)):
        got[f"{name}_context"] = stream.embed_context(rows)
        got[f"{name}_t_emb"], got[f"{name}_t_mod"] = stream.embed_time(t)
    got["video_tokens_in"] = model.dit.patch_embedding(patches)
    got["action_tokens_in"] = model.expert.action_encoder(actions)
    return got


def blocks(case, data):
    """Each block of both streams alone, fed the fixture's own input."""
    video, action = _block(case, "video", data), _block(case, "action", data)
    per_frame = data["in_latents"].shape[3] * data["in_latents"].shape[4] // 4
    for i in range(case.config.num_layers):
        own, got = video(i, None)
        yield from _block_checks(case, got, data)
        _, got = action(i, jax.tree.map(lambda x: x[:, :per_frame], own))
        yield from _block_checks(case, got, data)


def _block(case, name, data):
    """Function (block number, seen) -> (its keys and values, {tensor: value}) of a stream."""
    config, (_, _, frames, height, width) = case.config, data["in_latents"].shape
    if name == "video":
        root, rope = (
            "dit/blocks/",
            layers.rope_table(frames, height // 2, width // 2, config.head_dim),
        )
        fields = case.model.dit.block_fields(False)
    else:
        root, rope = (
            "expert/blocks/",
            layers.line_rope_table(data["in_action"].shape[1], config.head_dim),
        )
        fields = case.model.expert.block_fields()
    block = blocks_lib.Block(**fields)
    rows = jnp.asarray(data[f"out_{name}_t_mod"])
    rows = rows if name == "video" else rows[:, None]
    mask = jnp.pad(jnp.asarray(data["in_context_mask"]), ((0, 0), (0, 1)), constant_values=True)

    @jax.jit
    def run(tree, x, seen):
        _, kv = block.apply(tree, None, data[f"out_{name}_context"], method="keys_values")
        inputs = x, kv, rows, rope, mask, seen
        (out, own), kept = block.apply(tree, *inputs, method="_run", capture_intermediates=True)
        kept = kept["intermediates"]["self_attn"]
        q = kept["norm_q"]["__call__"][0].reshape(own[0].shape)
        q = layers.apply_rope(q, *rope)
        if seen is None:
            mixed = layers.frame_attention(q, *own, rope[0].shape[0], fields["mode"])
        else:
            mixed = layers.attention(q, *(jnp.concatenate(pair, 1) for pair in zip(seen, own)))
        inner = {"q": q, "k": own[0], "v": own[1], "mixed": mixed}
        return out, own, {key: x.reshape(*x.shape[:2], -1) for key, x in inner.items()}

    def one(i, seen):
        tree = {key[len(root) :]: x[i] for key, x in case.flat.items() if key.startswith(root)}
        x = data[f"out_{name}_block_out_{i - 1}" if i else f"out_{name}_tokens_in"]
        out, own, inner = run({"params": params.unflatten(tree)}, x, seen)
        inner = {f"{name}_block0_{key}": x for key, x in inner.items()} if i == 0 else {}
        return own, {f"{name}_block_out_{i}": out, **inner}

    return one


def _block_checks(case, got, data):
    for tensor, value in got.items():
        yield case.compare("train_release")(f"out_{tensor}", value, data[f"out_{tensor}"])


# ---- rollouts ----------------------------------------------------------------------------------


class _Rollout:
    """The frame's keys and values, and steps of the action stream, for the inputs of a fixture."""

    def __init__(self, case, data):
        self.data, self.case = data, case
        self._observe = case.run(
            lambda model, first, text, proprio, mask: (
                (both := contexts(model, text, proprio, mask)),
                model.dit.observe(first, None, *both[0])[-1],
            )
        )
        self._velocity = case.run(
            lambda model, x, t, seen, context: model.expert.velocity(
                x, t, seen, context[1], context[0].mask
            )
        )

    def observe(self, proprio=True, mask="in_context_mask"):
        """(context, keys and values of the frame)."""
        first, data = channels_last(self.data["in_first_latent"]), self.data
        proprio = data["in_proprio"] if proprio else None
        return self._observe(first, data["in_context"], proprio, jnp.asarray(data[mask]))

    def solve(self, noise, steps, shift, context, seen):
        x = jnp.asarray(self.data[noise])
        for t, delta in zip(*flow.sampling_schedule(steps, shift)):
            x = flow.euler_step(x, self._velocity(x, t[None], seen, context), delta)
        return x[0]


def infer_action(case, data):
    """The policy: all of it as it is called, and the options of the reference step by step."""
    rollout, steps = _Rollout(case, data), len(data["out_timesteps"])
    times, deltas = flow.sampling_schedule(steps, case.model.expert.shift)
    horizon = data["in_noise_action"].shape[1]
    model = case.model.clone(expert=case.model.expert.clone(steps=steps))

    @jax.jit
    def act(tree, first, text, proprio, mask, noise):
        inputs = first, text, proprio, horizon, mask, noise
        return model.apply({"params": tree}, *inputs, method="act")

    inputs = channels_last(data["in_first_latent"]), data["in_context"], data["in_proprio"]
    run = lambda mask: act(case.tree, *inputs, jnp.asarray(data[mask]), data["in_noise_action"])
    actions, taps = run("in_context_mask")
    context, seen = rollout.observe()
    flat = lambda x: x[:, 0].reshape(x.shape[0], x.shape[2], -1)
    solve = functools.partial(rollout.solve, context=context, seen=seen)
    shift = case.model.expert.shift
    bare = rollout.observe(proprio=False)
    got = {
        "timesteps": times,
        "deltas": deltas,
        "action": actions[0],
        "velocity_action": taps["velocity"],
        "latents_action": taps["latents"],
        "video_k": flat(seen[0]),
        "video_v": flat(seen[1]),
        "action_masked_context": run("in_context_mask_masked")[0][0],
        "action_ten_steps": solve("in_noise_action", 10, shift),
        "action_one_step": solve("in_noise_action", 1, shift),
        "action_shift_2": solve("in_noise_action", steps, 2.0),
        "action_other_horizon": solve("in_noise_action_other_horizon", steps, shift),
        "action_no_proprio": rollout.solve("in_noise_action", steps, shift, *bare),
    }
    for tensor, value in got.items():
        yield case.compare("infer_action")(f"out_{tensor}", value, data[f"out_{tensor}"])
    yield from _deployed(case, data, steps)


def _deployed(case, data, steps):
    """The deployed form (inference/deploy_flow.py): the same actions."""
    config = dataclasses.replace(case.config, flow_steps=steps)
    weights = deploy_flow.deployed(case.tree, config, data["in_noise_action"].shape[1])
    first, noise = channels_last(data["in_first_latent"]), data["in_noise_action"]

    @jax.jit
    def act(weights, mask):
        text = deploy_flow.keys_values(weights, data["in_context"], config)
        inputs = first, text, mask, data["in_proprio"], config
        return deploy_flow.act(weights, *inputs, noise=noise)[0]

    for tensor, mask in (("action", ""), ("action_masked_context", "_masked")):
        got = act(weights, jnp.asarray(data[f"in_context_mask{mask}"]))[0]
        yield Compare(GROUP, "deployed")(tensor, got, data[f"out_{tensor}"])


def infer_joint(case, data, recorded):
    """Video and actions denoised together: actions read frame 0, or all frames of the clip."""
    noise = channels_last(recorded["in_noise_video"]), data["in_noise_action"]
    first, steps = channels_last(data["in_first_latent"]), len(data["out_timesteps"])
    context = data["in_context"], data["in_proprio"], jnp.asarray(data["in_context_mask"])
    model = case.reading_all_frames(steps=steps)

    @jax.jit
    def act(tree, text, proprio, mask):
        inputs = first, text, proprio, noise[1].shape[1], mask, noise
        return model.apply({"params": tree}, *inputs, method="act")

    actions, went = act(case.tree, *context)
    rollouts = {
        "out_": _first_frame(case, steps, first, noise, context),
        "out_all_video_": {**went, "action": actions[0]},
    }
    names = {"velocity": "velocity_action", "latents": "latents_action"}
    for prefix, got in rollouts.items():
        for kind in ("velocity", "latents"):
            video = got.pop(f"video_{kind}")
            got[f"{kind}_video"] = np.stack([channels_first(x) for x in video])
        got = {names.get(tensor, tensor): x for tensor, x in got.items()}
        got["last_latents_video"] = got["latents_video"][-1]
        for tensor in sorted({prefix + tensor for tensor in got} & set(recorded)):
            value = got[tensor.removeprefix(prefix)]
            yield case.compare("infer_joint")(tensor, value, recorded[tensor])
    yield from _deployed_joint(case, steps, first, noise, context, recorded)


def _first_frame(case, steps, first, noise, context):
    """The rollout whose actions read frame 0, beside the video's: {tap: [steps,...], "action"}."""
    (x, a), run, went = map(jnp.asarray, noise), case.run(joint_velocities), []
    x = x.at[:, :1].set(first)
    for t, delta in zip(*flow.sampling_schedule(steps, case.model.expert.shift)):
        v, u = run(x, t[None], a, t[None], *context)
        x = flow.euler_step(x, v, delta).at[:, :1].set(first)
        a = flow.euler_step(a, u, delta)
        went.append({"velocity": u, "latents": a, "video_velocity": v, "video_latents": x})
    return {tap: np.stack([each[tap] for each in went]) for tap in went[0]} | {"action": a[0]}


def _deployed_joint(case, steps, first, noise, context, recorded):
    """The deployed form (inference/deploy_joint.py): the same actions."""
    config = dataclasses.replace(case.config, flow_reads="all_frames", flow_steps=steps)
    weights = deploy_joint.deployed(case.tree, config, noise[1].shape[1])

    @jax.jit
    def act(weights, text, proprio, mask):
        text = deploy_joint.keys_values(weights, text, config)
        return deploy_joint.act(weights, first, text, mask, proprio, config, noise=noise)[0]

    tensor = "out_all_video_action"
    got = act(weights, *context)[0]
    yield Compare(GROUP, "deployed")(tensor.removeprefix("out_"), got, recorded[tensor])


# ---- first values ------------------------------------------------------------------------------


def first_values(case, recorded):
    """The action stream made of the video's weights."""
    expert = case.tree["expert"]
    made = action_dit.from_video(params.canonical(case.tree)["dit"], expert)
    got = {
        key.removeprefix(f"mot.{lightwam.ACTION_PREFIX}"): x
        for key, x in back({"expert": made}, case.config).items()
    }
    for key, expected in sorted(recorded.items()):
        yield Compare(GROUP, "init_from_video")(key, got[key], expected)
    kept = ("action_encoder.weight", "head.weight")
    before = back({"expert": expert}, case.config)
    changed = sum(
        not np.array_equal(got[key], before[f"mot.{lightwam.ACTION_PREFIX}{key}"]) for key in kept
    )
    yield Compare(GROUP, "init_from_video").none("ends changed", changed)
