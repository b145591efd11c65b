"""Products of a tile's queries and keys inside a Pallas kernel for TPU, with what decay is left.

`tile.prepare` leaves a decay from the middle of one stretch of positions to that of another: one
factor a channel for each number of stretches that a query is after a key. Most tiles have one such
number.
"""

from typing import Any

import jax
import jax.numpy as jnp


class Products:
  """Products without a decay."""

  def __init__(self, tile: Any):
    self.tile = tile

  def _query(self, head):
    """Returns query_QC as it meets the keys."""
    return self.tile.query(head)

  def __call__(self, head: jax.Array) -> jax.Array:
    """Returns products_QK of a head, float32."""
    key_KC, _ = self.tile.key_and_value(head)
    return dot(self._query(head), key_KC, (1, 1))

  def query_gradient(self, head: jax.Array, d_logits_QK: jax.Array) -> jax.Array:
    """Returns d_query_QC, float32."""
    key_KC, _ = self.tile.key_and_value(head)
    return dot(d_logits_QK.astype(key_KC.dtype), key_KC, (1, 0))

  def key_gradient(self, head: jax.Array, d_logits_QK: jax.Array) -> jax.Array:
    """Returns the share of a head in d_key_KC, float32."""
    query_QC = self._query(head)
    return dot(d_logits_QK.astype(query_QC.dtype), query_QC, (0, 0))


class OneStretch(Products):
  """Products of a tile whose queries are all as many stretches after the keys that they see."""

  def __init__(self, tile: Any, apart: Any = None):
    """Takes that number, by default the first of the tile's span."""
    super().__init__(tile)
    self.apart = tile.span[0] if apart is None else apart

  def _decayed(self, x_LC):
    """Returns x times the decay, in its own dtype."""
    positions = jnp.float32(self.tile.setup.stretch) * self.apart.astype(jnp.float32)
    decay_1C = jnp.exp(positions * self.tile.constants.rate_1C[...])
    return (x_LC.astype(jnp.float32) * decay_1C).astype(x_LC.dtype)

  def _query(self, head):
    return self._decayed(super()._query(head))

  def query_gradient(self, head: jax.Array, d_logits_QK: jax.Array) -> jax.Array:
    """Returns d_query_QC, float32."""
    return self._decayed(super().query_gradient(head, d_logits_QK))


class Stretches(Products):
  """Products of a tile where that number differs from pair to pair."""

  def __init__(self, tile: Any):
    super().__init__(tile)
    self.apart_QK = tile.queries.stretch_B1Q[0].T - tile.keys.stretch_B1K[0]

  def _over_span(self, function, shape):
    """Returns function(products, is_here_QK, sum) over all numbers, from a sum of zeros on."""

    def step(apart, so_far):
      return function(OneStretch(self.tile, apart), self.apart_QK == apart, so_far)

    first, end = self.tile.span
    return jax.lax.fori_loop(first, end, step, jnp.zeros(shape, jnp.float32))

  def __call__(self, head: jax.Array) -> jax.Array:
    """Returns products_QK of a head, float32."""
    return self._over_span(
      lambda products, is_here_QK, so_far_QK: jnp.where(is_here_QK, products(head), so_far_QK),
      self.apart_QK.shape,
    )

  def query_gradient(self, head: jax.Array, d_logits_QK: jax.Array) -> jax.Array:
    """Returns d_query_QC, float32."""

    def add(products, is_here_QK, sum_QC):
      return sum_QC + products.query_gradient(head, jnp.where(is_here_QK, d_logits_QK, 0.0))

    return self._over_span(add, self.tile.query(head).shape)

  def key_gradient(self, head: jax.Array, d_logits_QK: jax.Array) -> jax.Array:
    """Returns the share of a head in d_key_KC, float32."""

    def add(products, is_here_QK, sum_KC):
      return sum_KC + products.key_gradient(head, jnp.where(is_here_QK, d_logits_QK, 0.0))

    return self._over_span(add, self.tile.key_and_value(head)[0].shape)


def dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
  """Returns the matrix product over one axis of each, float32; of float32 in full precision."""
  full = a.dtype == b.dtype == jnp.float32
  return jax.lax.dot_general(
    a,
    b,
    (((axes[0],), (axes[1],)), ((), ())),
    precision=jax.lax.Precision.HIGHEST if full else None,
    preferred_element_type=jnp.float32,
  )
