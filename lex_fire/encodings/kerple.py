"""Kerple: a learned penalty that grows with the logarithm or with a power of distance.

Chi et al. 2022, arXiv:2205.09921, with two learned numbers a head, r1 and r2 > 0:

    b_h(i, j) = -r1_h log(1 + r2_h |i - j|)     or     b_h(i, j) = -r1_h |i - j|^r2_h,   r2 <= 2

The authors' program (chijames/KERPLE, megatron/mpu/layers.py) keeps them at 0.01 or more, and the
power's r2 at 2 or less, by setting one that is outside back to its bound before each pass, so that
it can always return. Departure: a pure function cannot set a parameter, so one outside counts as
its mirror image inside. Its gradient is as alive, and leads back as soon as it has gone too far.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lex_fire.encodings import base, piecewise

Numbers = Callable[[base.Params], tuple[jax.Array, jax.Array]]  # params -> r1_H, r2_H
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


def _log_coordinate(coordinate: dict[str, jax.Array], i: jax.Array, j: jax.Array) -> jax.Array:
  """Returns log(1 + r2 |i - j|)."""
  return jnp.log1p(coordinate['r2_H'] * jnp.abs((i - j).astype(jnp.float32)))


def _power_coordinate(coordinate: dict[str, jax.Array], i: jax.Array, j: jax.Array) -> jax.Array:
  """Returns |i - j|^r2."""
  distance = jnp.abs((i - j).astype(jnp.float32))
  # One logarithm for all heads: on CPU nine times faster than a power, within 2e-6 of it. At
  # distance 0 both the value and the gradient d^r2 log d are to be 0, so it takes no logarithm.
  log = jnp.log(jnp.maximum(distance, 1.0))
  return jnp.where(distance > 0, jnp.exp(coordinate['r2_H'] * log), 0.0)


def _table(params: base.Params, num_heads: int, *, numbers: Numbers) -> piecewise.Table:
  del num_heads
  r1_H, r2_H = numbers(params)
  return piecewise.of_line({'r2_H': r2_H}, -r1_H)


def _kerple(
  name: str,
  numbers: Numbers,
  coordinate: Callable[..., jax.Array],
  greatest_r1: float,
  greatest_r2: float,
) -> base.Encoding:
  table = functools.partial(_table, numbers=numbers)
  return base.Encoding(
    name=name,
    init=functools.partial(_init, greatest_r1=greatest_r1, greatest_r2=greatest_r2),
    bias=functools.partial(piecewise.bias_of_params, table=table, coordinate=coordinate),
    table=table,
    coordinate=coordinate,
    smooth=True,
    learned=True,
  )


def kerple_log() -> base.Encoding:
  """Kerple's logarithmic kernel: b_h(i, j) = -r1_h log(1 + r2_h |i - j|)."""
  return _kerple('kerple_log', log_numbers, _log_coordinate, greatest_r1=2.0, greatest_r2=1.0)


def kerple_power() -> base.Encoding:
  """Kerple's power kernel: b_h(i, j) = -r1_h |i - j|^r2_h, 0 < r2_h <= 2."""
  return _kerple(
    'kerple_power', power_numbers, _power_coordinate, greatest_r1=1.0, greatest_r2=GREATEST_POWER
  )
