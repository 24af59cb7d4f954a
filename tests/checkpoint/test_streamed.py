"""Arrays that are written part by part."""

import inspect

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from lightwam_jax.checkpoint import streamed


def test_orbax_still_has_the_method_that_is_replaced():
    """`streamed._Handler` replaces a private method of Orbax: under another name it would never
    be called. If this fails after an update of orbax-checkpoint, look at streamed.py first.
    """
    theirs = ocp.type_handlers.NumpyHandler._open_and_write
    ours = streamed._Handler._open_and_write
    assert inspect.iscoroutinefunction(theirs) and inspect.iscoroutinefunction(ours)
    names = ["self", "value", "tspec", "ts_context"]
    assert list(inspect.signature(theirs).parameters) == names
    assert list(inspect.signature(ours).parameters) == names


def test_every_part_is_written_in_turn_and_read_as_one_array(tmp_path):
    whole = np.arange(24, dtype=np.float32).reshape(6, 4)
    array = streamed.StreamedArray(whole.shape, whole.dtype, 4, lambda: (whole[:4], whole[4:]))
    np.testing.assert_array_equal(array.whole(), whole)
    done = []
    streamed.save(tmp_path / "item", {"w": array}, lambda leaf, row, part: done.append((leaf, row)))
    assert done == [(array, 0), (array, 4)], "through streamed._Handler, not as Orbax would"
    with ocp.StandardCheckpointer() as reader:
        np.testing.assert_array_equal(reader.restore(tmp_path / "item")["w"], jnp.asarray(whole))
