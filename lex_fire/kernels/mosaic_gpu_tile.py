"""One tile of logits on an NVIDIA GPU, inside a kernel: products, bias from positions, mask.

The tile's axes are 'rows', spread over the threads of a warpgroup, and 'columns'; the pass for
queries has them in rows, the pass for keys in columns. What depends on rows or columns alone is
computed once for each, as vectors, and not a pair.
"""

# Not strict, as its neighbours are: kernels carry no types.
# pyright: basic

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend import core

from lex_fire.kernels import mask as mask_lib

ROWS = 64  # of a tile: what a warpgroup multiplies at once
LOG2E = math.log2(math.e)  # logits are kept in bits, as the hardware's exponential takes them
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


def product(setup, a, b):
  """Returns a b^T in float32, of blocks in shared memory [rows, channels], [columns, channels]."""
  if setup.interpret:
    return _dot(a[...], b[...], 1)

  def multiply(sum_ref):
    plgpu.wgmma(sum_ref, a, plgpu.transpose_ref(b, (1, 0)))
    return sum_ref[...]

  shape = (a.shape[0], b.shape[0])
  return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def add_product(setup, so_far, a, b):
  """Returns so_far + a b, of a tile [rows, columns] and a block [columns, channels]."""
  a = a.astype(b.dtype)
  if setup.interpret:
    return so_far + _dot(a, b[...], 0)
  return pl.run_state(lambda sum_ref: plgpu.wgmma(sum_ref, a, b))(plgpu.ACC.init(so_far))


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


def bias_and_slope(setup, line_ref, head, code, x):
  """Returns the bias of a tile and its slope, by selecting among the segments that x may reach."""
  first, end = span(code)

  def line(z):
    found = segment(line_ref, head, z)
    return found, found.value + found.slope * (x - found.anchor)

  def above(z, so_far):
    found, bias = line(z)
    inside = x > found.lower
    return jnp.where(inside, bias, so_far[0]), jnp.where(inside, found.slope, so_far[1])

  found, bias = line(first)
  slope = full(setup, x.shape, 0.0) + found.slope
  if setup.segments == 1:
    return bias, slope
  return jax.lax.fori_loop(first + 1, end, above, (bias, slope))


def bias(setup, line_ref, head, code, x):
  """Returns the bias of a tile alone."""
  first, end = span(code)

  def line(z):
    found = segment(line_ref, head, z)
    return found.lower, found.value + found.slope * (x - found.anchor)

  def above(z, so_far):
    lower, bias = line(z)
    return jnp.where(x > lower, bias, so_far)

  _, bias = line(first)
  if setup.segments == 1:
    return bias
  return jax.lax.fori_loop(first + 1, end, above, bias)


# Elementwise functions of a row's number and a column's


def coordinate(setup, positions, numbers, shape):
  """Returns x of a tile."""
  return elementwise(setup, setup.coordinate, positions, numbers, shape)


def coordinate_and_slopes(setup, positions, numbers, shape):
  """Returns (x, its derivative by each of the numbers) of a tile."""

  def function(numbers, i, j):
    leaves, structure = jax.tree.flatten(numbers)

    def of_leaves(*leaves):
      return setup.coordinate(jax.tree.unflatten(structure, leaves), i, j)

    slopes = []
    for n in range(len(leaves)):
      direction = [jnp.full_like(leaf, m == n) for m, leaf in enumerate(leaves)]
      slopes.append(jax.jvp(of_leaves, leaves, direction)[1])
    return of_leaves(*leaves), slopes

  return elementwise(setup, function, positions, numbers, shape)


def elementwise(setup, function, positions, numbers, shape):
  """Returns function(numbers, i, j) of a tile, each step on no more than it depends on.

  Args:
    setup: of the kernel.
    function: elementwise, of scalars and of positions that broadcast.
    positions: of the tile.
    numbers: a tree of scalars.
    shape: of the tile.
  """
  query_shape, key_shape = [[1, 1], [1, 1]]
  query_shape[positions.query_axis] = shape[positions.query_axis]
  key_shape[1 - positions.query_axis] = shape[1 - positions.query_axis]
  scalars = jax.tree.map(lambda _: jax.ShapeDtypeStruct((), jnp.float32), numbers)
  structs = [jax.ShapeDtypeStruct(side, jnp.int32) for side in (query_shape, key_shape)]
  program, out = jax.make_jaxpr(function, return_shape=True)(scalars, *structs)
  inputs = *jax.tree.leaves(numbers), *(positions.query(setup, POSITION),), (
    positions.key(setup, POSITION)
  )
  outputs = _run(program.jaxpr, program.consts, inputs)
  wide = [
    _widened(output, variable.aval.shape, shape)
    for output, variable in zip(outputs, program.jaxpr.outvars, strict=True)
  ]
  return jax.tree.unflatten(jax.tree.structure(out), wide)


# What the compiler of kernels has no rule for, in terms of what it has. Near 0, log1p loses 1e-7.
_REPLACED = {
  'log1p': lambda x, **_: jnp.log(1.0 + x),
  'pow': lambda x, y, **_: jnp.exp(jnp.log(x) * y),
}


def _run(jaxpr, constants, inputs):
  """Evaluates a program of elementwise steps; an array [rows, 1] or [1, columns] is a vector."""
  values = dict(zip(jaxpr.constvars, constants, strict=True))
  values |= dict(zip(jaxpr.invars, inputs, strict=True))

  def read(atom):
    return atom.val if isinstance(atom, core.Literal) else values[atom]

  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    inner = next((params[key] for key in ('jaxpr', 'call_jaxpr') if key in params), None)
    operands = [read(atom) for atom in equation.invars]
    if inner is not None:
      results = _run(inner.jaxpr, inner.consts, operands)
    else:
      shape = equation.outvars[0].aval.shape
      wide = [
        _widened(operand, atom.aval.shape, shape)
        for operand, atom in zip(operands, equation.invars, strict=True)
      ]
      if name in ('broadcast_in_dim', 'reshape', 'squeeze', 'copy'):
        results = wide
      else:
        apply = _REPLACED.get(name, functools.partial(equation.primitive.bind))
        results = [apply(*wide, **params)]
    values |= dict(zip(equation.outvars, results, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _widened(value, shape, new_shape):
  """Returns a value of the shape that its program says, 1s left out, in another such shape."""
  sides = [axis for axis, size in enumerate(new_shape) if size > 1]
  new = tuple(new_shape[axis] for axis in sides)
  if np.shape(value) == new:
    return value
  if not np.shape(value):
    return jax.lax.broadcast_in_dim(value, new, [])
  (axis,) = (axis for axis, size in enumerate(shape) if size > 1)
  return jax.lax.broadcast_in_dim(value, new, [axis])


# Kernels of two warpgroups that compute and one that copies


def block_in_shared_memory(shape):
  """Returns bfloat16 blocks [..., rows, channels], laid out as matrix products read them."""
  transforms = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
  return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


def operands(table):
  """Returns the arrays of a table that kernels take, also where there is none."""
  return (jnp.zeros((1, 1, 4)), jnp.zeros((1, 1))) if table is None else table


def row_of(array_ref, batch):
  """Returns the row of an array of integers, which the batch may share."""
  return batch if array_ref.shape[0] > 1 else 0


def run(setup, kernel, operands, *, out_type, scratch_types, grid):
  """Runs a kernel at each point of a grid, by name and size."""
  return plgpu.kernel(
    kernel,
    out_type=out_type,
    scratch_types=scratch_types,
    grid=tuple(grid.values()),
    grid_names=tuple(grid),
    num_threads=3,
    thread_name='warpgroup',
    compiler_params=plgpu.CompilerParams(approx_math=True),
    interpret=setup.interpret,
  )(*operands)


def warpgroups(compute, copy):
  """Runs compute(0), compute(1) and copy() side by side, registers divided accordingly."""
  index = jax.lax.axis_index('warpgroup')

  @pl.when(index < 2)
  def _():
    plgpu.set_max_registers(232, action='increase')
    compute(index)

  @pl.when(index == 2)
  def _():
    plgpu.set_max_registers(40, action='decrease')
    copy()


def pipeline(copy, count, stages, free):
  """Copies blocks 0 .. count - 1 to shared memory in turn, each as soon as its slot is free."""

  def step(n, _):
    slot = jax.lax.rem(n, stages)
    pl.when(n >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
    pl.when(n < count)(lambda: copy(n, slot))

  jax.lax.fori_loop(0, count + jnp.minimum(count, stages), step, None)
