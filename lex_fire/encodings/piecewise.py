"""Piecewise linear functions of one number, a head each: the form that learned biases share.

A ReLU network from one number x to H outputs is, exactly, a slope and an intercept on each segment
between the zeros of its units; T5's buckets are segments of slope 0. In this form a tile of logits
costs a multiplication and an addition, and more only for the breakpoints that fall inside the tile:
FIRE's logarithm makes most tiles span almost no x. Gradients of slopes and intercepts are sums over
the tile, and ordinary differentiation of the small table takes them back to the network.
"""

# Not strict, as its neighbours are: custom_vjp and fori_loop carry no types.
# pyright: basic

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lex_fire.encodings import base

HIGHEST = jax.lax.Precision.HIGHEST
# Of a row so many at once, as tiles far back reach but a few segments. Measured on 2 CPU cores, one
# query of FIRE over 16,384 keys takes 0.3 to 0.6 of the time that it takes with all at once.
KEYS = 1024


class Table(NamedTuple):
  """b_h(x) = value_zh + slope_zh (x - anchor_z) on segment z, the last whose lower end is below x.

  A value at the segment's own end, and not at x = 0: steep segments would round it away. In
  Pallas they do have it at x = 0, to 2^-23 of slope times anchor: of a large x they should be flat.

  Attributes:
    coordinate: parameters of the encoding's x, a pytree of arrays _H, or _1 where heads share x.
    lower_Z: lower ends of the segments, rising from -inf; +inf for segments that are not there.
    anchor_Z: an x in or at the end of each segment.
    slope_ZH: nats.
    value_ZH: at the anchor [nats].

  A line through 0 has None for all but its coordinate and its one slope.
  """

  coordinate: Any
  lower_Z: jax.Array | None
  anchor_Z: jax.Array | None
  slope_ZH: jax.Array
  value_ZH: jax.Array | None


def of_network(params: base.Params, coordinate: Any) -> Table:
  """Returns the table of a ReLU network on 0 <= x <= 1.

  Layer by layer: on each segment so far every unit is linear, and its zero, if it lies inside, cuts
  the segment. Breakpoints have no gradient and need none, as the function is continuous there.

  Args:
    params: as `fire` has them: w_in_W and b_in_W, maybe w_hidden_NWX and b_hidden_NX, w_out_WH and
      b_out_H.
    coordinate: parameters of x.
  """
  lower_Z, anchor_Z = jnp.full(1, -jnp.inf), jnp.zeros(1)
  slope_ZX, value_ZX = params['w_in_W'][None], params['b_in_W'][None]
  layers = list(zip(params.get('w_hidden_NWX', ()), params.get('b_hidden_NX', ()), strict=True))
  for w_WX, b_X in (*layers, (params['w_out_WH'], params['b_out_H'])):
    lower_Z, anchor_Z, slope_ZW, value_ZW = _rectified(lower_Z, anchor_Z, slope_ZX, value_ZX)
    slope_ZX = jnp.matmul(slope_ZW, w_WX, precision=HIGHEST)
    value_ZX = jnp.matmul(value_ZW, w_WX, precision=HIGHEST) + b_X[None]
  return Table(coordinate, lower_Z, anchor_Z, slope_ZX, value_ZX)


def _rectified(lower_Z, anchor_Z, slope_ZW, value_ZW):
  """Returns the units of a layer after their ReLU, on segments cut at the zeros of each."""
  steep_ZW = jnp.where(slope_ZW == 0, 1.0, slope_ZW)
  zero_ZW = jax.lax.stop_gradient(anchor_Z[:, None] - value_ZW / steep_ZW)
  low_Z, high_Z = _ends(lower_Z)
  inside_ZW = (slope_ZW != 0) & (low_Z[:, None] < zero_ZW) & (zero_ZW < high_Z[:, None])
  cuts_Z = jnp.where(inside_ZW, zero_ZW, jnp.inf).ravel()
  finer_Z = jnp.concatenate([lower_Z[:1], jnp.sort(jnp.concatenate([lower_Z[1:], cuts_Z]))])
  low_Z, high_Z = _ends(finer_Z)
  # A unit is on or off in all of a segment: where it is, its middle says.
  half_Z1 = ((high_Z - low_Z) / 2)[:, None]
  parent_Z = jnp.searchsorted(lower_Z, (low_Z + high_Z) / 2) - 1
  moved_Z1 = (low_Z - anchor_Z[parent_Z])[:, None]
  slope_ZW = _rows(slope_ZW, parent_Z)
  value_ZW = _rows(value_ZW, parent_Z) + slope_ZW * moved_Z1
  on_ZW = jax.lax.stop_gradient(value_ZW + slope_ZW * half_Z1) > 0
  on_slope_ZW, on_value_ZW = (jnp.where(on_ZW, x_ZW, 0.0) for x_ZW in (slope_ZW, value_ZW))
  return finer_Z, low_Z, on_slope_ZW, on_value_ZW


def _rows(x_ZW, index_Z):
  """Returns x_ZW[index_Z], exactly, by a product.

  The gradient of an index adds to a row as often as it was taken, on GPUs in any order.
  """
  is_taken_ZZ = jax.nn.one_hot(index_Z, x_ZW.shape[0], dtype=x_ZW.dtype)
  return jnp.matmul(is_taken_ZZ, x_ZW, precision=HIGHEST)


def _ends(lower_Z):
  """Returns the ends of the segments within 0 .. 1."""
  upper_Z = jnp.append(lower_Z[1:], jnp.inf)
  return jnp.clip(lower_Z, 0.0, 1.0), jnp.clip(upper_Z, 0.0, 1.0)


def of_line(coordinate: Any, slope_H: jax.Array) -> Table:
  """Returns the table of b_h(x) = slope_h x."""
  return Table(coordinate, None, None, slope_H[None], None)


def bias_of_table(
  table: Table,
  query_position_BQ: jax.Array,
  key_position_BK: jax.Array,
  num_heads: int,
  *,
  coordinate: Callable[[Any, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
  """Returns bias_BHQK, float32: what `Encoding.bias` is, with the table in place of parameters."""
  num_keys = key_position_BK.shape[1]
  if table.lower_Z is not None and num_keys > KEYS:
    padded_BK = jnp.pad(key_position_BK, [(0, 0), (0, -num_keys % KEYS)], mode='edge')
    position_JBK = jnp.moveaxis(padded_BK.reshape(len(padded_BK), -1, KEYS), 1, 0)

    def of_tile(position_BK):
      return bias_of_table(table, query_position_BQ, position_BK, num_heads, coordinate=coordinate)

    bias_BHQJK = jnp.moveaxis(jax.lax.map(of_tile, position_JBK), 0, 3)
    return bias_BHQJK.reshape(*bias_BHQJK.shape[:3], -1)[..., :num_keys]
  shape = (query_position_BQ.shape[1], num_keys)
  numbers_1HQK = jax.tree.map(lambda number_H: _spread(number_H, shape), table.coordinate)
  x_BHQK = coordinate(
    numbers_1HQK, query_position_BQ[:, None, :, None], key_position_BK[:, None, None, :]
  )
  return bias(x_BHQK, table)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _spread(number_H, shape):
  """Returns number_1HQK, [Q, K] the shape. The gradient is a product with ones: XLA's sum is slow.

  On CPU that is; the gradient of FIRE's x takes a third of the time.
  """
  return jnp.broadcast_to(number_H[None, :, None, None], (1, *number_H.shape, *shape))


def _spread_backward(shape, _, d_1HQK):
  d_HI = d_1HQK[0].reshape(d_1HQK.shape[1], -1)
  return (jnp.matmul(d_HI, jnp.ones(d_HI.shape[1]), precision=HIGHEST),)


_spread.defvjp(lambda number_H, shape: (_spread(number_H, shape), None), _spread_backward)


def bias_of_params(
  params: base.Params,
  query_position_BQ: jax.Array,
  key_position_BK: jax.Array,
  num_heads: int,
  *,
  table: Callable[[base.Params, int], Table],
  coordinate: Callable[[Any, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
  """Returns bias_BHQK, float32: the `Encoding.bias` of an encoding that a table defines."""
  positions = query_position_BQ, key_position_BK
  return bias_of_table(table(params, num_heads), *positions, num_heads, coordinate=coordinate)


@functools.lru_cache(maxsize=256)
def tabulated(encoding: base.Encoding) -> base.Encoding:
  """Returns an encoding with the bias of another, whose parameters are that one's table.

  So what is asked for many tiles or many steps is made once. It neither rotates nor embeds, for
  which there might be parameters of their own.
  """
  table = encoding.table
  assert table is not None and encoding.coordinate is not None

  def init(rng, *, num_heads, head_dim, d_model):
    params = encoding.init(rng, num_heads=num_heads, head_dim=head_dim, d_model=d_model)
    return table(params, num_heads)

  return encoding._replace(
    init=init,
    rotate=None,
    embed=None,
    bias=functools.partial(bias_of_table, coordinate=encoding.coordinate),
    table=lambda table, num_heads: table,
  )


def bias(x_BHQK: jax.Array, table: Table) -> jax.Array:
  """Returns b_h(x) as bias_BHQK, float32; ends and anchors have no gradient.

  Args:
    x_BHQK: H may be 1: heads then share it, as they must where there are breakpoints.
    table: of all heads.
  """
  if table.lower_Z is None:
    # Twice negated, so that XLA fuses it apart from the logits: on CPU attention under Kerple's
    # logarithm takes 0.85 of the time that it otherwise does.
    penalty_1HQK: Any = _spread(-table.slope_ZH[0], x_BHQK.shape[2:])
    return -(penalty_1HQK * x_BHQK)
  return _bias(x_BHQK, *table[1:])


@jax.custom_vjp
def _bias(x_B1QK, lower_Z, anchor_Z, slope_ZH, value_ZH):
  first, end = _segments(x_B1QK, lower_Z)

  def line(z):
    slope_1H11, value_1H11 = slope_ZH[z][None, :, None, None], value_ZH[z][None, :, None, None]
    return value_1H11 + slope_1H11 * (x_B1QK - anchor_Z[z])

  def above(z, bias_BHQK):
    return jnp.where(x_B1QK > lower_Z[z], line(z), bias_BHQK)

  return jax.lax.fori_loop(first + 1, end, above, line(first))


def _segments(x_B1QK, lower_Z):
  """Returns the first segment in which an x lies, and one past the last."""
  return (lower_Z < x_B1QK.min()).sum() - 1, (lower_Z < x_B1QK.max()).sum()


def _forward(*arguments):
  return _bias(*arguments), arguments


def _backward(saved, d_bias_BHQK):
  """Sums over the pairs of each segment in the tile.

  As products of a plain matrix and a vector: on CPU one product with two columns takes three times
  as long, XLA's own sums many times.
  """
  x_B1QK, lower_Z, anchor_Z, slope_ZH, value_ZH = saved
  first, end = _segments(x_B1QK, lower_Z)
  upper_Z = jnp.append(lower_Z[1:], jnp.inf)
  d_bias_BHI = d_bias_BHQK.reshape(*d_bias_BHQK.shape[:2], -1)  # I: pairs of query and key
  x_BI = x_B1QK.reshape(x_B1QK.shape[0], -1)

  def add_segment(z, sums):
    d_x_BI, d_table_ZHP = sums
    in_BI = (x_BI > lower_Z[z]) & (x_BI <= upper_Z[z])
    within_BI = jnp.where(in_BI, x_BI - anchor_Z[z], 0.0)
    sums_BHP = jnp.stack(
      [
        jnp.einsum('BHI,BI->BH', d_bias_BHI, factor_BI, precision=HIGHEST)
        for factor_BI in (within_BI, in_BI.astype(jnp.float32))
      ],
      axis=2,
    )
    of_x_BI = jnp.matmul(slope_ZH[z][None, None], d_bias_BHI, precision=HIGHEST)[:, 0]
    d_x_BI = jnp.where(in_BI, of_x_BI, d_x_BI)
    return d_x_BI, d_table_ZHP.at[z].set(sums_BHP.sum(axis=0))

  start = (jnp.zeros_like(x_BI), jnp.zeros((*slope_ZH.shape, 2)))
  d_x_BI, d_table_ZHP = jax.lax.fori_loop(first, end, add_segment, start)
  none = (jnp.zeros_like(lower_Z), jnp.zeros_like(anchor_Z))
  return d_x_BI.reshape(x_B1QK.shape), *none, d_table_ZHP[..., 0], d_table_ZHP[..., 1]


_bias.defvjp(_forward, _backward)
