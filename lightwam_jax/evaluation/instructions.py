"""Language controls: what a policy is worth that is given no instruction, or a wrong one.

A policy that does not read its instruction succeeds as often as before. Never imports jax: the
environment that says something else runs in simulator processes.
"""

import dataclasses
import zlib

import numpy as np

from lightwam_jax.envs import base as envs_base

CONTROLS = ("right", "empty", "other")
LABELS = {
    "right": "its own instruction",
    "empty": "no instruction",
    "other": "the instruction of another task",
}


def spec(env, control, known=()):
    """Returns the `base.EnvSpec` of an environment that says what `control` wants.

    Args:
      env: `base.EnvSpec`.
      control: "right": `env` itself. "empty": "" in place of the instruction; the prompt template
        around it stays. "other": the instruction of another task of the suite, which depends on
        nothing but the episode's key.
      known: instructions that the policy was trained with. "other" draws from them where the suite
        has any of them: an unknown instruction is a weaker control than one of another task.

    Raises:
      ValueError: another control.
    """
    check(control)
    if control == "right":
        return env
    kwargs = {"env": dataclasses.asdict(env), "control": control, "known": list(known)}
    return InstructedSpec(f"{__name__}:make", kwargs)


def check(control):
    """Raises ValueError where there is no such control."""
    if control not in CONTROLS:
        raise ValueError(f"--instruction {control}: expected one of {', '.join(CONTROLS)}")


def directory(out, control):
    """Returns where the results of a control lie: `out`, or a directory of its own in it."""
    return out if control == "right" else out / f"instruction_{control}"


@dataclasses.dataclass(frozen=True)
class InstructedSpec(envs_base.EnvSpec):
    """The `base.EnvSpec` of an `InstructedEnv`, with the limits of the environment in it."""

    def tasks_at_once(self):
        """As that of the environment."""
        return envs_base.EnvSpec(**self.kwargs["env"]).tasks_at_once()


def make(env, control, known):
    """Returns a new `InstructedEnv`; the arguments are those of `spec`, `env` as a dict."""
    return InstructedEnv(envs_base.EnvSpec(**env).make(), control, known)


class InstructedEnv:
    """An environment (`envs/base.py`) with another prompt in its observations."""

    def __init__(self, env, control, known=()):
        self._env, self._control, self._known = env, control, known
        self._prompt = ""

    def __getattr__(self, name):
        return getattr(self._env, name)

    def reset(self, episode):
        """As that of the environment; ValueError: there is no other instruction."""
        seen = self._env.reset(episode)
        if self._control == "other":
            self._prompt = self._other(episode, seen["prompt"])
        return {**seen, "prompt": self._prompt}

    def observe(self):
        """As that of the environment."""
        return {**self._env.observe(), "prompt": self._prompt}

    def _other(self, episode, own):
        if not hasattr(self._env, "other_instructions"):
            raise ValueError(
                f"--instruction other: the environment of {episode.task} does not say which "
                "instructions there are (other_instructions of envs/base.py)"
            )
        others = dict.fromkeys(text for text in self._env.other_instructions() if text != own)
        others = [text for text in others if text in self._known] or list(others)
        if not others:
            raise ValueError(
                f"--instruction other: the suite of {episode.task} has no instruction but {own!r}; "
                "use --instruction empty"
            )
        rng = np.random.default_rng(zlib.crc32(episode.key.encode()))
        return others[rng.integers(len(others))]
