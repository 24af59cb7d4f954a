"""The journal of an evaluation's episodes: `worker.EpisodeResult`s, actions included.

So anyone can repeat the episodes without the policy.
"""

from lightwam_jax.data.caches import journal
from lightwam_jax.evaluation import worker


class EpisodeLog:
    """The log of one policy on one suite.

    Attributes:
      records: {`EpisodeSpec`: `EpisodeResult`} of the episodes that ran, those that were there
      before too.
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
        self.records = {r.episode: r for r in self._journal.entries if r.error is None}

    def add(self, record):
        """Appends a record; it is on its way to the disk when this returns."""
        if record.error is None:
            self.records[record.episode] = record
        self._journal.add(record.to_json())

    def close(self):
        """Closes the file, and with it the lock."""
        self._journal.close()
