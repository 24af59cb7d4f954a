"""What a policy is evaluated on: suite, environment and episodes, from its config."""

import dataclasses
import json
import pathlib

from lightwam_jax import config as config_lib
from lightwam_jax.data import episodes as episodes_lib
from lightwam_jax.evaluation import envs, worker


@dataclasses.dataclass(frozen=True)
class Setup:
    """A suite ready to run.

    Attributes:
      suite: of `envs.SUITES`.
      env: `worker.EnvSpec`.
      episodes: `worker.Episode`s, those of a task side by side.
      fps: control steps per second.
      demonstrated: {task: (first seed, number of seeds)} that demonstrations were made from; None
        where that is not known.
      expert_tasks: those of `tasks` that have a scripted expert.
      groups: {name: [tasks]} that have rates of their own, if there are several.
    """

    suite: str
    env: worker.EnvSpec
    episodes: tuple
    fps: float
    demonstrated: dict | None
    expert_tasks: tuple
    groups: dict

    @property
    def tasks(self):
        """Names of the tasks, in order."""
        return list(dict.fromkeys(episode.task for episode in self.episodes))


def of_config(config, suite):
    """Returns the `Setup` of a policy's config.

    Args:
      config: `Config`. suite: of `envs.SUITES`.

    Raises:
      ValueError: a policy of another suite, an unknown task, or episodes that were demonstrated.
    """
    e, module = config.evaluation, envs.suite(suite)
    own = config_lib.suite(config)
    if own != suite:
        raise ValueError(
            f"--mode {suite} evaluates policies of that suite; this one was trained on "
            f"config.data.source={config.data.source!r} with config.evaluation.suite={e.suite!r}: "
            f"use --mode {own or 'open_loop'}"
        )
    kwargs = {"image_size": config.demo.image_size} if suite == "demo" else e.env
    tasks = e.tasks or module.TASKS
    episodes = module.episodes(tasks, e.episodes, e.first_seed)
    demonstrated = _demonstrated(config)
    for episode in episodes:
        first, count = (demonstrated or {}).get(episode.task, (0, 0))
        if first <= episode.seed < first + count:
            raise ValueError(
                f"seeds {e.first_seed}..{e.first_seed + e.episodes - 1} are not held out: "
                f"demonstrations of {episode.task} may have {first}..{first + count - 1}; choose "
                "another --seed"
            )
    names = list(dict.fromkeys(episode.task for episode in episodes))
    experts = tuple(filter(getattr(module, "has_expert", lambda task: True), names))
    groups = getattr(module, "groups", lambda tasks: {})(names)
    return Setup(
        suite,
        envs.spec(suite, **kwargs),
        tuple(episodes),
        module.FPS,
        demonstrated,
        experts,
        groups if len(groups) > 1 else {},
    )


def _demonstrated(config):
    if config.data.source == "demo":
        # Demonstrations that failed were replaced by the seeds that follow: be generous.
        return {"tabletop": (config.demo.first_seed, 2 * config.demo.episodes)}
    found = {}
    for directory in episodes_lib.directories(config.data.path):
        file = pathlib.Path(directory, "meta", "recording.json")
        if not file.exists():
            return None
        about = json.loads(file.read_text())
        found |= {task: (about["first_seed"], tried) for task, tried in about["tried"].items()}
    return found
