"""How the Pallas kernels for TPU are called: what they are given, and hold at each step."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lex_fire.kernels import mosaic_tpu_x as x_lib
from lex_fire.kernels.mosaic_tpu_size import LANES, VMEM_BYTES
from lex_fire.kernels.mosaic_tpu_tile import SPAN_BITS, Inputs, Lines, Setup
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

    def index_map(batch, heads, outer, step, *_):
      tile = step * self.columns + outer if self.by_column else outer * self.columns + step
      return tile, 0, 0

    return pl.BlockSpec((1, *numbers.shape[1:]), index_map, memory_space=pltpu.SMEM)

  def _scalars(self, numbers):
    """Returns the spec of all numbers of one axis, or of a row of more for each head block."""
    if numbers.ndim == 1:
      return pl.BlockSpec(memory_space=pltpu.SMEM)
    return pl.BlockSpec(
      (1, *numbers.shape[1:]), lambda _, heads, *rest: (heads, 0, 0), memory_space=pltpu.SMEM
    )

  def _vectors(self, numbers):
    """Returns the spec of rows of numbers for each head block."""
    return pl.BlockSpec((1, *numbers.shape[1:]), lambda _, heads, *rest: (heads, 0, 0))


class Output(NamedTuple):
  """An output of a kernel."""

  array: jax.ShapeDtypeStruct
  spec: pl.BlockSpec


def packed(plan):
  """Returns the spans of all tiles, each in one number, as scalar memory is small."""
  spans_IJ = plan.low_IJ | plan.high_IJ << SPAN_BITS
  order_IJ = plan.in_order_IJ | plan.of_distance_IJ << 1
  return (spans_IJ | jnp.where(spans_IJ > 0, order_IJ, 0) << 2 * SPAN_BITS).ravel()


def call(kernel, setup, grid, plan, hold_IJ, inputs, in_specs, outputs, sums, own, in_place=False):
  """Runs a kernel.

  `outputs` is a tree of (shape and dtype, spec), `sums` shapes of what stays from tile to tile, and
  `own` what `mosaic_tpu_x.scratch` says of one tile. In place, outputs take the memory of as many
  arrays at the end of the inputs.
  """
  leaves, tree = jax.tree.flatten(outputs, is_leaf=lambda x: isinstance(x, Output))
  arrays, out_specs = (jax.tree.unflatten(tree, list(part)) for part in zip(*leaves, strict=True))
  scalars = packed(plan), hold_IJ.ravel()
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
      # The table's gradient is summed over rows, so these keep their order.
      dimension_semantics=('parallel', 'parallel', 'arbitrary', 'arbitrary'),
      vmem_limit_bytes=VMEM_BYTES,
    ),
    input_output_aliases=aliases if in_place else {},
    interpret=setup.interpret,
  )(*scalars, *inputs)


def scratch(setup: Setup, table: Any, learned: bool) -> x_lib.Scratch:
  """Returns what a kernel needs for one tile: for the gradient of the table, too, if learned."""
  shape = setup.query_block, setup.key_block
  return x_lib.scratch(setup.functions, table, shape, learned)


def like(array: Any, dtype: Any) -> jax.ShapeDtypeStruct:
  """Returns an array's shape with a dtype."""
  return jax.ShapeDtypeStruct(array.shape, dtype)
