"""A tile's matrix products inside a kernel for NVIDIA's GPUs: of float32 too, and under a decay.

The hardware multiplies bfloat16 exactly, and of float32 only the first 11 bits (TF32). So a float32
number is two of bfloat16, itself rounded and what is left, together right to 2^-17 of it; and a
product of two numbers is three products, as that of what is left on both sides is smaller still.

An x that is the inner product of waves of both positions (Sandwich's) is such a product as well, of
two parts whatever the queries are.

A decay that `tile.prepare` has left is one factor a channel for each number of stretches that a
query is after a key: 1 in the many tiles within a stretch. In all others the rows of a tile take
it, whichever side they are: a channel of a pair carries it once.
"""

# Not strict, as its neighbours are: kernels carry no types.
# pyright: basic

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lex_fire.kernels import mosaic_gpu_far as far
from lex_fire.kernels import mosaic_gpu_tensor_memory as tensor_memory
from lex_fire.kernels import mosaic_gpu_tile as tile_lib

PARTS = {'bfloat16': 1, 'float32': 2}  # of bfloat16, by the type of queries, keys and values
WAVES, WAVE_PARTS = 128, 2  # of a position, at most
CHANNELS = 64  # that rows under a decay take at once: registers hold no more
_ACC: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]


def split(x: jax.Array, parts: int) -> jax.Array:
  """Returns the parts of an array, bfloat16, as a new first axis; their sum is the array.

  Args:
    x: of a type that has so many.
    parts: by PARTS.
  """
  return x[None] if parts == 1 else jnp.stack(_split(x, parts, in_kernel=False))


def _split(x, parts, in_kernel):
  """Returns a list of the parts of a float32 array."""
  found = []
  for _ in range(parts):
    # XLA would take a number rounded to bfloat16 and back for itself.
    rounded = x if in_kernel else jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    found.append(rounded.astype(jnp.bfloat16))
    x = x - found[-1].astype(jnp.float32)
  return found


def blocks(setup, shape, columns, channels=None) -> Any:
  """Returns room in shared memory for blocks [..., rows, channels], as products read them.

  Args:
    setup: of the kernel.
    shape: of all of them.
    columns: of a tile. A product takes as many at once as channels are swizzled together.
    channels: of the blocks that they are multiplied by; None: as many as theirs.
  """
  if setup.tensor_memory:
    channels = tensor_memory.swizzled(columns, channels or shape[-1])
  else:
    channels = min(64, columns)
  # In jax 0.12 both lack a method of their protocol, which nothing here asks for.
  tiling = plgpu.TilingTransform((8, channels))  # pyright: ignore[reportAbstractUsage]
  swizzle = plgpu.SwizzleTransform(2 * channels)  # pyright: ignore[reportAbstractUsage]
  return plgpu.SMEM(shape, jnp.bfloat16, transforms=(tiling, swizzle))


def waves_of(setup: Any, number_BNL: jax.Array) -> jax.Array:
  """Returns waves_YBL1W in parts, as if they were one head's of WAVES channels.

  Of no size if the encoding has none.

  Args:
    setup: of the kernel.
    number_BNL: of queries or keys.
  """
  if setup.waves is None:
    return jnp.zeros((1,) * 5, jnp.bfloat16)
  waves_BLW = setup.waves(number_BNL[:, tile_lib.POSITION])
  padded_BLW = jnp.pad(waves_BLW, [(0, 0), (0, 0), (0, WAVES - waves_BLW.shape[2])])
  return split(padded_BLW[:, :, None], WAVE_PARTS)


def wave_blocks(setup, count, rows, columns) -> list:
  """Returns room in shared memory for waves of so many blocks of rows, in a list; [] without."""
  return [blocks(setup, (count, WAVE_PARTS, rows, WAVES), columns)] if setup.waves else []


def rooms(setup, size, channels) -> list:
  """Returns what each warpgroup makes its products in beside its registers; [] for none."""
  if not setup.tensor_memory:
    return []
  # Rows under a decay come from registers as well, some channels at a time.
  width = max(size.columns, CHANNELS if setup.decays else 0)
  block = blocks(setup, (setup.parts, tile_lib.ROWS, width), size.columns, channels)
  return [tensor_memory.room(setup, size.columns, channels, block)] * size.units


def copies(setup, parts) -> int:
  """Returns how many copies there are of so many parts of a block, its integers and its waves."""
  return parts + 1 + (WAVE_PARTS if setup.waves else 0)


def put(x_LC, target_LC, block_YLC):
  """Writes a float32 array, of a tile's rows, where it goes; returns what is left to copy there.

  Args:
    x_LC: in registers.
    target_LC: bfloat16, or float32, which has no room of its own in shared memory and needs none.
    block_YLC: in shared memory, by which bfloat16 goes.
  """
  if target_LC.dtype == jnp.float32:
    target_LC[...] = x_LC
    return []
  block_YLC[0] = x_LC.astype(jnp.bfloat16)
  return [(target_LC, block_YLC.at[0])]


def _pairs(parts):
  """Returns which parts of one factor meet which of the other."""
  return [(m, n) for m in range(parts) for n in range(parts) if m + n < parts]


def product(setup, a, b, start=None):
  """Returns start + a b^T, float32, of blocks [parts, rows, channels] in shared memory.

  Args:
    setup: of the kernel.
    a: rows of the tile; or a list of parts, [rows, channels] each, in registers.
    b: columns of the tile.
    start: a tile to begin the sum with; None: 0.
  """
  of_b = [b.at[part] for part in range(b.shape[0])]
  of_a = a if isinstance(a, list) else [a.at[part] for part in range(len(of_b))]
  if setup.tensor_memory:
    of_a = tensor_memory.held(setup.room, of_a) if isinstance(a, list) else of_a
    pairs = [(of_a[m], of_b[n].transpose((1, 0))) for m, n in _pairs(len(of_b))]
    return tensor_memory.add(setup.room, setup.room.tile_ref, start, pairs)
  if setup.interpret:
    products = [_dot(of_a[m][...], of_b[n][...], 1) for m, n in _pairs(len(of_b))]
    return sum(products, 0.0 if start is None else start)

  def multiply(sum_ref):
    for m, n in _pairs(len(of_b)):
      plgpu.wgmma(sum_ref, of_a[m], of_b[n].transpose((1, 0)))

  if start is not None:
    return pl.run_state(multiply)(_ACC.init(start))

  def from_zero(sum_ref):
    multiply(sum_ref)
    return sum_ref[...]

  return pl.run_scoped(from_zero, _ACC((of_a[0].shape[0], b.shape[1]), jnp.float32))


def add_product(setup, so_far, weights, b):
  """Returns so_far + weights b, of a tile [rows, columns] and a block of its columns."""
  of_a = _split(weights, setup.parts, not setup.interpret)
  of_b = [b.at[part] for part in range(setup.parts)]
  if setup.tensor_memory:
    of_a = tensor_memory.held(setup.room, of_a)
    pairs = [(of_a[m], of_b[n]) for m, n in _pairs(setup.parts)]
    return tensor_memory.add(setup.room, setup.room.rows_ref, so_far, pairs)
  if setup.interpret:
    return sum((_dot(of_a[m], of_b[n][...], 0) for m, n in _pairs(setup.parts)), so_far)

  def multiply(sum_ref):
    for m, n in _pairs(setup.parts):
      plgpu.wgmma(sum_ref, of_a[m], of_b[n])

  return pl.run_state(multiply)(_ACC.init(so_far))


def _dot(a, b, contracted):
  dimensions = (((1,), (contracted,)), ((), ()))
  return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def of_parts(x_YBLHC, batch, rows, head, block_YLC):
  """Returns pairs to copy, of each part of some rows of a head and of its room in shared memory."""
  return [(x_YBLHC.at[y, batch, rows, head], block_YLC.at[y]) for y in range(x_YBLHC.shape[0])]


def _of_waves(wave_YBL1W, batch, rows, waves):
  """Returns pairs to copy, of the waves of some rows and of their room, a list of at most one."""
  row = tile_lib.row_of(wave_YBL1W.at[0], batch)
  return [pair for wave_YLW in waves for pair in of_parts(wave_YBL1W, row, rows, 0, wave_YLW)]


class Given(NamedTuple):
  """What all kernels take first.

  Attributes:
    line_HZX: of a `mosaic_gpu_plan.Table`.
    number_HN: likewise.
    rate_C: the decay of each channel [nats a stretch].
    query_YBQHC: in parts, as the two below.
    key_YBKGC: keys.
    value_YBKGC: values.
    query_BNQ: see `mosaic_gpu_plan.query_numbers`.
    key_BNK: see `mosaic_gpu_plan.key_numbers`.
    query_YBQ1W: waves of the queries' positions, in parts; B may be 1.
    key_YBK1W: of the keys', likewise.
  """

  line_HZX: Any
  number_HN: Any
  rate_C: Any
  query_YBQHC: Any
  key_YBKGC: Any
  value_YBKGC: Any
  query_BNQ: Any
  key_BNK: Any
  query_YBQ1W: Any
  key_YBK1W: Any

  def queries(self, batch, rows, head, query_YQC, query_NQ, waves):
    """Returns pairs to copy, of some queries of a head and of their room in shared memory."""
    integers = self.query_BNQ.at[tile_lib.row_of(self.query_BNQ, batch), :, rows]
    return (
      *of_parts(self.query_YBQHC, batch, rows, head, query_YQC),
      (integers, query_NQ),
      *_of_waves(self.query_YBQ1W, batch, rows, waves),
    )

  def keys(self, batch, rows, group, key_YKC, value_YKC, key_NK, waves):
    """Returns pairs to copy, of some keys and values of a head and of their room likewise."""
    integers = self.key_BNK.at[tile_lib.row_of(self.key_BNK, batch), :, rows]
    return (
      *of_parts(self.key_YBKGC, batch, rows, group, key_YKC),
      *of_parts(self.value_YBKGC, batch, rows, group, value_YKC),
      (integers, key_NK),
      *_of_waves(self.key_YBK1W, batch, rows, waves),
    )

  def of_head(self, setup, head):
    """Returns (positions, code) -> `Tile` of a head."""
    numbers = tile_lib.numbers(setup, self.number_HN, head)
    return functools.partial(Tile, setup, self.line_HZX, head, numbers, self.rate_C)


def given(refs):
  """Returns a kernel's refs as `Given`, and the others."""
  count = len(Given._fields)
  return Given(*refs[:count]), refs[count:]


class Tile(NamedTuple):
  """A tile of queries and keys: its logits, and what their gradient is to its rows.

  Attributes:
    setup: of the kernel.
    line_ref: the table's lines.
    head: of the queries.
    numbers: of the head's coordinate.
    rate_ref: the decay of each channel [nats a stretch].
    positions: of its queries and keys.
    code: what the plan says of it; its span is of stretches if there is a decay.
  """

  setup: Any
  line_ref: Any
  head: Any
  numbers: Any
  rate_ref: Any
  positions: Any
  code: Any

  def with_x(self, step, shape, degree=None, which=()):
    """Returns step(x), of what of x is of the tile's pairs.

    Args:
      step: takes a `mosaic_gpu_tile.Pairs`, a `mosaic_gpu_far.Polynomial`, or None without a bias.
      shape: of the tile.
      degree: of the polynomial of far keys; None: there is none.
      which: numbers, as in `Setup.read`, for derivatives.
    """
    setup = self.setup
    if not setup.segments:
      return step(None)
    if self.positions.waves:
      return step(tile_lib.Pairs(product(setup, *self.positions.waves), []))

    def by_pairs():
      return step(tile_lib.pairs(setup, self.positions, self.code, self.numbers, shape, which))

    def by_columns():
      of_tile = setup, self.positions, self.numbers, degree, shape[1], which
      return step(far.on_tile(*of_tile))

    if not setup.far or degree is None:
      return by_pairs()
    return jax.lax.cond(self.code & tile_lib.FAR != 0, by_columns, by_pairs)

  def logits(self, a, b, x):
    """Returns the logits, HIDDEN_LOGIT where hidden, of blocks of the rows and of the columns.

    Args:
      a: rows of the tile, queries or keys, as products take them.
      b: columns of the tile.
      x: what `with_x` gives.
    """
    of_tile = self.setup, self.line_ref, self.head, self.code, self.positions
    bias = None if x is None else x.bias(*of_tile)
    logits = self._products(a, b, bias)
    return tile_lib.hide(self.setup, self.positions, self.code, logits)

  def _products(self, a, b, start):
    """Returns start + a b^T, with the decay of each pair."""
    if not self.setup.decays:
      return product(self.setup, a, b, start)
    first, end = tile_lib.span(self.code)

    def of(apart):
      return jax.lax.cond(
        apart == 0,
        lambda: product(self.setup, a, b),
        lambda: self._decayed_product(a, b, apart),
      )

    def step(apart, so_far):
      return jnp.where(self._apart(so_far.shape) == apart, of(apart), so_far)

    products = jax.lax.fori_loop(first + 1, end, step, of(first))
    return products if start is None else start + products

  def add(self, so_far, d_logits, b):
    """Returns so_far and what the logits' gradient is to the rows, of a block of the columns."""
    if not self.setup.decays:
      return add_product(self.setup, so_far, d_logits, b)
    first, end = tile_lib.span(self.code)

    def step(apart, so_far):
      def here():
        return jnp.where(self._apart(d_logits.shape) == apart, d_logits, 0.0)

      of_apart = jax.lax.cond(end - first == 1, lambda: d_logits, here)

      def decayed():
        factor_C = jnp.exp(self._log_decay(apart, so_far.shape[1]))
        nothing = tile_lib.full(self.setup, so_far.shape, 0.0)
        sum_LC = add_product(self.setup, nothing, of_apart, b)
        return so_far + sum_LC * tile_lib.spread(factor_C, so_far.shape, 1)

      return jax.lax.cond(apart == 0, lambda: add_product(self.setup, so_far, of_apart, b), decayed)

    return jax.lax.fori_loop(first, end, step, so_far)

  def _decayed_product(self, a, b, apart):
    """Returns a b^T with the decay of so many stretches."""
    result = None
    for channel in range(0, a.shape[2], CHANNELS):
      some = pl.ds(channel, CHANNELS)
      factor_C = jnp.exp(self._log_decay(apart, CHANNELS, channel))
      a_LC, *others = (
        tile_lib.block(self.setup, a.at[part, :, some]).astype(jnp.float32)
        for part in range(self.setup.parts)
      )
      a_LC = sum(others, a_LC) * tile_lib.spread(factor_C, a_LC.shape, 1)
      decayed = _split(a_LC, self.setup.parts, not self.setup.interpret)
      result = product(self.setup, decayed, b.at[:, :, some], result)
    return result

  def _log_decay(self, apart, channels, first=0):
    """Returns log_decay_C of so many stretches, of some channels."""
    rate_C = tile_lib.vector(self.setup, self.rate_ref.at[pl.ds(first, channels)], 1)
    return rate_C * apart.astype(jnp.float32)

  def _apart(self, shape):
    """Returns how many stretches each query of the tile is after each key."""
    axis = self.positions.query_axis
    query_stretch = self.positions.query(self.setup, tile_lib.STRETCH)
    key_stretch = self.positions.key(self.setup, tile_lib.KEY_STRETCH)
    of_query = tile_lib.spread(query_stretch, shape, axis)
    return of_query - tile_lib.spread(key_stretch, shape, 1 - axis)
