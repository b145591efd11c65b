"""The backward pass of the Pallas kernel for TPU: a kernel for queries and the table, one for keys.

Each recomputes the weights of a tile from the softmax's normaliser, which the forward pass left.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lex_fire.kernels import mosaic_tpu_band as band_lib
from lex_fire.kernels import mosaic_tpu_call as call
from lex_fire.kernels import mosaic_tpu_heads as heads_lib
from lex_fire.kernels import mosaic_tpu_x as x_lib
from lex_fire.kernels.mosaic_tpu_products import dot
from lex_fire.kernels.mosaic_tpu_size import LANES, SUBLANES
from lex_fire.kernels.mosaic_tpu_tile import Tile


class Softmax(NamedTuple):
  """What the backward kernels take from the forward one; N blocks of H heads."""

  d_out_BHQC: Any
  log_norm_BNHQ: Any
  delta_BNHQ: Any  # sum_k p_k dp_k of each query, which the softmax's gradient subtracts


def _weights_and_gradient(tile, softmax, head, products, bias):
  """Returns weights_QK of a head in a tile, and the gradient of its logits."""
  _, value_KC = tile.key_and_value(head)
  logits_QK, height = tile.logits(head, products, bias)
  log_norm_1Q = softmax.log_norm_BNHQ[0, 0, pl.ds(head, 1)]
  origin_Q1 = (log_norm_1Q if height is None else log_norm_1Q - height).T
  weights_QK = jnp.exp(logits_QK - origin_Q1)
  d_weights_QK = dot(softmax.d_out_BHQC[0, head], value_KC, (1, 1))
  d_logits_QK = weights_QK * (d_weights_QK - softmax.delta_BNHQ[0, 0, pl.ds(head, 1)].T)
  return weights_QK, d_logits_QK


def _query_kernel(spans, held, inputs, softmax, d_query, d_table, d_queries, scratch, *, setup):
  """Visits tiles row by row, for the gradient of queries and of the table."""
  own, lines = scratch
  sums = None if lines is None else lines._replace(coordinate=d_table.coordinate)
  at = call.Place(setup, by_column=False)
  band = band_lib.lay_out(setup, at, spans, inputs, own.band)

  @pl.when(at.begins_row)
  def _():
    if sums is not None:
      for ref in jax.tree.leaves(lines):
        ref[...] = jnp.zeros_like(ref)
      for ref in jax.tree.leaves(sums.coordinate):
        for index in range(ref.shape[3]):
          ref[0, 0, 0, index] = jnp.float32(0)

  @pl.when(at.begins)
  def _():
    d_queries[...] = jnp.zeros_like(d_queries)

  @pl.when(spans[at.tile] != 0)
  def _():
    tile = Tile(setup, spans[at.tile], held[at.tile], at.first_head, inputs, own)

    def add(head, products, bias):
      _, d_logits_QK = _weights_and_gradient(tile, softmax, head, products, bias)
      d_queries[head] += products.query_gradient(head, d_logits_QK)
      if sums is not None:
        bias.add_gradient(head, d_logits_QK, sums)

    heads_lib.visit(tile, functools.partial(heads_lib.each_head, setup.heads, add), sums)

  @pl.when(at.ends)
  def _():
    d_query[0] = d_queries[...].astype(d_query.dtype)

  if lines is not None:
    if band is not None:
      pl.when(at.is_last & band.is_met)(lambda: band.finish(sums))

    @pl.when(at.ends_row)
    def _():
      jax.tree.map(_write_sums, lines, d_table._replace(coordinate={}))


def _write_sums(in_lanes, out):
  """Adds up what lies in the rows and lanes of each sum, so that memory sees one number."""
  width = in_lanes.shape[1]
  rows = in_lanes.shape[0] // out.shape[2]  # of as many sums as a row of `out` has

  def write(number, _):
    of_some = in_lanes[pl.ds(pl.multiple_of(number * rows, rows), rows)]
    sums_ST = of_some.reshape(LANES, rows // LANES, width).sum(axis=1)
    # A product with ones: it moves sums from rows into lanes as it makes them, exactly.
    sums_1S = dot(jnp.ones((SUBLANES, width), jnp.float32), sums_ST, (1, 1))[:1]
    out[0, 0, pl.ds(number, 1)] = sums_1S

  jax.lax.fori_loop(0, out.shape[2], write, None)


def _key_kernel(spans, held, inputs, softmax, d_key, d_value, d_keys, d_values, own, *, setup):
  """Visits tiles column by column."""
  at = call.Place(setup, by_column=True)
  band_lib.lay_out(setup, at, spans, inputs, own.band)

  @pl.when(at.begins)
  def _():
    d_keys[...], d_values[...] = jnp.zeros_like(d_keys), jnp.zeros_like(d_values)

  @pl.when(spans[at.tile] != 0)
  def _():
    tile = Tile(setup, spans[at.tile], held[at.tile], at.first_head, inputs, own)

    def add(head, products, bias):
      group = setup.group(head)
      weights_QK, d_logits_QK = _weights_and_gradient(tile, softmax, head, products, bias)
      d_out_QC = softmax.d_out_BHQC[0, head]
      d_values[group] += dot(weights_QK.astype(d_out_QC.dtype), d_out_QC, (0, 0))
      d_keys[group] += products.key_gradient(head, d_logits_QK)

    heads_lib.visit(tile, functools.partial(heads_lib.each_head, setup.heads, add))

  @pl.when(at.ends)
  def _():
    d_key[0] = d_keys[...].astype(d_key.dtype)
    d_value[0] = d_values[...].astype(d_value.dtype)


def _softmax_specs(specs, softmax):
  return Softmax(specs.query(softmax.d_out_BHQC), specs.norm(), specs.norm())


def query_gradient(setup, constants, table, queries, keys, plan, softmax, dtype):
  """Returns d_query_BHQC and the gradient of the table, None if there is none."""
  query_BHQC = queries.query_BHQC
  rows, columns = plan.low_IJ.shape
  specs = call.Specs(setup, columns, by_column=False)
  inputs = call.inputs(setup, plan, queries, keys, table, constants)
  grid = (*softmax.delta_BNHQ.shape[:2], rows, columns)

  def scalars(numbers):
    """Sums of a batch row and a block of heads, in scalar memory."""
    return output((1, max(1, numbers.size // grid[1])), pltpu.SMEM)

  def lines_of(numbers):
    """Sums of a batch row and a block of heads, LANES in a row."""
    return output((pl.cdiv(count(numbers), LANES), LANES), pltpu.VMEM)

  def in_lanes(numbers):
    """The same while they are made: of what lies in each lane, in `sum_rows` rows each."""
    rows = pl.cdiv(count(numbers), LANES) * LANES * setup.sum_rows
    return pltpu.VMEM((rows, x_lib.width(setup.query_block, setup.key_block)), jnp.float32)

  def count(numbers):
    return numbers.size // grid[1]

  def output(shape, memory_space):
    def index_map(first, second, row, *_):
      heads, part = setup.split(first, second)
      return part * setup.together + row, heads, 0, 0

    spec = pl.BlockSpec((1, 1, *shape), index_map, memory_space=memory_space)
    return call.Output(jax.ShapeDtypeStruct((*grid[:2], *shape), jnp.float32), spec)

  d_table = line_sums = None
  if table is not None and setup.learned:
    lines = table._replace(coordinate={}, lower_Z=None, anchor_Z=None)
    of_x = jax.tree.map(scalars, table.coordinate)
    d_table = jax.tree.map(lines_of, lines)._replace(coordinate=of_x)
    line_sums = jax.tree.map(in_lanes, lines)
  d_query_BHQC, d_table = call.call(
    _query_kernel,
    setup,
    grid,
    plan,
    plan.key_IJ,
    (inputs, softmax),
    (specs.inputs(inputs), _softmax_specs(specs, softmax)),
    (
      call.Output(call.like(query_BHQC, dtype or query_BHQC.dtype), specs.query(query_BHQC)),
      d_table,
    ),
    [(setup.heads, setup.query_block, query_BHQC.shape[3])],
    (call.scratch(setup, table, setup.learned), line_sums),
  )
  if table is None:
    return d_query_BHQC, None
  if d_table is None:
    return d_query_BHQC, jax.tree.map(jnp.zeros_like, table)

  def of_lines(number_ZH, sums_BNST):
    sums_NS = sums_BNST.sum(axis=0).reshape(grid[1], -1)[:, : count(number_ZH)]
    return sums_NS.reshape(number_ZH.shape[::-1]).T

  def of_numbers(number_H, sums_BN1H):
    sums_NH = sums_BN1H.sum(axis=(0, 2))  # of each head, or of all that share it
    return sums_NH.ravel() if number_H.size > 1 else sums_NH.sum(axis=0)

  ends = {'lower_Z': table.lower_Z, 'anchor_Z': table.anchor_Z}
  d_coordinate = jax.tree.map(of_numbers, table.coordinate, d_table.coordinate)
  d_table = jax.tree.map(of_lines, lines, d_table._replace(coordinate={}))
  ends = jax.tree.map(jnp.zeros_like, ends)
  return d_query_BHQC, d_table._replace(coordinate=d_coordinate, **ends)


def key_gradient(setup, constants, table, queries, keys, plan, softmax, dtype):
  """Returns d_key_BGKC and d_value_BGKC."""
  rows, columns = plan.low_IJ.shape
  specs = call.Specs(setup, columns, by_column=True)
  inputs = call.inputs(setup, plan, queries, keys, table, constants)
  outputs = [
    call.Output(call.like(x_BGKC, dtype or x_BGKC.dtype), specs.key(x_BGKC)) for x_BGKC in keys[:2]
  ]
  return call.call(
    _key_kernel,
    setup,
    (*softmax.delta_BNHQ.shape[:2], columns, rows),
    plan,
    plan.query_IJ,
    (inputs, softmax),
    (specs.inputs(inputs), _softmax_specs(specs, softmax)),
    outputs,
    [(setup.groups, setup.key_block, keys.key_BGKC.shape[3])] * 2,
    call.scratch(setup, table, learned=False),
  )
