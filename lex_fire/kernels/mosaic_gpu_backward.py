"""The backward passes of `mosaic_gpu`: one for queries and the table, one for keys and values.

With the softmax's weights p and d_weights = d_out value^T, the gradient of a logit is
g = p (d_weights - delta), delta a query's sum of out d_out. A table's is a sum over pairs: of g in
a segment for its value, of g (x - anchor) for its slope, and of g slope dx/dnumber for a number of
the coordinate. Each warpgroup sums its own 64 queries in order, and XLA sums those.
"""

# Not strict, as its neighbours are: kernels carry no types.
# pyright: basic

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lex_fire.kernels import mosaic_gpu_plan as plan_lib
from lex_fire.kernels import mosaic_gpu_tile as tile_lib

ROWS = tile_lib.ROWS
COLUMNS = 64  # of a tile
LANES = 128  # of a row of the sums of a table's gradient
STAGES = {64: 4, 128: 2, 256: 1}  # blocks that shared memory holds, of so many channels


def of_queries(setup, table, inputs, d_out_BQHC, norm_BHPQ):
  """Returns d_query_BQHC and the gradient of the table, or None.

  Args:
    setup: of the kernel.
    table: a `mosaic_gpu_plan.Table`, or None.
    inputs: of the forward pass.
    d_out_BQHC: gradient of its output.
    norm_BHPQ: the logarithm of the softmax's normaliser, and delta.
  """
  batch, num_queries, num_heads, channels = inputs.query_BQHC.shape
  columns, stages = COLUMNS, STAGES[channels]
  units = num_queries // ROWS
  dtype = inputs.query_BQHC.dtype
  shared = functools.partial(tile_lib.block_in_shared_memory, dtype=dtype)
  sums = _sums_shape(setup)
  d_query_BQHC, *sums_BHI = tile_lib.run(
    setup,
    functools.partial(_query_kernel, setup, stages),
    (*tile_lib.operands(table), *inputs[:5], d_out_BQHC, norm_BHPQ, *inputs.queries),
    out_type=[inputs.query_BQHC]
    + [jax.ShapeDtypeStruct((batch, num_heads, units, *shape), jnp.float32) for shape in sums],
    scratch_types=dict(
      query_IQC=shared((2, ROWS, channels)),
      d_out_IQC=shared((2, ROWS, channels)),
      key_JKC=shared((stages, columns, channels)),
      value_JKC=shared((stages, columns, channels)),
      query_INQ=plgpu.SMEM((2, 4, ROWS), jnp.int32),
      norm_IPQ=plgpu.SMEM((2, 2, ROWS), jnp.float32),
      key_JNK=plgpu.SMEM((stages, 2, columns), jnp.int32),
      sums=[plgpu.SMEM((2, *shape), jnp.float32) for shape in sums],
      spare_IQ=plgpu.SMEM((2, ROWS), jnp.float32),
      query_ready=plgpu.Barrier(num_arrivals=4, num_barriers=2),
      ready=plgpu.Barrier(num_arrivals=3, num_barriers=stages),
      free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    ),
    grid=dict(head=num_heads, row=units // 2, batch=batch),
  )
  if not sums:
    return d_query_BQHC, jax.tree.map(jnp.zeros_like, table)
  line_HZP, number_HN = (
    sums_BHIZ.sum(axis=(0, 2)).reshape(num_heads, -1) for sums_BHIZ in sums_BHI
  )
  segments, numbers = setup.segments, setup.numbers.num_leaves
  line_HZP = line_HZP[:, : 2 * segments].reshape(num_heads, segments, 2)
  # Ends and anchors have no gradient, nor has the end after the last segment.
  d_line_HZX = jnp.pad(line_HZP, [(0, 0), (0, 1), (2, 0)])
  padding = table.number_HN.shape[1] - numbers
  d_number_HN = jnp.pad(number_HN[:, :numbers], [(0, 0), (0, padding)])
  return d_query_BQHC, plan_lib.Table(d_line_HZX, d_number_HN)


def _sums_shape(setup):
  """Returns the shapes of the sums over a warpgroup's pairs: of segments, two each, and numbers."""
  if not setup.learned or not setup.segments:
    return []

  def shape(count):
    rows = math.ceil(max(1, count) / LANES)
    # Threads of a warpgroup write pairs of neighbours: one row, or an even number.
    return rows + rows % 2 if rows > 1 else rows, LANES

  return [shape(2 * setup.segments), shape(setup.numbers.num_leaves)]


def _query_kernel(
  setup,
  stages,
  line_HZX,
  number_HN,
  query_BQHC,
  key_BKGC,
  value_BKGC,
  query_BNQ,
  key_BNK,
  d_out_BQHC,
  norm_BHPQ,
  code_BIJ,
  range_BIP,
  d_query_BQHC,
  *sums_BHI,
  query_IQC,
  d_out_IQC,
  key_JKC,
  value_JKC,
  query_INQ,
  norm_IPQ,
  key_JNK,
  sums,
  spare_IQ,
  query_ready,
  ready,
  free,
):
  batch, head, row = (jax.lax.axis_index(name) for name in ('batch', 'head', 'row'))
  integers = tile_lib.row_of(code_BIJ, batch)
  columns = key_JKC.shape[1]
  first, count = range_BIP[integers, row, 0], range_BIP[integers, row, 1]

  def copy(n, slot):
    group = head // (query_BQHC.shape[2] // key_BKGC.shape[2])
    keys = pl.ds((first + n) * columns, columns)
    numbers_NK = key_BNK.at[tile_lib.row_of(key_BNK, batch), :, keys]
    pairs = (
      (key_BKGC.at[batch, keys, group], key_JKC.at[slot]),
      (value_BKGC.at[batch, keys, group], value_JKC.at[slot]),
      (numbers_NK, key_JNK.at[slot]),
    )
    tile_lib.copy(pairs, ready.at[slot])

  def compute(unit):
    block = 2 * row + unit
    rows = pl.ds(block * ROWS, ROWS)
    query_QC, d_out_QC, query_NQ = query_IQC.at[unit], d_out_IQC.at[unit], query_INQ.at[unit]
    norm_PQ = norm_IPQ.at[unit]
    pairs = (
      (query_BQHC.at[batch, rows, head], query_QC),
      (d_out_BQHC.at[batch, rows, head], d_out_QC),
      (query_BNQ.at[tile_lib.row_of(query_BNQ, batch), :, rows], query_NQ),
      (norm_BHPQ.at[batch, head, :, rows], norm_PQ),
    )
    tile_lib.copy(pairs, query_ready.at[unit])
    plgpu.barrier_wait(query_ready.at[unit])
    numbers = tile_lib.numbers(setup, number_HN, head)
    gradient = TableGradient(
      setup, line_HZX, head, [ref.at[unit] for ref in sums], spare_IQ.at[unit]
    )
    log_norm_Q, delta_Q = (tile_lib.vector(setup, norm_PQ.at[n], 0) for n in range(2))

    def visit(n, code, slot, so_far):
      del n
      d_query_QC, table_sums = so_far
      positions = tile_lib.Positions(query_NQ, key_JNK.at[slot], query_axis=0)
      shape = ROWS, columns
      x_QK = tile_lib.coordinate(setup, positions, numbers, shape)
      blocks = query_QC, key_JKC.at[slot]
      logits_QK = tile_lib.logits(setup, positions, code, *blocks, line_HZX, head, x_QK)
      weights_QK = tile_lib.weights(logits_QK, log_norm_Q, 0)
      d_weights_QK = tile_lib.product(setup, d_out_QC, value_JKC.at[slot])
      d_logits_QK = weights_QK * (d_weights_QK - tile_lib.spread(delta_Q, shape, 0))
      table_sums = gradient.add(table_sums, positions, numbers, code, x_QK, d_logits_QK)
      d_query_QC = tile_lib.add_product(setup, d_query_QC, d_logits_QK, key_JKC.at[slot])
      return d_query_QC, table_sums

    start = tile_lib.full(setup, query_QC.shape, 0.0), gradient.start()
    code = functools.partial(tile_lib.code, code_BIJ, integers, block, first)
    end = tile_lib.walk(visit, code, start, count, stages, ready, free)
    d_query_QC, table_sums = end
    query_QC[...] = d_query_QC.astype(query_QC.dtype)
    gradient.end(table_sums)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(query_QC, d_query_BQHC.at[batch, rows, head])
    for source, target in zip(gradient.refs, sums_BHI, strict=True):
      plgpu.copy_smem_to_gmem(source, target.at[batch, head, block])
    plgpu.wait_smem_to_gmem(0)

  tile_lib.warpgroups(compute, functools.partial(tile_lib.pipeline, copy, count, stages, free))


class TableGradient:
  """Running sums of a table's gradient over the tiles of a warpgroup, in their order.

  The segment that was met last is summed in registers, a number a row; when a tile has another,
  that sum goes to shared memory.
  """

  def __init__(self, setup, line_ref, head, refs, spare_ref):
    self.setup, self.line_ref, self.head = setup, line_ref, head
    self.refs, self.spare_ref = refs, spare_ref

  def start(self):
    """Returns the sums of no tile: (segment or -1, its two sums), and one of each number."""
    if not self.refs:
      return ()
    for ref in self.refs:
      ref[...] = jnp.zeros(ref.shape, jnp.float32)
    zero_Q = tile_lib.full(self.setup, (ROWS,), 0.0)
    return (jnp.int32(-1), zero_Q, zero_Q), [zero_Q] * self.setup.numbers.num_leaves

  def add(self, sums, positions, numbers, code, x_QK, d_logits_QK):
    """Adds a tile's pairs."""
    if not self.refs:
      return sums
    held, number_sums = sums
    if number_sums:
      slope_QK = tile_lib.slope(self.setup, self.line_ref, self.head, code, x_QK)
      d_x_QK = d_logits_QK * slope_QK

      def of_number(n, sum_Q):
        slope_QK = tile_lib.coordinate_slope(self.setup, positions, numbers, n, x_QK.shape)
        return sum_Q + (d_x_QK * slope_QK).sum(axis=1)

      number_sums = [of_number(n, sum_Q) for n, sum_Q in enumerate(number_sums)]
    first, end = tile_lib.span(code)

    def add_segment(z, held):
      found, above = (tile_lib.segment(self.line_ref, self.head, n) for n in (z, z + 1))
      inside_QK = (x_QK > found.lower) & (x_QK <= above.lower)
      inside_QK = jnp.where(inside_QK, d_logits_QK, 0.0)
      of_slope_Q = (inside_QK * (x_QK - found.anchor)).sum(axis=1)
      return self._put(held, z, of_slope_Q, inside_QK.sum(axis=1))

    return jax.lax.fori_loop(first, end, add_segment, held), number_sums

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
      held, number_sums = sums
      self._store(held)
      for n, sum_Q in enumerate(number_sums):
        self._store_total(self.refs[1], n, sum_Q)


def of_keys(setup, table, inputs, d_out_BQHC, norm_BHPQ):
  """Returns d_key_BKGC and d_value_BKGC; see `of_queries`."""
  both = functools.partial(_of_keys, setup, table, inputs, d_out_BQHC, norm_BHPQ)
  if inputs.key_BKGC.shape[3] == 256:
    # The sums of both do not fit in registers.
    return *both((True, False)), *both((False, True))
  return both((True, True))


def _of_keys(setup, table, inputs, d_out_BQHC, norm_BHPQ, wanted):
  batch, num_keys, num_groups, channels = inputs.key_BKGC.shape
  columns, stages = COLUMNS, STAGES[channels]
  dtype = inputs.query_BQHC.dtype
  shared = functools.partial(tile_lib.block_in_shared_memory, dtype=dtype)
  return tile_lib.run(
    setup,
    functools.partial(_key_kernel, setup, stages, wanted),
    (*tile_lib.operands(table), *inputs[:5], d_out_BQHC, norm_BHPQ, *inputs.keys),
    out_type=[inputs.key_BKGC] * sum(wanted),
    scratch_types=dict(
      key_JKC=shared((2, ROWS, channels)),
      value_JKC=shared((2, ROWS, channels)),
      query_IQC=shared((stages, columns, channels)),
      d_out_IQC=shared((stages, columns, channels)),
      key_JNK=plgpu.SMEM((2, 2, ROWS), jnp.int32),
      query_INQ=plgpu.SMEM((stages, 4, columns), jnp.int32),
      norm_IPQ=plgpu.SMEM((stages, 2, columns), jnp.float32),
      key_ready=plgpu.Barrier(num_arrivals=3, num_barriers=2),
      ready=plgpu.Barrier(num_arrivals=4, num_barriers=stages),
      free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    ),
    grid=dict(group=num_groups, row=num_keys // (2 * ROWS), batch=batch),
  )


def _key_kernel(
  setup,
  stages,
  wanted,
  line_HZX,
  number_HN,
  query_BQHC,
  key_BKGC,
  value_BKGC,
  query_BNQ,
  key_BNK,
  d_out_BQHC,
  norm_BHPQ,
  code_BIJ,
  range_BIP,
  *d_BKGC,
  key_JKC,
  value_JKC,
  query_IQC,
  d_out_IQC,
  key_JNK,
  query_INQ,
  norm_IPQ,
  key_ready,
  ready,
  free,
):
  batch, group, row = (jax.lax.axis_index(name) for name in ('batch', 'group', 'row'))
  integers = tile_lib.row_of(code_BIJ, batch)
  columns = query_IQC.shape[1]
  first, blocks = range_BIP[integers, row, 0], range_BIP[integers, row, 1]
  heads = query_BQHC.shape[2] // key_BKGC.shape[2]
  count = heads * blocks

  def where(n):
    """Returns the head and the block of queries of a step."""
    return group * heads + n // blocks, first + jax.lax.rem(n, blocks)

  def copy(n, slot):
    head, block = where(n)
    queries = pl.ds(block * columns, columns)
    pairs = (
      (query_BQHC.at[batch, queries, head], query_IQC.at[slot]),
      (d_out_BQHC.at[batch, queries, head], d_out_IQC.at[slot]),
      (query_BNQ.at[tile_lib.row_of(query_BNQ, batch), :, queries], query_INQ.at[slot]),
      (norm_BHPQ.at[batch, head, :, queries], norm_IPQ.at[slot]),
    )
    tile_lib.copy(pairs, ready.at[slot])

  def compute(unit):
    block = 2 * row + unit
    rows = pl.ds(block * ROWS, ROWS)
    key_KC, value_KC, key_NK = key_JKC.at[unit], value_JKC.at[unit], key_JNK.at[unit]
    pairs = (
      (key_BKGC.at[batch, rows, group], key_KC),
      (value_BKGC.at[batch, rows, group], value_KC),
      (key_BNK.at[tile_lib.row_of(key_BNK, batch), :, rows], key_NK),
    )
    tile_lib.copy(pairs, key_ready.at[unit])
    plgpu.barrier_wait(key_ready.at[unit])

    def visit(n, code, slot, so_far):
      head, _ = where(n)
      positions = tile_lib.Positions(query_INQ.at[slot], key_NK, query_axis=1)
      shape = ROWS, columns
      numbers = tile_lib.numbers(setup, number_HN, head)
      x_KQ = tile_lib.coordinate(setup, positions, numbers, shape)
      blocks = key_KC, query_IQC.at[slot]
      logits_KQ = tile_lib.logits(setup, positions, code, *blocks, line_HZX, head, x_KQ)
      log_norm_Q, delta_Q = (tile_lib.vector(setup, norm_IPQ.at[slot, n], 1) for n in range(2))
      weights_KQ = tile_lib.weights(logits_KQ, log_norm_Q, 1)
      factors = []
      if wanted[0]:
        d_weights_KQ = tile_lib.product(setup, value_KC, d_out_IQC.at[slot])
        d_logits_KQ = weights_KQ * (d_weights_KQ - tile_lib.spread(delta_Q, shape, 1))
        factors.append((d_logits_KQ, query_IQC.at[slot]))
      if wanted[1]:
        factors.append((weights_KQ, d_out_IQC.at[slot]))
      return [
        tile_lib.add_product(setup, sum_KC, *factor)
        for sum_KC, factor in zip(so_far, factors, strict=True)
      ]

    def code(n):
      return code_BIJ[integers, block, where(n)[1]]

    start = [tile_lib.full(setup, key_KC.shape, 0.0)] * sum(wanted)
    sums = tile_lib.walk(visit, code, start, count, stages, ready, free)
    for sum_KC, buffer, d_KGC in zip(sums, (key_KC, value_KC), d_BKGC, strict=False):
      buffer[...] = sum_KC.astype(buffer.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(buffer, d_KGC.at[batch, rows, group])
    plgpu.wait_smem_to_gmem(0)

  tile_lib.warpgroups(compute, functools.partial(tile_lib.pipeline, copy, count, stages, free))
