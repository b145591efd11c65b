"""FIRE: a learned function of the log-distance, normalised by the query's position.

Li et al. 2023, arXiv:2310.04418, section 3:

    b_h(i, j) = f_h( psi(i - j) / psi(max(L, i)) ),   psi(x) = log(c x + 1)

Every input to f lies in [0, 1] at every length: a longer sequence is interpolated, never
extrapolated. The paper's ablations are options: another psi, no threshold L, the shape of f.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lex_fire import errors
from lex_fire.encodings import base, piecewise

EPSILON = 1e-6  # added to the denominator, as in the paper's appendix
INITIAL_C = 0.1
MOST_C = 1e9  # c times any position is far from float32's end
MOST_SEGMENTS = 2**14  # of a table; each holds a number a unit, so that 2 layers may have 127
MAX_EXPONENT = 4.0  # of any position, 2^31, this power is a float32


def _power(x: jax.Array, exponent: float) -> jax.Array:
  """Returns x^p, with gradient 0 at x = 0 where a root has none (an L learned down to 0)."""
  return jnp.where(x > 0, jnp.power(jnp.where(x > 0, x, 1.0), exponent), 0.0)


# psi of c x and of the exponent. Only the logarithm has a c: from the ratio of two powers it
# cancels.
PSI: dict[str, Callable[[jax.Array, float], jax.Array]] = {
  'log': lambda x, _: jnp.log1p(x),
  'sqrt': lambda x, _: _power(x, 0.5),
  'identity': lambda x, _: x,
  'power': _power,
}


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
  psi: str,
  threshold: float,
  c: float,
) -> base.Params:
  del head_dim, d_model
  keys = jax.random.split(rng, 6)
  params = {
    'w_in_W': _uniform(keys[0], 1, (width,)),
    'b_in_W': _uniform(keys[1], 1, (width,)),
    'w_out_WH': _uniform(keys[2], width, (width, num_heads)),
    'b_out_H': _uniform(keys[3], width, (num_heads,)),
  }
  if psi == 'log':
    params['c'] = jnp.float32(c)
  if threshold > 0:
    params['length_multiplier'] = jnp.float32(1.0)
  if hidden_layers > 1:
    more = hidden_layers - 1
    params['w_hidden_NWX'] = _uniform(keys[4], width, (more, width, width))
    params['b_hidden_NX'] = _uniform(keys[5], width, (more, width))
  return params


def interpolation(
  params: base.Params,
  i: jax.Array,
  j: jax.Array,
  *,
  psi: str,
  threshold: float,
  exponent: float = 1.0,
) -> jax.Array:
  """Returns x in [0, 1]: psi(|i - j|) / (psi(max(L, i, j)) + eps), float32, elementwise.

  For j <= i it is the paper's; for keys after the query, which the causal mask hides, it stays
  finite and so does its gradient. psi is increasing, so psi of a maximum is the maximum of psi.

  Args:
    params: of which c and length_multiplier are read; they broadcast with the positions.
    i: query positions, int32.
    j: key positions, int32; broadcasts with i.
    psi: see `fire`.
    threshold: likewise.
    exponent: likewise.
  """
  rate = functools.partial(_rate, params, psi=psi, threshold=threshold, exponent=exponent)
  # Divided for each position and not for each pair, of which there are many more.
  later = jnp.where(i >= j, rate(i), rate(j))
  return _of_distance(params, i, j, psi=psi, exponent=exponent) * later


def _of_distance(
  params: base.Params, i: jax.Array, j: jax.Array, *, psi: str, exponent: float
) -> jax.Array:
  """Returns psi(|i - j|)."""
  return _transform(params, jnp.abs((i - j).astype(jnp.float32)), psi, exponent)


def _rate(
  params: base.Params, position: jax.Array, *, psi: str, threshold: float, exponent: float
) -> jax.Array:
  """Returns 1 / (psi(max(L, position)) + eps)."""
  length = jnp.abs(params['length_multiplier']) * threshold if threshold > 0 else 0.0
  norm = _transform(params, jnp.maximum(position.astype(jnp.float32), length), psi, exponent)
  return 1 / (norm + EPSILON)


def _transform(params: base.Params, x: jax.Array, psi: str, exponent: float) -> jax.Array:
  c = jnp.abs(params['c']) if psi == 'log' else 1.0
  return PSI[psi](c * x, exponent)


def mlp(params: base.Params, x_BQK: jax.Array) -> jax.Array:
  """Returns f(x) as bias_BHQK: an MLP from one scalar to H outputs with ReLU layers.

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
  if 'w_hidden_NWX' in params:
    for w_WX, b_X in zip(params['w_hidden_NWX'], params['b_hidden_NX'], strict=True):
      hidden_ZX = jnp.matmul(hidden_ZW, w_WX, precision=highest)
      hidden_ZW = jax.nn.relu(hidden_ZX + b_X[None])
  bias_ZH = jnp.matmul(hidden_ZW, params['w_out_WH'], precision=highest) + params['b_out_H'][None]
  return jnp.moveaxis(bias_ZH.reshape(*x_BQK.shape, -1), -1, 1)


def _bias(
  params: base.Params,
  query_position_BQ: jax.Array,
  key_position_BK: jax.Array,
  num_heads: int,
  **options: Any,
) -> jax.Array:
  del num_heads
  i_BQ1, j_B1K = query_position_BQ[:, :, None], key_position_BK[:, None, :]
  return mlp(params, interpolation(params, i_BQ1, j_B1K, **options))


def _num_segments(hidden_layers: int, width: int) -> int:
  """Returns how many segments a table makes room for: each layer may cut every one at each unit."""
  return (width + 1) ** hidden_layers


def _table(params: base.Params, num_heads: int) -> piecewise.Table:
  del num_heads
  coordinate = {name: params[name][None] for name in ('c', 'length_multiplier') if name in params}
  return piecewise.of_network(params, coordinate)


def fire(
  hidden_layers: int = 1,
  width: int = 32,
  psi: str = 'log',
  threshold: float = 512.0,
  c: float = INITIAL_C,
  exponent: float = 1.0,
  shared: bool = False,
) -> base.Encoding:
  """FIRE, functional interpolation for relative positions.

  Args:
    hidden_layers: 1 as in the paper's appendix code, 2 as in its section 3, or more.
    width: units of a hidden layer (32 in the paper).
    psi: 'log', or in the paper's ablations 'sqrt' or 'identity', or in its theorem 3.1 'power'.
    threshold: initial L [tokens]; learned through a multiplier that starts at 1, used as |.|. 0 for
      no threshold and no multiplier: then every query's own position is the norm, as in the
      paper's ablation.
    c: initial c of the logarithm, > 0; learned, used as |c|. Another psi takes no c but the
      default.
    exponent: of the power, fixed, above 0 and at most 4. Another psi takes none but the default.
    shared: one set of parameters for all layers (FIRE-S) instead of one a layer.

  Raises:
    errors.UserError: for an option outside its range, or a c for a psi that has none.
  """
  if psi not in PSI:
    raise errors.UserError(f'unknown {psi=} of fire; known: {", ".join(PSI)}')
  if hidden_layers < 1 or width < 1 or not 0 < c <= MOST_C:
    raise errors.UserError(
      f'fire needs {hidden_layers=}, {width=} and {c=} above 0, c of at most {MOST_C:g}'
    )
  if not 0 <= threshold < math.inf:
    raise errors.UserError(f'fire needs a finite {threshold=} from 0 (none) up')
  if psi != 'log' and c != INITIAL_C:
    raise errors.UserError(f'fire with {psi=} has no c, but {c=} is given; leave it out')
  if not 0 < exponent <= MAX_EXPONENT:
    raise errors.UserError(f'fire needs {exponent=} above 0 and at most {MAX_EXPONENT}')
  if psi != 'power' and exponent != 1:
    raise errors.UserError(
      f'fire with {psi=} has no exponent, but {exponent=} is given; leave it out'
    )
  coordinate = {'psi': psi, 'threshold': threshold, 'exponent': exponent}
  return base.Encoding(
    name='fire_s' if shared else 'fire',
    init=functools.partial(
      _init, hidden_layers=hidden_layers, width=width, psi=psi, threshold=threshold, c=c
    ),
    bias=functools.partial(_bias, **coordinate),
    table=_table if _num_segments(hidden_layers, width) <= MOST_SEGMENTS else None,
    coordinate=functools.partial(interpolation, **coordinate),
    factors=(
      functools.partial(_of_distance, psi=psi, exponent=exponent),
      functools.partial(_rate, **coordinate),
    ),
    shared=shared,
    smooth=True,
    shift_invariant=False,
    learned=True,
  )
