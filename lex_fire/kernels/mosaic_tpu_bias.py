"""The bias of one tile inside a Pallas kernel for TPU, and what its gradient adds up.

A tile is eight times as large as all vector registers together. What is one expression from the
products to the softmax stays in them, a piece at a time; what a loop carries is stored and loaded
again in each of its rounds. So the bias is an expression where it is one line a head, and where it
has breakpoints it is made before, in parts that fit in registers.

Where positions are in order, what depends on the distance alone is computed once a distance and
not once a pair: see `Distances`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.extend import core as jax_core

from lex_fire.encodings import base

SUBLANES, LANES = 8, 128  # of a vector register


class Functions(NamedTuple):
  """An encoding's functions of positions, in the shapes in which kernels call them, or None.

  Attributes:
    of_pairs: numbers, i_Q1, j_1K -> x_QK.
    of_distances: numbers, i_M1, j_1W -> what of x depends on the distance alone.
    of_queries: numbers, i_1Q -> the other factor of x, of pairs whose query is not before the key.
    of_keys: numbers, j_1K -> that of all others; None if they are hidden.
  """

  of_pairs: Any
  of_distances: Any
  of_queries: Any
  of_keys: Any


def width(key_block: int) -> int:
  """Returns W of `Distances`; tiles that are narrower than a register are only interpreted."""
  return LANES if key_block % LANES == 0 else SUBLANES


def trace(
  encoding: base.Encoding, table: Any, query_block: int, key_block: int, causal: bool
) -> tuple[Functions, Functions]:
  """Returns an encoding's functions as jaxprs, and their constants, which kernels must be given."""
  if table is None:
    return Functions(*[None] * 4), Functions(*[()] * 4)
  numbers = jax.tree.map(lambda _: jax.ShapeDtypeStruct((), jnp.float32), table.coordinate)
  wide = width(key_block)
  shapes = {
    'i_Q1': (query_block, 1),
    'i_1Q': (1, query_block),
    'j_1K': (1, key_block),
    'i_M1': (query_block + key_block - wide, 1),
    'j_1W': (1, wide),
  }

  def traced(function, *positions):
    if function is None:
      return None, ()
    arguments = (jax.ShapeDtypeStruct(shapes[name], jnp.int32) for name in positions)
    made = jax.make_jaxpr(function)(numbers, *arguments)
    return made.jaxpr, tuple(made.consts)

  of_distance, rate = encoding.factors or (None, None)
  if encoding.shift_invariant:
    of_distance, rate = encoding.coordinate, None
  both = (
    traced(encoding.coordinate, 'i_Q1', 'j_1K'),
    traced(of_distance, 'i_M1', 'j_1W'),
    traced(rate, 'i_1Q'),
    traced(None if causal else rate, 'j_1K'),
  )
  jaxprs, constants = zip(*both, strict=True)
  return Functions(*jaxprs), Functions(*constants)


class Refs(NamedTuple):
  """Arrays in vector memory of either `Pairs` or `Distances`; None what a kernel does not need.

  Attributes:
    x_RW: what heads share.
    bias_RW: of a head, with breakpoints.
    d_bias_RW: of a head.
    d_x_RW: of all heads.
    sums_2PW: of a head, over the rows of each part: of d_bias x, and of d_bias.
  """

  x_RW: Any
  bias_RW: Any
  d_bias_RW: Any
  d_x_RW: Any
  sums_2PW: Any


class Scratch(NamedTuple):
  """What a kernel needs for one tile."""

  pairs: Refs
  distances: Refs


NOTHING = Scratch(Refs(*[None] * 5), Refs(*[None] * 5))


def scratch(functions: Functions, table: Any, shape: tuple[int, int], learned: bool) -> Scratch:
  """Returns what a kernel needs for a tile of a shape: for the gradient of the table if learned."""
  if table is None:
    return NOTHING
  shared, pieces = not per_head(table), table.lower_Z is not None
  query_block, key_block = shape
  wide = width(key_block)

  def refs(num_rows, num_parts, has_bias):
    array = pltpu.VMEM((num_rows, wide), jnp.float32)
    return Refs(
      x_RW=array if shared else None,
      bias_RW=array if has_bias and pieces else None,
      d_bias_RW=array if learned else None,
      d_x_RW=array if has_bias and shared and learned and table.coordinate else None,
      sums_2PW=pltpu.VMEM((2, num_parts, wide), jnp.float32) if has_bias and pieces else None,
    )

  of_pairs = refs(query_block * key_block // wide, key_block // wide, True)
  if functions.of_distances is None:
    return NOTHING._replace(pairs=of_pairs)
  is_whole = functions.of_queries is None  # all of x depends on the distance alone
  return Scratch(of_pairs, refs(query_block + key_block - wide, 1, is_whole))


def per_head(table: Any) -> bool:
  """Returns whether each head has an x of its own."""
  return any(number_H.shape[0] > 1 for number_H in jax.tree.leaves(table.coordinate))


class Pairs:
  """Numbers of a tile for each pair of a query and a key: W keys of all queries after another.

  So each part is one piece of memory.

  Attributes:
    num_parts: that have spans of their own.
    part_rows: of each.
  """

  def __init__(self, tile: Any, refs: Refs):
    self.tile, self.refs, setup = tile, refs, tile.setup
    self.width = width(setup.key_block)
    self.num_parts, self.part_rows = setup.key_block // self.width, setup.query_block

  def _slices(self):
    """Yields which rows are which columns of the tile."""
    setup = self.tile.setup
    for part, first in enumerate(range(0, setup.key_block, self.width)):
      start = part * setup.query_block
      yield slice(start, start + setup.query_block), slice(first, first + self.width)

  def _call(self, name, numbers, *positions):
    constants = [constant[...] for constant in getattr(self.tile.constants.of_functions, name)]
    closed = jax_core.ClosedJaxpr(getattr(self.tile.setup.functions, name), constants)
    return jax_core.jaxpr_as_fun(closed)(*jax.tree.leaves(numbers), *positions)[0]

  def _x_QK(self, numbers):
    return self._call('of_pairs', numbers, self.tile.i_Q1, self.tile.j_1K)

  def _x_RW(self, numbers):
    return self.gradient(self._x_QK(numbers))

  def fill(self) -> None:
    """Computes what heads share, and clears its gradient."""
    if self.refs.x_RW is not None:
      self.refs.x_RW[...] = self._x_RW(self.tile.numbers(0))
    if self.refs.d_x_RW is not None:
      self.refs.d_x_RW[...] = jnp.zeros_like(self.refs.d_x_RW)

  def x(self, head: jax.Array) -> jax.Array:
    """Returns x_RW of a head."""
    if self.refs.x_RW is None:
      return self._x_RW(self.tile.numbers(head))
    return self.refs.x_RW[...]

  def span(self, part: Any) -> tuple[Any, Any]:
    """Returns the first segment that a part can reach, and one past the last."""
    return self.tile.parts.low_TP[0, 0, part], self.tile.parts.high_TP[0, 0, part]

  def static_parts(self) -> list[slice]:
    """Returns the rows of each part."""
    starts = range(0, self.num_parts * self.part_rows, self.part_rows)
    return [slice(start, start + self.part_rows) for start in starts]

  def spread(self, number_RW: jax.Array) -> jax.Array:
    """Returns number_QK."""
    return jnp.concatenate([number_RW[rows] for rows, _ in self._slices()], axis=1)

  def gradient(self, d_QK: jax.Array) -> jax.Array:
    """Returns the gradient of number_RW if d_QK is that of `spread`."""
    return jnp.concatenate([d_QK[:, columns] for _, columns in self._slices()])

  def kept(self, d_QK: jax.Array) -> jax.Array:
    """Returns `gradient`, which it leaves in `refs.d_bias_RW`, too."""
    d_RW = self.refs.d_bias_RW[...] = self.gradient(d_QK)
    return d_RW

  def add_numbers_gradient(self, head: jax.Array, d_x_RW: jax.Array, sums: Any) -> None:
    """Adds to `sums` the gradient of what x is computed from, of a head or of all that share it."""
    _, pull = jax.vjp(self._x_QK, self.tile.numbers(head))
    _add_scalars(sums, head, pull(self.spread(d_x_RW))[0])

  def finish(self, sums: Any) -> None:
    """Adds to `sums` the gradient of what all heads share."""
    if self.refs.d_x_RW is not None:
      self.add_numbers_gradient(0, self.refs.d_x_RW[...], sums)


class Distances(Pairs):
  """Numbers of a tile whose positions are in order: of each distance, and not of each pair.

  number_RW holds that of the distance i_0 - j_0 - (K - W) + r - w, for i_0 and j_0 the first of the
  tile's positions. Keys W l .. W (l + 1) of number_QK are then Q rows of it, from K - W (l + 1) on:
  nothing has to be moved from lane to lane, and there are Q + K - W rows of W instead of Q of K.
  """

  def __init__(self, tile: Any, refs: Refs):
    super().__init__(tile, refs)
    self.num_parts = 1
    self.part_rows = tile.setup.query_block + tile.setup.key_block - self.width

  def _slices(self):
    setup = self.tile.setup
    for first in range(0, setup.key_block, self.width):
      start = setup.key_block - self.width - first
      yield slice(start, start + setup.query_block), slice(first, first + self.width)

  def _x_RW(self, numbers):
    first_11 = self.tile.i_Q1[:1] - self.tile.j_1K[:, :1] - (self.tile.setup.key_block - self.width)
    later_11 = jnp.maximum(-first_11, 0)  # positions are at least 0
    i_R1 = first_11 + later_11 + jax.lax.broadcasted_iota(jnp.int32, (self.part_rows, 1), 0)
    j_1W = later_11 + jax.lax.broadcasted_iota(jnp.int32, (1, self.width), 1)
    return self._call('of_distances', numbers, i_R1, j_1W)

  def span(self, part: Any) -> tuple[Any, Any]:
    """Returns the first segment that the tile can reach, and one past the last."""
    return self.tile.span

  def kept(self, d_QK: jax.Array) -> jax.Array:
    """Returns `gradient`, which it leaves in `refs.d_bias_RW`, too."""
    self.refs.d_bias_RW[...] = jnp.zeros_like(self.refs.d_bias_RW)
    for rows, columns in self._slices():
      self.refs.d_bias_RW[rows] += d_QK[:, columns]
    return self.refs.d_bias_RW[...]

  gradient = kept

  def add_numbers_gradient(self, head: jax.Array, d_x_RW: jax.Array, sums: Any) -> None:
    """Adds to `sums` the gradient of what x is computed from, of a head or of all that share it."""
    _, pull = jax.vjp(self._x_RW, self.tile.numbers(head))
    _add_scalars(sums, head, pull(d_x_RW)[0])


class Factors(Pairs):
  """`Pairs` whose x is a factor of the distance times one of the later position."""

  def __init__(self, tile: Any, refs: Refs, distances: Distances):
    super().__init__(tile, refs)
    self.distances = distances

  def fill(self) -> None:
    """Computes what heads share, and clears its gradient."""
    self.distances.fill()
    super().fill()

  def _of_distance_QK(self):
    return self.distances.spread(self.distances.refs.x_RW[...])

  def _product(self, numbers, of_distance_QK):
    # A column of numbers takes as many registers as if it were 128 wide.
    rate = self._call('of_queries', numbers, self.tile.queries.position_B1Q[0]).T
    if self.tile.setup.functions.of_keys is not None:
      i_Q1, j_1K = self.tile.i_Q1, self.tile.j_1K
      rate = jnp.where(i_Q1 >= j_1K, rate, self._call('of_keys', numbers, j_1K))
    return of_distance_QK * rate

  def _x_QK(self, numbers):
    return self._product(numbers, self._of_distance_QK())

  def add_numbers_gradient(self, head: jax.Array, d_x_RW: jax.Array, sums: Any) -> None:
    """Adds to `sums` the gradient of what x is computed from."""
    _, pull = jax.vjp(self._product, self.tile.numbers(head), self._of_distance_QK())
    d_numbers, d_of_distance_QK = pull(self.spread(d_x_RW))
    _add_scalars(sums, head, d_numbers)
    self.distances.add_numbers_gradient(head, self.distances.gradient(d_of_distance_QK), sums)


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

  def _beyond(self, head):
    """Returns x_RW less the anchor."""
    x_RW = self.at.x(head)
    return x_RW if self.table.lower_Z is None else x_RW - self.table.anchor_Z[self.z]

  def __call__(self, head: jax.Array) -> jax.Array:
    """Returns bias_QK of a head."""
    index = self._index(head)
    bias_RW = self.table.slope_ZH[0, 0, index] * self._beyond(head)
    if self.table.lower_Z is not None:
      bias_RW = self.table.value_ZH[0, 0, index] + bias_RW
    return self.at.spread(bias_RW)

  def add_gradient(self, head: jax.Array, d_logits_QK: jax.Array, sums: Any) -> None:
    """Adds the share of a head to `sums`, a table of refs, and to the gradient of a shared x."""
    index, d_bias_RW = self._index(head), self.at.gradient(d_logits_QK)
    of_x_RW = d_bias_RW * self._beyond(head)
    for rows in self.at.static_parts():
      _add_row(sums.slope_ZH, index, _over_rows(of_x_RW[rows]))
      if sums.value_ZH is not None:
        _add_row(sums.value_ZH, index, _over_rows(d_bias_RW[rows]))
    if not sums.coordinate:
      return
    d_x_RW = self.table.slope_ZH[0, 0, index] * d_bias_RW
    if self.at.refs.d_x_RW is None:
      self.at.add_numbers_gradient(head, d_x_RW, sums)
    else:
      self.at.refs.d_x_RW[...] += d_x_RW


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
      return table.value_ZH[0, 0, start + z] - slope(z) * table.anchor_Z[z]

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
    x_RW, bias_RW = self.refs.x_RW, self.refs.bias_RW

    def add_pieces(_, rows, second, end):
      def above(z, _):
        x = x_RW[rows]
        is_above = x > table.lower_Z[z]
        bias_RW[rows] = jnp.where(is_above, height(z) + slope(z) * x, bias_RW[rows])

      jax.lax.fori_loop(second, end, above, None)

    for part, rows in enumerate(self.at.static_parts()):
      first = self.at.span(part)[0]
      bias_RW[rows] = height(first) + slope(first) * x_RW[rows]
    self._each_part(add_pieces)
    return self.at.spread(bias_RW[...])

  def add_gradient(self, head: jax.Array, d_logits_QK: jax.Array, sums: Any) -> None:
    """Adds the share of a head to `sums`, a table of refs, and to the gradient of a shared x.

    A segment has what lies above its lower end, less what lies above that of the next.
    """
    table, (slope, _), start = self.table, self._of_head(head), _first_segment(self.table, head)
    x_RW, d_x_RW, sums_2PW = self.refs.x_RW, self.refs.d_x_RW, self.refs.sums_2PW

    def add_segment(z, from_here, from_next):
      of_x, of_one = (a - b for a, b in zip(from_here, from_next, strict=True))
      _add_row(sums.slope_ZH, start + z, of_x - table.anchor_Z[z] * of_one)
      _add_row(sums.value_ZH, start + z, of_one)

    def add_pieces(part, rows, second, end):
      def step(z, from_before):
        d_above = jnp.where(x_RW[rows] > table.lower_Z[z], self.refs.d_bias_RW[rows], 0.0)
        if d_x_RW is not None:
          d_x_RW[rows] += (slope(z) - slope(z - 1)) * d_above
        from_here = tuple(_over_rows(_halved(d)) for d in (d_above * x_RW[rows], d_above))
        add_segment(z - 1, from_before, from_here)
        return from_here

      from_first = tuple(sums_2PW[n, pl.ds(part, 1)] for n in range(2))
      add_segment(end - 1, jax.lax.fori_loop(second, end, step, from_first), (0.0, 0.0))

    d_bias_RW = self.at.kept(d_logits_QK)
    for part, rows in enumerate(self.at.static_parts()):
      if d_x_RW is not None:
        d_x_RW[rows] += slope(self.at.span(part)[0]) * d_bias_RW[rows]
      sums_2PW[0, part : part + 1] = _over_rows(d_bias_RW[rows] * x_RW[rows])
      sums_2PW[1, part : part + 1] = _over_rows(d_bias_RW[rows])
    self._each_part(add_pieces)


def _over_rows(number_RW):
  """Returns the sum over rows, as a row; what is left of the sum is done outside of kernels."""
  return number_RW.sum(axis=0, keepdims=True)


def _halved(number_RW):
  """Returns a few rows of the same sum over rows.

  A loop's only sum would wait for each of its terms; what stands between products need not.
  """
  while len(number_RW) % (2 * SUBLANES) == 0:
    half = len(number_RW) // 2
    number_RW = number_RW[:half] + number_RW[half:]
  return number_RW


def _add_row(ref, index, row_1W):
  ref[0, 0, pl.ds(index, 1)] += row_1W


def _add_scalars(sums, head, d_numbers):
  leaves = zip(jax.tree.leaves(sums.coordinate), jax.tree.leaves(d_numbers), strict=True)
  for ref, number in leaves:
    ref[0, 0, 0, head] += number


def _first_segment(table, head):
  """Returns where the numbers of a head begin."""
  return head * (table.lower_Z.shape[0] - 1)


def visit(tile: Any, heads: Callable[[Any], None], sums: Any = None) -> None:
  """Calls heads(bias), which visits all heads of a tile under a bias: a `Line`, `Pieces` or None.

  It is traced for each way in which the bias may be computed, of which the tile takes one.

  Args:
    tile: a `mosaic_tpu_tile.Tile`.
    heads: what to do.
    sums: a table of refs, to which is added the gradient of what all heads share; or None.
  """
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
        pl.when(here)(functools.partial(_all, at, heads, sums))
      return
  for here, at in ways:
    _when(here, at.fill)
  _by_span(pairs, heads)
  if sums is not None:
    for here, at in ways:
      _when(here, functools.partial(at.finish, sums))


def _when(here, function):
  function() if here is True else pl.when(here)(function)


def _all(at, heads, sums):
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
