"""The shifted flow-matching schedule: pure functions of time (docs/spec.md section 4)."""

import jax.numpy as jnp
import numpy as np

STEPS = 1000  # timesteps run from 0 (data) to STEPS (noise)


def shifted(u, shift):
    """phi(u) = s u / (1 + (s-1) u): moves uniform u in [0,1] towards noise for s > 1."""
    return shift * u / (1 + (shift - 1) * u)


def sample_time(u, shift):
    """Uniform draws u [B] in [0,1) -> timesteps [B] in [0, 1000), float32."""
    return STEPS * shifted(jnp.asarray(u, jnp.float32), shift)


def add_noise(x, noise, t):
    """x_t = (1 - t/1000) x + (t/1000) noise for x [B,...], t [B]."""
    sigma = _per_sample(t / STEPS, x)
    return (1 - sigma) * x + sigma * noise


def target(x, noise):
    """The velocity the model learns: noise - x."""
    return noise - x


def weight_constants(shift):
    """(minimum, mean) of the bell over the 1000-step grid, float64: they normalise `weight`."""
    grid = STEPS * shifted(np.linspace(1.0, 0.0, STEPS + 1)[:-1], shift)
    bell = np.exp(-2 * ((grid - STEPS / 2) / STEPS) ** 2)
    return bell.min(), (bell - bell.min()).mean()


def weight(t, shift):
    """Loss weight of timesteps t [...], float32: a bell, 0 at both ends, mean 1 over the grid."""
    low, mean = weight_constants(shift)
    bell = jnp.exp(-2 * ((jnp.asarray(t, jnp.float32) - STEPS / 2) / STEPS) ** 2)
    return (bell - low) / (mean + 1e-10)


def sampling_schedule(steps, shift):
    """Timesteps [n] (first 1000) and sigma steps [n] (negative) of an n-step Euler solver."""
    sigma = shifted(np.linspace(1.0, 0.0, steps + 1, dtype=np.float32), np.float32(shift))
    return STEPS * sigma[:-1], sigma[1:] - sigma[:-1]


def euler_step(x, velocity, delta):
    """One solver step along the predicted velocity: x + velocity * delta."""
    return x + velocity * delta


def _per_sample(value, x):
    """[B] -> [B,1,...] so that it broadcasts over x [B,...]."""
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim))
