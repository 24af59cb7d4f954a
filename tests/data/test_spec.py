"""The batch contract."""

import ml_dtypes
import numpy as np
import pytest

from lightwam_jax.data import spec
from tests import synthetic


@pytest.fixture(scope="module")
def config():
    return synthetic.make_config()


def test_spec_has_the_documented_shapes(config):
    got = {name: (s.shape, np.dtype(s.dtype)) for name, s in spec.batch_spec(config, 3).items()}
    assert got == {
        "latents": ((3, 2, 4, 8, 16), np.dtype(ml_dtypes.bfloat16)),
        "context": ((3, 24, 32), np.dtype(ml_dtypes.bfloat16)),
        "context_mask": ((3, 24), np.dtype(bool)),
        "proprio": ((3, 8), np.dtype(np.float32)),
        "actions": ((3, 8, 7), np.dtype(np.float32)),
        "action_is_pad": ((3, 8), np.dtype(bool)),
        "image_is_pad": ((3, 5), np.dtype(bool)),
        "index": ((3,), np.dtype(np.int64)),
    }


def test_fake_batch_fits_and_is_a_function_of_the_seed(config):
    batch, again, other = (spec.fake_batch(config, 3, seed) for seed in (1, 1, 2))
    spec.check_batch(batch, config)
    for name in batch:
        np.testing.assert_array_equal(batch[name], again[name])
    assert (batch["latents"] != other["latents"]).any()
    assert not batch["action_is_pad"][:, 0].any()
    np.testing.assert_array_equal(batch["context"][~batch["context_mask"]], 0)


def test_check_batch_lists_everything_that_is_wrong(config):
    batch = spec.fake_batch(config, 3)
    batch["actions"] = batch["actions"][:, :4]
    batch["proprio"] = batch["proprio"].astype(np.float64)
    batch["noise"] = batch.pop("context_mask")
    with pytest.raises(ValueError) as error:
        spec.check_batch(batch, config)
    message = str(error.value)
    assert "actions is float32 [3, 4, 7]; expected float32 [3, 8, 7]" in message
    assert "proprio is float64 [3, 8]; expected float32 [3, 8]" in message
    assert "context_mask is missing; expected bool [3, 24]" in message
    assert "noise is not part of a batch" in message


def test_validation_batches_may_say_which_rows_count(config):
    batch = {**spec.fake_batch(config, 2), "valid": np.array([True, False])}
    spec.check_batch(batch, config)
    with pytest.raises(ValueError, match=r"valid is int64 \[2\]; expected bool \[2\]"):
        spec.check_batch({**batch, "valid": np.array([1, 0])}, config)


def test_canvas_must_divide_into_pooled_patches():
    with pytest.raises(ValueError, match="must be multiples of 32"):
        config = synthetic.make_config(**{"data.canvas": (48, 64), "loss.downsample": 2})
        spec.batch_spec(config, 1)
