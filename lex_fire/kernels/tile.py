"""The logits of one tile of queries and keys under any encoding: what each kernel computes."""

import jax
import jax.numpy as jnp

from lex_fire.encodings import base
from lex_fire.kernels import decay


def logits(
  query_BHQC: jax.Array,
  key_BGKC: jax.Array,
  *,
  encoding: base.Encoding,
  params: base.Params,
  query_position_BQ: jax.Array,
  key_position_BK: jax.Array,
  query_segment_BQ: jax.Array | None,
  key_segment_BK: jax.Array | None,
  causal: bool,
) -> jax.Array:
  """Returns logits_BHQK, float32 nats, before the mask.

  Args:
    query_BHQC: rotated already.
    key_BGKC: rotated already; G divides H, and head h reads key head h // (H / G).
    encoding: for the decay and the bias.
    params: the encoding's.
    query_position_BQ: int32; B may be 1.
    key_position_BK: likewise.
    query_segment_BQ: or None: all is one segment; logits across segments mean nothing.
    key_segment_BK: likewise.
    causal: whether logits of keys after the query will be hidden, and need no meaning.

  Raises:
    errors.UserError: if the encoding decays and the tile is too wide for float32.
  """
  num_heads, head_dim = query_BHQC.shape[1], query_BHQC.shape[3]
  segments = (query_segment_BQ, key_segment_BK)

  def products(query_BHQC, key_BGKC):
    return per_group('BGQC,BGKC->BGQK', query_BHQC * head_dim**-0.5, key_BGKC)

  def decayed(query_position_BQ, key_position_BK):
    log_decay_C, positions = encoding.log_decay(head_dim), (query_position_BQ, key_position_BK)
    return products(*decay.apply(query_BHQC, key_BGKC, log_decay_C, *positions, *segments))

  if encoding.log_decay is None:
    logits_BHQK = products(query_BHQC, key_BGKC)
  else:
    logits_BHQK = decayed(query_position_BQ, key_position_BK)
    if not causal:
      after_BQK = base.distance(query_position_BQ, key_position_BK) < 0
      future_BHQK = decayed(-query_position_BQ, -key_position_BK)
      logits_BHQK = jnp.where(after_BQK[:, None], future_BHQK, logits_BHQK)
  if encoding.bias is not None:
    bias_BHQK = encoding.bias(params, query_position_BQ, key_position_BK, num_heads)
    if bias_BHQK.shape[0] == 1:
      bias_BHQK = _to_rows(bias_BHQK, logits_BHQK.shape[0])
    logits_BHQK += bias_BHQK
  return logits_BHQK


def _broadcast_rows(bias_1HQK: jax.Array, batch: int) -> jax.Array:
  return jnp.broadcast_to(bias_1HQK, (batch, *bias_1HQK.shape[1:]))


def _to_rows_backward(batch: int, _, d_bias_BHQK: jax.Array) -> tuple[jax.Array]:
  ones_B = jnp.ones(batch, d_bias_BHQK.dtype)
  d_bias_HQK = jnp.einsum('B,BHQK->HQK', ones_B, d_bias_BHQK, precision=jax.lax.Precision.HIGHEST)
  return (d_bias_HQK[None],)


# Repeats a bias for every row; its gradient is a product with ones, on CPU 80 times faster than a
# sum.
_to_rows = jax.custom_vjp(_broadcast_rows, nondiff_argnums=(1,))
_to_rows.defvjp(lambda bias_1HQK, batch: (_to_rows(bias_1HQK, batch), None), _to_rows_backward)


def per_group(equation: str, rows_BHQC: jax.Array, keys_BGKC: jax.Array) -> jax.Array:
  """Returns einsum(equation, rows, keys) in float32; heads that share a key head are its rows.

  Heads come first, so that each product is one plain matrix product a key head: on CPU three times
  faster than with heads inside.
  """
  batch, heads, rows, _ = rows_BHQC.shape
  rows_BGQC = rows_BHQC.reshape(batch, keys_BGKC.shape[1], -1, rows_BHQC.shape[3])
  out = jnp.einsum(equation, rows_BGQC, keys_BGKC, preferred_element_type=jnp.float32)
  return out.reshape(batch, heads, rows, -1)
