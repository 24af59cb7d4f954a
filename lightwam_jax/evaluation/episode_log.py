"""The log of an evaluation: a journal of `worker.EpisodeResult`s.

It holds the actions too, so that anyone can repeat the episodes without the policy.
"""

from lightwam_jax.data.caches import journal
from lightwam_jax.evaluation import worker


class EpisodeLog:
    """The log of one policy on one suite.

    Attributes:
      results: {`EpisodeSpec`: `EpisodeResult`} of the episodes that ran, also before it was opened.
    """

    def __init__(self, path, manifest):
        """Opens a log; see `journal.Journal`.

        Args:
          path: file; begun if it is not there.
          manifest: what decides the results, JSON-able: policy, environment, settings.

        Raises:
          ValueError: the log of another manifest, or damaged, or in use by another process.
        """
        self._journal = journal.Journal(
            path, manifest, "evaluate into another directory", worker.EpisodeResult.from_json
        )
        # One that could not be run is tried again.
        self.results = {r.episode: r for r in self._journal.entries if r.error is None}

    def add(self, result):
        """Appends a result; it is on its way to the disk when this returns."""
        if result.error is None:
            self.results[result.episode] = result
        self._journal.add(result.to_json())

    def close(self):
        """Closes the file, and with it the lock."""
        self._journal.close()
