"""A cache knows the files that it was made of, and a report needs no sound picture."""

import json
import pathlib
import shutil

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightwam_jax import precompute
from lightwam_jax.data import episodes
from lightwam_jax.data.caches import contents
from lightwam_jax.data.caches import latents as latent_cache
from lightwam_jax.data.doctor import report as doctor_report
from lightwam_jax.data.formats import video
from tests import synthetic, writers
from tests.data.formats.test_lerobot_meta import configure, made, sets

__all__ = ["sets"]  # a fixture


def fingerprint(config):
    return latent_cache.fingerprint(episodes.load_episodes(config), config)


def test_a_hash_sees_size_and_blocks_and_no_times(tmp_path):
    file, rng = tmp_path / "file", np.random.default_rng(0)
    whole = bytearray(rng.integers(0, 256, 3 * contents.BLOCKS * contents.BLOCK, np.uint8))
    file.write_bytes(whole)
    first = contents.digest(file)
    copied = shutil.copy(file, tmp_path / "copied")
    assert contents.digest(copied) == first == contents.digest(str(file))
    for place in (0, len(whole) // 7 * 3, len(whole) - 1):
        changed = whole.copy()
        changed[place : place + contents.BLOCK] = bytes(contents.BLOCK)
        (tmp_path / f"{place}").write_bytes(changed)
        assert contents.digest(tmp_path / f"{place}") != first, place
    (tmp_path / "longer").write_bytes(whole + b"\0")
    assert contents.digest(tmp_path / "longer") != first
    for name, size in (("short", len(whole)), ("long", len(whole) + 1)):  # all blocks are alike
        (tmp_path / name).write_bytes(bytes(size))
    assert contents.digest(tmp_path / "short") != contents.digest(tmp_path / "long")
    file.write_bytes(whole[::-1])
    assert contents.digest(file) != first, "a file that changes while a program runs"
    assert contents.digest(tmp_path / "absent") != first


def test_every_byte_of_a_small_file_counts(tmp_path):
    content, seen = bytes(1000), set()
    for place in range(0, 1000, 111):
        (tmp_path / f"{place}").write_bytes(content[:place] + b"x" + content[place + 1 :])
        seen.add(contents.digest(tmp_path / f"{place}"))
    assert len(seen) == 10


@pytest.mark.parametrize("version", ["2.1", "3.0"])
def test_a_video_that_is_replaced(sets, tmp_path, version):
    root = shutil.copytree(sets / version, tmp_path / "set")
    config, before = configure(root), fingerprint(configure(root))
    assert fingerprint(configure(shutil.copytree(root, tmp_path / "copied"))) == before
    alone = configure(root, **{"data.cameras": ("scene",)})
    scene = fingerprint(alone)
    file = sorted((root / "videos").rglob("*wrist*/**/*.mp4"))[-1]
    old = file.read_bytes()
    frames = video.probe(file).frames
    video.write(file, np.full((frames, 16, 16, 3), 200, np.uint8), 10)
    corrected = fingerprint(config)
    assert corrected != before
    assert fingerprint(alone) == scene, "a camera that is not used"
    file.write_bytes(old[:-200])
    assert fingerprint(config) not in (before, corrected)
    file.write_bytes(old)
    assert fingerprint(config) == before


def test_pictures_of_hdf5_that_are_replaced_in_place(tmp_path):
    found = made(2)
    config = synthetic.make_config("", **writers.robomimic(tmp_path, found))
    before = fingerprint(config)
    (file,) = (tmp_path / "robomimic").glob("*.hdf5")
    with h5py.File(file, "r+") as opened:
        images = opened["data/demo_1/obs/wrist_image"]
        images[3] = 255 - images[3]
    assert fingerprint(config) != before


def test_pictures_of_rlds_that_are_replaced(tmp_path):
    found = made(2)
    before = fingerprint(synthetic.make_config("", **writers.rlds(tmp_path / "a", found)))
    again = fingerprint(synthetic.make_config("", **writers.rlds(tmp_path / "b", found)))
    assert again == before
    found[1].images["wrist"][2] = 9
    assert fingerprint(synthetic.make_config("", **writers.rlds(tmp_path / "c", found))) != before


@pytest.mark.parametrize("kept", ["bytes", "paths", "typed paths", "names"])
def test_pictures_in_parquet_and_beside_it(tmp_path, kept):
    from tests.data.formats.test_lerobot import by_hand, png

    pictures = [png(np.full((8, 64, 3), i, np.uint8)) for i in range(6)]
    (tmp_path / "set/pictures").mkdir(parents=True)
    for i, content in enumerate(pictures[:5]):
        (tmp_path / f"set/pictures/{i}.png").write_bytes(content)
    names = [f"pictures/{i}.png" for i in range(5)]
    cells = {
        "bytes": [{"bytes": p, "path": "gone.png"} for p in pictures[:5]],
        "paths": [{"bytes": None, "path": name} for name in names],
        "typed paths": pa.array(
            [{"bytes": None, "path": name} for name in names],
            pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        ),
        "names": names,
    }[kept]
    (tmp_path / "set").rename(tmp_path / "kept")
    config = by_hand(tmp_path / "set", "v2.1", top=pa.array(cells))
    shutil.copytree(tmp_path / "kept/pictures", tmp_path / "set/pictures")
    before = fingerprint(config)
    if kept == "bytes":
        file = tmp_path / "set/data/chunk-001/episode_000001.parquet"
        table = pq.read_table(file)
        cells = [{"bytes": pictures[5], "path": "gone.png"}] * 2
        place = table.column_names.index("top")
        pq.write_table(table.set_column(place, "top", pa.array(cells)), file)
    else:
        (tmp_path / "set/pictures/4.png").write_bytes(pictures[5])
    assert fingerprint(config) != before


# ---- the report --------------------------------------------------------------------------------


@pytest.fixture
def undrawn(monkeypatch):
    """A page without its charts, which take seconds."""
    page = lambda path, *a: pathlib.Path(path).write_text("", encoding="utf-8")
    monkeypatch.setattr(doctor_report.html_report, "write_html", page)


def report_of(config, capsys):
    """Runs the step "stats"; returns (report.json, what was printed and the error)."""
    capsys.readouterr()
    with pytest.raises(ValueError) as error:
        precompute.precompute(config, ("stats",))
    said = f"{capsys.readouterr().out}{error.value}"
    directory = f"{config.data.cache}/doctor"
    with (
        open(f"{directory}/report.json", encoding="utf-8") as file,
        open(f"{directory}/report.html", encoding="utf-8"),
    ):
        return json.load(file), said


def short(directory, **overrides):
    windows = {"data.num_frames": 5, "data.frame_stride": 1, "data.action_horizon": 4}
    return synthetic.make_config(str(directory), **windows | overrides)


def encoded_hdf5(directory, damaged):
    """HDF5 of JPEGs, in which `damaged` {episode: frame} are cut short."""
    for number, episode in enumerate(made(4)):
        with h5py.File(directory / f"episode_{number}.hdf5", "w") as file:
            file["qpos"], file["action"] = episode.state, episode.action
            for camera in ("scene", "wrist"):
                images = [writers.encoded(p) for p in episode.images[camera]]
                if camera == "scene" and number in damaged:
                    images[damaged[number]] = images[damaged[number]][:40]
                most = max(map(len, images))
                file[camera] = np.stack(
                    [np.frombuffer(i.ljust(most, b"\0"), np.uint8) for i in images]
                )
    return {
        "data.source": "hdf5",
        "data.path": str(directory),
        "data.fields.state": ("qpos",),
        "data.fields.action": ("action",),
        "data.fields.image": "{camera}",
        "data.fields.task": "text:fold",
        "data.fields.fps": 10.0,
    }


@pytest.mark.parametrize("damaged", [{0: 0, 2: 0}, {0: 5, 3: 0}, {0: 0, 1: 0, 2: 0, 3: 0}])
def test_the_report_comes_out_whatever_picture_is_damaged(tmp_path, damaged, capsys, undrawn):
    (tmp_path / "data").mkdir()
    config = short(tmp_path, **encoded_hdf5(tmp_path / "data", damaged))
    report, error = report_of(config, capsys)
    wrong = {p["episode"]: p for p in report["problems"] if p["severity"] == "error"}
    assert set(wrong) == {f"episode_{number}" for number in damaged}
    assert all(wrong[f"episode_{n}"]["frame"] == frame for n, frame in damaged.items())
    assert all(name in error for name in wrong)


@pytest.mark.parametrize("kind", ["first video", "every video", "no frames", "not a video"])
def test_the_report_comes_out_whatever_video_is_damaged(sets, tmp_path, kind, capsys, undrawn):
    root = shutil.copytree(sets / "2.1", tmp_path / "set")
    files = sorted((root / "videos").rglob("*scene/*.mp4"))
    for file in files if kind == "every video" else files[:1]:
        whole = file.read_bytes()
        content = {"no frames": whole[:100], "not a video": b"GIF89a" * 50}
        file.write_bytes(content.get(kind, whole[: len(whole) // 2]))
    config = short(tmp_path, **{"data.path": str(root)})
    report, _ = report_of(config, capsys)
    broken = {p["episode"] for p in report["problems"] if p["severity"] == "error"}
    assert broken == {f"episode_{i:06d}" for i in range(4 if kind == "every video" else 1)}


def test_the_report_comes_out_where_the_split_leaves_nothing(sets, tmp_path, capsys, undrawn):
    config = short(tmp_path, **{"data.path": str(sets / "2.1"), "data.val_fraction": 0.9})
    report, error = report_of(config, capsys)
    assert not report["errors"] and "leaves none to train on" in error


def test_each_dataset_of_a_mixture_has_its_report(sets, tmp_path, undrawn, capsys):
    mixture, roots = {}, []
    for name in ("one", "two"):
        root = shutil.copytree(sets / "2.1", tmp_path / name)
        (file, *_) = sorted((root / "videos").rglob("*.mp4"))
        file.write_bytes(b"broken")
        mixture[name] = {"weight": 0.5, "path": str(root)}
        roots.append(str(file))
    config = short(tmp_path, **{"data.mixture": mixture})
    capsys.readouterr()
    with pytest.raises(ValueError) as error:
        precompute.precompute(config, ("stats",))
    printed = capsys.readouterr().out
    for name, file in zip(("one", "two"), roots):
        assert printed.count(file) == 1 and f"doctor_{name}" in str(error.value)
    assert {p.parent.name for p in (tmp_path / "cache").rglob("report.html")} == {
        "doctor_one",
        "doctor_two",
    }
