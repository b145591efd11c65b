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


def _embed(params: base.Params, position_BL: jax.Array, d_model: int) -> jax.Array:
  del d_model
  # A position past the table becomes NaN: the default gather would silently repeat the last row.
  return params['table_ZD'].at[position_BL].get(mode='fill', fill_value=jnp.nan)


def learned(max_length: int = 2048) -> base.Encoding:
  """Learned positions 0 .. max_length - 1; there is none beyond, and longer inputs are refused.

  Args:
    max_length: rows of the table [tokens].

  Raises:
    errors.UserError: if max_length is not positive.
  """
  if max_length < 1:
    raise errors.UserError(f'learned positions need {max_length=} to be at least 1')
  return base.Encoding(
    name='learned',
    init=functools.partial(_init, max_length=max_length),
    embed=_embed,
    shared=True,
    shift_invariant=False,
    learned=True,
    max_length=max_length,
  )
