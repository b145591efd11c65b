"""An encoding's x where keys are far before their queries, inside the kernels for NVIDIA's GPUs.

There it changes so evenly that over the columns of a tile, if they are consecutive positions, it is
a parabola, through three of them for each row, but for what float32 rounds, or little more. So is
the bias under one line of the table, in two steps a pair and without a logarithm, which only a part
of the hardware does, and that slowly; and of gradients three sums serve all.
"""

# Not strict, as its neighbours are: kernels carry no types.
# pyright: basic

import math
from typing import Any, NamedTuple

import jax

from lex_fire.kernels import mosaic_gpu_elementwise as elementwise
from lex_fire.kernels import mosaic_gpu_tile as tile_lib

# In columns of a tile. Over those at distance d, half as many either way the part h of it, log(d)
# differs from the parabola by h^3 / 12, 4e-8, and d^p by that times |p (p - 1) (p - 2)| / 2 of it:
# no more, of p up to 2, and 5e-7 at 4, the greatest exponent that FIRE takes.
LEAST_DISTANCE = 64


def nodes(columns: int) -> tuple[int, int, int]:
  """Returns at which columns x is computed, from the first: those of Chebyshev, rounded."""
  middle, apart = columns // 2, _apart(columns)
  return middle - apart, middle, middle + apart


def _apart(columns):
  return round(math.sqrt(3) / 4 * columns)


def polynomial(
  before: jax.Array, middle: jax.Array, after: jax.Array, columns: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the coefficients of what has three values at the nodes, from that of degree 0."""
  apart = _apart(columns)
  linear = (after - before) * (0.5 / apart)
  return middle, linear, (after + before - 2 * middle) * (0.5 / apart**2)


class Parabola(NamedTuple):
  """What `mosaic_gpu_tile.Pairs` has for each pair, of each row as coefficients from degree 0.

  Attributes:
    x: that, in its unit.
    slopes: a list of its derivatives by the numbers that it is computed from.
    offset: of columns, from the middle one.
  """

  x: tuple
  slopes: list
  offset: Any

  def bias(self, setup, line_ref, head, code, positions):
    """Returns the bias, by the one line that x may reach."""
    first, _ = tile_lib.span(code)
    found = tile_lib.segment(line_ref, head, first)
    slope = positions.scaled(setup, found.slope)
    constant, linear, square = (slope * coefficient for coefficient in self.x)
    shape = *constant.shape, *self.offset.shape
    of_rows = (tile_lib.spread(x, shape, 0) for x in (found.height + constant, linear, square))
    return evaluate(*of_rows, tile_lib.spread(self.offset, shape, 1))

  def sums(self, d_logits):
    """Returns what `Pairs` does, by sums of powers of the column, which serve them all."""
    powers = self.offset, self.offset * self.offset
    moments = [
      d_logits.sum(axis=1),
      *((d_logits * tile_lib.spread(x, d_logits.shape, 1)).sum(axis=1) for x in powers),
    ]

    def over_columns(coefficients):
      return sum(x * moment for x, moment in zip(coefficients, moments, strict=True))

    return moments[0], over_columns(self.x), [over_columns(slope) for slope in self.slopes]


def evaluate(
  constant: jax.Array, linear: jax.Array, square: jax.Array, offset: jax.Array
) -> jax.Array:
  """Returns the polynomial of columns, by how far they are from the middle one."""
  return constant + offset * (linear + offset * square)


def parabola(setup, positions, numbers, columns, which):
  """Returns the `Parabola` of a tile whose keys, its columns, are far.

  Args:
    setup: of the kernel.
    positions: of the tile.
    numbers: of the head's coordinate.
    columns: how many.
    which: numbers, as in `Setup.read`, for derivatives.
  """
  found = (
    elementwise.value_and_slopes(
      setup.of_pairs, numbers, which, positions.of_column(setup, columns, node)
    )
    for node in nodes(columns)
  )
  (x, *slopes) = (
    polynomial(*at_nodes, columns) for at_nodes in zip(*((x, *y) for x, y in found), strict=True)
  )
  return Parabola(x, slopes, positions.offsets(setup))
