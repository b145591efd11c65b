"""An encoding's x where keys are far before their queries, inside the kernels for NVIDIA's GPUs.

There it changes so evenly that over the columns of a tile it is a parabola, through three of them
for each row, but for what float32 rounds, or little more: two steps a pair in place of a logarithm.
Columns are consecutive positions, of keys or of queries, which differ alike in their distance.
"""

import math

import jax

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


def evaluate(
  constant: jax.Array, linear: jax.Array, square: jax.Array, offset: jax.Array
) -> jax.Array:
  """Returns the polynomial of columns, by how far they are from the middle one."""
  return constant + offset * (linear + offset * square)
