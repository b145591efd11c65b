"""Sandwich: a sum of cosines of the distance, what sinusoids say of two positions alone.

Chi et al. 2023, arXiv:2212.10356. The product of the sinusoidal embeddings of two positions depends
on their distance alone:

    b_h(i, j) = r_h sum_{k=1..K} cos((i - j) / 10000^(2k/d)),   r_h = H / (8 (h + 1))

with d the paper's d-bar, a width that need not be the model's, and K = d / 2. (FIRE's paper, in
comparing with it, writes d' for d / 2.) Nothing is learned; heads differ by r_h, from 0 on.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from lex_fire import errors
from lex_fire.encodings import base, rotary

BASE_PERIOD = 10_000.0


def _bias(
  params: base.Params,
  query_position_BQ: jax.Array,
  key_position_BK: jax.Array,
  num_heads: int,
  *,
  num_terms: int,
  d_bar: int,
  compression: float,
) -> jax.Array:
  """By cos(a - b) = cos a cos b + sin a sin b: a matrix product, of angles exact at any length."""
  del params
  turn_R = BASE_PERIOD ** (-2 * np.arange(1, num_terms + 1) / d_bar) / (2 * np.pi)
  # C: the cosines of all terms, then the sines.
  wave_BQC = jnp.concatenate(rotary.cos_sin(query_position_BQ, turn_R), axis=-1)
  wave_BKC = jnp.concatenate(rotary.cos_sin(key_position_BK, turn_R), axis=-1)
  highest = jax.lax.Precision.HIGHEST
  sum_BQK = jnp.matmul(wave_BQC, jnp.swapaxes(wave_BKC, 1, 2), precision=highest)
  scale_H = jnp.float32(num_heads / (compression * np.arange(1, num_heads + 1)))
  return scale_H[None, :, None, None] * sum_BQK[:, None]


def sandwich(num_terms: int = 64, d_bar: int = 128, compression: float = 8.0) -> base.Encoding:
  """Sandwich: b_h(i, j) = r_h sum_{k=1..num_terms} cos((i - j) / 10000^(2k/d_bar)).

  Args:
    num_terms: cosines in the sum; the paper's is half of d_bar.
    d_bar: a term's wavelength is 10000^(2/d_bar) times that of the one before.
    compression: of the last head; r_h = H / (compression (h + 1)) for h from 0.

  Raises:
    errors.UserError: for an option outside its range.
  """
  if num_terms < 1 or d_bar < 1 or not 0 < compression < math.inf:
    raise errors.UserError(
      f'sandwich needs {num_terms=}, {d_bar=} and a finite {compression=} above 0'
    )
  return base.Encoding(
    name='sandwich',
    init=base.no_parameters,
    bias=functools.partial(_bias, num_terms=num_terms, d_bar=d_bar, compression=compression),
  )
