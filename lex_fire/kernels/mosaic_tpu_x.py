"""The x of a tile's bias inside a Pallas kernel for TPU, and the gradient of what it is made from.

Where positions are in order, what depends on the distance alone is computed once a distance and
not once a pair: see `Distances`, and `mosaic_tpu_band`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lex_fire.encodings import base
from lex_fire.kernels.mosaic_tpu_size import LANES, SUBLANES, per_head


class Functions(NamedTuple):
  """An encoding's functions of positions, in the shapes in which kernels call them, or None.

  Attributes:
    of_pairs: numbers, i_Q1, j_1K -> x_QK.
    of_distances: numbers, i_S1, j_1T -> what of x depends on the distance alone.
    of_queries: numbers, i_1Q -> the other factor of x, of pairs whose query is not before the key.
    of_keys: numbers, j_1K -> that of all others; None if they are hidden.
    of_nodes: numbers, i_1Q, j_Y1 -> x_YQ of some keys; None if no others follow from them.
  """

  of_pairs: Any
  of_distances: Any
  of_queries: Any
  of_keys: Any
  of_nodes: Any


NO_FUNCTIONS = Functions(*[None] * len(Functions._fields))


def width(query_block: int, key_block: int) -> int:
  """Returns T of a tile's numbers: one that is narrower than a register is only interpreted.

  A part of a tile, which has a span of segments of its own, is as many queries by as many keys:
  of fewer queries it would have fewer breakpoints, but each part takes its time to begin.
  """
  return SUBLANES if query_block % LANES or key_block % LANES else LANES


def _rows_of_distances(query_block, key_block):
  """Returns S of a tile's numbers of distances, in whole registers."""
  return pl.cdiv((query_block + key_block) // width(query_block, key_block), SUBLANES) * SUBLANES


def factors(encoding: base.Encoding) -> tuple[Any, Any]:
  """Returns what of x depends on the distance alone, and its other factor: `base.factors`.

  The other is None if x has none, and both are if x is nothing but of pairs.
  """
  if encoding.shift_invariant:
    return encoding.coordinate, None
  return encoding.factors or (None, None)


def trace(
  encoding: base.Encoding, table: Any, query_block: int, key_block: int, causal: bool, nodes: int
) -> tuple[Functions, Functions]:
  """Returns an encoding's functions as jaxprs, and their constants, which kernels must be given.

  `nodes` is how many keys those of all others follow from, 0 if from none.
  """
  if table is None:
    return NO_FUNCTIONS, Functions(*[()] * len(NO_FUNCTIONS))
  numbers = jax.tree.map(lambda _: jax.ShapeDtypeStruct((), jnp.float32), table.coordinate)
  shapes = {
    'i_Q1': (query_block, 1),
    'i_1Q': (1, query_block),
    'j_1K': (1, key_block),
    'j_Y1': (nodes, 1),
    'i_S1': (_rows_of_distances(query_block, key_block), 1),
    'j_1T': (1, width(query_block, key_block)),
  }

  def traced(function, *positions):
    if function is None:
      return None, ()
    arguments = (jax.ShapeDtypeStruct(shapes[name], jnp.int32) for name in positions)
    made = jax.make_jaxpr(function)(numbers, *arguments)
    return made.jaxpr, tuple(made.consts)

  of_distance, rate = factors(encoding)
  both = (
    traced(encoding.coordinate, 'i_Q1', 'j_1K'),
    traced(of_distance, 'i_S1', 'j_1T'),
    traced(rate, 'i_1Q'),
    traced(None if causal else rate, 'j_1K'),
    traced(encoding.coordinate if nodes else None, 'i_1Q', 'j_Y1'),
  )
  jaxprs, constants = zip(*both, strict=True)
  return Functions(*jaxprs), Functions(*constants)


def call(tile: Any, name: str, numbers: Any, *positions: jax.Array) -> jax.Array:
  """Returns what one of a tile's `Functions` does."""
  constants = [constant[...] for constant in getattr(tile.constants.of_functions, name)]
  jaxpr = getattr(tile.setup.functions, name)
  return jax.core.eval_jaxpr(jaxpr, constants, *jax.tree.leaves(numbers), *positions)[0]


class Refs(NamedTuple):
  """Arrays in vector memory of either `Pairs` or `Distances`; None what a kernel does not need.

  Attributes:
    x_ST: what heads share; with breakpoints, a bias of a head in as many rows after it.
    d_bias_ST: of a head.
    d_x_ST: of all heads.
    segment_ST: in which segment of the table x lies, where lines are looked up; of all heads.
    parts_Y: which parts have breakpoints, in scalar memory.
  """

  x_ST: Any
  d_bias_ST: Any
  d_x_ST: Any
  segment_ST: Any
  parts_Y: Any


NOTHING = Refs(*[None] * len(Refs._fields))


def refs_of_pairs(table: Any, query_block: int, key_block: int, learned: bool) -> Refs:
  """Returns what `Pairs` of a tile need: for the gradient of the table, too, if learned."""
  wide = width(query_block, key_block)
  num_rows = query_block * key_block // wide
  return _refs(table, num_rows, wide, num_rows // wide, learned)


def refs_of_distances(table: Any, query_block: int, key_block: int, learned: bool) -> Refs:
  """Returns what `Distances` of a tile need, likewise."""
  num_rows = _rows_of_distances(query_block, key_block)
  return _refs(table, num_rows, width(query_block, key_block), 1, learned)


def _refs(table, num_rows, wide, num_parts, learned):
  shared, pieces = not per_head(table), table.lower_Z is not None
  array = pltpu.VMEM((num_rows, wide), jnp.float32)
  return Refs(
    x_ST=pltpu.VMEM((num_rows * (1 + pieces), wide), jnp.float32) if shared else None,
    d_bias_ST=array if learned else None,
    d_x_ST=array if shared and learned and table.coordinate else None,
    segment_ST=pltpu.VMEM((num_rows, wide), jnp.int32) if pieces else None,
    parts_Y=pltpu.SMEM((num_parts,), jnp.int32) if pieces else None,
  )


class Pairs:
  """Numbers of a tile for each pair of a query and a key: T keys with all queries, then the next.

  So each part is one piece of memory.

  Attributes:
    num_parts: that have spans of their own.
    part_rows: of each.
  """

  def __init__(self, tile: Any, refs: Refs):
    self.tile, self.refs, setup = tile, refs, tile.setup
    self.width = self.part_rows = width(setup.query_block, setup.key_block)
    self.num_parts = setup.query_block * setup.key_block // self.width // self.part_rows

  @property
  def x_ST(self) -> Any:
    """What heads share, a ref."""
    return self.refs.x_ST.at[: self.num_parts * self.part_rows]

  @property
  def bias_ST(self) -> Any:
    """The bias of a head, a ref."""
    num_rows = self.num_parts * self.part_rows
    return self.refs.x_ST.at[num_rows : 2 * num_rows]

  def _slices(self):
    """Yields which rows are which columns of the tile."""
    setup = self.tile.setup
    for number, first in enumerate(range(0, setup.key_block, self.width)):
      start = number * setup.query_block
      yield slice(start, start + setup.query_block), slice(first, first + self.width)

  def _call(self, name, numbers, *positions):
    return call(self.tile, name, numbers, *positions)

  def _x_QK(self, numbers):
    return self._call('of_pairs', numbers, self.tile.i_Q1, self.tile.j_1K)

  def _x_ST(self, numbers):
    return self.gradient(self._x_QK(numbers))

  def fill_x(self) -> None:
    """Computes what heads share."""
    if self.refs.x_ST is not None:
      self.x_ST[...] = self._x_ST(self.tile.numbers(0))

  def fill(self) -> None:
    """Computes what heads share, and clears its gradient."""
    self.fill_x()
    if self.refs.d_x_ST is not None:
      self.refs.d_x_ST[...] = jnp.zeros_like(self.refs.d_x_ST)

  def x(self, head: jax.Array) -> jax.Array:
    """Returns x_ST of a head."""
    if self.refs.x_ST is None:
      return self._x_ST(self.tile.numbers(head))
    return self.x_ST[...]

  def span(self, number: Any) -> tuple[Any, Any]:
    """Returns the first segment that a part can reach, and one past the last."""
    return self.tile.span_of_part(number)

  def static_parts(self) -> list[slice]:
    """Returns the rows of each part."""
    starts = range(0, self.num_parts * self.part_rows, self.part_rows)
    return [slice(start, start + self.part_rows) for start in starts]

  def spread(self, number_ST: jax.Array) -> jax.Array:
    """Returns number_QK."""
    return jnp.concatenate([number_ST[rows] for rows, _ in self._slices()], axis=1)

  def gradient(self, d_QK: jax.Array) -> jax.Array:
    """Returns the gradient of number_ST if d_QK is that of `spread`."""
    return jnp.concatenate([d_QK[:, columns] for _, columns in self._slices()])

  def kept(self, d_QK: jax.Array) -> jax.Array:
    """Returns `gradient`, which it leaves in `refs.d_bias_ST`, too."""
    d_ST = self.refs.d_bias_ST[...] = self.gradient(d_QK)
    return d_ST

  def add_numbers_gradient(self, head: Any, d_x_ST: jax.Array, sums: Any) -> None:
    """Adds to `sums` the gradient of what x is computed from, of a head or of all that share it."""
    _, pull = jax.vjp(self._x_QK, self.tile.numbers(head))
    add_scalars(sums, head, pull(self.spread(d_x_ST))[0])

  def finish(self, sums: Any) -> None:
    """Adds to `sums` the gradient of what all heads share."""
    if self.refs.d_x_ST is not None:
      self.add_numbers_gradient(0, self.refs.d_x_ST[...], sums)


def _diagonals(setup):
  """Yields the blocks of each diagonal, (of queries, of keys), from the furthest keys on."""
  wide = width(setup.query_block, setup.key_block)
  by_queries, by_keys = setup.query_block // wide, setup.key_block // wide
  for number in range(by_queries + by_keys - 1):
    first = by_queries - 1 - number
    of_keys = range(max(0, -first), min(by_keys, by_queries - first))
    yield [tuple(slice(wide * n, wide * (n + 1)) for n in (first + key, key)) for key in of_keys]


def num_diagonals(setup: Any) -> int:
  """Returns how many diagonals of blocks, T by T, a tile has."""
  return sum(1 for _ in _diagonals(setup))


def from_diagonals(setup: Any, blocks: list[jax.Array]) -> jax.Array:
  """Returns number_QK of a tile, all of whose blocks in a diagonal are one of `blocks`."""
  placed = {}
  for diagonal, block in zip(_diagonals(setup), blocks, strict=True):
    placed |= {(rows.start, columns.start): block for rows, columns in diagonal}
  wide = width(setup.query_block, setup.key_block)
  of_rows = [
    jnp.concatenate([placed[row, key] for key in range(0, setup.key_block, wide)], axis=1)
    for row in range(0, setup.query_block, wide)
  ]
  return jnp.concatenate(of_rows)


def sums_of_diagonals(setup: Any, d_QK: jax.Array) -> list[jax.Array]:
  """Returns the gradient of what `from_diagonals` takes if d_QK is that of what it returns."""
  return [
    functools.reduce(jnp.add, [d_QK[block] for block in diagonal]) for diagonal in _diagonals(setup)
  ]


class Distances(Pairs):
  """Numbers of a tile whose positions are in order: of each distance, and not of each pair.

  The distance falls by one from each of number_ST to the next, row by row, from that of the last
  query and the first key on. A block of number_QK, T by T, has two rows of it, each turned by one
  more from query to query; so have all blocks of a diagonal.
  """

  def __init__(self, tile: Any, refs: Refs):
    super().__init__(tile, refs)
    self.num_parts = 1
    self.part_rows = _rows_of_distances(tile.setup.query_block, tile.setup.key_block)

  def _x_ST(self, numbers):
    rows, wide, setup = self.part_rows, self.width, self.tile.setup
    rows_of_tile = (setup.query_block + setup.key_block) // wide
    last_11 = self.tile.i_Q1[-1:] - self.tile.j_1K[:, :1]
    # Positions are at least 0.
    later_11 = jnp.maximum((rows_of_tile - 1) * wide - last_11, 0)
    row_S1 = jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    row_S1 = jnp.minimum(row_S1, rows_of_tile - 1)  # no row has distances that no pair has
    j_1T = later_11 + jax.lax.broadcasted_iota(jnp.int32, (1, wide), 1)
    return self._call('of_distances', numbers, later_11 + last_11 - wide * row_S1, j_1T)

  def span(self, number: Any) -> tuple[Any, Any]:
    """Returns the first segment that the tile can reach, and one past the last."""
    return self.tile.span

  def _is_of_first(self):
    """Returns where a block has numbers of the first of its two rows."""
    shape = self.width, self.width
    query_TT, key_TT = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return key_TT <= query_TT

  def _turns(self, by):
    """Returns how to turn SUBLANES rows of T to the left, each by so many lanes as `by` says."""
    shape = SUBLANES, self.width
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return functools.partial(jnp.take_along_axis, indices=lane + by(row) & self.width - 1, axis=1)

  def spread(self, number_ST: jax.Array) -> jax.Array:
    """Returns number_QK."""
    wide, is_of_first = self.width, self._is_of_first()
    turned = self._turns(lambda row: wide - 1 - row)

    def turn(row):
      first = turned(jnp.broadcast_to(number_ST[row : row + 1], (SUBLANES, wide)))
      later = (pltpu.roll(first, down, 1) for down in range(SUBLANES, wide, SUBLANES))
      return jnp.concatenate([first, *later])

    of_rows = [turn(row) for row in range(num_diagonals(self.tile.setup) + 1)]
    pairs = zip(of_rows[:-1], of_rows[1:], strict=True)
    return from_diagonals(self.tile.setup, [jnp.where(is_of_first, *pair) for pair in pairs])

  def gradient(self, d_QK: jax.Array) -> jax.Array:
    """Returns the gradient of number_ST if d_QK is that of `spread`."""
    wide, is_of_first = self.width, self._is_of_first()
    turned = self._turns(lambda row: row + 1)
    d_blocks = sums_of_diagonals(self.tile.setup, d_QK)
    # The row that is the first of a block's two is the second of that of the diagonal before.
    pairs = zip([*d_blocks, 0.0], [0.0, *d_blocks], strict=True)
    of_rows = []
    for d_TT in (jnp.where(is_of_first, *pair) for pair in pairs):
      while len(d_TT) > SUBLANES:
        half = len(d_TT) // 2
        d_TT = d_TT[:half] + pltpu.roll(d_TT[half:], wide - half, 1)
      of_rows.append(turned(d_TT).sum(axis=0, keepdims=True))
    of_rows += [jnp.zeros((1, wide), jnp.float32)] * (self.part_rows - len(of_rows))
    return jnp.concatenate(of_rows)

  def add_numbers_gradient(self, head: Any, d_x_ST: jax.Array, sums: Any) -> None:
    """Adds to `sums` the gradient of what x is computed from, of a head or of all that share it."""
    _, pull = jax.vjp(self._x_ST, self.tile.numbers(head))
    add_scalars(sums, head, pull(d_x_ST)[0])


class OneRate(Distances):
  """`Distances` of all x, where the other factor of x is that of the first query everywhere."""

  def _x_ST(self, numbers):
    rate_1Q = self._call('of_queries', numbers, self.tile.queries.position_B1Q[0])
    return super()._x_ST(numbers) * rate_1Q[:, :1]


class Factors(Pairs):
  """`Pairs` whose x is a factor of the distance times one of the later position, or that alone."""

  def __init__(self, tile: Any, refs: Refs, distances: Distances):
    super().__init__(tile, refs)
    self.distances = distances

  def fill(self) -> None:
    """Computes what heads share, and clears its gradient."""
    self.distances.fill_x()
    super().fill()

  def _of_distance_QK(self):
    return self.distances.spread(self.distances.x_ST[...])

  def _product(self, numbers, of_distance_QK):
    if self.tile.setup.functions.of_queries is None:
      return of_distance_QK
    # A column of numbers takes as many registers as if it were 128 wide.
    rate = self._call('of_queries', numbers, self.tile.queries.position_B1Q[0]).T
    if self.tile.setup.functions.of_keys is not None:
      i_Q1, j_1K = self.tile.i_Q1, self.tile.j_1K
      rate = jnp.where(i_Q1 >= j_1K, rate, self._call('of_keys', numbers, j_1K))
    return of_distance_QK * rate

  def _x_QK(self, numbers):
    return self._product(numbers, self._of_distance_QK())

  def add_numbers_gradient(self, head: Any, d_x_ST: jax.Array, sums: Any) -> None:
    """Adds to `sums` the gradient of what x is computed from."""
    _, pull = jax.vjp(self._product, self.tile.numbers(head), self._of_distance_QK())
    d_numbers, d_of_distance_QK = pull(self.spread(d_x_ST))
    add_scalars(sums, head, d_numbers)
    self.distances.add_numbers_gradient(head, self.distances.gradient(d_of_distance_QK), sums)


def add_scalars(sums: Any, head: Any, d_numbers: Any) -> None:
  """Adds to `sums`, a table of refs, the gradient of the numbers of x, of a head or of all."""
  leaves = zip(jax.tree.leaves(sums.coordinate), jax.tree.leaves(d_numbers), strict=True)
  for ref, number in leaves:
    ref[0, 0, 0, head] += number
