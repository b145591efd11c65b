"""Attention as a Pallas kernel for NVIDIA Hopper and newer (Mosaic GPU), a bias computed in the tile.

The online softmax of FlashAttention (Dao et al. 2022, arXiv:2205.14135; for Hopper Shah et al. 2024,
arXiv:2407.08608): one warpgroup copies blocks of keys and values to shared memory, two others each
multiply 64 queries by them. A bias is its encoding's `piecewise.Table`: from positions alone, a
tile computes x and a line of it, and more only for breakpoints that x can reach there, which are
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
from lex_fire.kernels import mosaic_gpu_plan as plan_lib
from lex_fire.kernels import mosaic_gpu_tile as tile_lib
from lex_fire.kernels import tile

CHANNELS = (64, 128, 256)  # of a head
MOST_SEGMENTS = 1280  # of a table, whose gradient is summed in shared memory
ROWS = tile_lib.ROWS


class Inputs(NamedTuple):
  """Queries, keys and values in whole blocks, prepared, with their integers and tiles.

  Attributes:
    query_BQHC: bfloat16, as the two below.
    key_BKGC: of a length that is a multiple of 128, as the queries'.
    value_BKGC: likewise.
    query_B4Q: see `mosaic_gpu_plan.query_numbers`; B of the integers may be 1.
    key_B2K: see `mosaic_gpu_plan.key_numbers`.
    forward: tiles of the forward pass.
    backward: tiles of the pass for queries; those of the pass for keys are `transposed`.
    transposed: likewise.
  """

  query_BQHC: Any
  key_BKGC: Any
  value_BKGC: Any
  query_B4Q: Any
  key_B2K: Any
  forward: plan_lib.Tiles
  queries: plan_lib.Tiles
  keys: plan_lib.Tiles


def why_not(encoding: base.Encoding, channels: int, dtype: Any) -> str | None:
  """Returns why this kernel cannot serve, or None if it can."""
  if encoding.bias is not None and encoding.table is None:
    return f'mosaic_gpu needs a table of the bias, which {encoding.name!r} has not'
  if encoding.log_decay is not None:
    return f'mosaic_gpu has no decay, but {encoding.name!r} has one'
  if channels not in CHANNELS:
    return f'mosaic_gpu has heads of 64, 128 or 256 channels, not {channels}'
  if dtype != jnp.bfloat16:
    return f'mosaic_gpu takes bfloat16, not {jnp.dtype(dtype).name}'
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
  """Returns out_BQHC like `reference.attention`, of bfloat16.

  Raises:
    errors.UserError: for a bias that has no table or too long a one, a decay, another number of
      channels, or another dtype.
  """
  num_queries, num_heads, channels = query_BQHC.shape[1:]
  reason = why_not(encoding, channels, query_BQHC.dtype)
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
  if table is not None and table.slope_ZH.shape[0] > MOST_SEGMENTS:
    raise errors.UserError(
      f'mosaic_gpu has tables of at most {MOST_SEGMENTS} segments, but {encoding.name!r} has '
      f"{table.slope_ZH.shape[0]}; use implementation='chunked'"
    )
  query_padding, key_padding = (-x.shape[1] % (2 * ROWS) for x in (query_BQHC, key_BKGC))
  query_B4Q = plan_lib.query_numbers(mask, query_position_BQ, query_segment_BQ, query_padding)
  key_B2K = plan_lib.key_numbers(key_position_BK, key_segment_BK, key_padding)
  codes = functools.partial(plan_lib.codes, query_B4Q, key_B2K, table, encoding.coordinate)
  block = backward.block(channels)
  inputs = Inputs(
    query_BQHC=_padded(query_BQHC, query_padding),
    key_BKGC=_padded(key_BKGC, key_padding),
    value_BKGC=_padded(value_BKGC, key_padding),
    query_B4Q=query_B4Q,
    key_B2K=key_B2K,
    forward=plan_lib.tiles(codes((ROWS, key_block(channels))), 2),
    queries=plan_lib.tiles(codes((ROWS, block)), 2),
    keys=plan_lib.tiles(jnp.swapaxes(codes((block, ROWS)), 1, 2), 2),
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
    out_BQHC, log_norm_BHQ = _forward(setup, table, inputs)
    return out_BQHC, (table, inputs, out_BQHC, log_norm_BHQ)

  def gradient(saved, d_out_BQHC):
    table, inputs, out_BQHC, log_norm_BHQ = saved
    delta_BHQ = jnp.einsum(
      'BQHC,BQHC->BHQ', d_out_BQHC.astype(jnp.float32), out_BQHC.astype(jnp.float32)
    )
    norm_BH2Q = jnp.stack([log_norm_BHQ, delta_BHQ], axis=2)
    d_query_BQHC, d_table = backward.of_queries(setup, table, inputs, d_out_BQHC, norm_BH2Q)
    d_key_BKGC, d_value_BKGC = backward.of_keys(setup, table, inputs, d_out_BQHC, norm_BH2Q)
    # None: integers have no gradient.
    nothing = Inputs(*(None for _ in Inputs._fields))
    return d_table, nothing._replace(
      query_BQHC=d_query_BQHC, key_BKGC=d_key_BKGC, value_BKGC=d_value_BKGC
    )

  flash.defvjp(forward, gradient)
  return flash


def _forward(setup, table, inputs):
  """Returns out_BQHC and log_norm_BHQ, the logarithm of the softmax's normaliser in bits."""
  batch, num_queries, num_heads, channels = inputs.query_BQHC.shape
  columns, stages = key_block(channels), 4 if channels == 64 else 2
  block = tile_lib.block_in_shared_memory
  return tile_lib.run(
    setup,
    functools.partial(_forward_kernel, setup, stages),
    (*tile_lib.operands(table), *inputs[:5], *inputs.forward),
    out_type=(
      inputs.query_BQHC,
      jax.ShapeDtypeStruct((batch, num_heads, num_queries), jnp.float32),
    ),
    scratch_types=dict(
      query_2QC=block((2, ROWS, channels)),
      key_SKC=block((stages, columns, channels)),
      value_SKC=block((stages, columns, channels)),
      query_24Q=plgpu.SMEM((2, 4, ROWS), jnp.int32),
      key_S2K=plgpu.SMEM((stages, 2, columns), jnp.int32),
      log_norm_2Q=plgpu.SMEM((2, ROWS), jnp.float32),
      query_ready=plgpu.Barrier(num_arrivals=2, num_barriers=2),
      ready=plgpu.Barrier(num_arrivals=3, num_barriers=stages),
      free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    ),
    grid=dict(head=num_heads, row=num_queries // (2 * ROWS), batch=batch),
  )


def _forward_kernel(
  setup,
  stages,
  line_HZ4,
  number_HN,
  query_BQHC,
  key_BKGC,
  value_BKGC,
  query_B4Q,
  key_B2K,
  code_BIJ,
  range_BI2,
  out_BQHC,
  log_norm_BHQ,
  *,
  query_2QC,
  key_SKC,
  value_SKC,
  query_24Q,
  key_S2K,
  log_norm_2Q,
  query_ready,
  ready,
  free,
):
  batch, head, row = (jax.lax.axis_index(name) for name in ('batch', 'head', 'row'))
  integers = tile_lib.row_of(code_BIJ, batch)
  columns = key_SKC.shape[1]
  first, count = range_BI2[integers, row, 0], range_BI2[integers, row, 1]

  def copy(n, slot):
    group = head // (query_BQHC.shape[2] // key_BKGC.shape[2])
    keys = pl.ds((first + n) * columns, columns)
    plgpu.copy_gmem_to_smem(
      key_BKGC.at[batch, keys, group], key_SKC.at[slot], ready.at[slot]
    )
    plgpu.copy_gmem_to_smem(
      value_BKGC.at[batch, keys, group], value_SKC.at[slot], ready.at[slot]
    )
    numbers_2K = key_B2K.at[tile_lib.row_of(key_B2K, batch), :, keys]
    plgpu.copy_gmem_to_smem(numbers_2K, key_S2K.at[slot], ready.at[slot])

  def compute(unit):
    block = 2 * row + unit
    rows = pl.ds(block * ROWS, ROWS)
    query_QC, query_4Q = query_2QC.at[unit], query_24Q.at[unit]
    plgpu.copy_gmem_to_smem(query_BQHC.at[batch, rows, head], query_QC, query_ready.at[unit])
    numbers_4Q = query_B4Q.at[tile_lib.row_of(query_B4Q, batch), :, rows]
    plgpu.copy_gmem_to_smem(numbers_4Q, query_4Q, query_ready.at[unit])
    plgpu.barrier_wait(query_ready.at[unit])
    numbers = tile_lib.numbers(setup, number_HN, head)

    def visit(code, slot, so_far):
      sum_QC, max_Q, norm_Q = so_far
      positions = tile_lib.Positions(query_4Q, key_S2K.at[slot], query_axis=0)
      logits_QK = tile_lib.product(setup, query_QC, key_SKC.at[slot]) * tile_lib.LOG2E
      if setup.segments:
        x_QK = tile_lib.coordinate(setup, positions, numbers, logits_QK.shape)
        logits_QK += tile_lib.bias(setup, line_HZ4, head, code, x_QK)
      logits_QK = tile_lib.hide(setup, positions, code, logits_QK)
      new_max_Q = jnp.maximum(max_Q, logits_QK.max(axis=1))
      shrink_Q = jnp.exp2(max_Q - new_max_Q)
      weights_QK = jnp.exp2(logits_QK - tile_lib.spread(new_max_Q, logits_QK.shape, 0))
      norm_Q = norm_Q * shrink_Q + weights_QK.sum(axis=1)
      sum_QC *= tile_lib.spread(shrink_Q, sum_QC.shape, 0)
      return (
        tile_lib.add_product(setup, sum_QC, weights_QK, value_SKC.at[slot]),
        new_max_Q,
        norm_Q,
      )

    def step(n, so_far):
      slot = jax.lax.rem(n, stages)
      plgpu.barrier_wait(ready.at[slot])
      code = code_BIJ[integers, block, first + n]
      so_far = jax.lax.cond(
        code & tile_lib.VISIT != 0,
        functools.partial(visit, code, slot),
        lambda so_far: so_far,
        so_far,
      )
      plgpu.barrier_arrive(free.at[slot])
      return so_far

    start = (
      tile_lib.full(setup, query_QC.shape, 0.0),
      tile_lib.full(setup, (ROWS,), 2 * mask_lib.HIDDEN_LOGIT),
      tile_lib.full(setup, (ROWS,), 0.0),
    )
    sum_QC, max_Q, norm_Q = jax.lax.fori_loop(0, count, step, start)
    # A query that saw no key gets 0 and +inf, with which its weights are 0 in the backward pass.
    seen_Q = max_Q > mask_lib.HIDDEN_LOGIT / 2
    norm_Q = jnp.where(seen_Q, norm_Q, 1.0)
    scale_Q = jnp.where(seen_Q, 1 / norm_Q, 0.0)
    out_QC = sum_QC * tile_lib.spread(scale_Q, sum_QC.shape, 0)
    log_norm_Q = jnp.where(seen_Q, max_Q + jnp.log(norm_Q) * tile_lib.LOG2E, jnp.inf)
    query_QC[...] = out_QC.astype(query_QC.dtype)
    log_norm_2Q.at[unit][...] = log_norm_Q
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(query_QC, out_BQHC.at[batch, rows, head])
    plgpu.copy_smem_to_gmem(log_norm_2Q.at[unit], log_norm_BHQ.at[batch, head, rows])
    plgpu.wait_smem_to_gmem(0)

  tile_lib.warpgroups(compute, functools.partial(tile_lib.pipeline, copy, count, stages, free))
