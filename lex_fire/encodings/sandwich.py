"""Sandwich: a sum of cosines of the distance, what sinusoids say of two positions alone.

Chi et al. 2023, arXiv:2212.10356. The product of the sinusoidal embeddings of two positions depends
on their distance alone:

    b_h(i, j) = r_h sum_{k=1..K} cos((i - j) / 10000^(2k/d)),   r_h = H / (8 (h + 1))

with d the paper's d-bar, a width that need not be the model's, and K = d / 2. (FIRE's paper, in
comparing with it, writes d' for d / 2.) Nothing is learned; heads differ by r_h, from 0 on.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lex_fire import errors
from lex_fire.encodings import base, piecewise, rotary

BASE_PERIOD = 10_000.0


def _table(params: base.Params, num_heads: int, *, compression: float) -> piecewise.Table:
  del params
  return piecewise.of_line({}, jnp.float32(num_heads / (compression * np.arange(1, num_heads + 1))))


def _waves(position: jax.Array, *, num_terms: int, d_bar: int) -> jax.Array:
  """Returns the cosines of all terms, then the sines, exact at any position."""
  turn_R = BASE_PERIOD ** (-2 * np.arange(1, num_terms + 1) / d_bar) / (2 * np.pi)
  return jnp.concatenate(rotary.cos_sin(position, turn_R), axis=-1)


def _sum_of_cosines(
  nothing: dict[str, jax.Array], i: jax.Array, j: jax.Array, *, waves: Callable[..., jax.Array]
) -> jax.Array:
  """By cos(a - b) = cos a cos b + sin a sin b: a matrix product."""
  del nothing
  of_i, of_j = waves(i[..., 0]), jnp.swapaxes(waves(j[..., 0, :]), -1, -2)
  return jnp.matmul(of_i, of_j, precision=jax.lax.Precision.HIGHEST)


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
  table = functools.partial(_table, compression=compression)
  waves = functools.partial(_waves, num_terms=num_terms, d_bar=d_bar)
  coordinate = functools.partial(_sum_of_cosines, waves=waves)
  return base.Encoding(
    name='sandwich',
    init=base.no_parameters,
    bias=functools.partial(piecewise.bias_of_params, table=table, coordinate=coordinate),
    table=table,
    coordinate=coordinate,
    waves=waves,
  )
