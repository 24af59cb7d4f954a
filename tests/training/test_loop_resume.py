"""What a run continues with, and what it validates: the parts, without training anything."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from lightwam_jax.checkpoint import places
from lightwam_jax.training import loop, validation, workdir
from lightwam_jax.training import step as step_lib
from tests import synthetic

CONFIG = synthetic.make_config(**{"data.source": "fake", "train.steps": 9})


class LoaderAsked(Exception):
    """Raised in place of loading; its argument is the batch that was asked for."""


def test_a_continued_run_asks_for_the_batch_after_the_last_one(monkeypatch, tmp_path):
    def ask(config, step):
        raise LoaderAsked(step)

    monkeypatch.setattr(loop, "_loader", ask)
    for step in (0, 5):
        with pytest.raises(LoaderAsked) as asked:
            place = places.opened(tmp_path)
            loop.run(types.SimpleNamespace(config=CONFIG, step=step, place=place))
        assert asked.value.args == (step,)


@pytest.mark.parametrize("average", [None, 7.0])
def test_validation_is_of_the_moving_average_where_there_is_one(monkeypatch, average):
    run = types.SimpleNamespace(config=CONFIG, encoder=None, model=None, validation=[{}])
    state = step_lib.TrainState(
        step=jnp.int32(3),
        halted=jnp.array(False),
        trainable={"w": jnp.float32(1)},
        frozen={"base": jnp.float32(2)},
        opt_state=None,
        ema=None if average is None else {"w": jnp.float32(average)},
    )
    monkeypatch.setattr(loop, "_on_device", lambda run, batch: (batch,))
    monkeypatch.setattr(validation, "open_loop_errors", lambda model, params, *_: params)
    monkeypatch.setattr(validation, "mean_errors", lambda sums: sums)
    monkeypatch.setattr(validation, "validation_row", lambda means, grippers: means)
    (seen,) = loop._validator(run)(state)
    np.testing.assert_array_equal([seen["w"], seen["base"]], [average or 1, 2])


def test_only_what_leaves_the_next_step_alone_may_change():
    for key in (
        "seed",
        "optimizer.lr",
        "optimizer.ema_decay",
        "train.batch_size",
        "train.trainable",
        "data.cache",
        "data.normalization",
        "loss.lambda_video",
        "model.dtype",
    ):
        assert not workdir.MAY_CHANGE.match(key), key
    for key in ("name", "mesh.fsdp", "optimizer.accum_steps", "data.threads", "train.keep_last"):
        assert workdir.MAY_CHANGE.match(key), key
