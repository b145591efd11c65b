"""One tile of attention inside a Pallas kernel for TPU: its logits, and what gradients pass on."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jax_core

from lex_fire.kernels import mask as mask_lib


class Setup(NamedTuple):
  """What is static of a kernel.

  Attributes:
    coordinate: the encoding's, of one tile, traced, so that its constants are known; or None.
    learned: whether the table has a gradient.
    stretch: positions in one of a decay's, or None.
    query_block: queries of a tile.
    key_block: keys of a tile.
    heads: heads of a tile.
    groups: their key heads.
    interpret: whether to run on any platform, slowly.
  """

  coordinate: Any
  learned: bool
  stretch: int | None
  query_block: int
  key_block: int
  heads: int
  groups: int
  interpret: bool

  def group(self, head: jax.Array) -> jax.Array:
    """Returns the key head that a head of a tile reads; `//` would ask for which chip it is."""
    return jax.lax.div(head, self.heads // self.groups)


class Constants(NamedTuple):
  """Arrays that all tiles read.

  Attributes:
    rate_1C: of a decay [nats per token], or None.
    of_coordinate: those of `Setup.coordinate`.
  """

  rate_1C: Any
  of_coordinate: tuple[Any, ...]


class Tile:
  """The logits of one tile, inside a kernel, from refs to its blocks.

  Heads are numbered within the tile, and the lines of its heads lie flat, a head's together.
  """

  def __init__(self, setup, span, first_head, queries, keys, table, constants):
    self.setup, self.span, self.first_head, self.table = setup, span, first_head, table
    self.queries, self.keys, self.constants = queries, keys, constants
    self.i_Q1, self.j_1K = queries.position_B1Q[0].T, keys.position_B1K[0]
    self.visible_QK = self._visible()
    self.apart_QK = None
    if setup.stretch is not None:
      self.apart_QK = queries.stretch_B1Q[0].T - keys.stretch_B1K[0]
    self.shared_x_QK = None
    if table is not None and not per_head(table):
      self.shared_x_QK = self._coordinate(self.numbers(0))

  def _over_span(self, function, start):
    first, end = self.span
    return jax.lax.fori_loop(first, end, function, start)

  def _visible(self):
    """Returns visible_QK, or None if all is."""
    queries, keys, j_1K = self.queries, self.keys, self.j_1K
    tests = []
    if queries.first_B1Q is not None:
      tests.append(queries.first_B1Q[0].T <= j_1K)
    if queries.last_B1Q is not None:
      tests.append(j_1K <= queries.last_B1Q[0].T)
    if queries.segment_B1Q is not None:
      tests.append(queries.segment_B1Q[0].T == keys.segment_B1K[0])
    return functools.reduce(jnp.logical_and, tests) if tests else None

  def numbers(self, head):
    """Returns the numbers of x for a head, scalars."""

    def of_head(number_H):
      return number_H[self.first_head + head if number_H.shape[0] > 1 else 0]

    return jax.tree.map(of_head, self.table.coordinate)

  def x(self, head):
    """Returns x_QK of a head."""
    if self.shared_x_QK is not None:
      return self.shared_x_QK
    return self._coordinate(self.numbers(head))

  def _coordinate(self, numbers):
    constants = [constant[...] for constant in self.constants.of_coordinate]
    arguments = *jax.tree.leaves(numbers), self.i_Q1, self.j_1K
    coordinate = jax_core.ClosedJaxpr(self.setup.coordinate, constants)
    return jax_core.jaxpr_as_fun(coordinate)(*arguments)[0]

  def logits(self, head):
    """Returns logits_QK of a head, HIDDEN_LOGIT where hidden."""
    logits_QK = self._products(head)
    if self.table is not None:
      logits_QK += self._bias(head)
    if self.visible_QK is not None:
      logits_QK = jnp.where(self.visible_QK, logits_QK, mask_lib.HIDDEN_LOGIT)
    return logits_QK

  def _bias(self, head):
    table, x_QK = self.table, self.x(head)
    if table.lower_Z is None:
      return table.slope_ZH[0, 0, head] * x_QK
    start = self._first_segment(head)

    def line(z):
      slope = table.slope_ZH[0, 0, start + z]
      return table.value_ZH[0, 0, start + z] + slope * (x_QK - table.anchor_Z[z])

    return self._by_segment(x_QK, line)

  def _slope(self, head):
    """Returns the slope of the bias in x, of each pair."""
    table, x_QK = self.table, self.x(head)
    if table.lower_Z is None:
      return jnp.full_like(x_QK, table.slope_ZH[0, 0, head])
    start = self._first_segment(head)
    return self._by_segment(x_QK, lambda z: jnp.full_like(x_QK, table.slope_ZH[0, 0, start + z]))

  def _first_segment(self, head):
    """Returns where the numbers of a head begin."""
    return head * (self.table.lower_Z.shape[0] - 1)

  def _by_segment(self, x_QK, line):
    """Returns line(z) of the segment in which each x lies, of those that the tile can reach."""

    def above(z, so_far_QK):
      return jnp.where(x_QK > self.table.lower_Z[z], line(z), so_far_QK)

    first, end = self.span
    return jax.lax.fori_loop(first + 1, end, above, line(first))

  def query(self, head):
    """Returns query_QC."""
    return self.queries.query_BHQC[0, head]

  def key_and_value(self, head):
    """Returns key_KC and value_KC that a head reads."""
    group = self.setup.group(head)
    return self.keys.key_BGKC[0, group], self.keys.value_BGKC[0, group]

  def _products(self, head):
    query_QC, (key_KC, _) = self.query(head), self.key_and_value(head)
    if self.apart_QK is None:
      return dot(query_QC, key_KC, (1, 1))

    def at(apart, so_far_QK):
      products_QK = dot(self._decayed(query_QC, apart), key_KC, (1, 1))
      return jnp.where(self.apart_QK == apart, products_QK, so_far_QK)

    return self._over_span(at, jnp.zeros(self.apart_QK.shape, jnp.float32))

  def _decayed(self, x_LC, apart):
    """Returns x times the decay between stretches so many apart, in its own dtype."""
    positions = jnp.float32(self.setup.stretch) * apart.astype(jnp.float32)
    return (x_LC.astype(jnp.float32) * jnp.exp(positions * self.constants.rate_1C[...])).astype(
      x_LC.dtype
    )

  def _where_apart(self, d_logits_QK, apart):
    return jnp.where(self.apart_QK == apart, d_logits_QK, 0.0)

  def query_gradient(self, head, d_logits_QK):
    """Returns d_query_QC, float32."""
    key_KC, _ = self.key_and_value(head)
    if self.apart_QK is None:
      return dot(d_logits_QK.astype(key_KC.dtype), key_KC, (1, 0))

    def add(apart, sum_QC):
      d_there_QK = self._where_apart(d_logits_QK, apart).astype(key_KC.dtype)
      return sum_QC + self._decayed(dot(d_there_QK, key_KC, (1, 0)), apart)

    zeros_QC = jnp.zeros((self.setup.query_block, key_KC.shape[1]), jnp.float32)
    return self._over_span(add, zeros_QC)

  def key_gradient(self, head, d_logits_QK):
    """Returns the share of a head in d_key_KC, float32."""
    query_QC = self.query(head)
    if self.apart_QK is None:
      return dot(d_logits_QK.astype(query_QC.dtype), query_QC, (0, 0))

    def add(apart, sum_KC):
      d_there_QK = self._where_apart(d_logits_QK, apart).astype(query_QC.dtype)
      return sum_KC + dot(d_there_QK, self._decayed(query_QC, apart), (0, 0))

    zeros_KC = jnp.zeros((self.setup.key_block, query_QC.shape[1]), jnp.float32)
    return self._over_span(add, zeros_KC)

  def add_table_gradient(self, head, d_logits_QK, sums):
    """Adds the share of a head to the lines of `sums`, a table of refs."""
    table, x_QK = self.table, self.x(head)
    if table.lower_Z is None:
      sums.slope_ZH[0, 0, 0, head] += jnp.sum(d_logits_QK * x_QK)
    else:
      start = self._first_segment(head)
      first, end = self.span

      def add(z, _):
        # As `_by_segment`, should rounding put an x beside the span.
        lower = jnp.where(z == first, -jnp.inf, table.lower_Z[z])
        upper = jnp.where(z == end - 1, jnp.inf, table.lower_Z[z + 1])
        inside_QK = (x_QK > lower) & (x_QK <= upper)
        d_here_QK = jnp.where(inside_QK, d_logits_QK, 0.0)
        sums.slope_ZH[0, 0, 0, start + z] += jnp.sum(d_here_QK * (x_QK - table.anchor_Z[z]))
        sums.value_ZH[0, 0, 0, start + z] += jnp.sum(d_here_QK)

      self._over_span(add, None)

  def x_gradient(self, head, d_logits_QK):
    """Returns d_x_QK."""
    return d_logits_QK * self._slope(head)

  def add_numbers_gradient(self, head, d_x_QK, sums):
    """Adds to `sums` the gradient of what x is computed from, of a head or of all that share it."""
    _, gradient = jax.vjp(self._coordinate, self.numbers(head))
    d_numbers = jax.tree.leaves(gradient(d_x_QK)[0])
    for ref, d_number in zip(jax.tree.leaves(sums.coordinate), d_numbers, strict=True):
      ref[0, 0, 0, head] += d_number


def per_head(table: Any) -> bool:
  """Returns whether each head has an x of its own."""
  return any(number_H.shape[0] > 1 for number_H in jax.tree.leaves(table.coordinate))


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
