"""Accumulation x rematerialisation x mesh: however a step is executed, its losses are the same."""

import jax
import numpy as np
import pytest

from lightwam_jax import sharding
from lightwam_jax.training import loop
from tests import pod

pytestmark = pytest.mark.slow
MAKE_MESH = sharding.make_mesh
WAYS = [  # (data, fsdp), micro-batches, remat, frozen weights
    ((8, 1), 2, "full", "sharded"),
    ((1, 8), 1, "dots", "sharded"),
    ((2, 4), 2, "none", "replicated"),
    ((2, 4), 1, "linears", "sharded"),
]


def rows(workdir, mesh, accum, remat, frozen):
    """Losses and norms of a run of three steps, validation included."""
    config = pod.make_config(
        **{
            "mesh.data": mesh[0],
            "mesh.fsdp": mesh[1],
            "mesh.frozen": frozen,
            "model.remat": remat,
            "optimizer.accum_steps": accum,
            "train.batch_size": 16,
            "train.steps": 3,
            "train.log_every": 1,
            "train.checkpoint_every": 0,
        }
    )
    loop.train(config, workdir)
    return pod.rows(workdir)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """One device, the whole batch at once, nothing computed twice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda c: MAKE_MESH(c, jax.devices()[:1]))
        return rows(tmp_path_factory.mktemp("plain") / "run", (1, 1), 1, "none", "sharded")


@pytest.mark.parametrize("way", WAYS, ids=lambda w: "x".join(map(str, (*w[0], *w[1:]))))
def test_losses_are_those_of_the_plain_step(way, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SPLIT_BYTES", 0)  # everything is split that can be
    for row, expected in zip(rows(tmp_path / "run", *way), plain, strict=True):
        for name in set(expected) - {"kind"}:
            np.testing.assert_allclose(
                row[name], expected[name], rtol=2e-4, atol=1e-6, err_msg=name
            )
