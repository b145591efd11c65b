"""The bias of one tile inside a Pallas kernel for TPU, and what its gradient adds up.

A tile is eight times as large as all vector registers together. What is one expression from the
products to the softmax stays in them, a piece at a time; what a loop carries is stored and loaded
again in each of its rounds. So the bias is an expression where it is one line a head; where it has
breakpoints it is made before, in parts that fit in registers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lex_fire.kernels.mosaic_tpu_size import LANES, SUBLANES
from lex_fire.kernels.mosaic_tpu_x import Pairs

# Segments of a part of few breakpoints. By the compiler's schedule, to look up the lines of a part
# takes as long as to go through so many.
MOST_OF_FEW = 6
TOGETHER = 3  # segments of a part whose lines are chosen from in registers
LANE_BITS = LANES.bit_length() - 1


class Line:
  """A bias that is one line a head in all of a tile; its height at 0 is left to the softmax.

  Heads are numbered within the tile, and the lines of its heads lie flat, a head's together.
  """

  def __init__(self, at: Any):
    """Takes the segment that the tile's span begins with, or the only one there is."""
    self.at, self.table, self.z = at, at.tile.table, at.tile.span[0]

  def _index(self, head):
    """Returns where a head has the numbers of its line."""
    if self.table.lower_Z is None:
      return head
    return _first_segment(self.table, head) + self.z

  def __call__(self, head: jax.Array) -> jax.Array:
    """Returns bias_QK of a head, but for `height`."""
    slope = self.table.slope_ZH[0, 0, self._index(head)]
    return self.at.spread(slope * self.at.x(head))

  def height(self, head: jax.Array) -> Any:
    """Returns what all logits of a head are higher by, a scalar, or None."""
    if self.table.lower_Z is None:
      return None
    index = self._index(head)
    return _height(self.table, self.table.slope_ZH[0, 0, index], index, self.z)

  def add_gradient(self, head: jax.Array, d_logits_QK: jax.Array, sums: Any) -> None:
    """Adds the share of a head to `sums`, a table of refs, and to the gradient of a shared x."""
    index, d_bias_ST = self._index(head), self.at.gradient(d_logits_QK)
    self._add_line(sums, index, self._sum(d_bias_ST * self.at.x(head)), self._sum(d_bias_ST))
    if not sums.coordinate:
      return
    d_x_ST = self.table.slope_ZH[0, 0, index] * d_bias_ST
    if self.at.refs.d_x_ST is None:
      self.at.add_numbers_gradient(head, d_x_ST, sums)
    else:
      self.at.refs.d_x_ST[...] += d_x_ST

  def _add_line(self, sums, index, of_x, of_one):
    """Adds to the sums of a line: those of a bias' gradient times x, and of it."""
    if sums.value_ZH is not None:
      _add_to(sums.value_ZH, index, of_one)
      of_x -= self.table.anchor_Z[self.z] * of_one
    _add_to(sums.slope_ZH, index, of_x)

  def _sum(self, number_ST):
    # One sum after another would each wait for the last.
    rows = self.at.tile.setup.sum_rows
    return sum(over_rows(number_ST[part], rows) for part in self.at.static_parts())


class Pieces:
  """A bias with breakpoints within the tile, over an x that heads share.

  It is made part by part, as most breakpoints of a tile lie in few of its parts. In a part of few
  they are gone through, head by head. In one of many that is done once, for which segment each x
  lies in, and every head looks its lines up. The others are one line.
  """

  def __init__(self, at: Pairs):
    """Takes the segments that each part can reach."""
    self.at, self.table, self.refs = at, at.tile.table, at.refs
    self.x_ST, self.bias_ST = at.x_ST, at.bias_ST
    self.few, self.many = self._list_parts()
    self._each_of_many(self._find_segments)

  def _list_parts(self):
    """Lists the parts of few breakpoints, and from the end those of many; returns how many."""
    parts_Y = self.refs.parts_Y

    def add(part, counts):
      few, many = counts
      # Either next place of the list is taken again, unless the part is counted there.
      parts_Y[few] = parts_Y[self.at.num_parts - 1 - many] = part
      first, end = self.at.span(part)
      is_many = end - first > MOST_OF_FEW
      return few + ((end - first > 1) & ~is_many), many + is_many

    return jax.lax.fori_loop(0, self.at.num_parts, add, (0, 0))

  def _each_of_few(self, function):
    self._each_listed(0, self.few, function)

  def _each_of_many(self, function):
    self._each_listed(self.few, self.few + self.many, function)

  def _each_listed(self, start, stop, function):
    """Calls function(rows, first, end) for parts that are listed: their segments, one past last."""
    unlisted = self.at.num_parts - self.few - self.many
    size = self.at.part_rows

    def of_listed(number, _):
      part = self.refs.parts_Y[number + jnp.where(number < self.few, 0, unlisted)]
      function(pl.ds(pl.multiple_of(part * size, size), size), *self.at.span(part))

    jax.lax.fori_loop(start, stop, of_listed, None)

  def _find_segments(self, rows, first, end):
    segment_ST = self.refs.segment_ST

    def above(z, _):
      segment_ST[rows] += (self.x_ST[rows] > self.table.lower_Z[z]).astype(jnp.int32)

    segment_ST[rows] = jnp.full_like(segment_ST[rows], first)
    jax.lax.fori_loop(first + 1, end, above, None)

  def _line(self, head):
    """Returns a function of a segment: the slope of a head, and the height of its line at 0."""
    table, start = self.table, _first_segment(self.table, head)

    def of_segment(z):
      slope = table.slope_ZH[0, 0, start + z]
      return slope, _height(table, slope, start + z, z)

    return of_segment

  def _go_through(self, head, rows, first, end):
    """Makes the bias of a part line by line: the first TOGETHER without leaving registers."""
    line, lower_Z, x = self._line(head), self.table.lower_Z, self.x_ST[rows]
    slope, height = line(first)
    for number in range(1, TOGETHER):
      z = jnp.minimum(first + number, end - 1)  # the last again changes nothing
      is_above = x > lower_Z[z]
      pairs = zip(line(z), (slope, height), strict=True)
      slope, height = (jnp.where(is_above, *pair) for pair in pairs)
    self.bias_ST[rows] = height + slope * x

    def above(z, _):
      slope, height = line(z)
      x = self.x_ST[rows]
      self.bias_ST[rows] = jnp.where(x > lower_Z[z], height + slope * x, self.bias_ST[rows])

    jax.lax.fori_loop(first + TOGETHER, end, above, None)

  def _look_up(self, head, rows, first, end):
    """Makes the bias of a part from registers that hold lines."""
    lines, segment = self.at.tile.lines, self.refs.segment_ST[rows]
    rows_of_head = lines.slope_NRT.shape[1] // self.at.tile.setup.heads

    def of_row(number, _):
      row = pl.ds(head * rows_of_head + number, 1)

      def of_x(number_NRT):
        in_all_rows = jnp.broadcast_to(number_NRT[0, row], (len(segment), LANES))
        return jnp.take_along_axis(in_all_rows, segment & LANES - 1, axis=1)

      bias = of_x(lines.height_NRT) + of_x(lines.slope_NRT) * self.x_ST[rows]
      if rows_of_head > 1:
        bias = jnp.where(segment >> LANE_BITS == number, bias, self.bias_ST[rows])
      self.bias_ST[rows] = bias

    jax.lax.fori_loop(first >> LANE_BITS, (end - 1 >> LANE_BITS) + 1, of_row, None)

  def height(self, head: jax.Array) -> None:
    """Returns None: the bias is whole."""

  def __call__(self, head: jax.Array) -> jax.Array:
    """Returns bias_QK of a head."""
    self._each_of_few(functools.partial(self._go_through, head))
    self._each_of_many(functools.partial(self._look_up, head))
    line, size = self._line(head), self.at.part_rows

    def of_part(part):
      first, end = self.at.span(part)
      is_line = end - first == 1
      slope, height = line(first)
      # What was made is a line of itself.
      made = pl.multiple_of(jnp.where(is_line, 0, self.at.num_parts * size), size)
      number = self.refs.x_ST[pl.ds(part * size + made, size)]
      return jnp.where(is_line, height, 0.0) + jnp.where(is_line, slope, 1.0) * number

    return self.at.spread(jnp.concatenate([of_part(part) for part in range(self.at.num_parts)]))

  def add_gradient(self, head: jax.Array, d_logits_QK: jax.Array, sums: Any) -> None:
    """Adds the share of a head to `sums`, a table of refs, and to the gradient of a shared x.

    The first segment of a part is given all of it. Each has what lies above its lower end, less
    what lies above that of the next.
    """
    table, start = self.table, _first_segment(self.table, head)
    sum_rows = self.at.tile.setup.sum_rows
    x_ST, d_x_ST = self.x_ST, self.refs.d_x_ST

    def slope(z):
      return table.slope_ZH[0, 0, start + z]

    def add(z, of_x, of_one):
      _add_to(sums.slope_ZH, start + z, of_x - table.anchor_Z[z] * of_one)
      _add_to(sums.value_ZH, start + z, of_one)

    def add_pieces(rows, first, end):
      def step(z, from_before):
        d_above = jnp.where(x_ST[rows] > table.lower_Z[z], self.refs.d_bias_ST[rows], 0.0)
        if d_x_ST is not None:
          d_x_ST[rows] += (slope(z) - slope(z - 1)) * d_above
        of_rows = d_above * x_ST[rows], d_above
        from_here = tuple(over_rows(_halved(x), sum_rows) for x in of_rows)
        add(z - 1, *(a - b for a, b in zip(from_before, from_here, strict=True)))
        return from_here

      nothing = (jnp.zeros((sum_rows, self.at.width), jnp.float32),) * 2
      add(end - 1, *jax.lax.fori_loop(first + 1, end, step, nothing))

    d_bias_ST = self.at.kept(d_logits_QK)
    for part, rows in enumerate(self.at.static_parts()):
      first, _ = self.at.span(part)
      if d_x_ST is not None:
        d_x_ST[rows] += slope(first) * d_bias_ST[rows]
      of_rows = d_bias_ST[rows] * x_ST[rows], d_bias_ST[rows]
      add(first, *(over_rows(number_ST, sum_rows) for number_ST in of_rows))
    self._each_listed(0, self.few + self.many, add_pieces)


def _height(table, slope, index, z):
  """Returns the height of a line at 0.

  From there it is less exact than from its anchor, but by no more than x is rounded.
  """
  return table.value_ZH[0, 0, index] - slope * table.anchor_Z[z]


def over_rows(number_ST: jax.Array, rows: int) -> jax.Array:
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
