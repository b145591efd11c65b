"""What the tiles of the Mosaic GPU kernels need to know, prepared before they run."""

# Not strict, as its neighbours are.
# pyright: basic

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lex_fire.encodings import piecewise
from lex_fire.kernels import mask as mask_lib
from lex_fire.kernels import mosaic_gpu_far as far_lib
from lex_fire.kernels import mosaic_gpu_tile as tile_lib
from lex_fire.kernels import plan

_PAD_QUERY, _PAD_KEY = -1, -2  # segments of padding: equal to no segment, nor to each other
_LEAST, _LARGEST = np.iinfo(np.int32).min, np.iinfo(np.int32).max


class Table(NamedTuple):
  """A `piecewise.Table` as kernels read it: one array a kind of number, a head's together.

  Attributes:
    line_HZX: lower end, slope and height at 0 of each segment, of x in its unit; one more than
      there are ends the last.
    number_HN: the parameters of the coordinate, N of them.
    factor_BQ: what x of a query's pairs is multiplied by, or None; see `Setup`. B may be 1.
  """

  line_HZX: jax.Array
  number_HN: jax.Array
  factor_BQ: Any


class Queries(NamedTuple):
  """Queries, prepared, in whole blocks; B of their numbers may be 1.

  Attributes:
    query_BQHC: of a length that is a multiple of 128.
    number_BNQ: see `query_numbers`.
  """

  query_BQHC: Any
  number_BNQ: Any


class Keys(NamedTuple):
  """Keys and values likewise; see `key_numbers`."""

  key_BKGC: Any
  value_BKGC: Any
  number_BNK: Any


def cut(
  mask: mask_lib.Mask,
  stretch: int | None,
  of_queries: tuple[Any, ...],
  of_keys: tuple[Any, ...],
) -> tuple[Queries, Keys]:
  """Returns queries and keys in whole blocks.

  Args:
    mask: which keys a query may see.
    stretch: of a decay [tokens]; None without one.
    of_queries: these, prepared, their positions, and segments or None.
    of_keys: keys, prepared, values, and likewise.
  """
  query_BQHC, query_position_BQ, query_segment_BQ = of_queries
  key_BKGC, value_BKGC, key_position_BK, key_segment_BK = of_keys
  of_query, of_key = (
    -x.shape[1] % (tile_lib.UNITS * tile_lib.ROWS) for x in (query_BQHC, key_BKGC)
  )

  def padded(x_BLHC, padding):
    return jnp.pad(x_BLHC, [(0, 0), (0, padding), (0, 0), (0, 0)])

  queries = Queries(
    padded(query_BQHC, of_query),
    query_numbers(mask, query_position_BQ, query_segment_BQ, of_query, stretch),
  )
  keys = Keys(
    padded(key_BKGC, of_key),
    padded(value_BKGC, of_key),
    key_numbers(key_position_BK, key_segment_BK, of_key, stretch),
  )
  return queries, keys


class Tiles(NamedTuple):
  """What to do in a grid of tiles; B may be 1.

  Attributes:
    code_BIJ: of each tile; see `mosaic_gpu_tile`.
    range_BIP: of the columns that the rows I of a step visit, one a warpgroup, the first and how
      many there are from it to the last.
  """

  code_BIJ: jax.Array
  range_BIP: jax.Array


class Plan(NamedTuple):
  """Tiles of the forward pass, and of the backward ones for queries and for keys.

  Queries are in rows but of the last, where keys are.
  """

  forward: Tiles
  queries: Tiles
  keys: Tiles


def table(table: piecewise.Table, num_heads: int, setup: Any, query_BNQ: jax.Array) -> Table:
  """Returns the table of all heads; ends and anchors have no gradient.

  Args:
    table: of the encoding.
    num_heads: of the queries.
    setup: of the kernel.
    query_BNQ: see `query_numbers`.
  """
  slope_HZ = table.slope_ZH.T
  zero_Z = jnp.zeros(slope_HZ.shape[1])
  lower_Z = zero_Z - jnp.inf if table.lower_Z is None else table.lower_Z
  anchor_Z = zero_Z if table.anchor_Z is None else table.anchor_Z
  value_HZ = jnp.zeros_like(slope_HZ) if table.value_ZH is None else table.value_ZH.T
  lower_HZ = jnp.broadcast_to(lower_Z[None], slope_HZ.shape)
  height_HZ = value_HZ - slope_HZ * jax.lax.stop_gradient(anchor_Z)[None]
  in_unit = jax.lax.stop_gradient(lower_HZ) / setup.unit, slope_HZ * setup.unit
  line_HZX = jnp.stack([*in_unit, height_HZ], axis=2)
  end_H1X = jnp.broadcast_to(jnp.array([jnp.inf, 0, 0])[None, None], (num_heads, 1, 3))
  numbers = [jnp.broadcast_to(x_H, num_heads) for x_H in jax.tree.leaves(table.coordinate)]
  factor_BQ = None
  if setup.factor is not None:
    of_all_heads = jax.tree.map(lambda number_1: number_1.reshape(()), table.coordinate)
    factor_BQ = setup.factor(of_all_heads, query_BNQ[:, tile_lib.POSITION])
  return Table(
    line_HZX=jnp.concatenate([line_HZX, end_H1X], axis=1),
    number_HN=jnp.stack(numbers or [jnp.zeros(num_heads)], axis=1),
    factor_BQ=factor_BQ,
  )


def with_bits(
  query_BNQ: jax.Array, key_BNK: jax.Array, factor_BQ: jax.Array | None, columns: int
) -> tuple[jax.Array, jax.Array]:
  """Returns the integers of queries and keys under a bias; see `mosaic_gpu_tile`.

  Args:
    query_BNQ: see `query_numbers`.
    key_BNK: see `key_numbers`.
    factor_BQ: of a `Table`.
    columns: of a tile.
  """

  def with_more(number_BNL, *rows):
    batch, _, length = number_BNL.shape
    position_BIX = number_BNL[:, tile_lib.POSITION].reshape(batch, -1, columns)
    offset_BIX = position_BIX - position_BIX[:, :, columns // 2, None]
    offset_BL = offset_BIX.reshape(batch, length).astype(jnp.float32)
    bits = (jax.lax.bitcast_convert_type(x_BL, jnp.int32) for x_BL in (offset_BL, *rows))
    in_rows = (jnp.broadcast_to(x_BL, (batch, length))[:, None] for x_BL in bits)
    return jnp.concatenate([number_BNL, *in_rows], axis=1)

  factors = () if factor_BQ is None else (factor_BQ, 1 / factor_BQ)
  return with_more(query_BNQ, *factors), with_more(key_BNK)


def query_numbers(
  mask: mask_lib.Mask,
  position_BQ: jax.Array,
  segment_BQ: jax.Array | None,
  padding: int,
  stretch: int | None = None,
) -> jax.Array:
  """Returns number_BNQ, int32: position, segment, first and last visible position of queries.

  And under a decay, which stretch of so many tokens each lies in.
  """
  first_BQ, last_BQ = mask.first(position_BQ), mask.last(position_BQ)
  rows = (
    position_BQ,
    _or(segment_BQ, 0, position_BQ),
    _or(first_BQ, _LEAST, position_BQ),
    _or(last_BQ, _LARGEST, position_BQ),
    *_stretches(position_BQ, stretch),
  )
  return _stacked(rows, padding, _PAD_QUERY)


def key_numbers(
  position_BK: jax.Array,
  segment_BK: jax.Array | None,
  padding: int,
  stretch: int | None = None,
) -> jax.Array:
  """Returns number_BNK, int32: position and segment of keys, and under a decay their stretch."""
  rows = position_BK, _or(segment_BK, 0, position_BK), *_stretches(position_BK, stretch)
  return _stacked(rows, padding, _PAD_KEY)


def _stretches(position_BL, stretch):
  return () if stretch is None else (position_BL // stretch,)


def _or(number_BL, default, like_BL):
  return jnp.full_like(like_BL, default) if number_BL is None else number_BL


def _stacked(rows, padding, pad_segment):
  """Stacks arrays _BL, padded by their last, so that no block spans more; segments by their own."""
  rows = [jnp.asarray(row_BL, jnp.int32) for row_BL in rows]
  batch = max(len(row_BL) for row_BL in rows)
  rows = [jnp.broadcast_to(row_BL, (batch, row_BL.shape[1])) for row_BL in rows]
  number_BNL = jnp.pad(jnp.stack(rows, axis=1), [(0, 0), (0, 0), (0, padding)], mode='edge')
  length = number_BNL.shape[2] - padding
  return number_BNL.at[:, tile_lib.SEGMENT, length:].set(pad_segment)


def codes(
  query_BNQ: jax.Array,
  key_BNK: jax.Array,
  table: piecewise.Table | None,
  coordinate: Any,
  blocks: tuple[int, int],
  *,
  degree: int | None = None,
  keys_in_rows: bool = False,
) -> jax.Array:
  """Returns code_BIJ of blocks of queries and of keys, or code_BJI.

  A span is of a decay's stretches, if there is one, else of a table's segments.

  Args:
    query_BNQ: see `query_numbers`.
    key_BNK: see `key_numbers`.
    table: of the bias, or None.
    coordinate: of the encoding.
    blocks: how many queries and keys a tile has.
    degree: of the polynomial of far keys, which are not in rows; None: there is none.
    keys_in_rows: whether columns of tiles are queries; then the code has these last.
  """
  code_BIJ = _codes(query_BNQ, key_BNK, table, coordinate, blocks)
  if table is not None:
    least = math.inf if degree is None else far_lib.LEAST_DISTANCE[degree]
    after_BIJ, far_BIJ = _distances(query_BNQ, key_BNK, blocks, least, keys_in_rows)
    far_BIJ &= code_BIJ >> tile_lib.MORE_SHIFT == 0
    more_BIJ = tile_lib.AFTER * after_BIJ + tile_lib.FAR * far_BIJ
    code_BIJ += jnp.where(code_BIJ != 0, more_BIJ, 0)
  return jnp.swapaxes(code_BIJ, 1, 2) if keys_in_rows else code_BIJ


def _distances(query_BNQ, key_BNK, blocks, least, keys_in_rows):
  """Returns of which tiles all queries are after all keys, and of which keys are far."""
  position_BQ, position_BK = (x_BNL[:, tile_lib.POSITION] for x_BNL in (query_BNQ, key_BNK))
  position_BIQ, position_BJK = (
    x_BL.reshape(len(x_BL), -1, block)
    for x_BL, block in zip((position_BQ, position_BK), blocks, strict=True)
  )
  # Of floating numbers, as integers may be too far apart for their difference.
  first_BI1, last_B1J = position_BIQ.min(axis=2)[:, :, None], position_BJK.max(axis=2)[:, None]
  apart_BIJ = first_BI1 * 1.0 - last_B1J * 1.0
  column_BIX = position_BIQ if keys_in_rows else position_BJK
  columns = column_BIX.shape[2]
  spread_BI = column_BIX.max(axis=2) * 1.0 - column_BIX.min(axis=2) * 1.0
  follow_BI = (column_BIX - column_BIX[:, :, :1] == jnp.arange(columns)[None, None]).all(axis=2)

  def of_column(x_BI):
    return x_BI[:, :, None] if keys_in_rows else x_BI[:, None]

  is_after_BIJ = (first_BI1 >= last_B1J) & (apart_BIJ >= of_column(spread_BI))
  is_far_BIJ = of_column(follow_BI) & (apart_BIJ >= least * columns)
  return is_after_BIJ, is_far_BIJ


def _codes(query_BNQ, key_BNK, table, coordinate, blocks):
  """Returns code_BIJ but for distances."""
  query_bounds, key_bounds = _bounds(query_BNQ, blocks[0]), _bounds(key_BNK, blocks[1])

  def of_queries(which):
    return (bound_BNI[:, which, :, None] for bound_BNI in query_bounds)

  def of_keys(which):
    return (bound_BNJ[:, which, None] for bound_BNJ in key_bounds)

  (key_low, key_high), (first_low, first_high) = (
    of_keys(tile_lib.POSITION),
    of_queries(tile_lib.FIRST),
  )
  last_low, last_high = of_queries(tile_lib.LAST)
  (of_query, to_query), (of_key, to_key) = of_queries(tile_lib.SEGMENT), of_keys(tile_lib.SEGMENT)
  visit = (
    (first_low <= key_high) & (key_low <= last_high) & (of_query <= to_key) & (of_key <= to_query)
  )
  whole = (first_high <= key_low) & (key_high <= last_low)
  whole &= (of_query == to_key) & (of_key == to_query) & (of_query == to_query)
  code_BIJ = tile_lib.VISIT * visit + tile_lib.WHOLE * whole
  if query_BNQ.shape[1] > tile_lib.STRETCH:
    (of_query, to_query), (of_key, to_key) = (
      of_queries(tile_lib.STRETCH),
      of_keys(tile_lib.KEY_STRETCH),
    )
    # Keys after a query, in stretches after its own, are hidden; of what is as far as the last
    # that fits nothing is left.
    most = tile_lib.MOST_SEGMENTS - 1
    low_BIJ, last_BIJ = (jnp.clip(x, 0, most) for x in (of_query - to_key, to_query - of_key))
  elif table is not None and table.lower_Z is not None:
    positions = *of_queries(tile_lib.POSITION), *of_keys(tile_lib.POSITION)
    low_BIJ, high_BIJ = plan.segments(table, coordinate, *positions)
    last_BIJ = high_BIJ - 1
  else:
    return jnp.where(visit, code_BIJ, 0)
  code_BIJ += low_BIJ << tile_lib.FIRST_SHIFT
  code_BIJ += (last_BIJ - low_BIJ) << tile_lib.MORE_SHIFT
  return jnp.where(visit, code_BIJ, 0)


def _bounds(number_BNL, block):
  """Returns the bounds [B, N, I] of the numbers of each block."""
  number_BNIL = number_BNL.reshape(*number_BNL.shape[:2], -1, block)
  return number_BNIL.min(axis=3), number_BNIL.max(axis=3)


def tiles(code_BIJ: jax.Array, together: int) -> Tiles:
  """Returns the tiles, of which some rows I together walk one range of columns."""
  visit_BIJ = (code_BIJ & tile_lib.VISIT) != 0
  batch, rows, columns = code_BIJ.shape
  visit_BIJ = visit_BIJ.reshape(batch, rows // together, together, columns).any(axis=2)
  column_J = jnp.arange(columns)
  first_BI = jnp.where(visit_BIJ, column_J[None, None], columns).min(axis=2)
  last_BI = jnp.where(visit_BIJ, column_J[None, None], -1).max(axis=2)
  count_BI = jnp.maximum(last_BI + 1 - first_BI, 0)
  return Tiles(code_BIJ, jnp.stack([first_BI, count_BI], axis=2).astype(jnp.int32))
