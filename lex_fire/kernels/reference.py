"""Dense attention: the definition, with the whole [B, H, Q, K] array of logits."""

import jax
import jax.numpy as jnp

from lex_fire.kernels import mask as mask_lib
from lex_fire.kernels import tile


def attention(
  query_BQHC: jax.Array,
  key_BKGC: jax.Array,
  value_BKGC: jax.Array,
  *,
  encoding,
  params,
  query_position_BQ: jax.Array,
  key_position_BK: jax.Array,
  query_segment_BQ: jax.Array | None,
  key_segment_BK: jax.Array | None,
  mask: mask_lib.Mask,
) -> jax.Array:
  """Returns out_BQHC in the value's dtype: softmax in float32; a query that sees no key gets zeros.

  See `kernels.attention` for the arguments.
  """
  query_BQHC, key_BKGC = tile.prepare(
    query_BQHC,
    key_BKGC,
    encoding=encoding,
    query_position_BQ=query_position_BQ,
    key_position_BK=key_position_BK,
    causal=mask.causal,
  )
  query_BHQC, key_BGKC, value_BGKC = (
    jnp.swapaxes(x_BLHC, 1, 2) for x_BLHC in (query_BQHC, key_BKGC, value_BKGC)
  )
  logits_BHQK = tile.logits(
    query_BHQC,
    key_BGKC,
    encoding=encoding,
    params=params,
    query_position_BQ=query_position_BQ,
    key_position_BK=key_position_BK,
    query_segment_BQ=query_segment_BQ,
    key_segment_BK=key_segment_BK,
    causal=mask.causal,
  )
  visible_BQK = mask_lib.visible(
    mask, query_position_BQ, key_position_BK, query_segment_BQ, key_segment_BK
  )
  visible_B1QK = visible_BQK[:, None]
  weights_BHQK = jax.nn.softmax(
    jnp.where(visible_B1QK, logits_BHQK, mask_lib.HIDDEN_LOGIT), axis=-1
  )
  weights_BHQK = jnp.where(visible_B1QK, weights_BHQK, 0.0).astype(value_BKGC.dtype)
  out_BHQC = tile.per_group('BGQK,BGKC->BGQC', weights_BHQK, value_BGKC)
  return jnp.swapaxes(out_BHQC, 1, 2).astype(value_BKGC.dtype)
