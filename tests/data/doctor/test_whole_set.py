"""What concerns a whole set is said once; short on purpose, stretched, played, singular, plural."""

import dataclasses
import json

import numpy as np
import pytest

from configs import libero, robotwin
from lightwam_jax import config as config_lib
from lightwam_jax.data import episodes
from lightwam_jax.data.doctor import examine, images, whole_set
from lightwam_jax.data.doctor import report as doctor_report
from lightwam_jax.data.episodes import Problem
from tests.data.doctor import test_doctor as doctor


def cut(episode, steps, **changes):
    names = ("state", "action", "timestamps")
    parts = {name: getattr(episode, name)[:steps] for name in names}
    return dataclasses.replace(episode, **parts, **changes)


def test_a_wrong_rate_of_the_set_is_one_error_that_names_info_json(tmp_path):
    config = doctor.lerobot(tmp_path, "2.1")
    info = tmp_path / "set/meta/info.json"
    info.write_text(
        json.dumps(json.loads(info.read_text(encoding="utf-8")) | {"fps": 20}), encoding="utf-8"
    )
    report = examine.examine(config)
    (one,) = report.errors
    assert (one.kind, one.episode, one.file) == ("wrong fps", "", str(info))
    assert "in all 18 episodes" in one.message and "10 fps, the metadata says 20" in one.message
    assert "meta/info.json" in examine.ADVICE[one.kind]
    assert doctor_report.exclude_flag(report) == ""
    assert "config.data.exclude=" not in doctor_report.text(report)


def test_what_all_but_one_have_stays_with_each():
    found = doctor.healthy(5)
    fast = [dataclasses.replace(e, timestamps=e.timestamps / 2) for e in found]
    report = doctor.examined([*fast[:4], found[4]])
    assert [p.episode for p in report.errors] == [e.id for e in found[:4]]
    assert doctor_report.exclude_flag(report).count("episode_") == 4
    (one,) = doctor.examined(fast).errors
    assert one.episode == "" and one.file == "/part/0"  # no info.json: the first episode's
    (alone,) = doctor.examined(fast[:1]).errors
    assert alone.episode == "episode_000"


def test_to_exclude_everything_is_not_offered():
    found = doctor.healthy(2)
    found[0] = dataclasses.replace(found[0], action=doctor.put(found[0].action, (7, 2), np.nan))
    found[1] = dataclasses.replace(found[1], task=" ")
    report = doctor.examined(found)
    assert {p.episode for p in report.errors} == {"episode_000", "episode_001"}
    assert doctor_report.exclude_flag(report) == ""
    nobody = doctor.examined(doctor.healthy(), **{"data.cameras": ("scene", "top")})
    fits = doctor.examined(doctor.healthy(), **{"data.canvas": (32, 63)})
    for report in (nobody, fits):
        assert [p.episode for p in report.errors] == [""]
        assert doctor_report.exclude_flag(report) == ""


def test_only_what_differs_in_numbers_is_one():
    data = config_lib.from_config_dict(libero.get_config("spatial")).data
    error = lambda i, said, kind="wrong width": Problem.error(kind, f"{i}", f"{i}.h5", said)
    alike = whole_set.grouped([error(0, "0 of 5"), error(1, "1.5e+3 of 7")], ("0", "1"), data)
    assert [(p.episode, p.message) for p in alike] == [("", "in all 2 episodes; 0: 0 of 5")]
    unlike = [error(0, "state"), error(1, "action")]
    damaged = [error(i, "cut short", "undecodable image") for i in (0, 1)]
    for each in (unlike, damaged):  # each file is to be replaced
        assert whole_set.grouped(each, ("0", "1"), data) == each


def test_short_on_purpose_is_no_warning():
    long, starts = doctor.healthy(12), doctor.healthy(24)[12:]
    starts = [cut(e, 5) for e in starts]
    broken_off = cut(doctor.healthy(25)[24], 1)
    report = doctor.examined([*long, *starts, broken_off])
    assert [(p.kind, p.episode, p.message) for p in report.problems] == [
        ("short episode", "episode_024", "1 step, fewer than the 9 of a window")
    ]
    assert report.begun == {5: 12}
    assert "short     12 episodes of 5 steps, on purpose" in doctor_report.text(report)
    few = doctor.examined([*long, *starts[:9]])
    assert [p.kind for p in few.problems] == ["short episode"] * 9 and not few.begun


@pytest.mark.parametrize(
    "canvas, said",
    [
        ((32, 96), "16x16 (height x width) in 12 episodes; on the canvas it is 32x48"),
        ((48, 64), "16x16 (height x width) in 12 episodes; on the canvas it is 48x32"),
        ((32, 64), ""),
    ],
)
def test_a_canvas_that_stretches_images_is_a_warning_with_numbers(canvas, said):
    problems = doctor.examined(doctor.healthy(), **{"data.canvas": canvas}).problems
    assert [p.kind for p in problems] == [images.STRETCHED] * (2 if said else 0)
    for problem in problems:
        assert said in problem.message and problem.severity == "warning"
        assert f"1.50 times as {'wide' if canvas[1] == 96 else 'tall'}" in problem.message


def test_the_released_recipes_do_not_stretch_their_images():
    for made, size in (
        (libero.get_config("spatial"), (256, 256)),
        (robotwin.get_config(), (240, 320)),
    ):
        data = config_lib.from_config_dict(made).data
        looks = [images._Look(None, camera, size) for camera in data.cameras]
        assert images._stretched(looks, data) == []


def test_an_episode_is_played(tmp_path):
    report = doctor.examined(doctor.healthy())
    played = report.images.played
    assert (played.episode, played.stride, played.canvas.shape) == (
        "episode_000",
        1,
        (24, 32, 64, 3),
    )
    page = doctor_report.write(report, tmp_path)[0].read_text(encoding="utf-8")
    assert page.count("data:video/mp4") == 1 and 'data-places="10"' in page
    assert page.count('class="chart"') >= 8 + 7 and "An episode, played" in page
    none = doctor.examined(doctor.healthy(), **{"data.check_frames": "none"})
    assert none.images.played is None
    assert "data:video/mp4" not in doctor_report.write(none, tmp_path)[0].read_text(
        encoding="utf-8"
    )


def test_a_long_episode_is_played_in_part_and_a_damaged_one_not(monkeypatch):
    monkeypatch.setattr(images, "_PLAYED", 10)
    assert doctor.examined(doctor.healthy()).images.played.canvas.shape[0] == 8  # every third
    found = doctor.healthy()
    found[0] = dataclasses.replace(found[0], undecodable=3)  # between those looked at
    assert doctor.examined(found).images.played is None


def test_one_is_singular(tmp_path):
    assert [episodes.many(n, "step") for n in (0, 1, 2, 1200)] == [
        "0 steps", "1 step", "2 steps", "1,200 steps",
    ]  # fmt: skip
    found = doctor.healthy(2)
    found[1] = dataclasses.replace(found[1], fps=10.01)
    report = doctor.examined(found)
    assert "1 episode at 10; 1 episode at 10.01" in report.problems[0].message
    alone = doctor.examined(doctor.healthy(1))
    page = doctor_report.write(alone, tmp_path)[0].read_text(encoding="utf-8")
    assert "<b>1</b><span>episode</span>" in page and "<b>1</b><span>instruction</span>" in page
