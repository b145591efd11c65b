"""A decay with distance, split in a factor of the query and one of the key that stay in float32.

Each pair (i, j) is to carry exp(r (i - j)), r <= 0 a channel's rate. Any origin o may be
subtracted: q_i takes exp(r (i - o)) and k_j takes exp(r (o - j)). Sun et al. 2022
(arXiv:2212.10554) have o = 0, which leaves float32 near position 35,000. Here it takes two steps.

`within_stretch`, once for all queries and keys: positions are cut in stretches so long that the
decay may halve the exponent range of float32 (16,000 tokens for xPos), and o is the middle of each
token's own. `between`, a tile: what is left is the decay from the middle of one stretch to that of
another, relative to an origin near the tile, and nothing at all in the many tiles that lie in one
stretch. So a decay costs hardly more than a rotation, and no position is too far.

For keys after the query, j > i, the same factors would grow with distance: the paper leaves
bidirectional models open. There the pair is to carry exp(r (j - i)), which is this decay with all
positions negated, so that it shrinks with |i - j| on both sides.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lex_fire import errors

MAX_LOG_FACTOR = 40.0  # nats; two such factors still multiply to a finite float32


def widest(log_decay_C: np.ndarray) -> int:
  """Returns how many positions the queries of a tile may span [tokens]."""
  return int(min(2 * MAX_LOG_FACTOR / max(-log_decay_C.min(), 1e-9), 2**30))


def stretch_of(log_decay_C: np.ndarray) -> int:
  """Returns the length of a stretch [tokens]."""
  return max(widest(log_decay_C) // 2, 1)


def middle_of_stretch(position_BL: jax.Array, log_decay_C: np.ndarray) -> jax.Array:
  """Returns, for each position, the middle of its stretch, int32."""
  stretch = stretch_of(log_decay_C)
  return position_BL // stretch * stretch + stretch // 2


def within_stretch(
  query_BQHC: jax.Array,
  key_BKGC: jax.Array,
  log_decay_C: np.ndarray,
  query_position_BQ: jax.Array,
  key_position_BK: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Returns queries and keys times their decay to and from the middle of their stretch.

  In their own dtypes; positions may have a leading 1.
  """
  rate_11C = jnp.asarray(log_decay_C, jnp.float32)[None, None]

  def scale(x_BLHC, offset_BL):
    factor_BLC = jnp.exp(offset_BL[:, :, None] * rate_11C)
    return (x_BLHC.astype(jnp.float32) * factor_BLC[:, :, None]).astype(x_BLHC.dtype)

  return (
    scale(query_BQHC, query_position_BQ - middle_of_stretch(query_position_BQ, log_decay_C)),
    scale(key_BKGC, middle_of_stretch(key_position_BK, log_decay_C) - key_position_BK),
  )


def all_equal(query_middle_BQ: jax.Array, key_middle_BK: jax.Array) -> jax.Array:
  """Returns whether a tile lies in one stretch, so that `within_stretch` was all of the decay."""
  first = query_middle_BQ[0, 0]
  return jnp.all(query_middle_BQ == first) & jnp.all(key_middle_BK == first)


def between(
  query_BHQC: jax.Array,
  key_BGKC: jax.Array,
  log_decay_C: np.ndarray,
  query_position_BQ: jax.Array,
  key_position_BK: jax.Array,
  query_segment_BQ: jax.Array | None,
  key_segment_BK: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Returns the queries and keys of a tile times their factors, in their own dtypes.

  The pairs of a key before its query are right. With all positions negated, so are the others.

  A key's factor is clipped where it would overflow: such a key lies in the future of all queries.
  A query's factor becomes NaN there: its segment spans more positions than one tile can.

  Args:
    query_BHQC: of the tile.
    key_BGKC: of the tile.
    log_decay_C: nats per token, <= 0.
    query_position_BQ: int32; B may be 1.
    key_position_BK: likewise.
    query_segment_BQ: or None: all is one segment.
    key_segment_BK: likewise.

  Raises:
    errors.UserError: if the tile has more queries than positions that it can span.
  """
  if query_BHQC.shape[2] > widest(log_decay_C):
    raise errors.UserError(
      f'a decay of {log_decay_C.min():.2g} nats a token is too fast for one tile of '
      f'{query_BHQC.shape[2]} queries in float32 (at most {widest(log_decay_C)}); '
      "use implementation='chunked'"
    )
  tile = (query_position_BQ, key_position_BK, query_segment_BQ, key_segment_BK)
  query_offset_BQ = query_position_BQ - _origin(query_position_BQ, query_segment_BQ, *tile)
  key_offset_BK = _origin(key_position_BK, key_segment_BK, *tile) - key_position_BK
  rate_11C = jnp.asarray(log_decay_C, jnp.float32)[None, None]

  def scale(x_BHLC, offset_BL, beyond):
    log_factor_BLC = offset_BL[:, :, None] * rate_11C
    fits_BLC = log_factor_BLC <= MAX_LOG_FACTOR
    factor_BLC = jnp.exp(jnp.where(fits_BLC, log_factor_BLC, beyond))
    return (x_BHLC.astype(jnp.float32) * factor_BLC[:, None]).astype(x_BHLC.dtype)

  return scale(query_BHQC, query_offset_BQ, jnp.nan), scale(key_BGKC, key_offset_BK, MAX_LOG_FACTOR)


def _origin(position_BL, segment_BL, query_position, key_position, query_segment, key_segment):
  """Returns each position's origin, one a segment: midway from its first query to its last key.

  The last key, that is, which a query of the segment can see. So both exponents are at most half of
  what the segment spans in the tile on the wrong side of 0. A position whose segment has no query
  or no key here takes part in no visible pair, and is its own origin.
  """
  if segment_BL is None:
    last_query_B = query_position.max(axis=1)
    first_B, last_B = (
      query_position.min(axis=1),
      jnp.minimum(key_position.max(axis=1), last_query_B),
    )
    return (first_B + (last_B - first_B) // 2)[:, None]
  with_query_BLQ = segment_BL[:, :, None] == query_segment[:, None]
  with_key_BLK = segment_BL[:, :, None] == key_segment[:, None]
  least, largest = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max
  first_BL = jnp.where(with_query_BLQ, query_position[:, None], largest).min(axis=2)
  last_query_BL = jnp.where(with_query_BLQ, query_position[:, None], least).max(axis=2)
  last_key_BL = jnp.where(with_key_BLK, key_position[:, None], least).max(axis=2)
  last_BL = jnp.minimum(last_query_BL, last_key_BL)
  return jnp.where(last_BL > least, first_BL + (last_BL - first_BL) // 2, position_BL)
