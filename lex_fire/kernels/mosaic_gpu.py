"""Attention as a Pallas kernel for NVIDIA's GPUs (Mosaic GPU), bias and decay computed in the tile.

The online softmax of FlashAttention (Dao et al. 2022, arXiv:2205.14135; for Hopper Shah et al.
2024, arXiv:2407.08608): one warpgroup copies blocks of keys and values to shared memory, two others
(one, of the widest heads) each multiply 64 queries by them. It is for Hopper, and for Blackwell by
other products (`mosaic_gpu_tensor_memory`). A bias is its encoding's
`piecewise.Table`: from positions alone, a tile computes x and a line of it, and more only for
breakpoints that x can reach there, which are found beforehand from the bounds of each block.
Neither a [Q, K] array nor an atomic operation exists, so that gradients have the same bits each
run.
"""

# Not strict, as its neighbours are: kernels carry no types.
# pyright: basic

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lex_fire import errors
from lex_fire.encodings import base
from lex_fire.kernels import decay, residuals, sides, tile
from lex_fire.kernels import mask as mask_lib
from lex_fire.kernels import mosaic_gpu_backward as backward
from lex_fire.kernels import mosaic_gpu_elementwise as elementwise
from lex_fire.kernels import mosaic_gpu_plan as plan_lib
from lex_fire.kernels import mosaic_gpu_products as products
from lex_fire.kernels import mosaic_gpu_tensor_memory as tensor_memory
from lex_fire.kernels import mosaic_gpu_tile as tile_lib

CHANNELS = (64, 128, 256)  # of a head
MOST_SEGMENTS = 1280  # of a table, whose gradient is summed in shared memory
ROWS, UNITS = tile_lib.ROWS, tile_lib.UNITS
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


class Inputs(NamedTuple):
  """Queries, keys and values in whole blocks, prepared, with their integers and tiles.

  Attributes:
    query_BQHC: of one type with the two below.
    key_BKGC: of a length that is a multiple of 128, as the queries'.
    value_BKGC: likewise.
    query_BNQ: see `mosaic_gpu_plan.query_numbers`; B of the integers may be 1.
    key_BNK: see `mosaic_gpu_plan.key_numbers`.
    waves: query_YBQ1W and key_YBK1W; see `mosaic_gpu_products.waves_of`.
    forward: tiles of the forward pass, queries in rows.
    queries: of the backward pass for queries, likewise.
    keys: of the one for keys, keys in rows.
  """

  query_BQHC: Any
  key_BKGC: Any
  value_BKGC: Any
  query_BNQ: Any
  key_BNK: Any
  waves: Any
  forward: Any
  queries: Any
  keys: Any


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
  elif not elementwise.is_elementwise(encoding.coordinate, table.coordinate):
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
) -> tuple[jax.Array, jax.Array]:
  """Attention like `reference.attention`.

  `interpret` is what `plgpu.kernel` takes: False on a GPU; its interpreter's parameters to run on
  any platform, slowly, as a GPU of a compute capability would.

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
  query_padding, key_padding = (-x.shape[1] % (UNITS * ROWS) for x in (query_BQHC, key_BKGC))
  rate_C = stretch = None
  if encoding.log_decay is not None:
    log_decay_C = encoding.log_decay(channels)
    stretch = decay.stretch_of(log_decay_C)
    rate_C = np.float32(stretch * log_decay_C)
  of_queries = query_position_BQ, query_segment_BQ, query_padding
  query_BNQ = plan_lib.query_numbers(mask, *of_queries, stretch)
  key_BNK = plan_lib.key_numbers(key_position_BK, key_segment_BK, key_padding, stretch)
  setup = _setup(encoding, table, query_BQHC.dtype, interpret, capability)
  size, backward_size = _size(setup, channels), backward.size_of(setup, channels)
  columns = backward_size.columns
  codes = functools.partial(plan_lib.codes, query_BNQ, key_BNK, table, encoding.coordinate)
  inputs = Inputs(
    query_BQHC=_padded(query_BQHC, query_padding),
    key_BKGC=_padded(key_BKGC, key_padding),
    value_BKGC=_padded(value_BKGC, key_padding),
    query_BNQ=query_BNQ,
    key_BNK=key_BNK,
    waves=(
      products.waves_of(encoding, query_position_BQ, query_padding),
      products.waves_of(encoding, key_position_BK, key_padding),
    ),
    forward=plan_lib.tiles(codes((ROWS, size.columns)), size.units),
    queries=plan_lib.tiles(codes((ROWS, columns)), backward_size.units),
    keys=plan_lib.tiles(jnp.swapaxes(codes((columns, ROWS)), 1, 2), backward_size.units),
  )
  table = None if table is None else plan_lib.table(table, num_heads)
  out_BQHC, log_norm_BHQ = _flash(setup, rate_C)(table, inputs)
  return out_BQHC[:, :num_queries], log_norm_BHQ[..., :num_queries]


def _setup(encoding, table, dtype, interpret, capability):
  return tile_lib.Setup(
    coordinate=encoding.coordinate,
    numbers=jax.tree.structure({} if table is None else table.coordinate),
    segments=0 if table is None else table.slope_ZH.shape[0],
    learned=encoding.learned,
    decays=encoding.log_decay is not None,
    waves=encoding.waves is not None,
    parts=products.PARTS[dtype.name],
    tensor_memory=capability == tensor_memory.BLACKWELL,
    room=None,
    interpret=interpret,
  )


def _size(setup, channels):
  return setup.size(SIZES, tensor_memory.FORWARD_SIZES, channels)


def _padded(x_BLHC, padding):
  return jnp.pad(x_BLHC, [(0, 0), (0, padding), (0, 0), (0, 0)])


def _flash(setup, rate_C):
  """Makes (table, Inputs) -> out_BQHC, log_norm_BHQ with flash attention's own gradient.

  The logarithm of the softmax's normaliser is +inf where a query sees no key. Of a decay the rate
  is nats a stretch; None without one.
  """

  @jax.custom_vjp
  def flash(table, inputs):
    return _forward(setup, rate_C, table, inputs)

  def forward(table, inputs):
    out_BQHC, log_norm_BHQ = residuals.named(*_forward(setup, rate_C, table, inputs))
    return (out_BQHC, log_norm_BHQ), (table, inputs, out_BQHC, log_norm_BHQ)

  def gradient(saved, d_found):
    d_out_BQHC, d_log_norm_BHQ = d_found
    table, inputs, out_BQHC, log_norm_BHQ = saved
    delta_BHQ = jnp.einsum(
      'BQHC,BQHC->BHQ', d_out_BQHC.astype(jnp.float32), out_BQHC.astype(jnp.float32)
    )
    delta_BHQ -= d_log_norm_BHQ  # of a logit it is its weight times this
    norm_BHPQ = jnp.stack([log_norm_BHQ, delta_BHQ], axis=2)
    given = tile_lib.operands(table, rate_C), split(setup, inputs), inputs
    d_out_YBQHC = products.split(d_out_BQHC, setup.parts)
    d_query_BQHC, d_table = backward.of_queries(setup, table, *given, d_out_YBQHC, norm_BHPQ)
    d_key_BKGC, d_value_BKGC = backward.of_keys(setup, *given, d_out_YBQHC, norm_BHPQ)
    # None: integers have no gradient.
    nothing = Inputs(*(None for _ in Inputs._fields))
    return d_table, nothing._replace(
      query_BQHC=d_query_BQHC, key_BKGC=d_key_BKGC, value_BKGC=d_value_BKGC
    )

  flash.defvjp(forward, gradient)
  return flash


def split(setup, inputs):
  """Returns what kernels take of queries, keys and values, in parts, their integers and waves."""
  arrays = (products.split(x_BLHC, setup.parts) for x_BLHC in inputs[:3])
  return (*arrays, inputs.query_BNQ, inputs.key_BNK, *inputs.waves)


def _forward(setup, rate_C, table, inputs):
  """Returns out_BQHC and log_norm_BHQ, the logarithm of the softmax's normaliser."""
  batch, num_queries, num_heads, channels = inputs.query_BQHC.shape
  parts = setup.parts
  size = _size(setup, channels)
  columns, stages, units = size
  arrays = split(setup, inputs)
  out_YBQHC, log_norm_BHQ = tile_lib.run(
    setup,
    size,
    functools.partial(_forward_kernel, setup, size),
    (*tile_lib.operands(table, rate_C), *arrays, *inputs.forward),
    out_type=(
      arrays[0],
      jax.ShapeDtypeStruct((batch, num_heads, num_queries), jnp.float32),
    ),
    scratch_types=dict(
      query_IYQC=products.blocks(setup, (units, parts, ROWS, channels), columns),
      key_JYKC=products.blocks(setup, (stages, parts, columns, channels), columns),
      value_JYKC=products.blocks(setup, (stages, parts, columns, channels), columns),
      query_INQ=plgpu.SMEM((units, inputs.query_BNQ.shape[1], ROWS), jnp.int32),
      key_JNK=plgpu.SMEM((stages, inputs.key_BNK.shape[1], columns), jnp.int32),
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
  return products.join(out_YBQHC, inputs.query_BQHC.dtype), log_norm_BHQ


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
  given, (code_BIJ, range_BIP, out_YBQHC, log_norm_BHQ) = products.given(refs)
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
      x_QK = tile.coordinate((ROWS, size.columns))
      logits_QK = tile.logits(query_YQC, key_JYKC.at[slot], x_QK)
      return _softmax_step(setup, so_far, logits_QK, value_JYKC.at[slot])

    start = (
      tile_lib.full(setup, query_YQC.shape[1:], 0.0),
      tile_lib.full(setup, (ROWS,), 2 * mask_lib.HIDDEN_LOGIT),
      tile_lib.full(setup, (ROWS,), 0.0),
    )
    code = functools.partial(tile_lib.code, code_BIJ, integers, block, first)
    end = tile_lib.walk(visit, code, start, count, size.stages, ready, free)
    out_QC, log_norm_Q[...] = _softmax_end(*end)
    products.write(setup, query_YQC, out_QC)
    pairs = (
      *products.of_parts(out_YBQHC, batch, rows, head, query_YQC),
      (log_norm_BHQ.at[batch, head, rows], log_norm_Q),
    )
    tile_lib.copy_back(pairs)

  pipeline = functools.partial(tile_lib.pipeline, copy, count, size.stages, free)
  tile_lib.warpgroups(setup, size.units, rooms, compute, pipeline)


def _softmax_step(setup, so_far, logits_QK, value_YKC):
  """Adds a tile's keys to the running softmax: (sum of values, maximum, sum of weights)."""
  sum_QC, max_Q, norm_Q = so_far
  new_max_Q = jnp.maximum(max_Q, logits_QK.max(axis=1))
  shrink_Q = jnp.exp2((max_Q - new_max_Q) * tile_lib.LOG2E)
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
