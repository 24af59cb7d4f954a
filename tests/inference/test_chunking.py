import numpy as np
import pytest

from lightwam_jax.inference import chunking


def test_executes_the_first_replan_steps_of_each_chunk():
    queue, executed, plans = chunking.ChunkQueue(replan_steps=3), [], 0
    for _ in range(7):
        if queue.empty:
            queue.push(np.arange(5)[:, None] + 100 * plans)
            plans += 1
        executed.append(int(queue.pop()[0]))
    assert executed == [0, 1, 2, 100, 101, 102, 200]
    assert plans == 3


def test_refuses_chunks_that_cannot_be_executed():
    with pytest.raises(ValueError, match="replan_steps=0"):
        chunking.ChunkQueue(0)
    queue = chunking.ChunkQueue(replan_steps=4)
    with pytest.raises(ValueError, match=r"T >= replan_steps=4, got shape \(3, 2\)"):
        queue.push(np.zeros((3, 2)))
    for shape in ((4,), (1, 4, 2), ()):
        with pytest.raises(ValueError, match=r"expected a chunk \[T, A\]"):
            queue.push(np.zeros(shape))
    for value in (np.nan, np.inf, -np.inf):  # one number is enough, executed or not
        for place in ((0, 0), (3, 1), (5, 1)):
            chunk = np.zeros((6, 2))
            chunk[place] = value
            with pytest.raises(ValueError, match="NaN or infinite"):
                queue.push(chunk)
            assert queue.empty
    queue.push(np.zeros((4, 2)))
    for left in (4, 3, 2, 1):
        with pytest.raises(RuntimeError, match=f"{left} actions"):
            queue.push(np.zeros((4, 2)))
        assert not queue.empty
        queue.pop()
    assert queue.empty
    with pytest.raises(IndexError):
        queue.pop()
    queue.push(np.zeros((4, 2)))
