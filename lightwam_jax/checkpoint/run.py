"""Checkpoints: Orbax arrays, a JSON manifest of them, and the assets that make them a policy.

One checkpoint is one directory:

    params/     what learns, canonical layout (blocks stacked; see `params.py`)
    ema/        its moving average, if the run keeps one
    frozen/     what does not learn, if anything: written once per run, then hard-linked into every
                checkpoint, so that each directory is whole and the disk holds the weights once
    optimizer/  Adam moments, in the in-memory layout (only the same run reads them)
    meta/       step, config, and shape, dtype and checksum of every array; a checksum of all this
    assets/     normalisation statistics, text and codec files; large ones hard-linked like frozen/

Every array is checked against its checksum after reading; see `storage.py`.
"""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import time

import jax
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from lightwam_jax import bucket, sharding
from lightwam_jax import config as config_lib
from lightwam_jax import params as params_lib
from lightwam_jax.checkpoint import compact, storage, working_copy


def _dict(config):
    return json.loads(config_lib.to_json(config))


def config_differences(old, new):
    """Returns {dotted key: (old, new)} where two nested dicts differ; absent values are None."""
    old, new = (params_lib.flatten(json.loads(json.dumps(x))) for x in (old, new))
    return {
        key.replace("/", "."): (old.get(key), new.get(key))
        for key in sorted(set(old) | set(new))
        if old.get(key) != new.get(key)
    }


def _steps(parent):
    """The steps that have a checkpoint in this directory, which may be missing."""
    return [int(p.name) for p in parent.iterdir() if p.name.isdigit()] if parent.is_dir() else []


# ---- training ----------------------------------------------------------------------------------


class Checkpoints:
    """The checkpoints of one run: `<workdir>/checkpoints/<step>/`.

    Args:
      workdir: run directory.
      config: `Config`; the newest `train.keep_last` checkpoints are kept (0: all).
      assets: directory put into every checkpoint, or None.
    """

    def __init__(self, workdir, config, assets=None):
        self.workdir = storage.local_path(workdir)
        self.directory = self.workdir / "checkpoints"
        self.place = self.directory  # as messages name it
        self.config = config
        self.assets = assets
        # Hard links to the files that every checkpoint shares; made by the first save or restore.
        self._frozen_files = self.workdir / "frozen_params"
        self._frozen_manifest = None
        self._failed = False
        self._manager = self._open()

    def _open(self):
        storage.check_shared(self.workdir)
        self._remove_unfinished()
        config = self.config
        keep = [ocp.checkpoint_managers.LatestN(config.train.keep_last or None)]
        if config.train.keep_every:
            keep.append(ocp.checkpoint_managers.EveryNSteps(config.train.keep_every))
        return ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(keep),
                single_host_load_and_broadcast=True,  # all processes list the same steps
            ),
        )

    def _remove_unfinished(self):
        """Removes what killed saves left.

        Orbax's `cleanup_tmp_directories` does so in a thread that only the next save waits for. In
        a program that ends before the next save, it fails loudly while Python shuts down.
        """
        for parent in (self.directory, self.workdir) if jax.process_index() == 0 else ():
            for path in parent.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                try:
                    shutil.rmtree(path)
                except OSError:  # a save that failed, or a dying process, is still writing
                    time.sleep(2)
                    shutil.rmtree(path)

    def latest_step(self):
        """Returns the newest saved step, or None."""
        return max(self.steps(), default=None)

    def steps(self):
        """Returns the saved steps."""
        return self._manager.all_steps()

    def _fetched(self, step):
        """The directory of a checkpoint, in which it can be read now."""
        return self.directory / str(step)

    def save(self, step, items, frozen, extra):
        """Starts saving; returns once the arrays may be overwritten.

        Args:
          step: int.
          items: {"params": tree, "optimizer": tree, ...} of what changes, canonical layout.
          frozen: function returning the tree of what does not, called for the first checkpoint
            only; None where everything learns.
          extra: JSON-able values for the meta item.

        Raises:
          storage.SaveError: this save, or the one before it, could not be written.
        """
        manifests = {name: storage.manifest(tree) for name, tree in items.items()}
        args = {name: ocp.args.StandardSave(self._to_write(tree)) for name, tree in items.items()}
        if frozen is not None:
            if self._frozen_manifest is None:
                self._write_frozen(frozen())
            manifests["frozen"] = self._frozen_manifest
            args["frozen"] = storage.Files(str(self._frozen_files), link_from=0)
        if self.assets is not None:
            args["assets"] = storage.Files(str(self.assets), storage.LARGE)
        args["meta"] = ocp.args.JsonSave(make_meta(step, _dict(self.config), manifests, extra))
        with self._writing():
            self._start(step, ocp.args.Composite(**args))

    def _to_write(self, tree):
        return storage.on_host(tree)

    def _start(self, step, args):
        self._manager.save(step, args=args)

    def _write_frozen(self, tree):
        manifest = storage.manifest(tree)
        with self._writing():
            self._write(self._frozen_files, tree)
        self._frozen_manifest = manifest

    def _write(self, directory, tree):
        with ocp.StandardCheckpointer() as writer:
            writer.save(directory, storage.on_host(tree), force=True)

    def _link_frozen(self, source):
        """Makes later checkpoints link to the frozen files of this one, through links of their own.

        The checkpoint itself may be deleted before the last of them is written.
        """
        if jax.process_index() == 0:
            scratch = self.workdir / "frozen_params.partial"
            shutil.rmtree(scratch, ignore_errors=True)
            storage.copy_files(source, scratch, link_from=0)
            shutil.rmtree(self._frozen_files, ignore_errors=True)
            scratch.rename(self._frozen_files)

    def _newest(self):
        return max(_steps(self.directory), default=None)

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except Exception as error:  # the storage libraries raise whatever they like
            self._failed = True
            raise storage.SaveError(
                f"a checkpoint could not be written to {self.place}: "
                f"{str(error).splitlines()[0]}\n  the newest whole one is step {self._newest()}; "
                "the same command continues from there"
            ) from error

    def restore(self, targets):
        """Restores the newest intact checkpoint.

        A damaged one is moved to `<workdir>/damaged_checkpoints/` with a warning, and the one
        before it is tried.

        Args:
          targets: {item: tree of ShapeDtypeStructs with shardings}, as given to `save`, and
            "frozen".

        Returns:
          ({item: tree of arrays}, meta), or None where there is no checkpoint.

        Raises:
          ValueError: the checkpoint is another model's, or all of them are damaged.
        """
        steps = sorted(self.steps(), reverse=True)
        damage = []
        for step in steps:
            directory = self.directory / str(step)
            try:
                meta = storage.together(lambda s=step: storage.read_meta(self._fetched(s)))
                self._check_model(directory, meta, targets)
                items = storage.read_items(directory, targets, meta)
            except storage.DamagedCheckpointError as error:
                damage.append(str(error))
                logging.warning("Checkpoint %s is damaged: %s", step, error)
                continue
            self._set_aside([s for s in steps if s > step])
            if targets.get("frozen"):
                self._link_frozen(directory / "frozen")
                self._frozen_manifest = meta["arrays"]["frozen"]
            return items, meta
        if damage:
            raise ValueError(
                f"none of the checkpoints in {self.place} is intact:\n  "
                + "\n  ".join(damage)
                + "\nrestore the directory from a copy, or start again in another --workdir"
            )
        return None

    def _set_aside(self, steps):
        for step in steps:
            place = self.workdir / "damaged_checkpoints" / str(step)
            logging.warning("Moving damaged checkpoint %s to %s", step, place)
            if jax.process_index() == 0:
                place.parent.mkdir(exist_ok=True)
                shutil.rmtree(place, ignore_errors=True)
                shutil.move(self.directory / str(step), place)
        if steps:
            multihost_utils.sync_global_devices("damaged checkpoints set aside")
            self._manager.reload()

    def _check_model(self, directory, meta, targets):
        changed = config_differences(meta["config"]["model"], _dict(self.config)["model"])
        keys = "".join(
            f"\n  config.model.{k}: {old!r} in the checkpoint, {new!r} now"
            for k, (old, new) in changed.items()
        )
        for name, target in targets.items():
            stored = storage.stored_shapes(meta, name) if name in meta["arrays"] else {}
            try:
                params_lib.check_same_structure(stored, target, f"{directory}/{name}")
            except ValueError as error:
                raise ValueError(
                    f"{error}{keys}\ncontinue with the checkpoint's config, or choose another "
                    "--workdir"
                ) from error

    def preempted(self, step):
        """Whether the scheduler wants this run, of several processes, to stop after `step`."""
        return jax.process_count() > 1 and self._manager.reached_preemption(step)

    def wait(self):
        """Waits for the save under way; raises `storage.SaveError` where it went wrong."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self):
        """Waits and releases the background threads, unless a save failed (and raised)."""
        if not self._failed:
            self.wait()
            self._manager.close()


def make_meta(step, config, manifests, extra):
    """Returns the meta item: everything of a checkpoint that is not an array or a file."""
    meta = {
        "format": storage.FORMAT,
        "step": step,
        "config": config,
        "arrays": manifests,
        "versions": {"jax": jax.__version__, "orbax": ocp.__version__},
        **extra,
    }
    return meta | {"checksum": storage.meta_checksum(meta)}


# ---- policies ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LoadedCheckpoint:
    """What inference needs from a checkpoint.

    Attributes:
      params: all parameters, canonical layout, in the dtypes they were stored in;
        `params.segmented(params, config.model)` gives the in-memory layout.
      config: `Config` of the run, or None where a converter wrote the parameters.
      meta: the meta item.
      assets: directory of statistics, text and codec files, or None.
      path: the checkpoint directory.
    """

    params: dict
    config: config_lib.Config | None
    meta: dict
    assets: pathlib.Path | None
    path: pathlib.Path


def find_checkpoint(path):
    """Returns the checkpoint directory of `path`: itself, or the newest one of a run.

    That of an address is copied to this machine first.

    Raises:
      FileNotFoundError: there is none.
    """
    if bucket.is_address(path):
        return working_copy.checkpoint(str(path))
    path = storage.local_path(path)
    if (path / "meta").is_dir():
        return path
    for parent in (path, path / "checkpoints"):
        if steps := _steps(parent):
            return parent / str(max(steps))
    raise FileNotFoundError(
        f"no checkpoint in {path}; expected a run directory (--workdir of train.py), its "
        "checkpoints/ or one checkpoint"
    )


def save_params(directory, params, meta=None, assets=None):
    """Writes parameters as a checkpoint without optimizer: what converters produce.

    The directory appears when all of it is written; a failure leaves nothing behind.

    Args:
      directory: must not exist.
      params: all parameters, canonical layout: numpy or jax arrays, or `streamed.StreamedArray`s.
      meta: JSON-able values; `config` (a `Config` as a dict, or {"model": ...}) if known.
      assets: directory to copy in (large files are hard-linked), or None.
    """
    directory = storage.local_path(directory)
    meta = dict(meta or {})
    step, config = meta.pop("step", 0), meta.pop("config", None)
    partial = directory.with_name(directory.name + ".partial")  # has no meta item until the end
    shutil.rmtree(partial, ignore_errors=True)
    try:
        manifests = {"params": storage.write_params(partial / "params", params)}
        if assets is not None:
            storage.copy_files(assets, partial / "assets", storage.LARGE)
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
            whole = make_meta(step, config, manifests, meta)
            writer.save(partial / "meta", args=ocp.args.JsonSave(whole))
        partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def load_params(path, mesh=None):
    """Reads the parameters of a checkpoint, without the optimizer's state.

    If the run kept a moving average, that is what is read.

    Args:
      path: a run directory, or one checkpoint.
      mesh: where the arrays go (`sharding.make_mesh`); None: the first local device.

    Returns:
      `LoadedCheckpoint`.

    Raises:
      FileNotFoundError: no checkpoint there.
      storage.DamagedCheckpointError: files missing or altered.
    """
    directory = find_checkpoint(path)
    meta = storage.read_meta(directory)
    compact.check_assets(directory, meta)
    learned = "ema" if "ema" in meta["arrays"] else "params"
    parts = []
    for name in [x for x in (learned, "frozen") if x in meta["arrays"]]:
        shapes = storage.stored_shapes(meta, name)
        places = sharding.tree_shardings(mesh or sharding.single_device_mesh(), shapes)
        target = {name: sharding.with_shardings(shapes, places)}
        parts.append(storage.read_items(directory, target, meta)[name])
    config, assets = meta["config"], directory / "assets"
    whole = config is not None and "train" in config
    return LoadedCheckpoint(
        params=compact.widened(params_lib.merge(*parts), meta),
        meta=meta,
        path=directory,
        config=config_lib.from_config_dict(config, made_in=directory) if whole else None,
        assets=assets if assets.is_dir() else None,
    )
