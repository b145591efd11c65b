"""One tile of attention inside a Pallas kernel for TPU: what it holds, and its logits."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lex_fire.kernels import mask as mask_lib
from lex_fire.kernels import plan
from lex_fire.kernels.mosaic_tpu_x import Functions, width


class Setup(NamedTuple):
  """What is static of a kernel.

  Attributes:
    functions: the encoding's, as jaxprs, so that their constants are known.
    band_functions: the same, in the shapes of a band, or None.
    band: a `plan.Band`, or None.
    learned: whether the table has a gradient.
    stretch: positions in one of a decay's, or None.
    query_block: queries of a tile.
    key_block: keys of a tile.
    heads: heads of a tile.
    groups: their key heads.
    sum_rows: of each sum of the gradient of a table.
    together: rows of the batch that one core takes in turn, a part of it.
    heads_first: whether blocks of heads are the grid's first axis, and parts of the batch its
      second, or the other way round.
    interpret: whether to run on any platform, slowly.
  """

  functions: Functions
  band_functions: Functions | None
  band: plan.Band | None
  learned: bool
  stretch: int | None
  query_block: int
  key_block: int
  heads: int
  groups: int
  sum_rows: int
  together: int
  heads_first: bool
  interpret: bool

  def split(self, first: Any, second: Any) -> tuple[Any, Any]:
    """Returns the block of heads and the part of the batch of the grid's first axes, or these."""
    return (first, second) if self.heads_first else (second, first)

  def group(self, head: jax.Array) -> jax.Array:
    """Returns the key head that a head of a tile reads; `//` would ask for which chip it is."""
    return jax.lax.div(head, self.heads // self.groups)


class Constants(NamedTuple):
  """Arrays that all tiles read.

  Attributes:
    rate_1C: of a decay [nats per token], or None.
    of_functions: those of `Setup.functions`.
    of_band_functions: those of `Setup.band_functions`.
    nodes: a `mosaic_tpu_far.Nodes`, or None.
  """

  rate_1C: Any
  of_functions: Functions
  of_band_functions: Functions | None
  nodes: Any


class Lines(NamedTuple):
  """Lines of a table in registers: LANES segments in a row of a block of heads, a head's together.

  Attributes:
    slope_NRT: in N blocks of heads.
    height_NRT: at 0.
  """

  slope_NRT: Any
  height_NRT: Any


SPAN_BITS = 15  # a table has fewer than 2^15 segments
HELD_BITS = 20  # a row has fewer than 2^20 blocks
BAND_BITS = 10  # `plan.Plan.band_IJ` is below 2^10; above it is one bit, of `far_IJ`


class Scratch(NamedTuple):
  """What a kernel needs besides its sums: for a tile, or, of a band, for all of them.

  Attributes:
    pairs: for numbers of pairs.
    distances: for numbers of distances.
    band: a `mosaic_tpu_band.Scratch`, or None.
    far: a `mosaic_tpu_far.Refs`, or None.
  """

  pairs: Any
  distances: Any
  band: Any
  far: Any


class Inputs(NamedTuple):
  """What all kernels take after the plan: arrays, or refs to the blocks that a tile needs of them.

  Attributes:
    part_I1Y: spans of the parts of all tiles row by row, each in one number; or None.
    queries: a `plan.Queries`.
    keys: a `plan.Keys`.
    table: a `piecewise.Table` with the lines of a block of heads in a row, a head's together.
    lines: the same lines as vectors, where there are breakpoints: see `Lines`.
    constants: see `Constants`.
  """

  part_I1Y: Any
  queries: Any
  keys: Any
  table: Any
  lines: Any
  constants: Constants


class _Numbers:
  """What a tile and a band are both asked for."""

  table: Any
  first_head: Any

  def numbers(self, head):
    """Returns the numbers of x for a head, scalars."""

    def of_head(number_H):
      return number_H[self.first_head + head if number_H.shape[0] > 1 else 0]

    return jax.tree.map(of_head, self.table.coordinate)


class Tile(_Numbers):
  """The logits of one tile, inside a kernel, from refs to its blocks."""

  def __init__(self, setup, code, held, first_head, inputs, scratch):
    self.setup, self.first_head, self.scratch = setup, first_head, scratch
    self.span, self.in_order = _unpacked(code), code >> 2 * SPAN_BITS > 0
    self.in_band = held >> HELD_BITS & 2**BAND_BITS - 1
    self.is_far = held >> HELD_BITS + BAND_BITS > 0
    self._part_I1Y, self.queries, self.keys, self.table, self.lines, self.constants = inputs
    self.i_Q1, self.j_1K = self.queries.position_B1Q[0].T, self.keys.position_B1K[0]
    self.visible_QK = self._visible()

  def span_of_part(self, number):
    """Returns the first segment that a part can reach, and one past the last."""
    return _unpacked(self._part_I1Y[0, 0, number])

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

  def logits(self, head, products, bias):
    """Returns logits_QK of a head, HIDDEN_LOGIT where hidden, and what they are higher by, or None.

    That is one number of all, which a number of each query can take instead.
    """
    # Before the products, so that what fills a scratch does not hold them.
    bias_QK = None if bias is None else bias(head)
    logits_QK = products(head)
    if bias_QK is not None:
      logits_QK += bias_QK
    if self.visible_QK is not None:
      logits_QK = jnp.where(self.visible_QK, logits_QK, mask_lib.HIDDEN_LOGIT)
    return logits_QK, None if bias is None else bias.height(head)

  def query(self, head):
    """Returns query_QC."""
    return self.queries.query_BHQC[0, head]

  def key_and_value(self, head):
    """Returns key_KC and value_KC that a head reads."""
    group = self.setup.group(head)
    return self.keys.key_BGKC[0, group], self.keys.value_BGKC[0, group]


class Strip(_Numbers):
  """The pairs of a band, as a tile of one block of keys; see `Tile`."""

  def __init__(self, setup, code, first_head, inputs):
    wide = width(setup.query_block, setup.key_block)
    self.setup = setup._replace(
      functions=setup.band_functions, query_block=setup.band.count * wide, key_block=wide
    )
    self.first_head, self.span = first_head, _unpacked(code)
    self.table, self.lines = inputs.table, inputs.lines
    self.constants = inputs.constants._replace(of_functions=inputs.constants.of_band_functions)
    i_1Q = jax.lax.broadcasted_iota(jnp.int32, (1, self.setup.query_block), 1)
    # Queries begin at 0, whose rate is that of all in the band.
    self.queries = plan.Queries(None, i_1Q[None], None, None, None, None)
    j_1K = jax.lax.broadcasted_iota(jnp.int32, (1, wide), 1) - setup.band.first * wide
    self.i_Q1, self.j_1K = i_1Q.T, j_1K


def _unpacked(code):
  """Returns the first of a span, and one past its last."""
  return tuple(code >> shift & 2**SPAN_BITS - 1 for shift in (0, SPAN_BITS))
