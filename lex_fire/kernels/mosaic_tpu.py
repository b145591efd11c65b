"""Attention as a Pallas kernel for TPU (Mosaic), with any bias or decay computed inside the tile.

The online softmax of FlashAttention (Dao et al. 2022, arXiv:2205.14135): a forward kernel, and two
backward ones, for queries and for keys. A bias is its encoding's `piecewise.Table`: from positions
alone, a tile computes x once for its heads and a line of it a head, and more only for breakpoints
that x can reach there, which `plan.segments` finds beforehand. The gradient of the table is a
running sum in scalar memory in the order of the grid: no [Q, K] array, and the same bits each run.

A decay (xPos) that `tile.prepare` has left to the tile is one factor a channel for each number of
stretches that a query is after a key; most tiles have one such number.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lex_fire import errors
from lex_fire.encodings import base
from lex_fire.kernels import decay, tile
from lex_fire.kernels import mask as mask_lib
from lex_fire.kernels import plan as plan_lib

BLOCK = 512  # queries, and keys, of a tile
LANES = 128  # of a vector register: a block is a multiple
# Heads of one tile share its positions, mask and x: as many as have these channels.
CHANNELS_TOGETHER = 512
VMEM_BYTES = 96 * 2**20  # of the 128 MiB of a v5e, v5p or v6e
_PAD_QUERY, _PAD_KEY = -1, -2  # segments of padding: equal to no segment, nor to each other


class Queries(NamedTuple):
  """Queries, padded to whole blocks; B of the integers may be 1, None is what no tile needs.

  Attributes:
    query_BHQC: prepared, heads first.
    position_B1Q: int32, as all below.
    first_B1Q: the first position that each may see.
    last_B1Q: the last.
    segment_B1Q: a query sees the keys of its own.
    stretch_B1Q: in which stretch of a decay it lies.
  """

  query_BHQC: Any
  position_B1Q: Any
  first_B1Q: Any
  last_B1Q: Any
  segment_B1Q: Any
  stretch_B1Q: Any


class Keys(NamedTuple):
  """Keys and values likewise."""

  key_BGKC: Any
  value_BGKC: Any
  position_B1K: Any
  segment_B1K: Any
  stretch_B1K: Any


class Setup(NamedTuple):
  """What is static of a kernel.

  Attributes:
    coordinate: the encoding's, or None.
    learned: whether the table has a gradient.
    stretch: positions in one of a decay's, or None.
    query_block: queries of a tile.
    key_block: keys of a tile.
    heads: heads of a tile.
    groups: their key heads.
    interpret: whether to run on any platform, slowly.
  """

  coordinate: Any
  learned: bool
  stretch: int | None
  query_block: int
  key_block: int
  heads: int
  groups: int
  interpret: bool


def why_not(encoding: base.Encoding, mask: mask_lib.Mask) -> str | None:
  """Returns why this kernel cannot serve an encoding under a mask, or None if it can."""
  if encoding.bias is not None and encoding.table is None:
    return f'mosaic_tpu needs a table of the bias, which {encoding.name!r} has not'
  if encoding.log_decay is not None and not mask.causal:
    return f'mosaic_tpu has the decay of {encoding.name!r} under a causal mask only'
  return None


def attention(
  query_BQHC: jax.Array,
  key_BKGC: jax.Array,
  value_BKGC: jax.Array,
  *,
  encoding: base.Encoding,
  params: base.Params,
  query_position_BQ: jax.Array,
  key_position_BK: jax.Array,
  query_segment_BQ: jax.Array | None,
  key_segment_BK: jax.Array | None,
  mask: mask_lib.Mask,
  block: int = BLOCK,
  interpret: bool = False,
) -> jax.Array:
  """Returns out_BQHC like `reference.attention`, in tiles of `block` queries by `block` keys.

  The block is a multiple of 128 on a TPU. Interpreted, it runs on any platform, slowly.

  Raises:
    errors.UserError: for a bias that has no table, or a decay without the causal mask.
  """
  reason = why_not(encoding, mask)
  if reason:
    raise errors.UserError(f"{reason}; use implementation='chunked'")
  query_BQHC, key_BKGC = tile.prepare(
    query_BQHC,
    key_BKGC,
    encoding=encoding,
    query_position_BQ=query_position_BQ,
    key_position_BK=key_position_BK,
    causal=mask.causal,
  )
  num_heads, channels = query_BQHC.shape[2:]
  groups = _groups_together(num_heads, key_BKGC.shape[2], channels)
  rate_1C = None if encoding.log_decay is None else encoding.log_decay(channels)[None]
  setup = Setup(
    coordinate=encoding.coordinate,
    learned=encoding.learned,
    stretch=None if rate_1C is None else decay.stretch_of(rate_1C),
    query_block=min(block, pl.cdiv(query_BQHC.shape[1], LANES) * LANES),
    key_block=min(block, pl.cdiv(key_BKGC.shape[1], LANES) * LANES),
    heads=groups * (num_heads // key_BKGC.shape[2]),
    groups=groups,
    interpret=interpret,
  )
  if query_segment_BQ is None and (
    query_BQHC.shape[1] % setup.query_block or key_BKGC.shape[1] % setup.key_block
  ):
    query_segment_BQ = jnp.zeros((1, query_BQHC.shape[1]), jnp.int32)
    key_segment_BK = jnp.zeros((1, key_BKGC.shape[1]), jnp.int32)
  queries = _queries(setup, mask, query_BQHC, query_position_BQ, query_segment_BQ)
  keys = _keys(setup, key_BKGC, value_BKGC, key_position_BK, key_segment_BK)
  table = None if encoding.table is None else encoding.table(params, num_heads)
  plan = _plan(setup, mask, table, queries, keys)
  out_BHQC = _flash(setup, rate_1C)(table, queries, keys, plan)
  return jnp.swapaxes(out_BHQC, 1, 2)[:, : query_BQHC.shape[1]]


def _groups_together(num_heads, num_groups, channels):
  """Returns how many key heads a tile has: a divisor of all."""
  most = max(1, CHANNELS_TOGETHER // (channels * (num_heads // num_groups)))
  return max(n for n in range(1, min(most, num_groups) + 1) if num_groups % n == 0)


def _padded(x_BLHC, block):
  """Returns x_BHLC with L a multiple of the block."""
  pad = [(0, 0), (0, 0), (0, -x_BLHC.shape[1] % block), (0, 0)]
  return jnp.pad(jnp.swapaxes(x_BLHC, 1, 2), pad)


def _padded_row(number_BL, block, fill=None):
  """Returns number_B1L, padded by `fill`; by its last if None, so that no block spans more."""
  if number_BL is None:
    return None
  how = {'mode': 'edge'} if fill is None else {'constant_values': fill}
  return jnp.pad(number_BL, [(0, 0), (0, -number_BL.shape[1] % block)], **how)[:, None]


def _queries(setup, mask, query_BQHC, position_BQ, segment_BQ):
  row = functools.partial(_padded_row, block=setup.query_block)
  return Queries(
    query_BHQC=_padded(query_BQHC, setup.query_block),
    position_B1Q=row(position_BQ),
    first_B1Q=row(mask.first(position_BQ)),
    last_B1Q=row(mask.last(position_BQ)),
    segment_B1Q=row(segment_BQ, fill=_PAD_QUERY),
    stretch_B1Q=None if setup.stretch is None else row(position_BQ // setup.stretch),
  )


def _keys(setup, key_BKGC, value_BKGC, position_BK, segment_BK):
  row = functools.partial(_padded_row, block=setup.key_block)
  return Keys(
    key_BGKC=_padded(key_BKGC, setup.key_block),
    value_BGKC=_padded(value_BKGC, setup.key_block),
    position_B1K=row(position_BK),
    segment_B1K=row(segment_BK, fill=_PAD_KEY),
    stretch_B1K=None if setup.stretch is None else row(position_BK // setup.stretch),
  )


def _plan(setup, mask, table, queries, keys):
  def bounds(number_B1L, block, axis):
    if number_B1L is None:
      return None
    number_IBL = jnp.moveaxis(number_B1L.reshape(len(number_B1L), -1, block), 1, 0)
    return plan_lib.Bounds(number_IBL.min(axis=axis), number_IBL.max(axis=axis))

  def of_queries(number_B1Q, axis=2):
    return bounds(number_B1Q, setup.query_block, axis)

  def of_keys(number_B1K, axis=2):
    return bounds(number_B1K, setup.key_block, axis)

  visit_IJ = plan_lib.visits(
    mask,
    of_queries(queries.position_B1Q),
    of_keys(keys.position_B1K),
    of_queries(queries.segment_B1Q),
    of_keys(keys.segment_B1K),
  )
  whole = (1, 2)  # a span serves all rows of the batch
  span = None
  if table is not None and table.lower_Z is not None:
    positions = of_queries(queries.position_B1Q, whole), of_keys(keys.position_B1K, whole)
    span = plan_lib.segments(table, setup.coordinate, *positions)
  elif setup.stretch is not None:
    stretches = of_queries(queries.stretch_B1Q, whole), of_keys(keys.stretch_B1K, whole)
    span = plan_lib.stretches_apart(*stretches)
  return plan_lib.make(visit_IJ, span)


class Tile:
  """The logits of one tile, inside a kernel, from refs to its blocks.

  Heads are numbered within the tile, and refs of tables flat, a head's numbers together.
  """

  def __init__(self, setup, span, first_head, queries, keys, table, rate_1C):
    self.setup, self.span, self.first_head, self.table = setup, span, first_head, table
    self.queries, self.keys, self.rate_1C = queries, keys, rate_1C
    self.i_Q1, self.j_1K = queries.position_B1Q[0].T, keys.position_B1K[0]
    self.visible_QK = self._visible()
    self.apart_QK = None
    if setup.stretch is not None:
      self.apart_QK = queries.stretch_B1Q[0].T - keys.stretch_B1K[0]
    self.shared_x_QK = None
    if table is not None and not _per_head(table):
      self.shared_x_QK = setup.coordinate(self.numbers(0), self.i_Q1, self.j_1K)

  def _visible(self):
    """Returns visible_QK, or None if all is."""
    queries, keys, j_1K = self.queries, self.keys, self.j_1K
    tests = []
    if queries.first_B1Q is not None:
      tests.append(queries.first_B1Q[0].T <= j_1K)
    if queries.last_B1Q is not None:
      tests.append(j_1K <= queries.last_B1Q[0].T)
    if queries.segment_B1Q is not None:
      tests.append(queries.segment_B1Q[0].T == keys.segment_B1K[0])
    return functools.reduce(jnp.logical_and, tests) if tests else None

  def numbers(self, head):
    """Returns the numbers of x for a head, scalars."""

    def of_head(number_H):
      return number_H[self.first_head + head if number_H.shape[0] > 1 else 0]

    return jax.tree.map(of_head, self.table.coordinate)

  def x(self, head):
    """Returns x_QK of a head."""
    if self.shared_x_QK is not None:
      return self.shared_x_QK
    return self.setup.coordinate(self.numbers(head), self.i_Q1, self.j_1K)

  def logits(self, head):
    """Returns the logits of a head, HIDDEN_LOGIT where hidden, and the slope of its bias."""
    logits_QK, slope = self._products(head), None
    if self.table is not None:
      bias_QK, slope = self._bias(head)
      logits_QK += bias_QK
    if self.visible_QK is not None:
      logits_QK = jnp.where(self.visible_QK, logits_QK, mask_lib.HIDDEN_LOGIT)
    return logits_QK, slope

  def _bias(self, head):
    """Returns bias_QK and its slope in x: slope_QK, or one number for all of the tile."""
    table, x_QK = self.table, self.x(head)
    if table.lower_Z is None:
      slope = table.slope_ZH[self.first_head + head]
      return slope * x_QK, slope
    start = (self.first_head + head) * (table.lower_Z.shape[0] - 1)

    def line(z):
      slope = table.slope_ZH[start + z]
      return table.value_ZH[start + z] + slope * (x_QK - table.anchor_Z[z]), slope

    def above(z, so_far):
      bias_QK, slope = line(z)
      above_QK = x_QK > table.lower_Z[z]
      return jnp.where(above_QK, bias_QK, so_far[0]), jnp.where(above_QK, slope, so_far[1])

    first, end = self.span
    bias_QK, slope = line(first)
    return jax.lax.fori_loop(first + 1, end, above, (bias_QK, jnp.full_like(bias_QK, slope)))

  def query(self, head):
    """Returns query_QC."""
    return self.queries.query_BHQC[0, head]

  def key_and_value(self, head):
    """Returns key_KC and value_KC that a head reads."""
    group = _group(self.setup, head)
    return self.keys.key_BGKC[0, group], self.keys.value_BGKC[0, group]

  def _products(self, head):
    query_QC, (key_KC, _) = self.query(head), self.key_and_value(head)
    if self.apart_QK is None:
      return _dot(query_QC, key_KC, (1, 1))

    def at(apart, so_far_QK):
      products_QK = _dot(self._decayed(query_QC, apart), key_KC, (1, 1))
      return jnp.where(self.apart_QK == apart, products_QK, so_far_QK)

    return jax.lax.fori_loop(*self.span, at, jnp.zeros(self.apart_QK.shape, jnp.float32))

  def _decayed(self, x_LC, apart):
    """Returns x times the decay between stretches so many apart, in its own dtype."""
    positions = jnp.float32(self.setup.stretch) * apart.astype(jnp.float32)
    return (x_LC.astype(jnp.float32) * jnp.exp(positions * self.rate_1C[...])).astype(x_LC.dtype)

  def _where_apart(self, d_logits_QK, apart):
    return jnp.where(self.apart_QK == apart, d_logits_QK, 0.0)

  def query_gradient(self, head, d_logits_QK):
    """Returns d_query_QC, float32."""
    key_KC, _ = self.key_and_value(head)
    if self.apart_QK is None:
      return _dot(d_logits_QK.astype(key_KC.dtype), key_KC, (1, 0))

    def add(apart, sum_QC):
      d_there_QK = self._where_apart(d_logits_QK, apart).astype(key_KC.dtype)
      return sum_QC + self._decayed(_dot(d_there_QK, key_KC, (1, 0)), apart)

    zeros_QC = jnp.zeros((self.setup.query_block, key_KC.shape[1]), jnp.float32)
    return jax.lax.fori_loop(*self.span, add, zeros_QC)

  def key_gradient(self, head, d_logits_QK):
    """Returns the share of a head in d_key_KC, float32."""
    query_QC = self.query(head)
    if self.apart_QK is None:
      return _dot(d_logits_QK.astype(query_QC.dtype), query_QC, (0, 0))

    def add(apart, sum_KC):
      d_there_QK = self._where_apart(d_logits_QK, apart).astype(query_QC.dtype)
      return sum_KC + _dot(d_there_QK, self._decayed(query_QC, apart), (0, 0))

    zeros_KC = jnp.zeros((self.setup.key_block, query_QC.shape[1]), jnp.float32)
    return jax.lax.fori_loop(*self.span, add, zeros_KC)

  def add_table_gradient(self, head, d_logits_QK, slope, sums):
    """Adds the share of a head to `sums`, a table of refs; returns d_x_QK."""
    table, x_QK = self.table, self.x(head)
    if table.lower_Z is None:
      sums.slope_ZH[0, 0, 0, head] += jnp.sum(d_logits_QK * x_QK)
    else:
      start = head * (table.lower_Z.shape[0] - 1)

      def add(z, _):
        inside_QK = (x_QK > table.lower_Z[z]) & (x_QK <= table.lower_Z[z + 1])
        d_here_QK = jnp.where(inside_QK, d_logits_QK, 0.0)
        sums.slope_ZH[0, 0, 0, start + z] += jnp.sum(d_here_QK * (x_QK - table.anchor_Z[z]))
        sums.value_ZH[0, 0, 0, start + z] += jnp.sum(d_here_QK)

      jax.lax.fori_loop(*self.span, add, None)
    d_x_QK = d_logits_QK * slope
    if self.shared_x_QK is None:
      self.add_numbers_gradient(head, d_x_QK, sums)
    return d_x_QK

  def add_numbers_gradient(self, head, d_x_QK, sums):
    """Adds the gradient of what x is computed from, of a head or of all that share it."""
    _, gradient = jax.vjp(
      lambda numbers: self.setup.coordinate(numbers, self.i_Q1, self.j_1K), self.numbers(head)
    )
    d_numbers = jax.tree.leaves(gradient(d_x_QK)[0])
    for ref, d_number in zip(jax.tree.leaves(sums.coordinate), d_numbers, strict=True):
      ref[0, 0, 0, head] += d_number


def _group(setup, head):
  """Returns the key head that a head reads; `//` would ask on which chip it is compiled."""
  return jax.lax.div(head, setup.heads // setup.groups)


def _per_head(table):
  return any(number_H.shape[0] > 1 for number_H in jax.tree.leaves(table.coordinate))


def _dot(a, b, axes):
  """Returns the matrix product over one axis of each, float32; of float32 in full precision."""
  full = a.dtype == b.dtype == jnp.float32
  return jax.lax.dot_general(
    a,
    b,
    (((axes[0],), (axes[1],)), ((), ())),
    precision=jax.lax.Precision.HIGHEST if full else None,
    preferred_element_type=jnp.float32,
  )


class Softmax(NamedTuple):
  """What the backward kernels take from the forward one; N blocks of H heads."""

  d_out_BHQC: Any
  log_norm_BNHQ: Any
  delta_BNHQ: Any  # sum_k p_k dp_k of each query, which the softmax's gradient subtracts


def _forward_kernel(
  low, high, _, queries, keys, table, rate_1C, out, log_norm, sums, largest, norms, *, setup
):
  """Visits tiles row by row: grid (batch, head block, query block, key block)."""
  step, steps = pl.program_id(3), pl.num_programs(3)
  at = pl.program_id(2) * steps + step
  first_head = pl.program_id(1) * setup.heads

  @pl.when(step == 0)
  def _():
    sums[...] = jnp.zeros_like(sums)
    largest[...] = jnp.full_like(largest, 2 * mask_lib.HIDDEN_LOGIT)
    norms[...] = jnp.zeros_like(norms)

  @pl.when(high[at] > 0)
  def _():
    tile = Tile(setup, (low[at], high[at]), first_head, queries, keys, table, rate_1C)

    def add(head):
      logits_QK, _ = tile.logits(head)
      _, value_KC = tile.key_and_value(head)
      largest_Q1 = jnp.maximum(largest[head], logits_QK.max(axis=1, keepdims=True))
      shrink_Q1 = jnp.exp(largest[head] - largest_Q1)
      weights_QK = jnp.exp(logits_QK - largest_Q1)
      values_QC = _dot(weights_QK.astype(value_KC.dtype), value_KC, (1, 0))
      sums[head] = sums[head] * shrink_Q1 + values_QC
      norms[head] = norms[head] * shrink_Q1 + weights_QK.sum(axis=1, keepdims=True)
      largest[head] = largest_Q1

    _each(setup.heads, add)

  @pl.when(step == steps - 1)
  def _():
    def write(head):
      """A query that saw no key gets 0 and +inf: exp(logit - inf) is 0 in the backward pass."""
      seen_Q1 = largest[head] > mask_lib.HIDDEN_LOGIT / 2
      norm_Q1 = jnp.where(seen_Q1, norms[head], 1.0)
      out[0, head] = jnp.where(seen_Q1, sums[head] / norm_Q1, 0.0).astype(out.dtype)
      log_norm_Q1 = jnp.where(seen_Q1, largest[head] + jnp.log(norm_Q1), jnp.inf)
      log_norm[0, 0, pl.ds(head, 1)] = log_norm_Q1.T

    _each(setup.heads, write)


def _each(count, function):
  jax.lax.fori_loop(0, count, lambda index, _: function(index), None)


def _weights_and_gradient(tile, softmax, head):
  """Returns the weights of a head in a tile, d_logits_QK and the slope of its bias."""
  logits_QK, slope = tile.logits(head)
  _, value_KC = tile.key_and_value(head)
  weights_QK = jnp.exp(logits_QK - softmax.log_norm_BNHQ[0, 0, pl.ds(head, 1)].T)
  d_weights_QK = _dot(softmax.d_out_BHQC[0, head], value_KC, (1, 1))
  d_logits_QK = weights_QK * (d_weights_QK - softmax.delta_BNHQ[0, 0, pl.ds(head, 1)].T)
  return weights_QK, d_logits_QK, slope


def _query_kernel(
  low, high, _, queries, keys, table, rate_1C, softmax, d_query, d_table, d_queries, *, setup
):
  """Visits tiles row by row, for the gradient of queries and of the table."""
  row, step, steps = pl.program_id(2), pl.program_id(3), pl.num_programs(3)
  at = row * steps + step
  first_head = pl.program_id(1) * setup.heads

  @pl.when((row == 0) & (step == 0))
  def _():
    for ref in jax.tree.leaves(d_table):

      def clear(index, ref=ref):
        ref[0, 0, 0, index] = jnp.float32(0)

      _each(ref.shape[3], clear)

  @pl.when(step == 0)
  def _():
    d_queries[...] = jnp.zeros_like(d_queries)

  @pl.when(high[at] > 0)
  def _():
    tile = Tile(setup, (low[at], high[at]), first_head, queries, keys, table, rate_1C)

    def add(head, d_x_QK):
      _, d_logits_QK, slope = _weights_and_gradient(tile, softmax, head)
      d_queries[head] += tile.query_gradient(head, d_logits_QK)
      if d_table is None:
        return d_x_QK
      return d_x_QK + tile.add_table_gradient(head, d_logits_QK, slope, d_table)

    zeros_QK = jnp.zeros((setup.query_block, setup.key_block), jnp.float32)
    d_x_QK = jax.lax.fori_loop(0, setup.heads, add, zeros_QK)
    if d_table is not None and tile.shared_x_QK is not None:
      tile.add_numbers_gradient(0, d_x_QK, d_table)

  @pl.when(step == steps - 1)
  def _():
    d_query[0] = d_queries[...].astype(d_query.dtype)


def _key_kernel(
  low, high, _, queries, keys, table, rate_1C, softmax, d_key, d_value, d_keys, d_values, *, setup
):
  """Visits tiles column by column: grid (batch, head block, key block, query block)."""
  column, step, steps = pl.program_id(2), pl.program_id(3), pl.num_programs(3)
  at = step * pl.num_programs(2) + column
  first_head = pl.program_id(1) * setup.heads

  @pl.when(step == 0)
  def _():
    d_keys[...], d_values[...] = jnp.zeros_like(d_keys), jnp.zeros_like(d_values)

  @pl.when(high[at] > 0)
  def _():
    tile = Tile(setup, (low[at], high[at]), first_head, queries, keys, table, rate_1C)

    def add(head):
      group = _group(setup, head)
      weights_QK, d_logits_QK, _ = _weights_and_gradient(tile, softmax, head)
      d_out_QC = softmax.d_out_BHQC[0, head]
      d_values[group] += _dot(weights_QK.astype(d_out_QC.dtype), d_out_QC, (0, 0))
      d_keys[group] += tile.key_gradient(head, d_logits_QK)

    _each(setup.heads, add)

  @pl.when(step == steps - 1)
  def _():
    d_key[0] = d_keys[...].astype(d_key.dtype)
    d_value[0] = d_values[...].astype(d_value.dtype)


class Specs:
  """Which block of each array a kernel holds at a step of its grid.

  The grid is (batch, head block, query block, key block); by column, the last two change places.
  """

  def __init__(self, setup, columns, by_column):
    self.setup, self.columns, self.by_column = setup, columns, by_column

  def _spec(self, shape, index):
    """Returns a spec from the index of (batch, head block, query block, key block)."""

    def index_map(batch, heads, outer, step, low, high, hold):
      del low, high
      if self.by_column:
        return index(batch, heads, hold[step * self.columns + outer], outer)
      return index(batch, heads, outer, hold[outer * self.columns + step])

    return pl.BlockSpec(shape, index_map)

  def query(self, x):
    """Returns the spec of x_BHQC or x_B1Q."""
    if x.ndim == 3:
      last = len(x) - 1
      shape = (1, 1, self.setup.query_block)
      return self._spec(shape, lambda batch, _, i, j: (jnp.minimum(batch, last), 0, i))
    shape = (1, self.setup.heads, self.setup.query_block, x.shape[3])
    return self._spec(shape, lambda batch, heads, i, j: (batch, heads, i, 0))

  def key(self, x):
    """Returns the spec of x_BGKC or x_B1K."""
    if x.ndim == 3:
      last = len(x) - 1
      shape = (1, 1, self.setup.key_block)
      return self._spec(shape, lambda batch, _, i, j: (jnp.minimum(batch, last), 0, j))
    shape = (1, self.setup.groups, self.setup.key_block, x.shape[3])
    return self._spec(shape, lambda batch, heads, i, j: (batch, heads, j, 0))

  def norm(self):
    """Returns the spec of x_BNHQ."""
    shape = (1, 1, self.setup.heads, self.setup.query_block)
    return self._spec(shape, lambda batch, heads, i, j: (batch, heads, 0, i))

  def inputs(self, queries, keys, table, rate_1C):
    """Returns the specs of what all kernels take after the plan."""
    whole = None if rate_1C is None else pl.BlockSpec(rate_1C.shape, lambda *_: (0, 0))
    return (
      jax.tree.map(self.query, queries),
      jax.tree.map(self.key, keys),
      jax.tree.map(lambda _: pl.BlockSpec(memory_space=pltpu.SMEM), table),
      whole,
    )

  def softmax(self, softmax):
    """Returns the specs of what the backward kernels take besides."""
    return Softmax(self.query(softmax.d_out_BHQC), self.norm(), self.norm())


def _call(kernel, setup, grid, plan, hold_IJ, inputs, in_specs, outputs, scratch):
  """Runs a kernel; `outputs` is a tree of (shape and dtype, spec)."""
  leaves, tree = jax.tree.flatten(outputs, is_leaf=lambda x: isinstance(x, Output))
  arrays, out_specs = (jax.tree.unflatten(tree, list(part)) for part in zip(*leaves, strict=True))
  return pl.pallas_call(
    functools.partial(kernel, setup=setup),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=grid,
      in_specs=in_specs,
      out_specs=out_specs,
      scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    ),
    out_shape=arrays,
    compiler_params=pltpu.CompilerParams(
      # The table's gradient is summed over rows, so these keep their order.
      dimension_semantics=('parallel', 'parallel', 'arbitrary', 'arbitrary'),
      vmem_limit_bytes=VMEM_BYTES,
    ),
    interpret=setup.interpret,
  )(plan.low_IJ.ravel(), plan.high_IJ.ravel(), hold_IJ.ravel(), *inputs)


class Output(NamedTuple):
  """An output of a kernel."""

  array: jax.ShapeDtypeStruct
  spec: pl.BlockSpec


def _flat(table):
  """Returns a table as kernels read it: a head's numbers together, and an end to its segments."""
  if table is None:
    return None
  slope_HZ = table.slope_ZH.T.ravel()
  if table.lower_Z is None:
    return table._replace(slope_ZH=slope_HZ)
  lower_Z = jnp.append(table.lower_Z, jnp.inf)
  return table._replace(lower_Z=lower_Z, slope_ZH=slope_HZ, value_ZH=table.value_ZH.T.ravel())


def _flash(setup, rate_1C):
  """Makes (table, Queries, Keys, Plan) -> out_BHQC with flash attention's own gradient."""
  if rate_1C is not None:
    rate_1C = np.float32(rate_1C)

  def forward(table, queries, keys, plan):
    query_BHQC = queries.query_BHQC
    batch, num_heads, num_queries, channels = query_BHQC.shape
    rows, columns = plan.low_IJ.shape
    specs = Specs(setup, columns, by_column=False)
    inputs = queries, keys, _flat(table), rate_1C
    norm = (batch, num_heads // setup.heads, setup.heads, num_queries)
    tile = (setup.heads, setup.query_block)
    out_BHQC, log_norm_BNHQ = _call(
      _forward_kernel,
      setup,
      (*norm[:2], rows, columns),
      plan,
      plan.key_IJ,
      inputs,
      specs.inputs(*inputs),
      (
        Output(_like(query_BHQC, keys.value_BGKC.dtype), specs.query(query_BHQC)),
        Output(jax.ShapeDtypeStruct(norm, jnp.float32), specs.norm()),
      ),
      [(*tile, channels), (*tile, 1), (*tile, 1)],
    )
    return out_BHQC, (table, queries, keys, plan, out_BHQC, log_norm_BNHQ)

  def backward(saved, d_out_BHQC):
    table, queries, keys, plan, out_BHQC, log_norm_BNHQ = saved
    delta_BHQ = (d_out_BHQC.astype(jnp.float32) * out_BHQC.astype(jnp.float32)).sum(axis=3)
    softmax = Softmax(d_out_BHQC, log_norm_BNHQ, delta_BHQ.reshape(log_norm_BNHQ.shape))
    d_query_BHQC, d_table = _query_gradient(setup, rate_1C, table, queries, keys, plan, softmax)
    d_key_BGKC, d_value_BGKC = _key_gradient(setup, rate_1C, table, queries, keys, plan, softmax)
    # None: positions and segments are integers and have no gradient.
    d_queries = Queries(d_query_BHQC, *[None] * (len(queries) - 1))
    d_keys = Keys(d_key_BGKC, d_value_BGKC, *[None] * (len(keys) - 2))
    return d_table, d_queries, d_keys, plan_lib.Plan(*[None] * len(plan))

  @jax.custom_vjp
  def flash(table, queries, keys, plan):
    return forward(table, queries, keys, plan)[0]

  flash.defvjp(forward, backward)
  return flash


def _like(array, dtype):
  return jax.ShapeDtypeStruct(array.shape, dtype)


def _query_gradient(setup, rate_1C, table, queries, keys, plan, softmax):
  """Returns d_query_BHQC and the gradient of the table, None if there is none."""
  query_BHQC = queries.query_BHQC
  rows, columns = plan.low_IJ.shape
  specs = Specs(setup, columns, by_column=False)
  inputs = queries, keys, _flat(table), rate_1C
  grid = (*softmax.delta_BNHQ.shape[:2], rows, columns)

  def sums(numbers):
    """The sums of a batch row and a block of heads lie together, in scalar memory."""
    count = max(1, numbers.size // grid[1])
    spec = pl.BlockSpec(
      (1, 1, 1, count),
      lambda batch, heads, *_: (batch, heads, 0, 0),
      memory_space=pltpu.SMEM,
    )
    return Output(jax.ShapeDtypeStruct((*grid[:2], 1, count), jnp.float32), spec)

  d_table = None
  if table is not None and setup.learned:
    d_table = jax.tree.map(sums, table._replace(lower_Z=None, anchor_Z=None))
  d_query_BHQC, d_table = _call(
    _query_kernel,
    setup,
    grid,
    plan,
    plan.key_IJ,
    (*inputs, softmax),
    (*specs.inputs(*inputs), specs.softmax(softmax)),
    (Output(_like(query_BHQC, query_BHQC.dtype), specs.query(query_BHQC)), d_table),
    [(setup.heads, setup.query_block, query_BHQC.shape[3])],
  )
  if table is None:
    return d_query_BHQC, None
  if d_table is None:
    return d_query_BHQC, jax.tree.map(jnp.zeros_like, table)

  def whole(number, sums_BN1Z):
    """Returns the sums in the shape of what they are the gradient of."""
    sums_NZ = sums_BN1Z.sum(axis=(0, 2))
    if number.ndim == 1:  # of x: a head's own, or shared by all
      return sums_NZ.ravel() if number.size > 1 else sums_NZ.sum(axis=0)
    return sums_NZ.reshape(number.shape[::-1]).T

  ends = {'lower_Z': table.lower_Z, 'anchor_Z': table.anchor_Z}
  d_table = jax.tree.map(whole, table._replace(lower_Z=None, anchor_Z=None), d_table)
  return d_query_BHQC, d_table._replace(**jax.tree.map(jnp.zeros_like, ends))


def _key_gradient(setup, rate_1C, table, queries, keys, plan, softmax):
  """Returns d_key_BGKC and d_value_BGKC."""
  rows, columns = plan.low_IJ.shape
  specs = Specs(setup, columns, by_column=True)
  inputs = queries, keys, _flat(table), rate_1C
  outputs = [Output(_like(x_BGKC, x_BGKC.dtype), specs.key(x_BGKC)) for x_BGKC in keys[:2]]
  return _call(
    _key_kernel,
    setup,
    (*softmax.delta_BNHQ.shape[:2], columns, rows),
    plan,
    plan.query_IJ,
    (*inputs, softmax),
    (*specs.inputs(*inputs), specs.softmax(softmax)),
    outputs,
    [(setup.groups, setup.key_block, keys.key_BGKC.shape[3])] * 2,
  )
