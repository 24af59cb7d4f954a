"""Receding-horizon execution: predict a chunk of actions, execute its head, predict again.

This waits for each chunk; `realtime.py` goes on while the next one is computed.

Plain numpy and no jax, because simulator workers and robots run this next to their own loop.
"""

import collections

import numpy as np


class ChunkQueue:
    """The actions an episode still has to execute before it needs the next plan.

    One object per episode: `while not done: if queue.empty: queue.push(plan(observation));
    step(queue.pop())`.
    """

    def __init__(self, replan_steps):
        """`replan_steps`: steps executed of each chunk, at least 1."""
        if replan_steps < 1:
            raise ValueError(
                f"replan_steps={replan_steps} executes no step of a chunk; expected at least 1"
            )
        self._replan = replan_steps
        self._actions = collections.deque()

    @property
    def empty(self):
        """True when the next step needs a new chunk."""
        return not self._actions

    def push(self, chunk):
        """Queues the first `replan_steps` actions of a chunk.

        Args:
          chunk: float [T, A], physical units, with T >= replan_steps.

        Raises:
          ValueError: not a matrix, too short, or with values that are not finite.
          RuntimeError: the previous chunk has not been executed yet.
        """
        chunk = np.asarray(chunk)
        if chunk.ndim != 2 or len(chunk) < self._replan:
            raise ValueError(
                f"expected a chunk [T, A] with T >= replan_steps={self._replan}, got shape "
                f"{chunk.shape}"
            )
        if not np.isfinite(chunk).all():
            raise ValueError(
                "the chunk holds NaN or infinite actions; nothing was sent to the robot"
            )
        if self._actions:
            raise RuntimeError(
                f"{len(self._actions)} actions of the previous chunk are still queued"
            )
        self._actions.extend(chunk[: self._replan])

    def pop(self):
        """Returns the next action [A]; raises IndexError when a plan is due."""
        return self._actions.popleft()
