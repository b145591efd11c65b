"""The bias of one tile inside a Pallas kernel for TPU, and what its gradient adds up.

A tile is eight times as large as all vector registers together. What is one expression from the
products to the softmax stays in them, a piece at a time; what a loop carries is stored and loaded
again in each of its rounds. So the bias is an expression where it is one line a head, and where it
has breakpoints it is made before, in parts that fit in registers.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lex_fire.kernels.mosaic_tpu_products import OneStretch, Products, Stretches
from lex_fire.kernels.mosaic_tpu_x import SUBLANES, Distances, Factors, Pairs

HEADS_TOGETHER = 2


class Line:
  """A bias that is one line a head in all of a tile.

  Heads are numbered within the tile, and the lines of its heads lie flat, a head's together.
  """

  def __init__(self, at: Pairs):
    """Takes the segment that the tile's span begins with, or the only one there is."""
    self.at, self.table, self.z = at, at.tile.table, at.tile.span[0]

  def _index(self, head):
    """Returns where a head has the numbers of its line."""
    if self.table.lower_Z is None:
      return head
    return _first_segment(self.table, head) + self.z

  def __call__(self, head: jax.Array) -> jax.Array:
    """Returns bias_QK of a head."""
    table, index = self.table, self._index(head)
    slope = table.slope_ZH[0, 0, index]
    bias_ST = slope * self.at.x(head)
    if table.lower_Z is not None:
      bias_ST += _height(table, slope, index, self.z)
    return self.at.spread(bias_ST)

  def add_gradient(self, head: jax.Array, d_logits_QK: jax.Array, sums: Any) -> None:
    """Adds the share of a head to `sums`, a table of refs, and to the gradient of a shared x."""
    index, d_bias_ST = self._index(head), self.at.gradient(d_logits_QK)
    beyond_ST = self.at.x(head)
    if sums.value_ZH is not None:
      beyond_ST -= self.table.anchor_Z[self.z]
      _add_to(sums.value_ZH, index, self._sum(d_bias_ST))
    _add_to(sums.slope_ZH, index, self._sum(d_bias_ST * beyond_ST))
    if not sums.coordinate:
      return
    d_x_ST = self.table.slope_ZH[0, 0, index] * d_bias_ST
    if self.at.refs.d_x_ST is None:
      self.at.add_numbers_gradient(head, d_x_ST, sums)
    else:
      self.at.refs.d_x_ST[...] += d_x_ST

  def _sum(self, number_ST):
    # One sum after another would each wait for the last.
    rows = self.at.tile.setup.sum_rows
    return sum(_over_rows(number_ST[part], rows) for part in self.at.static_parts())


class Pieces:
  """A bias with breakpoints within the tile, over an x that heads share.

  It is made part by part, as most breakpoints of a tile lie in few of its parts.
  """

  def __init__(self, at: Pairs):
    """Takes the segments that each part can reach."""
    self.at, self.table, self.refs = at, at.tile.table, at.refs

  def _of_head(self, head):
    """Returns functions of a segment: the slope of a head, and the height of its line at 0."""
    table, start = self.table, _first_segment(self.table, head)

    def slope(z):
      return table.slope_ZH[0, 0, start + z]

    def height(z):
      return _height(table, slope(z), start + z, z)

    return slope, height

  def _each_part(self, function):
    """Calls function(part, its rows, its segments after the first, and one past the last)."""

    def of_part(part, _):
      size = self.at.part_rows
      first, end = self.at.span(part)
      function(part, pl.ds(pl.multiple_of(part * size, size), size), first + 1, end)

    jax.lax.fori_loop(0, self.at.num_parts, of_part, None)

  def __call__(self, head: jax.Array) -> jax.Array:
    """Returns bias_QK of a head."""
    table, (slope, height) = self.table, self._of_head(head)
    x_ST, bias_ST = self.refs.x_ST, self.refs.bias_ST

    def add_pieces(_, rows, second, end):
      def above(z, _):
        x = x_ST[rows]
        is_above = x > table.lower_Z[z]
        bias_ST[rows] = jnp.where(is_above, height(z) + slope(z) * x, bias_ST[rows])

      jax.lax.fori_loop(second, end, above, None)

    for part, rows in enumerate(self.at.static_parts()):
      first = self.at.span(part)[0]
      bias_ST[rows] = height(first) + slope(first) * x_ST[rows]
    self._each_part(add_pieces)
    return self.at.spread(bias_ST[...])

  def add_gradient(self, head: jax.Array, d_logits_QK: jax.Array, sums: Any) -> None:
    """Adds the share of a head to `sums`, a table of refs, and to the gradient of a shared x.

    A segment has what lies above its lower end, less what lies above that of the next.
    """
    table, (slope, _), start = self.table, self._of_head(head), _first_segment(self.table, head)
    sum_rows = self.at.tile.setup.sum_rows
    x_ST, d_x_ST = self.refs.x_ST, self.refs.d_x_ST
    of_parts = self.refs.of_x_YT, self.refs.of_one_YT

    def add_segment(z, from_here, from_next):
      of_x, of_one = (a - b for a, b in zip(from_here, from_next, strict=True))
      _add_to(sums.slope_ZH, start + z, of_x - table.anchor_Z[z] * of_one)
      _add_to(sums.value_ZH, start + z, of_one)

    def add_pieces(part, rows, second, end):
      def step(z, from_before):
        d_above = jnp.where(x_ST[rows] > table.lower_Z[z], self.refs.d_bias_ST[rows], 0.0)
        if d_x_ST is not None:
          d_x_ST[rows] += (slope(z) - slope(z - 1)) * d_above
        of_rows = d_above * x_ST[rows], d_above
        from_here = tuple(_over_rows(_halved(x), sum_rows) for x in of_rows)
        add_segment(z - 1, from_before, from_here)
        return from_here

      own = pl.ds(pl.multiple_of(part * sum_rows, sum_rows), sum_rows)
      from_first = tuple(ref[own] for ref in of_parts)
      add_segment(end - 1, jax.lax.fori_loop(second, end, step, from_first), (0.0, 0.0))

    d_bias_ST = self.at.kept(d_logits_QK)
    for part, rows in enumerate(self.at.static_parts()):
      if d_x_ST is not None:
        d_x_ST[rows] += slope(self.at.span(part)[0]) * d_bias_ST[rows]
      of_rows = d_bias_ST[rows] * x_ST[rows], d_bias_ST[rows]
      for ref, number_ST in zip(of_parts, of_rows, strict=True):
        ref[part * sum_rows : (part + 1) * sum_rows] = _over_rows(number_ST, sum_rows)
    self._each_part(add_pieces)


def _height(table, slope, index, z):
  """Returns the height of a line at 0.

  From there it is less exact than from its anchor, but by no more than x is rounded.
  """
  return table.value_ZH[0, 0, index] - slope * table.anchor_Z[z]


def _over_rows(number_ST, rows):
  """Returns the sum over all but so many rows; what is left of it is done once, in the end."""
  if rows == 1:
    return number_ST.sum(axis=0, keepdims=True)
  return number_ST.reshape(-1, rows, number_ST.shape[1]).sum(axis=0)


def _halved(number_ST):
  """Returns a few rows of the same sum over rows.

  A loop's only sum would wait for each of its terms; what stands between products need not.
  """
  while len(number_ST) % (2 * SUBLANES) == 0:
    half = len(number_ST) // 2
    number_ST = number_ST[:half] + number_ST[half:]
  return number_ST


def _add_to(ref, index, sum_ST):
  rows = len(sum_ST)
  ref[pl.ds(pl.multiple_of(index * rows, rows), rows)] += sum_ST


def _first_segment(table, head):
  """Returns where the numbers of a head begin."""
  return head * table.lower_Z.shape[0]


def visit(tile: Any, heads: Callable[[Any, Any], None], sums: Any = None) -> None:
  """Calls heads(products, bias), which visits all heads of a tile.

  It is traced for each way in which products and bias may be computed, of which the tile takes one:
  products are `mosaic_tpu_products.Products`, a bias is a `Line`, `Pieces` or None.

  Args:
    tile: a `mosaic_tpu_tile.Tile`.
    heads: what to do.
    sums: a table of refs, to which is added the gradient of what all heads share; or None.
  """
  if tile.setup.stretch is None:
    _by_bias(tile, functools.partial(heads, Products(tile)), sums)
    return
  first, end = tile.span
  for here, products in ((end - first == 1, OneStretch), (end - first > 1, Stretches)):
    of_products = functools.partial(heads, products(tile))
    pl.when(here)(functools.partial(_by_bias, tile, of_products, sums))


def each_head(count: int, function: Callable[..., None], products: Any, bias: Any) -> None:
  """Calls function(head, products, bias) for all heads of a tile, two at a time.

  The products of one then run beside the softmax of the other. Under pieces of a bias, whose loops
  nothing runs beside, it is one at a time.
  """
  together = HEADS_TOGETHER if count % HEADS_TOGETHER == 0 else 1
  if isinstance(bias, Pieces):
    together = 1

  def visit(head, _):
    function(head, products, bias)

  jax.lax.fori_loop(0, count, visit, None, unroll=together)


def _by_bias(tile, heads, sums):
  if tile.table is None:
    heads(None)
    return
  functions, refs = tile.setup.functions, tile.scratch
  pairs, distances = Pairs(tile, refs.pairs), Distances(tile, refs.distances)
  ways = [(True, pairs)]
  if functions.of_distances is not None:
    is_whole = functions.of_queries is None
    in_order = distances if is_whole else Factors(tile, refs.pairs, distances)
    ways = [(tile.in_order, in_order), (~tile.in_order, pairs)]
    if is_whole:
      for here, at in ways:
        pl.when(here)(functools.partial(_visit_at, at, heads, sums))
      return
  for here, at in ways:
    _when(here, at.fill)
  _by_span(pairs, heads)
  if sums is not None:
    for here, at in ways:
      _when(here, functools.partial(at.finish, sums))


def _when(here, function):
  function() if here is True else pl.when(here)(function)


def _visit_at(at, heads, sums):
  at.fill()
  heads(Line(at) if at.tile.table.lower_Z is None else Pieces(at))
  if sums is not None:
    at.finish(sums)


def _by_span(at, heads):
  if at.tile.table.lower_Z is None:
    heads(Line(at))
    return
  first, end = at.tile.span
  pl.when(end - first == 1)(lambda: heads(Line(at)))
  pl.when(end - first > 1)(lambda: heads(Pieces(at)))
