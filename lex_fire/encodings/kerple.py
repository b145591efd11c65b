"""Kerple: a learned penalty that grows with the logarithm or with a power of distance.

Chi et al. 2022, arXiv:2205.09921, with two learned numbers a head, r1 and r2 > 0:

    b_h(i, j) = -r1_h log(1 + r2_h |i - j|)     or     b_h(i, j) = -r1_h |i - j|^r2_h,   r2 <= 2

The authors' program (chijames/KERPLE, megatron/mpu/layers.py) keeps them at 0.01 or more, and the
power's r2 at 2 or less, by setting one that is outside back to its bound before each pass, so that
it can always return. Departure: a pure function cannot set a parameter, so one outside counts as
its mirror image inside. Its gradient is as alive, and leads back as soon as it has gone too far.
"""

import functools

import jax
import jax.numpy as jnp

from lex_fire.encodings import base

LEAST, GREATEST_POWER = 1e-2, 2.0  # the bounds of the authors' program


def _init(
  rng: jax.Array,
  *,
  num_heads: int,
  head_dim: int,
  d_model: int,
  greatest_r1: float,
  greatest_r2: float,
) -> base.Params:
  """Uniform from the least, as the authors' program from 0."""
  del head_dim, d_model
  rng_r1, rng_r2 = jax.random.split(rng)
  return {
    'r1_H': jax.random.uniform(rng_r1, (num_heads,), jnp.float32, LEAST, greatest_r1),
    'r2_H': jax.random.uniform(rng_r2, (num_heads,), jnp.float32, LEAST, greatest_r2),
  }


def _mirrored_up(x_H: jax.Array) -> jax.Array:
  """Returns x, from LEAST down its mirror image above it."""
  return jnp.where(x_H < LEAST, 2 * LEAST - x_H, x_H)


def _mirrored_between(x_H: jax.Array) -> jax.Array:
  """Returns x, outside LEAST .. GREATEST_POWER its image between two mirrors there."""
  width = GREATEST_POWER - LEAST
  image_H = LEAST + jnp.abs(jnp.mod(x_H - GREATEST_POWER, 2 * width) - width)
  return jnp.where((x_H < LEAST) | (x_H > GREATEST_POWER), image_H, x_H)


def log_numbers(params: base.Params) -> tuple[jax.Array, jax.Array]:
  """Returns the r1_H and r2_H that `kerple_log` uses: the parameters within their bounds."""
  return _mirrored_up(params['r1_H']), _mirrored_up(params['r2_H'])


def power_numbers(params: base.Params) -> tuple[jax.Array, jax.Array]:
  """Returns the r1_H and r2_H that `kerple_power` uses: the parameters within their bounds."""
  return _mirrored_up(params['r1_H']), _mirrored_between(params['r2_H'])


def _distance_B1QK(query_position_BQ: jax.Array, key_position_BK: jax.Array) -> jax.Array:
  distance_BQK = jnp.abs(base.distance(query_position_BQ, key_position_BK))
  return distance_BQK.astype(jnp.float32)[:, None]


def _per_head(number_H: jax.Array) -> jax.Array:
  return number_H[None, :, None, None]


def _log_bias(
  params: base.Params,
  query_position_BQ: jax.Array,
  key_position_BK: jax.Array,
  num_heads: int,
) -> jax.Array:
  del num_heads
  r1_H, r2_H = log_numbers(params)
  distance_B1QK = _distance_B1QK(query_position_BQ, key_position_BK)
  return -_per_head(r1_H) * jnp.log1p(_per_head(r2_H) * distance_B1QK)


def _power_bias(
  params: base.Params,
  query_position_BQ: jax.Array,
  key_position_BK: jax.Array,
  num_heads: int,
) -> jax.Array:
  del num_heads
  r1_H, r2_H = power_numbers(params)
  distance_B1QK = _distance_B1QK(query_position_BQ, key_position_BK)
  # One logarithm for all heads: on CPU nine times faster than a power, within 2e-6 of it. At
  # distance 0 both the value and the gradient d^r2 log d are to be 0, so it takes no logarithm.
  log_B1QK = jnp.log(jnp.maximum(distance_B1QK, 1.0))
  power_BHQK = jnp.where(distance_B1QK > 0, jnp.exp(_per_head(r2_H) * log_B1QK), 0.0)
  return -_per_head(r1_H) * power_BHQK


def kerple_log() -> base.Encoding:
  """Kerple's logarithmic kernel: b_h(i, j) = -r1_h log(1 + r2_h |i - j|)."""
  return base.Encoding(
    name='kerple_log',
    init=functools.partial(_init, greatest_r1=2.0, greatest_r2=1.0),
    bias=_log_bias,
    learned=True,
  )


def kerple_power() -> base.Encoding:
  """Kerple's power kernel: b_h(i, j) = -r1_h |i - j|^r2_h, 0 < r2_h <= 2."""
  return base.Encoding(
    name='kerple_power',
    init=functools.partial(_init, greatest_r1=1.0, greatest_r2=GREATEST_POWER),
    bias=_power_bias,
    learned=True,
  )
