"""One tile of attention inside a Pallas kernel for TPU: its logits, and what gradients pass on."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lex_fire.kernels import mask as mask_lib
from lex_fire.kernels.mosaic_tpu_bias import Functions


class Setup(NamedTuple):
  """What is static of a kernel.

  Attributes:
    functions: the encoding's, as jaxprs, so that their constants are known.
    learned: whether the table has a gradient.
    stretch: positions in one of a decay's, or None.
    query_block: queries of a tile.
    key_block: keys of a tile.
    heads: heads of a tile.
    groups: their key heads.
    interpret: whether to run on any platform, slowly.
  """

  functions: Functions
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
    of_functions: those of `Setup.functions`.
  """

  rate_1C: Any
  of_functions: Functions


class Parts(NamedTuple):
  """Spans of each part of the keys, of all T tiles row by row; or None."""

  low_TP: Any
  high_TP: Any


class Tile:
  """The logits of one tile, inside a kernel, from refs to its blocks and a bias."""

  def __init__(self, setup, code, first_head, parts, queries, keys, table, constants, scratch):
    self.setup, self.first_head, self.parts, self.table = setup, first_head, parts, table
    *self.span, self.in_order = code
    self.queries, self.keys, self.constants, self.scratch = queries, keys, constants, scratch
    self.i_Q1, self.j_1K = queries.position_B1Q[0].T, keys.position_B1K[0]
    self.visible_QK = self._visible()
    self.apart_QK = None
    if setup.stretch is not None:
      self.apart_QK = queries.stretch_B1Q[0].T - keys.stretch_B1K[0]

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

  def logits(self, head, bias):
    """Returns logits_QK of a head, HIDDEN_LOGIT where hidden."""
    # Before the products, so that what fills a scratch does not hold them.
    bias_QK = None if bias is None else bias(head)
    logits_QK = self._products(head)
    if bias_QK is not None:
      logits_QK += bias_QK
    if self.visible_QK is not None:
      logits_QK = jnp.where(self.visible_QK, logits_QK, mask_lib.HIDDEN_LOGIT)
    return logits_QK

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
