"""The logits of one tile of queries and keys under any encoding: what all implementations compute."""

import functools

import jax
import jax.numpy as jnp

from lex_fire import errors
from lex_fire.encodings import base

# The two factors of a decay share an origin in the middle of the tile. Beyond this many nats a factor is
# clipped: those keys lie in the query's future or the product underflows anyway.
MAX_LOG_FACTOR = 40.0


def logits(
  query_BHQC: jax.Array,
  key_BGKC: jax.Array,
  *,
  encoding: base.Encoding,
  params: base.Params,
  query_position_BQ: jax.Array,
  key_position_BK: jax.Array,
) -> jax.Array:
  """Returns logits_BHQK, float32 nats, before the mask.

  Args:
    query_BHQC, key_BGKC: rotated already; G divides H, and head h reads key head h // (H / G).
    encoding, params: for the decay and the bias.
    query_position_BQ, key_position_BK: int32; B may be 1.

  Raises:
    errors.UserError: if the encoding decays and the tile is too wide for float32.
  """
  num_heads, head_dim = query_BHQC.shape[1], query_BHQC.shape[3]
  if encoding.log_decay is not None:
    query_BHQC, key_BGKC = _decay(
      query_BHQC, key_BGKC, encoding, query_position_BQ, key_position_BK
    )
  logits_BHQK = per_group('BGQC,BGKC->BGQK', query_BHQC * head_dim**-0.5, key_BGKC)
  if encoding.bias is not None:
    bias_BHQK = encoding.bias(params, query_position_BQ, key_position_BK, num_heads)
    if bias_BHQK.shape[0] == 1:
      bias_BHQK = _to_rows(bias_BHQK, logits_BHQK.shape[0])
    logits_BHQK += bias_BHQK
  return logits_BHQK


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _to_rows(bias_1HQK, batch):
  """Repeats a bias for every row; its gradient is a product with ones, on CPU 80 times faster than a sum."""
  return jnp.broadcast_to(bias_1HQK, (batch, *bias_1HQK.shape[1:]))


def _to_rows_backward(batch, _, d_bias_BHQK):
  ones_B = jnp.ones(batch, d_bias_BHQK.dtype)
  d_bias_HQK = jnp.einsum('B,BHQK->HQK', ones_B, d_bias_BHQK, precision=jax.lax.Precision.HIGHEST)
  return (d_bias_HQK[None],)


_to_rows.defvjp(lambda bias_1HQK, batch: (_to_rows(bias_1HQK, batch), None), _to_rows_backward)


def per_group(equation: str, rows_BHQC: jax.Array, keys_BGKC: jax.Array) -> jax.Array:
  """Returns einsum(equation, rows, keys) in float32, where the H / G heads that share a key head are its rows.

  Heads come first, so that each product is one plain matrix product a key head: on CPU three times
  faster than with heads inside.
  """
  batch, heads, rows, _ = rows_BHQC.shape
  rows_BGQC = rows_BHQC.reshape(batch, keys_BGKC.shape[1], -1, rows_BHQC.shape[3])
  out = jnp.einsum(equation, rows_BGQC, keys_BGKC, preferred_element_type=jnp.float32)
  return out.reshape(batch, heads, rows, -1)

  if encoding.bias is not None:
    bias_BHQK = encoding.bias(params, query_position_BQ, key_position_BK, num_heads)
    if bias_BHQK.shape[0] == 1:
      bias_BHQK = _to_rows(bias_BHQK, logits_BHQK.shape[0])
    logits_BHQK += bias_BHQK
  return logits_BHQK


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _to_rows(bias_1HQK, batch):
  """Repeats a bias for every row; its gradient is a product with ones, on CPU 80 times faster than a sum."""
  return jnp.broadcast_to(bias_1HQK, (batch, *bias_1HQK.shape[1:]))


def _to_rows_backward(batch, _, d_bias_BHQK):
  ones_B = jnp.ones(batch, d_bias_BHQK.dtype)
  d_bias_HQK = jnp.einsum('B,BHQK->HQK', ones_B, d_bias_BHQK, precision=jax.lax.Precision.HIGHEST)
  return (d_bias_HQK[None],)


_to_rows.defvjp(lambda bias_1HQK, batch: (_to_rows(bias_1HQK, batch), None), _to_rows_backward)


def _decay(query_BHQC, key_BGKC, encoding, query_position_BQ, key_position_BK):
  """Multiplies q_i by exp(r (i - o)) and k_j by exp(r (o - j)), so that each pair carries exp(r (i - j)).

  The origin o lies midway between the first query and the last key that a query can see, so both
  exponents are at most half a tile's width on the wrong side of 0: neither factor overflows.
  """
  log_decay_C = encoding.log_decay(query_BHQC.shape[-1])
  widest = int(2 * MAX_LOG_FACTOR / max(-log_decay_C.min(), 1e-9))
  if query_BHQC.shape[2] > widest:
    raise errors.UserError(
      f'{encoding.name} decays too fast for one tile of {query_BHQC.shape[2]} queries in float32 '
      f"(at most {widest}); use implementation='chunked'"
    )
  last_query_B = query_position_BQ.max(axis=1)
  last_key_B = jnp.minimum(key_position_BK.max(axis=1), last_query_B)
  origin_B1 = ((query_position_BQ.min(axis=1) + last_key_B) // 2)[:, None]

  def scale(x_BHLC, offset_BL):
    rate_11C = jnp.asarray(log_decay_C, jnp.float32)[None, None]
    factor_BLC = jnp.exp(jnp.minimum(offset_BL[:, :, None] * rate_11C, MAX_LOG_FACTOR))
    return (x_BHLC.astype(jnp.float32) * factor_BLC[:, None]).astype(x_BHLC.dtype)

  return scale(query_BHQC, query_position_BQ - origin_B1), scale(
    key_BGKC, origin_B1 - key_position_BK
  )
