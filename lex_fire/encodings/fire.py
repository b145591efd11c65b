"""FIRE: a learned function of the log-distance, normalised by the query's position.

Li et al. 2023, arXiv:2310.04418, section 3:

    b_h(i, j) = f_h( psi(i - j) / psi(max(L, i)) ),   psi(x) = log(c x + 1)

Every input to f lies in [0, 1] at every length: a longer sequence is interpolated, never
extrapolated.
"""

import functools

import jax
import jax.numpy as jnp

from lex_fire import errors
from lex_fire.encodings import base

EPSILON = 1e-6  # added to the denominator, as in the paper's appendix


def _uniform(rng: jax.Array, fan_in: int, shape: tuple[int, ...]) -> jax.Array:
  """As the paper's PyTorch code, whose linear layers start in +-1/sqrt(fan_in), biases too."""
  bound = fan_in**-0.5
  return jax.random.uniform(rng, shape, jnp.float32, -bound, bound)


def _init(
  rng: jax.Array,
  *,
  num_heads: int,
  head_dim: int,
  d_model: int,
  hidden_layers: int,
  width: int,
  c: float,
) -> base.Params:
  del head_dim, d_model
  keys = jax.random.split(rng, 6)
  params = {
    'c': jnp.float32(c),
    'length_multiplier': jnp.float32(1.0),
    'w_in_W': _uniform(keys[0], 1, (width,)),
    'b_in_W': _uniform(keys[1], 1, (width,)),
    'w_out_WH': _uniform(keys[2], width, (width, num_heads)),
    'b_out_H': _uniform(keys[3], width, (num_heads,)),
  }
  if hidden_layers == 2:
    params['w_hidden_WX'] = _uniform(keys[4], width, (width, width))
    params['b_hidden_X'] = _uniform(keys[5], width, (width,))
  return params


def interpolation(
  params: base.Params,
  query_position_BQ: jax.Array,
  key_position_BK: jax.Array,
  *,
  threshold: float,
) -> jax.Array:
  """Returns x_BQK in [0, 1]: psi(|i - j|) / (psi(max(L, i, j)) + eps), float32.

  For j <= i it is the paper's; for keys after the query, which the causal mask hides, it stays
  finite and so does its gradient. psi is increasing, so psi of a maximum is the maximum of psi.
  """
  c = jnp.abs(params['c'])
  length = jnp.abs(params['length_multiplier']) * threshold

  def psi(x: jax.Array) -> jax.Array:
    return jnp.log1p(c * x)

  def norm(position: jax.Array) -> jax.Array:
    return psi(jnp.maximum(position.astype(jnp.float32), length)) + EPSILON

  distance_BQK = jnp.abs(base.distance(query_position_BQ, key_position_BK)).astype(jnp.float32)
  norm_BQ, norm_BK = norm(query_position_BQ), norm(key_position_BK)
  return psi(distance_BQK) / jnp.maximum(norm_BQ[:, :, None], norm_BK[:, None, :])


def mlp(params: base.Params, x_BQK: jax.Array) -> jax.Array:
  """Returns f(x) as bias_BHQK: an MLP from one scalar to H outputs with one or two ReLU layers.

  Products are in full float32 (accelerators round to bfloat16 by default, which would blur x). The
  first layer's bias enters by a column of ones: as sums, its gradients took ten times longer on
  CPU.
  """
  highest = jax.lax.Precision.HIGHEST
  input_ZP = jnp.stack([x_BQK.ravel(), jax.lax.full((x_BQK.size,), 1, x_BQK.dtype)], axis=1)
  hidden_ZW = jnp.matmul(
    input_ZP, jnp.stack([params['w_in_W'], params['b_in_W']]), precision=highest
  )
  hidden_ZW = jax.nn.relu(hidden_ZW)
  if 'w_hidden_WX' in params:
    hidden_ZX = jnp.matmul(hidden_ZW, params['w_hidden_WX'], precision=highest)
    hidden_ZW = jax.nn.relu(hidden_ZX + params['b_hidden_X'][None])
  bias_ZH = jnp.matmul(hidden_ZW, params['w_out_WH'], precision=highest) + params['b_out_H'][None]
  return jnp.moveaxis(bias_ZH.reshape(*x_BQK.shape, -1), -1, 1)


def _bias(
  params: base.Params,
  query_position_BQ: jax.Array,
  key_position_BK: jax.Array,
  num_heads: int,
  *,
  threshold: float,
) -> jax.Array:
  del num_heads
  x_BQK = interpolation(params, query_position_BQ, key_position_BK, threshold=threshold)
  return mlp(params, x_BQK)


def fire(
  hidden_layers: int = 1,
  width: int = 32,
  threshold: float = 512.0,
  c: float = 0.1,
  shared: bool = False,
) -> base.Encoding:
  """FIRE, functional interpolation for relative positions.

  Args:
    hidden_layers: 1 as in the paper's appendix code, or 2 as in its section 3.
    width: units of a hidden layer (32 in the paper).
    threshold: initial L [tokens]; learned through a multiplier that starts at 1, used as |.|.
    c: initial c of psi, > 0; learned, used as |c|.
    shared: one set of parameters for all layers (FIRE-S) instead of one a layer.

  Raises:
    errors.UserError: for an option outside its range.
  """
  if hidden_layers not in (1, 2):
    raise errors.UserError(f'fire has 1 or 2 hidden layers, not {hidden_layers=}')
  if width < 1 or not threshold > 0 or not c > 0:
    raise errors.UserError(f'fire needs {width=}, {threshold=} and {c=} above 0')
  return base.Encoding(
    name='fire_s' if shared else 'fire',
    init=functools.partial(_init, hidden_layers=hidden_layers, width=width, c=c),
    bias=functools.partial(_bias, threshold=threshold),
    shared=shared,
    shift_invariant=False,
    learned=True,
  )
