"""What an environment is: the protocol every simulator is put behind, and how episodes are named.

An environment serves all tasks of its suite. It has (`envs/demo/tabletop.py` is a short example)
  reset(episode)        starts an `EpisodeSpec` and returns the first observation, as `observe`;
                        everything random in the episode comes from the `EpisodeSpec`
  observe()             {"images": {camera: uint8 [H,W,3]}, "state": f32 [P], "prompt": str}
  step(action)          executes f32 [A], renders nothing; returns (None, success, done)
  expert_action()       f32 [A] for the present state; only where there is a scripted expert
  image(camera, size)   uint8 [size,size,3], for the videos of the report
  describe()            optional: plain values that decide physics and pixels, for the manifest:
                        versions of simulator and renderer, cameras; called after a `reset`
  other_instructions()  optional: list of str, the instructions of the other tasks of the suite, for
                        the episode that was reset (`evaluation/instructions.py`)
  close()               optional
What a suite of environments is: `envs/__init__.py`.
"""

import dataclasses
import importlib


@dataclasses.dataclass(frozen=True)
class EnvSpec:
    """Where a process finds its environments: "module:callable" and its keyword arguments."""

    factory: str
    kwargs: dict = dataclasses.field(default_factory=dict)

    def make(self):
        """Returns a new environment."""
        module, _, name = self.factory.partition(":")
        return getattr(importlib.import_module(module), name)(**self.kwargs)

    def tasks_at_once(self):
        """Returns how many tasks a process may have open at a time; None: any number.

        Environments that hold much memory for each task say so: `TASKS_AT_ONCE` in their module.
        """
        module = importlib.import_module(self.factory.partition(":")[0])
        return getattr(module, "TASKS_AT_ONCE", None)


@dataclasses.dataclass(frozen=True, order=True)
class EpisodeSpec:
    """What is run: everything random in an episode comes from these three.

    Attributes:
      task: name within its suite.
      init: number of the initial state, where a suite comes with a list of them; else 0.
      seed: of everything else.
    """

    task: str
    init: int
    seed: int

    @property
    def key(self):
        """A name that is unique within a suite."""
        return f"{self.task}/{self.init}/{self.seed}"

    def to_json(self):
        """Returns it as a plain dict."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content):
        """Returns the episode of a dict that has (at least) its fields."""
        return cls(content["task"], content["init"], content["seed"])
