"""How a Pallas kernel for TPU visits the heads of a tile, under the bias and decay that it has."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl

from lex_fire.kernels.mosaic_tpu_band import InBand
from lex_fire.kernels.mosaic_tpu_bias import Line, Pieces
from lex_fire.kernels.mosaic_tpu_far import Far, FarBias, FarProducts
from lex_fire.kernels.mosaic_tpu_products import OneStretch, Products, Stretches
from lex_fire.kernels.mosaic_tpu_x import Distances, Factors, Pairs

HEADS_TOGETHER = 2


def visit(tile: Any, heads: Callable[[Any, Any], None], sums: Any = None) -> None:
  """Calls heads(products, bias), which visits all heads of a tile.

  It is traced for each way in which products and bias may be computed, of which the tile takes one:
  products are `mosaic_tpu_products.Products`, a bias is an `InBand`, a `FarBias`, a `Line`,
  `Pieces` or None.

  Args:
    tile: a `mosaic_tpu_tile.Tile`.
    heads: what to do.
    sums: a table of refs, to which is added the gradient of what all heads share; or None.
  """
  if tile.setup.stretch is None:
    of_products = functools.partial(heads, Products(tile))
    if tile.setup.functions.of_nodes is None:
      _by_bias(tile, of_products, sums)
      return
    pl.when(tile.is_far)(lambda: _visit_far(tile, heads, sums))
    pl.when(~tile.is_far)(lambda: _by_bias(tile, of_products, sums))
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
  """Visits heads under the bias that a tile has: none, that of the band, or one made for it."""
  if tile.table is None:
    heads(None)
  elif tile.setup.band is None:
    _visit_made(tile, heads, sums)
  else:
    pl.when(tile.in_band > 0)(lambda: heads(InBand(tile)))
    pl.when(tile.in_band == 0)(lambda: _visit_made(tile, heads, sums))


def _visit_far(tile, heads, sums):
  """Visits heads by products that have the bias in them."""
  far = Far(tile)
  far.fill()
  bias = FarBias(far)
  heads(FarProducts(bias), bias)
  if sums is not None:
    far.finish(sums)


def _visit_made(tile, heads, sums):
  """Visits heads by a bias of all pairs, whose x is made in one of several ways."""
  pairs = Pairs(tile, tile.scratch.pairs)
  ways = [(True, pairs)]
  if tile.scratch.distances.x_ST is not None:
    of_factors = Factors(tile, tile.scratch.pairs, Distances(tile, tile.scratch.distances))
    ways = [(tile.in_order, of_factors), (~tile.in_order, pairs)]
  for here, at in ways:
    _when(here, at.fill)
  _by_span(pairs, heads)
  if sums is not None:
    for here, at in ways:
      _when(here, functools.partial(at.finish, sums))


def _when(here, function):
  function() if here is True else pl.when(here)(function)


def _by_span(pairs, heads):
  if pairs.tile.table.lower_Z is None:
    heads(Line(pairs))
    return
  first, end = pairs.tile.span
  pl.when(end - first == 1)(lambda: heads(Line(pairs)))
  pl.when(end - first > 1)(lambda: heads(Pieces(pairs)))
