"""One tile of logits on an NVIDIA GPU, inside a kernel: bias from positions, mask, and the walk.

The tile's axes are 'rows', spread over the threads of a warpgroup, and 'columns'; the pass for
queries has them in rows, the pass for keys in columns. What depends on rows or columns alone is
computed once for each, as vectors, and not a pair.
"""

# Not strict, as its neighbours are: kernels carry no types.
# pyright: basic

import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lex_fire.kernels import mask as mask_lib
from lex_fire.kernels import mosaic_gpu_elementwise as elementwise

ROWS = 64  # of a tile: what a warpgroup multiplies at once
UNITS = 2  # at most, warpgroups that compute, each tiles of its own rows
# A tile's code: whether to visit it, whether the mask shows all of it, whether its queries are all
# after all its keys, by as much as columns are apart, whether keys are far and have one line of the
# table (`mosaic_gpu_far`), and a span, its first and how many more. It is of segments of the table
# that x may reach; under a decay, which has no table, of how many stretches queries are after keys.
VISIT, WHOLE, AFTER, FAR, FIRST_SHIFT, MORE_SHIFT = 1, 2, 4, 8, 4, 17
MOST_SEGMENTS = 2 ** (MORE_SHIFT - FIRST_SHIFT)
# The integers of a query, in this order, and of a key. Stretches are there under a decay; under a
# bias the bits of how far each is from the middle one of its block of columns, and, if x has a
# factor of the query, of that and its inverse.
POSITION, SEGMENT, FIRST, LAST, STRETCH = range(5)
OFFSET, FACTOR, INVERSE = 4, 5, 6
KEY_STRETCH = KEY_OFFSET = 2


class Setup(NamedTuple):
  """What is static of a kernel.

  Attributes:
    coordinate: of the encoding, or None where it has no bias.
    of_pairs: what of it a tile computes for each pair: all of x, or all but a factor of the query.
    factor: (numbers, position) -> the other factor, which is computed once a query; None: without.
    numbers: the structure of the coordinate's parameters.
    read: which of them `of_pairs` is computed from.
    unit: in which tiles have what is of pairs; see `mosaic_gpu_elementwise`.
    far: whether `of_pairs` may be interpolated where keys are far.
    segments: of the table.
    learned: whether the table has a gradient.
    decays: whether a decay with distance is left to the tiles.
    waves: of positions, whose products x is, or None; see `mosaic_gpu_products`.
    parts: of bfloat16 that a number is made of; see `mosaic_gpu_products`.
    tensor_memory: whether products are made there; see `mosaic_gpu_tensor_memory`.
    room: that a warpgroup makes them in, inside a kernel.
    interpret: what `plgpu.kernel` takes; False on a GPU.
  """

  coordinate: Any
  of_pairs: Any
  factor: Any
  numbers: Any
  read: tuple[int, ...]
  unit: float
  far: bool
  segments: int
  learned: bool
  decays: bool
  waves: Any
  parts: int
  tensor_memory: bool
  room: Any
  interpret: Any

  def size(self, sizes, others, channels):
    """Returns the `Size` of a kernel.

    Args:
      sizes: by a head's channels times their parts, and whether there are waves beside them.
      others: of those with tensor memory, that differ, by parts, channels and waves.
      channels: of a head.
    """
    waves = self.waves is not None
    own = others.get((self.parts, channels, waves)) if self.tensor_memory else None
    return own or sizes[self.parts * channels, waves]


def vector(setup, ref, axis):
  """Returns a vector in memory along one axis of a tile."""
  if setup.interpret:
    return ref[...]
  return _load(ref, layout=plgpu.Layout.WGMMA.reduce(1 - axis), optimized=False)


def block(setup, ref):
  """Returns a block in shared memory, as products take their rows from registers."""
  return ref[...] if setup.interpret else _load(ref, layout=plgpu.Layout.WGMMA)


def _load(ref, **how):
  index = inspect.signature(plgpu.load).parameters.get('idx')
  wants_index = index is not None and index.default is index.empty  # until jax 0.11
  return plgpu.load(ref, *[()] * wants_index, **how)


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


class Positions(NamedTuple):
  """What a tile knows of its positions, in shared memory.

  Attributes:
    query_ref: integers of its queries.
    key_ref: likewise of keys.
    query_axis: the axis of the queries.
    waves: of its rows and of its columns; (): there are none.
  """

  query_ref: Any
  key_ref: Any
  query_axis: int
  waves: Any

  def query(self, setup, which):
    return vector(setup, self.query_ref.at[which], self.query_axis)

  def key(self, setup, which):
    return vector(setup, self.key_ref.at[which], 1 - self.query_axis)

  def of_tile(self, setup, shape, after=False):
    """Returns an `elementwise.Place`, of any tile or of one whose queries are after its keys."""
    query, key = self.query(setup, POSITION), self.key(setup, POSITION)
    apart = None
    if after:
      # From a column, so that neither is larger than twice the distance, and as exact.
      middle, offset = self._middle_column(shape[1]), self.offsets(setup)
      if self.query_axis == 0:
        apart = (query - middle).astype(jnp.float32), offset
      else:
        apart = offset, (key - middle).astype(jnp.float32)
    return self._place(setup, query, key, shape, apart)

  def _middle_column(self, columns):
    ref = self.key_ref if self.query_axis == 0 else self.query_ref
    return ref[POSITION, columns // 2]

  def _place(self, setup, query, key, shape, apart=None):
    log2 = functools.partial(_log2, setup)
    return elementwise.Place(query, key, shape, self.query_axis, apart, log2)

  def scaled(self, setup, number, which=FACTOR):
    """Returns a number, of all queries or of each, times their factor of x or its inverse.

    It is the number itself if they have none.
    """
    if setup.factor is None:
      return number
    return number * _float(self.query(setup, which))

  def offsets(self, setup):
    """Returns how far each column is from the middle one, as a vector."""
    if self.query_axis == 0:
      return _float(self.key(setup, KEY_OFFSET))
    return _float(self.query(setup, OFFSET))

  def of_column(self, setup, columns, column):
    """Returns an `elementwise.Place` of all queries and one of so many keys, that rise by one."""
    position = self._middle_column(columns) + column - columns // 2
    query = self.query(setup, POSITION)
    return self._place(setup, query, position, (*query.shape, 1))

  def of_queries(self, number, shape):
    """Returns a number, of all queries or of each, as it multiplies or adds to a tile."""
    return spread(number, shape, self.query_axis) if np.ndim(number) else number


def _log2(setup, x):
  """Returns the logarithm to base 2, which the hardware has, of a tile or a vector."""
  if setup.interpret:
    return jnp.log2(x)
  if x.ndim < 2:
    return jnp.log(x) * elementwise.LOG2E
  layout = plgpu.Layout.WGMMA
  tile = plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout)

  @plgpu.inline_mgpu(arg_types=(layout,), return_type=tile)
  def of_tile(_, array):
    return array.log2(approx=True)

  return of_tile(x)  # pyright: ignore[reportCallIssue]


def _float(bits):
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


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
  """Returns the first of a tile's span, and one past the last."""
  first = (code >> FIRST_SHIFT) & (MOST_SEGMENTS - 1)
  return first, first + 1 + (code >> MORE_SHIFT)


class Segment(NamedTuple):
  """A segment of a head's table: its lower end, and the slope and the height at 0 of its line."""

  lower: Any
  slope: Any
  height: Any


def segment(line_ref, head, z):
  """Reads segment z from a ref [heads, segments, 3]."""
  return Segment(*(line_ref[head, z, n] for n in range(3)))


def numbers(setup, number_ref, head):
  """Reads the parameters of the coordinate of a head from a ref [heads, how many]."""
  leaves = [number_ref[head, n] for n in range(setup.numbers.num_leaves)]
  return jax.tree.unflatten(setup.numbers, leaves)


class Pairs(NamedTuple):
  """What of x is of the pairs of a tile, for each.

  Attributes:
    x: that, in its unit.
    slopes: a list of its derivatives by the numbers that it is computed from.
  """

  x: Any
  slopes: list

  def bias(self, setup, line_ref, head, code, positions):
    """Returns the bias, by the line of each pair's segment, among those that x may reach."""
    first, end = span(code)

    def line(found):
      slope = positions.of_queries(positions.scaled(setup, found.slope), self.x.shape)
      return found.height + slope * self.x

    def add(z, so_far):
      found = segment(line_ref, head, z)
      return jnp.where(is_above(setup, positions, found, self.x), line(found), so_far)

    result = line(segment(line_ref, head, first))
    return result if setup.segments == 1 else jax.lax.fori_loop(first + 1, end, add, result)

  def sums(self, d_logits):
    """Returns the sums over columns of numbers of pairs: of these, and times x and each slope."""
    over_columns = d_logits.sum(axis=1), (d_logits * self.x).sum(axis=1)
    return *over_columns, [(d_logits * slope).sum(axis=1) for slope in self.slopes]


def is_above(setup, positions, found, pairs):
  """Returns which pairs of a tile have an x above the lower end of a segment.

  It is that end which is divided by the factor, as there are fewer queries than pairs.
  """
  lower = positions.scaled(setup, found.lower, INVERSE)
  return pairs > positions.of_queries(lower, pairs.shape)


def weights(logits, log_norm, axis):
  """Returns exp(logits - log_norm), of a vector along an axis."""
  return jnp.exp2(
    logits * elementwise.LOG2E - spread(log_norm * elementwise.LOG2E, logits.shape, axis)
  )


def pairs(setup, positions, code, numbers, shape, which):
  """Returns the `Pairs` of a tile.

  Args:
    setup: of the kernel.
    positions: of the tile.
    code: of the tile.
    numbers: of the head's coordinate.
    shape: of the tile.
    which: numbers, as in `Setup.read`, for derivatives.
  """

  def found(after):
    place = positions.of_tile(setup, shape, after)
    return Pairs(*elementwise.value_and_slopes(setup.of_pairs, numbers, which, place))

  return jax.lax.cond(code & AFTER != 0, lambda: found(True), lambda: found(False))


# Kernels of one or two warpgroups that compute and one that copies


def operands(table, rate_C):
  """Returns the arrays of a table and of a decay that kernels take, also where there is none."""
  lines = jnp.zeros((1, 1, 3)), jnp.zeros((1, 1))
  if table is not None:
    lines = table.line_HZX, table.number_HN
  return (*lines, jnp.zeros(1) if rate_C is None else rate_C)


def row_of(array_ref, batch):
  """Returns the row of an array of integers, which the batch may share."""
  return batch if array_ref.shape[0] > 1 else 0


class Size(NamedTuple):
  """How much a kernel holds.

  Attributes:
    columns: of a tile.
    stages: blocks of columns in shared memory at a time.
    units: warpgroups that compute.
  """

  columns: int
  stages: int
  units: int = UNITS


def run(setup, size, kernel, operands, *, out_type, scratch_types, grid):
  """Runs a kernel, a partial function, at each point of a grid, by name and size."""
  kernel.__name__ = kernel.func.__name__  # by which compilers and profilers call it
  # JAX 0.11 has another default, for which these kernels are not written.
  lane = plgpu.LoweringSemantics.Lane
  return plgpu.kernel(
    kernel,
    out_type=out_type,
    scratch_types=scratch_types,
    grid=tuple(grid.values()),
    grid_names=tuple(grid),
    num_threads=size.units + 1,
    thread_name='warpgroup',
    compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=lane),
    interpret=setup.interpret,
  )(*operands)


def copy(pairs, barrier):
  """Starts copies to shared memory, (from, to); each arrives at the barrier."""
  for source, target in pairs:
    plgpu.copy_gmem_to_smem(source, target, barrier)


def copy_back(pairs):
  """Copies what has been written to shared memory, (to, from), and waits until it is done."""
  plgpu.commit_smem()
  for target, source in pairs:
    plgpu.copy_smem_to_gmem(source, target)
  plgpu.wait_smem_to_gmem(0)


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
    plgpu.commit_smem()  # of what was read here, to which copies would write by another way
    plgpu.barrier_arrive(free.at[slot])
    return so_far

  return jax.lax.fori_loop(0, count, step, start)


def warpgroups(setup, units, rooms, compute, copy):
  """Runs compute(setup, unit) of each unit and copy() side by side, registers divided accordingly.

  With a room for each unit a unit has code of its own, as tensor memory is addressed there.
  """
  index = jax.lax.axis_index('warpgroup')

  def run(setup, unit):
    plgpu.set_max_registers(240, action='increase')
    compute(setup, unit)

  if not rooms:
    pl.when(index < units)(lambda: run(setup, index))
  for unit, room in enumerate(rooms):
    pl.when(index == unit)(functools.partial(run, setup._replace(room=room), unit))

  @pl.when(index == units)
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
