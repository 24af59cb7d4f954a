"""From the actions in the data to those the model sees, and back, as config.data declares.

Training applies `forward` to every window, the policy `inverse` to every predicted chunk. Both work
on numpy and on traced jax arrays, in physical units: normalisation comes after `forward` and before
`inverse`. Where the model is wider than the data, the rest is zeros (`pad`).

Each dimension goes through only one of these, so their order does not matter:

  delta_mask      the data hold deltas; past the end of an episode they become 0, "do not move"
  action_as       the data hold targets, the model sees differences. Past the end the last target is
                  held: "delta_previous" becomes 0, "delta_state" keeps pointing at it
  gripper_dims    the data's values of closed and open become 0 and 1; padded steps keep the last
  none of them    as is; padded steps repeat the last action
"""

import dataclasses

import numpy as np

from lightwam_jax import config as config_lib


@dataclasses.dataclass(frozen=True)
class ActionTransform:
    """The pair of transforms of one dataset; make it with `from_config`, which checks it.

    inverse(forward(x)) is x to float rounding, except where a padded delta was zeroed or a gripper
    is snapped.

    Attributes:
      delta_mask: per dimension: a delta in the data, zeroed on padded steps; () for none.
      action_as: per dimension: "absolute", "delta_state" or "delta_previous"; () for absolute.
      state_dims: per dimension: the state it is a delta to; () for the same number.
      gripper_dims: dimensions that are grippers.
      closed_open: their values in the data, 0 and 1 for the model.
      snap: `inverse` gives grippers fully closed (below the middle) or fully open.
    """

    delta_mask: tuple = ()
    action_as: tuple = ()
    state_dims: tuple = ()
    gripper_dims: tuple = ()
    closed_open: tuple = (0.0, 1.0)
    snap: bool = False

    @property
    def is_identity(self):
        """Whether `forward` changes no action but padded ones."""
        return not (self._deltas or (self.gripper_dims and self.closed_open != (0, 1)))

    def forward(self, actions, state, is_pad):
        """Data -> model.

        Args:
          actions: [..., T, A], physical units, the last one repeated past the end.
          state: [..., P] of the window's first step, physical units.
          is_pad: bool [..., T].

        Returns:
          [..., T, A].
        """
        x = zero_padded_deltas(actions, is_pad, self.delta_mask)
        xp = x.__array_namespace__()
        if self._deltas:
            start = self._start(state)
            previous = xp.concatenate([start, x[..., :-1, :]], axis=-2)
            to_state = xp.where(self._are("delta_state"), start, np.float32(0))
            x = x - xp.where(self._are("delta_previous"), previous, to_state)
        if self.gripper_dims:
            closed, opened = map(np.float32, self.closed_open)
            x = xp.where(self._grippers(x), (x - closed) / (opened - closed), x)
        return x

    def inverse(self, actions, state):
        """Model -> data: [..., T, A] and the state [..., P] it was planned from -> [..., T, A]."""
        x, xp = actions, actions.__array_namespace__()
        if self.gripper_dims:
            closed, opened = map(np.float32, self.closed_open)
            physical = closed + x * (opened - closed)
            if self.snap:
                physical = xp.where(x < np.float32(0.5), closed, opened)
            x = xp.where(self._grippers(x), physical, x)
        if self._deltas:
            x = xp.where(self._are("delta_previous"), xp.cumsum(x, axis=-2), x)
            x = x + xp.where(self._are("absolute"), np.float32(0), self._start(state))
        return x

    @property
    def _deltas(self):
        return any(kind != "absolute" for kind in self.action_as)

    def _are(self, kind):
        """[A] bool: the dimensions represented as `kind`."""
        return np.array([each == kind for each in self.action_as])

    def _grippers(self, x):
        """[A] bool: the dimensions that are grippers."""
        return np.isin(np.arange(x.shape[-1]), self.gripper_dims)

    def _start(self, state):
        """[..., P] -> [..., 1, A]: what the first action of each dimension is a delta to."""
        dims = self.state_dims or range(len(self.action_as))
        # Absolute dimensions need no state; any will do.
        dims = [0 if kind == "absolute" else dim for kind, dim in zip(self.action_as, dims)]
        return state[..., None, np.array(dims)]


def from_config(config):
    """Returns the `ActionTransform` that config.data declares.

    Raises:
      ValueError: keys that contradict each other or the widths of the data; names them.
    """
    data, width = config.data, config_lib.action_width(config)
    made = ActionTransform(
        data.delta_mask,
        data.action_as,
        data.action_state_dims,
        data.gripper_dims,
        data.gripper_closed_open,
        data.gripper_snap,
    )
    represented = data.action_as or ("absolute",) * width
    masked = data.delta_mask or (False,) * width
    state_dims, states = data.action_state_dims or range(width), config_lib.state_width(config)
    for dim, (kind, is_delta, state) in enumerate(zip(represented, masked, state_dims)):
        if kind != "absolute" and is_delta:
            raise ValueError(
                f"config.data.delta_mask says that action {dim} is a delta already, "
                f"config.data.action_as makes it {kind!r}: change one of them"
            )
        if kind != "absolute" and not 0 <= state < states:
            raise ValueError(
                f"action {dim} is {kind!r} to state {state}, and there are {states} states: name "
                "the state it belongs to in config.data.action_state_dims or make it 'absolute' in "
                "config.data.action_as"
            )
        if dim in data.gripper_dims and (kind != "absolute" or is_delta):
            key = "delta_mask" if is_delta else "action_as"
            raise ValueError(
                f"config.data.gripper_dims names action {dim}, which is a delta by "
                f"config.data.{key}: a delta is not closed or open, change one of them"
            )
    wrong = sorted(set(data.gripper_dims) - set(range(width)))
    if wrong:
        raise ValueError(
            f"config.data.gripper_dims names {wrong}; the actions have dimensions 0 to {width - 1}"
        )
    if len(data.gripper_closed_open) != 2 or len(set(data.gripper_closed_open)) != 2:
        raise ValueError(
            f"config.data.gripper_closed_open is {data.gripper_closed_open}; expected two "
            "different numbers, (closed, open)"
        )
    if data.gripper_snap and not data.gripper_dims:
        raise ValueError(
            "config.data.gripper_snap=True without config.data.gripper_dims: name the dimensions "
            "that are grippers"
        )
    return made


def kinds(config):
    """Returns what each action dimension is to the robot: "delta", "absolute" or "gripper".

    That is config.data.action_kinds. Where it is empty: grippers are gripper_dims, deltas those of
    delta_mask. What `action_as` makes a difference is absolute: the policy undoes it.
    """
    data, width = config.data, config_lib.action_width(config)
    masked = data.delta_mask or (False,) * width
    derived = ["delta" if is_delta else "absolute" for is_delta in masked]
    for dim in data.gripper_dims:
        derived[dim] = "gripper"
    return data.action_kinds or tuple(derived)


def zero_padded_deltas(actions, is_pad, delta_mask):
    """Sets the delta dimensions of padded steps to 0, in physical units, before normalisation.

    Past the end of an episode a delta action means "do not move", while an absolute one (a gripper
    command, a joint target) keeps its last value.

    Args:
      actions: f32 [..., T, A], physical.
      is_pad: bool [..., T].
      delta_mask: A booleans, true where the action is a delta; empty: nothing changes.

    Returns:
      f32 [..., T, A].
    """
    if not len(delta_mask):
        return actions
    xp = actions.__array_namespace__()
    return xp.where(is_pad[..., None] & np.asarray(delta_mask, bool), np.float32(0), actions)


def pad(values, width):
    """[..., D] -> [..., width], with zeros behind: a smaller robot in a larger action space."""
    missing = width - values.shape[-1]
    if not missing:
        return values
    zeros = np.zeros((*values.shape[:-1], missing), values.dtype)
    return values.__array_namespace__().concatenate([values, zeros], axis=-1)
