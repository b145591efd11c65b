"""Attention in tiles (XLA on any platform): memory linear in length, and hidden tiles are skipped.

The online softmax of FlashAttention (Dao et al. 2022, arXiv:2205.14135) with its own backward pass,
over any encoding: a tile's logits are recomputed and differentiated by `jax.vjp`, so the gradient
of a learned bias is summed over tiles, in a fixed order, and no [Q, K] array ever exists.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lex_fire.encodings import piecewise
from lex_fire.kernels import decay, plan, tile
from lex_fire.kernels import mask as mask_lib

# Measured on 2 CPU cores: larger tiles of an MLP bias leave the cache (FIRE, 4096 tokens: 1.0 s at
# 128, 2.4 s at 512).
BLOCK = 128


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
  block: int = BLOCK,
) -> jax.Array:
  """Returns out_BQHC like `reference.attention`, in tiles of `block` queries by `block` keys."""
  query_BQHC, key_BKGC = tile.prepare(
    query_BQHC,
    key_BKGC,
    encoding=encoding,
    query_position_BQ=query_position_BQ,
    key_position_BK=key_position_BK,
    causal=mask.causal,
  )
  if encoding.table is not None:
    params = encoding.table(params, query_BQHC.shape[2])
    bias = functools.partial(piecewise.bias_of_table, coordinate=encoding.coordinate)
    encoding = encoding._replace(bias=bias)
  if encoding.log_decay is not None:
    block = min(block, max(1, decay.widest(encoding.log_decay(query_BQHC.shape[3]))))
  num_queries, num_keys = query_BQHC.shape[1], key_BKGC.shape[1]
  query_block, key_block = min(block, num_queries), min(block, num_keys)
  if query_segment_BQ is None and (num_queries % query_block or num_keys % key_block):
    query_segment_BQ = jnp.zeros((1, num_queries), jnp.int32)
    key_segment_BK = jnp.zeros((1, num_keys), jnp.int32)
  queries = Queries(
    _heads_first(_blocks(query_BQHC, query_block, 0)),
    _blocks(query_position_BQ, query_block, 'last'),
    None if query_segment_BQ is None else _blocks(query_segment_BQ, query_block, plan.PAD_QUERY),
  )
  keys = Keys(
    _heads_first(_blocks(key_BKGC, key_block, 0)),
    _heads_first(_blocks(value_BKGC, key_block, 0)),
    _blocks(key_position_BK, key_block, 'last'),
    None if key_segment_BK is None else _blocks(key_segment_BK, key_block, plan.PAD_KEY),
  )
  out_IBHQC = _flash(encoding, mask)(params, queries, keys)
  out_BIQHC = out_IBHQC.transpose(1, 0, 3, 2, 4)
  return out_BIQHC.reshape(query_BQHC.shape[0], -1, *query_BQHC.shape[2:])[:, :num_queries]


class Queries(NamedTuple):
  """Queries in blocks I of equal size; without the I, one block."""

  query_IBHQC: jax.Array
  position_IBQ: jax.Array
  segment_IBQ: jax.Array | None


class Keys(NamedTuple):
  """Keys and values in blocks J of equal size; without the J, one block."""

  key_JBGKC: jax.Array
  value_JBGKC: jax.Array
  position_JBK: jax.Array
  segment_JBK: jax.Array | None


def _heads_first(x_IBLHC):
  return jnp.swapaxes(x_IBLHC, 2, 3)


def _blocks(array, block, fill):
  """Cuts axis 1 into blocks, padded with fill, and puts them first.

  [B, L, ...] -> [L / block, B, block, ...]
  """
  pad = [(0, 0), (0, -array.shape[1] % block)] + [(0, 0)] * (array.ndim - 2)
  # Padding repeats the last position, so that it does not widen the range a tile seems to span.
  options = {'mode': 'edge'} if fill == 'last' else {'constant_values': fill}
  padded = jnp.pad(array, pad, **options)
  cut = padded.reshape(array.shape[0], -1, block, *array.shape[2:])
  return jnp.moveaxis(cut, 1, 0)


def tiles_to_visit(mask: mask_lib.Mask, queries: Queries, keys: Keys) -> jax.Array:
  """Returns visit_IJ, boolean, from bounds: whether a query of block I may see a key of block J."""

  def bounds(array_IBL) -> Any:
    return None if array_IBL is None else plan.Bounds(array_IBL.min(axis=2), array_IBL.max(axis=2))

  return plan.visits(
    mask,
    bounds(queries.position_IBQ),
    bounds(keys.position_JBK),
    bounds(queries.segment_IBQ),
    bounds(keys.segment_JBK),
  )


def _flash(encoding, mask):
  """Makes (params, Queries, Keys) -> out_IBHQC with flash attention's own gradient."""

  def logits(params, query_BHQC, key_BGKC, queries, keys):
    return tile.logits(
      query_BHQC,
      key_BGKC,
      encoding=encoding,
      params=params,
      query_position_BQ=queries.position_IBQ,
      key_position_BK=keys.position_JBK,
      query_segment_BQ=queries.segment_IBQ,
      key_segment_BK=keys.segment_JBK,
      causal=mask.causal,
    )

  def hide(logits_BHQK, queries, keys):
    visible_BQK = mask_lib.visible(
      mask, queries.position_IBQ, keys.position_JBK, queries.segment_IBQ, keys.segment_JBK
    )
    return jnp.where(visible_BQK[:, None], logits_BHQK, mask_lib.HIDDEN_LOGIT)

  def for_each_tile(queries, keys, visit, start):
    """Folds visit(carry, i, j, queries of block i, keys of block j) over the tiles to visit.

    Row by row. Only these are steps, and a step changes its blocks of the carry in place: sums over
    whole rows of tiles, hidden ones too, took a sixth of the time.
    """
    visit_IJ = tiles_to_visit(mask, queries, keys)
    i_Z, j_Z = jnp.nonzero(visit_IJ, size=visit_IJ.size)

    def step(z, carry):
      i, j = i_Z[z], j_Z[z]
      return visit(carry, i, j, _take(queries, i), _take(keys, j))

    return jax.lax.fori_loop(0, visit_IJ.sum(), step, start)

  def forward(params, queries, keys):
    def visit(carry, i, j, block, key_block):
      del j
      logits_BHQK = logits(params, block.query_IBHQC, key_block.key_JBGKC, block, key_block)
      of_block = _softmax_step(
        _take(carry, i), hide(logits_BHQK, block, key_block), key_block.value_JBGKC
      )
      return jax.tree.map(lambda all_I, one: all_I.at[i].set(one), carry, of_block)

    start = _softmax_start(queries.query_IBHQC)
    out_IBHQC, log_norm_IBHQ = _softmax_end(for_each_tile(queries, keys, visit, start))
    out_IBHQC = out_IBHQC.astype(keys.value_JBGKC.dtype)
    return out_IBHQC, (params, queries, keys, out_IBHQC, log_norm_IBHQ)

  def backward(saved, d_out_IBHQC):
    params, queries, keys, out_IBHQC, log_norm_IBHQ = saved
    # sum_k p_k dp_k of each query, which the softmax's gradient subtracts
    delta_IBHQ = (d_out_IBHQC.astype(jnp.float32) * out_IBHQC.astype(jnp.float32)).sum(axis=-1)

    def visit(sums, i, j, block, key_block):
      """Adds the tile's share of the gradients of params, query, key and value."""
      d_out_BHQC, delta_BHQ, log_norm_BHQ = _take((d_out_IBHQC, delta_IBHQ, log_norm_IBHQ), i)
      logits_BHQK, vjp = jax.vjp(
        lambda params, query, key: logits(params, query, key, block, key_block),
        params,
        block.query_IBHQC,
        key_block.key_JBGKC,
      )
      weights_BHQK = jnp.exp(hide(logits_BHQK, block, key_block) - log_norm_BHQ[..., None])
      value_BGKC = key_block.value_JBGKC
      d_weights_BHQK = tile.per_group('BGQC,BGKC->BGQK', d_out_BHQC, value_BGKC)
      of_params, of_query, of_key = vjp(weights_BHQK * (d_weights_BHQK - delta_BHQ[..., None]))
      of_value = _value_gradient(weights_BHQK.astype(d_out_BHQC.dtype), d_out_BHQC, value_BGKC)
      d_params, d_query_IBHQC, d_key_JBGKC, d_value_JBGKC = sums
      return (
        jax.tree.map(jnp.add, d_params, of_params),
        d_query_IBHQC.at[i].add(of_query.astype(jnp.float32)),
        d_key_JBGKC.at[j].add(of_key.astype(jnp.float32)),
        d_value_JBGKC.at[j].add(of_value),
      )

    start = _zeros((params, queries.query_IBHQC, *keys[:2]))
    d_params, d_query, d_key, d_value = for_each_tile(queries, keys, visit, start)
    d_query = d_query.astype(queries.query_IBHQC.dtype)
    d_key, d_value = d_key.astype(keys.key_JBGKC.dtype), d_value.astype(keys.value_JBGKC.dtype)
    # None: positions and segments are integers and have no gradient.
    d_queries = queries._replace(query_IBHQC=d_query, position_IBQ=None, segment_IBQ=None)
    d_keys = keys._replace(
      key_JBGKC=d_key, value_JBGKC=d_value, position_JBK=None, segment_JBK=None
    )
    return d_params, d_queries, d_keys

  @jax.custom_vjp
  def flash(params, queries, keys):
    return forward(params, queries, keys)[0]

  flash.defvjp(forward, backward)
  return flash


def _zeros(tree):
  return jax.tree.map(lambda array: jnp.zeros(array.shape, jnp.float32), tree)


def _take(tree, index):
  """Returns one block of each array."""
  return jax.tree.map(lambda array_I: array_I[index], tree)


def _softmax_start(query_IBHQC):
  """The running softmax of no keys: (weighted sum of values, maximum, sum of weights)."""
  shape = query_IBHQC.shape
  return (
    jnp.zeros(shape, jnp.float32),
    jnp.full(shape[:-1], 2 * mask_lib.HIDDEN_LOGIT, jnp.float32),
    jnp.zeros(shape[:-1], jnp.float32),
  )


def _softmax_step(carry, logits_BHQK, value_BGKC):
  """Adds a tile's keys to the running softmax."""
  sum_BHQC, max_BHQ, norm_BHQ = carry
  new_max_BHQ = jnp.maximum(max_BHQ, logits_BHQK.max(axis=-1))
  shrink_BHQ = jnp.exp(max_BHQ - new_max_BHQ)
  weights_BHQK = jnp.exp(logits_BHQK - new_max_BHQ[..., None])
  values_BHQC = tile.per_group('BGQK,BGKC->BGQC', weights_BHQK.astype(value_BGKC.dtype), value_BGKC)
  sum_BHQC = sum_BHQC * shrink_BHQ[..., None] + values_BHQC
  return sum_BHQC, new_max_BHQ, norm_BHQ * shrink_BHQ + weights_BHQK.sum(axis=-1)


def _softmax_end(carry):
  """Returns out_IBHQC and the log of the softmax's normaliser.

  A query that saw no key gets 0 and +inf. With +inf, every weight exp(logit - inf) of the backward
  pass is 0.
  """
  sum_IBHQC, max_IBHQ, norm_IBHQ = carry
  seen_IBHQ = max_IBHQ > mask_lib.HIDDEN_LOGIT / 2
  norm_IBHQ = jnp.where(seen_IBHQ, norm_IBHQ, 1.0)
  out_IBHQC = jnp.where(seen_IBHQ[..., None], sum_IBHQC / norm_IBHQ[..., None], 0.0)
  return out_IBHQC, jnp.where(seen_IBHQ, max_IBHQ + jnp.log(norm_IBHQ), jnp.inf)


def _value_gradient(weights_BHQK, d_out_BHQC, value_BGKC):
  """Returns d_value_BGKC, float32: the sum over each key head's queries of weight times d_out."""
  batch, num_groups = value_BGKC.shape[:2]
  weights_BGQK = weights_BHQK.reshape(batch, num_groups, -1, weights_BHQK.shape[3])
  d_out_BGQC = d_out_BHQC.reshape(batch, num_groups, -1, d_out_BHQC.shape[3])
  return tile.summed_over_queries(weights_BGQK, d_out_BGQC)
