"""Checks of the model's parts: the transformer, the action expert, the schedule."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from converters import lightwam, rules
from converters.parity.fixtures import channels_first, channels_last, compare, matching
from lightwam_jax import build, flow, params
from lightwam_jax import config as config_lib
from lightwam_jax.models import adapters, dit, layers

SOURCES = {
    "h": "backbone",
    "base": "backbone",
    "frozen": "backbone",
    "backbone": "backbone",
    "h'": "adapted",
    "h_prime": "adapted",
    "hprime": "adapted",
    "adapter": "adapted",
    "adapted": "adapted",
    "delta": "delta",
}


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
    out = _run(module, tree, dict(video, context_mask=None))
    yield compare(
        "a_dit",
        "video_pass_full_mask",
        "pred",
        out["pred"],
        full["pred"],
        fixtures.noise("a_dit/video_pass.pred"),
    )
    alt, alt_tree, _ = fixtures.dit("dit_alt")
    yield from _passes(
        fixtures, "alt_video_pass", alt, alt_tree, fixtures.arrays("a_dit/alt_video_pass.npz")
    )
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
            return {
                "ctx_emb": embedded,
                "tokens_out": tokens,
                "taps": taps,
                "pred": model.read_velocity(tokens, e, latents.shape),
            }

        return module.apply({"params": tree}, method=body)

    mask = data["context_mask"]
    out = run(
        tree,
        channels_last(data["latents"]),
        jnp.asarray(data["timestep"]),
        data["context"],
        None if mask is None else jnp.asarray(mask),
    )
    return {**out, "pred": channels_first(out["pred"])}


def _passes(fixtures, name, module, tree, data):
    out = _run(module, tree, data)
    got = {"pred": out["pred"], "tokens_out": out["tokens_out"], "ctx_emb": out["ctx_emb"]}
    for layer, tap in out["taps"].items():
        got[f"block_out_{layer}"], got[f"adapter_out_{layer}"] = tap["backbone"], tap["adapted"]
    last = module.num_layers - 1
    if last not in out["taps"]:
        got[f"block_out_{last}"] = out["tokens_out"]
    frames = data["latents"].shape[2]
    times = np.stack([np.zeros_like(data["timestep"]), data["timestep"]], axis=1)
    got["t_emb"], got["t_mod"] = module.apply({"params": tree}, times, method="embed_time")
    height, width = (side // 2 for side in data["latents"].shape[-2:])
    cos, sin = layers.rope_table(frames, height, width, module.head_dim)
    got["rope_cos"], got["rope_sin"] = (a.reshape(-1, a.shape[-1]) for a in (cos, sin))
    got["grid"] = np.array([frames, height, width])
    for tensor, value in got.items():
        if tensor in data:
            yield compare(
                "a_dit", name, tensor, value, data[tensor], fixtures.noise(f"a_dit/{name}.{tensor}")
            )


def _blocks(name, module, flat, data):
    """Each block alone, fed the fixture's own input, so that an error names its block."""
    frames = data["latents"].shape[2]
    height, width = (side // 2 for side in data["latents"].shape[-2:])
    rope = layers.rope_table(frames, height, width, module.head_dim)
    stacked = {
        path.removeprefix("dit/blocks/"): leaf
        for path, leaf in flat.items()
        if path.startswith("dit/blocks/")
    }
    lora_index = {layer: i for i, layer in enumerate(sorted(module.lora_layers))}
    block = dit.Block(**module.block_fields(True))  # the fixture has LoRA in every block

    # Keys and values first, as in a real pass; then the block with its inner results captured.
    @jax.jit
    def run(tree, x):
        _, kv = block.apply({"params": tree}, None, data["ctx_emb"], method="keys_values")
        rows = jnp.asarray(data["t_mod"])
        (out, _), seen = block.apply(
            {"params": tree},
            x,
            kv,
            rows,
            rope,
            jnp.asarray(data["context_mask"]),
            capture_intermediates=True,
        )
        return out, seen["intermediates"]

    x = data["tokens_in"]
    for i in range(module.num_layers):
        if i not in lora_index:
            continue
        tree = params.unflatten(
            {
                path: leaf[lora_index[i] if path.endswith(("lora_a", "lora_b")) else i]
                for path, leaf in stacked.items()
            }
        )
        out, seen = run(tree, x)
        yield compare("a_dit", f"{name} block {i}", f"block_out_{i}", out, data[f"block_out_{i}"])
        if i == 0:
            attention = seen["self_attn"]
            inner = {
                "q_normed": attention["norm_q"],
                "k_normed": attention["norm_k"],
                "self_attn": attention,
                "cross_attn": seen["cross_attn"],
            }
            for tensor, value in inner.items():
                yield compare(
                    "a_dit",
                    f"{name} block 0",
                    f"block0_{tensor}",
                    value["__call__"][0],
                    data[f"block0_{tensor}"],
                )
        x = data.get(f"adapter_out_{i}", data[f"block_out_{i}"])


def _tables(fixtures):
    tables = fixtures.arrays("a_dit/tables.npz")
    positions = tables["positions"]
    sinusoid = jax.jit(layers.sinusoid, static_argnums=1)
    for key in matching(tables, "sinusoid_dim*"):
        dim = int(key.removeprefix("sinusoid_dim"))
        host, device = layers.sinusoid_table(positions, dim), sinusoid(positions, dim)
        yield compare("a_dit", "tables", f"{key} (host)", host, tables[key])
        yield compare("a_dit", "tables", f"{key} (device)", device, tables[key])
    for key in matching(tables, "rope*_f_cos"):
        head_dim = int(key.removeprefix("rope").removesuffix("_f_cos"))
        count = len(tables[key])
        third = head_dim // 3
        cuts = np.cumsum([(head_dim - 2 * third) // 2, third // 2])
        for axis, letter in enumerate("fhw"):
            grid = [1, 1, 1]
            grid[axis] = count
            for kind, table in zip(("cos", "sin"), layers.rope_table(*grid, head_dim)):
                part = np.split(table.reshape(count, -1), cuts, axis=1)[axis]
                name = f"rope{head_dim}_{letter}_{kind}"
                yield compare("a_dit", "tables", name, part, tables[name])
    told = fixtures.json("a_dit/default_adapter_layers.json")
    wrong = sum(
        list(adapters.default_adapter_layers(int(n))) != chosen for n, chosen in told.items()
    )
    yield compare("a_dit", "tables", "default_adapter_layers", wrong, 0, tolerance=0.0)


def _masks(fixtures):
    """The frame rules, read off as which keys change which queries."""
    for name in matching(
        [p.name for p in (fixtures.root / "a_dit").iterdir()],
        "self_attention_masks_*tok_*perframe.npz",
    ):
        tokens, per_frame = (
            int("".join(filter(str.isdigit, part)))
            for part in name.removeprefix("self_attention_masks_").split("_")[:2]
        )
        for mode, mask in fixtures.arrays(f"a_dit/{name}").items():
            # One-hot values: the output of a query is its weights over keys.
            q = k = jnp.zeros((1, tokens, 1, tokens))
            v = jnp.eye(tokens)[None, :, None, :]
            seen = layers.frame_attention(q, k, v, tokens // per_frame, mode)[0, :, 0] > 0
            yield compare("a_dit", "masks", mode, seen, mask, tolerance=0.0)


# ---- b_state_fusion ----------------------------------------------------------------------------


def b_state_fusion(fixtures):
    """The action expert in every configuration of the directory."""
    states = fixtures.arrays("b_state_fusion/inputs.npz")
    count = len(matching(states, "adapted_*"))
    states = [
        {source: states[f"{source}_{i}"] for source in ("backbone", "adapted", "delta")}
        for i in range(count)
    ]
    for path in sorted((fixtures.root / "b_state_fusion").glob("*.json")):
        case, told = path.stem, json.loads(path.read_text())
        tensors = fixtures.tensors(f"b_state_fusion/{case}.safetensors")
        fields = lightwam.expert_fields(
            {key: tensor.shape for key, tensor in tensors.items()},
            told["video_hidden_dim"],
            told.get("token_pooling_num_heads"),
            told["resolved_layer_sources"],
        )
        fields |= dict(dtype="float32", adapter_layers=tuple(range(count)), num_layers=count)
        config = config_lib.model_variant("tiny", **fields)
        expert = build.build_model(config).expert
        tree = params.unflatten(rules.to_params(lightwam.EXPERT, tensors, case))["expert"]
        run = jax.jit(
            lambda tree, expert=expert, n=told["action_horizon"]: expert.apply(
                {"params": tree}, states, n
            )
        )
        data = fixtures.arrays(f"b_state_fusion/{case}.npz")
        yield from _expert(fixtures, case, data, *run(tree))


def _expert(fixtures, case, data, action, taps):
    got = {"action": action, "fused_proj": taps["fused"], "step_pos": taps["step_pos"]}
    got.update({key: tap for key, tap in taps.items() if key.startswith(("pooled", "compressed"))})
    got.update(attentions(taps))
    for tensor, value in got.items():
        if tensor in data:
            yield compare(
                "b_state_fusion",
                case,
                tensor,
                value,
                data[tensor],
                fixtures.noise(f"b_state_fusion/{case}.{tensor}"),
            )


def attentions(taps):
    """What the fixtures record of every pooler's attention."""
    got = {}
    for key in matching(taps, "attention_*"):
        name = key.removeprefix("attention_")
        weights, importance = taps[key], taps[f"query_importance_{name}"]
        got.update(
            {
                f"attn_{name}.per_query_attention": weights,
                f"attn_{name}.query_importance": importance,
                f"attn_{name}.summary_attention": jnp.einsum("q,bqs->bs", importance, weights),
                f"attn_{name}.top_query_idx": jnp.argmax(importance),
            }
        )
    return got


# ---- c_scheduler -------------------------------------------------------------------------------


def c_scheduler(fixtures):
    """The flow-matching schedule for every shift of the directory."""
    data = fixtures.arrays("c_scheduler/scheduler.npz")
    told = fixtures.json("c_scheduler/scheduler.json")

    def check(tensor, got):
        noise = float(np.abs(data[tensor]).max()) * 1e-7
        return compare("c_scheduler", tensor.split("_")[0], tensor, got, data[tensor], noise)

    for name, constants in told.items():
        shift = float(name.removeprefix("shift"))
        low, mean = flow.weight_constants(shift)
        for key, got in (("y_min", low), ("weight_norm_const", mean)):
            yield compare("c_scheduler", name, key, got, constants[key], tolerance=1e-12)
        times = flow.sample_time(data["u"], shift)
        yield check(f"{name}_sampled_t", times)
        yield compare(
            "c_scheduler",
            name,
            f"{name}_sampled_t_bf16_as_f32",
            np.asarray(times).astype(ml_dtypes.bfloat16).astype(np.float32),
            data[f"{name}_sampled_t_bf16_as_f32"],
            tolerance=0.0,
        )
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
