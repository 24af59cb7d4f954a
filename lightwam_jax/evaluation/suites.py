"""What a policy is evaluated on: suite, environment and episodes, from its config."""

import dataclasses
import json
import pathlib

from lightwam_jax import envs
from lightwam_jax.data import episodes as episodes_lib
from lightwam_jax.envs import base as envs_base
from lightwam_jax.evaluation import instructions


@dataclasses.dataclass(frozen=True)
class SuiteRun:
    """What is to be run: the episodes of a suite, and all that is known about them.

    Attributes:
      suite: of `envs.SUITES`. env: `base.EnvSpec`.
      episodes: `base.EpisodeSpec`s, those of a task side by side.
      fps: control steps per second.
      demonstrated: {task: [(first seed, number of seeds)]} of the demonstrations; None where that
        is not known.
      expert_tasks: those of `tasks` that have a scripted expert.
      groups: {name: [tasks]} that get success rates of their own, if there are several.
      instruction: of `instructions.CONTROLS`; decides what the policy is told.
      known: instructions that the policy was trained with, for that.
    """

    suite: str
    env: envs_base.EnvSpec
    episodes: tuple
    fps: float
    demonstrated: dict | None
    expert_tasks: tuple
    groups: dict
    instruction: str = "right"
    known: tuple = ()

    @property
    def played(self):
        """`base.EnvSpec` of what is played: `env` that gives the instruction of the control."""
        return instructions.spec(self.env, self.instruction, self.known)

    @property
    def tasks(self):
        """Names of the tasks, in order."""
        return list(dict.fromkeys(episode.task for episode in self.episodes))


def of_policy(policy, suite, instruction="right"):
    """Returns the `SuiteRun` of a policy under a language control; raises as `of_config`."""
    instructions.check(instruction)
    suite_run = of_config(policy.config, suite, policy.demonstrated)
    if instruction == "right":
        return suite_run
    known = tuple(policy.known_prompts)
    return dataclasses.replace(suite_run, instruction=instruction, known=known)


def of_config(config, suite, demonstrated=None):
    """Returns the `SuiteRun` of a policy's config.

    Args:
      config: `Config`. suite: of `envs.SUITES`.
      demonstrated: as of `SuiteRun`, where the policy kept it; None: see `demonstrated_seeds`.

    Raises:
      ValueError: a policy of another suite, an unknown task, or episodes that were demonstrated.
    """
    e, module = config.evaluation, envs.suite(suite)
    if e.suite != suite:
        raise ValueError(
            f"--mode {suite} evaluates policies of that suite; this one has "
            f"config.evaluation.suite={e.suite!r}: use --mode {e.suite or 'open_loop'}"
        )
    tasks = e.tasks or module.TASKS
    episodes = module.episodes(tasks, e.episodes, e.first_seed)
    demonstrated = demonstrated_seeds(config) if demonstrated is None else demonstrated
    for episode in episodes:
        for first, count in (demonstrated or {}).get(episode.task, ()):
            if first <= episode.seed < first + count:
                raise ValueError(
                    f"seeds {e.first_seed}..{e.first_seed + e.episodes - 1} are not held out: "
                    f"demonstrations of {episode.task} may have {first}..{first + count - 1}; "
                    "choose another --seed"
                )
    names = list(dict.fromkeys(episode.task for episode in episodes))
    experts = tuple(filter(getattr(module, "has_expert", lambda task: True), names))
    groups = getattr(module, "groups", lambda tasks: {})(names)
    groups = groups if len(groups) > 1 else {}
    env = envs.spec(suite, **e.env)
    return SuiteRun(suite, env, tuple(episodes), module.FPS, demonstrated, experts, groups)


def demonstrated_seeds(config):
    """Returns `SuiteRun.demonstrated`, from what the recorder wrote beside the episodes."""
    found = {}
    for directory in episodes_lib.directories(config.data.path):
        file = pathlib.Path(directory, "meta", "recording.json")
        if not file.exists():
            return None
        about = json.loads(file.read_text(encoding="utf-8"))
        # Recordings from before there were starts have no "seeds".
        seeds = about.get("seeds") or {
            task: [(about["first_seed"], tried)] for task, tried in about["tried"].items()
        }
        for task, ranges in seeds.items():
            found.setdefault(task, []).extend(map(tuple, ranges))
    return found
