"""Windows of pixels: the instruction of their own first step, and the place of a latent cell."""

import dataclasses

import numpy as np

from lightwam_jax.data import episodes
from lightwam_jax.data import windows as windows_lib
from lightwam_jax.encoders import pca
from tests import synthetic


@dataclasses.dataclass(frozen=True, eq=False)
class Changing(episodes.ArrayEpisode):
    """Told something else from its third step on."""

    def task_at(self, step):
        return self.task if step < 2 else "now stop"


def test_a_window_has_the_instruction_of_its_first_step():
    config = synthetic.make_config()
    plain, other = synthetic.make_episodes(2)
    fields = {f.name: getattr(other, f.name) for f in dataclasses.fields(other)}
    changing = Changing(**fields)
    found = [plain, changing]
    windows = windows_lib.Windows(found, episodes.tasks(found), config)
    assert len(windows) == plain.length + changing.length
    tasks = [windows[row]["task"] for row in range(len(windows))]
    assert tasks == [0] * plain.length + [1, 1] + [2] * (changing.length - 2)
    first = windows[plain.length]
    np.testing.assert_array_equal(first["proprio"], changing.state[0])
    np.testing.assert_array_equal(first["actions"][0], changing.action[0])


def test_rows_and_columns_of_any_canvas_span_minus_one_to_one():
    rows, columns, sine, cosine = np.moveaxis(pca._places(2, 4), -1, 0)
    np.testing.assert_allclose(rows[:, 0], [-0.5, 0.5])
    np.testing.assert_allclose(columns[0], [-0.75, -0.25, 0.25, 0.75])
    np.testing.assert_allclose(sine[1], np.sin(2 * np.pi * columns[1]), atol=1e-6)
    np.testing.assert_allclose(cosine[1], np.cos(2 * np.pi * columns[1]), atol=1e-6)
    assert (rows == rows[:, :1]).all() and (columns == columns[:1]).all()
