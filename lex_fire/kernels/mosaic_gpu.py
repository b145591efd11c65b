"""Attention as a Pallas kernel for NVIDIA Hopper (Mosaic GPU), with a bias computed in the tile.

The online softmax of FlashAttention (Dao et al. 2022, arXiv:2205.14135; for Hopper Shah et al.
2024, arXiv:2407.08608): one warpgroup copies blocks of keys and values to shared memory, two others
each multiply 64 queries by them. A bias is its encoding's `piecewise.Table`: from positions alone,
a tile computes x and a line of it, and more only for breakpoints that x can reach there, which are
found beforehand from the bounds of each block. Neither a [Q, K] array nor an atomic operation
exists, so that gradients have the same bits each run.
"""

# Not strict, as its neighbours are: kernels carry no types.
# pyright: basic

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lex_fire import errors
from lex_fire.encodings import base
from lex_fire.kernels import mask as mask_lib
from lex_fire.kernels import mosaic_gpu_backward as backward
from lex_fire.kernels import mosaic_gpu_elementwise as elementwise
from lex_fire.kernels import mosaic_gpu_plan as plan_lib
from lex_fire.kernels import mosaic_gpu_tile as tile_lib
from lex_fire.kernels import residuals, tile

CHANNELS = (64, 128, 256)  # of a head
MOST_SEGMENTS = 1280  # of a table, whose gradient is summed in shared memory
ROWS = tile_lib.ROWS


class Inputs(NamedTuple):
  """Queries, keys and values in whole blocks, prepared, with their integers and tiles.

  Attributes:
    query_BQHC: bfloat16, as the two below.
    key_BKGC: of a length that is a multiple of 128, as the queries'.
    value_BKGC: likewise.
    query_BNQ: see `mosaic_gpu_plan.query_numbers`; B of the integers may be 1.
    key_BNK: see `mosaic_gpu_plan.key_numbers`.
    forward: tiles of the forward pass, queries in rows.
    queries: of the backward pass for queries, likewise.
    keys: of the one for keys, keys in rows.
  """

  query_BQHC: Any
  key_BKGC: Any
  value_BKGC: Any
  query_BNQ: Any
  key_BNK: Any
  forward: Any
  queries: Any
  keys: Any


def why_not(encoding: base.Encoding, channels: int, dtype: Any) -> str | None:
  """Returns why this kernel cannot serve, or None if it can.

  Args:
    encoding: says the decay and the bias of the logits.
    channels: of a head.
    dtype: of queries, keys and values; float32 would be multiplied at a quarter of the speed.
  """
  if encoding.log_decay is not None:
    return f'mosaic_gpu has no decay, but {encoding.name!r} has one'
  if channels not in CHANNELS:
    return f'mosaic_gpu has heads of 64, 128 or 256 channels, not {channels}'
  if dtype != jnp.bfloat16:
    return f'mosaic_gpu takes bfloat16, not {jnp.dtype(dtype).name}'
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
  if not elementwise.is_elementwise(encoding.coordinate, table.coordinate):
    return f'mosaic_gpu needs an x that is elementwise, which that of {encoding.name!r} is not'
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
  interpret: Any = False,
) -> jax.Array:
  """Returns out_BQHC like `reference.attention`.

  `interpret` is what `plgpu.kernel` takes: False on a GPU; its interpreter's parameters to run on
  any platform, slowly, and then in float32 too.

  Raises:
    errors.UserError: as `why_not` says.
  """
  num_queries, num_heads, channels = query_BQHC.shape[1:]
  reason = why_not(encoding, channels, jnp.bfloat16 if interpret else query_BQHC.dtype)
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
  table = None if encoding.table is None else encoding.table(params, num_heads)
  query_padding, key_padding = (-x.shape[1] % (2 * ROWS) for x in (query_BQHC, key_BKGC))
  query_BNQ = plan_lib.query_numbers(mask, query_position_BQ, query_segment_BQ, query_padding)
  key_BNK = plan_lib.key_numbers(key_position_BK, key_segment_BK, key_padding)
  codes = functools.partial(plan_lib.codes, query_BNQ, key_BNK, table, encoding.coordinate)
  inputs = Inputs(
    query_BQHC=_padded(query_BQHC, query_padding),
    key_BKGC=_padded(key_BKGC, key_padding),
    value_BKGC=_padded(value_BKGC, key_padding),
    query_BNQ=query_BNQ,
    key_BNK=key_BNK,
    forward=plan_lib.tiles(codes((ROWS, key_block(channels))), 2),
    queries=plan_lib.tiles(codes((ROWS, backward.COLUMNS)), 2),
    keys=plan_lib.tiles(jnp.swapaxes(codes((backward.COLUMNS, ROWS)), 1, 2), 2),
  )
  setup = tile_lib.Setup(
    coordinate=encoding.coordinate,
    numbers=jax.tree.structure({} if table is None else table.coordinate),
    segments=0 if table is None else table.slope_ZH.shape[0],
    learned=encoding.learned,
    interpret=interpret,
  )
  table = None if table is None else plan_lib.table(table, num_heads)
  return _flash(setup)(table, inputs)[:, :num_queries]


def key_block(channels: int) -> int:
  """Returns how many keys a tile of the forward pass has: shared memory holds two blocks."""
  return 64 if channels == 256 else 128


def _padded(x_BLHC, padding):
  return jnp.pad(x_BLHC, [(0, 0), (0, padding), (0, 0), (0, 0)])


def _flash(setup):
  """Makes (table, Inputs) -> out_BQHC with flash attention's own gradient."""

  @jax.custom_vjp
  def flash(table, inputs):
    return _forward(setup, table, inputs)[0]

  def forward(table, inputs):
    out_BQHC, log_norm_BHQ = residuals.named(*_forward(setup, table, inputs))
    return out_BQHC, (table, inputs, out_BQHC, log_norm_BHQ)

  def gradient(saved, d_out_BQHC):
    table, inputs, out_BQHC, log_norm_BHQ = saved
    delta_BHQ = jnp.einsum(
      'BQHC,BQHC->BHQ', d_out_BQHC.astype(jnp.float32), out_BQHC.astype(jnp.float32)
    )
    norm_BHPQ = jnp.stack([log_norm_BHQ, delta_BHQ], axis=2)
    d_query_BQHC, d_table = backward.of_queries(setup, table, inputs, d_out_BQHC, norm_BHPQ)
    d_key_BKGC, d_value_BKGC = backward.of_keys(setup, table, inputs, d_out_BQHC, norm_BHPQ)
    # None: integers have no gradient.
    nothing = Inputs(*(None for _ in Inputs._fields))
    return d_table, nothing._replace(
      query_BQHC=d_query_BQHC, key_BKGC=d_key_BKGC, value_BKGC=d_value_BKGC
    )

  flash.defvjp(forward, gradient)
  return flash


def _forward(setup, table, inputs):
  """Returns out_BQHC and log_norm_BHQ, the logarithm of the softmax's normaliser."""
  batch, num_queries, num_heads, channels = inputs.query_BQHC.shape
  columns, stages = key_block(channels), 4 if channels == 64 else 2
  dtype = inputs.query_BQHC.dtype
  block = functools.partial(tile_lib.block_in_shared_memory, dtype=dtype)
  return tile_lib.run(
    setup,
    functools.partial(_forward_kernel, setup, stages),
    (*tile_lib.operands(table), *inputs[:5], *inputs.forward),
    out_type=(
      inputs.query_BQHC,
      jax.ShapeDtypeStruct((batch, num_heads, num_queries), jnp.float32),
    ),
    scratch_types=dict(
      query_IQC=block((2, ROWS, channels)),
      key_JKC=block((stages, columns, channels)),
      value_JKC=block((stages, columns, channels)),
      query_INQ=plgpu.SMEM((2, 4, ROWS), jnp.int32),
      key_JNK=plgpu.SMEM((stages, 2, columns), jnp.int32),
      log_norm_IQ=plgpu.SMEM((2, ROWS), jnp.float32),
      query_ready=plgpu.Barrier(num_arrivals=2, num_barriers=2),
      ready=plgpu.Barrier(num_arrivals=3, num_barriers=stages),
      free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    ),
    grid=dict(head=num_heads, row=num_queries // (2 * ROWS), batch=batch),
  )


def _forward_kernel(
  setup,
  stages,
  line_HZX,
  number_HN,
  query_BQHC,
  key_BKGC,
  value_BKGC,
  query_BNQ,
  key_BNK,
  code_BIJ,
  range_BIP,
  out_BQHC,
  log_norm_BHQ,
  *,
  query_IQC,
  key_JKC,
  value_JKC,
  query_INQ,
  key_JNK,
  log_norm_IQ,
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
    pairs = (
      (key_BKGC.at[batch, keys, group], key_JKC.at[slot]),
      (value_BKGC.at[batch, keys, group], value_JKC.at[slot]),
      (key_BNK.at[tile_lib.row_of(key_BNK, batch), :, keys], key_JNK.at[slot]),
    )
    tile_lib.copy(pairs, ready.at[slot])

  def compute(unit):
    block = 2 * row + unit
    rows = pl.ds(block * ROWS, ROWS)
    query_QC, query_NQ, log_norm_Q = query_IQC.at[unit], query_INQ.at[unit], log_norm_IQ.at[unit]
    pairs = (
      (query_BQHC.at[batch, rows, head], query_QC),
      (query_BNQ.at[tile_lib.row_of(query_BNQ, batch), :, rows], query_NQ),
    )
    tile_lib.copy(pairs, query_ready.at[unit])
    plgpu.barrier_wait(query_ready.at[unit])
    numbers = tile_lib.numbers(setup, number_HN, head)

    def visit(n, code, slot, so_far):
      del n
      positions = tile_lib.Positions(query_NQ, key_JNK.at[slot], query_axis=0)
      x_QK = tile_lib.coordinate(setup, positions, numbers, (ROWS, columns))
      blocks = query_QC, key_JKC.at[slot]
      logits_QK = tile_lib.logits(setup, positions, code, *blocks, line_HZX, head, x_QK)
      return _softmax_step(setup, so_far, logits_QK, value_JKC.at[slot])

    start = (
      tile_lib.full(setup, query_QC.shape, 0.0),
      tile_lib.full(setup, (ROWS,), 2 * mask_lib.HIDDEN_LOGIT),
      tile_lib.full(setup, (ROWS,), 0.0),
    )
    code = functools.partial(tile_lib.code, code_BIJ, integers, block, first)
    end = tile_lib.walk(visit, code, start, count, stages, ready, free)
    out_QC, log_norm_Q[...] = _softmax_end(*end)
    query_QC[...] = out_QC.astype(query_QC.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(query_QC, out_BQHC.at[batch, rows, head])
    plgpu.copy_smem_to_gmem(log_norm_Q, log_norm_BHQ.at[batch, head, rows])
    plgpu.wait_smem_to_gmem(0)

  tile_lib.warpgroups(compute, functools.partial(tile_lib.pipeline, copy, count, stages, free))


def _softmax_step(setup, so_far, logits_QK, value_KC):
  """Adds a tile's keys to the running softmax: (sum of values, maximum, sum of weights)."""
  sum_QC, max_Q, norm_Q = so_far
  new_max_Q = jnp.maximum(max_Q, logits_QK.max(axis=1))
  shrink_Q = jnp.exp2((max_Q - new_max_Q) * tile_lib.LOG2E)
  # A query that has seen no key yet: 0, as differences of hidden logits are not exact.
  origin_Q = jnp.where(new_max_Q > mask_lib.HIDDEN_LOGIT / 2, new_max_Q, 0.0)
  weights_QK = tile_lib.weights(logits_QK, origin_Q, 0)
  norm_Q = norm_Q * shrink_Q + weights_QK.sum(axis=1)
  sum_QC *= tile_lib.spread(shrink_Q, sum_QC.shape, 0)
  return tile_lib.add_product(setup, sum_QC, weights_QK, value_KC), new_max_Q, norm_Q


def _softmax_end(sum_QC, max_Q, norm_Q):
  """Returns out_QC and the logarithm of the normaliser.

  A query that saw no key gets 0 and +inf, with which its weights are 0 in the backward pass.
  """
  seen_Q = max_Q > mask_lib.HIDDEN_LOGIT / 2
  norm_Q = jnp.where(seen_Q, norm_Q, 1.0)
  scale_Q = jnp.where(seen_Q, 1 / norm_Q, 0.0)
  log_norm_Q = jnp.where(seen_Q, max_Q + jnp.log(norm_Q), jnp.inf)
  return sum_QC * tile_lib.spread(scale_Q, sum_QC.shape, 0), log_norm_Q
