"""Attention in tiles (XLA on any platform): memory linear in length, and hidden tiles are skipped.

The online softmax of FlashAttention (Dao et al. 2022, arXiv:2205.14135) with its own backward pass,
over any encoding: a tile's logits are recomputed and differentiated by `jax.vjp`, so the gradient
of a learned bias is summed over tiles, in a fixed order, and no [Q, K] array ever exists.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lex_fire.encodings import piecewise
from lex_fire.kernels import decay, plan, residuals, tile
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
  pieces: int = 1,
  make_flash: Callable[..., Any] | None = None,
) -> jax.Array:
  """Returns out_BQHC like `reference.attention`, in tiles of `block` queries by `block` keys.

  Args:
    query_BQHC: see `kernels.attention`, as for all that is not said here.
    key_BKGC: likewise.
    value_BKGC: likewise.
    encoding: likewise.
    params: likewise.
    query_position_BQ: likewise.
    key_position_BK: likewise.
    query_segment_BQ: likewise.
    key_segment_BK: likewise.
    mask: likewise.
    block: of queries and of keys, at most [tokens].
    pieces: equal parts of a row, of queries and of keys, that follow one another in the array
      and not in the text: no tile reaches from one into the next.
    make_flash: (encoding, mask) -> what computes the blocks, as `flash` makes it; None: `flash`.
  """
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
    encoding = piecewise.tabulated(encoding)
  if encoding.log_decay is not None:
    block = min(block, max(1, decay.widest(encoding.log_decay(query_BQHC.shape[3]))))
  queries, keys = _cut(
    block,
    pieces,
    (query_BQHC, query_position_BQ, query_segment_BQ),
    (key_BKGC, value_BKGC, key_position_BK, key_segment_BK),
  )
  out_IBHQC = (make_flash or flash)(encoding, mask)(params, queries, keys)
  out_BIQHC = out_IBHQC.transpose(1, 0, 3, 2, 4)
  rows, length, *heads = query_BQHC.shape
  out_BQHC = out_BIQHC.reshape(rows * pieces, -1, *heads)[:, : length // pieces]
  return out_BQHC.reshape(query_BQHC.shape)


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


def _cut(block, pieces, queries, keys) -> tuple[Queries, Keys]:
  """Returns queries and keys in whole blocks; see `attention`."""
  query_BQHC, query_position_BQ, query_segment_BQ = queries
  key_BKGC, value_BKGC, key_position_BK, key_segment_BK = keys
  num_queries, num_keys = query_BQHC.shape[1], key_BKGC.shape[1]
  query_piece, key_piece = num_queries // pieces, num_keys // pieces
  query_block, key_block = _even(query_piece, block), _even(key_piece, block)
  if query_segment_BQ is None and (query_piece % query_block or key_piece % key_block):
    query_segment_BQ = jnp.zeros((1, num_queries), jnp.int32)
    key_segment_BK = jnp.zeros((1, num_keys), jnp.int32)
  of_query = functools.partial(_blocks, block=query_block, pieces=pieces)
  of_key = functools.partial(_blocks, block=key_block, pieces=pieces)
  return (
    Queries(
      _heads_first(of_query(query_BQHC, fill=0)),
      of_query(query_position_BQ, fill='last'),
      None if query_segment_BQ is None else of_query(query_segment_BQ, fill=plan.PAD_QUERY),
    ),
    Keys(
      _heads_first(of_key(key_BKGC, fill=0)),
      _heads_first(of_key(value_BKGC, fill=0)),
      of_key(key_position_BK, fill='last'),
      None if key_segment_BK is None else of_key(key_segment_BK, fill=plan.PAD_KEY),
    ),
  )


def _even(length: int, most: int) -> int:
  """Returns the size of the fewest blocks of at most so many tokens, all about equally large.

  Of 130 tokens 72 and 58, and not 128 and 2: what fills a block up costs as much as tokens. Of
  several it is a multiple of 8 where it can be, as registers are.
  """
  count = -(-length // most)
  return length if count == 1 else min(most, -(-length // (8 * count)) * 8)


def _heads_first(x_IBLHC):
  return jnp.swapaxes(x_IBLHC, 2, 3)


def _blocks(array, *, block, pieces, fill):
  """Cuts each piece of axis 1 into blocks, padded with fill, and puts the blocks first.

  [B, L, ...] -> [I, B, block, ...]
  """
  rows, length, *rest = array.shape
  array = array.reshape(rows, pieces, length // pieces, *rest)
  pad = [(0, 0), (0, 0), (0, -array.shape[2] % block)] + [(0, 0)] * len(rest)
  # Padding repeats the last position, so that it does not widen the range a tile seems to span.
  options = {'mode': 'edge'} if fill == 'last' else {'constant_values': fill}
  cut = jnp.pad(array, pad, **options).reshape(rows, -1, block, *rest)
  return jnp.moveaxis(cut, 1, 0)


def tiles_to_visit(mask: mask_lib.Mask, queries: Queries, keys: Keys) -> jax.Array:
  """Returns visit_IJ, boolean, from bounds: whether a query of block I may see a key of block J."""

  def bounds(array_IBL) -> Any:
    return None if array_IBL is None else plan.Bounds(array_IBL.min(axis=2), array_IBL.max(axis=2))

  visit_IJB = plan.visits(
    mask,
    bounds(queries.position_IBQ),
    bounds(keys.position_JBK),
    bounds(queries.segment_IBQ),
    bounds(keys.segment_JBK),
  )
  return visit_IJB.any(axis=2)


def flash(encoding, mask):
  """Makes (params, Queries, Keys) -> out_IBHQC with flash attention's own gradient."""

  def forward(params, queries, keys):
    carry = add_keys(encoding, mask, params, queries, keys, softmax_start(queries))
    out_IBHQC, log_norm_IBHQ = softmax_end(carry)
    out_IBHQC = out_IBHQC.astype(keys.value_JBGKC.dtype)
    out_IBHQC, log_norm_IBHQ = residuals.named(out_IBHQC, log_norm_IBHQ)
    return out_IBHQC, (params, queries, keys, out_IBHQC, log_norm_IBHQ)

  def backward(saved, d_out_IBHQC):
    params, queries, keys, out_IBHQC, log_norm_IBHQ = saved
    of_out = (d_out_IBHQC, delta(d_out_IBHQC, out_IBHQC), log_norm_IBHQ)
    sums = gradients(encoding, mask, params, queries, keys, of_out)
    return cotangents(sums, queries, keys)

  @jax.custom_vjp
  def attend(params, queries, keys):
    return forward(params, queries, keys)[0]

  attend.defvjp(forward, backward)
  return attend


def add_keys(encoding, mask, params, queries: Queries, keys: Keys, carry):
  """Returns the running softmax of the queries with these keys too, a tile at a time."""

  def visit(carry, i, j, block, key_block):
    del j
    logits_BHQK = _logits(
      encoding, mask, params, block.query_IBHQC, key_block.key_JBGKC, block, key_block
    )
    logits_BHQK = _hide(mask, logits_BHQK, block, key_block)
    of_block = _softmax_step(_take(carry, i), logits_BHQK, key_block.value_JBGKC)
    return jax.tree.map(lambda all_I, one: all_I.at[i].set(one), carry, of_block)

  return _for_each_tile(mask, queries, keys, visit, carry)


def delta(d_out_IBHQC, out_IBHQC):
  """Returns sum_k p_k dp_k of each query, which the softmax's gradient subtracts, float32."""
  return (d_out_IBHQC.astype(jnp.float32) * out_IBHQC.astype(jnp.float32)).sum(axis=-1)


def gradients(encoding, mask, params, queries: Queries, keys: Keys, of_out):
  """Returns the gradients of params, query, key and value that these keys have a part in, float32.

  Args:
    encoding: see `attention`.
    mask: likewise.
    params: likewise.
    queries: all that `of_out` is of.
    keys: some of those, or all, that the queries attended to.
    of_out: d_out_IBHQC, its `delta`, and the log of the softmax's normaliser over all keys.
  """

  def visit(sums, i, j, block, key_block):
    """Adds the tile's share."""
    d_out_BHQC, delta_BHQ, log_norm_BHQ = _take(of_out, i)
    logits_BHQK, vjp = jax.vjp(
      lambda params, query, key: _logits(encoding, mask, params, query, key, block, key_block),
      params,
      block.query_IBHQC,
      key_block.key_JBGKC,
    )
    hidden_BHQK = _hide(mask, logits_BHQK, block, key_block)
    weights_BHQK = jnp.exp(hidden_BHQK - log_norm_BHQ[..., None])
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

  start = zeros((params, queries.query_IBHQC, *keys[:2]))
  return _for_each_tile(mask, queries, keys, visit, start)


def cotangents(sums, queries: Queries, keys: Keys):
  """Returns gradients as a backward pass of (params, queries, keys) gives them."""
  d_params, d_query, d_key, d_value = sums
  d_query = d_query.astype(queries.query_IBHQC.dtype)
  d_key, d_value = d_key.astype(keys.key_JBGKC.dtype), d_value.astype(keys.value_JBGKC.dtype)
  # None: positions and segments are integers and have no gradient.
  nothing: Any = None
  return d_params, Queries(d_query, nothing, nothing), Keys(d_key, d_value, nothing, nothing)


def _logits(encoding, mask, params, query_BHQC, key_BGKC, queries, keys):
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


def _hide(mask, logits_BHQK, queries, keys):
  visible_BQK = mask_lib.visible(
    mask, queries.position_IBQ, keys.position_JBK, queries.segment_IBQ, keys.segment_JBK
  )
  return jnp.where(visible_BQK[:, None], logits_BHQK, mask_lib.HIDDEN_LOGIT)


def _for_each_tile(mask, queries, keys, visit, start):
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


def zeros(tree):
  """Returns the start of a sum of such arrays, float32."""
  return jax.tree.map(lambda array: jnp.zeros(array.shape, jnp.float32), tree)


def _take(tree, index):
  """Returns one block of each array."""
  return jax.tree.map(lambda array_I: array_I[index], tree)


def softmax_start(queries: Queries):
  """Returns the running softmax of no keys: (weighted sum of values, maximum, sum of weights)."""
  shape = queries.query_IBHQC.shape
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


def softmax_end(carry):
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
