"""Makes everything training reads.

  python -m lightwam_jax.precompute --config configs/X.py --what all

  stats     examines the data (CACHE/doctor/report.html); normalisation statistics, printed as a
            table -> CACHE/assets/dataset_stats.json
  text      embeddings of every prompt -> CACHE/assets/text
  latents   the latent codec -> CACHE/assets/codec; the windows -> CACHE/latents
  all       the three, in this order

CACHE is config.data.cache. What is there already and still right is kept: running it twice costs
seconds. Killed at any moment, or stopped by a full disk, the same command continues.

Started several times on the same files (docs/pods.md), the processes share texts and latents;
process 0 does the rest, and the last one to be done completes the caches.
"""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import sys
import time

from absl import app, flags, logging

from lightwam_jax import command_line, next_command

if __name__ == "__main__":  # flags are global: importing this module must not define any
    # They are checked before the imports that take seconds.
    command_line.define_config()
    flags.DEFINE_list("what", ["all"], "Steps, comma separated: stats, text, latents, all.")
    flags.DEFINE_integer("process_index", None, "Which of --process_count processes this one is.")
    flags.DEFINE_integer("process_count", None, "How many share the work; srun, mpirun, GKE tell.")
    flags.mark_flag_as_required("config")
    command_line.check()

import numpy as np

from lightwam_jax import atomic, distributed, encoders
from lightwam_jax import config as config_lib
from lightwam_jax.data import actions, assets, normalize, windows
from lightwam_jax.data import episodes as episodes_lib
from lightwam_jax.data.caches import build_latents, resumable
from lightwam_jax.data.caches import latents as latent_cache
from lightwam_jax.data.caches import text as text_cache
from lightwam_jax.encoders import pca

STEPS = ("stats", "text", "latents")
_FIT_EPISODES = 64  # more of them show more colours and places; the fit then takes 2 seconds
_FIT_CLIPS = 384
_SHARED = (
    "its share is made; the process that ends last completes it (where all have ended and "
    "it is not there, run one again)"
)


def precompute(config, what=("all",), process_index=0, process_count=1):
    """Runs the steps named in `what` (of `STEPS`, or "all"); returns the `Data`, if there are any.

    Args:
      process_index, process_count: which part of the work is this process's.

    Raises:
      ValueError: unknown step or source, data that contradict the config.
      FileNotFoundError: no data.
      resumable.FullDisk: what is finished is kept.
      atomic.InUse: the same command runs already.
      TimeoutError: process 0 did not begin what this one was to share.
    """
    unknown = sorted(set(what) - {*STEPS, "all"})
    if unknown or not what:
        raise ValueError(
            f"--what={','.join(what)}: {', '.join(unknown) or 'nothing'} is not a step; expected "
            f"some of {', '.join(STEPS)}, all"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"--process_index={process_index} of --process_count={process_count}; expected 0 to "
            "process_count - 1"
        )
    if config.data.source == "fake":
        print("config.data.source='fake' makes its batches on the fly: nothing to precompute")
        return None
    cache = config.data.cache
    if not cache:
        raise ValueError(
            "config.data.cache is empty; give the directory to write to: --config.data.cache=DIR"
        )
    steps = [step for step in STEPS if step in what or "all" in what]
    work = {"stats": _statistics, "text": _text, "latents": _latents}
    data = Data(config, process_index, process_count)
    encoders.check_weights(config.data, steps, os.path.join(cache, "assets"))
    os.makedirs(cache, exist_ok=True)
    with contextlib.nullcontext() if process_index else resumable.alone_in(cache):
        for step in steps:
            started = time.monotonic()
            with resumable.explaining_full_disk(cache):
                note = work[step](data)
            print(f"{step}: {note} ({time.monotonic() - started:.1f} s)", flush=True)
    return data


class SourceEpisodes:
    """The episodes of one dataset. Its properties raise ValueError if the episodes have errors.

    Attributes:
      config: of a `config.Dataset`. found, problems: see `episodes.read`.
      splits: {"train": [Episode], "val": [Episode]}.
      everything, training: fingerprints of all episodes, and of those to train on.
    """

    def __init__(self, config):
        self.config = config
        self.found, self.problems = episodes_lib.read(config)

    @functools.cached_property
    def splits(self):
        episodes_lib.refuse_errors(self.problems, self.config)
        train, val = episodes_lib.split(self.found, self.config.data.val_fraction)
        return {"train": train, "val": val}

    @functools.cached_property
    def everything(self):
        return latent_cache.fingerprint(self.splits["train"] + self.splits["val"], self.config)

    @functools.cached_property
    def training(self):
        return latent_cache.fingerprint(self.splits["train"], self.config)


class Data:
    """The datasets of a run, read once for all steps, and this process's place among others."""

    def __init__(self, config, process_index=0, process_count=1):
        self.config, self.index, self.count = config, process_index, process_count
        self.sets = [SourceEpisodes(dataset.config) for dataset in config_lib.datasets(config)]

    def assets(self, *path):
        """Returns a path in the assets of the run, whose directory exists."""
        directory = os.path.join(self.config.data.cache, "assets")
        os.makedirs(directory, exist_ok=True)
        return os.path.join(directory, *path)


# ---- stats ---------------------------------------------------------------------------------------


def _statistics(data):
    if data.index:
        return "left to process 0"
    refused = []
    for source in data.sets:  # a report on each, before the errors of any
        try:
            _examine(source)
        except ValueError as error:
            refused.append(str(error))
    if refused:
        raise ValueError("\n".join(refused))
    files = {}
    for source in data.sets:
        files.setdefault(assets.statistics_file(source.config), []).append(source)
    return "; ".join(_fit(data.assets(name), sets) for name, sets in files.items())


def _examine(source):
    """Has the dataset doctor look at data, or at questions about them, that are new."""
    from lightwam_jax.data.doctor import examine
    from lightwam_jax.data.doctor import report as doctor_report  # draws figures; only here

    directory = doctor_report.directory(source.config)
    done, asked = os.path.join(directory, "examined.json"), None
    if not any(problem.severity == "error" for problem in source.problems):
        keys = dataclasses.asdict(source.config.data)
        for key in ("cache", "workers", "threads", "prefetch"):
            del keys[key]
        # Not `source.everything`: a split that fails is no reason for no report.
        data = latent_cache.fingerprint(source.found, source.config)
        asked = json.loads(json.dumps({"data": data, "config": keys}))
        if atomic.read_json(done) == asked:
            print(f"report: {os.path.join(directory, 'report.html')} is up to date", flush=True)
            return
    report = examine.examine(source.config, (source.found, source.problems))
    print(doctor_report.text(report), flush=True)
    page = doctor_report.write(report, directory)[0]
    print(f"report: {page}", flush=True)
    doctor_report.refuse_errors(report, page)
    os.makedirs(directory, exist_ok=True)
    atomic.write_json(done, asked)


def _fit(path, sets):
    """Statistics of the datasets of one embodiment together."""
    config = sets[0].config
    wanted, *others = (assets.statistics_keys(source.config) for source in sets)
    if any(other != wanted for other in others):
        raise ValueError(
            f"datasets of config.data.embodiment={config.data.embodiment!r} differ in "
            f"{', '.join(wanted)}; give them embodiments of their own"
        )
    made_from = {"data": "+".join(source.training for source in sets), "config": wanted}
    have = atomic.read_json(path)
    if have is not None:
        if have.get("made_from") == made_from:
            return f"up to date in {path}"
        if "made_from" not in have:  # somebody's released statistics: theirs, but they must fit
            widths = config_lib.state_width(config), config_lib.action_width(config)
            normalize.read_statistics(path, *widths)
            return f"{path} was not computed here; kept as given (delete it to compute)"
    train = [episode for source in sets for episode in source.splits["train"]]
    transform = actions.from_config(config)
    statistics = normalize.fit_statistics(train, config.data.action_horizon, transform)
    statistics["made_from"] = made_from
    rates = {float(episode.fps) for episode in train}
    if len(rates) == 1:  # a policy of several would have no time between two actions
        (statistics["fps"],) = rates
    atomic.write_json(path, statistics)
    print(normalize.describe(statistics))
    for warning in normalize.warnings(statistics, config.data.normalization):
        print(f"WARNING: {warning}", file=sys.stderr)
    return f"wrote {path}"


# ---- text ----------------------------------------------------------------------------------------


def _text(data):
    config, directory = data.config.data, data.assets("text")
    if not data.index:
        resumable.recover(directory)
    prompts = data_prompts(data)
    cache = _complete_texts(directory, data.config, prompts)
    # Where every prompt is cached, the encoder's weights may be elsewhere.
    encoder = encoders.make_text_encoder(
        config.text_encoder, data.config.model.text_dim, config.text_weights, cache
    )
    if cache is not None and cache.encoder_id == encoder.id:
        if not data.index:
            resumable.put_away(directory)
        return f"up to date, {len(cache.prompts)} prompts in {directory}"
    form = config.text_len, config.text_encoder, config.prompt_template
    finished = text_cache.write_cache(directory, encoder, prompts, *form, data.index, data.count)
    return f"wrote {len(prompts)} prompts to {directory}" if finished else _SHARED


def _complete_texts(directory, config, prompts):
    """The text cache in `directory`, None where it lacks prompts or is of another form."""
    if not os.path.exists(directory):
        return None
    cache, data = text_cache.TextCache(directory), config.data
    form = data.text_encoder, config.model.text_dim, data.prompt_template
    if (cache.kind, cache.dim, cache.template) != form:
        return None
    same_length = cache.text_len in (None, data.text_len)
    return cache if same_length and all(prompt in cache for prompt in prompts) else None


def data_prompts(data):
    """Returns the texts of all instructions in `Data`, each once."""
    parts = [part for source in data.sets for part in source.splits.values()]
    tasks = episodes_lib.tasks([episode for part in parts for episode in part])
    template = data.config.data.prompt_template
    return list(dict.fromkeys(encoders.text.prompt(task, template) for task in tasks))


# ---- latents -------------------------------------------------------------------------------------


def _latents(data):
    codec, how = make_codec(data)
    if data.config.data.encode_online:
        online = "config.data.encode_online encodes during training: no latents"
        return f"codec {codec.id} {how}; {online}"
    return "; ".join(_windows(source, data, codec, how) for source in data.sets)


def _windows(source, data, codec, how):
    meta = latent_cache.read_meta(source.config)
    if meta is not None and (meta["data"], meta["codec"]) == (source.everything, codec.id):
        wanted, count = latent_cache.wanted(source.config), sum(meta["records"].values())
        differing = {key for key, value in wanted.items() if meta["config"].get(key) != value}
        if differing <= set(latent_cache.WHEREABOUTS):
            directory = latent_cache.latents_directory(source.config)
            if not data.index:
                resumable.recover(directory)
            if not differing:
                return f"up to date, {count} windows"
            if not data.index:
                path = os.path.join(directory, "cache.json")
                atomic.write_json(path, {**meta, "config": wanted})
            return f"up to date, {count} windows of the same episodes in {source.config.data.path}"
    meta = build_latents.build(source.config, source.splits, codec, data.index, data.count)
    if meta is None:
        return _SHARED
    psnr, records = meta["psnr"], meta["records"]
    return (
        f"wrote {records['train']} training and {records['val']} validation windows; codec "
        f"{codec.id} {how}, PSNR on {psnr['frames']} frames: first {psnr['first']:.1f} dB, later "
        f"{psnr['later']:.1f} dB"
    )


# ---- codec ---------------------------------------------------------------------------------------


def make_codec(data):
    """Returns (the codec of a `Data`, in the assets, and "fitted now", "copied" or "kept").

    Process 0 makes it where the assets hold none that fits; the others wait for that.
    """
    kind, directory = data.config.data.codec, data.assets("codec")
    if kind not in encoders.base.STRIDES:
        known = ", ".join(map(repr, encoders.base.STRIDES))
        raise ValueError(f"config.data.codec is {kind!r}; known codecs: {known}")
    prepare = _pca_codec if kind == "pca" else _wan_codec
    if data.index:
        find = lambda: prepare(data, directory)[0]
        return resumable.wait(find, f"process 0 to write {directory}"), "kept"
    resumable.recover(directory)
    kept, make = prepare(data, directory)
    if kept is not None:
        return kept, "kept"
    new = directory + ".partial"
    shutil.rmtree(new, ignore_errors=True)
    make(new)
    resumable.replace(new, directory)
    return encoders.load_codec(directory), "fitted now" if kind == "pca" else "copied"


def _wan_codec(data, directory):
    """The pretrained VAE: (the kept codec if it fits, function that saves one in a directory)."""
    from lightwam_jax.encoders import wan  # imports the models, which the PCA codec does not need

    config = data.config
    weights, form = config.data.codec_weights, (config.data.codec, config.model.dtype)
    kept = encoders.load_codec(directory) if os.path.exists(directory) else None
    if kept is not None and (kept.kind == "pca" or (kept.kind, kept.dtype) != form):
        kept = None
    if kept is not None and not weights:
        return kept, None
    codec = wan.WanCodec(weights, *form)
    if codec.latent_channels != config.model.latent_channels:
        raise ValueError(
            f"config.data.codec_weights={weights!r} has {codec.latent_channels} latent channels, "
            f"config.model.latent_channels is {config.model.latent_channels}"
        )
    if kept is not None and kept.id != codec.id:
        kept = None
    return kept, codec.save


def _pca_codec(data, directory):
    """The codec fitted on the training episodes: see `_wan_codec`."""
    fitted_on = [
        {**latent_cache.wanted(source.config), "data": source.training} for source in data.sets
    ]
    for entry in fitted_on:
        for key in latent_cache.WHEREABOUTS:  # the same episodes may lie elsewhere
            del entry[key]
    if atomic.read_json(os.path.join(directory, "fitted_on.json")) == fitted_on:
        return encoders.load_codec(directory), None

    def fit(new):
        clips = np.concatenate([_fit_clips(source) for source in data.sets])
        pca.PcaCodec.fit(clips, data.config.model.latent_channels).save(new)
        atomic.write_json(os.path.join(new, "fitted_on.json"), fitted_on)

    return None, fit


def _fit_clips(source):
    """Clips of the training episodes of a dataset, uint8 [N, frames, H, W, 3]."""
    train = source.splits["train"]
    per_episode = -(-_FIT_CLIPS // min(_FIT_EPISODES, len(train)))
    return encoders.base.to_uint8(windows.clips(train, source.config, _FIT_EPISODES, per_episode))


def main(argv):
    """The command line; see the top of this file."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; steps go into --what")
    given = flags.FLAGS
    if cache := given.config.data.cache:
        command_line.check_directory(cache, "--config.data.cache")
    try:
        config = config_lib.from_config_dict(given.config)
        index, count = distributed.share(os.environ, given.process_index, given.process_count)
        data = precompute(config, given.what, index, count)
    # A missing file, a full disk and a timeout are OSErrors.
    except (ValueError, OSError, atomic.InUse) as error:
        logging.debug("Where it was found:", exc_info=True)  # shown by --verbosity=1
        command_line.fail(error)
    if data and count == 1:
        print(next_command.after_precompute(data.config, given.what, [s.splits for s in data.sets]))


if __name__ == "__main__":
    command_line.run(main)
