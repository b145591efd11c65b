"""What each tile of attention has to do, found from bounds before a kernel runs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lex_fire.kernels import mask as mask_lib


class Plan(NamedTuple):
  """A tile is block I of the queries by block J of the keys; all int32.

  Attributes:
    low_IJ: the first number of the span that a tile loops over: segments of a table, or stretches
      of a decay that a query is after a key; 0 if there are neither.
    high_IJ: one past the last; 0 if the mask hides the tile.
    key_IJ: the block of keys to hold at the tile, when a row of tiles is walked: its own, or if
      hidden that of the next that is not. So nothing is fetched for a hidden tile.
    query_IJ: the block of queries to hold, when a column of tiles is walked.
  """

  low_IJ: jax.Array
  high_IJ: jax.Array
  key_IJ: jax.Array
  query_IJ: jax.Array


class Bounds(NamedTuple):
  """The least and largest number of each block; may have the batch after the blocks."""

  low_I: jax.Array
  high_I: jax.Array


def visits(
  mask: mask_lib.Mask,
  query_position: Bounds,
  key_position: Bounds,
  query_segment: Bounds | None,
  key_segment: Bounds | None,
) -> jax.Array:
  """Returns visit_IJ, boolean: whether a query of block I may see a key of block J.

  Args:
    mask: what may be seen by position.
    query_position: of [I, B].
    key_position: of [J, B].
    query_segment: of [I, B], or None.
    key_segment: of [J, B], or None.
  """

  def pairs(queries, keys):
    return *(bound_IB[:, None] for bound_IB in queries), *(bound_JB[None] for bound_JB in keys)

  visit_IJB = mask.may_see(*pairs(query_position, key_position))
  if query_segment is not None and key_segment is not None:
    query_low, query_high, key_low, key_high = pairs(query_segment, key_segment)
    visit_IJB &= (query_low <= key_high) & (key_low <= query_high)
  return visit_IJB.any(axis=2)


def make(visit_IJ: jax.Array, span: tuple[jax.Array, jax.Array] | None) -> Plan:
  """Returns the plan of a grid of tiles.

  Args:
    visit_IJ: from `visits`.
    span: (low_IJ, high_IJ), from `segments` or `stretches_apart`, or None.
  """
  low_IJ, high_IJ = (0, 1) if span is None else span
  return Plan(
    low_IJ=jnp.where(visit_IJ, low_IJ, 0),
    high_IJ=jnp.where(visit_IJ, high_IJ, 0),
    key_IJ=_next_visited(visit_IJ),
    query_IJ=_next_visited(visit_IJ.T).T,
  )


def _next_visited(visit_IJ):
  """Returns the column of each row's next tile to visit; after the last, of the last."""
  columns = visit_IJ.shape[1]
  column_IJ = jnp.broadcast_to(jnp.arange(columns, dtype=jnp.int32)[None], visit_IJ.shape)
  next_IJ = jax.lax.cummin(jnp.where(visit_IJ, column_IJ, columns), axis=1, reverse=True)
  last_IJ = jax.lax.cummax(jnp.where(visit_IJ, column_IJ, 0), axis=1)
  return jnp.where(next_IJ < columns, next_IJ, last_IJ)


def segments(
  table: Any, coordinate: Any, query_position: Bounds, key_position: Bounds
) -> tuple[jax.Array, jax.Array]:
  """Returns low_IJ and high_IJ, the span of a table's segments that x can reach in each tile.

  x is monotone in either position on each side of i = j: so its extremes lie at a tile's corners,
  or where i = j.

  Args:
    table: a `piecewise.Table` of segments whose heads share x.
    coordinate: of its encoding.
    query_position: of [I].
    key_position: of [J].
  """
  numbers = jax.tree.map(lambda number_1: number_1[0], table.coordinate)
  i_low, i_high = (bound_I[:, None] for bound_I in query_position)
  j_low, j_high = (bound_J[None] for bound_J in key_position)
  corners = [coordinate(numbers, i, j) for i in (i_low, i_high) for j in (j_low, j_high)]
  middle = jnp.maximum(i_low, j_low)
  meet = middle <= jnp.minimum(i_high, j_high)
  corners.append(jnp.where(meet, coordinate(numbers, middle, middle), corners[0]))
  x_IJZ = jnp.stack(corners, axis=2)
  low_IJ = jnp.searchsorted(table.lower_Z, x_IJZ.min(axis=2)) - 1
  high_IJ = jnp.searchsorted(table.lower_Z, x_IJZ.max(axis=2))
  return low_IJ.astype(jnp.int32), high_IJ.astype(jnp.int32)


def stretches_apart(query_stretch: Bounds, key_stretch: Bounds) -> tuple[jax.Array, jax.Array]:
  """Returns low_IJ and high_IJ, the span of how many stretches a query is after a key.

  Args:
    query_stretch: of [I]; see `decay.stretch_of`.
    key_stretch: of [J].
  """
  least_IJ = query_stretch.low_I[:, None] - key_stretch.high_I[None]
  most_IJ = query_stretch.high_I[:, None] - key_stretch.low_I[None]
  return jnp.maximum(least_IJ, 0), jnp.maximum(most_IJ, 0) + 1
