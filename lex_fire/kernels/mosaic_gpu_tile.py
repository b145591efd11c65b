"""One tile of logits on an NVIDIA GPU, inside a kernel: products, bias from positions, mask.

The tile's axes are 'rows', spread over the threads of a warpgroup, and 'columns'; the pass for
queries has them in rows, the pass for keys in columns. What depends on rows or columns alone is
computed once for each, as vectors, and not a pair.
"""

# Not strict, as its neighbours are: kernels carry no types.
# pyright: basic

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lex_fire.kernels import mask as mask_lib
from lex_fire.kernels import mosaic_gpu_elementwise as elementwise

ROWS = 64  # of a tile: what a warpgroup multiplies at once
LOG2E = math.log2(math.e)  # the hardware's exponential is of 2
_ACC: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
# A tile's code: whether to visit it, whether the mask shows all of it, the first segment of the
# table that its x may reach, and how many more it may.
VISIT, WHOLE, FIRST_SHIFT, MORE_SHIFT = 1, 2, 2, 16
MOST_SEGMENTS = 2 ** (MORE_SHIFT - FIRST_SHIFT)
# The integers of a query and of a key, in this order.
POSITION, SEGMENT, FIRST, LAST = range(4)


class Setup(NamedTuple):
  """What is static of a kernel.

  Attributes:
    coordinate: of the encoding, or None where it has no bias.
    numbers: the structure of the coordinate's parameters.
    segments: of the table.
    learned: whether the table has a gradient.
    interpret: what `plgpu.kernel` takes; False on a GPU.
  """

  coordinate: Any
  numbers: Any
  segments: int
  learned: bool
  interpret: Any


def vector(setup, ref, axis):
  """Returns a vector in shared memory along one axis of a tile."""
  if setup.interpret:
    return ref[...]
  return plgpu.load(ref, (), layout=plgpu.Layout.WGMMA.reduce(1 - axis))


def full(setup, shape, number):
  """Returns an array of one number, laid out as a tile or as a vector along its rows."""
  array = jnp.full(shape, number, jnp.float32)
  if setup.interpret:
    return array
  layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
  return plgpu.layout_cast(array, layout)


def spread(vector, shape, axis):
  """Returns a tile of a vector along an axis, repeated along the other."""
  return jax.lax.broadcast_in_dim(vector, shape, [axis])


def product(setup, a, b, start=None) -> jax.Array:
  """Returns start + a b^T, of blocks in shared memory [rows, channels] and [columns, channels].

  Args:
    setup: of the kernel.
    a: of the type of the inputs; the product is float32.
    b: likewise.
    start: a tile to begin the sum with; None: 0.
  """
  shape = a.shape[0], b.shape[0]
  if setup.interpret:
    return _dot(a[...], b[...], 1) + (0.0 if start is None else start)
  b = plgpu.transpose_ref(b, (1, 0))
  if start is not None:
    return pl.run_state(lambda sum_ref: plgpu.wgmma(sum_ref, a, b))(_ACC.init(start))

  def multiply(sum_ref):
    plgpu.wgmma(sum_ref, a, b)
    return sum_ref[...]

  return pl.run_scoped(multiply, _ACC(shape, jnp.float32))


def add_product(setup, so_far, a, b):
  """Returns so_far + a b, of a tile [rows, columns] and a block [columns, channels]."""
  a = a.astype(b.dtype)
  if setup.interpret:
    return so_far + _dot(a, b[...], 0)
  return pl.run_state(lambda sum_ref: plgpu.wgmma(sum_ref, a, b))(_ACC.init(so_far))


def _dot(a, b, contracted):
  dimensions = (((1,), (contracted,)), ((), ()))
  return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


class Positions(NamedTuple):
  """The integers of a tile's queries and keys, in shared memory, and the axis of the queries."""

  query_ref: Any
  key_ref: Any
  query_axis: int

  def query(self, setup, which):
    return vector(setup, self.query_ref.at[which], self.query_axis)

  def key(self, setup, which):
    return vector(setup, self.key_ref.at[which], 1 - self.query_axis)

  def of_tile(self, setup, shape):
    """Returns what functions in `mosaic_gpu_elementwise` take last."""
    return self.query(setup, POSITION), self.key(setup, POSITION), shape, self.query_axis


def hide(setup, positions, code, logits):
  """Returns logits, HIDDEN_LOGIT where the mask hides the pair."""

  def of_query(which):
    return spread(positions.query(setup, which), logits.shape, positions.query_axis)

  def of_key(which):
    return spread(positions.key(setup, which), logits.shape, 1 - positions.query_axis)

  def partly():
    visible = of_query(SEGMENT) == of_key(SEGMENT)
    visible &= of_query(FIRST) <= of_key(POSITION)
    visible &= of_key(POSITION) <= of_query(LAST)
    return jnp.where(visible, logits, mask_lib.HIDDEN_LOGIT)

  return jax.lax.cond(code & WHOLE != 0, lambda: logits, partly)


def code(code_ref, integers, row, first, n):
  """Reads the code of the tile in a row that is n after the first."""
  return code_ref[integers, row, first + n]


def span(code):
  """Returns the first segment of a table that a tile may reach, and one past the last."""
  first = (code >> FIRST_SHIFT) & (MOST_SEGMENTS - 1)
  return first, first + 1 + (code >> MORE_SHIFT)


class Segment(NamedTuple):
  """A segment of a head's table, four numbers."""

  lower: Any
  anchor: Any
  slope: Any
  value: Any


def segment(line_ref, head, z):
  """Reads segment z from a ref [heads, segments, 4]."""
  return Segment(*(line_ref[head, z, n] for n in range(4)))


def numbers(setup, number_ref, head):
  """Reads the parameters of the coordinate of a head from a ref [heads, how many]."""
  leaves = [number_ref[head, n] for n in range(setup.numbers.num_leaves)]
  return jax.tree.unflatten(setup.numbers, leaves)


def bias(setup, line_ref, head, code, x):
  """Returns the bias of a tile."""

  def line(found):
    return found.value + found.slope * (x - found.anchor)

  return _of_segments(setup, line_ref, head, code, x, line)


def slope(setup, line_ref, head, code, x):
  """Returns the derivative of the bias by x."""
  zero = full(setup, x.shape, 0.0)
  return _of_segments(setup, line_ref, head, code, x, lambda found: zero + found.slope)


def _of_segments(setup, line_ref, head, code, x, function):
  """Returns a function of each pair's segment, by selecting among those that x may reach."""
  first, end = span(code)

  def above(z, so_far):
    found = segment(line_ref, head, z)
    return jnp.where(x > found.lower, function(found), so_far)

  result = function(segment(line_ref, head, first))
  if setup.segments == 1:
    return result
  return jax.lax.fori_loop(first + 1, end, above, result)


def logits(setup, positions, code, a, b, line_ref, head, x):
  """Returns the logits of a tile of blocks a and b, HIDDEN_LOGIT where hidden; x None: no bias."""
  start = None if x is None else bias(setup, line_ref, head, code, x)
  return hide(setup, positions, code, product(setup, a, b, start))


def weights(logits, log_norm, axis):
  """Returns exp(logits - log_norm), of a vector along an axis."""
  return jnp.exp2(logits * LOG2E - spread(log_norm * LOG2E, logits.shape, axis))


def coordinate(setup, positions, numbers, shape):
  """Returns x of a tile, or None where there is no bias."""
  if not setup.segments:
    return None
  return elementwise.value(setup.coordinate, numbers, *positions.of_tile(setup, shape))


def coordinate_slope(setup, positions, numbers, n, shape):
  """Returns the derivative of x by the number n."""
  return elementwise.derivative(setup.coordinate, numbers, n, *positions.of_tile(setup, shape))


# Kernels of two warpgroups that compute and one that copies


def block_in_shared_memory(shape, dtype):
  """Returns room for blocks [..., rows, channels], laid out as matrix products read them."""
  swizzle = 128  # bytes
  tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
  transforms = tiling, plgpu.SwizzleTransform(swizzle)
  return plgpu.SMEM(shape, dtype, transforms=transforms)


def operands(table):
  """Returns the arrays of a table that kernels take, also where there is none."""
  return (jnp.zeros((1, 1, 4)), jnp.zeros((1, 1))) if table is None else table


def row_of(array_ref, batch):
  """Returns the row of an array of integers, which the batch may share."""
  return batch if array_ref.shape[0] > 1 else 0


def run(setup, kernel, operands, *, out_type, scratch_types, grid):
  """Runs a kernel at each point of a grid, by name and size."""
  # JAX 0.11 has another default, for which these kernels are not written.
  lane = plgpu.LoweringSemantics.Lane
  return plgpu.kernel(
    kernel,
    out_type=out_type,
    scratch_types=scratch_types,
    grid=tuple(grid.values()),
    grid_names=tuple(grid),
    num_threads=3,
    thread_name='warpgroup',
    compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=lane),
    interpret=setup.interpret,
  )(*operands)


def copy(pairs, barrier):
  """Starts copies to shared memory, (from, to); each arrives at the barrier."""
  for source, target in pairs:
    plgpu.copy_gmem_to_smem(source, target, barrier)


def walk(visit, code, start, count, stages, ready, free):
  """Returns what visits of the tiles 0 .. count - 1 make of a start, one after another.

  Args:
    visit: (n, code, slot of its block, so far) -> so far, for tiles that the mask does not hide.
    code: n -> the tile's code.
    start: so far, before the first.
    count: of tiles.
    stages: slots for blocks in shared memory.
    ready: barriers of the slots at which copies arrive.
    free: barriers of the slots at which a warpgroup arrives that has read them.
  """

  def step(n, so_far):
    slot = jax.lax.rem(n, stages)
    plgpu.barrier_wait(ready.at[slot])
    code_n = code(n)

    def do(so_far):
      return visit(n, code_n, slot, so_far)

    so_far = jax.lax.cond(code_n & VISIT != 0, do, lambda so_far: so_far, so_far)
    plgpu.barrier_arrive(free.at[slot])
    return so_far

  return jax.lax.fori_loop(0, count, step, start)


def warpgroups(compute, copy):
  """Runs compute(0), compute(1) and copy() side by side, registers divided accordingly."""
  index = jax.lax.axis_index('warpgroup')

  @pl.when(index < 2)
  def _():
    plgpu.set_max_registers(240, action='increase')
    compute(index)

  @pl.when(index == 2)
  def _():
    plgpu.set_max_registers(24, action='decrease')
    copy()


def pipeline(copy, count, stages, free):
  """Copies blocks 0 .. count - 1 to shared memory in turn, each as soon as its slot is free."""

  def step(n, _):
    slot = jax.lax.rem(n, stages)
    pl.when(n >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
    pl.when(n < count)(lambda: copy(n, slot))

  jax.lax.fori_loop(0, count + jnp.minimum(count, stages), step, None)
