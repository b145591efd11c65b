"""The logits of one tile of queries and keys under any encoding: what each kernel computes."""

import jax
import jax.numpy as jnp

from lex_fire.encodings import base
from lex_fire.kernels import decay


def prepare(
  query_BQHC: jax.Array,
  key_BKGC: jax.Array,
  *,
  encoding: base.Encoding,
  query_position_BQ: jax.Array,
  key_position_BK: jax.Array,
  causal: bool,
) -> tuple[jax.Array, jax.Array]:
  """Returns rotated queries and keys as `logits` wants them: what is done once and not a tile.

  Queries are divided by sqrt(C). A causal decay is applied as far as it can be; a bidirectional one
  is left to the tiles, as it has other factors for keys before and after the query.
  """
  if encoding.log_decay is not None and causal:
    log_decay_C = encoding.log_decay(query_BQHC.shape[3])
    query_BQHC, key_BKGC = decay.within_stretch(
      query_BQHC, key_BKGC, log_decay_C, query_position_BQ, key_position_BK
    )
  return query_BQHC * query_BQHC.shape[3] ** -0.5, key_BKGC


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
    query_BHQC: from `prepare`, heads first.
    key_BGKC: likewise; G divides H, and head h reads key head h // (H / G).
    encoding: for the decay and the bias.
    params: the encoding's.
    query_position_BQ: int32; B may be 1.
    key_position_BK: likewise.
    query_segment_BQ: or None: all is one segment; logits across segments mean nothing.
    key_segment_BK: likewise.
    causal: as given to `prepare`; True if logits of keys after the query will be hidden, and need
      no meaning.

  Raises:
    errors.UserError: if the encoding decays and the tile is too wide for float32.
  """

  if encoding.log_decay is None:
    logits_BHQK = _products(query_BHQC, key_BGKC)
  else:
    logits_BHQK = _decayed_products(
      query_BHQC,
      key_BGKC,
      encoding.log_decay(query_BHQC.shape[3]),
      (query_position_BQ, key_position_BK),
      (query_segment_BQ, key_segment_BK),
      causal,
    )
  if encoding.bias is not None:
    bias_BHQK = encoding.bias(params, query_position_BQ, key_position_BK, query_BHQC.shape[1])
    if bias_BHQK.shape[0] == 1:
      bias_BHQK = _to_rows(bias_BHQK, logits_BHQK.shape[0])
    logits_BHQK += bias_BHQK
  return logits_BHQK


@jax.custom_vjp
def _products(query_BHQC, key_BGKC):
  return per_group('BGQC,BGKC->BGQK', query_BHQC, key_BGKC)


def _products_backward(saved, d_logits_BHQK):
  query_BHQC, key_BGKC = saved
  d_query_BHQC = per_group('BGQK,BGKC->BGQC', d_logits_BHQK, key_BGKC)
  rows = (*key_BGKC.shape[:2], -1)  # heads that share a key head are its rows
  d_logits_BGQK = d_logits_BHQK.reshape(*rows, d_logits_BHQK.shape[3])
  d_key_BGKC = summed_over_queries(d_logits_BGQK, query_BHQC.reshape(*rows, query_BHQC.shape[3]))
  return d_query_BHQC.astype(query_BHQC.dtype), d_key_BGKC.astype(key_BGKC.dtype)


_products.defvjp(lambda *arrays: (_products(*arrays), arrays), _products_backward)


def summed_over_queries(weights_BGQK: jax.Array, rows_BGQC: jax.Array) -> jax.Array:
  """Returns sum_Q weights_QK rows_QC as BGKC, float32.

  Transposed at the end: a product that has to transpose the weights takes 1.3 times as long on CPU.
  """
  sum_BGCK = jnp.einsum(
    'BGQC,BGQK->BGCK', rows_BGQC, weights_BGQK, preferred_element_type=jnp.float32
  )
  return jnp.swapaxes(sum_BGCK, 2, 3)


def _decayed_products(query_BHQC, key_BGKC, log_decay_C, positions, segments, causal):
  """Returns the products with what decay `prepare` has left to a tile."""

  def between(*positions):
    return _products(*decay.between(query_BHQC, key_BGKC, log_decay_C, *positions, *segments))

  if not causal:
    past_BHQK, future_BHQK = between(*positions), between(*(-position for position in positions))
    after_BQK = base.distance(*positions) < 0
    return jnp.where(after_BQK[:, None], future_BHQK, past_BHQK)
  middles = [decay.middle_of_stretch(position, log_decay_C) for position in positions]
  return jax.lax.cond(
    decay.all_equal(*middles),
    lambda: _products(query_BHQC, key_BGKC),
    lambda: between(*middles),
  )


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
