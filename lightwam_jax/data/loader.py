"""Batches of windows: deterministic, resumable, the same on any number of processes.

Global batch k of a run is a function of config.seed and k alone, whatever the threads, workers and
restarts. Each process reads its own rows of it: rows p * b ... (p + 1) * b - 1 for process p and b
rows per process.

Each dataset of a mixture is shuffled by itself, anew in every epoch of its own, and turned into
finished samples with its own statistics and transforms. Then the datasets are interleaved.
"""

import dataclasses
import fractions
import math
import multiprocessing
import os
import sys
import threading

import grain
import numpy as np
from absl import flags
from google.protobuf import message
from tensorflow_datasets.proto import tf_example_pb2

from lightwam_jax import config as config_lib
from lightwam_jax import encoders
from lightwam_jax.data import actions as actions_lib
from lightwam_jax.data import assets, normalize, spec, windows
from lightwam_jax.data.caches import latents as latent_cache

_FAKE_RECORDS = {"train": 1024, "val": 64}
_AS_READ = ("latents", "video", "action_is_pad", "image_is_pad")


def train_loader(config, process_index=0, process_count=1, start_step=0):
    """Returns an endless iterator of this process's rows of the training batches.

    Args:
      config: Config; data.source "fake" gives random batches and reads no files.
      process_index: which rows of each batch: see above.
      process_count: how many processes share config.train.batch_size.
      start_step: first batch; a restart at step k passes k.

    Returns:
      Iterator of dicts as `spec.batch_spec` describes; `close()` stops its threads and workers.
    """
    rows = _rows_per_process(config, process_count)
    weights, sets = zip(*_datasets(config, "train"))
    shuffled = [
        grain.MapDataset.source(samples).seed(config.seed + number).shuffle().repeat(None)
        for number, samples in enumerate(sets)
    ]
    data = shuffled[0]
    if len(sets) > 1:
        data = grain.MapDataset.select_from_datasets(shuffled, _Shares(weights))
    # Batches before slices: a process then holds a contiguous block of the rows of every batch.
    # Without a remainder: Grain rounds that length up in floating point, beyond what is allowed.
    data = data.batch(rows, drop_remainder=True)
    data = data[start_step * process_count + process_index :: process_count]
    # Grain counts its buffer in elements, which are whole batches here, and gives one to every
    # worker; the config counts samples.
    workers, threads = config.data.workers, config.data.threads
    ahead = max(2, threads, -(-config.data.prefetch // (rows * max(workers, 1))))
    data = data.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead))
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's worker processes read absl flags
        data = data.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), _end_with_parent)
    return iter(data)


def val_batches(config, process_index=0, process_count=1):
    """Returns the validation batches (this process's rows): a sequence with len() and [k].

    At most config.train.eval_batches batches, spread evenly over the held-out windows; the datasets
    of a mixture that hold windows out share them equally. The last batch is filled up with
    repeated rows; "valid" [B] bool is false on those. Empty when nothing is held out.
    """
    rows = _rows_per_process(config, process_count)
    sets = [samples for _, samples in _datasets(config, "val")]
    if not sets or not config.train.eval_batches:
        return []
    most = max(1, config.train.eval_batches * config.train.batch_size // len(sets))
    chosen = [(one, row) for one in sets for row in windows.spread(len(one), most)]
    count = -(-len(chosen) // config.train.batch_size)

    def load(number):
        first = (number * process_count + process_index) * rows
        picked = [chosen[i % len(chosen)] for i in range(first, first + rows)]
        samples = [one[row] for one, row in picked]
        batch = {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
        return {**batch, "valid": np.arange(first, first + rows) < len(chosen)}

    return grain.MapDataset.range(count).map(load)


def val_samples(config):
    """Returns [(`Config`, samples)] of the datasets of a run that hold windows out.

    Samples: len(), [row] -> {name: array}, a row of a batch; the rows are those of
    `windows.open_windows(config, "val")`.
    """
    directory, found = assets.assets_directory(config), []
    for dataset in config_lib.datasets(config):
        records, tasks = _records(dataset.config, "val")
        if len(records):
            samples = _samples(dataset.config, directory, records, tasks, {})
            found.append((dataset.config, samples))
    return found


def _end_with_parent(worker, workers):
    """Run in every worker: ends it with the training, which it would wait for after a kill."""
    del worker, workers

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _rows_per_process(config, process_count):
    rows, left = divmod(config.train.batch_size, process_count)
    if left or not rows:
        raise ValueError(
            f"config.train.batch_size={config.train.batch_size} does not divide over "
            f"{process_count} processes; make it a multiple of {process_count}"
        )
    return rows


class _Shares(grain.transforms.DatasetSelectionMap):
    """Sample i of a mixture -> (dataset, number of its sample): evenly interleaved, exact shares.

    With weights 7 and 3, i * 3 // 10 of the first i samples are of dataset 1. It gets sample i
    where that number grows from i to i + 1: samples 3, 6 and 9 of every ten. Sample 6 is thus
    number 6 * 3 // 10 = 1 of dataset 1, and sample 5 is number 5 - 5 * 3 // 10 = 4 of dataset 0.
    With more datasets, "dataset 1" stands for all after the first; the samples that they get are
    numbered anew and divided among them in the same way.

    `grain.MapDataset.mix` does the same with weights cut to hundredths of the smallest.
    """

    def __init__(self, weights):
        weights = [fractions.Fraction(repr(weight)) for weight in weights]  # 0.3 means 3/10
        unit = math.lcm(*(weight.denominator for weight in weights))
        self._shares = [int(weight * unit) for weight in weights]

    def __len__(self):
        return sys.maxsize

    def __getitem__(self, index):
        left = sum(self._shares)  # shares of this dataset and of those after it
        for dataset, share in enumerate(self._shares):
            after, and_next = (i * (left - share) // left for i in (index, index + 1))
            if after == and_next:  # sample `index` is not for the datasets after this one
                return dataset, index - after
            index, left = after, left - share
        raise AssertionError("the last dataset takes what is left")


# ---- samples -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _Samples:
    """One split of one dataset as finished samples: len(), [row] -> {name: array of one row}."""

    records: object  # len(), [row] -> raw record; see `windows.Windows`
    texts: object  # [task] -> (context [L, dim], mask [L])
    state: normalize.Normalizer
    action: normalize.Normalizer
    transform: actions_lib.ActionTransform
    widths: tuple  # of the model's proprio and actions
    keys: dict = dataclasses.field(default_factory=dict)  # what every sample carries besides

    def __len__(self):
        return len(self.records)

    def __getitem__(self, row):
        record = self.records[row]
        state, is_pad = record["proprio"], record["action_is_pad"]
        actions = self.transform.forward(record["actions"], state, is_pad)
        context, mask = self.texts[record["task"]]
        return {
            **{name: record[name] for name in _AS_READ if name in record},
            "context": context,
            "context_mask": mask,
            "proprio": actions_lib.pad(self.state.normalize(state), self.widths[0]),
            "actions": actions_lib.pad(self.action.normalize(actions), self.widths[1]),
            "index": row,
            **self.keys,
        }


def _datasets(config, split):
    """[(weight, `_Samples`)] of the datasets of a run that have samples in a split."""
    if config.data.source == "fake":
        return [(1.0, _fake_samples(config, split))]
    found, directory = [], assets.assets_directory(config)
    for number, dataset in enumerate(config_lib.datasets(config)):
        records, tasks = _records(dataset.config, split)
        if len(records):
            keys = {"dataset": np.int32(number)} if config.data.mixture else {}
            samples = _samples(dataset.config, directory, records, tasks, keys)
            found.append((dataset.weight, samples))
    return found


def _records(config, split):
    """The raw records of a split of one dataset, and the tasks of all of its splits."""
    if config.data.encode_online:
        return windows.open_windows(config, split)
    cache = latent_cache.open_cache(config)
    return _CacheRecords(cache, split, config) if cache.size(split) else (), cache.meta["tasks"]


def _samples(config, directory, records, tasks, keys):
    prompts = [encoders.text.prompt(task, config.data.prompt_template) for task in tasks]
    texts = assets.load_text(directory, config).contexts(prompts, config.data.text_len)
    _, state, action = assets.load_normalizers(directory, config)
    transform, widths = actions_lib.from_config(config), _widths(config)
    return _Samples(records, texts, state, action, transform, widths, keys)


def _fake_samples(config, split):
    texts = list(zip(*spec.fake_context(config, config.seed)))
    same = normalize.Normalizer(np.float32(1), np.float32(0))
    records, transform = _FakeRecords(config, split), actions_lib.ActionTransform()
    return _Samples(records, texts, same, same, transform, _widths(config))


def _widths(config):
    return config.model.proprio_dim, config.model.action_dim


class _CacheRecords:
    """The records of a cache split: len(), [row] -> {name: array}.

    TFDS's own decoder takes ten times as long, all of it under Python's lock.
    """

    def __init__(self, cache, split, config):
        self._split, self._bytes = split, cache.records(split)
        self._tensors = {
            name: (feature.np_dtype, feature.shape)
            for name, feature in latent_cache.features(config).items()
            if name in latent_cache.TENSORS
        }
        found = dict(cache.source(split).dataset_info.features.items())
        for name, form in self._tensors.items():
            have = found.get(name)
            if have is None or (have.np_dtype, have.shape) != form:
                raise ValueError(
                    f"{cache.directory}/features.json: {name} is {have!r}; expected {form[0]} "
                    f"{list(form[1])}; {latent_cache.REDO}"
                )

    def __len__(self):
        return len(self._bytes)

    def __getitem__(self, row):
        try:
            stored = tf_example_pb2.Example.FromString(self._bytes[row]).features.feature
            record = {
                name: np.frombuffer(stored[name].bytes_list.value[0], dtype).reshape(shape)
                for name, (dtype, shape) in self._tensors.items()
            }
            return {**record, "task": stored["task"].int64_list.value[0]}
        except (RuntimeError, ValueError, LookupError, message.DecodeError) as error:
            file = self._bytes.file(row)
            raise latent_cache.DamagedRecord(
                f"{file}: record {row} of {self._split} cannot be read ({error}); "
                f"{latent_cache.REDO}"
            ) from error


class _FakeRecords:
    """Random records, a function of the row; see `spec.fake_record`."""

    def __init__(self, config, split):
        self._config, self._length, self._salt = config, _FAKE_RECORDS[split], split == "val"

    def __len__(self):
        return self._length

    def __getitem__(self, row):
        return spec.fake_record(self._config, (self._config.seed, int(self._salt), int(row)))
