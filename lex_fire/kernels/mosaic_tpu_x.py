"""The x of a tile's bias inside a Pallas kernel for TPU, and the gradient of what it is made from.

Where positions are in order, what depends on the distance alone is computed once a distance and
not once a pair: see `Distances`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.extend import core as jax_core

from lex_fire.encodings import base
from lex_fire.kernels.mosaic_tpu_size import LANES, SUBLANES

# Queries of a part. Fewer have fewer breakpoints, but each part takes its time to begin.
PART = 128


class Functions(NamedTuple):
  """An encoding's functions of positions, in the shapes in which kernels call them, or None.

  Attributes:
    of_pairs: numbers, i_Q1, j_1K -> x_QK.
    of_distances: numbers, i_S1, j_1T -> what of x depends on the distance alone.
    of_queries: numbers, i_1Q -> the other factor of x, of pairs whose query is not before the key.
    of_keys: numbers, j_1K -> that of all others; None if they are hidden.
  """

  of_pairs: Any
  of_distances: Any
  of_queries: Any
  of_keys: Any


def width(key_block: int) -> int:
  """Returns T of a tile's numbers; one that is narrower than a register is only interpreted."""
  return LANES if key_block % LANES == 0 else SUBLANES


def part(query_block: int, key_block: int) -> tuple[int, int]:
  """Returns queries and keys of a part of a tile, which has a span of segments of its own."""
  queries = PART if query_block % PART == 0 else SUBLANES
  return queries, width(key_block)


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
    'i_S1': (query_block + key_block - wide, 1),
    'j_1T': (1, wide),
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
    traced(of_distance, 'i_S1', 'j_1T'),
    traced(rate, 'i_1Q'),
    traced(None if causal else rate, 'j_1K'),
  )
  jaxprs, constants = zip(*both, strict=True)
  return Functions(*jaxprs), Functions(*constants)


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


class Scratch(NamedTuple):
  """What a kernel needs for one tile."""

  pairs: Refs
  distances: Refs


NOTHING = Scratch(*[Refs(*[None] * len(Refs._fields))] * 2)


def scratch(functions: Functions, table: Any, shape: tuple[int, int], learned: bool) -> Scratch:
  """Returns what a kernel needs for a tile of a shape: for the gradient of the table if learned."""
  if table is None:
    return NOTHING
  shared, pieces = not per_head(table), table.lower_Z is not None
  query_block, key_block = shape
  wide = width(key_block)

  def refs(num_rows, num_parts, has_bias):
    several = has_bias and pieces
    array = pltpu.VMEM((num_rows, wide), jnp.float32)
    return Refs(
      x_ST=pltpu.VMEM((num_rows * (1 + several), wide), jnp.float32) if shared else None,
      d_bias_ST=array if learned else None,
      d_x_ST=array if has_bias and shared and learned and table.coordinate else None,
      segment_ST=pltpu.VMEM((num_rows, wide), jnp.int32) if several else None,
      parts_Y=pltpu.SMEM((num_parts,), jnp.int32) if several else None,
    )

  num_rows = query_block * key_block // wide
  of_pairs = refs(num_rows, num_rows // part(*shape)[0], True)
  if functions.of_distances is None:
    return NOTHING._replace(pairs=of_pairs)
  is_whole = functions.of_queries is None  # all of x depends on the distance alone
  return Scratch(of_pairs, refs(query_block + key_block - wide, 1, is_whole))


def per_head(table: Any) -> bool:
  """Returns whether each head has an x of its own."""
  return any(number_H.shape[0] > 1 for number_H in jax.tree.leaves(table.coordinate))


class Pairs:
  """Numbers of a tile for each pair of a query and a key: T keys with all queries, then the next.

  So each part is one piece of memory.

  Attributes:
    num_parts: that have spans of their own.
    part_rows: of each.
  """

  def __init__(self, tile: Any, refs: Refs):
    self.tile, self.refs, setup = tile, refs, tile.setup
    self.width = width(setup.key_block)
    self.part_rows, _ = part(setup.query_block, setup.key_block)
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
    constants = [constant[...] for constant in getattr(self.tile.constants.of_functions, name)]
    closed = jax_core.ClosedJaxpr(getattr(self.tile.setup.functions, name), constants)
    return jax_core.jaxpr_as_fun(closed)(*jax.tree.leaves(numbers), *positions)[0]

  def _x_QK(self, numbers):
    return self._call('of_pairs', numbers, self.tile.i_Q1, self.tile.j_1K)

  def _x_ST(self, numbers):
    return self.gradient(self._x_QK(numbers))

  def fill(self) -> None:
    """Computes what heads share, and clears its gradient."""
    if self.refs.x_ST is not None:
      self.x_ST[...] = self._x_ST(self.tile.numbers(0))
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
    _add_scalars(sums, head, pull(self.spread(d_x_ST))[0])

  def finish(self, sums: Any) -> None:
    """Adds to `sums` the gradient of what all heads share."""
    if self.refs.d_x_ST is not None:
      self.add_numbers_gradient(0, self.refs.d_x_ST[...], sums)


class Distances(Pairs):
  """Numbers of a tile whose positions are in order: of each distance, and not of each pair.

  number_ST holds that of the distance i_0 - j_0 - (K - T) + s - t, for i_0 and j_0 the first of the
  tile's positions. Keys T n .. T (n + 1) of number_QK are then Q rows of it, from K - T (n + 1) on:
  nothing has to be moved from lane to lane, and there are Q + K - T rows of T instead of Q of K.
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

  def _x_ST(self, numbers):
    first_11 = self.tile.i_Q1[:1] - self.tile.j_1K[:, :1] - (self.tile.setup.key_block - self.width)
    later_11 = jnp.maximum(-first_11, 0)  # positions are at least 0
    i_S1 = first_11 + later_11 + jax.lax.broadcasted_iota(jnp.int32, (self.part_rows, 1), 0)
    j_1T = later_11 + jax.lax.broadcasted_iota(jnp.int32, (1, self.width), 1)
    return self._call('of_distances', numbers, i_S1, j_1T)

  def span(self, number: Any) -> tuple[Any, Any]:
    """Returns the first segment that the tile can reach, and one past the last."""
    return self.tile.span

  def kept(self, d_QK: jax.Array) -> jax.Array:
    """Returns `gradient`, which it leaves in `refs.d_bias_ST`, too."""
    self.refs.d_bias_ST[...] = jnp.zeros_like(self.refs.d_bias_ST)
    for rows, columns in self._slices():
      self.refs.d_bias_ST[rows] += d_QK[:, columns]
    return self.refs.d_bias_ST[...]

  gradient = kept

  def add_numbers_gradient(self, head: Any, d_x_ST: jax.Array, sums: Any) -> None:
    """Adds to `sums` the gradient of what x is computed from, of a head or of all that share it."""
    _, pull = jax.vjp(self._x_ST, self.tile.numbers(head))
    _add_scalars(sums, head, pull(d_x_ST)[0])


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
    return self.distances.spread(self.distances.x_ST[...])

  def _product(self, numbers, of_distance_QK):
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
    _add_scalars(sums, head, d_numbers)
    self.distances.add_numbers_gradient(head, self.distances.gradient(d_of_distance_QK), sums)


def _add_scalars(sums, head, d_numbers):
  leaves = zip(jax.tree.leaves(sums.coordinate), jax.tree.leaves(d_numbers), strict=True)
  for ref, number in leaves:
    ref[0, 0, 0, head] += number
