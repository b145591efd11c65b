"""An encoding's x where keys are far before their queries, inside the kernels for NVIDIA's GPUs.

There it changes so evenly that over the columns of a tile, if they are consecutive positions, it is
a polynomial of each row, through a node more than its degree, but for what float32 rounds, or
little more. So is the bias under one line of the table: in a step a degree, and without a
logarithm, which only a part of the hardware does, and that slowly. Of gradients a sum a power of
the column serves all.
"""

# Not strict, as its neighbours are: kernels carry no types.
# pyright: basic

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lex_fire.kernels import mosaic_gpu_elementwise as elementwise
from lex_fire.kernels import mosaic_gpu_tile as tile_lib

# By degree, in columns of a tile. Over those at distance d, half as many either way the part h of
# it, log(d) differs from the parabola by h^3 / 12 and from the cubic by h^4 / 32, 4e-8 and 3e-8,
# and d^p by that times |p (p - 1) (p - 2)| / 2 of it, for the cubic times |p - 3| / 3 besides: no
# more, of p up to 2, and 5e-7 and 1e-7 at 4, the greatest exponent that FIRE takes.
LEAST_DISTANCE = {2: 64, 3: 16}
# Of the forward pass, which is the shorter of steps, and whose logarithms would take as long as its
# products; and of that for queries, which has more to sum.
FORWARD, QUERIES = 3, 2


def nodes(degree: int, columns: int) -> list[int]:
  """Returns at which columns x is computed, from the first: those of Chebyshev, rounded."""
  angles = np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1)
  return [columns // 2 + round(x) for x in -columns / 2 * np.cos(angles)]


def polynomial(values: Sequence[Any], columns: int) -> list[Any]:
  """Returns the coefficients of what has some values at the nodes, from that of degree 0."""
  first, *others = values
  offsets = np.array(nodes(len(others), columns)) - columns // 2
  of_values = np.linalg.inv(np.vander(offsets, increasing=True).astype(np.float64))
  # Of differences, as these are small, and with them what is rounded.
  apart = [x - first for x in others]
  constant, *coefficients = (
    sum(float(weight) * x for weight, x in zip(weights[1:], apart, strict=True))
    for weights in of_values
  )
  return [first + constant, *coefficients]


class Polynomial(NamedTuple):
  """What `mosaic_gpu_tile.Pairs` has for each pair, of each row as coefficients from degree 0.

  Attributes:
    x: that, in its unit.
    slopes: a list of its derivatives by the numbers that it is computed from.
    offset: of columns, from the middle one.
  """

  x: list
  slopes: list
  offset: Any

  def bias(self, setup, line_ref, head, code, positions):
    """Returns the bias, by the one line that x may reach."""
    first, _ = tile_lib.span(code)
    found = tile_lib.segment(line_ref, head, first)
    slope = positions.scaled(setup, found.slope)
    constant, *others = (slope * coefficient for coefficient in self.x)
    return evaluate([found.height + constant, *others], self.offset)

  def sums(self, d_logits):
    """Returns what `Pairs` does, by sums of powers of the column, which serve them all."""
    moments, power = [d_logits.sum(axis=1)], self.offset
    for _ in self.x[1:]:
      moments.append((d_logits * tile_lib.spread(power, d_logits.shape, 1)).sum(axis=1))
      power = power * self.offset

    def over_columns(coefficients):
      return sum(x * moment for x, moment in zip(coefficients, moments, strict=True))

    return moments[0], over_columns(self.x), [over_columns(slope) for slope in self.slopes]


def evaluate(coefficients: Sequence[jax.Array], offset: jax.Array) -> jax.Array:
  """Returns a polynomial of each row, by how far columns are from the middle one."""
  shape = *coefficients[0].shape, *offset.shape
  offset = tile_lib.spread(offset, shape, 1)
  of_rows = [tile_lib.spread(x, shape, 0) for x in reversed(coefficients)]
  return functools.reduce(lambda so_far, x: so_far * offset + x, of_rows)


def on_tile(setup, positions, numbers, degree, columns, which):
  """Returns the `Polynomial` of a tile whose keys, its columns, are far.

  Args:
    setup: of the kernel.
    positions: of the tile.
    numbers: of the head's coordinate.
    degree: of the polynomial.
    columns: how many.
    which: numbers, as in `Setup.read`, for derivatives.
  """
  found = []
  for node in nodes(degree, columns):
    place = positions.of_column(setup, columns, node)
    x, slopes = elementwise.value_and_slopes(setup.of_pairs, numbers, which, place)
    found.append([x, *slopes])
  x, *slopes = (polynomial(at_nodes, columns) for at_nodes in zip(*found, strict=True))
  return Polynomial(x, slopes, positions.offsets(setup))
