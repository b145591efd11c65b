"""A learned table of absolute positions, added to token embeddings (as in BERT and GPT-2)."""

import functools

import jax
import jax.numpy as jnp

from lex_fire import errors
from lex_fire.encodings import base


def _init(
  rng: jax.Array, *, num_heads: int, head_dim: int, d_model: int, max_length: int
) -> base.Params:
  del num_heads, head_dim
  return {'table_ZD': 0.02 * jax.random.normal(rng, (max_length, d_model), jnp.float32)}


def _embed(params: base.Params, position_BL: jax.Array, d_model: int, *, clamp: bool) -> jax.Array:
  del d_model
  # Unless asked to clamp, a position past the table becomes NaN: the default gather would silently
  # repeat the last row.
  how = {'mode': 'clip'} if clamp else {'mode': 'fill', 'fill_value': jnp.nan}
  return params['table_ZD'].at[position_BL].get(**how)


def learned(max_length: int = 2048, clamp: bool = False) -> base.Encoding:
  """Learned positions 0 .. max_length - 1; there is none beyond, and longer inputs are refused.

  Args:
    max_length: rows of the table [tokens].
    clamp: all positions beyond read the last row, and inputs of any length are taken.

  Raises:
    errors.UserError: if max_length is not positive.
  """
  if max_length < 1:
    raise errors.UserError(f'learned positions need {max_length=} to be at least 1')
  return base.Encoding(
    name='learned',
    init=functools.partial(_init, max_length=max_length),
    embed=functools.partial(_embed, clamp=clamp),
    shared=True,
    shift_invariant=False,
    learned=True,
    max_length=None if clamp else max_length,
  )
