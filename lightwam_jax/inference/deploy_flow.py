"""The deployed form of a policy that denoises actions (`models/action_dit.py`); see `deploy.py`.

The same actions as `LightWAM.act`:

  - The frame runs once through folded blocks; of the last, only keys and values are made.
  - A step of the solver is the action stream alone. What of it depends on the schedule only, the
    modulation at each step, is there ready-made; so are the context's keys and values.
  - Keys and values of the context are one product for the blocks of both streams.

Letters as in `deploy.py`; n are the blocks of a stream, I the steps of the solver.
"""

import einops
import jax
import jax.numpy as jnp

from lightwam_jax import build, flow
from lightwam_jax.inference import folded
from lightwam_jax.models import dit, layers, norms
from lightwam_jax.models.layers import gelu


def deployed(params, config, horizon):
    """As `deploy.deployed`; the horizon is that of the noise that `act` is given."""
    del horizon
    model, old, own = build.build_model(config), params["dit"], params["expert"]
    times, deltas = flow.sampling_schedule(config.flow_steps, config.flow_shift)
    embed = lambda stream, t: model.apply(
        {"params": params}, method=lambda m: getattr(m, stream).embed_time(jnp.asarray(t))[1]
    )
    with jax.default_matmul_precision("highest"):
        fold = jax.jit(folded.fold_block, static_argnames="config")
        rows = embed("dit", 0.0)
        blocks, contexts = zip(*(fold(b, rows, config=config) for b in _blocks(old, config)))
        fold, rows = jax.jit(_fold_block, static_argnames="config"), embed("expert", times)
        layer = lambda i: jax.tree.map(lambda x: x[i], own["blocks"])
        steps, own_contexts = zip(*(fold(layer(i), rows, config=config) for i in _numbers(config)))
        wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
        adapters = [wide(old[f"adapters_{i}"]) for i in config.adapter_layers]
        weights = {
            "patch": old["patch_embedding"],
            "proprio": params["proprio_encoder"],
            # The last block of the frame reads nothing: only what it would attend with is needed.
            "context": _context(old, contexts[:-1]),
            "own_context": _context(own, own_contexts),
            "blocks": [*blocks[:-1], {name: blocks[-1][name] for name in ("qkv", "norm_qk")}],
            "adapters": [folded.fold_mlp(adapter, "down", "up") for adapter in adapters],
            "expert": {
                "encoder": own["action_encoder"],
                "blocks": steps,
                "head": own["head"],
            },
        }
    return jax.tree.map(lambda x: jnp.asarray(x, config.dtype), weights) | {
        "deltas": jnp.asarray(deltas)
    }


def _numbers(config):
    return range(config.num_layers)


def _blocks(old, config):
    """Yields the parameters of each block of the video transformer."""
    for segment in dit.segments(config.num_layers, config.adapter_layers, config.lora_layers):
        for i in range(segment.stop - segment.start):
            yield jax.tree.map(lambda x, i=i: x[i], old[segment.name])


def _context(stream, contexts):
    """A stream's embedding of the context, and keys and values of its blocks, side by side."""
    text = [stream["text_embedding_0"], stream["text_embedding_2"]]
    if not contexts:
        return {"text": text}
    norm = jnp.stack([context["norm_k"] for context in contexts])
    return {"text": text, **folded.beside(*contexts), "norm_k": norm}


def _fold_block(block, rows, config):
    """A block of the action stream and its context's weights; rows [I,6,D]: of each step."""
    block = jax.tree.map(lambda x: x.astype(jnp.float32), block)
    own, cross, ffn = block["self_attn"], block["cross_attn"], block["ffn"]
    halves = lambda x: einops.rearrange(
        x, "... (n k two) -> ... (n two k)", n=config.num_heads, two=2
    )
    weights = {
        "rows": block["modulation"] + rows,
        "qkv": folded.beside(
            jax.tree.map(halves, own["q"]), jax.tree.map(halves, own["k"]), own["v"]
        ),
        "norm_qk": jnp.stack([halves(own[name]["scale"]) for name in ("norm_q", "norm_k")]),
        "o": own["o"],
        "cross_q": folded.after(block["norm3"], cross["q"]),
        "cross_norm_q": cross["norm_q"]["scale"],
        "cross_o": cross["o"],
        "up": ffn["0"],
        "down": ffn["2"],
    }
    context = folded.beside(cross["k"], cross["v"]) | {"norm_k": cross["norm_k"]["scale"]}
    return jax.tree.map(lambda x: x.astype(config.dtype), (weights, context))


def keys_values(weights, rows, config):
    """Raw context rows [B,L,text_dim] -> keys and values of all blocks, [2n-1,B,L,N,K] each.

    The video's first: its last block needs none.
    """
    parts = []
    for name in ("context", "own_context"):
        w = weights[name]
        if "kernel" in w:
            parts.append(folded.keys_values({"text": w["text"], "context": w}, rows, config))
    return tuple(jnp.concatenate(pair) for pair in zip(*parts))


def act(weights, latents, text, mask, proprio, config, taps=False, noise=None):
    """As `deploy.act`, from noise [B,T,A]; there is no attention to return."""
    del taps
    keys, values, mask = folded.with_state(keys_values, weights, text, mask, proprio, config)
    frame = config.num_layers - 1
    seen = _observe(weights, latents, keys[:frame], values[:frame], mask, config)
    context = list(zip(keys[frame:], values[frame:]))
    return _solve(weights, noise, seen, context, mask, config), {}


def _observe(weights, latents, keys, values, mask, config):
    """Keys and values [B,S,N,K] that the clean frame leaves in every block."""
    rope = layers.rope_table(1, latents.shape[2] // 2, latents.shape[3] // 2, config.head_dim)
    patches = einops.rearrange(latents, "b 1 (h p) (w q) c -> b (h w) (p q c)", p=2, q=2)
    x, seen, adapters = folded.linear(weights["patch"], patches), [], iter(weights["adapters"])
    for i, w in enumerate(weights["blocks"]):
        own = folded.queries_keys_values(w, folded.linear(w["qkv"], x, config.eps), rope, config)
        seen.append(own[1:])
        if i == config.num_layers - 1:
            break
        x = folded.after_attention(w, x, own, keys[i], values[i], mask, config)
        if i in config.adapter_layers:
            x = x + config.adapter_scale * folded.mlp(next(adapters), x, config.eps)
    return seen


def _solve(weights, noise, seen, context, mask, config):
    """Euler's method from noise [B,T,A], float32."""
    expert, dtype = weights["expert"], jnp.dtype(config.dtype)
    rope = layers.line_rope_table(noise.shape[1], config.head_dim)

    def step(actions, now):
        rows, delta = now
        x = folded.linear(expert["encoder"], actions.astype(dtype))
        for i, w in enumerate(expert["blocks"]):
            x = _step_block(w, rows[i], x, seen[i], *context[i], mask, rope, config)
        velocity = folded.linear(expert["head"], x).astype(jnp.float32)
        return flow.euler_step(actions, velocity, delta), None

    rows = [w["rows"] for w in expert["blocks"]]
    return jax.lax.scan(step, noise.astype(jnp.float32), (rows, weights["deltas"]))[0]


def _step_block(w, rows, x, seen, keys, values, mask, rope, config):
    """A block of the action stream at a step of the solver, whose modulation is rows [6,D]."""
    shift1, scale1, gate1, shift2, scale2, gate2 = rows
    modulated = lambda scale, shift: norms.normalize(x, config.eps) * (1 + scale) + shift
    qkv = folded.linear(w["qkv"], modulated(scale1, shift1))
    q, k, v = folded.queries_keys_values(w, qkv, rope, config)
    both = (jnp.concatenate(pair, axis=1) for pair in zip(seen, (k, v)))
    out = folded.attend(q, *both, None, config)
    x = x + (gate1 * folded.linear(w["o"], out.reshape(*x.shape[:2], -1))).astype(x.dtype)
    x = folded.cross_attended(w, x, keys, values, mask, config)
    h = gelu(folded.linear(w["up"], modulated(scale2, shift2)))
    return x + (gate2 * folded.linear(w["down"], h)).astype(x.dtype)
