"""Piecewise linear functions of one number, a head each: the form that learned biases share.

A ReLU network from one number x to H outputs is, exactly, a slope and an intercept on each segment
between the zeros of its units; T5's buckets are segments of slope 0. In this form a tile of logits
costs a multiplication and an addition, and more only for the breakpoints that fall inside the tile:
FIRE's logarithm makes most tiles span almost no x. Gradients of slopes and intercepts are sums over
the tile, and ordinary differentiation of the small table takes them back to the network.
"""

# Not strict, as its neighbours are: custom_vjp and fori_loop carry no types.
# pyright: basic

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lex_fire.encodings import base

HIGHEST = jax.lax.Precision.HIGHEST


class Table(NamedTuple):
  """b_h(x) = slope_zh x + intercept_zh on segment z, the last whose lower end is below x.

  Attributes:
    coordinate: parameters of the encoding's x, a pytree.
    lower_Z: lower ends of the segments, rising from -inf; +inf for segments that are not there.
    slope_ZH: nats.
    intercept_ZH: nats.
  """

  coordinate: Any
  lower_Z: jax.Array
  slope_ZH: jax.Array
  intercept_ZH: jax.Array


def of_network(params: base.Params) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns lower_Z, slope_ZH and intercept_ZH of a ReLU network on 0 <= x <= 1.

  Layer by layer: on each segment so far every unit is linear, and its zero, if it lies inside, cuts
  the segment. Breakpoints have no gradient and need none, as the function is continuous there.

  Args:
    params: as `fire` has them: w_in_W and b_in_W, maybe w_hidden_NWX and b_hidden_NX, w_out_WH and
      b_out_H.
  """
  lower_Z = jnp.full(1, -jnp.inf)
  slope_ZW, intercept_ZW = params['w_in_W'][None], params['b_in_W'][None]
  layers = list(zip(params.get('w_hidden_NWX', ()), params.get('b_hidden_NX', ()), strict=True))
  for w_WX, b_X in (*layers, (params['w_out_WH'], params['b_out_H'])):
    lower_Z, slope_ZW, intercept_ZW = _rectified(lower_Z, slope_ZW, intercept_ZW)
    slope_ZW = jnp.matmul(slope_ZW, w_WX, precision=HIGHEST)
    intercept_ZW = jnp.matmul(intercept_ZW, w_WX, precision=HIGHEST) + b_X[None]
  return lower_Z, slope_ZW, intercept_ZW


def _rectified(lower_Z, slope_ZW, intercept_ZW):
  """Returns the units after their ReLU, on segments cut at the zeros of each."""
  upper_Z = jnp.append(lower_Z[1:], jnp.inf)
  steep_ZW = jnp.where(slope_ZW == 0, 1.0, slope_ZW)
  zero_ZW = jax.lax.stop_gradient(-intercept_ZW / steep_ZW)
  low_Z1, high_Z1 = jnp.maximum(lower_Z, 0.0)[:, None], jnp.minimum(upper_Z, 1.0)[:, None]
  inside_ZW = (slope_ZW != 0) & (low_Z1 < zero_ZW) & (zero_ZW < high_Z1)
  cuts_Z = jnp.where(inside_ZW, zero_ZW, jnp.inf).ravel()
  finer_Z = jnp.concatenate([lower_Z[:1], jnp.sort(jnp.concatenate([lower_Z[1:], cuts_Z]))])
  # A unit is on or off in all of a segment: where it is, its middle says.
  end_Z = jnp.minimum(jnp.append(finer_Z[1:], jnp.inf), 1.0)
  middle_Z = (jnp.clip(finer_Z, 0.0, 1.0) + end_Z) / 2
  parent_Z = jnp.searchsorted(lower_Z, middle_Z) - 1
  slope_ZW, intercept_ZW = slope_ZW[parent_Z], intercept_ZW[parent_Z]
  on_ZW = jax.lax.stop_gradient(slope_ZW * middle_Z[:, None] + intercept_ZW) > 0
  return finer_Z, jnp.where(on_ZW, slope_ZW, 0.0), jnp.where(on_ZW, intercept_ZW, 0.0)


def bias(x_BQK: jax.Array, table: Table) -> jax.Array:
  """Returns b_h(x) as bias_BHQK, float32; lower ends have no gradient."""
  return _bias(x_BQK, table.lower_Z, table.slope_ZH, table.intercept_ZH)


@jax.custom_vjp
def _bias(x_BQK, lower_Z, slope_ZH, intercept_ZH):
  first, end = _segments(x_BQK, lower_Z)
  x_B1QK = x_BQK[:, None]

  def line(slope_H, intercept_H):
    return slope_H[None, :, None, None] * x_B1QK + intercept_H[None, :, None, None]

  def add_breakpoint(z, bias_BHQK):
    more_BHQK = line(slope_ZH[z] - slope_ZH[z - 1], intercept_ZH[z] - intercept_ZH[z - 1])
    return bias_BHQK + jnp.where(x_B1QK > lower_Z[z], more_BHQK, 0.0)

  return jax.lax.fori_loop(
    first + 1, end, add_breakpoint, line(slope_ZH[first], intercept_ZH[first])
  )


def _segments(x_BQK, lower_Z):
  """Returns the first segment in which an x lies, and one past the last."""
  return (lower_Z < x_BQK.min()).sum() - 1, (lower_Z < x_BQK.max()).sum()


def _forward(*arguments):
  return _bias(*arguments), arguments


def _backward(saved, d_bias_BHQK):
  """Sums over the part of the tile above each breakpoint.

  As products of plain matrices, which on CPU take a tenth of the time of the same sums as einsums.
  """
  x_BQK, lower_Z, slope_ZH, _ = saved
  first, end = _segments(x_BQK, lower_Z)
  d_bias_BHI = d_bias_BHQK.reshape(*d_bias_BHQK.shape[:2], -1)  # I: pairs of query and key
  x_BI = x_BQK.reshape(x_BQK.shape[0], -1)
  factor_BIP = jnp.stack([x_BI, jnp.ones_like(x_BI)], axis=2)

  def above(lower, slope_H):
    """Returns the sums of d_bias x and d_bias above a breakpoint, and d_x for a slope there."""
    above_BI = x_BI > lower
    factors_BIP = jnp.where(above_BI[:, :, None], factor_BIP, 0.0)
    sums_BHP = jnp.matmul(d_bias_BHI, factors_BIP, precision=HIGHEST)
    d_x_BI = jnp.matmul(slope_H[None, None], d_bias_BHI, precision=HIGHEST)[:, 0]
    return sums_BHP.sum(axis=0), jnp.where(above_BI, d_x_BI, 0.0)

  def add_breakpoint(z, sums):
    d_x_BI, d_table_ZHP = sums
    sums_HP, more_BI = above(lower_Z[z], slope_ZH[z] - slope_ZH[z - 1])
    return d_x_BI + more_BI, d_table_ZHP.at[z].add(sums_HP).at[z - 1].add(-sums_HP)

  sums_HP, d_x_BI = above(-jnp.inf, slope_ZH[first])
  d_table_ZHP = jnp.zeros((*slope_ZH.shape, 2)).at[first].set(sums_HP)
  d_x_BI, d_table_ZHP = jax.lax.fori_loop(first + 1, end, add_breakpoint, (d_x_BI, d_table_ZHP))
  d_x_BQK = d_x_BI.reshape(x_BQK.shape)
  return d_x_BQK, jnp.zeros_like(lower_Z), d_table_ZHP[..., 0], d_table_ZHP[..., 1]


_bias.defvjp(_forward, _backward)
