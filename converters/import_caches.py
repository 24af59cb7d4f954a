"""Our caches from the reference's, without the hours of encoding.

Windows are matched by number: episodes, their order and the split must be those of the reference. A
few windows of each split are encoded and compared with what the reference's cache holds.
"""

import numpy as np

from converters import caches
from lightwam_jax import encoders, precompute
from lightwam_jax.data import spec, windows
from lightwam_jax.data.caches import build_latents, resumable
from lightwam_jax.data.caches import latents as latent_cache
from lightwam_jax.data.caches import text as text_cache

# Largest deviation between the cache and this VAE, as a share of the latents'. The reference ran in
# bfloat16, which makes 0.012 (the fixtures' VAE); images from another decoder add about as much.
_NOISE = 0.05
_CHECKED = 6  # windows of each split
_REASONS = (
    "They are of other weights, episodes (or another order of them) or images (order of the "
    "cameras, size, orientation); --trust takes them as they are"
)


def import_latents(directory, config, val="", trust=False, say=print):
    """Writes the latent cache of a `Config` from one of the reference.

    Args:
      directory: the reference's cache of the training split.
      config: data.codec_weights is the VAE that made it.
      val: the reference's cache of the validation split; "": that split is encoded here.
      trust: nothing is encoded to be compared, which cache.json then says.

    Raises:
      FileNotFoundError, ValueError: no cache there, of other windows or shapes, incomplete, or made
        by another VAE or of other images.
    """
    if config.data.codec == "pca":
        raise ValueError(
            "config.data.codec is 'pca', which is fitted here; the reference's latents are of "
            "'wan21' or 'wan22'"
        )
    data = precompute.Data(config)
    if len(data.sets) > 1:
        raise ValueError(
            "config.data.mixture has several datasets; import one at a time, with a config whose "
            "data.path and data.cache are its own"
        )
    with resumable.alone_in(config.data.cache):
        splits, (codec, _) = data.sets[0].splits, precompute.make_codec(data)
        imported = {}
        for split, place in (("train", directory), ("val", val)):
            if place:
                latents = _Latents(place, split, splits[split], config)
                checked = [] if trust else latents.check(codec)
                imported[split] = latents, {"from": str(place), "checked": checked}
        meta = build_latents.build(config, splits, codec, imported=imported)
    for split, count in meta["records"].items():
        if count:
            place = imported[split][1]["from"] if split in imported else f"encoded by {codec.id}"
            say(f"{latent_cache.latents_directory(config)}: {count} {split} windows ({place})")
    say("the rest: python -m lightwam_jax.precompute --config CONFIG --what stats,text")


class _Latents:
    """The latents of the windows of a split: [i] -> [F, H, W, C], checked."""

    def __init__(self, directory, split, episodes, config):
        self._files, self._config = caches.read_latent_cache(directory), config
        self._places = [(episode, start) for episode in episodes for start in range(episode.length)]
        self._shape = spec.latents_shape(config)
        if len(self._files) != len(self._places):
            raise ValueError(
                f"{directory} has {len(self._files)} windows, the {split} split of "
                f"config.data.path={config.data.path!r} has {len(self._places)} in "
                f"{len(episodes)} episodes: other episodes, or another config.data.val_fraction"
            )
        missing = [i for i in range(len(self._files)) if i not in self._files]
        if missing:
            raise ValueError(
                f"{directory} lacks {len(missing)} of its {len(self._files)} windows, the first is "
                f"{missing[0]}; finish it with the reference's precompute, or make a cache with "
                "python -m lightwam_jax.precompute"
            )

    def __getitem__(self, index):
        latents = self._files[index]
        if latents.shape != self._shape:
            raise ValueError(
                f"{self._files.name}: window {index} has latents {list(latents.shape)}, the config "
                f"wants {list(self._shape)} (frames, height, width, channels): compare "
                "config.data.canvas, num_frames and frame_stride"
            )
        if not np.isfinite(latents.astype(np.float32)).all():
            raise ValueError(
                f"{self._files.name}: window {index} is not finite; encode it again with the "
                "reference's precompute"
            )
        return latents

    def check(self, codec):
        """Compares a few windows with what the codec makes of the data; returns their numbers."""
        picked = windows.spread(len(self._places), _CHECKED)
        got = np.stack([self[index] for index in picked])
        want, before, after = (codec.encode(self._videos(picked, step)) for step in (0, -1, 1))
        errors = _deviations(got, want)
        worst = errors.argmax()
        if errors[worst] > _NOISE:
            episode, start = self._places[picked[worst]]
            raise ValueError(
                f"{self._files.name}: the latents of window {picked[worst]} (episode {episode.id}, "
                f"step {start}) are {errors[worst]:.0%} from what {codec.id} makes of its images; "
                f"rounding is 1 to 2 %, up to {_NOISE:.0%} is accepted. {_REASONS}"
            )
        # Images may look alike: a small error says little where other images have one as small.
        own, early, late, other = (
            np.sqrt(np.mean(_deviations(got, against) ** 2))
            for against in (want, before, after, np.roll(want, 1, axis=0))
        )
        if own > min(early, late) or (len(picked) > 1 and own > other / 2):
            raise ValueError(
                f"{self._files.name}: the latents of windows {', '.join(map(str, picked))} are "
                f"{own:.2%} from what {codec.id} makes of their images, {early:.2%} and {late:.2%} "
                f"from the images a step before and after, {other:.2%} from each other's. "
                f"{_REASONS}"
            )
        return picked

    def _videos(self, picked, step):
        """Videos [n, frames, H, W, 3] of windows, all moved by a step within their episodes."""
        videos = []
        for episode, start in (self._places[index] for index in picked):
            moved = min(max(start + step, 0), episode.length - 1)
            window = windows.window_of(episode, moved, self._config.data)
            videos.append(windows.canvases(episode, window.frames, self._config))
        return np.stack(videos)


def _deviations(got, want):
    """Root mean square differences [n] of [n, ...], as shares of the standard deviation of want."""
    got, want = got.astype(np.float64), want.astype(np.float64)
    squares = np.mean((got - want) ** 2, axis=tuple(range(1, got.ndim)))
    return np.sqrt(squares) / max(want.std(), 1e-6)


def import_texts(directory, config, trust=False, say=print):
    """Writes the text cache of a `Config` from one of the reference.

    With config.data.text_weights a prompt is encoded and compared, and the policy can encode new
    ones. Without them it knows these prompts only.

    Args:
      directory: the reference's cache.
      trust: nothing is encoded to be compared.

    Raises:
      FileNotFoundError, ValueError: no cache there, prompts missing, or another encoder's.
    """
    if config.data.text_encoder != "umt5":
        raise ValueError(
            f"config.data.text_encoder is {config.data.text_encoder!r}; the reference's embeddings "
            "are of 'umt5'"
        )
    data = precompute.Data(config)
    prompts = precompute.data_prompts(data)
    files = caches.read_text_cache(directory, config.data.text_len)
    missing = [prompt for prompt in prompts if prompt not in files]
    if missing:
        raise ValueError(
            f"{directory} lacks {len(missing)} of {len(prompts)} prompts, such as {missing[0]!r}: "
            "compare config.data.prompt_template with the reference's, or encode them with python "
            "-m lightwam_jax.precompute"
        )
    encoder = _TextFiles(files, config, prompts)
    if weights := config.data.text_weights:
        own = encoders.make_text_encoder("umt5", config.model.text_dim, weights)
        encoder.id = own.id
        if not trust:
            encoder.check(own, min(prompts, key=len))
    with resumable.alone_in(config.data.cache):
        form = config.data.text_len, "umt5", config.data.prompt_template
        text_cache.write_cache(data.assets("text"), encoder, prompts, *form)
    say(f"{data.assets('text')}: {len(prompts)} prompts of {directory}")


class _TextFiles:
    """The reference's files as a `TextEncoder` of the prompts they hold."""

    def __init__(self, files, config, prompts):
        self._files, self.dim = files, config.model.text_dim
        self.id = f"umt5-reference-{files.encoder}"
        context, _ = files.table(prompts[:1])
        if context.shape[-1] != self.dim:
            raise ValueError(
                f"{files.name} holds rows of width {context.shape[-1]}, config.model.text_dim is "
                f"{self.dim}"
            )

    def encode(self, prompts, text_len):
        """See `TextEncoder.encode`."""
        context, mask = self._files.table(prompts)
        return context.astype(np.float32), mask

    def check(self, encoder, prompt):
        """Compares one prompt with what the encoder makes of it."""
        (got, got_mask), (want, mask) = (
            source.encode([prompt], self._files.text_len) for source in (self, encoder)
        )
        got, want = got[mask][None], want[mask][None]
        error = _deviations(got, want)[0] if (mask == got_mask).all() else np.inf
        if error > _NOISE:
            raise ValueError(
                f"{self._files.name}: the embedding of {prompt!r} is not what "
                f"config.data.text_weights makes of it ({error:.0%} off; rounding is 1 to 2 %): "
                "other weights or another tokenizer; --trust takes it as it is"
            )
