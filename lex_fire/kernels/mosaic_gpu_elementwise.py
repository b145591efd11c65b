"""An encoding's x on a tile of the Mosaic GPU kernels, from its definition for any positions.

The definition is traced for queries [rows, 1] and keys [1, columns] (or the other way round), and
its steps are taken one by one: on a vector while only rows or only columns matter, which XLA would
do by itself, and in terms that the compiler of kernels knows.
"""

# Not strict, as its neighbours are: programs carry no types.
# pyright: basic

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

LOG2E = math.log2(math.e)  # the hardware's exponential is of 2
# In terms of what the compiler of kernels knows, or takes less time for; near 0 log1p loses 1e-7.
_KNOWN = {
  'add_any': jnp.add,
  'exp': lambda x, **_: jnp.exp2(x * LOG2E),
  'log1p': lambda x, **_: jnp.log(1.0 + x),
  'pow': lambda x, y, **_: jnp.exp2(jnp.log(x) * (y * LOG2E)),
  'integer_pow': lambda x, y: 1 / x**-y if y < 0 else x**y,
  'div': lambda x, y: x * (1 / y),
}


@jax.custom_jvp
def _larger(x, y):
  """Returns the maximum, with the derivative that JAX gives it, in steps without a division."""
  return jnp.maximum(x, y)


@_larger.defjvp
def _larger_slope(numbers, slopes):
  (x, y), (x_slope, y_slope) = numbers, slopes
  either = jnp.where(x < y, y_slope, 0.5 * (x_slope + y_slope))
  return _larger(x, y), jnp.where(x > y, x_slope, either)


@jax.custom_jvp
def _log1p(x):
  """Returns log(1 + x), with a derivative from its value, as a kernel divides in many steps."""
  return jnp.log1p(x)


@_log1p.defjvp
def _log1p_slope(numbers, slopes):
  (x,), (x_slope,) = numbers, slopes
  value = _log1p(x)
  return value, x_slope * jnp.exp(-value)


_SIMPLE = {
  'max': _larger,
  'min': lambda x, y: -_larger(-x, -y),
  'log1p': lambda x, **_: _log1p(x),
}
_SPECIAL = {'log', 'log1p', 'exp', 'exp2', 'pow', 'sqrt', 'div'}
_SHAPES = 'broadcast_in_dim', 'reshape', 'squeeze', 'copy'
_STEPS = {
  *(*_KNOWN, *_SIMPLE, *_SHAPES, 'abs', 'add', 'sub', 'mul', 'neg', 'sign', 'exp', 'exp2', 'log'),
  *('select_n', 'eq', 'ne', 'lt', 'le', 'gt', 'ge', 'and', 'or', 'not', 'convert_element_type'),
  *('clamp', 'sqrt', 'square', 'stop_gradient'),
}


def is_elementwise(function, numbers) -> bool:
  """Returns whether x is computed from each pair of positions alone, as a kernel needs it."""
  return set(_steps(_of_any_tile(function, numbers))) <= _STEPS


def takes_long(function, numbers) -> bool:
  """Returns whether x has steps that only a part of the hardware does, and that as slowly."""
  return not _SPECIAL.isdisjoint(_steps(_of_any_tile(function, numbers)))


def reads(function, numbers) -> tuple[int, ...]:
  """Returns which leaves of the numbers x is computed from."""
  program = _of_any_tile(function, numbers)
  read = {id(atom) for equation in program.eqns for atom in equation.invars}
  leaves = range(len(jax.tree.leaves(numbers)))
  return tuple(n for n in leaves if id(program.invars[n]) in read)


def _of_any_tile(function, numbers):
  """Returns the program of a tile of some shape, of a tree of any numbers."""
  scalars = jax.tree.map(lambda _: jnp.float32(1), numbers)
  return jax.make_jaxpr(function)(scalars, jnp.zeros((2, 1), int), jnp.zeros((1, 3), int)).jaxpr


def _steps(jaxpr):
  for equation in jaxpr.eqns:
    inner = _inner(equation)
    yield from _steps(inner.jaxpr) if inner else [equation.primitive.name]


def _inner(equation):
  """Returns the program that a step calls, or None."""
  return next(
    (equation.params[key] for key in ('jaxpr', 'call_jaxpr') if key in equation.params), None
  )


def value(function, numbers, i, j, shape, query_axis):
  """Returns function(numbers, i, j) of a tile.

  Args:
    function: elementwise, of scalars and of positions that broadcast.
    numbers: a tree of scalars.
    i: vector of the positions of queries.
    j: likewise of keys.
    shape: of the tile.
    query_axis: the tile's axis of the queries.
  """
  numbers, structure = jax.tree.flatten(numbers)

  def of_leaves(numbers, i, j):
    return function(jax.tree.unflatten(structure, numbers), i, j)

  (x,) = _on_tile(of_leaves, numbers, i, j, shape, query_axis)
  return x


def value_and_slopes(function, numbers, which, i, j, shape, query_axis):
  """Returns `value` and a list of its derivatives by some leaves of the numbers.

  Args:
    function: as of `value`, like all below.
    numbers: likewise.
    which: the leaves, by `reads`.
    i: likewise.
    j: likewise.
    shape: likewise.
    query_axis: likewise.
  """
  if not which:
    return value(function, numbers, i, j, shape, query_axis), []
  numbers, structure = jax.tree.flatten(numbers)

  def of_leaves(numbers, i, j):
    def of_some(*some):
      every = list(numbers)
      for n, number in zip(which, some, strict=True):
        every[n] = number
      program = jax.make_jaxpr(function)(jax.tree.unflatten(structure, every), i, j)
      return _run(program.jaxpr, program.consts, (*every, i, j), _SIMPLE)[0]

    some = [numbers[n] for n in which]
    x, slope = jax.linearize(of_some, *some)
    directions = np.eye(len(some), dtype=np.float32)
    return x, *(slope(*map(jnp.float32, direction)) for direction in directions)

  x, *slopes = _on_tile(of_leaves, numbers, i, j, shape, query_axis)
  return x, slopes


def _on_tile(function, numbers, i, j, shape, query_axis):
  sides = [
    jax.ShapeDtypeStruct(_side(shape, axis), jnp.int32) for axis in (query_axis, 1 - query_axis)
  ]
  scalars = [jax.ShapeDtypeStruct((), jnp.float32)] * len(numbers)
  program, made = jax.make_jaxpr(function, return_shape=True)(scalars, *sides)
  results = _run(program.jaxpr, program.consts, (*numbers, i, j), _KNOWN, _widened)
  in_program = jax.tree.leaves(made)
  return [_widened(x, of.shape, shape) for x, of in zip(results, in_program, strict=True)]


def _side(shape, axis):
  """Returns the shape of what varies along one axis only."""
  return tuple(size if n == axis else 1 for n, size in enumerate(shape))


def _run(jaxpr, constants, inputs, rules, widened=None):
  """Evaluates a program by rules for some of its steps.

  Args:
    jaxpr: the program.
    constants: its.
    inputs: its.
    rules: functions by the name of a step; another is taken as it is.
    widened: None, or (value, its shape in the program, a step's shape) -> that value for the step.
  """
  values = dict(zip(jaxpr.constvars, constants, strict=True))
  values |= dict(zip(jaxpr.invars, inputs, strict=True))

  def read(atom):
    return atom.val if isinstance(atom, core.Literal) else values[atom]

  for equation in jaxpr.eqns:
    name, inner = equation.primitive.name, _inner(equation)
    operands = [read(atom) for atom in equation.invars]
    if inner is not None:
      results = _run(inner.jaxpr, inner.consts, operands, rules, widened)
    else:
      if widened is not None:
        shape = equation.outvars[0].aval.shape
        shapes = [atom.aval.shape for atom in equation.invars]
        operands = [
          widened(operand, *of, shape) for operand, *of in zip(operands, shapes, strict=True)
        ]
      if widened is not None and name in _SHAPES:
        results = operands
      else:
        results = [rules.get(name, equation.primitive.bind)(*operands, **equation.params)]
    values |= dict(zip(equation.outvars, results, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _widened(value, shape, new_shape):
  """Returns a value of the shape that its program says, 1s left out, in another such shape."""
  new = tuple(size for size in new_shape if size > 1)
  if np.shape(value) == new:
    return value
  sides = [axis for axis, size in enumerate(shape) if size > 1]
  return jax.lax.broadcast_in_dim(value, new, sides)
