"""Checks of the model's parts: the transformer, the action expert, the schedule."""

import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from converters import lightwam, rules
from converters.parity.fixtures import Compare, channels_first, channels_last, matching
from lightwam_jax import build, flow, params
from lightwam_jax import config as config_lib
from lightwam_jax.models import adapters, blocks, layers

# ---- a_dit -------------------------------------------------------------------------------------


def a_dit(fixtures):
    """The video transformer: whole passes, every block alone, embeddings, tables, masks."""
    module, tree, flat = fixtures.dit("dit")
    for name in ("video_pass", "observation_pass"):
        data = fixtures.arrays(f"a_dit/{name}.npz")
        yield from _passes(fixtures, name, module, tree, data)
        yield from _blocks(name, module, flat, data)
    video = fixtures.arrays("a_dit/video_pass.npz")
    full = fixtures.arrays("a_dit/video_pass_full_mask.npz")
    got = _run(module, tree, dict(video, context_mask=None))["pred"]
    noise = fixtures.noise("a_dit/video_pass.pred")
    yield Compare("a_dit", "video_pass_full_mask")("pred", got, full["pred"], noise)
    data = fixtures.arrays("a_dit/alt_video_pass.npz")
    yield from _passes(fixtures, "alt_video_pass", *fixtures.dit("dit_alt")[:2], data)
    yield from _tables(fixtures)
    yield from _masks(fixtures)


def _run(module, tree, data):
    """One pass with everything a fixture may record, jitted."""

    @jax.jit
    def run(tree, latents, t, context, mask):
        def body(model):
            embedded = model.embed_context(context)
            kv = model.keys_values(embedded)
            tokens, taps, e = model.backbone(latents, t, kv, mask)
            velocity = model.read_velocity(tokens, e, latents.shape)
            return {"ctx_emb": embedded, "tokens_out": tokens, "taps": taps, "pred": velocity}

        return module.apply({"params": tree}, method=body)

    latents, mask = channels_last(data["latents"]), data["context_mask"]
    mask = None if mask is None else jnp.asarray(mask)
    out = run(tree, latents, jnp.asarray(data["timestep"]), data["context"], mask)
    return {**out, "pred": channels_first(out["pred"])}


def _grid(data):
    """(frames, rows, columns) of the tokens of a fixture's latents: patches are 2x2."""
    _, _, frames, height, width = data["latents"].shape
    return frames, height // 2, width // 2


def _passes(fixtures, name, module, tree, data):
    out = _run(module, tree, data)
    got = {"pred": out["pred"], "tokens_out": out["tokens_out"], "ctx_emb": out["ctx_emb"]}
    for layer, tap in out["taps"].items():
        got[f"block_out_{layer}"], got[f"adapter_out_{layer}"] = tap["backbone"], tap["adapted"]
    last = module.num_layers - 1
    if last not in out["taps"]:
        got[f"block_out_{last}"] = out["tokens_out"]
    times = np.stack([np.zeros_like(data["timestep"]), data["timestep"]], axis=1)
    got["t_emb"], got["t_mod"] = module.apply({"params": tree}, times, method="embed_time")
    cos, sin = layers.rope_table(*_grid(data), module.head_dim)
    got["rope_cos"], got["rope_sin"] = (a.reshape(-1, a.shape[-1]) for a in (cos, sin))
    got["grid"] = np.array(_grid(data))
    noise = lambda tensor: fixtures.noise(f"a_dit/{name}.{tensor}")
    yield from Compare("a_dit", name).recorded(got, data, noise)


def _blocks(name, module, flat, data):
    """Each block alone, fed the fixture's own input, so that an error names its block."""
    rope = layers.rope_table(*_grid(data), module.head_dim)
    prefix = "dit/blocks/"
    stacked = {path[len(prefix) :]: x for path, x in flat.items() if path.startswith(prefix)}
    block = blocks.Block(**module.block_fields(True))  # the fixture has LoRA in every block

    # Keys and values first, as in a real pass; then the block with its inner results captured.
    @jax.jit
    def run(tree, x):
        tree, rows = {"params": tree}, jnp.asarray(data["t_mod"])
        _, kv = block.apply(tree, None, data["ctx_emb"], method="keys_values")
        mask = jnp.asarray(data["context_mask"])
        (out, _), seen = block.apply(tree, x, kv, rows, rope, mask, capture_intermediates=True)
        return out, seen["intermediates"]

    x = data["tokens_in"]
    for place, i in enumerate(sorted(module.lora_layers)):
        index = lambda path, i=i, place=place: place if path.endswith(("lora_a", "lora_b")) else i
        tree = params.unflatten({path: leaf[index(path)] for path, leaf in stacked.items()})
        out, seen = run(tree, x)
        compare = Compare("a_dit", f"{name} block {i}")
        yield compare(f"block_out_{i}", out, data[f"block_out_{i}"])
        if i == 0:
            attention = seen["self_attn"]
            inner = {
                "q_normed": attention["norm_q"]["__call__"][0],
                "k_normed": attention["norm_k"]["__call__"][0],
                "self_attn": attention["__call__"][0][0],  # besides, its keys and values
                "cross_attn": seen["cross_attn"]["__call__"][0],
            }
            for tensor, value in inner.items():
                tensor = f"block0_{tensor}"
                yield compare(tensor, value, data[tensor])
        x = data.get(f"adapter_out_{i}", data[f"block_out_{i}"])


def _tables(fixtures):
    tables, compare = fixtures.arrays("a_dit/tables.npz"), Compare("a_dit", "tables")
    positions = tables["positions"]
    sinusoid = jax.jit(layers.sinusoid, static_argnums=1)
    for key in matching(tables, "sinusoid_dim*"):
        dim = int(key.removeprefix("sinusoid_dim"))
        yield compare(f"{key} (host)", layers.sinusoid_table(positions, dim), tables[key])
        yield compare(f"{key} (device)", sinusoid(positions, dim), tables[key])
    for key in matching(tables, "rope*_f_cos"):
        head_dim = int(key.removeprefix("rope").removesuffix("_f_cos"))
        count, third = len(tables[key]), head_dim // 3
        cuts = np.cumsum([(head_dim - 2 * third) // 2, third // 2])
        for axis, letter in enumerate("fhw"):
            grid = [1, 1, 1]
            grid[axis] = count
            for kind, table in zip(("cos", "sin"), layers.rope_table(*grid, head_dim)):
                part = np.split(table.reshape(count, -1), cuts, axis=1)[axis]
                name = f"rope{head_dim}_{letter}_{kind}"
                yield compare(name, part, tables[name])
    told = fixtures.json("a_dit/default_adapter_layers.json")
    default = adapters.default_adapter_layers
    wrong = sum(list(default(int(depth))) != chosen for depth, chosen in told.items())
    yield compare.none("default_adapter_layers", wrong)


def _masks(fixtures):
    """The frame rules, read off as which keys change which queries."""
    names = [path.name for path in (fixtures.root / "a_dit").iterdir()]
    for name in matching(names, "self_attention_masks_*tok_*perframe.npz"):
        tokens, per_frame = map(int, re.findall(r"\d+", name))
        for mode, mask in fixtures.arrays(f"a_dit/{name}").items():
            # One-hot values: the output of a query is its weights over keys.
            q = k = jnp.zeros((1, tokens, 1, tokens))
            v = jnp.eye(tokens)[None, :, None, :]
            seen = layers.frame_attention(q, k, v, tokens // per_frame, mode)[0, :, 0] > 0
            yield Compare("a_dit", "masks").exact(mode, seen, mask)


# ---- b_state_fusion ----------------------------------------------------------------------------


def b_state_fusion(fixtures):
    """The action expert in every configuration of the directory."""
    states = fixtures.arrays("b_state_fusion/inputs.npz")
    count, sources = len(matching(states, "adapted_*")), ("backbone", "adapted", "delta")
    states = [{source: states[f"{source}_{i}"] for source in sources} for i in range(count)]
    for path in sorted((fixtures.root / "b_state_fusion").glob("*.json")):
        case, told = path.stem, json.loads(path.read_text(encoding="utf-8"))
        tensors = fixtures.tensors(f"b_state_fusion/{case}.safetensors")
        fields = lightwam.expert_fields(
            rules.shapes_of(tensors),
            told["video_hidden_dim"],
            told.get("token_pooling_num_heads"),
            told["resolved_layer_sources"],
        )
        fields.update(dtype="float32", adapter_layers=tuple(range(count)), num_layers=count)
        config = config_lib.model_variant("tiny", **fields)
        expert = build.build_model(config).expert
        tree = params.unflatten(rules.to_params(lightwam.EXPERT, tensors, case))["expert"]

        def apply(tree, expert=expert, horizon=told["action_horizon"]):
            return expert.apply({"params": tree}, states, horizon)

        action, taps = jax.jit(apply)(tree)
        got = {"action": action, "fused_proj": taps["fused"], "step_pos": taps["step_pos"]}
        got |= {key: tap for key, tap in taps.items() if key.startswith(("pooled", "compressed"))}
        data = fixtures.arrays(f"b_state_fusion/{case}.npz")
        noise = lambda tensor, case=case: fixtures.noise(f"b_state_fusion/{case}.{tensor}")
        compare = Compare("b_state_fusion", case)
        yield from compare.recorded({**got, **attentions(taps)}, data, noise)


def attentions(taps):
    """What the fixtures record of every pooler's attention."""
    got = {}
    for key in matching(taps, "attention_*"):
        name = key.removeprefix("attention_")
        weights, importance = taps[key], taps[f"query_importance_{name}"]
        got |= {
            f"attn_{name}.per_query_attention": weights,
            f"attn_{name}.query_importance": importance,
            f"attn_{name}.summary_attention": jnp.einsum("q,bqs->bs", importance, weights),
            f"attn_{name}.top_query_idx": jnp.argmax(importance),
        }
    return got


# ---- c_scheduler -------------------------------------------------------------------------------


def c_scheduler(fixtures):
    """The flow-matching schedule for every shift of the directory."""
    data = fixtures.arrays("c_scheduler/scheduler.npz")
    told = fixtures.json("c_scheduler/scheduler.json")

    def check(tensor, got):
        noise = float(np.abs(data[tensor]).max()) * 1e-7
        return Compare("c_scheduler", tensor.split("_")[0])(tensor, got, data[tensor], noise)

    for name, constants in told.items():
        compare, shift = Compare("c_scheduler", name), float(name.removeprefix("shift"))
        low, mean = flow.weight_constants(shift)
        for key, got in (("y_min", low), ("weight_norm_const", mean)):
            yield compare(key, got, constants[key], tolerance=1e-12)
        times, rounded = flow.sample_time(data["u"], shift), f"{name}_sampled_t_bf16_as_f32"
        yield check(f"{name}_sampled_t", times)
        yield compare.exact(rounded, np.asarray(times).astype(ml_dtypes.bfloat16), data[rounded])
        yield check(f"{name}_weight_grid", flow.weight(data["t_grid"], shift))
        for key in matching(data, f"{name}_*timesteps*"):
            middle, steps = key.removeprefix(f"{name}_").split("timesteps")
            override = middle.removeprefix("override").rstrip("_")
            times, deltas = flow.sampling_schedule(int(steps), float(override or shift))
            yield check(key, times)
            yield check(key.replace("timesteps", "deltas"), deltas)
    x, noise, t = data["x"], data["noise"], data["t"]
    yield check("add_noise", flow.add_noise(x, noise, t))
    yield check("target", flow.target(x, noise))
    # How the fixture was made: the Euler step moves x along `noise` by the fourth of ten steps;
    # the scalar weight is taken at t = 421.
    yield check("step_result", flow.euler_step(x, noise, flow.sampling_schedule(10, 5.0)[1][3]))
    yield check("weight_scalar_t", flow.weight(np.float32(421.0), 5.0))
