"""ALiBi: a penalty linear in distance, one slope a head (Press et al. 2022, arXiv:2108.12409)."""

import jax
import jax.numpy as jnp
import numpy as np

from lex_fire.encodings import base


def slopes(num_heads: int) -> np.ndarray:
  """Returns slope_H [nats per token]: 2^(-8 (h + 1) / H) for H a power of two.

  For another H the authors' code takes the slopes of the largest power of two P below it, then
  every second slope of 2 P until there are H.
  """
  power: int = 2 ** int(np.log2(num_heads))
  slope_H = 2.0 ** (-8 * (np.arange(power) + 1) / power)
  extra_H = 2.0 ** (-4 * (np.arange(2 * power) + 1) / power)[::2]
  return np.concatenate([slope_H, extra_H])[:num_heads]


def _bias(
  params: base.Params,
  query_position_BQ: jax.Array,
  key_position_BK: jax.Array,
  num_heads: int,
) -> jax.Array:
  del params
  distance_BQK = jnp.abs(base.distance(query_position_BQ, key_position_BK)).astype(jnp.float32)
  slope_H = jnp.float32(slopes(num_heads))
  return -slope_H[None, :, None, None] * distance_BQK[:, None]


def alibi() -> base.Encoding:
  """ALiBi: b_h(i, j) = -m_h |i - j|."""
  return base.Encoding(name='alibi', init=base.no_parameters, bias=_bias)
