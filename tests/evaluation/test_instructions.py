"""Language controls: what the policy is told, in every episode, and where its results lie."""

import json
import types

import pytest

from lightwam_jax.envs import base as envs_base
from lightwam_jax.envs.demo import tabletop
from lightwam_jax.evaluation import instructions, report, rollout, side_by_side, suites
from tests.evaluation import test_rollout as fakes
from tests.inference.test_policy import make_config

GOALS = ("goal 0", "goal 1", "goal 2")


class ToldEnv(fakes.FakeEnv):
    """`FakeEnv` in a suite of three instructions; each episode has one of them."""

    def other_instructions(self):
        return list(GOALS)  # with its own, which is never given


def spec():
    return envs_base.EnvSpec("tests.evaluation.test_instructions:ToldEnv")


def play(control, episodes=fakes.NINE, known=(), **changes):
    """Returns ({episode: prompt of its result}, prompts that the policy was asked with)."""
    asked = []

    def act(images, state, prompts):
        asked.extend(prompts)
        return fakes.policy(images, state, prompts)

    env = instructions.spec(spec(), control, known)
    results = rollout.run(act, env, episodes, fakes.evaluation(**changes))
    return {result.episode: result.prompt for result in results}, set(asked)


def test_a_wrong_instruction_depends_on_nothing_but_the_episode():
    own = {episode: f"goal {episode.seed % 3}" for episode in fakes.NINE}
    told, asked = play("other")
    assert all(told[episode] in {*GOALS} - {own[episode]} for episode in own)
    assert asked == set(told.values()) and len(asked) > 1
    backwards, _ = play("other", fakes.NINE[::-1], workers=1)
    assert backwards == told
    assert play("other", fakes.NINE[4:6])[0].items() <= told.items()


def test_none_and_the_right_one():
    told, asked = play("empty", fakes.NINE[:2])
    assert asked == {""} == set(told.values())
    assert instructions.spec(spec(), "right") == spec()
    with pytest.raises(ValueError, match="--instruction wrong: expected one of right, empty"):
        instructions.spec(spec(), "wrong")


def test_a_process_opens_no_more_tasks_than_it_would():
    for module, limit in (("libero.env", 2), ("demo.tabletop", None)):
        env = envs_base.EnvSpec(f"lightwam_jax.envs.{module}:make")
        for control in instructions.CONTROLS:
            assert instructions.spec(env, control).tasks_at_once() == limit


def test_what_the_policy_knows_comes_first_and_a_single_instruction_is_refused():
    env = instructions.spec(spec(), "other", ("goal 1", "goal 7")).make()
    assert [env.reset(e)["prompt"] for e in fakes.NINE[:3:2]] == ["goal 1", "goal 1"]
    assert env.observe()["prompt"] == "goal 1"
    assert env.reset(fakes.NINE[1])["prompt"] in ("goal 0", "goal 2"), "its own is not given"
    env.other_instructions = lambda: None
    alone = instructions.InstructedEnv(types.SimpleNamespace(), "other")
    alone._env.reset = lambda episode: {"prompt": "go"}
    with pytest.raises(ValueError, match="does not say which instructions there are"):
        alone.reset(fakes.NINE[0])
    alone._env.other_instructions = lambda: ["go"]
    with pytest.raises(ValueError, match="no instruction but 'go'; use --instruction empty"):
        alone.reset(fakes.NINE[0])


def test_the_demos_other_instructions_name_what_lies_there():
    env = tabletop.make(image_size=8)
    for episode in tabletop.episodes((), 3, 5):
        own, others = env.reset(episode)["prompt"], env.other_instructions()
        assert len({own, *others}) == 3
        there = {f"put the {o[0]} {o[1]} in the tray" for o in env.scene.objects}
        assert {own, *others} == there


def test_a_control_is_decisive_and_has_a_directory_of_its_own(tmp_path):
    config = make_config()
    config = types.SimpleNamespace(
        name="x", model=config.model, evaluation=fakes.evaluation(suite="demo", env={})
    )
    config.data = types.SimpleNamespace(path=str(tmp_path))
    policy = types.SimpleNamespace(config=config, demonstrated={}, known_prompts=("a", "b"))
    logs = {}
    for control in instructions.CONTROLS:
        run = suites.of_policy(policy, "demo", control)
        manifest = report.manifest(config, 1, "w", "cpu", run, {})
        logs[control] = report.log_manifest(manifest, "w")
        assert manifest["env"]["factory"].endswith("tabletop:make"), "what is simulated is the same"
        assert (run.played == run.env) == (control == "right")
    assert "instruction" not in logs["right"], "logs from before there were controls continue"
    assert logs["right"] | {"instruction": "other"} == logs["other"] != logs["empty"]
    assert run.played.kwargs["known"] == ["a", "b"] and run.demonstrated == {}
    assert instructions.directory(tmp_path, "right") == tmp_path
    assert instructions.directory(tmp_path, "other") == tmp_path / "instruction_other"


def write(place, successes, tasks=("a", "b"), weights="w", **manifest):
    manifest |= {"tasks": list(tasks), "weights": weights, "seeds": [0, 9]}
    numbers = lambda n: {"successes": n, "episodes": 10, "errors": 0}
    whose = {"trained": successes}
    if "instruction" not in manifest:
        whose["untrained"] = 1
    content = {
        "manifest": manifest,
        "tasks": {t: {w: numbers(n) for w, n in whose.items()} for t in tasks},
    }
    place.mkdir(exist_ok=True)
    (place / "summary.json").write_text(json.dumps(content), encoding="utf-8")


def test_evaluations_of_one_policy_stand_side_by_side(tmp_path):
    write(tmp_path, 9)
    assert side_by_side.sections(tmp_path, tmp_path, tmp_path) == [], "nothing to compare with"
    write(tmp_path / "instruction_other", 2, instruction="other")
    write(tmp_path / "object_swap", 5, tasks=("c",))
    write(tmp_path / "elsewhere", 5, weights="others")
    write(tmp_path / "shorter", 5, max_steps=7)
    write(tmp_path / "instruction_empty", 3, instruction="empty")
    (section,) = side_by_side.sections(tmp_path, tmp_path / "instruction_empty", tmp_path)
    head, *rows = section.table
    controls = "given no instruction", "given the instruction of another task"
    assert head == ("", "trained", "untrained", *controls)
    table = {row[0]: row[1:] for row in rows}
    assert list(table) == ["all", "a", "b", "object_swap"]
    assert table["all"][0] == "90 % (70 to 97), 18 of 20" and "4 of 20" in table["all"][3]
    assert table["b"][2].endswith("3 of 10") and table["object_swap"][0].endswith("5 of 10")
    assert table["object_swap"][3] == ""
    assert section.media[0].path.stat().st_size > 5000
