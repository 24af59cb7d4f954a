"""Recording with the demo's expert, which needs no simulator of its own; Meta-World: see there."""

import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest

from lightwam_jax import envs
from lightwam_jax.data.caches import journal
from lightwam_jax.data.doctor import examine
from lightwam_jax.data.formats import lerobot
from lightwam_jax.envs import base as envs_base
from lightwam_jax.envs import record
from lightwam_jax.envs.demo import tabletop as demo
from tests import synthetic

ROOT = pathlib.Path(__file__).parents[2]
SETTINGS = dict(first_seed=5, noise=0.3, starts=4, start_steps=3, images="png", image_size=16)


def config_of(path):
    return synthetic.make_config(
        path.parent,
        **{
            "data.source": "lerobot",
            "data.path": str(path),
            "data.check_frames": "all",
            "model.action_dim": 4,
            "model.proprio_dim": 5,
        },
    )


def command(out, workers=2):
    """The command line of twelve episodes with `SETTINGS`."""
    flags = "--suite demo --episodes 12 --first_seed 5 --noise 0.3 --starts 4 --start_steps 3"
    flags += f" --images png --workers {workers}"
    program = [sys.executable, "-m", "lightwam_jax.envs.record", *flags.split()]
    return [*program, "--env", '{"image_size": 16}', "--out", str(out)]


def run(out):
    done = subprocess.run(command(out), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def tree(path):
    """{relative path: bytes} of all files."""
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """(dataset of twelve episodes and four starts, made by the command line, what that said)."""
    out = tmp_path_factory.mktemp("record") / "episodes"
    return out, run(out)


def test_the_projects_own_reader_and_doctor_accept_it(recorded):
    path, said = recorded
    config = config_of(path)
    found, problems = lerobot.read(config)
    assert len(found) == 16 and not problems
    assert [e.length for e in found[12:]] == [3] * 4 and min(e.length for e in found[:12]) > 10
    assert not [p for p in examine.examine(config).problems if p.severity == "error"]
    assert (
        json.loads((path / "meta" / "info.json").read_text(encoding="utf-8"))["codebase_version"]
        == "v2.1"
    )
    about = json.loads((path / "meta" / "recording.json").read_text(encoding="utf-8"))
    tried = about["tried"]["tabletop"]
    assert about["first_seed"] == 5 and tried >= 12
    assert about["seeds"] == {"tabletop": [[5, tried], [500_005, 4]]}
    assert f"12 kept of {tried}" in said
    assert about["environment"]["versions"]["mujoco"] and about["task_version"]


def test_recorded_is_what_happened(recorded):
    """States and images of the disturbed episodes, beside the expert's undisturbed actions."""
    found = lerobot.read(config_of(recorded[0]))[0]
    env = demo.make(image_size=16)
    for index, seed, most in ((0, 5, 60), (12, 500_005, 3)):
        success, prompt, arrays = record.demonstrate(
            demo, env, envs_base.EpisodeSpec("tabletop", 0, seed), 0.3, most
        )
        assert success == (index == 0) and prompt == found[index].task
        np.testing.assert_array_equal(arrays["state"], found[index].state)
        np.testing.assert_array_equal(arrays["action"], found[index].action)
        for camera in demo.CAMERAS:
            np.testing.assert_array_equal(
                arrays[camera], found[index].frames(camera, np.arange(found[index].length))
            )


def test_noise_disturbs_the_motion_and_not_the_labels():
    env, episode = (
        demo.make(image_size=16),
        envs_base.EpisodeSpec("tabletop", 0, 1),
    )  # it has a push
    success, _, clean = record.demonstrate(demo, env, episode, 0.0, 60)
    noisy_success, _, noisy = record.demonstrate(demo, env, episode, 0.3, 60)
    assert success and noisy_success
    np.testing.assert_array_equal(clean["action"][0], noisy["action"][0])
    shared = min(len(clean["state"]), len(noisy["state"]))
    assert not np.array_equal(clean["state"][:shared], noisy["state"][:shared])
    for arrays in (clean, noisy):
        assert {len(a) for a in arrays.values()} == {len(arrays["action"])}
        assert np.abs(arrays["action"]).max() <= 1
    _, _, again = record.demonstrate(demo, env, episode, 0.3, 60)
    for name in noisy:
        np.testing.assert_array_equal(noisy[name], again[name])


def test_other_workers_and_a_killed_one_change_nothing(recorded, tmp_path):
    """One of two workers is killed, then one worker does the rest."""
    out, errors = tmp_path / "episodes", []

    def begin():
        with pytest.raises(RuntimeError, match=r"worker process ended .*same command continues"):
            record.record("demo", ("all",), 12, out, workers=2, **SETTINGS)
        errors.append("told")

    thread = threading.Thread(target=begin)
    thread.start()
    wait_for_lines(tmp_path / "episodes.partial")
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    thread.join(60)
    assert errors == ["told"] and not out.exists()
    record.record("demo", ("all",), 12, out, workers=1, **SETTINGS)
    assert tree(out) == tree(recorded[0]) and os.listdir(tmp_path) == ["episodes"]


def wait_for_lines(partial, count=4):
    began = time.monotonic()
    log = partial / "journal.jsonl"
    while not log.exists() or log.read_bytes().count(b"\n") < count:
        assert time.monotonic() - began < 60
        time.sleep(0.005)


def test_killed_it_continues_to_the_same_bytes(recorded, tmp_path):
    out, growing = tmp_path / "episodes", tmp_path / "episodes.partial"
    main = subprocess.Popen(command(out, workers=1), cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_for_lines(growing)
    main.kill()
    main.wait()
    there = growing / "data" / "chunk-000" / "episode_000000.parquet"
    stamp = there.stat().st_mtime_ns
    with open(growing / "journal.jsonl", "ab") as file:
        file.write(b'{"part": 0, "tr')  # a line cut short
    with pytest.raises(ValueError, match=r"noise: 0.3 there, 0.5 now\nDelete it, or give"):
        record.record("demo", ("all",), 12, out, **SETTINGS | {"noise": 0.5})
    run(out)
    assert tree(out) == tree(recorded[0]) and os.listdir(tmp_path) == ["episodes"]
    finished = out / "data" / "chunk-000" / "episode_000000.parquet"
    assert finished.stat().st_mtime_ns == stamp, "made twice"


def test_finished_it_is_up_to_date_and_other_settings_are_refused(recorded, capsys, monkeypatch):
    monkeypatch.setattr(record, "_pool", None)  # not needed
    before = tree(recorded[0])
    tried = record.record("demo", ("all",), 12, recorded[0], **SETTINGS)
    assert f"{recorded[0]} is up to date" in capsys.readouterr().out and tried["tabletop"] >= 12
    with pytest.raises(ValueError, match=r"env.image_size: 16 there, 32 now\n  noise: 0.3 there"):
        record.record(
            "demo", ("all",), 12, recorded[0], **SETTINGS | dict(image_size=32, noise=0.5)
        )
    monkeypatch.setitem(demo.SETTINGS, "task_version", -1)
    with pytest.raises(ValueError, match=r"task_version: \d+ there, -1 now"):
        record.record("demo", ("all",), 12, recorded[0], **SETTINGS)
    assert tree(recorded[0]) == before


def test_mistakes_are_told_before_anything_is_recorded(recorded):
    with pytest.raises(FileExistsError, match="exists and is no recording"):
        record.record("demo", ("all",), 1, recorded[0].parent)
    other = recorded[0].parent / "other"
    with pytest.raises(ValueError, match="no task juggle"):
        record.record("demo", ("juggle",), 1, other)
    with pytest.raises(ValueError, match="no suite 'none'; expected one of demo, libero"):
        record.record("none", ("all",), 1, other)
    with pytest.raises(ValueError, match="images is 'jpg'; expected 'video' or 'png'"):
        record.record("demo", ("all",), 1, other, images="jpg")
    with pytest.raises(ValueError, match="the demo's environment has no bogus"):
        record.record("demo", ("all",), 1, other, bogus=1)
    assert not list(recorded[0].parent.glob("other*"))


# ---- a suite of two made-up tasks, in this process -----------------------------------------------


class Toy:
    """Succeeds at seeds that `solved` names; remembers what was executed."""

    def __init__(self, solved):
        self.solved, self.executed = solved, []

    def reset(self, episode):
        self._episode, self._step = episode, 0
        return self.observe()

    def observe(self):
        # Of images below 64 pixels, x264 now and then makes other bytes.
        image = np.full((64, 64, 3), 9 * self._step + self._episode.seed % 7, np.uint8)
        state = np.array([self._step, self._episode.seed], np.float32)
        return {"images": {"eye": image}, "state": state, "prompt": f"do {self._episode.task}"}

    def expert_action(self):
        return np.array([0.5, 1.0], np.float32)

    def step(self, action):
        self.executed.append(action)
        self._step += 1
        return None, self.solved(self._episode.seed) and self._step == 4, self._step == 4

    def describe(self):
        return {"toy": 1}


class Inline:
    """Does in this process what a pool does in others."""

    def submit(self, function, *arguments):
        future = concurrent.futures.Future()
        future.set_result(function(*arguments))
        return future


@pytest.fixture
def toy(monkeypatch):
    """A suite whose episodes of odd seeds fail."""
    suite = types.SimpleNamespace(
        TASKS=("stack", "juggle"),
        CAMERAS=("eye",),
        STATE=("step", "seed"),
        ACTION=("dx", "gripper"),
        FPS=10,
        ROBOT="toy",
        MOST_STEPS=4,
        env=Toy(lambda seed: seed % 2 == 0),
        episodes=lambda tasks, count, first: [envs_base.EpisodeSpec(t, 0, first) for t in tasks],
    )
    monkeypatch.setattr(envs, "suite", lambda name: suite)

    def pool(workers, suite, env, noise, played):
        monkeypatch.setattr(record, "_played", played, raising=False)
        return contextlib.nullcontext(Inline())

    monkeypatch.setattr(record, "_pool", pool)
    for name, value in (("_suite", suite), ("_noise", 0.0), ("_make", lambda: suite.env)):
        monkeypatch.setattr(record, name, value, raising=False)
    return suite


def test_failed_seeds_are_replaced(toy, tmp_path):
    tried = record.record("toy", ("all",), 3, tmp_path / "set", first_seed=1, starts=2)
    assert tried == {"stack": 6, "juggle": 6}  # of seeds 1 to 6, the even ones
    config = synthetic.make_config(
        "", **{"data.path": str(tmp_path / "set"), "data.cameras": ("eye",)}
    )
    found = lerobot.read(config)[0]
    half = 500_000
    seeds = [2, 4, 6, 2, 4, 6, half + 1, half + 2, half + 1, half + 2]
    assert [e.state[0, 1] for e in found] == seeds, "solved ones, then starts, solved or not"
    assert [e.task for e in found] == ["do stack"] * 3 + ["do juggle"] * 3 + [
        "do stack", "do stack", "do juggle", "do juggle",
    ]  # fmt: skip
    about = json.loads((tmp_path / "set" / "meta" / "recording.json").read_text(encoding="utf-8"))
    assert about["seeds"]["juggle"] == [[1, 6], [half + 1, 2]]


def test_an_expert_that_fails_most_of_the_time_is_an_error(toy, tmp_path):
    toy.env.solved = lambda seed: seed % 10 == 0
    with pytest.raises(
        RuntimeError, match=r"solved \d of \d+ episodes of stack: give less --noise"
    ):
        record.record("toy", ("all",), 30, tmp_path / "set")


@pytest.mark.parametrize("images", ["video", "png"])
def test_interrupted_anywhere_it_continues_to_the_same_bytes(toy, tmp_path, monkeypatch, images):
    def make(name):
        record.record("toy", ("all",), 2, tmp_path / name, starts=1, start_steps=2, images=images)
        return tree(tmp_path / name)

    whole, survived = make("whole"), 0
    while True:
        steps = iter(range(survived))

        def interrupting(function, steps=steps):
            def do(*arguments, **options):
                if next(steps, None) is None:
                    raise KeyboardInterrupt
                return function(*arguments, **options)

            return do

        with monkeypatch.context() as patch:
            for place, name in ((os, "replace"), (os, "rename"), (os, "remove")):
                patch.setattr(place, name, interrupting(getattr(place, name)))
            patch.setattr(journal.Journal, "add", interrupting(journal.Journal.add))
            with contextlib.suppress(KeyboardInterrupt):
                make(f"{survived}")
                break
        assert make(f"{survived}") == whole, f"interrupted at step {survived}"
        survived += 1
    assert survived > 15


def test_what_is_left_without_a_journal_is_taken_away(toy, tmp_path):
    left = tmp_path / "set.partial" / "data" / "chunk-000" / "episode_000099.parquet"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"of another recording")
    record.record("toy", ("stack",), 1, tmp_path / "set")
    assert [path.name for path in (tmp_path / "set" / "data").rglob("*.parquet")] == [
        "episode_000000.parquet"
    ]


def test_suites_say_whether_the_gripper_fumbles_and_what_seeds_it(toy):
    episode = envs_base.EpisodeSpec("stack", 0, 3)

    def executed(**says):
        toy.env.executed = []
        suite = types.SimpleNamespace(**says)
        arrays = [record.demonstrate(suite, toy.env, episode, 0.5, 4)[2] for _ in range(2)]
        assert all((a["action"] == [0.5, 1.0]).all() for a in arrays), "recorded are clean ones"
        np.testing.assert_array_equal(*np.split(np.stack(toy.env.executed), 2))
        return np.stack(toy.env.executed)[:4]

    assert (executed()[:, 1] == 1).all(), "no suite fumbles that does not say so"
    assert (executed(FUMBLES=(1.0, 2))[:, 1] == -1).all()
    seeds = {executed(disturbed_by=lambda e, n=n: [n, e.seed])[:, 0].tobytes() for n in range(40)}
    assert len(seeds) > 5


def test_recorders_and_suites_import_neither_jax_nor_a_simulator():
    code = (
        "import sys; from lightwam_jax.envs import metaworld, record\n"
        "from lightwam_jax.evaluation import worker\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} "
        "& {'jax', 'flax', 'metaworld', 'gymnasium', 'mujoco'}))\n"
        "from lightwam_jax.envs.demo import tabletop\n"
        "print('jax' in sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert out.stdout.split() == ["[]", "False"]


def test_a_slash_at_the_end_changes_nothing(toy, tmp_path):
    record.record("toy", ("all",), 1, f"{tmp_path}/set/")
    assert os.listdir(tmp_path) == ["set"]


def test_arguments_that_no_environment_has_are_one_clear_error(tmp_path):
    for text in ("xx", "[1]", "3"):
        with pytest.raises(ValueError, match=r"--env=.*: expected JSON such as"):
            envs.parse_arguments(text)
    with pytest.raises(ValueError, match=r"'metaworld' cannot be made: .*'imge_size'"):
        envs.spec("metaworld", imge_size=16)
    with pytest.raises(ValueError, match=r"the demo's environment has no imge_size; it has image"):
        demo.make(imge_size=16)
    with pytest.raises(ValueError, match=r"image_size is 'a'; expected a number of pixels"):
        demo.make(image_size="a")
