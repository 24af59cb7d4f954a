"""Light-WAM: one Wan backbone read two ways.

`velocity` is the world model: it denoises three pooled latent frames. `act` is the policy: it
runs the clean current frame up to the last adapter and regresses the action chunk from what the
learned queries read there. A training step runs both over shared context (`__call__`).

With `ActionDiT` as its expert it is what the paper compares with: the clean frame runs through all
blocks, and actions are denoised over the keys and values that it leaves there. Or over those of all
frames of the clip, which is imagined meanwhile.
"""

from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from lightwam_jax import flow
from lightwam_jax.models.action import StateFusionActionExpert
from lightwam_jax.models.action_dit import ActionDiT
from lightwam_jax.models.dit import WanDiT
from lightwam_jax.models.layers import Linear


class Context(NamedTuple):
    """What the blocks attend to: per-block keys and values, and which rows may be seen."""

    keys_values: Any  # {segment: (k, v) [n,B,L,N,K]}
    mask: Any  # [B,L] bool or None: all


class LightWAM(nn.Module):
    """The method in three calls: `act`, `velocity`, `predict_video`.

    Latents are channels-last [B,F,H,W,C]; text is the raw text encoder's output
    [B,L,text_dim] with zero rows past the prompt; text_mask [B,L] bool, or None to let attention
    see the zero rows as the release does; proprio [B,P] normalised, or None. Only where `generates`
    do actions begin as noise.
    """

    dit: WanDiT
    expert: StateFusionActionExpert | ActionDiT
    dtype: jnp.dtype

    def setup(self):
        self.proprio_encoder = Linear(self.dit.text_dim, self.dtype)

    @property
    def generates(self):
        """Whether actions are denoised (`ActionDiT`) or regressed in one pass."""
        return isinstance(self.expert, ActionDiT)

    @property
    def imagines(self):
        """Whether actions read all frames, so that a plan denoises the video too."""
        return self.generates and self.expert.reads == "all_frames"

    def __call__(self, noisy, t, observation, text, proprio, horizon, text_mask=None, noised=None):
        """Both passes of a training step over one context.

        Args:
          noisy: pooled latents [B,F,h,w,C], frame 0 clean; t: [B] in 0..1000.
          observation: the current frame at full resolution [B,1,H,W,C].
          noised: actions [B,horizon,A] and their own timesteps [B], for a model that `generates`.
            One that `imagines` reads the noisy clip for them, in one pass.

        Returns:
          velocity [B,F,h,w,C] and actions [B,horizon,A], float32; of a model that `generates`, the
          velocity of `noised` in place of actions.
        """
        context = self.encode_context(text, proprio, text_mask)
        if self.imagines:
            own = self.encode_action_context(text, proprio)
            return self._velocities(noisy, t, *noised, context, own)
        velocity = self.dit.velocity(noisy, t, *context)
        if not self.generates:
            return velocity, self._read_actions(observation, context, horizon)[0]
        own = self.encode_action_context(text, proprio)
        seen = self._observe(observation, context)
        return velocity, self.expert.velocity(*noised, seen, own, context.mask)

    def encode_context(self, text, proprio=None, text_mask=None, stop_after=None):
        """Text rows and, last, one proprio row, through the text embedding to every block.

        The proprio row lives in raw text space (lightwam.py, append proprio token).
        """
        mask = text_mask
        if proprio is not None and mask is not None:
            mask = jnp.pad(mask, ((0, 0), (0, 1)), constant_values=True)
        context = self.dit.embed_context(_context_rows(self, text, proprio))
        return Context(self.dit.keys_values(context, stop_after), mask)

    def encode_action_context(self, text, proprio=None):
        """The same rows through the embedding of `ActionDiT`: (k, v) [n,B,L,N,K] of its blocks."""
        context = self.expert.embed_context(_context_rows(self, text, proprio))
        return self.expert.keys_values(context)

    def act(self, latents, text, proprio, horizon, text_mask=None, noise=None):
        """Action chunk for the current frame's latents [B,1,H,W,C].

        Runs no block beyond the last adapter. Returns actions [B,horizon,A] float32
        (normalised units) and taps: `state_{layer}` {"backbone","adapted"} [B,S,D] and the
        expert's, where the names carry the adapter's layer: `attention_{layer}_{source}`.

        A model that `generates` runs all blocks, and starts from `noise` [B,horizon,A], unit
        normal; its taps are those of `ActionDiT.solve`. One that `imagines` takes a pair of noises,
        as `imagine_and_act` does.
        """
        chex.assert_rank([latents, text], [5, 3])
        chex.assert_axis_dimension(latents, 1, 1)
        if not self.generates:
            stop_after = self.dit.adapter_layers[-1]
            context = self.encode_context(text, proprio, text_mask, stop_after)
            return self._read_actions(latents, context, horizon)
        of_actions = noise[1] if self.imagines else noise
        chex.assert_shape(of_actions, (latents.shape[0], horizon, self.expert.action_dim))
        context = self.encode_context(text, proprio, text_mask)
        own = self.encode_action_context(text, proprio)
        if self.imagines:
            return self.imagine_and_act(latents, noise, context, own)
        return self.expert.solve(noise, self._observe(latents, context), own, context.mask)

    def imagine_and_act(self, latents, noise, context, own):
        """Denoises video and actions together: at each step, actions read the video so far.

        Args:
          latents: the current frame's [B,1,H,W,C].
          noise: unit normal, of the video on the grid of training [B,F,h,w,C], and of the actions
            [B,T,A]. The frame is pooled to that grid.
          context, own: of `encode_context` and `encode_action_context`.

        Returns:
          actions [B,T,A] float32, and of every step {"velocity", "latents"} [steps,B,T,A] of the
          actions, {"video_velocity", "video_latents"} [steps,B,F,h,w,C] of the video.
        """
        video, actions = (jnp.asarray(x, jnp.float32) for x in noise)
        first = pool_latents(latents, latents.shape[2] // video.shape[2])
        times, deltas = flow.sampling_schedule(self.expert.steps, self.expert.shift)

        def body(model, state, step):
            (video, actions), (t, delta) = state, step
            t = jnp.full((video.shape[0],), t)
            v, u = model._velocities(video, t, actions, t, context, own)
            video = flow.euler_step(video, v, delta).at[:, :1].set(first)
            actions = flow.euler_step(actions, u, delta)
            went = {"velocity": u, "latents": actions, "video_velocity": v, "video_latents": video}
            return (video, actions), went

        solve = nn.scan(body, variable_broadcast="params", split_rngs={"params": False})
        start = video.at[:, :1].set(first), actions
        (_, actions), taps = solve(self, start, (jnp.asarray(times), jnp.asarray(deltas)))
        return actions, taps

    def velocity(self, latents, t, text, proprio=None, text_mask=None):
        """Flow velocity [B,F,h,w,C] of noised latents (frame 0 clean) at timesteps t [B]."""
        return self.dit.velocity(latents, t, *self.encode_context(text, proprio, text_mask))

    def predict_video(self, first, noise, text, proprio=None, text_mask=None, steps=10, shift=5.0):
        """Imagines the future latents of a clip from its clean first latent.

        Args:
          first: [B,1,h,w,C], pooled as in training.
          noise: unit normal [B,F,h,w,C].
          steps, shift: of the Euler solver.

        Returns:
          latents [B,F,h,w,C] float32; frame 0 is `first`.
        """
        return self.denoise(first, noise, text, proprio, text_mask, steps, shift)[0]

    def denoise(
        self, first, noise, text, proprio=None, text_mask=None, steps=10, shift=5.0, factor=1
    ):
        """As `predict_video`, but of latents `factor` times as fine as the grid the network sees.

        The release's joint inference: each step pools the latents, predicts, and upsamples the
        velocity. Pooled noise has deviation 1/factor, which training never showed: with factor > 1
        prefer `predict_video` on pooled latents.

        Args:
          first: [B,1,H,W,C]. noise: [B,F,H,W,C], unit normal.

        Returns:
          latents [B,F,H,W,C] float32, and taps of every step {"latents", "velocity"}
          [steps,B,F,H,W,C]: what it started from, and the velocity it went along.
        """
        context = self.encode_context(text, proprio, text_mask)
        times, deltas = (jnp.asarray(a) for a in flow.sampling_schedule(steps, shift))
        batch, _, height, width, _ = noise.shape

        def body(dit, x, step):
            t, delta = step
            v = dit.velocity(pool_latents(x, factor), jnp.full((batch,), t), *context)
            v = resize_velocity(v, height, width)
            return flow.euler_step(x, v, delta).at[:, :1].set(first), {"latents": x, "velocity": v}

        solve = nn.scan(body, variable_broadcast="params", split_rngs={"params": False})
        return solve(self.dit, jnp.asarray(noise).at[:, :1].set(first), (times, deltas))

    def _velocities(self, noisy, t, actions, action_t, context, own):
        """Of the video, and of actions that read all its frames; both float32."""
        tokens, e, seen = self.dit.observe(noisy, t, *context)
        velocity = self.dit.read_velocity(tokens, e, noisy.shape).astype(jnp.float32)
        return velocity, self.expert.velocity(actions, action_t, seen, own, context.mask)

    def _observe(self, observation, context):
        """Keys and values (k, v) [n,B,S,N,K] of the clean frame, of every block."""
        return self.dit.observe(observation, None, *context)[-1]

    def _read_actions(self, observation, context, horizon):
        stop_after = self.dit.adapter_layers[-1]
        _, states, _ = self.dit.backbone(observation, None, *context, stop_after=stop_after)
        actions, read = self.expert(list(states.values()), horizon)
        taps = {f"state_{layer}": state for layer, state in states.items()}
        for i, layer in enumerate(states):
            for kind in ("attention", "query_importance", "pooled"):
                prefix = f"{kind}_{i}_"
                for name in [name for name in read if name.startswith(prefix)]:
                    taps[f"{kind}_{layer}_{name.removeprefix(prefix)}"] = read[name]
        return actions, taps


def _context_rows(model, text, proprio):
    """Raw rows [B,L,text_dim] of text and, last, of the state."""
    rows = text.astype(model.dtype)
    if proprio is None:
        return rows
    return jnp.concatenate([rows, model.proprio_encoder(proprio)[:, None]], axis=1)


def pool_latents(latents, factor):
    """Average-pools latents [B,F,H,W,C] in space by `factor`, the grid the video loss lives on.

    Raises:
      ValueError: a side that `factor` does not divide, or that pools to an odd size.
    """
    if factor == 1:
        return latents
    b, f, h, w, c = latents.shape
    if h % (2 * factor) or w % (2 * factor):
        raise ValueError(
            f"latent grid {h}x{w} cannot be pooled by {factor} into 2x2 patches; "
            f"both sides must be multiples of {2 * factor}"
        )
    return latents.reshape(b, f, h // factor, factor, w // factor, factor, c).mean(axis=(3, 5))


def resize_velocity(velocity, height, width):
    """Bilinear upsampling (half-pixel centres) of [B,F,h,w,C] to height x width."""
    b, f, _, _, c = velocity.shape
    return jax.image.resize(velocity, (b, f, height, width, c), "bilinear")
