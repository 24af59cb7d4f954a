"""What an environment provides, and how episodes are named.

What an environment provides (see `envs/demo/env.py`):
  reset(episode)        starts an `EpisodeSpec` and returns the first observation, as `observe`;
                        everything random in it comes from the episode
  observe()             {"images": {camera: uint8 [H,W,3]}, "state": f32 [P], "prompt": str}
  step(action)          (None, success, done) for an action f32 [A]; renders nothing
  expert_action()       f32 [A]; only for the expert's own episodes
  image(camera, size) uint8 [size,size,3]; only for `replay`
  describe()            optional: plain values that decide physics and pixels, for the manifest:
                        versions of the simulator, its renderer, cameras; after a `reset`
  close()               optional
One environment serves all tasks of its suite.
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
