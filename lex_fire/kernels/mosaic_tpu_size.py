"""How large the tiles of the TPU kernel are, and what it cannot hold."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lex_fire.encodings import base

BLOCK = 512  # queries of a tile; of keys it has twice as many
SUBLANES = 8  # rows of a vector register
LANES = 128  # of one: blocks are multiples, and channels are padded to one
# Heads of one tile share its positions, mask and x: as many as have these channels.
CHANNELS_TOGETHER = 2048
# Fewer if they have a band, which is long only if it is of few heads, and needs no x.
CHANNELS_OF_BAND = 1024
MOST_OF_BAND = 32  # blocks of a band, LANES by LANES
VMEM_BYTES = 60 * 2**20  # of the 64 MiB of a v5p; v5e and v6e have 128
# Besides, for numbers, constants and columns of far tiles, on chips that have it: `mosaic_tpu_far`.
FAR_BYTES = 20 * 2**20
# Of it, for a tile's own arrays and all that it holds of its queries, or of its keys.
QUERY_BYTES = 48 * 2**20
KEY_BYTES = 40 * 2**20
SUM_BYTES = 20 * 2**20  # of what queries may have, for the gradient of a table's lines
SMEM_BYTES = 960 * 2**10  # of 1 MiB, for the plan and the table
MOST_TILES = 2**16  # of a plan; keys of a tile are doubled until it has no more
MOST_KEYS = 2048  # of a tile
DTYPES = (jnp.bfloat16, jnp.float32)


def why_not(encoding: base.Encoding, query: Any, key: Any, pieces: int = 1) -> str | None:
  """Returns why this kernel cannot serve, or None if it can.

  Args:
    encoding: says the decay and the bias of the logits.
    query: an array query_BQHC, or its shape and dtype.
    key: likewise key_BKGC.
    pieces: see `blocks`.
  """
  if encoding.bias is not None and encoding.table is None:
    return f'mosaic_tpu needs a table of the bias, which {encoding.name!r} has not'
  if encoding.log_decay is not None and encoding.bias is not None:
    return f'mosaic_tpu has a decay or a bias, but {encoding.name!r} has both'
  if query.dtype not in DTYPES:
    return f'mosaic_tpu takes bfloat16 and float32, not {query.dtype}'
  segments = num_segments(encoding)
  tile = blocks(query, key, BLOCK, segments, pieces, has_band(encoding))
  needed = _scalar_bytes(tile, segments, query, key)
  if needed > SMEM_BYTES:
    return f'mosaic_tpu would need {needed:,} bytes of scalar memory, and has {SMEM_BYTES:,}'
  needed = _sum_bytes(tile.heads, segments)
  if needed > SUM_BYTES:
    return f'mosaic_tpu would need {needed:,} bytes for the sums of a table, and has {SUM_BYTES:,}'
  needed = _vector_bytes(tile, segments, query, key, pieces)
  if needed > VMEM_BYTES:
    return f'mosaic_tpu would need {needed:,} bytes of vector memory, and has {VMEM_BYTES:,}'
  return None


class Blocks(NamedTuple):
  """What a tile has of each, and rows of each sum of the gradient of a table.

  With as many as a register has, nothing is summed within one. `band` is of LANES by LANES: how
  many a band may have.
  """

  queries: int
  keys: int
  heads: int
  groups: int
  sum_rows: int
  band: int


def blocks(
  query: Any, key: Any, block: int, segments: int, pieces: int = 1, band: bool = False
) -> Blocks:
  """Returns what a tile has of each.

  Twice as many keys as queries: on v5e, by the compiler's schedule, the forward pass without a bias
  then takes 0.70 of what it takes with as many, the backward pass 0.91.

  Args:
    query: an array query_BQHC, or its shape and dtype.
    key: likewise key_BKGC.
    block: queries, at most.
    segments: of the encoding's table.
    pieces: of a row, if devices have parts of it: a tile is no longer than one, and what is added
      up over devices is float32.
    band: whether there is one: see `has_band`.
  """
  num_queries, num_keys = query.shape[1] // pieces, key.shape[1] // pieces
  keys = min(2 * block, pl.cdiv(num_keys, LANES) * LANES)
  while True:
    groups = _groups(query, key, keys, segments, pieces, band)
    heads = groups * (query.shape[2] // key.shape[2])
    of_sums = _sum_bytes(heads, segments)
    sum_rows = SUBLANES if SUBLANES * of_sums <= SUM_BYTES // 2 else 1
    free_bytes = QUERY_BYTES - _tile_bytes(BLOCK, keys) - sum_rows * of_sums
    most_queries = free_bytes // (heads * _query_bytes(query, pieces))
    most_queries = max(most_queries // LANES, 1) * LANES
    queries = min(block, most_queries, pl.cdiv(num_queries, LANES) * LANES)
    tiles = pieces**2 * pl.cdiv(num_queries, queries) * pl.cdiv(num_keys, keys)
    if keys >= MOST_KEYS or tiles <= MOST_TILES:
      tile = Blocks(queries, keys, heads, groups, sum_rows, band=0)
      return tile._replace(band=_band(tile, segments, query, key, pieces) if band else 0)
    keys *= 2


def _band(tile, segments, query, key, pieces):
  """Returns how many blocks of a band there is memory for.

  The kernel for queries holds the bias of its heads and its gradient, that for keys the bias.
  """
  block = tile.heads * LANES * LANES * 4
  # What the compiler stores may be two arrays of a tile more.
  most_bytes = VMEM_BYTES - 2 * 4 * tile.queries * tile.keys
  of_queries = most_bytes - _vector_bytes(tile, segments, query, key, pieces)
  of_keys = most_bytes - _vector_bytes_of_keys(tile, query, key, pieces)
  return min(MOST_OF_BAND, max(of_queries // (2 * block), 0), max(of_keys // block, 0))


def _query_bytes(query, pieces):
  """Returns what a query of a head takes: three blocks, held twice, a sum, and two columns.

  They are two of its dtype and one more: its output, which over pieces is two in float32.
  """
  blocks = 3 * query.dtype.itemsize if pieces == 1 else query.dtype.itemsize + 2 * 4
  return _lanes(query) * (2 * blocks + 4) + 2 * LANES * 4


def _key_bytes(key, pieces):
  """Returns what a key of a key head takes: four blocks, held twice, and two sums."""
  gradient = key.dtype.itemsize if pieces == 1 else 4
  return _lanes(key) * (4 * key.dtype.itemsize + 4 * gradient + 8)


def _vector_bytes(tile, segments, query, key, pieces):
  """Returns what the kernel for queries takes of vector memory: but for a band, the most of all."""
  of_queries = tile.heads * tile.queries * _query_bytes(query, pieces)
  of_keys = tile.groups * tile.keys * _lanes(key) * 4 * key.dtype.itemsize
  of_sums = tile.sum_rows * _sum_bytes(tile.heads, segments)
  return of_queries + of_keys + of_sums + _tile_bytes(tile.queries, tile.keys)


def _vector_bytes_of_keys(tile, query, key, pieces):
  """Returns what the kernel for keys takes of vector memory, but for a band."""
  of_queries = tile.heads * tile.queries * (_lanes(query) * 4 * query.dtype.itemsize + 2 * 2 * 4)
  of_keys = tile.groups * tile.keys * _key_bytes(key, pieces)
  return of_queries + of_keys + _tile_bytes(tile.queries, tile.keys)


def _groups(query, key, keys, segments, pieces, band):
  """Returns how many key heads a tile of so many keys has."""
  num_groups, per_group = key.shape[2], query.shape[2] // key.shape[2]
  most = min(
    (CHANNELS_OF_BAND if band else CHANNELS_TOGETHER) // (_lanes(query) * per_group),
    (KEY_BYTES - _tile_bytes(BLOCK, keys)) // (keys * _key_bytes(key, pieces)),
  )
  if segments:
    most = min(most, SUM_BYTES // _sum_bytes(per_group, segments))
  # So that both cores of a chip that has two, as v5p, have heads of their own.
  if query.shape[0] == 1:
    most = min(most, num_groups // 2)
  return max(n for n in range(1, num_groups + 1) if num_groups % n == 0 and n <= max(most, 1))


def _tile_bytes(queries, keys):
  """Returns what seven arrays of a tile take.

  They are x, a bias, segments, gradients, and what the compiler stores.
  """
  return 7 * 4 * queries * keys


def _lanes(array):
  """Returns the channels of a head, padded to whole registers."""
  return pl.cdiv(array.shape[3], LANES) * LANES


def _scalar_bytes(tile, segments, query, key):
  """Returns what the plan takes, and the ends of a table, and twice the lines of a tile's heads.

  Besides, there is room for the spans of a tile's parts and the numbers of x.
  """
  tiles = pl.cdiv(query.shape[1], tile.queries) * pl.cdiv(key.shape[1], tile.keys)
  return 4 * (2 * tiles + segments * (2 + 4 * tile.heads))


def _sum_bytes(heads, segments):
  """Returns what a row for each slope and each height of heads takes."""
  return 2 * heads * segments * LANES * 4


@functools.lru_cache(maxsize=256)
def _table(encoding):
  """Returns the table of an encoding for two heads, as shapes, or None."""
  if encoding.table is None:
    return None

  def of_two_heads():
    params = encoding.init(jax.random.key(0), num_heads=2, head_dim=LANES, d_model=2 * LANES)
    return encoding.table(params, 2)

  return jax.eval_shape(of_two_heads)


def num_segments(encoding: base.Encoding) -> int:
  """Returns how many segments the table of an encoding has; 0 without one."""
  table = _table(encoding)
  return 0 if table is None else table.slope_ZH.shape[0]


def per_head(table: Any) -> bool:
  """Returns whether each head has an x of its own."""
  return any(number_H.shape[0] > 1 for number_H in jax.tree.leaves(table.coordinate))


def has_band(encoding: base.Encoding) -> bool:
  """Returns whether kernels hold the bias of an encoding near the diagonal: `mosaic_tpu_band`.

  It has to depend on the distance alone, at least in part of the text. One line of an x that heads
  share is as soon made as read.
  """
  table = _table(encoding)
  if table is None or not (encoding.shift_invariant or encoding.factors):
    return False
  return table.lower_Z is not None or per_head(table)
