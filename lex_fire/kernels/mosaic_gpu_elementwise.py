"""An encoding's x on a tile of the Mosaic GPU kernels, from its definition for any positions.

The definition is traced for queries [rows, 1] and keys [1, columns] (or the other way round), and
its steps are taken one by one: on a vector while only rows or only columns matter, which XLA would
do by itself, and in terms that the compiler of kernels knows.
"""

# Not strict, as its neighbours are: programs carry no types.
# pyright: basic

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

# In terms of what the compiler of kernels knows, or takes less time for; near 0 log1p loses 1e-7.
_KNOWN = {
  'add_any': jnp.add,
  'log1p': lambda x, **_: jnp.log(1.0 + x),
  'pow': lambda x, y, **_: jnp.exp(jnp.log(x) * y),
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


_SIMPLE = {'max': _larger, 'min': lambda x, y: -_larger(-x, -y)}
_SHAPES = 'broadcast_in_dim', 'reshape', 'squeeze', 'copy'
_STEPS = {
  *(*_KNOWN, *_SIMPLE, *_SHAPES, 'abs', 'add', 'sub', 'mul', 'neg', 'sign', 'exp', 'exp2', 'log'),
  *('select_n', 'eq', 'ne', 'lt', 'le', 'gt', 'ge', 'and', 'or', 'not', 'convert_element_type'),
  *('clamp', 'sqrt', 'square', 'stop_gradient'),
}


def is_elementwise(function, numbers) -> bool:
  """Returns whether x is computed from each pair of positions alone, as a kernel needs it."""
  scalars = jax.tree.map(lambda _: jnp.float32(1), numbers)
  program = jax.make_jaxpr(function)(scalars, jnp.zeros((2, 1), int), jnp.zeros((1, 3), int))
  return set(_steps(program.jaxpr)) <= _STEPS


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

  return _on_tile(of_leaves, numbers, i, j, shape, query_axis)


def derivative(function, numbers, n, i, j, shape, query_axis):
  """Returns the derivative of function(numbers, i, j) by leaf n of the numbers."""
  numbers, structure = jax.tree.flatten(numbers)

  def slope(numbers, i, j):
    def of_leaves(*numbers):
      program = jax.make_jaxpr(function)(jax.tree.unflatten(structure, numbers), i, j)
      return _run(program.jaxpr, program.consts, (*numbers, i, j), _SIMPLE)[0]

    direction = [jnp.full_like(number, m == n) for m, number in enumerate(numbers)]
    return jax.jvp(of_leaves, numbers, direction)[1]

  return _on_tile(slope, numbers, i, j, shape, query_axis)


def _on_tile(function, numbers, i, j, shape, query_axis):
  sides = [
    jax.ShapeDtypeStruct(_side(shape, axis), jnp.int32) for axis in (query_axis, 1 - query_axis)
  ]
  scalars = [jax.ShapeDtypeStruct((), jnp.float32)] * len(numbers)
  program, made = jax.make_jaxpr(function, return_shape=True)(scalars, *sides)
  (result,) = _run(program.jaxpr, program.consts, (*numbers, i, j), _KNOWN, _widened)
  return _widened(result, made.shape, shape)


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
