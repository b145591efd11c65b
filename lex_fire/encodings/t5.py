"""T5's relative positions: one learned bias a bucket of distances and a head.

Raffel et al. 2020, arXiv:1910.10683, section 2.1.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lex_fire import errors
from lex_fire.encodings import base, piecewise


def buckets(num_buckets: int, max_distance: int, bidirectional: bool = False) -> np.ndarray:
  """Returns bucket_Z, the bucket of each distance i - j from 0 to max_distance.

  The first half of the buckets hold one distance each, the rest grow logarithmically up to
  max_distance; all that is farther shares the last.

  If bidirectional, from -max_distance to max_distance: half of the buckets serve each direction in
  this way, and the second half is that of keys after the query.
  """
  if bidirectional:
    past_Z = buckets(num_buckets // 2, max_distance)
    return np.concatenate([num_buckets // 2 + past_Z[:0:-1], past_Z])
  exact = num_buckets // 2
  distance_Z = np.arange(max_distance + 1)
  growth_Z = np.log(np.maximum(distance_Z, exact) / exact) / np.log(max_distance / exact)
  far_Z = exact + (growth_Z * (num_buckets - exact)).astype(np.int64)
  return np.where(distance_Z < exact, distance_Z, np.minimum(far_Z, num_buckets - 1))


def _init(
  rng: jax.Array, *, num_heads: int, head_dim: int, d_model: int, num_buckets: int
) -> base.Params:
  del head_dim
  # The authors initialise with standard deviation d_model^-1/2.
  return {'bias_ZH': jax.random.normal(rng, (num_buckets, num_heads), jnp.float32) / d_model**0.5}


def _bias(
  params: base.Params,
  query_position_BQ: jax.Array,
  key_position_BK: jax.Array,
  num_heads: int,
  *,
  num_buckets: int,
  max_distance: int,
  bidirectional: bool,
) -> jax.Array:
  del num_heads
  bias_HZ = params['bias_ZH'][buckets(num_buckets, max_distance, bidirectional)].T
  least = -max_distance if bidirectional else 0
  distance_BQK = base.distance(query_position_BQ, key_position_BK)
  return jnp.moveaxis(bias_HZ[:, jnp.clip(distance_BQK, least, max_distance) - least], 0, 1)


def _table(
  params: base.Params,
  num_heads: int,
  *,
  num_buckets: int,
  max_distance: int,
  bidirectional: bool,
) -> piecewise.Table:
  """Returns a bucket as a segment of slope 0 over distances, which lie between its ends."""
  del num_heads
  bucket_Z = buckets(num_buckets, max_distance, bidirectional)
  start_Z = np.append(0, 1 + np.flatnonzero(np.diff(bucket_Z)))
  lower_Z = start_Z - 0.5 - (max_distance if bidirectional else 0)
  lower_Z[0] = -np.inf
  # A bucket is one segment, so that its gradient is one too.
  value_ZH = params['bias_ZH'].at[bucket_Z[start_Z]].get(unique_indices=True)
  return piecewise.Table(
    coordinate={},
    lower_Z=jnp.float32(lower_Z),
    anchor_Z=jnp.float32(start_Z),
    slope_ZH=0.0 * value_ZH,
    value_ZH=value_ZH,
  )


def _coordinate(
  nothing: dict[str, jax.Array], i: jax.Array, j: jax.Array, *, max_distance: int
) -> jax.Array:
  """Returns i - j, clipped, so that it is exact in float32; no bucket begins past it."""
  del nothing
  return jnp.clip(i - j, -max_distance, max_distance).astype(jnp.float32)


def t5(
  num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = False
) -> base.Encoding:
  """T5's relative position bias: b_h(i, j) = r_h[bucket(i - j)].

  Args:
    num_buckets: of a head: an even number for each direction.
    max_distance: from here on all distances share the last bucket [tokens].
    bidirectional: half of the buckets for keys after the query, as in T5's encoder. If not, they
      all share the bucket of distance 0, as in its decoder.

  Raises:
    errors.UserError: for an odd number of buckets a direction, or a max_distance not above half of
      it.
  """
  per_direction = num_buckets // 2 if bidirectional else num_buckets
  multiple = 4 if bidirectional else 2
  if num_buckets % multiple or not 0 < per_direction // 2 < max_distance:
    raise errors.UserError(
      f't5 with {bidirectional=} needs {num_buckets=} to be a multiple of {multiple} above 0, and '
      f'{max_distance=} to be above num_buckets / {multiple}'
    )
  return base.Encoding(
    name='t5',
    init=functools.partial(_init, num_buckets=num_buckets),
    bias=functools.partial(
      _bias, num_buckets=num_buckets, max_distance=max_distance, bidirectional=bidirectional
    ),
    table=functools.partial(
      _table, num_buckets=num_buckets, max_distance=max_distance, bidirectional=bidirectional
    ),
    coordinate=functools.partial(_coordinate, max_distance=max_distance),
    learned=True,
    bidirectional=bidirectional,
  )
