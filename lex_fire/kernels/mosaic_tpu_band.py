"""The bias of all pairs near the diagonal inside a Pallas kernel for TPU, made once for all tiles.

Positions in order, and a bias of the distance alone: then a block of LANES queries by as many keys
has the bias of every other on its diagonal, in each tile and each row of the batch. So the blocks
of the nearest diagonals, a band, are laid out in memory when the first tile comes, a tile reads
those that it meets, and the gradient of each is added up until the last tile has gone. What is left
for a tile is an addition a pair, whatever the bias is made of.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lex_fire.kernels import mosaic_tpu_x as x_lib
from lex_fire.kernels import plan
from lex_fire.kernels.mosaic_tpu_bias import Line, Pieces
from lex_fire.kernels.mosaic_tpu_size import Blocks
from lex_fire.kernels.mosaic_tpu_tile import Setup, Strip


def fitting(tile: Blocks, num_keys: int, causal: bool) -> plan.Band | None:
  """Returns the band that tiles have memory for; None if that is not one tile's.

  Args:
    tile: what it has of each.
    num_keys: of a row, or of a piece of it.
    causal: whether keys after a query are hidden.
  """
  wide = x_lib.width(tile.queries, tile.keys)
  by_queries, by_keys = tile.queries // wide, tile.keys // wide
  if causal:
    reach, least = pl.cdiv(num_keys, tile.queries) * by_queries, by_queries
  else:
    reach, least = 2 * pl.cdiv(num_keys, tile.keys) * by_keys, by_queries + by_keys - 1
  count = min(tile.band, reach)
  first = 0 if causal else -(count // 2)
  return plan.Band(first, count) if count >= least else None


class Scratch(NamedTuple):
  """What a kernel holds of a band from tile to tile.

  Attributes:
    strip: numbers of its distances.
    bias_ST: of all heads, one after another, each block by block.
    d_bias_ST: their gradient, or None.
  """

  strip: x_lib.Refs
  bias_ST: Any
  d_bias_ST: Any


def scratch(setup: Setup, table: Any, learned: bool) -> Scratch | None:
  """Returns what a kernel needs: for the gradient of the table, too, if learned."""
  if setup.band is None:
    return None
  wide = x_lib.width(setup.query_block, setup.key_block)
  strip = x_lib.refs_of_distances(table, setup.band.count * wide, wide, learned)
  of_heads = pltpu.VMEM((setup.heads * setup.band.count * wide, wide), jnp.float32)
  return Scratch(strip, of_heads, of_heads if learned else None)


class Band:
  """The band of a block of heads."""

  def __init__(self, setup: Setup, span: Any, first_head: Any, inputs: Any, scratch: Scratch):
    """Takes, in one number, the span of segments that its tiles reach; 0: there are no tiles."""
    self.is_met, self.count, self.scratch = span != 0, setup.heads, scratch
    strip = Strip(setup, span, first_head, inputs)
    self.of_head = strip.setup.query_block
    has_rate = strip.setup.functions.of_queries is not None
    self.at = (x_lib.OneRate if has_rate else x_lib.Distances)(strip, scratch.strip)

  def _bias(self):
    # One line has no height, which would be left out here.
    return Line(self.at) if self.at.tile.table.lower_Z is None else Pieces(self.at)

  def _each_head(self, function):
    def visit(head, _):
      function(head, pl.ds(pl.multiple_of(head * self.of_head, self.of_head), self.of_head))

    jax.lax.fori_loop(0, self.count, visit, None)

  def fill(self) -> None:
    """Lays out the bias of all heads, and clears its gradient."""
    self.at.fill()
    bias = self._bias()

    def of_head(head, rows):
      self.scratch.bias_ST[rows] = bias(head)
      if self.scratch.d_bias_ST is not None:
        self.scratch.d_bias_ST[rows] = jnp.zeros_like(self.scratch.d_bias_ST[rows])

    self._each_head(of_head)

  def finish(self, sums: Any) -> None:
    """Adds the gradient to `sums`, a table of refs."""
    bias = self._bias()
    self._each_head(lambda head, rows: bias.add_gradient(head, self.scratch.d_bias_ST[rows], sums))
    self.at.finish(sums)


def lay_out(setup: Setup, at: Any, spans: Any, inputs: Any, scratch: Scratch) -> Band | None:
  """Has the band laid out if a kernel is at its first tile; None: the bias has none.

  Args:
    setup: of the kernel.
    at: a `mosaic_tpu_call.Place`.
    spans: as `mosaic_tpu_call.packed` has them, the band's last.
    inputs: of the kernel.
    scratch: see `scratch`.
  """
  if setup.band is None:
    return None
  band = Band(setup, spans[spans.shape[0] - 1], at.first_head, inputs, scratch)
  pl.when(at.is_first & band.is_met)(band.fill)
  return band


class InBand:
  """The bias of a tile that the band has."""

  def __init__(self, tile: Any):
    self.tile = tile

  def _rows(self, head):
    """Returns where the blocks of a head lie, of each of the tile's diagonals."""
    setup = self.tile.setup
    wide = x_lib.width(setup.query_block, setup.key_block)
    # What the band does not have is hidden, and reads any block.
    blocks = (
      jnp.maximum(self.tile.in_band - 1 - diagonal, 0)
      for diagonal in range(x_lib.num_diagonals(setup))
    )
    starts = (wide * (head * setup.band.count + block) for block in blocks)
    return [pl.ds(pl.multiple_of(start, wide), wide) for start in starts]

  def __call__(self, head: jax.Array) -> jax.Array:
    """Returns bias_QK of a head."""
    bias_ST = self.tile.scratch.band.bias_ST
    return x_lib.from_diagonals(self.tile.setup, [bias_ST[rows] for rows in self._rows(head)])

  def height(self, head: jax.Array) -> None:
    """Returns None: the bias is whole."""

  def add_gradient(self, head: jax.Array, d_logits_QK: jax.Array, sums: Any) -> None:
    """Adds the share of a head to the gradient of the band; `sums` is given it in the end."""
    del sums
    d_blocks = x_lib.sums_of_diagonals(self.tile.setup, d_logits_QK)
    for rows, d_TT in zip(self._rows(head), d_blocks, strict=True):
      self.tile.scratch.band.d_bias_ST[rows] += d_TT
