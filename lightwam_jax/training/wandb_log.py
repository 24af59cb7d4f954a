"""The metrics of a run at Weights & Biases too, where config.train.wandb names a project.

The package is imported only then. Its own environment variables decide the rest: WANDB_MODE=offline
keeps everything in the run directory, `wandb sync` sends it later.
"""

import importlib.util
import pathlib
import uuid

from lightwam_jax import atomic


def check(project):
    """Raises ValueError where `project` (of config.train.wandb) is set and wandb is missing."""
    if project and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"config.train.wandb={project!r} needs the package wandb: pip install -r "
            "requirements-wandb.txt, or leave the key empty"
        )


class Mirror:
    """Sends rows to a run of its own; continued training continues that run."""

    def __init__(self, project, workdir):
        """Args:

        project: name at Weights & Biases. workdir: run directory; its name is the run's, and
          wandb.json in it keeps which run it is.
        """
        import wandb

        workdir = pathlib.Path(workdir)
        known = atomic.read_json(workdir / "wandb.json") or {"id": uuid.uuid4().hex[:12]}
        atomic.write_json(workdir / "wandb.json", known)
        self._run = wandb.init(
            project=project, name=workdir.name, id=known["id"], resume="allow", dir=str(workdir)
        )
        # Steps that are repeated after an interruption would be dropped as the run's own steps.
        self._run.define_metric("*", step_metric="step")

    def write(self, curves, step):
        """Sends {name: number} of a step."""
        self._run.log({**curves, "step": step})

    def close(self):
        """Sends what is left."""
        self._run.finish()
