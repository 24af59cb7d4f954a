"""One policy object for everything that acts: simulators, robots, benchmarks, images.

    policy = Policy.load("runs/demo")
    actions = policy.act({"scene": images, "wrist": images}, state, ["put the red ..."] * B)

From canvas and state to actions is one pure jitted function with the weights as arguments. Before
it: a small one that lays the cameras out on the canvas, a cache of encoded instructions, and
padding of the batch to a few fixed sizes, so that nothing is compiled in the middle of an episode.
"""

import copy
import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from lightwam_jax import build
from lightwam_jax import config as config_lib
from lightwam_jax import params as params_lib
from lightwam_jax.checkpoint import run as checkpoint
from lightwam_jax.data import actions as actions_lib
from lightwam_jax.data import assets as assets_lib
from lightwam_jax.data import cameras as cameras_lib
from lightwam_jax.data import device_canvas
from lightwam_jax.encoders import text as text_lib
from lightwam_jax.inference import contexts as contexts_lib
from lightwam_jax.inference import rows as rows_lib
from lightwam_jax.inference.batching import PADDED_SIZES
from lightwam_jax.inference.deployment import form as _form
from lightwam_jax.models import lightwam, quantized

# Arrays of a context, and which axis is the batch: of the whole model, of the deployed form.
_CONTEXT_AXES = {False: {"text": 0, "mask": 0}, True: {"keys": 1, "values": 1, "mask": 0}}
_dtypes = lambda params: jax.tree.map(lambda x: getattr(x, "dtype", None), params)
_CACHE_DTYPE = ml_dtypes.bfloat16  # of latents and text in the caches: act on what training saw


class Policy:
    """Observations in physical units to action chunks in physical units.

    Attributes:
      model: `LightWAM`. params: its parameters, in-memory layout, or what `deploy.py` made of them.
      config: `Config`. assets: `data.assets.Assets`.
      step: of the checkpoint; None for parameters that were never trained.
      demonstrated: seeds that an exported policy knows, as `suites.SuiteRun` has them; else None.
      noise_seed: of the noise that plans start from, where the model `generates`.
    """

    def __init__(self, model, params, config, assets, step=None, deploy=False):
        """Args:

        params: of `model`, in-memory layout; with `deploy` the weights of `deploy.deployed`.
        """
        self.model, self.config, self.assets, self.step = model, config, assets, step
        self.is_deployed, self._stored = deploy, None if deploy else _dtypes(params)
        self._deployed = self.demonstrated = None
        self._transform = actions_lib.from_config(config)
        self.noise_seed = 0
        self._traced = []  # batch size of each compilation of the action pass
        bare = copy.copy(self)  # what is compiled is of it: other weights share it, and keep no old
        self.params = jax.device_put(params)
        # Initialisers are many and run once: on a CPU, optimising them takes longer than they do.
        cheap = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
        self._initialise = jax.jit(
            lambda key: build.init_params(model, key, config.model), compiler_options=cheap
        )
        self._canvas = jax.jit(lambda images: device_canvas.canvas(images, config.data))
        self._prepare = jax.jit(bare._context_pass)
        self._act = jax.jit(bare._action_pass, static_argnames="taps")
        self._see = jax.jit(bare._inputs)
        self._imagine = jax.jit(bare._video_pass, static_argnames=("steps", "full"))
        prepare = functools.partial(self._prepare, self.params)
        self._contexts = contexts_lib.Contexts(bare._encode_texts, prepare, _CONTEXT_AXES[deploy])

    @classmethod
    def load(cls, directory, step=None, deploy=False, text_weights="", embodiment="", dtype=""):
        """Returns the policy of a run (its newest checkpoint unless `step` is given) or checkpoint.

        Args:
          deploy: the smaller, faster form that acts and cannot predict video; see `deploy.py`.
          text_weights: where the text encoder is now, if not at config.data.text_weights.
          embodiment: whose cameras and units are meant, where a mixture had several.
          dtype: in which it computes; default: that of config.model, but float32 on a CPU, where
            bfloat16 is slower.

        Raises:
          FileNotFoundError: no checkpoint there.
          ValueError: damaged, or without config and assets; see `checkpoint.load_params`. Or an
            embodiment that is needed or unknown.
        """
        if step is not None:
            directory = os.path.join(directory, "checkpoints", str(step))  # an address stays one
        stored = checkpoint.load_params(directory)
        if stored.config is None or stored.assets is None:
            raise ValueError(
                f"{stored.path} holds parameters only; expected a checkpoint of train.py, with "
                "config and assets"
            )
        config = config_lib.of_embodiment(stored.config, embodiment)
        if text_weights:
            data = dataclasses.replace(config.data, text_weights=text_weights)
            config = dataclasses.replace(config, data=data)
        dtype = dtype or ("float32" if jax.default_backend() == "cpu" else config.model.dtype)
        changes = {"dtype": dtype}
        if config.model.attention == "cudnn" and dtype != "bfloat16":  # it has no float32
            changes["attention"] = "auto"
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
        assets = assets_lib.load_assets(stored.assets, config)
        params = params_lib.segmented(stored.params, config.model)
        dtypes = _dtypes(params)
        if deploy:
            params = _form(config.model).deployed(params, config.model, config.data.action_horizon)
        model = build.build_model(config.model)
        policy = cls(model, params, config, assets, stored.meta["step"], deploy)
        policy._stored, policy.demonstrated = dtypes, stored.meta.get("demonstrated")
        return policy

    def deployed(self):
        """Returns the form that only acts, faster (`deploy.py`): made once and kept."""
        if self._deployed is None and not self.is_deployed:
            rest = self.config, self.assets, self.step
            self._deployed = Policy(self.model, self._deployed_weights(self.params), *rest, True)
            self._deployed._stored, self._deployed.noise_seed = self._stored, self.noise_seed
        return self if self.is_deployed else self._deployed

    def untrained(self, seed=0):
        """Returns a policy of the same config and assets with freshly initialised parameters.

        What is compiled is shared. The weights here are kept alive by nothing in it.
        """
        fresh = self._initialise(jax.random.key(seed))
        if self._stored is not None:  # rounded as the run stores them, then folded
            fresh = quantized.quantized_like(fresh, self._stored)
            fresh = jax.tree.map(lambda x, dtype: x.astype(dtype), fresh, self._stored)
        fresh = self._deployed_weights(fresh) if self.is_deployed else fresh
        like = lambda new, old: jax.device_put(new.astype(old.dtype), old.sharding)
        other = copy.copy(self)  # shares what is compiled already
        other.step, other.params = None, jax.tree.map(like, fresh, self.params)
        other._deployed = None
        prepare = functools.partial(self._prepare, other.params)
        other._contexts = self._contexts.prepared_by(prepare)
        return other

    @property
    def traces(self):
        """How often the action pass was compiled: once per padded batch size that was used."""
        return len(self._traced)

    def act(self, images, state, prompts, return_taps=False, rows=None):
        """Plans one action chunk per row.

        Args:
          images: {camera: uint8 [B,h,w,3]}: all of config.data.cameras, as the robot gives them.
            They are turned, resized and laid out as the images of the training were.
          state: float [B,P], physical units. prompts: B instructions.
          return_taps: also return the attention of the learned queries.
          rows: padded batch size to use, so that bits do not depend on B; default: the smallest.

        Returns:
          actions float32 [B,T,A], physical units; with return_taps also
          {"attention_{layer}_{source}": [B,Q,S], "query_importance_{layer}_{source}": [Q]} over
          the S = H/16 * W/16 cells of the canvas, row-major.

        Raises:
          ValueError: an observation that does not fit the model; says what was expected.
        """
        images, state = self._check(images, state, prompts)
        parts = []
        for start in range(0, len(state), PADDED_SIZES[-1]):
            part = slice(start, start + PADDED_SIZES[-1])
            some = {camera: image[part] for camera, image in images.items()}
            parts.append(self._act_padded(some, state[part], prompts[part], return_taps, rows))
        actions, taps = zip(*parts)
        if not return_taps:
            return np.concatenate(actions)
        joined = {name: np.asarray(tap) for name, tap in taps[0].items()}
        for name in joined:
            if name.startswith("attention_"):
                joined[name] = np.concatenate([part[name] for part in taps])[: len(state)]
        return np.concatenate(actions), joined

    def predict_video(self, images, state, prompts, seed=0, steps=10, resolution="pooled"):
        """Imagines the frames of the window that starts with this observation.

        Args:
          images, state, prompts: as for `act`, with B at most 64.
          seed: of the noise. steps: of the Euler solver.
          resolution: "pooled", of latents as training saw them; or "full", the release's joint
            inference, whose pooled noise training never saw (`LightWAM.denoise`).

        Returns:
          uint8 [B,frames,h,w,3], of the size of the canvas, or shrunk by config.loss.downsample
          where pooled; frame 0 is now.
        """
        if resolution not in ("pooled", "full"):
            raise ValueError(f"resolution is {resolution!r}; expected 'pooled' or 'full'")
        self._need_whole_model()
        images, state = self._check(images, state, prompts)
        inputs, key = self._padded(images, state, prompts), jax.random.key(seed)
        latents = self._imagine(*inputs, key, steps=steps, full=resolution == "full")
        return self.assets.codec.decode(np.asarray(latents)[: len(state)])

    def stages(self, images, state, prompts):
        """Returns what `act` makes of its arguments for the model; may run in another thread.

        Returns:
          {"canvas": f32 [B,H,W,3] in 0..1, "latents": f32 [B,h,w,C] of bfloat16's values,
          "context": f32 [B,L,dim], "mask": bool [B,L], "proprio": f32 [B,P]}.
        """
        images, state = self._check(images, state, prompts)
        canvas = self._canvas(images)
        latents, proprio = self._see(self._codec, canvas, state)
        texts = [self._contexts.text(prompt) for prompt in prompts]
        context, mask = (np.concatenate(parts) for parts in zip(*texts))
        found = {"canvas": canvas, "latents": latents[:, 0], "proprio": proprio}
        found = {name: np.asarray(value, np.float32) for name, value in found.items()}
        return found | {"context": context.astype(np.float32), "mask": mask}

    def with_prompt_template(self, template):
        """Returns the same policy that writes instructions into another template.

        What is compiled is shared.
        """
        other = copy.copy(self)
        other._deployed = None
        data = dataclasses.replace(self.config.data, prompt_template=template)
        other.config = dataclasses.replace(self.config, data=data)
        bare = copy.copy(other)
        bare.params = bare._contexts = None
        other._contexts = self._contexts.encoded_by(bare._encode_texts)
        return other

    def warm_up(self, batch_sizes=(1,), sizes=None, prompt="warm up", taps=False):
        """Compiles the action pass for the padded batch sizes of `batch_sizes`.

        Args:
          sizes: {camera: (height, width)} of the images to come. Default: as they lie on the
            canvas. Images of another size cost about a second at their first call, for the small
            program that lays them out (`warm_up_images`); what is large begins with the canvas.
          prompt: an instruction that can be encoded. taps: also what `return_taps` needs.
        """
        data = self.config.data
        sizes = sizes or cameras_lib.given_sizes(data)
        for n in sorted({rows_lib.padded_size(size) for size in batch_sizes}):
            images = {camera: np.zeros((n, *size, 3), np.uint8) for camera, size in sizes.items()}
            state = np.zeros((n, config_lib.state_width(self.config)), np.float32)
            for asked in (False, True)[: 1 + taps]:
                self._act_padded(images, state, [prompt] * n, asked)

    def warm_up_images(self, sizes, batch_sizes=(1,)):
        """Compiles what lays images of other sizes out, as `warm_up` did for its own.

        May run in another thread than `act`.
        """
        for n in {rows_lib.padded_size(size) for size in batch_sizes}:
            self._canvas({name: np.zeros((n, *size, 3), np.uint8) for name, size in sizes.items()})

    @property
    def known_prompts(self):
        """Instructions of the text cache, which cost nothing; a tuple."""
        before, _, after = self.config.data.prompt_template.partition("{task}")
        return tuple(t[len(before) : -len(after) or None] for t in self._cached_texts)

    def known_prompt(self, task):
        """Returns whether `act` needs no text encoder for an instruction."""
        filled = text_lib.prompt(task, self.config.data.prompt_template)
        return filled in self._cached_texts or task in self._contexts

    def add_prompt(self, task):
        """Encodes an instruction before `act` needs it; may run in another thread than `act`.

        Raises:
          FileNotFoundError: the encoder's weights are not here. ValueError: nothing to encode.
        """
        self._contexts.add([task])

    @property
    def _cached_texts(self):
        return getattr(self.assets.text_encoder, "prompts", ())

    def canvas(self, images):
        """Returns `cameras.canvas` [...,H,W,3] of {camera: uint8 [...,h,w,3]}."""
        return cameras_lib.canvas(images, self.config.data)

    # ---- pure functions, jitted ----------------------------------------------------------------

    def _context_pass(self, params, text, mask):
        """What of an instruction stays the same from call to call; see `_CONTEXT_AXES`."""
        if not self.is_deployed:
            return {"text": text, "mask": mask}
        keys, values = _form(self.config.model).keys_values(params, text, self.config.model)
        return {"keys": keys, "values": values, "mask": mask}

    def _action_pass(self, params, codec, canvas, context, state, seeds=None, taps=False):
        self._traced.append(len(canvas))
        latents, proprio = self._inputs(codec, canvas, state)
        mask, model, given = self._mask(context), self.config.model, {}
        horizon = self.config.data.action_horizon
        if seeds is not None:
            given["noise"] = rows_lib.noise(seeds, latents.shape, self.config)
        if self.is_deployed:
            inputs = latents, (context["keys"], context["values"]), mask, proprio, model, taps
            actions, seen = _form(model).act(params, *inputs, **given)
        else:
            inputs = latents, context["text"], proprio, horizon, mask
            actions, seen = self.model.apply({"params": params}, *inputs, **given, method="act")
        shown = ("attention_", "query_importance_")
        seen = {name: tap for name, tap in seen.items() if taps and name.startswith(shown)}
        actions = self.assets.action.inverse(actions[..., : config_lib.action_width(self.config)])
        return self._transform.inverse(actions, state), seen

    def _video_pass(self, params, codec, canvas, context, state, key, steps, full):
        loss, frames = self.config.loss, self.config.data.latent_frames
        first, proprio = self._inputs(codec, canvas, state)
        first = first if full else lightwam.pool_latents(first, loss.downsample)
        noise = jax.random.normal(key, (first.shape[0], frames, *first.shape[2:]))
        arguments = (first, noise, context["text"], proprio, self._mask(context))
        solver = (steps, loss.shift, loss.downsample if full else 1)
        x, _ = self.model.apply({"params": params}, *arguments, *solver, method="denoise")
        return x.at[:, 1:].add(first) if loss.residual_target else x

    def _inputs(self, codec, canvas, state):
        """What the model reads besides the context: latents [B,1,H,W,C], proprio [B,P]."""
        latents = self.assets.codec.encode_with(codec, canvas[:, None]).astype(_CACHE_DTYPE)
        proprio = self.assets.state.normalize(state)
        proprio = actions_lib.pad(proprio, self.config.model.proprio_dim)
        return latents.astype(jnp.float32), proprio

    def _mask(self, context):
        return context["mask"] if self.config.loss.mask_text_padding else None

    # ---- around them ---------------------------------------------------------------------------

    def _act_padded(self, images, state, prompts, taps=False, rows=None):
        inputs = self._padded(images, state, prompts, rows)
        if self.config.model.generates:
            seeds = rows_lib.noise_seeds(images, state, self.noise_seed)
            inputs = *inputs, rows_lib.pad(seeds, len(inputs[-1]))
        actions, seen = self._act(*inputs, taps=taps)
        return np.asarray(actions, np.float32)[: len(state)], seen

    def _padded(self, images, state, prompts, rows=None):
        """What the jitted functions read first, with as many rows as a padded batch has."""
        if rows is not None and (rows not in PADDED_SIZES or rows < len(state)):
            raise ValueError(f"rows={rows} for {len(state)}; expected one of {PADDED_SIZES}")
        rows = rows or rows_lib.padded_size(len(state))
        canvas = self._canvas({name: rows_lib.pad(x, rows) for name, x in images.items()})
        context = self._contexts(list(prompts), rows)
        return self.params, self._codec, canvas, context, rows_lib.pad(state, rows)

    @functools.cached_property
    def _codec(self):
        codec = self.assets.codec
        return jax.device_put(codec.image_arrays if self.is_deployed else codec.arrays)

    def _encode_texts(self, prompts):
        filled = [text_lib.prompt(task, self.config.data.prompt_template) for task in prompts]
        rows, masks = self.assets.text_encoder.encode(filled, self.config.data.text_len)
        return rows.astype(_CACHE_DTYPE), masks

    def _deployed_weights(self, params):
        c = self.config
        return _form(c.model).deployed(params, c.model, c.data.action_horizon)

    def _need_whole_model(self):
        if self.is_deployed:
            raise ValueError(
                "this policy was loaded with deploy=True and is not the whole model: load it with "
                "Policy.load(..., deploy=False) to predict video"
            )

    def _check(self, images, state, prompts):
        """Returns ({camera: uint8 [B,h,w,3]} of config.data.cameras, state float32 [B,P])."""
        images = {camera: np.asarray(image) for camera, image in images.items()}
        cameras_lib.check(images, self.config.data)
        images = {camera: images[camera] for camera in self.config.data.cameras}
        camera, first = next(iter(images.items()))
        if first.ndim != 4 or not len(first):
            raise ValueError(
                f"camera {camera!r} gives images of shape {list(first.shape)}; expected a batch "
                "[B,h,w,3] (give a single observation an axis of length 1)"
            )
        rows, width = len(first), config_lib.state_width(self.config)
        state = np.asarray(state, np.float32)
        if state.shape != (rows, width):
            raise ValueError(
                f"state has shape {list(state.shape)}; expected [{rows}, "
                f"{width}]: a row per image, {width} numbers in the units of the data"
            )
        if not np.isfinite(state).all():
            bad = np.flatnonzero(~np.isfinite(state).all(axis=1))
            raise ValueError(f"state is not finite in rows {bad.tolist()}")
        if isinstance(prompts, str) or len(prompts) != rows:
            raise ValueError(f"prompts is {prompts!r}; expected a list of {rows} instructions")
        return images, state
