"""An encoding's x on a tile of the Mosaic GPU kernels, from its definition for any positions.

The definition is traced for queries [rows, 1] and keys [1, columns] (or the other way round), and
its steps are taken one by one: on a vector while only rows or only columns matter, which XLA would
do by itself, and in terms that the compiler of kernels knows. A step that other steps make cheaper
waits for them (`_later`).
"""

# Not strict, as its neighbours are: programs carry no types.
# pyright: basic

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

LOG2E, LN2 = math.log2(math.e), math.log(2)  # the hardware's exponential and logarithm are of 2
# In terms of what the compiler of kernels knows, or takes less time for.
_KNOWN = {
  'add_any': jnp.add,
  'exp': lambda x, **_: jnp.exp2(x * LOG2E),
  'integer_pow': lambda x, y: 1 / x**-y if y < 0 else x**y,
  'div': lambda x, y: x * (1 / y),
}


class Place(NamedTuple):
  """A tile, as `value_and_slopes` takes it.

  Attributes:
    i: vector of the positions of queries.
    j: likewise of keys.
    shape: of the tile.
    query_axis: the tile's axis of the queries.
    apart: vectors of queries and of keys, float32, of which a pair's difference is its distance;
      None unless all queries are after all keys.
    log2: of a tile or a vector.
  """

  i: Any
  j: Any
  shape: tuple[int, int]
  query_axis: int
  apart: Any = None
  log2: Callable[[Any], Any] = jnp.log2


class _Side(NamedTuple):
  """The positions of queries or of keys, and what they are in `Place.apart`."""

  position: Any
  offset: Any
  is_query: bool


class _Difference(NamedTuple):
  """Positions of queries less those of keys, as integers."""

  query: _Side
  key: _Side


class _Apart(NamedTuple):
  """What is a vector of queries less one of keys; a distance itself is positive."""

  of_query: Any
  of_key: Any
  is_distance: bool


class _Logarithm(NamedTuple):
  """A logarithm to base 2, of which the value is so many times ln 2."""

  log2: Any
  times: Any


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
  *(*_KNOWN, *_SIMPLE, *_SHAPES, 'abs', 'add', 'sub', 'mul', 'neg', 'sign', 'exp2', 'log', 'pow'),
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


def unit(function, numbers) -> float:
  """Returns in what unit `value_and_slopes` returns x, not its derivatives.

  It is ln 2 where x is a logarithm as it is, as tiles have theirs to base 2; else 1.
  """
  found = []

  def of_a_tile(numbers, i, j):
    x = _on_tile(function, numbers, Place(i, j, (2, 3), 0))[0]
    found.append(LN2 if _is_plain(x) else 1.0)

  scalars = jax.tree.map(lambda _: jnp.float32(1), numbers)
  jax.eval_shape(of_a_tile, scalars, jnp.zeros(2, jnp.int32), jnp.zeros(3, jnp.int32))
  return found[0]


def value_and_slopes(function, numbers, which, place):
  """Returns x on a tile, in its unit, and a list of its derivatives by some leaves of the numbers.

  Args:
    function: (numbers, i, j) -> x, elementwise, of scalars and of positions that broadcast.
    numbers: a tree of scalars.
    which: the leaves, by `reads`.
    place: of the tile.
  """
  leaves, structure = jax.tree.flatten(numbers)

  def of_leaves(leaves, i, j):
    def of_some(*some):
      every = list(leaves)
      for n, number in zip(which, some, strict=True):
        every[n] = number
      program = jax.make_jaxpr(function)(jax.tree.unflatten(structure, every), i, j)
      return _run(program.jaxpr, program.consts, (*every, i, j), _simply)[0]

    some = [leaves[n] for n in which]
    x, slope = jax.linearize(of_some, *some)
    directions = np.eye(len(some), dtype=np.float32)
    return x, *(slope(*map(jnp.float32, direction)) for direction in directions)

  x, *slopes = _on_tile(of_leaves if which else function, leaves if which else numbers, place)
  x = x.log2 if _is_plain(x) else x
  return _of_pairs(x, place), [_of_pairs(slope, place) for slope in slopes]


def _simply(equation, operands):
  """Takes a step while a program is traced."""
  take = _SIMPLE.get(equation.primitive.name, equation.primitive.bind)
  return take(*operands, **equation.params)


def _is_plain(x):
  return isinstance(x, _Logarithm) and isinstance(x.times, float) and x.times == 1


def _on_tile(function, numbers, place) -> list[Any]:
  """Returns a list of what a function makes of a tile, of pairs or what `_later` returns."""
  axes = place.query_axis, 1 - place.query_axis
  sides = [jax.ShapeDtypeStruct(_side(place.shape, axis), jnp.int32) for axis in axes]
  scalars = jax.tree.map(lambda _: jax.ShapeDtypeStruct((), jnp.float32), numbers)
  program = jax.make_jaxpr(function)(scalars, *sides)
  positions = place.i, place.j
  if place.apart is not None:
    both = zip(positions, place.apart, (True, False), strict=True)
    positions = [_Side(*of_side) for of_side in both]
  inputs = *jax.tree.leaves(numbers), *positions
  results = _run(program.jaxpr, program.consts, inputs, functools.partial(_take, place))
  shapes = [atom.aval.shape for atom in program.jaxpr.outvars]
  return [_whole(x, shape, place) for x, shape in zip(results, shapes, strict=True)]


def _take(place, equation, operands):
  """Takes a step on a tile."""
  name, params = equation.primitive.name, equation.params
  if name == 'log1p':  # near 0 it loses 1e-7
    (x,) = operands
    one_more = _later('add', [x, 1.0], {})
    name, operands = 'log', [1.0 + x if one_more is None else one_more]
  waits = _later(name, operands, params)
  if waits is not None:
    return waits
  shape = equation.outvars[0].aval.shape
  shapes = [atom.aval.shape for atom in equation.invars]
  operands = [
    _widened(_of_pairs(x, place), of, shape) for x, of in zip(operands, shapes, strict=True)
  ]
  if name in _SHAPES:
    return operands[0]
  if name == 'log':
    return _Logarithm(place.log2(operands[0]), 1.0)
  if name == 'pow':
    x, y = operands
    return jnp.exp2(place.log2(x) * y)
  return _KNOWN.get(name, equation.primitive.bind)(*operands, **params)


def _later(name, operands, params):
  """Returns what a step makes without a step a pair, or None if it takes one.

  A distance is the difference of two vectors, which any factor and a term may multiply and add to;
  and a logarithm's factor is its exponential's exponent.
  """
  match name, operands:
    case 'sub', [_Side(is_query=True) as query, _Side(is_query=False) as key]:
      return _Difference(query, key)
    case 'convert_element_type', [_Difference(query, key)] if params['new_dtype'] == jnp.float32:
      return _Apart(query.offset, key.offset, is_distance=True)
    case 'abs', [_Apart(is_distance=True) as x]:
      return x
    case 'mul', ([_Apart() as x, y] | [y, _Apart() as x]) if _is_scalar(y):
      return _Apart(x.of_query * y, x.of_key * y, is_distance=False)
    case 'add', ([_Apart() as x, y] | [y, _Apart() as x]) if _is_scalar(y):
      return _Apart(x.of_query + y, x.of_key, is_distance=False)
    case 'mul', ([_Logarithm() as x, y] | [y, _Logarithm() as x]) if _is_scalar(y):
      return _Logarithm(x.log2, x.times * y)
    case 'neg', [_Logarithm() as x]:
      return _Logarithm(x.log2, -x.times)
    case 'exp', [_Logarithm() as x]:
      return jnp.exp2(x.log2 * x.times)
  return None


def _waits(x):
  return isinstance(x, (_Side, _Difference, _Apart, _Logarithm))


def _whole(x, shape, place):
  """Returns what a program makes, of a shape there, of all of a tile."""
  if isinstance(x, _Logarithm):
    return x._replace(log2=_widened(x.log2, shape, place.shape))
  return x if _waits(x) else _widened(x, shape, place.shape)


def _is_scalar(x):
  return not _waits(x) and np.ndim(x) == 0


def _of_pairs(x: Any, place):
  """Returns what waits no longer."""

  def difference(of_query, of_key):
    axes = place.query_axis, 1 - place.query_axis
    of_query, of_key = (
      _widened(of, _side(place.shape, axis), place.shape)
      for of, axis in zip((of_query, of_key), axes, strict=True)
    )
    return of_query - of_key

  match x:
    case _Side():
      return x.position
    case _Difference():
      return difference(x.query.position, x.key.position)
    case _Apart():
      return difference(x.of_query, x.of_key)
    case _Logarithm():
      return x.log2 * (LN2 * x.times)
  return x


def _side(shape, axis):
  """Returns the shape of what varies along one axis only."""
  return tuple(size if n == axis else 1 for n, size in enumerate(shape))


def _run(jaxpr, constants, inputs, take):
  """Evaluates a program.

  Args:
    jaxpr: the program.
    constants: its.
    inputs: its.
    take: (equation, operands) -> its one result.
  """
  values = dict(zip(jaxpr.constvars, constants, strict=True))
  values |= dict(zip(jaxpr.invars, inputs, strict=True))

  def read(atom):
    return atom.val if isinstance(atom, core.Literal) else values[atom]

  for equation in jaxpr.eqns:
    inner, operands = _inner(equation), [read(atom) for atom in equation.invars]
    if inner is not None:
      results = _run(inner.jaxpr, inner.consts, operands, take)
    else:
      results = [take(equation, operands)]
    values |= dict(zip(equation.outvars, results, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _widened(value, shape, new_shape):
  """Returns a value of the shape that its program says, 1s left out, in another such shape."""
  new = tuple(size for size in new_shape if size > 1)
  if np.shape(value) == new:
    return value
  sides = [axis for axis, size in enumerate(shape) if size > 1]
  return jax.lax.broadcast_in_dim(value, new, sides)
