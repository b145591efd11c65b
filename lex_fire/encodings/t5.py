"""T5's relative positions: one learned bias a bucket of distances and a head.

Raffel et al. 2020, arXiv:1910.10683, section 2.1.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lex_fire import errors
from lex_fire.encodings import base


def buckets(num_buckets: int, max_distance: int) -> np.ndarray:
  """Returns bucket_Z, the bucket of each causal distance 0 .. max_distance.

  The first half of the buckets hold one distance each, the rest grow logarithmically up to
  max_distance; all that is farther shares the last.
  """
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
) -> jax.Array:
  del num_heads
  bias_HZ = params['bias_ZH'][buckets(num_buckets, max_distance)].T
  distance_BQK = base.distance(query_position_BQ, key_position_BK)
  return jnp.moveaxis(bias_HZ[:, jnp.clip(distance_BQK, 0, max_distance)], 0, 1)


def t5(num_buckets: int = 32, max_distance: int = 128) -> base.Encoding:
  """T5's causal relative position bias: b_h(i, j) = r_h[bucket(i - j)].

  Args:
    num_buckets: an even number of buckets a head.
    max_distance: from here on all distances share the last bucket [tokens].

  Raises:
    errors.UserError: for an odd number of buckets, or a max_distance not above half of it.
  """
  if num_buckets % 2 or not 0 < num_buckets // 2 < max_distance:
    raise errors.UserError(
      f't5 needs an even {num_buckets=} above 0, and {max_distance=} above half of it'
    )
  return base.Encoding(
    name='t5',
    init=functools.partial(_init, num_buckets=num_buckets),
    bias=functools.partial(_bias, num_buckets=num_buckets, max_distance=max_distance),
    learned=True,
    bidirectional=False,
  )
