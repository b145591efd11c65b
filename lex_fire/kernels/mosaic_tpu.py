"""Attention as a Pallas kernel for TPU (Mosaic), with any bias or decay computed inside the tile.

The online softmax of FlashAttention (Dao et al. 2022, arXiv:2205.14135): a forward kernel, and two
backward ones, for queries and for keys. A bias is its encoding's `piecewise.Table`: from positions
alone, a tile computes x once for its heads and a line of it a head, and more only for breakpoints
that x can reach there, which `plan.make` finds beforehand. The gradient of the table is a
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
from lex_fire.kernels import decay, residuals, tile
from lex_fire.kernels import mask as mask_lib
from lex_fire.kernels import plan as plan_lib
from lex_fire.kernels.mosaic_tpu_size import BLOCK, blocks, why_not
from lex_fire.kernels.mosaic_tpu_tile import Constants, Setup, Tile, dot, per_head
from lex_fire.kernels.plan import Keys, Queries

VMEM_BYTES = 60 * 2**20  # of the 64 MiB of a v5p; v5e and v6e have 128


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
    errors.UserError: as `mosaic_tpu_size.why_not` says.
  """
  reason = why_not(encoding, mask, query_BQHC, key_BKGC)
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
  rate_1C = stretch = None
  if encoding.log_decay is not None:
    rate_1C = np.float32(encoding.log_decay(channels)[None])
    stretch = decay.stretch_of(encoding.log_decay(channels))
  table = None if encoding.table is None else encoding.table(params, num_heads)
  cut = blocks(query_BQHC, key_BKGC, block)
  coordinate, of_coordinate = _traced(encoding.coordinate, table, cut.queries, cut.keys)
  setup = Setup(
    coordinate=coordinate,
    learned=encoding.learned,
    stretch=stretch,
    query_block=cut.queries,
    key_block=cut.keys,
    heads=cut.heads,
    groups=cut.groups,
    interpret=interpret,
  )
  queries, keys = plan_lib.cut(
    mask,
    cut.queries,
    cut.keys,
    setup.stretch,
    (query_BQHC, query_position_BQ, query_segment_BQ),
    (key_BKGC, value_BKGC, key_position_BK, key_segment_BK),
  )
  plan = plan_lib.make(mask, cut.queries, cut.keys, queries, keys, table, encoding.coordinate)
  flash = _flash(setup, Constants(rate_1C, of_coordinate))
  return jnp.swapaxes(flash(table, queries, keys, plan), 1, 2)[:, : query_BQHC.shape[1]]


def _traced(coordinate, table, query_block, key_block):
  """Returns the coordinate of a tile as a jaxpr, and its constants, which kernels must be given."""
  if table is None:
    return None, ()
  number = jax.ShapeDtypeStruct((), jnp.float32)
  i_Q1 = jax.ShapeDtypeStruct((query_block, 1), jnp.int32)
  j_1K = jax.ShapeDtypeStruct((1, key_block), jnp.int32)
  numbers = jax.tree.map(lambda _: number, table.coordinate)
  traced = jax.make_jaxpr(coordinate)(numbers, i_Q1, j_1K)
  return traced.jaxpr, tuple(traced.consts)


class Softmax(NamedTuple):
  """What the backward kernels take from the forward one; N blocks of H heads."""

  d_out_BHQC: Any
  log_norm_BNHQ: Any
  delta_BNHQ: Any  # sum_k p_k dp_k of each query, which the softmax's gradient subtracts


def _forward_kernel(
  spans, _, queries, keys, table, constants, out, log_norm, sums, largest, norms, *, setup
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

  @pl.when(spans[at] > 0)
  def _():
    tile = Tile(setup, _unpacked(spans[at]), first_head, queries, keys, table, constants)

    def add(head):
      logits_QK = tile.logits(head)
      _, value_KC = tile.key_and_value(head)
      largest_Q1 = jnp.maximum(largest[head], logits_QK.max(axis=1, keepdims=True))
      shrink_Q1 = jnp.exp(largest[head] - largest_Q1)
      weights_QK = jnp.exp(logits_QK - largest_Q1)
      values_QC = dot(weights_QK.astype(value_KC.dtype), value_KC, (1, 0))
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


HALF = 15  # bits: a table has fewer than 2^15 segments


def _packed(plan):
  """Returns the spans of all tiles, each in one number, as scalar memory is small."""
  return (plan.low_IJ | plan.high_IJ << HALF).ravel()


def _unpacked(span):
  return span & 2**HALF - 1, span >> HALF


def _each(count, function):
  jax.lax.fori_loop(0, count, lambda index, _: function(index), None)


def _weights_and_gradient(tile, softmax, head):
  """Returns weights_QK of a head in a tile, and the gradient of its logits."""
  _, value_KC = tile.key_and_value(head)
  weights_QK = jnp.exp(tile.logits(head) - softmax.log_norm_BNHQ[0, 0, pl.ds(head, 1)].T)
  d_weights_QK = dot(softmax.d_out_BHQC[0, head], value_KC, (1, 1))
  d_logits_QK = weights_QK * (d_weights_QK - softmax.delta_BNHQ[0, 0, pl.ds(head, 1)].T)
  return weights_QK, d_logits_QK


def _query_kernel(
  spans, _, queries, keys, table, constants, softmax, d_query, d_table, d_queries, *, setup
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

  @pl.when(spans[at] > 0)
  def _():
    tile = Tile(setup, _unpacked(spans[at]), first_head, queries, keys, table, constants)

    def add(head, d_x_QK):
      _, d_logits_QK = _weights_and_gradient(tile, softmax, head)
      d_queries[head] += tile.query_gradient(head, d_logits_QK)
      if d_table is not None:
        tile.add_table_gradient(head, d_logits_QK, d_table)
      if shares_numbers:
        return d_x_QK + tile.x_gradient(head, d_logits_QK)
      if has_numbers:
        tile.add_numbers_gradient(head, tile.x_gradient(head, d_logits_QK), d_table)
      return d_x_QK

    has_numbers = d_table is not None and bool(d_table.coordinate)
    shares_numbers = has_numbers and not per_head(table)
    shape = (setup.query_block, setup.key_block) if shares_numbers else (1, 1)
    d_x_QK = jax.lax.fori_loop(0, setup.heads, add, jnp.zeros(shape, jnp.float32))
    if shares_numbers:
      tile.add_numbers_gradient(0, d_x_QK, d_table)

  @pl.when(step == steps - 1)
  def _():
    d_query[0] = d_queries[...].astype(d_query.dtype)


def _key_kernel(
  spans, _, queries, keys, table, constants, softmax, d_key, d_value, d_keys, d_values, *, setup
):
  """Visits tiles column by column: grid (batch, head block, key block, query block)."""
  column, step, steps = pl.program_id(2), pl.program_id(3), pl.num_programs(3)
  at = step * pl.num_programs(2) + column
  first_head = pl.program_id(1) * setup.heads

  @pl.when(step == 0)
  def _():
    d_keys[...], d_values[...] = jnp.zeros_like(d_keys), jnp.zeros_like(d_values)

  @pl.when(spans[at] > 0)
  def _():
    tile = Tile(setup, _unpacked(spans[at]), first_head, queries, keys, table, constants)

    def add(head):
      group = setup.group(head)
      weights_QK, d_logits_QK = _weights_and_gradient(tile, softmax, head)
      d_out_QC = softmax.d_out_BHQC[0, head]
      d_values[group] += dot(weights_QK.astype(d_out_QC.dtype), d_out_QC, (0, 0))
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

    def index_map(batch, heads, outer, step, spans, hold):
      del spans
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

  def inputs(self, queries, keys, table, constants):
    """Returns the specs of what all kernels take after the plan."""

    def whole(array):
      return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)

    return (
      jax.tree.map(self.query, queries),
      jax.tree.map(self.key, keys),
      jax.tree.map(self._scalars, table),
      jax.tree.map(whole, constants),
    )

  def _scalars(self, numbers):
    """Returns the spec of all numbers of one axis, or of a row of more for each head block."""
    if numbers.ndim == 1:
      return pl.BlockSpec(memory_space=pltpu.SMEM)
    return pl.BlockSpec(
      (1, *numbers.shape[1:]), lambda _, heads, *rest: (heads, 0, 0), memory_space=pltpu.SMEM
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
      num_scalar_prefetch=2,
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
  )(_packed(plan), hold_IJ.ravel(), *inputs)


class Output(NamedTuple):
  """An output of a kernel."""

  array: jax.ShapeDtypeStruct
  spec: pl.BlockSpec


def _flat(table, heads):
  """Returns a table as kernels read it: the lines of a tile's heads in a row, a head's together."""
  if table is None:
    return None

  def rows(number_ZH):
    return number_ZH.T.reshape(number_ZH.shape[1] // heads, 1, -1)

  if table.lower_Z is None:
    return table._replace(slope_ZH=rows(table.slope_ZH))
  lower_Z = jnp.append(table.lower_Z, jnp.inf)  # an end to the last
  return table._replace(
    lower_Z=lower_Z, slope_ZH=rows(table.slope_ZH), value_ZH=rows(table.value_ZH)
  )


def _flash(setup, constants):
  """Makes (table, Queries, Keys, Plan) -> out_BHQC with flash attention's own gradient."""

  def forward(table, queries, keys, plan):
    query_BHQC = queries.query_BHQC
    batch, num_heads, num_queries, channels = query_BHQC.shape
    rows, columns = plan.low_IJ.shape
    specs = Specs(setup, columns, by_column=False)
    inputs = queries, keys, _flat(table, setup.heads), constants
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
    out_BHQC, log_norm_BNHQ = residuals.named(out_BHQC, log_norm_BNHQ)
    return out_BHQC, (table, queries, keys, plan, out_BHQC, log_norm_BNHQ)

  def backward(saved, d_out_BHQC):
    table, queries, keys, plan, out_BHQC, log_norm_BNHQ = saved
    delta_BHQ = (d_out_BHQC.astype(jnp.float32) * out_BHQC.astype(jnp.float32)).sum(axis=3)
    softmax = Softmax(d_out_BHQC, log_norm_BNHQ, delta_BHQ.reshape(log_norm_BNHQ.shape))
    d_query_BHQC, d_table = _query_gradient(setup, constants, table, queries, keys, plan, softmax)
    d_key_BGKC, d_value_BGKC = _key_gradient(setup, constants, table, queries, keys, plan, softmax)
    # None: positions and segments are integers and have no gradient.
    d_queries = Queries(d_query_BHQC, *[None] * (len(queries) - 1))
    d_keys = Keys(d_key_BGKC, d_value_BGKC, *[None] * (len(keys) - 2))
    return d_table, d_queries, d_keys, None

  @jax.custom_vjp
  def flash(table, queries, keys, plan):
    return forward(table, queries, keys, plan)[0]

  flash.defvjp(forward, backward)
  return flash


def _like(array, dtype):
  return jax.ShapeDtypeStruct(array.shape, dtype)


def _query_gradient(setup, constants, table, queries, keys, plan, softmax):
  """Returns d_query_BHQC and the gradient of the table, None if there is none."""
  query_BHQC = queries.query_BHQC
  rows, columns = plan.low_IJ.shape
  specs = Specs(setup, columns, by_column=False)
  inputs = queries, keys, _flat(table, setup.heads), constants
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


def _key_gradient(setup, constants, table, queries, keys, plan, softmax):
  """Returns d_key_BGKC and d_value_BGKC."""
  rows, columns = plan.low_IJ.shape
  specs = Specs(setup, columns, by_column=True)
  inputs = queries, keys, _flat(table, setup.heads), constants
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
