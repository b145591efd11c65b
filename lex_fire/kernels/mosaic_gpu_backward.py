"""The backward passes of `mosaic_gpu`: one for queries and the table, one for keys and values.

With the softmax's weights p and d_weights = d_out value^T, the gradient of a logit is
g = p (d_weights - delta), delta a query's sum of out d_out. A table's is a sum over pairs: of g in
a segment for its line's height at 0, of g x for its slope, and of g slope dx/dnumber for a number
of the coordinate. Each warpgroup sums its own 64 queries in order, and XLA sums those. Of a query's
factor of x it is a sum over the query's pairs, of which XLA makes that of the numbers it is
computed from.
"""

# Not strict, as its neighbours are: kernels carry no types.
# pyright: basic

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lex_fire.kernels import mosaic_gpu_far as far
from lex_fire.kernels import mosaic_gpu_plan as plan_lib
from lex_fire.kernels import mosaic_gpu_products as products
from lex_fire.kernels import mosaic_gpu_tensor_memory as tensor_memory
from lex_fire.kernels import mosaic_gpu_tile as tile_lib

ROWS = tile_lib.ROWS
LANES = 128  # of a row of the sums of a table's gradient
# By `Setup.size`.
SIZES = {
  (64, False): tile_lib.Size(columns=64, stages=4),
  (128, False): tile_lib.Size(columns=64, stages=2),
  (256, False): tile_lib.Size(columns=64, stages=1),
  (512, False): tile_lib.Size(columns=32, stages=1, units=1),
  (64, True): tile_lib.Size(columns=64, stages=2),
  (128, True): tile_lib.Size(columns=64, stages=1),
  (256, True): tile_lib.Size(columns=64, stages=1, units=1),
  (512, True): tile_lib.Size(columns=16, stages=1, units=1),
}


def size_of(setup, channels):
  """Returns how much a kernel of this pass holds, with heads of so many channels."""
  return setup.size(SIZES, tensor_memory.BACKWARD_SIZES, channels)


class Softmax(NamedTuple):
  """What these passes take of the forward pass, and of its gradient.

  Attributes:
    d_out_YBQHC: gradient of its output, in parts.
    norm_BHPQ: the logarithm of the softmax's normaliser, and delta.
  """

  d_out_YBQHC: Any
  norm_BHPQ: Any


def of_queries(setup, table, tiles, given, softmax, dtype):
  """Returns d_query_BQHC and the gradient of the table, or None.

  Args:
    setup: of the kernel.
    table: a `mosaic_gpu_plan.Table`, or None.
    tiles: of this kernel.
    given: `mosaic_gpu_products.Given`, as arrays.
    softmax: as above.
    dtype: of d_query_BQHC.
  """
  parts, batch, num_queries, num_heads, channels = given.query_YBQHC.shape
  size = size_of(setup, channels)
  columns, stages, units = size
  blocks = num_queries // ROWS
  sums = _sums_shapes(setup)
  d_query_BQHC, *sums_BHI = tile_lib.run(
    setup,
    size,
    functools.partial(_query_kernel, setup, size),
    (*given, *softmax, *tiles),
    out_type=[jax.ShapeDtypeStruct(given.query_YBQHC.shape[1:], dtype)]
    + [jax.ShapeDtypeStruct((batch, num_heads, blocks, *shape), jnp.float32) for shape in sums],
    scratch_types=dict(
      query_IYQC=products.blocks(setup, (units, parts, ROWS, channels), columns),
      d_out_IYQC=products.blocks(setup, (units, parts, ROWS, channels), columns),
      key_JYKC=products.blocks(setup, (stages, parts, columns, channels), columns),
      value_JYKC=products.blocks(setup, (stages, parts, columns, channels), columns),
      query_INQ=plgpu.SMEM((units, given.query_BNQ.shape[1], ROWS), jnp.int32),
      norm_IPQ=plgpu.SMEM((units, 2, ROWS), jnp.float32),
      key_JNK=plgpu.SMEM((stages, given.key_BNK.shape[1], columns), jnp.int32),
      query_waves=products.wave_blocks(setup, units, ROWS, columns),
      key_waves=products.wave_blocks(setup, stages, columns, columns),
      sums=[plgpu.SMEM((units, *shape), jnp.float32) for shape in sums],
      spare_IQ=plgpu.SMEM((units, ROWS), jnp.float32),
      query_ready=plgpu.Barrier(
        num_arrivals=products.copies(setup, 2 * parts) + 1, num_barriers=units
      ),
      ready=plgpu.Barrier(num_arrivals=products.copies(setup, 2 * parts), num_barriers=stages),
      free=plgpu.Barrier(num_arrivals=units, num_barriers=stages),
      rooms=products.rooms(setup, size, channels),
    ),
    grid=dict(head=num_heads, row=blocks // units, batch=batch),
  )
  if not sums:
    return d_query_BQHC, jax.tree.map(jnp.zeros_like, table)
  line_HZP, number_HN = (
    sums_BHIZ.sum(axis=(0, 2)).reshape(num_heads, -1) for sums_BHIZ in sums_BHI[:2]
  )
  segments = setup.segments
  line_HZP = line_HZP[:, : 2 * segments].reshape(num_heads, segments, 2)
  # Ends have no gradient, nor has the end after the last segment.
  d_line_HZX = jnp.pad(line_HZP, [(0, 0), (0, 1), (1, 0)])
  d_number_HN = jnp.zeros_like(table.number_HN)
  # Slopes are of x in its unit, its derivatives are not.
  number_HN = number_HN[:, : len(setup.read)] / setup.unit
  d_number_HN = d_number_HN.at[:, setup.read].set(number_HN)
  d_factor_BQ = None
  if setup.factor is not None:
    d_factor_BQ = sums_BHI[2].sum(axis=1).reshape(batch, num_queries)
    if len(table.factor_BQ) < batch:
      d_factor_BQ = d_factor_BQ.sum(axis=0, keepdims=True)
  return d_query_BQHC, plan_lib.Table(d_line_HZX, d_number_HN, d_factor_BQ)


def _sums_shapes(setup):
  """Returns the shapes of the sums over a warpgroup's pairs.

  Those are of segments, two each, of numbers, and of each query for its factor if it has one.
  """
  if not setup.learned or not setup.segments:
    return []

  def shape(count):
    rows = math.ceil(max(1, count) / LANES)
    # Threads of a warpgroup write pairs of neighbours: one row, or an even number.
    return rows + rows % 2 if rows > 1 else rows, LANES

  of_queries = [] if setup.factor is None else [(ROWS,)]
  return [shape(2 * setup.segments), shape(len(setup.read)), *of_queries]


def _query_kernel(
  setup,
  size,
  *refs,
  query_IYQC,
  d_out_IYQC,
  key_JYKC,
  value_JYKC,
  query_INQ,
  norm_IPQ,
  key_JNK,
  query_waves,
  key_waves,
  sums,
  spare_IQ,
  query_ready,
  ready,
  free,
  rooms,
):
  given, others = products.given(refs)
  d_out_YBQHC, norm_BHPQ, code_BIJ, range_BIP, d_query_BQHC, *sums_BHI = others
  batch, head, row = (jax.lax.axis_index(name) for name in ('batch', 'head', 'row'))
  integers = tile_lib.row_of(code_BIJ, batch)
  first, count = range_BIP[integers, row, 0], range_BIP[integers, row, 1]

  def copy(n, slot):
    group = head // (given.query_YBQHC.shape[3] // given.key_YBKGC.shape[3])
    keys = pl.ds((first + n) * size.columns, size.columns)
    blocks = (ref.at[slot] for ref in (key_JYKC, value_JYKC, key_JNK))
    waves = [ref.at[slot] for ref in key_waves]
    tile_lib.copy(given.keys(batch, keys, group, *blocks, waves=waves), ready.at[slot])

  def compute(setup, unit):
    block = size.units * row + unit
    rows = pl.ds(block * ROWS, ROWS)
    query_YQC, d_out_YQC, query_NQ = query_IYQC.at[unit], d_out_IYQC.at[unit], query_INQ.at[unit]
    norm_PQ, waves = norm_IPQ.at[unit], [ref.at[unit] for ref in query_waves]
    pairs = (
      *given.queries(batch, rows, head, query_YQC, query_NQ, waves),
      *products.of_parts(d_out_YBQHC, batch, rows, head, d_out_YQC),
      (norm_BHPQ.at[batch, head, :, rows], norm_PQ),
    )
    tile_lib.copy(pairs, query_ready.at[unit])
    plgpu.barrier_wait(query_ready.at[unit])
    of_head = given.of_head(setup, head)
    gradient = TableGradient(setup, [ref.at[unit] for ref in sums], spare_IQ.at[unit])
    log_norm_Q, delta_Q = (tile_lib.vector(setup, norm_PQ.at[n], 0) for n in range(2))

    def visit(n, code, slot, so_far):
      del n
      d_query_QC, table_sums = so_far
      both = *waves, *(ref.at[slot] for ref in key_waves)
      tile = of_head(tile_lib.Positions(query_NQ, key_JNK.at[slot], 0, both), code)
      shape = ROWS, size.columns

      def step(x):
        logits_QK = tile.logits(query_YQC, key_JYKC.at[slot], x)
        weights_QK = tile_lib.weights(logits_QK, log_norm_Q, 0)
        d_weights_QK = products.product(setup, d_out_YQC, value_JYKC.at[slot])
        d_logits_QK = weights_QK * (d_weights_QK - tile_lib.spread(delta_Q, shape, 0))
        sums = gradient.add(table_sums, tile, x, d_logits_QK)
        return tile.add(d_query_QC, d_logits_QK, key_JYKC.at[slot]), sums

      return tile.with_x(step, shape, far.QUERIES, setup.read)

    start = tile_lib.full(setup, query_YQC.shape[1:], 0.0), gradient.start()
    code = functools.partial(tile_lib.code, code_BIJ, integers, block, first)
    end = tile_lib.walk(visit, code, start, count, size.stages, ready, free)
    d_query_QC, table_sums = end
    pairs = products.put(d_query_QC, d_query_BQHC.at[batch, rows, head], query_YQC)
    gradient.end(table_sums)
    totals = zip(sums_BHI, gradient.refs, strict=True)
    pairs = (
      *pairs,
      *((target.at[batch, head, block], source) for target, source in totals),
    )
    tile_lib.copy_back(pairs)

  pipeline = functools.partial(tile_lib.pipeline, copy, count, size.stages, free)
  tile_lib.warpgroups(setup, size.units, rooms, compute, pipeline)


class TableGradient:
  """Running sums of a table's gradient over the tiles of a warpgroup, in their order.

  The segment that was met last is summed in registers, a number a row; when a tile has another,
  that sum goes to shared memory.
  """

  def __init__(self, setup, refs, spare_ref):
    self.setup, self.refs, self.spare_ref = setup, refs, spare_ref

  def start(self):
    """Returns the sums of no tile: (segment or -1, its two sums), of each number, and the factor.

    Those of the factor are a list of one, or none if there is no factor.
    """
    if not self.refs:
      return ()
    for ref in self.refs[:2]:
      ref[...] = jnp.zeros(ref.shape, jnp.float32)
    zero_Q = tile_lib.full(self.setup, (ROWS,), 0.0)
    of_factor = [zero_Q] * (self.setup.factor is not None)
    return (jnp.int32(-1), zero_Q, zero_Q), [zero_Q] * len(self.setup.read), of_factor

  def add(self, sums, tile, x, d_logits_QK):
    """Adds a tile's pairs.

    Args:
      sums: so far.
      tile: `mosaic_gpu_products.Tile`.
      x: what `Tile.with_x` gives.
      d_logits_QK: gradient of the logits.
    """
    if not self.refs:
      return sums
    first, end = tile_lib.span(tile.code)
    held, *others = sums
    of_slope_Q, value_Q, changes = self._of_line(tile, x, d_logits_QK)
    slope = tile_lib.segment(tile.line_ref, tile.head, first).slope
    sums = self._put(held, first, of_slope_Q, value_Q), *self._changed(others, changes, slope)
    if isinstance(x, far.Polynomial):
      return sums

    def move(z, sums):
      """Gives what is of pairs above the end of the line before to line z."""
      (_, slope_Q, value_Q), *others = sums
      before, found = (tile_lib.segment(tile.line_ref, tile.head, n) for n in (z - 1, z))
      is_above_QK = tile_lib.is_above(self.setup, tile.positions, found, x.x)
      above_QK = jnp.where(is_above_QK, d_logits_QK, 0.0)
      of_slope_Q, of_value_Q, changes = self._of_line(tile, x, above_QK)
      self._store((z - 1, slope_Q - of_slope_Q, value_Q - of_value_Q))
      others = self._changed(others, changes, found.slope - before.slope)
      return (z, of_slope_Q, of_value_Q), *others

    return jax.lax.fori_loop(first + 1, end, move, sums)

  def _of_line(self, tile, x, d_logits_QK):
    """Returns what pairs add to a line's sums, and to those of numbers and the factor a slope."""
    value_Q, of_x_Q, of_slopes = x.sums(d_logits_QK)
    scaled = functools.partial(tile.positions.scaled, self.setup)
    return scaled(of_x_Q), value_Q, ([scaled(sum_Q) for sum_Q in of_slopes], of_x_Q)

  def _changed(self, others, changes, slope):
    """Returns the sums of numbers and of the factor, and what pairs of a slope add to them."""
    (of_numbers, of_factor), (of_slopes, of_x_Q) = others, changes
    of_numbers = [sum_Q + slope * x_Q for sum_Q, x_Q in zip(of_numbers, of_slopes, strict=True)]
    return of_numbers, [sum_Q + slope * of_x_Q for sum_Q in of_factor]

  def _put(self, held, z, of_slope_Q, of_value_Q):
    held_z, slope_Q, value_Q = held
    moved = held_z != z
    pl.when(moved)(lambda: self._store(held))
    kept = jnp.where(moved, 0.0, 1.0)
    return z, slope_Q * kept + of_slope_Q, value_Q * kept + of_value_Q

  def _store(self, held):
    held_z, *sums = held

    @pl.when(held_z >= 0)
    def _():
      for n, sum_Q in enumerate(sums):
        self._store_total(self.refs[0], 2 * held_z + n, sum_Q)

  def _store_total(self, ref, n, sum_Q):
    # Rows are spread over all warps, columns over the threads of each: so the sum needs no warp to
    # wait for those of another warpgroup.
    self.spare_ref[...] = sum_Q
    total = tile_lib.vector(self.setup, self.spare_ref, 1).sum(axis=0)
    at = n // LANES, n % LANES
    ref[at] = ref[at] + total

  def end(self, sums):
    """Stores what is still in registers."""
    if self.refs:
      held, of_numbers, of_factor = sums
      self._store(held)
      for n, sum_Q in enumerate(of_numbers):
        self._store_total(self.refs[1], n, sum_Q)
      for sum_Q in of_factor:
        self.refs[2][...] = sum_Q


def of_keys(setup, tiles, given, softmax, dtypes):
  """Returns d_key_BKGC and d_value_BKGC, of two dtypes; takes what `of_queries` does besides."""
  both = functools.partial(_of_keys, setup, tiles, given, softmax, dtypes)
  if given.key_YBKGC.shape[4] == 256:
    # The sums of both do not fit in registers.
    return *both((True, False)), *both((False, True))
  return both((True, True))


def _of_keys(setup, tiles, given, softmax, dtypes, wanted):
  parts, batch, num_keys, num_groups, channels = given.key_YBKGC.shape
  size = size_of(setup, channels)
  columns, stages, units = size
  return tile_lib.run(
    setup,
    size,
    functools.partial(_key_kernel, setup, size, wanted),
    (*given, *softmax, *tiles),
    out_type=[
      jax.ShapeDtypeStruct(given.key_YBKGC.shape[1:], dtype)
      for dtype in itertools.compress(dtypes, wanted)
    ],
    scratch_types=dict(
      key_JYKC=products.blocks(setup, (units, parts, ROWS, channels), columns),
      value_JYKC=products.blocks(setup, (units, parts, ROWS, channels), columns),
      query_IYQC=products.blocks(setup, (stages, parts, columns, channels), columns),
      d_out_IYQC=products.blocks(setup, (stages, parts, columns, channels), columns),
      key_JNK=plgpu.SMEM((units, given.key_BNK.shape[1], ROWS), jnp.int32),
      query_INQ=plgpu.SMEM((stages, given.query_BNQ.shape[1], columns), jnp.int32),
      norm_IPQ=plgpu.SMEM((stages, 2, columns), jnp.float32),
      key_waves=products.wave_blocks(setup, units, ROWS, columns),
      query_waves=products.wave_blocks(setup, stages, columns, columns),
      key_ready=plgpu.Barrier(num_arrivals=products.copies(setup, 2 * parts), num_barriers=units),
      ready=plgpu.Barrier(num_arrivals=products.copies(setup, 2 * parts) + 1, num_barriers=stages),
      free=plgpu.Barrier(num_arrivals=units, num_barriers=stages),
      rooms=products.rooms(setup, size, channels),
    ),
    grid=dict(group=num_groups, row=num_keys // (units * ROWS), batch=batch),
  )


def _key_kernel(
  setup,
  size,
  wanted,
  *refs,
  key_JYKC,
  value_JYKC,
  query_IYQC,
  d_out_IYQC,
  key_JNK,
  query_INQ,
  norm_IPQ,
  key_waves,
  query_waves,
  key_ready,
  ready,
  free,
  rooms,
):
  given, others = products.given(refs)
  d_out_YBQHC, norm_BHPQ, code_BIJ, range_BIP, *d_BKGC = others
  batch, group, row = (jax.lax.axis_index(name) for name in ('batch', 'group', 'row'))
  integers = tile_lib.row_of(code_BIJ, batch)
  first, blocks = range_BIP[integers, row, 0], range_BIP[integers, row, 1]
  heads = given.query_YBQHC.shape[3] // given.key_YBKGC.shape[3]
  count = heads * blocks

  def where(n):
    """Returns the head and the block of queries of a step."""
    return group * heads + n // blocks, first + jax.lax.rem(n, blocks)

  def copy(n, slot):
    head, block = where(n)
    queries = pl.ds(block * size.columns, size.columns)
    waves = [ref.at[slot] for ref in query_waves]
    pairs = (
      *given.queries(batch, queries, head, query_IYQC.at[slot], query_INQ.at[slot], waves),
      *products.of_parts(d_out_YBQHC, batch, queries, head, d_out_IYQC.at[slot]),
      (norm_BHPQ.at[batch, head, :, queries], norm_IPQ.at[slot]),
    )
    tile_lib.copy(pairs, ready.at[slot])

  def compute(setup, unit):
    block = size.units * row + unit
    rows = pl.ds(block * ROWS, ROWS)
    key_YKC, value_YKC, key_NK = key_JYKC.at[unit], value_JYKC.at[unit], key_JNK.at[unit]
    waves = [ref.at[unit] for ref in key_waves]
    pairs = given.keys(batch, rows, group, key_YKC, value_YKC, key_NK, waves)
    tile_lib.copy(pairs, key_ready.at[unit])
    plgpu.barrier_wait(key_ready.at[unit])

    def visit(n, code, slot, so_far):
      head, _ = where(n)
      both = *waves, *(ref.at[slot] for ref in query_waves)
      positions = tile_lib.Positions(query_INQ.at[slot], key_NK, 1, both)
      tile = given.of_head(setup, head)(positions, code)
      shape = ROWS, size.columns

      def step(x):
        logits_KQ = tile.logits(key_YKC, query_IYQC.at[slot], x)
        log_norm_Q, delta_Q = (tile_lib.vector(setup, norm_IPQ.at[slot, n], 1) for n in range(2))
        weights_KQ = tile_lib.weights(logits_KQ, log_norm_Q, 1)
        sums = list(so_far)
        if wanted[0]:
          d_weights_KQ = products.product(setup, value_YKC, d_out_IYQC.at[slot])
          d_logits_KQ = weights_KQ * (d_weights_KQ - tile_lib.spread(delta_Q, shape, 1))
          sums[0] = tile.add(sums[0], d_logits_KQ, query_IYQC.at[slot])
        if wanted[1]:
          sums[-1] = products.add_product(setup, sums[-1], weights_KQ, d_out_IYQC.at[slot])
        return sums

      return tile.with_x(step, shape)

    def code(n):
      return code_BIJ[integers, block, where(n)[1]]

    start = [tile_lib.full(setup, key_YKC.shape[1:], 0.0)] * sum(wanted)
    sums = tile_lib.walk(visit, code, start, count, size.stages, ready, free)
    for sum_KC, block_YKC, d_x_BKGC in zip(sums, (key_YKC, value_YKC), d_BKGC, strict=False):
      tile_lib.copy_back(products.put(sum_KC, d_x_BKGC.at[batch, rows, group], block_YKC))

  pipeline = functools.partial(tile_lib.pipeline, copy, count, size.stages, free)
  tile_lib.warpgroups(setup, size.units, rooms, compute, pipeline)
