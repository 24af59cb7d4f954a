"""A policy that was exported acts with its weights rounded to bfloat16, and needs nothing else."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightwam_jax import atomic, build
from lightwam_jax import params as params_lib
from lightwam_jax.checkpoint import compact, storage
from lightwam_jax.checkpoint import run as checkpoint
from lightwam_jax.data import assets as assets_lib
from lightwam_jax.data import normalize
from lightwam_jax.data.caches import text as text_cache
from lightwam_jax.encoders import pca
from lightwam_jax.encoders import text as text_lib
from lightwam_jax.evaluation import export
from lightwam_jax.inference import policy as policy_lib
from tests import synthetic
from tests.inference.test_policy import random_params


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """(checkpoint of float32 parameters, its export)."""
    place = tmp_path_factory.mktemp("export")
    one_block = {"num_layers": 1, "lora_layers": (0,), "adapter_layers": (0,), "dtype": "float32"}
    config = synthetic.make_config(
        place, **{f"model.{key}": value for key, value in one_block.items()}
    )
    evaluation = dataclasses.replace(config.evaluation, suite="demo", env={"image_size": 32})
    config = dataclasses.replace(config, name="tiny", evaluation=evaluation)
    given = place / "assets"
    clips = np.random.default_rng(0).integers(0, 256, (4, 5, 32, 64, 3), np.uint8)
    pca.PcaCodec.fit(clips, config.model.latent_channels).save(given / "codec")
    (given / "codec" / "fitted_on.json").write_text("[]", encoding="utf-8")
    np.savez(given / "example_batch.npz", x=np.zeros(3))
    statistics = normalize.fit_statistics(synthetic.make_episodes(3), 8)
    statistics["made_from"] = {"config": assets_lib.statistics_keys(config)}
    atomic.write_json(str(given / "dataset_stats.json"), statistics)
    encoder = text_lib.HashedTextEncoder(config.model.text_dim)
    template = config.data.prompt_template
    prompts = [text_lib.prompt(task, template) for task in synthetic.TASKS]
    text_cache.write_cache(str(given / "text"), encoder, prompts, 24, "hashed", template)
    recorded = place / "episodes" / "meta"
    recorded.mkdir(parents=True)
    (recorded / "recording.json").write_text(
        json.dumps({"seeds": {"tabletop": [[5, 3]]}}), encoding="utf-8"
    )
    params = random_params(build.build_model(config.model), config.model, 3)
    meta = {"config": dataclasses.asdict(config), "step": 40}
    checkpoint.save_params(place / "run", params_lib.canonical(params), meta, given)
    assert export.export(place / "run", place / "policies" / "tiny") < 6e6
    (recorded / "recording.json").write_text(
        json.dumps({"seeds": {"tabletop": [[0, 1]]}}), encoding="utf-8"
    )
    return place / "run", place / "policies" / "tiny"


def test_it_acts_as_the_rounded_weights_do(places):
    whole, exported = (policy_lib.Policy.load(place) for place in places)
    files = {file.relative_to(places[1]).as_posix() for file in places[1].rglob("*.*")}
    assert {"assets/codec/codec.npz", "assets/text/rows.npy"} < files
    assert not [name for name in files if "example_batch" in name or "fitted_on" in name]
    stored = storage.read_meta(places[1])["arrays"]["params"].values()
    assert {dtype for _, dtype, _ in stored} == {"bfloat16"}
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), whole.params)
    jax.tree.map(np.testing.assert_array_equal, exported.params, rounded)
    assert {x.dtype.name for x in jax.tree.leaves(exported.params)} == {"float32"}
    want = policy_lib.Policy(whole.model, rounded, whole.config, whole.assets, step=40)
    rng = np.random.default_rng(1)
    images = {c: rng.integers(0, 256, (2, 32, 32, 3), np.uint8) for c in ("scene", "wrist")}
    seen = images, rng.normal(size=(2, 8)), [synthetic.TASKS[0], ""]
    got = exported.deployed().act(*seen)
    np.testing.assert_array_equal(got, want.deployed().act(*seen))
    assert np.ptp(got) > 0 and exported.step == 40


def test_it_knows_what_was_demonstrated_and_no_machine(places, tmp_path):
    exported = policy_lib.Policy.load(places[1])
    assert exported.demonstrated == {"tabletop": [[5, 3]]}, "as recorded, whatever lies there now"
    assert exported.config.data.path == exported.config.data.cache == ""
    files = [file for file in places[1].rglob("*") if file.is_file()]
    assert not [f for f in files if str(places[0].parent).encode() in f.read_bytes()]
    again = tmp_path / "again"
    export.export(places[1], again)
    assert policy_lib.Policy.load(again).demonstrated == exported.demonstrated
    assert compact.is_compact(again) and not compact.is_compact(places[0])


def test_incomplete_and_large_ones_are_refused(places, tmp_path):
    with pytest.raises(FileExistsError, match="is there already"):
        export.export(places[0], places[1])
    with pytest.raises(ValueError, match=r"MB; expected at most --max_mb=0.1"):
        export.export(places[0], tmp_path / "large", max_mb=0.1)
    assert not (tmp_path / "large").exists()
    for name in ("assets/dataset_stats.json", "assets/text/rows.npy", "params/manifest.ocdbt"):
        copy = tmp_path / name.replace("/", "_")
        storage.copy_files(places[1], copy)
        (copy / name).unlink()
        with pytest.raises(storage.DamagedCheckpointError, match=pathlib.Path(name).parts[0]):
            checkpoint.load_params(copy)
    (copy / "params" / "manifest.ocdbt").write_bytes((places[1] / name).read_bytes())
    checkpoint.load_params(copy)
    (copy / "assets" / "dataset_stats.json").write_text("{}", encoding="utf-8")
    with pytest.raises(storage.DamagedCheckpointError, match=r"dataset_stats\.json altered"):
        checkpoint.load_params(copy)


def test_readme_has_the_command_and_the_numbers_of_these_weights(places, tmp_path):
    policy = policy_lib.Policy.load(places[1])
    weights = export.closed_loop.manifest_of(policy)["weights"]
    e = policy.config.evaluation
    numbers = {"successes": 3, "episodes": 4, "errors": 0}
    manifest = {"weights": weights, "tasks": ["tabletop"], "suite": "demo", "device": "1 x cpu"}
    manifest |= {"seeds": [e.first_seed, e.first_seed + 3], "env": {"kwargs": e.env}}
    summary = {"manifest": manifest, "tasks": {"tabletop": {"trained": numbers}}, "seconds": 90}
    (tmp_path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    text = export.readme(places[1], tmp_path)
    command = "`python evaluate.py --workdir policies/tiny --mode demo --episodes 4` solves 75 %"
    assert text.startswith(command) and "| tabletop | trained | 75 % (30 to 95), 3 of 4 |" in text
    summary["manifest"]["weights"] = "others"
    (tmp_path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    with pytest.raises(ValueError, match="evaluate the exported policy, not the run"):
        export.readme(places[1], tmp_path)
