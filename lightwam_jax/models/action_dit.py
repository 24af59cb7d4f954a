"""The action expert that Light-WAM replaces: Fast-WAM's diffusion transformer over actions.

It has as many blocks as the video transformer, of the same kind and with the same heads. Its tokens
are the steps of a noised action chunk. In every block they attend to each other and to the keys and
values that the video block of the same depth made of the clean current frame; nothing of the video
depends on them. So the frame is read once, and a step of the solver runs the action stream alone.
Where actions read all frames (`reads`), video and actions are denoised together.

Arithmetic: docs/spec.md section 16.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from lightwam_jax import flow
from lightwam_jax.models import layers
from lightwam_jax.models.blocks import Stream, scanned
from lightwam_jax.models.layers import Linear


class ActionDiT(Stream):
    """Flow velocity of noised action chunks [B,T,A]. Fields: see `config.ModelConfig`.

    `num_heads`, `head_dim` and `num_layers` are those of the video transformer whose keys and
    values are read; `dim` and `ffn_dim` are config.model.flow_dim and flow_ffn_dim.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    head_dim: int
    num_layers: int
    freq_dim: int
    eps: float
    gate_init: float
    action_dim: int
    steps: int  # of the solver, where a caller gives none
    shift: float  # of the schedule
    reads: str  # "first_frame" or "all_frames" of the video
    attention: str
    remat: str
    scan_unroll: int
    dtype: jnp.dtype

    def setup(self):
        self.action_encoder = Linear(self.dim, self.dtype)
        self.make_embeddings()
        self.blocks = scanned(self.num_layers, self.remat, self.scan_unroll, **self.block_fields())
        # No norm and no modulation before it, unlike the video's.
        self.head = Linear(self.action_dim, self.dtype)

    def block_fields(self):
        """Fields of this model's blocks."""
        same = ("dim", "num_heads", "head_dim", "ffn_dim", "eps", "gate_init", "dtype")
        return dict(
            {name: getattr(self, name) for name in same},
            ranks={},  # all of it learns: no LoRA
            alpha=1.0,
            mode="bidirectional",
            implementation=self.attention,
        )

    def keys_values(self, context):
        """Cross-attention keys and values of every block, (k, v) [n,B,L,N,K].

        context: [B,L,D], from `embed_context` of the rows that the video stream gets.
        """
        return self.blocks.keys_values(None, context)[1]

    def velocity(self, actions, t, seen, context, mask=None):
        """Flow velocity [B,T,A], float32, of noised actions [B,T,A] at timesteps t [B].

        Args:
          seen: keys and values of the video, (k, v) [n,B,S,N,K], of `WanDiT.observe`.
          context: from `keys_values`. mask: [B,L] bool of its rows that may be seen, or None.
        """
        _, rows = self.embed_time(t[:, None])
        return self._read(actions, rows, seen, context, mask)

    def solve(self, noise, seen, context, mask=None, steps=None, shift=None):
        """Euler's method from noise [B,T,A] to actions.

        Args:
          seen, context, mask: as for `velocity`; computed once for all steps.
          steps, shift: of the schedule; default: the fields.

        Returns:
          actions [B,T,A] float32, and {"velocity", "latents"} [steps,B,T,A]: along what each step
          went, and where it came.
        """
        times, deltas = flow.sampling_schedule(steps or self.steps, shift or self.shift)
        _, rows = self.embed_time(jnp.asarray(times))  # [steps,6,D]: the same for every row

        def body(expert, x, step):
            row, delta = step
            v = expert._read(x, row[None, None], seen, context, mask)
            x = flow.euler_step(x, v, delta)
            return x, {"velocity": v, "latents": x}

        scan = nn.scan(body, variable_broadcast="params", split_rngs={"params": False})
        return scan(self, jnp.asarray(noise, jnp.float32), (rows, jnp.asarray(deltas)))

    def _read(self, actions, rows, seen, context, mask):
        rope = layers.line_rope_table(actions.shape[1], self.head_dim)
        x = self.action_encoder(actions)
        x, _ = self.blocks.join(x, context, seen, rows, rope, mask)
        return self.head(x).astype(jnp.float32)


def from_video(video, action):
    """Returns `action`, parameters of an `ActionDiT`, with values made of the video transformer's.

    As Fast-WAM starts from Wan (scripts/preprocess_action_dit_backbone.py): what has another size
    is resized along each axis by linear interpolation, and what has fewer or more inputs is scaled
    so that its sums keep their size. What enters and leaves the stream stays as it is.

    Args:
      video: parameters of a `WanDiT`, blocks stacked [n,...] under "blocks".
      action: arrays (or tracers) to replace.
    """
    made = dict(action)
    for name, old in action.items():
        if name not in ("action_encoder", "head"):
            resize = lambda new, x, stacked=name == "blocks": _resized(x, new.shape, stacked)
            made[name] = _like(resize, old, video[name])
    return made


def _like(resize, new, old):
    """`resize(leaf of new, leaf of old)` for the leaves of `new`; `old` may have more (LoRA)."""
    if isinstance(new, dict):
        return {name: _like(resize, child, old[name]) for name, child in new.items()}
    return resize(new, old).astype(new.dtype)


def _resized(x, shape, stacked):
    """x along each axis, but the first where blocks are stacked, as long as `shape` has it."""
    first, before, x = int(stacked), x.shape, x.astype(jnp.float32)
    for axis in range(first, x.ndim):
        x = _interpolated(x, axis, shape[axis])
    if (rank := x.ndim - first) > 1:
        inputs = -2 if rank == 2 else -1  # of a kernel [in,out]; of the modulation [1,6,D]
        x = x * (before[inputs] / shape[inputs]) ** 0.5
    return x


def _interpolated(x, axis, size):
    """x with `size` values along an axis: linear interpolation from end to end."""
    if x.shape[axis] == size:
        return x
    last = x.shape[axis] - 1
    places = np.arange(size, dtype=np.float32) * np.float32(last / max(size - 1, 1))
    low = np.minimum(places.astype(np.int32), last)
    share = (places - low).reshape(-1, *[1] * (x.ndim - 1 - axis % x.ndim))
    take = lambda index: jnp.take(x, index, axis=axis)
    return take(low) * (1 - share) + take(np.minimum(low + 1, last)) * share
