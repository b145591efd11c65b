"""The bias of keys far before their queries inside a Pallas kernel for TPU, by its matrix unit.

Where keys are further away than a tile has of them, an x that is smooth in the distance is a
polynomial of the key's position, but for what float32 rounds: of a query that of all keys follows
from that of some NODES among them. So a bias that is one line a head is a product of numbers of the
query with numbers of the key, as the logits are, and one product makes both: for nothing, where the
matrix unit has rows that a head's channels leave free. v6e's has 256.

In bfloat16 a number is two: itself rounded, and the rest, which is right to 2^-17 of it. Of a query
they are the bias at one node, the reference, whose number of each key is 1, and by how much it
differs at each other node. So the bias is a hundred times as exact as the logits that it meets are.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lex_fire.encodings import base
from lex_fire.kernels import mosaic_tpu_x as x_lib
from lex_fire.kernels.mosaic_tpu_bias import Line, over_rows
from lex_fire.kernels.mosaic_tpu_products import Products, dot
from lex_fire.kernels.mosaic_tpu_size import FAR_BYTES, LANES, VMEM_BYTES, per_head

# With these, of keys no nearer than a tile has of them, log(1 + c d) and d^p, p >= 0, are right to
# 2e-8 of their largest, which is less than float32 rounds.
NODES = 9
ROWS = 16  # which they have, as many as a register of bfloat16
LEAST_KEYS = 16  # of a tile, of which each node is another


class Nodes(NamedTuple):
  """Constants of far tiles.

  Attributes:
    offset_Y1: how many keys after a tile's first each node is, the reference first.
    key_KX: numbers of keys in X columns, in their dtype. Three times Y: what meets a query's as
      rounded, what meets the rest of it, and their own rest, which meets the former again.
    is_rest_1X: 1 in the second of the three.
    is_reference_1X: 1 where a query's number is that at the reference.
  """

  offset_Y1: Any
  key_KX: Any
  is_rest_1X: Any
  is_reference_1X: Any


def has_room(encoding: base.Encoding, keys: int, channels: int, interpret: bool) -> bool:
  """Returns whether a far bias is made by products: if matrix unit and memory have room for it.

  Args:
    encoding: of the bias.
    keys: of a tile.
    channels: of a head.
    interpret: whether there is no such unit, and all have room.
  """
  if not encoding.smooth or encoding.table is None or keys < LEAST_KEYS:
    return False
  if interpret:
    return True
  try:
    chip = pltpu.get_tpu_info()
  except (RuntimeError, ValueError):
    return False  # where a platform is named and no chip, to lower a program for any
  unit, with_nodes = chip.mxu_column_size, channels + columns(LANES)
  fits = pl.cdiv(with_nodes, unit) == pl.cdiv(channels, unit)
  return fits and chip.vmem_capacity_bytes > VMEM_BYTES + FAR_BYTES


def columns(wide: int) -> int:
  """Returns X: whole registers."""
  return pl.cdiv(3 * ROWS, wide) * wide


def _offsets(keys):
  """Returns how many keys after the first each node is; that in the middle comes first."""
  angle_Y = np.pi * np.arange(NODES) / (NODES - 1)
  offset_Y = np.round((keys - 1) / 2 * (1 - np.cos(angle_Y))).astype(int)
  return np.roll(offset_Y, -(NODES // 2))


def _polynomials(keys):
  """Returns number_KY, float64: of each key, what it has of each node: Lagrange's polynomials."""
  node_Y, place_K = _offsets(keys) / keys, np.arange(keys) / keys
  number_KY = np.ones((keys, NODES))
  for one, other in np.ndindex(NODES, NODES):
    if one != other:
      number_KY[:, one] *= (place_K - node_Y[other]) / (node_Y[one] - node_Y[other])
  return number_KY


def nodes(keys: int, wide: int, dtype: Any) -> Nodes:
  """Returns the constants of tiles of so many keys, in registers of some width.

  They are NumPy's, as JAX's would belong to what is being traced, and not to its gradient.
  """
  offset_Y = _offsets(keys)
  offset_Y1 = np.append(offset_Y, [offset_Y[0]] * (ROWS - NODES))[:, None]
  number_KY = np.zeros((keys, ROWS))
  number_KY[:, :NODES] = _polynomials(keys)
  number_KY[:, 0] = 1  # as all others are less the reference
  rounded_KY = number_KY.astype(dtype).astype(np.float64)
  rest_KY = number_KY - rounded_KY

  def in_columns(*of_three):
    x_LX = np.concatenate(of_three, axis=1)
    return np.pad(x_LX, [(0, 0), (0, columns(wide) - x_LX.shape[1])]).astype(dtype)

  one_1Y, zero_1Y = np.ones((1, ROWS)), np.zeros((1, ROWS))
  reference_1Y = 1.0 * (np.arange(ROWS)[None] == 0)
  return Nodes(
    offset_Y1.astype(np.int32),
    in_columns(rounded_KY, rounded_KY, rest_KY),
    in_columns(zero_1Y, one_1Y, zero_1Y).astype(np.float32),
    in_columns(*[reference_1Y] * 3).astype(np.float32),
  )


class Refs(NamedTuple):
  """Arrays in vector memory, of a tile; None what a kernel does not need.

  Attributes:
    number_QX: see `Far`, in each column that takes it.
    reference_QT: those of the reference, in all lanes.
    d_number_QX: gradient of what heads share.
    d_reference_QT: that of the reference, as a sum over lanes.
  """

  number_QX: Any
  reference_QT: Any
  d_number_QX: Any
  d_reference_QT: Any


def scratch(setup: Any, table: Any, learned: bool) -> Refs | None:
  """Returns what a kernel needs: for the gradient of the table, too, if learned."""
  if setup.functions.of_nodes is None:
    return None
  wide = x_lib.width(setup.query_block, setup.key_block)
  of_columns, of_lanes = (
    pltpu.VMEM((setup.query_block, width), jnp.float32) for width in (columns(wide), wide)
  )
  sums = learned and not per_head(table) and bool(table.coordinate)
  return Refs(
    number_QX=of_columns,
    reference_QT=of_lanes if learned else None,
    d_number_QX=of_columns if sums else None,
    d_reference_QT=of_lanes if sums else None,
  )


class Far:
  """What x is at the nodes of a far tile, for each query: at the reference, and less that.

  They are computed with queries in lanes, of which nodes would leave most empty.
  """

  def __init__(self, tile: Any):
    self.tile, self.refs, self.nodes = tile, tile.scratch.far, tile.constants.nodes
    self.shared = not per_head(tile.table)
    self.is_reference_Y1 = jax.lax.broadcasted_iota(jnp.int32, (ROWS, 1), 0) == 0

  def _x_YQ(self, numbers):
    i_1Q, j_Y1 = self.tile.queries.position_B1Q[0], self.nodes.offset_Y1[...]
    return x_lib.call(self.tile, 'of_nodes', numbers, i_1Q, self.tile.j_1K[:, :1] + j_Y1)

  def _fill(self, numbers):
    x_YQ, refs = self._x_YQ(numbers), self.refs
    number_YQ = x_YQ - jnp.where(self.is_reference_Y1, 0.0, x_YQ[:1])
    in_columns = [number_YQ] * 3
    if unused := refs.number_QX.shape[1] - 3 * ROWS:
      in_columns.append(jnp.zeros((unused, x_YQ.shape[1]), jnp.float32))
    refs.number_QX[...] = jnp.concatenate(in_columns).T
    if refs.reference_QT is not None:
      shape = refs.reference_QT.shape[::-1]
      refs.reference_QT[...] = jnp.broadcast_to(x_YQ[:1], shape).T

  def fill(self) -> None:
    """Computes what heads share, and clears its gradient."""
    if self.shared:
      self._fill(self.tile.numbers(0))
    for ref in (self.refs.d_number_QX, self.refs.d_reference_QT):
      if ref is not None:
        ref[...] = jnp.zeros_like(ref)

  def fill_for(self, head: jax.Array) -> None:
    """Computes the numbers of a head, if they are its own."""
    if not self.shared:
      self._fill(self.tile.numbers(head))

  def add_gradient(
    self, head: jax.Array, d_number_QX: jax.Array, d_reference_QT: jax.Array, sums: Any
  ) -> None:
    """Adds to `sums` the gradient of what x is computed from, or leaves it to `finish`.

    Args:
      head: of the tile.
      d_number_QX: gradient of all columns.
      d_reference_QT: that of the reference, as a sum over lanes.
      sums: a table of refs.
    """
    if self.shared:
      self.refs.d_number_QX[...] += d_number_QX
      self.refs.d_reference_QT[...] += d_reference_QT
    else:
      self._add(head, d_number_QX, d_reference_QT, sums)

  def finish(self, sums: Any) -> None:
    """Adds to `sums` the gradient of what all heads share."""
    if self.refs.d_number_QX is not None:
      self._add(0, self.refs.d_number_QX[...], self.refs.d_reference_QT[...], sums)

  def _add(self, head, d_number_QX, d_reference_QT, sums):
    d_number_XQ = d_number_QX.T
    groups = (d_number_XQ[first : first + ROWS] for first in range(0, 3 * ROWS, ROWS))
    d_number_YQ = functools.reduce(jnp.add, groups)
    # The reference is subtracted of all others.
    d_reference_1Q = d_reference_QT.T.sum(axis=0)[None] - d_number_YQ.sum(axis=0)[None]
    d_x_YQ = d_number_YQ + jnp.where(self.is_reference_Y1, d_reference_1Q, 0.0)
    _, pull = jax.vjp(self._x_YQ, self.tile.numbers(head))
    x_lib.add_scalars(sums, head, pull(d_x_YQ)[0])


class FarProducts(Products):
  """Products of a far tile that have its bias in them."""

  def __init__(self, bias: 'FarBias'):
    super().__init__(bias.far.tile)
    nodes = bias.far.nodes
    self.bias, self.key_KX = bias, nodes.key_KX[...]
    # Of the rest of a query's number the gradient is the number's, of the reference it is not here.
    is_left_out_1X = nodes.is_rest_1X[...] + nodes.is_reference_1X[...] > 0
    self.node_KX = jnp.where(is_left_out_1X, 0.0, self.key_KX).astype(self.key_KX.dtype)

  def _key(self, head, number_KX):
    key_KC, _ = self.tile.key_and_value(head)
    return jnp.concatenate([key_KC, number_KX], axis=1)

  def __call__(self, head: jax.Array) -> jax.Array:
    """Returns products_QK of a head with its bias, float32."""
    query_QC = jnp.concatenate([self._query(head), self.bias.query(head)], axis=1)
    return dot(query_QC, self._key(head, self.key_KX), (1, 1))

  def query_gradient(self, head: jax.Array, d_logits_QK: jax.Array) -> jax.Array:
    """Returns d_query_QC, float32; what the bias takes of the same product it is given."""
    if not self.tile.setup.learned:
      return super().query_gradient(head, d_logits_QK)
    key_KC = self._key(head, self.node_KX)
    both = dot(d_logits_QK.astype(key_KC.dtype), key_KC, (1, 0))
    channels = both.shape[1] - self.node_KX.shape[1]
    self.bias.d_query_QX = both[:, channels:]
    return both[:, :channels]


class FarBias(Line):
  """The bias of a far tile, one line a head, which its products have."""

  def __init__(self, far: Far):
    super().__init__(far)
    self.far = far
    self.d_query_QX: Any = None  # of the head whose `query_gradient` was last

  def query(self, head: jax.Array) -> jax.Array:
    """Returns number_QX of a head's queries, in their dtype."""
    self.far.fill_for(head)
    tile, nodes, height = self.far.tile, self.far.nodes, super().height(head)
    number_QX = self.table.slope_ZH[0, 0, self._index(head)] * self.far.refs.number_QX[...]
    if height is not None:
      number_QX += height * nodes.is_reference_1X[...]
    dtype = tile.queries.query_BHQC.dtype
    rounded_QX = _rounded(number_QX, dtype, tile.setup.interpret)
    is_rest_1X = nodes.is_rest_1X[...] > 0
    return jnp.where(is_rest_1X, number_QX - rounded_QX, rounded_QX).astype(dtype)

  def __call__(self, head: jax.Array) -> None:
    """Returns None: the products have the bias."""

  def height(self, head: jax.Array) -> None:
    """Returns None likewise."""

  def add_gradient(self, head: jax.Array, d_logits_QK: jax.Array, sums: Any) -> None:
    """Adds the share of a head to `sums`, a table of refs, and to the gradient of a shared x.

    Of the reference it is a sum over keys in float32, as it would be a small difference of others
    that are rounded. The rest has its sums of the product that makes the gradient of queries, and
    is as exact as that.
    """
    index, refs, setup = self._index(head), self.far.refs, self.far.tile.setup
    wide = refs.reference_QT.shape[1]
    of_one_QT = _folded(d_logits_QK, wide)
    of_x_QT = _folded(self.d_query_QX * refs.number_QX[...], wide)
    of_x_QT += of_one_QT * refs.reference_QT[...]
    of_x, of_one = (over_rows(x_QT, setup.sum_rows) for x_QT in (of_x_QT, of_one_QT))
    self._add_line(sums, index, of_x, of_one)
    if sums.coordinate:
      slope = self.table.slope_ZH[0, 0, index]
      self.far.add_gradient(head, slope * self.d_query_QX, slope * of_one_QT, sums)


def _rounded(x, dtype, interpret):
  """Returns float32 numbers that a dtype has, nearest to x."""
  if interpret and dtype == jnp.bfloat16:
    # XLA would take a number rounded to bfloat16 and back for itself.
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
  return x.astype(dtype).astype(jnp.float32)


def _folded(x_QK, wide):
  """Returns the sum of pieces of so many columns."""
  pieces = (x_QK[:, first : first + wide] for first in range(0, x_QK.shape[1], wide))
  return functools.reduce(jnp.add, pieces)
