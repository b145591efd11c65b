"""ALiBi: a penalty linear in distance, one slope a head (Press et al. 2022, arXiv:2108.12409)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lex_fire.encodings import base, piecewise


def slopes(num_heads: int) -> np.ndarray:
  """Returns slope_H [nats per token]: 2^(-8 (h + 1) / H) for H a power of two.

  For another H the authors' code takes the slopes of the largest power of two P below it, then
  every second slope of 2 P until there are H.
  """
  power: int = 2 ** int(np.log2(num_heads))
  slope_H = 2.0 ** (-8 * (np.arange(power) + 1) / power)
  extra_H = 2.0 ** (-4 * (np.arange(2 * power) + 1) / power)[::2]
  return np.concatenate([slope_H, extra_H])[:num_heads]


def _table(params: base.Params, num_heads: int) -> piecewise.Table:
  del params
  return piecewise.of_line({}, -jnp.float32(slopes(num_heads)))


def _distance(nothing: dict[str, jax.Array], i: jax.Array, j: jax.Array) -> jax.Array:
  del nothing
  return jnp.abs((i - j).astype(jnp.float32))


def alibi() -> base.Encoding:
  """ALiBi: b_h(i, j) = -m_h |i - j|."""
  return base.Encoding(
    name='alibi',
    init=base.no_parameters,
    bias=functools.partial(piecewise.bias_of_params, table=_table, coordinate=_distance),
    table=_table,
    coordinate=_distance,
    smooth=True,
  )
