"""Attention as a Pallas kernel for NVIDIA's GPUs (Mosaic GPU), bias and decay computed in the tile.

The online softmax of FlashAttention (Dao et al. 2022, arXiv:2205.14135; for Hopper Shah et al.
2024, arXiv:2407.08608): one warpgroup copies blocks of keys and values to shared memory, two others
(one, of the widest heads) each multiply 64 queries by them. It is for Hopper, and for Blackwell by
other products (`mosaic_gpu_tensor_memory`). A bias is its encoding's `piecewise.Table`: from
positions alone, a tile computes x, but for a factor that is its query's, and a line of it, and more
only for breakpoints that x can reach there, which are found beforehand from the bounds of each
block.
Neither a [Q, K] array nor an atomic operation exists, so that gradients have the same bits each
run.
"""

# Not strict, as its neighbours are: kernels carry no types.
# pyright: basic

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lex_fire import errors
from lex_fire.encodings import base
from lex_fire.kernels import decay, flash, sides, tile
from lex_fire.kernels import mask as mask_lib
from lex_fire.kernels import mosaic_gpu_backward as backward_lib
from lex_fire.kernels import mosaic_gpu_elementwise as elementwise
from lex_fire.kernels import mosaic_gpu_far as far
from lex_fire.kernels import mosaic_gpu_plan as plan_lib
from lex_fire.kernels import mosaic_gpu_products as products
from lex_fire.kernels import mosaic_gpu_tensor_memory as tensor_memory
from lex_fire.kernels import mosaic_gpu_tile as tile_lib
from lex_fire.kernels.mosaic_gpu_plan import Keys, Queries

CHANNELS = (64, 128, 256)  # of a head
MOST_SEGMENTS = 1280  # of a table, whose gradient is summed in shared memory
ROWS = tile_lib.ROWS
# By `Setup.size`: what shared memory has room for.
SIZES = {
  (64, False): tile_lib.Size(columns=128, stages=4),
  (128, False): tile_lib.Size(columns=128, stages=2),
  (256, False): tile_lib.Size(columns=64, stages=2),
  (512, False): tile_lib.Size(columns=32, stages=1),
  (64, True): tile_lib.Size(columns=64, stages=2),
  (128, True): tile_lib.Size(columns=64, stages=1),
  (256, True): tile_lib.Size(columns=32, stages=1),
  (512, True): tile_lib.Size(columns=32, stages=1, units=1),
}


def why_not(encoding: base.Encoding, channels: int, dtype: Any, capability: str = '') -> str | None:
  """Returns why this kernel cannot serve, or None if it can.

  Args:
    encoding: says the decay and the bias of the logits.
    channels: of a head.
    dtype: of queries, keys and values.
    capability: of the GPU, before the point; '': any that it is for.
  """
  if capability not in ('', tensor_memory.HOPPER, tensor_memory.BLACKWELL):
    return f'mosaic_gpu is for compute capabilities 9 and 10, not {capability}'
  if encoding.log_decay is not None and encoding.bias is not None:
    return f'mosaic_gpu has a decay or a bias, but {encoding.name!r} has both'
  if channels not in CHANNELS:
    return f'mosaic_gpu has heads of 64, 128 or 256 channels, not {channels}'
  if jnp.dtype(dtype).name not in products.PARTS:
    return f'mosaic_gpu takes bfloat16 and float32, not {jnp.dtype(dtype).name}'
  wide = channels * products.PARTS[jnp.dtype(dtype).name] > tensor_memory.MOST_BESIDE_WAVES
  if capability == tensor_memory.BLACKWELL and encoding.waves is not None and wide:
    return (
      f'mosaic_gpu has no room, with compute capability 10, for the waves of {encoding.name!r} '
      f'beside heads of {channels} channels in {jnp.dtype(dtype).name}'
    )
  return _why_no_bias(encoding)


@functools.lru_cache(maxsize=256)
def _why_no_bias(encoding):
  if encoding.bias is None:
    return None
  if encoding.table is None:
    return f'mosaic_gpu needs a table of the bias, which {encoding.name!r} has not'

  def any_table():
    params = encoding.init(jax.random.key(0), num_heads=1, head_dim=64, d_model=64)
    return encoding.table(params, 1)

  table = jax.eval_shape(any_table)
  segments = table.slope_ZH.shape[0]
  if segments > MOST_SEGMENTS:
    return (
      f'mosaic_gpu has tables of at most {MOST_SEGMENTS} segments, but that of {encoding.name!r} '
      f'has {segments}'
    )
  if encoding.waves is not None:
    waves = jax.eval_shape(encoding.waves, jax.ShapeDtypeStruct((1,), jnp.int32)).shape[-1]
    if waves > products.WAVES:
      return (
        f'mosaic_gpu has room for {products.WAVES} waves of a position, but {encoding.name!r} has '
        f'{waves}'
      )
  else:
    of_pairs = encoding.coordinate, *(encoding.factors or ())[:1]
    if not all(elementwise.is_elementwise(function, table.coordinate) for function in of_pairs):
      return f'mosaic_gpu needs an x that is elementwise, which that of {encoding.name!r} is not'
  return None


@sides.joined
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
  interpret: Any = False,
  capability: str = tensor_memory.HOPPER,
  make_flash: Callable[..., Any] = flash.on_device,
) -> tuple[jax.Array, jax.Array]:
  """Attention like `reference.attention`.

  `interpret` is what `plgpu.kernel` takes: False on a GPU; its interpreter's parameters to run on
  any platform, slowly, as a GPU of a compute capability would. `make_flash` makes of `Kernels` what
  computes all blocks, as `flash.on_device` does.

  Raises:
    errors.UserError: as `why_not` says.
  """
  if not interpret:
    capability = tensor_memory.capability()
  reason = why_not(encoding, query_BQHC.shape[3], query_BQHC.dtype, capability)
  if reason:
    raise errors.UserError(f"{reason}; use implementation='chunked'")
  num_queries, num_heads, channels = query_BQHC.shape[1:]
  query_BQHC, key_BKGC = tile.prepare(
    query_BQHC,
    key_BKGC,
    encoding=encoding,
    query_position_BQ=query_position_BQ,
    key_position_BK=key_position_BK,
    causal=mask.causal,
  )
  table = None if encoding.table is None else encoding.table(params, num_heads)
  rate_C = stretch = None
  if encoding.log_decay is not None:
    log_decay_C = encoding.log_decay(channels)
    stretch = decay.stretch_of(log_decay_C)
    rate_C = np.float32(stretch * log_decay_C)
  queries, keys = plan_lib.cut(
    mask,
    stretch,
    (query_BQHC, query_position_BQ, query_segment_BQ),
    (key_BKGC, value_BKGC, key_position_BK, key_segment_BK),
  )
  setup = _setup(encoding, table, query_BQHC.dtype, mask, interpret, capability)
  kernels = Kernels(setup, rate_C)
  out_BQHC, log_norm_BHQ = make_flash(kernels)(table, queries, keys)
  return out_BQHC[:, :num_queries], log_norm_BHQ[..., :num_queries]


def _setup(encoding, table, dtype, mask, interpret, capability):
  numbers = {} if table is None else table.coordinate
  of_pairs, factor = encoding.coordinate, None
  # The later of two positions is the query's, where keys after it are hidden.
  shared = all(number_H.size == 1 for number_H in jax.tree.leaves(numbers))
  if encoding.factors is not None and mask.causal and shared:
    of_pairs, factor = encoding.factors
  is_computed = table is not None and encoding.waves is None
  return tile_lib.Setup(
    coordinate=encoding.coordinate,
    of_pairs=of_pairs,
    factor=factor,
    numbers=jax.tree.structure(numbers),
    read=elementwise.reads(of_pairs, numbers) if is_computed and encoding.learned else (),
    unit=elementwise.unit(of_pairs, numbers) if is_computed else 1.0,
    far=is_computed
    and encoding.smooth
    # Not where a number of the query's position is in it, which may have an edge.
    and (encoding.shift_invariant or factor is not None)
    and elementwise.takes_long(of_pairs, numbers),
    segments=0 if table is None else table.slope_ZH.shape[0],
    learned=encoding.learned,
    decays=encoding.log_decay is not None,
    waves=encoding.waves,
    parts=products.PARTS[dtype.name],
    tensor_memory=capability == tensor_memory.BLACKWELL,
    room=None,
    interpret=interpret,
  )


def _size(setup, channels):
  return setup.size(SIZES, tensor_memory.FORWARD_SIZES, channels)


class Kernels(NamedTuple):
  """Those for NVIDIA's GPUs, as `flash.Kernels` has them.

  Attributes:
    setup: what is static of them.
    rate_C: the decay of each channel [nats a stretch]; None without one.
  """

  setup: tile_lib.Setup
  rate_C: Any

  def make_plan(self, *, table: Any, queries: Queries, keys: Keys) -> plan_lib.Plan:
    """Returns the tiles of each kernel."""
    channels = queries.query_BQHC.shape[3]
    forward, backward = _size(self.setup, channels), backward_lib.size_of(self.setup, channels)
    of_blocks = queries.number_BNQ, keys.number_BNK, table, self.setup.coordinate
    codes = functools.partial(plan_lib.codes, *of_blocks)
    degrees = (far.FORWARD, far.QUERIES) if self.setup.far else (None, None)
    of_queries, of_gradient = (
      codes((ROWS, size.columns), degree=degree)
      for size, degree in zip((forward, backward), degrees, strict=True)
    )
    of_keys = codes((backward.columns, ROWS), keys_in_rows=True)
    return plan_lib.Plan(
      forward=plan_lib.tiles(of_queries, forward.units),
      queries=plan_lib.tiles(of_gradient, backward.units),
      keys=plan_lib.tiles(of_keys, backward.units),
    )

  def nothing(self, queries: Queries) -> flash.Found:
    """Returns what is found over no keys."""
    batch, num_queries, num_heads, _ = queries.query_BQHC.shape
    none_BHQ = jnp.full((batch, num_heads, num_queries), jnp.inf)
    return jnp.zeros(queries.query_BQHC.shape, jnp.float32), none_BHQ

  def forward(
    self, table: Any, queries: Queries, keys: Keys, plan: plan_lib.Plan, so_far: Any = None
  ) -> flash.Found:
    """Returns out_BQHC and log_norm_BHQ."""
    dtype = keys.value_BKGC.dtype if so_far is None else jnp.float32
    lines, size = self._lines(table, queries), _size(self.setup, queries.query_BQHC.shape[3])
    given = self._given(lines, queries, keys, size)
    found = _forward(self.setup, given, plan.forward, dtype)
    return found if so_far is None else sides.together(so_far, found)

  def softmax(self, found: flash.Found, d_found: flash.Found) -> backward_lib.Softmax:
    """Returns what kernels of the backward pass take."""
    (out_BQHC, log_norm_BHQ), (d_out_BQHC, d_log_norm_BHQ) = found, d_found
    delta_BHQ = jnp.einsum(
      'BQHC,BQHC->BHQ', d_out_BQHC.astype(jnp.float32), out_BQHC.astype(jnp.float32)
    )
    delta_BHQ -= d_log_norm_BHQ  # of a logit it is its weight times this
    d_out_YBQHC = products.split(d_out_BQHC, self.setup.parts)
    return backward_lib.Softmax(d_out_YBQHC, jnp.stack([log_norm_BHQ, delta_BHQ], axis=2))

  def gradients(
    self,
    table: Any,
    queries: Queries,
    keys: Keys,
    plan: plan_lib.Plan,
    softmax: backward_lib.Softmax,
    dtype: Any = None,
  ) -> tuple[Any, Queries, Keys]:
    """Returns those of table, queries and keys."""
    lines, of_table = jax.vjp(functools.partial(self._lines, queries=queries), table)
    size = backward_lib.size_of(self.setup, queries.query_BQHC.shape[3])
    of_all = self._given(lines, queries, keys, size), softmax
    tokens = queries.query_BQHC, keys.key_BKGC, keys.value_BKGC
    query_dtype, *dtypes = (dtype or x_BLHC.dtype for x_BLHC in tokens)
    of_queries = backward_lib.of_queries(self.setup, lines, plan.queries, *of_all, query_dtype)
    d_query_BQHC, d_lines = of_queries
    d_key_BKGC, d_value_BKGC = backward_lib.of_keys(self.setup, plan.keys, *of_all, dtypes)
    # None: integers have no gradient.
    return *of_table(d_lines), Queries(d_query_BQHC, None), Keys(d_key_BKGC, d_value_BKGC, None)

  def _lines(self, table, queries):
    if table is None:
      return None
    num_heads = queries.query_BQHC.shape[2]
    return plan_lib.table(table, num_heads, self.setup, queries.number_BNQ)

  def _given(self, lines, queries, keys, size):
    """Returns what all kernels take first, of tiles of some size."""
    tokens = queries.query_BQHC, keys.key_BKGC, keys.value_BKGC
    in_parts = (products.split(x_BLHC, self.setup.parts) for x_BLHC in tokens)
    numbers = queries.number_BNQ, keys.number_BNK
    if self.setup.segments and not self.setup.waves:
      numbers = plan_lib.with_bits(*numbers, lines.factor_BQ, size.columns)
    waves = (products.waves_of(self.setup, number_BNL) for number_BNL in numbers)
    given = *tile_lib.operands(lines, self.rate_C), *in_parts, *numbers, *waves
    return products.Given(*given)


def _forward(setup, given, tiles, dtype):
  """Returns out_BQHC, in a dtype, and log_norm_BHQ."""
  parts, batch, num_queries, num_heads, channels = given.query_YBQHC.shape
  size = _size(setup, channels)
  columns, stages, units = size
  out_BQHC, log_norm_BHQ = tile_lib.run(
    setup,
    size,
    functools.partial(_forward_kernel, setup, size),
    (*given, *tiles),
    out_type=(
      jax.ShapeDtypeStruct(given.query_YBQHC.shape[1:], dtype),
      jax.ShapeDtypeStruct((batch, num_heads, num_queries), jnp.float32),
    ),
    scratch_types=dict(
      query_IYQC=products.blocks(setup, (units, parts, ROWS, channels), columns),
      key_JYKC=products.blocks(setup, (stages, parts, columns, channels), columns),
      value_JYKC=products.blocks(setup, (stages, parts, columns, channels), columns),
      query_INQ=plgpu.SMEM((units, given.query_BNQ.shape[1], ROWS), jnp.int32),
      key_JNK=plgpu.SMEM((stages, given.key_BNK.shape[1], columns), jnp.int32),
      query_waves=products.wave_blocks(setup, units, ROWS, columns),
      key_waves=products.wave_blocks(setup, stages, columns, columns),
      log_norm_IQ=plgpu.SMEM((units, ROWS), jnp.float32),
      query_ready=plgpu.Barrier(num_arrivals=products.copies(setup, parts), num_barriers=units),
      ready=plgpu.Barrier(num_arrivals=products.copies(setup, 2 * parts), num_barriers=stages),
      free=plgpu.Barrier(num_arrivals=units, num_barriers=stages),
      rooms=products.rooms(setup, size, channels),
    ),
    grid=dict(head=num_heads, row=num_queries // (units * ROWS), batch=batch),
  )
  return out_BQHC, log_norm_BHQ


def _forward_kernel(
  setup,
  size,
  *refs,
  query_IYQC,
  key_JYKC,
  value_JYKC,
  query_INQ,
  key_JNK,
  query_waves,
  key_waves,
  log_norm_IQ,
  query_ready,
  ready,
  free,
  rooms,
):
  given, (code_BIJ, range_BIP, out_BQHC, log_norm_BHQ) = products.given(refs)
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
    query_YQC, query_NQ, log_norm_Q = query_IYQC.at[unit], query_INQ.at[unit], log_norm_IQ.at[unit]
    waves = [ref.at[unit] for ref in query_waves]
    pairs = given.queries(batch, rows, head, query_YQC, query_NQ, waves)
    tile_lib.copy(pairs, query_ready.at[unit])
    plgpu.barrier_wait(query_ready.at[unit])
    of_head = given.of_head(setup, head)

    def visit(n, code, slot, so_far):
      del n
      both = *waves, *(ref.at[slot] for ref in key_waves)
      tile = of_head(tile_lib.Positions(query_NQ, key_JNK.at[slot], 0, both), code)

      def step(x):
        logits_QK = tile.logits(query_YQC, key_JYKC.at[slot], x)
        return _softmax_step(setup, so_far, logits_QK, value_JYKC.at[slot])

      return tile.with_x(step, (ROWS, size.columns), far.FORWARD)

    start = (
      tile_lib.full(setup, query_YQC.shape[1:], 0.0),
      tile_lib.full(setup, (ROWS,), 2 * mask_lib.HIDDEN_LOGIT),
      tile_lib.full(setup, (ROWS,), 0.0),
    )
    code = functools.partial(tile_lib.code, code_BIJ, integers, block, first)
    end = tile_lib.walk(visit, code, start, count, size.stages, ready, free)
    out_QC, log_norm_Q[...] = _softmax_end(*end)
    pairs = products.put(out_QC, out_BQHC.at[batch, rows, head], query_YQC)
    tile_lib.copy_back([*pairs, (log_norm_BHQ.at[batch, head, rows], log_norm_Q)])

  pipeline = functools.partial(tile_lib.pipeline, copy, count, size.stages, free)
  tile_lib.warpgroups(setup, size.units, rooms, compute, pipeline)


def _softmax_step(setup, so_far, logits_QK, value_YKC):
  """Adds a tile's keys to the running softmax: (sum of values, maximum, sum of weights)."""
  sum_QC, max_Q, norm_Q = so_far
  new_max_Q = jnp.maximum(max_Q, logits_QK.max(axis=1))
  shrink_Q = jnp.exp2((max_Q - new_max_Q) * elementwise.LOG2E)
  # A query that has seen no key yet: 0, as differences of hidden logits are not exact.
  origin_Q = jnp.where(new_max_Q > mask_lib.HIDDEN_LOGIT / 2, new_max_Q, 0.0)
  weights_QK = tile_lib.weights(logits_QK, origin_Q, 0)
  norm_Q = norm_Q * shrink_Q + weights_QK.sum(axis=1)
  sum_QC *= tile_lib.spread(shrink_Q, sum_QC.shape, 0)
  return products.add_product(setup, sum_QC, weights_QK, value_YKC), new_max_Q, norm_Q


def _softmax_end(sum_QC, max_Q, norm_Q):
  """Returns out_QC and the logarithm of the normaliser.

  A query that saw no key gets 0 and +inf, with which its weights are 0 in the backward pass.
  """
  seen_Q = max_Q > mask_lib.HIDDEN_LOGIT / 2
  norm_Q = jnp.where(seen_Q, norm_Q, 1.0)
  scale_Q = jnp.where(seen_Q, 1 / norm_Q, 0.0)
  log_norm_Q = jnp.where(seen_Q, max_Q + jnp.log(norm_Q), jnp.inf)
  return sum_QC * tile_lib.spread(scale_Q, sum_QC.shape, 0), log_norm_Q
