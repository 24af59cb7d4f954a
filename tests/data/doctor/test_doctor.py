"""The dataset doctor: every planted fault found where it was planted, and no false alarm."""

import dataclasses
import json
import pathlib
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightwam_jax import precompute
from lightwam_jax.data import episodes
from lightwam_jax.data.doctor import examine
from lightwam_jax.data.doctor import report as doctor_report
from lightwam_jax.data.formats import lerobot_write, video
from tests import synthetic


@dataclasses.dataclass(frozen=True, eq=False)
class Recorded(episodes.ArrayEpisode):
    """An episode with a file and times; image `undecodable` of camera "wrist" is broken."""

    timestamps: np.ndarray | None = None
    file: str = ""
    undecodable: int | None = None

    def frames(self, camera, indices):
        if camera == "wrist" and self.undecodable in list(indices):
            raise episodes.FrameError(f"{self.file}.mp4", self.undecodable, "cannot be decoded")
        return super().frames(camera, indices)


def healthy(count=12, steps=24, size=16):
    """Episodes of a smooth random walk with a gripper that closes halfway."""
    out = []
    for number in range(count):
        rng = np.random.default_rng(number)
        action = np.cumsum(rng.uniform(-1, 1, (steps, 7)), 0).astype(np.float32)
        action[:, 6] = np.arange(steps) >= steps // 2
        out.append(
            Recorded(
                id=f"episode_{number:03d}",
                file=f"/part/{number}",
                fps=10.0,
                task="stack the cubes",
                state=np.cumsum(rng.uniform(-1, 1, (steps, 8)), 0).astype(np.float32),
                action=action,
                images={
                    camera: rng.integers(0, 256, (steps, size, size, 3), np.uint8)
                    for camera in ("scene", "wrist")
                },
                timestamps=np.arange(steps) / 10.0,
            )
        )
    return out


def examined(found, **overrides):
    config = synthetic.make_config(**overrides)
    problems = [p for episode in found for p in episodes.check(episode, config)]
    return examine.examine(config, (found, problems))


def places(report):
    return [(p.severity, p.kind, p.episode, p.file, p.frame) for p in report.problems]


def put(array, where, value):
    out = array.copy()
    out[where] = value
    return out


def test_a_healthy_set_has_no_problem():
    report = examined(healthy(), **{"data.check_frames": "all"})
    assert not report.problems
    assert doctor_report.verdict(report) == "No problem found in 12 episodes"
    assert report.lengths.tolist() == [24] * 12 and report.fps == {10.0: 12}
    assert report.hours == pytest.approx(12 * 24 / 10 / 3600)
    assert report.tasks == {"stack the cubes": 12} and report.drift.seconds == 0
    assert (report.images.decoded, report.images.total) == (576, 576)
    assert [c.sizes for c in report.images.cameras] == [{"16x16": 12}] * 2
    shown = report.images.examples[1]
    assert (shown.steps, shown.canvas.shape) == ((0, 12, 23), (3, 32, 64, 3))
    np.testing.assert_array_equal(shown.raw["wrist"], healthy()[5].images["wrist"][[0, 12, 23]])


def test_columns_are_numbers_over_all_steps():
    found = healthy()
    column = examined(found, **{"data.normalization": "z_score"}).columns[8 + 2]
    x = np.concatenate([e.action[:, 2] for e in found]).astype(np.float64)
    assert (column.name, column.dim, column.flag, column.beyond) == ("action", 2, "", 0.0)
    assert [column.min, column.max, column.mean, column.std] == pytest.approx(
        [x.min(), x.max(), x.mean(), x.std()]
    )
    assert [column.q01, column.q99] == pytest.approx(np.quantile(x, (0.01, 0.99)))
    assert column.moves == 1.0 and column.clipped == 0.0
    glitch = [dataclasses.replace(found[0], action=put(found[0].action, (7, 2), 1e4)), *found[1:]]
    column = examined(glitch, **{"data.normalization": "z_score"}).columns[8 + 2]
    assert column.beyond == column.clipped == 1 / (12 * 24)


@pytest.mark.parametrize(
    "where, value, problem",
    [
        # One array of all episodes: [episode, step, dimension].
        (np.s_[:, :, 4], 0.5, ("constant dimension", "", "", None)),
        (np.s_[3, :, 4], 0.5, ("stuck dimension", "episode_003", "/part/3", None)),
        (np.s_[3, 7, 4], 1e4, ("near-constant dimension", "", "", None)),
        (np.s_[3, 7, 4], 150, ("far from the mean", "episode_003", "/part/3", 7)),
        (np.s_[3, 7, 4], np.nan, ("not finite", "episode_003", "/part/3", 7)),
    ],
)
def test_a_dimension_that_is_not_right(where, value, problem):
    found = healthy(count=60)
    actions = put(np.stack([e.action for e in found]), where, value)
    found = [dataclasses.replace(e, action=a) for e, a in zip(found, actions)]
    report = examined(found, **{"data.path": "part"})
    (one,) = report.problems
    assert (one.kind, one.episode, one.file if one.episode else "", one.frame) == problem
    assert one.severity == ("error" if one.kind == "not finite" else "warning")
    assert "[4]" in one.message


def test_a_dimension_that_hardly_moves():
    found = healthy(count=60)
    found = [
        dataclasses.replace(e, action=put(e.action, np.s_[:, 1], float(i % 3)))
        for i, e in enumerate(found)
    ]
    (one,) = examined(found).problems
    assert one.kind == "near-constant dimension" and "action[1] moves in 0.00%" in one.message


def test_times():
    found = healthy()
    times = found[0].timestamps
    stamps = {
        1: put(times, [5, 6], times[[6, 5]]),
        2: times * 2,
        3: put(times, np.s_[9:], 9),
        4: times + np.where(np.arange(24) > 8, 0.3, 0),
        5: times[:-1],
        6: times + 1e-3,
    }
    found = [dataclasses.replace(e, timestamps=stamps.get(i, times)) for i, e in enumerate(found)]
    report = examined(found)
    assert places(report) == [
        ("error", "shuffled timestamps", "episode_001", "/part/1", 6),
        ("error", "shuffled timestamps", "episode_003", "/part/3", 10),
        ("error", "wrong fps", "episode_002", "/part/2", None),
        ("error", "wrong length", "episode_005", "/part/5", None),
        ("warning", "timestamp drift", "episode_004", "/part/4", 9),
    ]
    assert "those of 5 fps, the metadata says 10" in report.problems[2].message
    assert (report.drift.episode, report.drift.frame) == ("episode_003", 9)
    assert report.drift.seconds == pytest.approx(9 - 0.9)


def test_lengths_tasks_and_copies():
    found = healthy()
    short = {name: getattr(found[1], name)[:5] for name in ("state", "action", "timestamps")}
    none = {name: getattr(found[2], name)[:0] for name in ("state", "action", "timestamps")}
    found[1:6] = [
        dataclasses.replace(found[1], **short),
        dataclasses.replace(found[2], **none),
        dataclasses.replace(found[3], action=found[0].action),
        dataclasses.replace(found[4], task=" "),
        dataclasses.replace(found[5], task="Stack  the cubes", fps=10.01),
    ]
    report = examined(found, **{"data.path": "part"})
    assert places(report) == [
        ("error", "empty episode", "episode_002", "/part/2", None),
        ("error", "empty task", "episode_004", "/part/4", 0),
        ("warning", "duplicate episode", "episode_003", "/part/3", None),
        ("warning", "several fps", "", "part", None),
        ("warning", "short episode", "episode_001", "/part/1", None),
        ("warning", "tasks alike", "", "part", None),
    ]
    assert "episode_000 (/part/0)" in report.problems[2].message
    no_window = examined(healthy(), **{"data.num_frames": 33, "data.frame_stride": 4})
    assert [p.kind for p in no_window.errors] == ["no long episode"]


def test_images():
    found, rng = healthy(), np.random.default_rng(0)

    def change(number, wrist):
        found[number] = dataclasses.replace(
            found[number], images={**found[number].images, "wrist": wrist}
        )

    wrist = found[0].images["wrist"]
    change(1, put(wrist, 0, 3))
    change(2, np.repeat(wrist[:1], 24, 0) // 4 + rng.integers(0, 5, wrist.shape).astype(np.uint8))
    change(3, rng.integers(0, 256, (24, 16, 20, 3), np.uint8))
    found[4] = dataclasses.replace(found[4], undecodable=11)
    ends = [
        ("warning", "empty image", "episode_001", "/part/1", 0),
        ("warning", "frozen camera", "episode_002", "/part/2", None),
        ("warning", "other image size", "episode_003", "/part/3", None),
    ]
    assert places(examined(found)) == ends
    every = examined(found, **{"data.check_frames": "all"})
    assert places(every) == [
        ("error", "undecodable image", "episode_004", "/part/4.mp4", 11),
        *ends,
    ]
    assert "episode_004" not in [e.episode for e in every.images.examples]


def test_nothing_is_decoded_unless_asked_for(monkeypatch):
    monkeypatch.delattr(Recorded, "frames")
    monkeypatch.setattr(episodes.ArrayEpisode, "frames", None)
    report = examined(healthy(), **{"data.check_frames": "none"})
    assert not report.problems and report.images.decoded == 0
    assert "no file with images was opened" in doctor_report.text(report)


def test_a_camera_that_nobody_has_is_one_error():
    report = examined(healthy(), **{"data.cameras": ("scene", "top")})
    (one,) = report.problems
    assert one.kind == "no such camera" and "it has scene, wrist" in one.message


def test_images_that_do_not_fit_the_canvas_are_one_error():
    (one,) = examined(healthy(), **{"data.canvas": (32, 63)}).problems
    assert one.kind == "does not fit the canvas" and "1 rows and 2 columns" in one.message


def test_the_report(tmp_path):
    found = healthy()
    found[3] = dataclasses.replace(found[3], action=put(found[3].action, (7, 2), np.nan))
    found[4] = dataclasses.replace(found[4], task="<b>")
    report = examined(found, **{"data.exclude": ("episode_099",), "data.path": "/part"})
    html, data = doctor_report.write(report, tmp_path / "doctor")
    page, kept = html.read_text(encoding="utf-8"), json.loads(data.read_text(encoding="utf-8"))
    assert page.index("1 error, 0 warnings") < page.index("episode_003 (3, frame 7)")
    assert not re.search(r'(src|href)="(?!data:)', page) and "http" not in page
    assert "&lt;b&gt;" in page and "<b></td>" not in page
    assert page.count("data:image/png") == 3 * 3 + 4  # cameras and canvas; charts
    assert (kept["errors"], kept["warnings"], kept["episodes"]) == (1, 0, 12)
    assert kept["problems"][0] | {"message": ""} == {
        "severity": "error",
        "kind": "not finite",
        "episode": "episode_003",
        "file": "/part/3",
        "frame": 7,
        "message": "",
        "advice": examine.ADVICE["not finite"],
    }
    assert kept["grippers"][0]["label"] == "action[6]" and kept["grippers"][0]["guessed"]
    lines = doctor_report.text(report)
    assert lines.startswith("1 error, 0 warnings in 12 episodes\n")
    assert "ERROR not finite (1): " in lines
    assert "episode_003 (/part/3, frame 7): action[2]" in lines
    assert doctor_report.exclude_flag(report) == (
        "--config.data.exclude=\"('episode_099', 'episode_003')\""
    )


# ---- faults in the files of a LeRobot dataset ---------------------------------------------------


def lerobot(directory, version, **options):
    """Writes 18 episodes; state[3] never moves and episode 9 is short. Returns their config."""
    found = healthy(18, size=32)
    found[9] = dataclasses.replace(
        found[9],
        **{name: getattr(found[9], name)[:5] for name in ("state", "action", "timestamps")},
    )
    for episode in found:
        episode.state[:, 3] = 1
        for images in episode.images.values():  # smooth: noise is not what codecs are made for
            images[:] = np.linspace(20, 200, 32)[:, None] + np.arange(24)[:, None, None, None]
    lerobot_write.write(found, directory / "set", version, ("scene", "wrist"), **options)
    return synthetic.make_config(
        directory, **{"data.source": "lerobot", "data.path": str(directory / "set")}
    )


def edit(root, index, change):
    """Rewrites the rows of an episode, in place or with what `change` returns."""
    for file in pathlib.Path(root).glob("data/*/*.parquet"):
        table = pq.read_table(file)
        rows = table.to_pylist()
        mine = [row for row in rows if row["episode_index"] == index]
        if mine:
            place = rows.index(mine[0])
            rows[place : place + len(mine)] = change(mine) or []
            pq.write_table(pa.Table.from_pylist(rows, table.schema), file)
            return str(file)


def not_finite(rows):
    rows[3]["action"][2] = float("nan")
    return rows


def stuck(rows):
    return [row | {"action": [*row["action"][:4], 0.5, *row["action"][5:]]} for row in rows]


def twice_as_fast(rows):
    return [row | {"timestamp": row["timestamp"] / 2} for row in rows]


def shuffled(rows):
    order = [0, 1, 2, 3, 4, 6, 5, *range(7, len(rows))]
    return [row | {"timestamp": rows[i]["timestamp"]} for row, i in zip(rows, order)]


@pytest.mark.parametrize(
    "version, options", [("2.1", {}), ("3.0", {"video_mb": 0.002}), ("2.1", {"videos": False})]
)
def test_a_sound_lerobot_set_gives_no_alarm(tmp_path, version, options):
    config = lerobot(tmp_path, version, **options)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, check_frames="all"))
    report = examine.examine(config)
    assert [(p.kind, p.episode) for p in report.problems] == [
        ("constant dimension", ""),
        ("short episode", "episode_000009"),
    ]
    assert report.images.decoded == report.images.total == 2 * (17 * 24 + 5)
    assert report.drift.seconds < 1e-6
    codecs = [c.codecs for c in report.images.cameras]
    assert ["h264" in c for c in codecs] == [options.get("videos", True)] * 2


@pytest.mark.parametrize("version", ["2.1", "3.0"])
def test_every_fault_planted_in_files_is_found(tmp_path, version, monkeypatch, capsys):
    config = lerobot(tmp_path, version, video_mb=0.002)
    root = config.data.path
    sound, _ = episodes.read(config)
    mp4 = {i: str(sound[i].video("wrist")[0]) for i in range(18)}
    planted = {  # (kind, episode): (file, frame)
        ("not finite", 1): (edit(root, 1, not_finite), 3),
        ("stuck dimension", 2): (edit(root, 2, stuck), None),
        ("missing video", 17): (mp4[17], None),
        ("undecodable image", 14): (mp4[14], None),
        ("wrong fps", 10): (edit(root, 10, twice_as_fast), None),
        ("shuffled timestamps", 11): (edit(root, 11, shuffled), 6),
        ("empty episode", 12): (edit(root, 12, lambda rows: []), None),
        ("short episode", 9): (sound[9].file, None),
    }
    pathlib.Path(mp4[17]).unlink()
    whole = pathlib.Path(mp4[14]).read_bytes()
    pathlib.Path(mp4[14]).write_bytes(whole[: len(whole) // 2])
    if version == "2.1":  # packed, it would change the time of its neighbours
        video.write(mp4[5], sound[5].frames("wrist", np.arange(24)), 20)
        planted["wrong fps", 5] = (mp4[5], None)

    report = examine.examine(config)
    found = {(p.kind, p.episode): (p.file, p.frame) for p in report.problems}
    for (kind, index), place in planted.items():
        assert found[kind, f"episode_{index:06d}"] == place
    assert found["constant dimension", ""] == (root, None)
    touched = {index for _, index in planted} | {
        i for i in mp4 if mp4[i] in (mp4[14], mp4[17])
    }  # a packed file holds several
    assert {p.episode for p in report.problems} == {f"episode_{i:06d}" for i in touched} | {""}
    if version == "2.1":
        assert len(touched) == 9
        refused_until_excluded(config, report, monkeypatch, capsys)


def refused_until_excluded(config, report, monkeypatch, capsys):
    """Statistics are not computed from a set with errors; without these episodes they are."""
    capsys.readouterr()
    with pytest.raises(ValueError, match=r"errors in the episodes .* listed above") as error:
        precompute.precompute(config, ("stats",))
    directory = pathlib.Path(doctor_report.directory(config))
    assert {
        p["episode"]
        for p in json.loads((directory / "report.json").read_text(encoding="utf-8"))["problems"]
    } == {p.episode for p in report.problems}
    printed = capsys.readouterr().out.split("\n")
    for problem in report.errors:  # each is printed once: the message that ends it has none
        frame = "" if problem.frame is None else f", frame {problem.frame}"
        line = f"  {problem.episode} ({problem.file}{frame}): {problem.message}"
        assert printed.count(line) == 1, line
        assert problem.message not in str(error.value)
    assert not list(pathlib.Path(config.data.cache).glob("assets/*.json"))
    exclude = tuple(dict.fromkeys(p.episode for p in report.errors))
    assert repr(exclude) in doctor_report.exclude_flag(report)
    monkeypatch.setattr(doctor_report, "write", lambda *_: [""])  # slow, and seen above
    precompute.precompute(
        dataclasses.replace(config, data=dataclasses.replace(config.data, exclude=exclude)),
        ("stats",),
    )
    assert (pathlib.Path(config.data.cache) / "assets" / "dataset_stats.json").exists()
