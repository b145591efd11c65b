"""How the Pallas kernels for TPU are called: what they are given, and hold at each step."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lex_fire.kernels import mosaic_tpu_band as band_lib
from lex_fire.kernels import mosaic_tpu_far as far_lib
from lex_fire.kernels import mosaic_tpu_x as x_lib
from lex_fire.kernels.mosaic_tpu_size import FAR_BYTES, LANES, VMEM_BYTES, per_head
from lex_fire.kernels.mosaic_tpu_tile import (
  BAND_BITS,
  HELD_BITS,
  SPAN_BITS,
  Inputs,
  Lines,
  Scratch,
  Setup,
)
from lex_fire.kernels.plan import Keys, Plan, Queries


def inputs(
  setup: Setup, plan: Plan, queries: Queries, keys: Keys, table: Any, constants: Any
) -> Inputs:
  """Returns what all kernels take."""
  flat, lines = _flat(table, setup.heads), _lines(table, setup.heads)
  return Inputs(_parts(plan), queries, keys, flat, lines, constants)


def _parts(plan):
  """Returns the spans of parts, a row a tile, each in one number."""
  if plan.part_low_IJY is None:
    return None
  spans_IJY = plan.part_low_IJY | plan.part_high_IJY << SPAN_BITS
  return spans_IJY.reshape(-1, 1, spans_IJY.shape[2])


def _flat(table, heads):
  """Returns a table as kernels read it: the lines of a tile's heads in a row, a head's together."""
  if table is None:
    return None

  def rows(number_ZH):
    return number_ZH.T.reshape(number_ZH.shape[1] // heads, 1, -1)

  if table.lower_Z is None:
    return table._replace(slope_ZH=rows(table.slope_ZH))
  return table._replace(slope_ZH=rows(table.slope_ZH), value_ZH=rows(table.value_ZH))


def _lines(table, heads):
  """Returns the lines of a table as vectors, or None if there is but one a head."""
  if table is None or table.lower_Z is None:
    return None

  def rows(number_ZH):
    number_HZ = jnp.pad(number_ZH.T, [(0, 0), (0, -len(number_ZH) % LANES)])
    return number_HZ.reshape(len(number_HZ) // heads, -1, LANES)

  height_ZH = table.value_ZH - table.slope_ZH * table.anchor_Z[:, None]
  return Lines(rows(table.slope_ZH), rows(height_ZH))


class Specs:
  """Which block of each array a kernel holds at a step of its grid.

  The grid is that of `Place`.
  """

  def __init__(self, setup, columns, by_column):
    self.setup, self.columns, self.by_column = setup, columns, by_column

  def _spec(self, shape, index):
    """Returns a spec from the index of (batch, head block, query block, key block)."""

    def index_map(first, second, row, outer, step, spans, held):
      del spans
      heads, part = self.setup.split(first, second)
      batch, tile = part * self.setup.together + row, self._tile(outer, step)
      block = held[tile] & 2**HELD_BITS - 1
      return index(batch, heads, *((block, outer) if self.by_column else (outer, block)))

    return pl.BlockSpec(shape, index_map)

  def _tile(self, outer, step):
    return step * self.columns + outer if self.by_column else outer * self.columns + step

  def query(self, x):
    """Returns the spec of x_BHQC or x_B1Q."""
    return self._block(x, self.setup.heads, self.setup.query_block, 0)

  def key(self, x):
    """Returns the spec of x_BGKC or x_B1K."""
    return self._block(x, self.setup.groups, self.setup.key_block, 1)

  def _block(self, x, heads, block, side):
    if x.ndim == 3:
      last = len(x) - 1  # 0 where rows of the batch share it
      return self._spec((1, 1, block), lambda b, _, *at: (jnp.minimum(b, last), 0, at[side]))
    return self._spec((1, heads, block, x.shape[3]), lambda b, h, *at: (b, h, at[side], 0))

  def norm(self):
    """Returns the spec of x_BNHQ."""
    shape = (1, 1, self.setup.heads, self.setup.query_block)
    return self._spec(shape, lambda batch, heads, i, j: (batch, heads, 0, i))

  def inputs(self, inputs: Inputs) -> Inputs:
    """Returns the specs of what all kernels take after the plan."""

    def whole(array):
      return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)

    return Inputs(
      part_I1Y=jax.tree.map(self._of_tile, inputs.part_I1Y),
      queries=jax.tree.map(self.query, inputs.queries),
      keys=jax.tree.map(self.key, inputs.keys),
      table=jax.tree.map(self._scalars, inputs.table),
      lines=jax.tree.map(self._vectors, inputs.lines),
      constants=jax.tree.map(whole, inputs.constants),
    )

  def _of_tile(self, numbers):
    """Returns the spec of a row of numbers for each tile."""

    def index_map(first, second, row, outer, step, *_):
      del first, second, row
      return self._tile(outer, step), 0, 0

    return pl.BlockSpec((1, *numbers.shape[1:]), index_map, memory_space=pltpu.SMEM)

  def _scalars(self, numbers):
    """Returns the spec of all numbers of one axis, or of a row of more for each head block."""
    if numbers.ndim == 1:
      return pl.BlockSpec(memory_space=pltpu.SMEM)
    return self._of_heads(numbers, memory_space=pltpu.SMEM)

  def _vectors(self, numbers):
    """Returns the spec of rows of numbers for each head block."""
    return self._of_heads(numbers)

  def _of_heads(self, numbers, **where):
    def index_map(first, second, *_):
      return self.setup.split(first, second)[0], 0, 0

    return pl.BlockSpec((1, *numbers.shape[1:]), index_map, **where)


class Output(NamedTuple):
  """An output of a kernel."""

  array: jax.ShapeDtypeStruct
  spec: pl.BlockSpec


class Place:
  """Where a kernel is in its grid: (head block, part of the batch, row, outer block, step).

  The outer block is of queries, a step of keys; by column, they change places. `Setup.heads_first`
  says which of the first two comes first.

  Attributes:
    tile: its number, row by row.
    first_head: of the block.
    is_first: whether this is the first tile of a part of the batch.
    is_last: whether it is the last.
    begins_row: whether it is the first of a row of the batch.
    ends_row: whether it is the last.
    begins: whether it is the first of an outer block.
    ends: whether it is the last.
  """

  def __init__(self, setup: Setup, by_column: bool):
    first, second, row, outer, step = (pl.program_id(axis) for axis in range(5))
    rows, outers, steps = (pl.num_programs(axis) for axis in (2, 3, 4))
    self.tile = step * outers + outer if by_column else outer * steps + step
    self.first_head = setup.split(first, second)[0] * setup.heads
    self.begins, self.ends = step == 0, step == steps - 1
    self.begins_row, self.ends_row = self.begins & (outer == 0), self.ends & (outer == outers - 1)
    self.is_first, self.is_last = self.begins_row & (row == 0), self.ends_row & (row == rows - 1)


def rows_together(batch: int, head_blocks: int, band: Any) -> int:
  """Returns how many rows of the batch one core takes in turn, with one band for all of them.

  A chip may have two cores, which share an even number of blocks of heads, or else the batch.
  """
  if band is None:
    return 1
  if head_blocks % 2 == 0:
    return batch
  if batch % 2 == 0:
    return batch // 2
  return 1 if head_blocks == 1 else batch


def packed(plan):
  """Returns what each tile does in one number, as scalar memory is small, and the band's span."""
  spans_IJ = plan.low_IJ | plan.high_IJ << SPAN_BITS
  codes_IJ = spans_IJ | jnp.where(spans_IJ > 0, plan.in_order_IJ, 0) << 2 * SPAN_BITS
  has_band = plan.band_high > 0
  of_band = jnp.where(has_band, plan.band_low | plan.band_high << SPAN_BITS, 0)
  return jnp.append(codes_IJ.ravel(), of_band)


def call(kernel, setup, grid, plan, held_IJ, inputs, in_specs, outputs, sums, own, in_place=False):
  """Runs a kernel.

  The grid is given as (batch, head blocks, outer blocks, steps). `outputs` is a tree of (shape and
  dtype, spec), `sums` shapes of what stays from tile to tile, and `own` what `scratch` says. In
  place, outputs take the memory of as many arrays at the end of the inputs.
  """
  batch, heads, *outer_and_step = grid
  grid = *setup.split(heads, batch // setup.together), setup.together, *outer_and_step
  leaves, tree = jax.tree.flatten(outputs, is_leaf=lambda x: isinstance(x, Output))
  arrays, out_specs = (jax.tree.unflatten(tree, list(part)) for part in zip(*leaves, strict=True))
  how_IJ = plan.band_IJ | plan.far_IJ << BAND_BITS
  scalars = packed(plan), (held_IJ | how_IJ << HELD_BITS).ravel()
  count = len(scalars) + len(jax.tree.leaves(inputs))
  aliases = {count - len(leaves) + index: index for index in range(len(leaves))}
  return pl.pallas_call(
    functools.partial(kernel, setup=setup),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=grid,
      in_specs=in_specs,
      out_specs=out_specs,
      scratch_shapes=[*(pltpu.VMEM(shape, jnp.float32) for shape in sums), own],
    ),
    out_shape=arrays,
    compiler_params=pltpu.CompilerParams(
      # The table's gradient is summed over tiles, so these keep their order.
      dimension_semantics=('parallel', 'parallel', 'arbitrary', 'arbitrary', 'arbitrary'),
      vmem_limit_bytes=VMEM_BYTES + (0 if setup.functions.of_nodes is None else FAR_BYTES),
    ),
    input_output_aliases=aliases if in_place else {},
    interpret=setup.interpret,
  )(*scalars, *inputs)


def scratch(setup: Setup, table: Any, learned: bool) -> Scratch:
  """Returns what a kernel needs besides sums: for the gradient of the table, too, if learned."""
  if table is None:
    return Scratch(x_lib.NOTHING, x_lib.NOTHING, None, None)
  shape = setup.query_block, setup.key_block
  of_distances = x_lib.NOTHING
  if setup.functions.of_distances is not None and not per_head(table):
    of_distances = x_lib.refs_of_distances(table, *shape, learned=False)
    of_distances = of_distances._replace(segment_ST=None, parts_Y=None)  # it is of x alone
  of_pairs = x_lib.refs_of_pairs(table, *shape, learned)
  band, far = (lib.scratch(setup, table, learned) for lib in (band_lib, far_lib))
  return Scratch(of_pairs, of_distances, band, far)


def like(array: Any, dtype: Any) -> jax.ShapeDtypeStruct:
  """Returns an array's shape with a dtype."""
  return jax.ShapeDtypeStruct(array.shape, dtype)
