"""How attention is cut in tiles, and what each tile has to do, found before a kernel runs.

A tile is block I of the queries by block J of the keys.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lex_fire.kernels import mask as mask_lib

# Stretches that a query is after a key, after which nothing is left of it. Kernels pack ends of
# spans in 15 bits.
MOST_APART = 2**15 - 2
MOST_SEGMENTS = 2**15 - 2  # of a table, for the same reason
PAD_QUERY, PAD_KEY = -1, -2  # segments of padding: equal to no segment, nor to each other
WHOLE = (1, 2)  # axes of bounds that serve all rows of the batch


class Queries(NamedTuple):
  """Queries, padded to whole blocks; B of the integers may be 1, None is what no tile needs.

  Attributes:
    query_BHQC: prepared, heads first.
    position_B1Q: int32, as all below.
    first_B1Q: the first position that each may see.
    last_B1Q: the last.
    segment_B1Q: a query sees the keys of its own.
    stretch_B1Q: in which stretch of a decay it lies.
  """

  query_BHQC: Any
  position_B1Q: Any
  first_B1Q: Any
  last_B1Q: Any
  segment_B1Q: Any
  stretch_B1Q: Any


class Keys(NamedTuple):
  """Keys and values likewise."""

  key_BGKC: Any
  value_BGKC: Any
  position_B1K: Any
  segment_B1K: Any
  stretch_B1K: Any


class Bounds(NamedTuple):
  """The least and the largest number of each block; may have the batch after the blocks."""

  low_I: jax.Array
  high_I: jax.Array


class Band(NamedTuple):
  """Blocks, T by T, of diagonals of all pairs, one of each; block 0 has pairs of the same position.

  Attributes:
    first: the least, of queries furthest before the keys.
    count: how many follow, itself included.
  """

  first: int
  count: int


class Plan(NamedTuple):
  """What each tile does; all int32.

  Attributes:
    low_IJ: the first number of the span that a tile loops over: segments of a table, or stretches
      of a decay that a query is after a key; 0 if there are neither.
    high_IJ: one past the last; 0 if the mask hides the tile.
    key_IJ: the block of keys to hold at the tile, when a row of tiles is walked: its own, or if
      hidden that of the next that is not. So nothing is fetched for a hidden tile.
    query_IJ: the block of queries to hold, when a column of tiles is walked.
    in_order_IJ: 1 if in every row of the batch that sees some of the tile the positions of either
      block rise by one from each to the next: all pairs of a diagonal are then equally far apart.
    band_IJ: where x of all pairs depends on how far apart they are alone, and as in all such tiles:
      how many blocks of a band lie up to that of the last queries and the first keys of the tile; 0
      in others, and where the band does not have it.
    far_IJ: 1 if the tile is one line, its positions are in order, and all its keys are as far
      before its queries as a tile has of them, or further; 0 in all if that is of no use.
    band_low: the first number of the span of those tiles of a band together.
    band_high: one past the last; 0 if there are none.
    part_low_IJY: as low_IJ, of each part of a tile: parts of its queries, within parts of its keys;
      None if the span is not of segments.
    part_high_IJY: as high_IJ, but above part_low_IJY in parts that are hidden, too.
  """

  low_IJ: jax.Array
  high_IJ: jax.Array
  key_IJ: jax.Array
  query_IJ: jax.Array
  in_order_IJ: jax.Array
  band_IJ: jax.Array
  far_IJ: jax.Array
  band_low: jax.Array
  band_high: jax.Array
  part_low_IJY: jax.Array | None
  part_high_IJY: jax.Array | None


def cut(
  mask: mask_lib.Mask,
  query_block: int,
  key_block: int,
  stretch: int | None,
  queries: tuple[jax.Array, jax.Array, jax.Array | None],
  keys: tuple[jax.Array, jax.Array, jax.Array, jax.Array | None],
) -> tuple[Queries, Keys]:
  """Returns queries and keys in whole blocks.

  Args:
    mask: which keys a query may see.
    query_block: queries of a tile.
    key_block: keys of a tile.
    stretch: of a decay, or None [tokens].
    queries: query_BQHC, query_position_BQ, query_segment_BQ.
    keys: key_BKGC, value_BKGC, key_position_BK, key_segment_BK.
  """
  query_BQHC, query_position_BQ, query_segment_BQ = queries
  key_BKGC, value_BKGC, key_position_BK, key_segment_BK = keys
  num_queries, num_keys = query_BQHC.shape[1], key_BKGC.shape[1]
  if query_segment_BQ is None and (num_queries % query_block or num_keys % key_block):
    query_segment_BQ = jnp.zeros((1, num_queries), jnp.int32)
    key_segment_BK = jnp.zeros((1, num_keys), jnp.int32)
  of_query = functools.partial(_row, block=query_block)
  of_key = functools.partial(_row, block=key_block)
  return (
    Queries(
      query_BHQC=_heads_first(query_BQHC, query_block),
      position_B1Q=of_query(query_position_BQ),
      first_B1Q=of_query(mask.first(query_position_BQ)),
      last_B1Q=of_query(mask.last(query_position_BQ)),
      segment_B1Q=of_query(query_segment_BQ, fill=PAD_QUERY),
      stretch_B1Q=None if stretch is None else of_query(query_position_BQ // stretch),
    ),
    Keys(
      key_BGKC=_heads_first(key_BKGC, key_block),
      value_BGKC=_heads_first(value_BKGC, key_block),
      position_B1K=of_key(key_position_BK),
      segment_B1K=of_key(key_segment_BK, fill=PAD_KEY),
      stretch_B1K=None if stretch is None else of_key(key_position_BK // stretch),
    ),
  )


def _heads_first(x_BLHC, block):
  """Returns x_BHLC with L a multiple of the block."""
  return jnp.pad(
    jnp.swapaxes(x_BLHC, 1, 2), [(0, 0), (0, 0), (0, -x_BLHC.shape[1] % block), (0, 0)]
  )


def _row(number_BL, block, fill=None):
  """Returns number_B1L, padded by `fill`; by its last if None, so that no block spans more."""
  if number_BL is None:
    return None
  how = {'mode': 'edge'} if fill is None else {'constant_values': fill}
  return jnp.pad(number_BL, [(0, 0), (0, -number_BL.shape[1] % block)], **how)[:, None]


def make(
  mask: mask_lib.Mask,
  query_block: int,
  key_block: int,
  queries: Queries,
  keys: Keys,
  table: Any,
  coordinate: Any,
  part: tuple[int, int],
  rate: Any,
  band: Band | None,
  far: bool,
) -> Plan:
  """Returns the plan of all tiles.

  Args:
    mask: as given to `cut`.
    query_block: likewise.
    key_block: likewise.
    queries: from `cut`.
    keys: likewise.
    table: a `piecewise.Table`, or None.
    coordinate: of its encoding.
    part: queries and keys of a part, which divide those of a tile.
    rate: the factor of x that does not depend on the distance alone, a function of the later
      position, or None; of no use without a band.
    band: of blocks as wide as a part, or None.
    far: whether tiles that are far are told.
  """
  visit_IJB = _visits_of_blocks(mask, query_block, key_block, queries, keys)
  visit_IJ = visit_IJB.any(axis=2)
  low_IJ, high_IJ = 0, 1
  part_low_IJY = part_high_IJY = None
  if table is not None and table.lower_Z is not None:
    by_tile = functools.partial(
      _by_tile, of_queries=query_block // part[0], of_keys=key_block // part[1]
    )
    visit_IJY = by_tile(_visits_of_blocks(mask, *part, queries, keys).any(axis=2))
    spans = _spans(mask, *part, queries, keys, table, coordinate)
    part_low_IJY, part_high_IJY = (by_tile(x_YY) for x_YY in spans)
    # What is hidden computes anything: what costs it nothing.
    low_IJ = jnp.where(visit_IJY, part_low_IJY, MOST_SEGMENTS).min(axis=2)
    high_IJ = jnp.where(visit_IJY, part_high_IJY, 0).max(axis=2)
    part_low_IJY = jnp.where(visit_IJY, part_low_IJY, low_IJ[..., None])
    part_high_IJY = jnp.where(visit_IJY, part_high_IJY, low_IJ[..., None] + 1)
    visit_IJ = visit_IJY.any(axis=2)
  elif queries.stretch_B1Q is not None:
    low_IJ, high_IJ = _stretches_apart(
      _bounds(queries.stretch_B1Q, query_block, axes=WHOLE),
      _bounds(keys.stretch_B1K, key_block, axes=WHOLE),
    )
  low_IJ, high_IJ = jnp.where(visit_IJ, low_IJ, 0), jnp.where(visit_IJ, high_IJ, 0)
  in_order_IB = _in_order(queries.position_B1Q, query_block)
  in_order_IJB = in_order_IB[:, None] & _in_order(keys.position_B1K, key_block)[None]
  in_order_IJ = (in_order_IJB | ~visit_IJB).all(axis=2)
  band_IJ = jnp.zeros_like(low_IJ)
  if band is not None:
    is_one_IJ = visit_IJ & in_order_IJ
    if rate is not None:
      is_one_IJ &= _is_one_rate(mask, query_block, key_block, queries, keys, rate, table)
    code_IJ = _in_band(mask, query_block, key_block, queries, keys, band, part[1], visit_IJB)
    band_IJ = jnp.where(is_one_IJ, code_IJ, 0)
  far_IJ = jnp.zeros_like(low_IJ)
  if far:
    is_line_IJ = visit_IJ & in_order_IJ & (high_IJ - low_IJ == 1)
    far_IJ = (is_line_IJ & _is_far(query_block, key_block, queries, keys)).astype(jnp.int32)
    band_IJ = jnp.where(far_IJ > 0, 0, band_IJ)
  return Plan(
    low_IJ=low_IJ,
    high_IJ=high_IJ,
    key_IJ=_next_visited(visit_IJ),
    query_IJ=_next_visited(visit_IJ.T).T,
    in_order_IJ=in_order_IJ.astype(jnp.int32),
    band_IJ=band_IJ,
    far_IJ=far_IJ,
    band_low=jnp.where(band_IJ > 0, low_IJ, MOST_SEGMENTS).min(),
    band_high=jnp.where(band_IJ > 0, high_IJ, 0).max(),
    part_low_IJY=part_low_IJY,
    part_high_IJY=part_high_IJY,
  )


def _visits_of_blocks(mask, query_block, key_block, queries, keys):
  """Returns `visits` of blocks of so many."""
  return visits(
    mask,
    _bounds(queries.position_B1Q, query_block),
    _bounds(keys.position_B1K, key_block),
    _bounds(queries.segment_B1Q, query_block),
    _bounds(keys.segment_B1K, key_block),
  )


def _is_one_rate(mask, query_block, key_block, queries, keys, rate, table):
  """Returns whether later positions of a tile's pairs have the rate of position 0, of each head.

  As it is monotone, so have those between. The next position, if there is one, has it too: it is
  no maximum of two numbers that are equal, which would have no derivative of its own.
  """
  _, high_I = _bounds(queries.position_B1Q, query_block, axes=WHOLE)
  _, high_J = _bounds(keys.position_B1K, key_block, axes=WHOLE)
  last_IJ = high_I[:, None] if mask.causal else jnp.maximum(high_I[:, None], high_J[None])
  next_IJ = 1 + jnp.minimum(last_IJ, jnp.iinfo(jnp.int32).max - 1)
  numbers = jax.tree.leaves(table.coordinate)
  num_heads = max((number_H.shape[0] for number_H in numbers), default=1)
  of_heads = jax.tree.map(lambda number_H: jnp.broadcast_to(number_H, num_heads), table.coordinate)
  first_IJ = jnp.zeros_like(next_IJ)
  of_each = jax.vmap(lambda numbers, _: rate(numbers, first_IJ) == rate(numbers, next_IJ))
  return of_each(of_heads, jnp.arange(num_heads)).all(axis=0)


def _in_band(mask, query_block, key_block, queries, keys, band, width, visit_IJB):
  """Returns `Plan.band_IJ` of tiles in order whose x depends on the distance alone."""
  query_IB, key_JB = (
    position_B1L[:, 0, ::block].T
    for position_B1L, block in ((queries.position_B1Q, query_block), (keys.position_B1K, key_block))
  )
  apart_IJB = query_IB[:, None] - key_JB[None]
  # In rows that see none of a tile it may be anywhere.
  most = jnp.iinfo(jnp.int32).max
  apart_IJ = jnp.where(visit_IJB, apart_IJB, -most).max(axis=2)
  is_one_IJ = apart_IJ == jnp.where(visit_IJB, apart_IJB, most).min(axis=2)
  found_IJ = is_one_IJ & (apart_IJ % width == 0)
  # What lies before a causal mask's first block is hidden.
  least = 1 if mask.causal else query_block // width + key_block // width - 1
  code_IJ = apart_IJ // width - band.first + query_block // width
  return jnp.where(found_IJ & (least <= code_IJ) & (code_IJ <= band.count), code_IJ, 0)


def _is_far(query_block, key_block, queries, keys):
  """Returns whether all keys of a tile are as far before its queries as it has of them.

  In all rows of the batch: in those that see none of it, too, so that every number is finite there.
  """
  low_I, _ = _bounds(queries.position_B1Q, query_block, axes=WHOLE)
  _, high_J = _bounds(keys.position_B1K, key_block, axes=WHOLE)
  return low_I[:, None] - high_J[None] >= key_block


def _spans(mask, query_block, key_block, queries, keys, table, coordinate):
  """Returns `segments` of blocks of so many."""
  i_low, i_high = _bounds(queries.position_B1Q, query_block, axes=WHOLE)
  j_low, j_high = _bounds(keys.position_B1K, key_block, axes=WHOLE)
  bounds = i_low[:, None], i_high[:, None], j_low[None], j_high[None]
  return segments(table, coordinate, *bounds, causal=mask.causal)


def _by_tile(number_YY, of_queries, of_keys):
  """Returns the numbers of the parts of each tile, _IJY: those of the queries within the keys'."""
  parts_IYJY = number_YY.reshape(-1, of_queries, number_YY.shape[1] // of_keys, of_keys)
  return parts_IYJY.transpose(0, 2, 3, 1).reshape(len(parts_IYJY), parts_IYJY.shape[2], -1)


def _in_order(position_B1L, block):
  """Returns whether the positions of a block rise by one, _IB."""
  position_BIK = position_B1L.reshape(len(position_B1L), -1, block)
  return (position_BIK == position_BIK[..., :1] + jnp.arange(block)[None, None]).all(axis=2).T


def _bounds(number_B1L, block, axes: Any = 2) -> Any:
  if number_B1L is None:
    return None
  number_IBL = jnp.moveaxis(number_B1L.reshape(len(number_B1L), -1, block), 1, 0)
  return Bounds(number_IBL.min(axis=axes), number_IBL.max(axis=axes))


def visits(
  mask: mask_lib.Mask,
  query_position: Bounds,
  key_position: Bounds,
  query_segment: Bounds | None,
  key_segment: Bounds | None,
) -> jax.Array:
  """Returns visit_IJB, boolean: whether a query of block I may see a key of block J in a row.

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
  return visit_IJB


def _next_visited(visit_IJ):
  """Returns the column of each row's next tile to visit; after the last, of the last."""
  columns = visit_IJ.shape[1]
  column_IJ = jnp.broadcast_to(jnp.arange(columns, dtype=jnp.int32)[None], visit_IJ.shape)
  next_IJ = jax.lax.cummin(jnp.where(visit_IJ, column_IJ, columns), axis=1, reverse=True)
  last_IJ = jax.lax.cummax(jnp.where(visit_IJ, column_IJ, 0), axis=1)
  return jnp.where(next_IJ < columns, next_IJ, last_IJ)


def segments(table, coordinate, i_low, i_high, j_low, j_high, *, causal=False):
  """Returns the span of a table's segments that x can reach in each tile: the first, and past last.

  x is monotone in either position on each side of i = j: so its extremes lie at a tile's corners,
  or where i = j. If pairs with i < j are hidden, a corner that is one counts as i = j.

  Args:
    table: with breakpoints.
    coordinate: of the encoding.
    i_low: the least query positions of blocks; all four broadcast to the tiles, [..., I, J].
    i_high: the greatest.
    j_low: the least key positions.
    j_high: the greatest.
    causal: whether keys after a query are hidden.
  """
  numbers = jax.tree.map(lambda number_1: number_1[0], table.coordinate)
  corners = [
    coordinate(numbers, i, jnp.minimum(i, j) if causal else j)
    for i in (i_low, i_high)
    for j in (j_low, j_high)
  ]
  middle = jnp.maximum(i_low, j_low)
  meet = middle <= jnp.minimum(i_high, j_high)
  corners.append(jnp.where(meet, coordinate(numbers, middle, middle), corners[0]))
  reached = jnp.stack(corners)

  def ends_below(x):
    return jnp.searchsorted(table.lower_Z, x, method='compare_all').astype(jnp.int32)

  return ends_below(reached.min(axis=0)) - 1, ends_below(reached.max(axis=0))


def _stretches_apart(query_stretch, key_stretch):
  """Returns the span of how many stretches a query of each tile is after a key."""
  least_IJ = query_stretch.low_I[:, None] - key_stretch.high_I[None]
  most_IJ = query_stretch.high_I[:, None] - key_stretch.low_I[None]
  low_IJ, high_IJ = (jnp.clip(apart_IJ, 0, MOST_APART) for apart_IJ in (least_IJ, most_IJ))
  return low_IJ, high_IJ + 1
