"""FIRE's theorem as code: a FIRE encoding that equals a given bias up to a chosen length.

Li et al. 2023, arXiv:2310.04418, section 3, theorem 3.1: the biases of T5, ALiBi, Kerple and
Sandwich are FIRE's for a suitable psi, threshold and f. Up to a threshold L,

    b_h(i, j) = f_h( psi(i - j) / psi(L) )

is a function of the distance alone, and f can be any such function: a ReLU network is linear in
pieces, and a piece from each distance to the next meets every bias. The better psi fits, the fewer
are needed: one for ALiBi by the identity and, if their heads share r2, for Kerple-log by the
logarithm and for Kerple-power by the power. Heads share psi and the pieces, so that heads of
different r2 take more. T5 takes one or two at each edge of its buckets, and Sandwich, which turns
at every token, one a token.

Departure: the theorem's f may have any activation and is exact; here it has ReLUs, in float32. So
it is an error that is promised, and it is measured at every distance before anything is returned.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lex_fire import errors
from lex_fire.encodings import base, fire

SHARE = 0.8  # of the allowed error is for the distances inside a piece, the rest for float32
TURN = 2.0**20  # times the tolerance, float32 still rounds to a small part of it
NUM_FITS = 5  # curves of a kind tried, from the least to the most curved head's
MAX_LOG_C = 14.0  # c is sought from e^-14 to e^14
KEYS_AT_ONCE = 4096  # of a bias that is measured, so that memory stays bounded


class Representation(NamedTuple):
  """FIRE that equals a given bias.

  Attributes:
    encoding: to be trained, evaluated and fused as any other FIRE.
    params: its parameters, of the structure that its `init` makes.
    options: its options: `encodings.get('fire', **options)`, or a config's.
    error: greatest difference from the given bias, of all distances and heads [nats], as
      `encoding.bias` computes it here.
  """

  encoding: base.Encoding
  params: base.Params
  options: dict[str, Any]
  error: float


class _Curve(NamedTuple):
  """A psi, its x at each distance, and the distances at which the pieces that it takes end."""

  options: dict[str, Any]
  x_Z: np.ndarray
  end_W: np.ndarray


def as_fire(
  encoding: base.Encoding,
  params: base.Params,
  num_heads: int,
  length: int,
  tolerance: float = 1e-4,
  relative_tolerance: float = 1e-6,
  max_width: int = 1024,
) -> Representation:
  """Returns FIRE equal to an encoding's bias in sequences of up to `length` tokens.

  For keys after the query too, if the encoding tells them apart. Past the threshold, which is at
  least the length, it interpolates as FIRE does. Layers of one model must share their options: make
  their biases the heads of one table for `table_as_fire`, which share all but w_out_WH and b_out_H.

  >>> from lex_fire import encodings
  >>> found = as_fire(encodings.get('alibi'), {}, num_heads=4, length=100)
  >>> found.options['psi'], found.error < 1e-4
  ('identity', True)

  Args:
    encoding: one whose bias is a function of distance: ALiBi, T5, Kerple, Sandwich.
    params: its parameters.
    num_heads: heads of its bias.
    length: of the longest sequence, whose positions count from 0 [tokens].
    tolerance: as for `table_as_fire`; so are those that follow.
    relative_tolerance: of the bias.
    max_width: of a hidden layer.

  Raises:
    errors.UserError: for another kind of encoding, a length below 1, or what `table_as_fire`
      refuses.
  """
  if encoding.bias is None or not encoding.shift_invariant:
    raise errors.UserError(
      f'{encoding.name!r} has no bias that is a function of distance, which fire could equal; '
      f'alibi, t5, kerple_log, kerple_power and sandwich have'
    )
  if length < 1 or num_heads < 1:
    raise errors.UserError(f'fire equals a bias for {length=} and {num_heads=} of at least 1')
  bias_HZ = _at_distances(encoding, params, num_heads, np.arange(length))
  found = table_as_fire(bias_HZ, tolerance, relative_tolerance, max_width)
  if encoding.bidirectional:
    after_HZ = _at_distances(encoding, params, num_heads, -np.arange(length))
    error_HZ = np.abs(after_HZ - bias_HZ)
    if (error_HZ > tolerance + relative_tolerance * np.abs(bias_HZ)).any():
      raise errors.UserError(
        f'the bias of {encoding.name!r} at one distance differs by up to {error_HZ.max():.2g} nats '
        f'between keys before and after the query, as that of fire cannot; make it causal'
      )
  return found


def table_as_fire(
  bias_HZ: np.ndarray,
  tolerance: float = 1e-4,
  relative_tolerance: float = 1e-6,
  max_width: int = 1024,
) -> Representation:
  """Returns FIRE equal to a table of biases, any function of distance a head.

  Of several psi it takes the one with the fewest pieces, as units of one hidden layer, or of two,
  which are slower but hardly round, where one rounds too much.

  Args:
    bias_HZ: nats; column z is distance z, and there are as many as the longest sequence has tokens.
    tolerance: allowed error at every distance and head [nats].
    relative_tolerance: times |bias|, allowed beside it; by default float32's own rounding of a few
      operations. Kerple-power reaches millions of nats at long distances, where with heads of
      different r2 a millionth takes a piece for almost every distance: allow 1e-4 of them there.
    max_width: units that a hidden layer may have.

  Returns:
    FIRE, its parameters, its options, and the error that it comes to.

  Raises:
    errors.UserError: for what is no table of finite numbers, for a tolerance or width out of range,
      or for an error that so many units or float32 cannot keep.
  """
  bias_HZ = np.asarray(bias_HZ, np.float64)
  if bias_HZ.ndim != 2 or not bias_HZ.size or not np.isfinite(bias_HZ).all():
    raise errors.UserError(
      f'a table of biases has a row a head and a column a distance, all of them finite; one of '
      f'shape {bias_HZ.shape} with {(~np.isfinite(bias_HZ)).sum()} not finite is none'
    )
  if not 0 < tolerance < math.inf or not 0 <= relative_tolerance < math.inf or max_width < 1:
    raise errors.UserError(
      f'fire equals a bias to a finite {tolerance=} above 0 beside a finite {relative_tolerance=} '
      f'from 0 up, with {max_width=} of at least 1'
    )
  if bias_HZ.shape[1] == 1:
    bias_HZ = np.repeat(bias_HZ, 2, axis=1)  # a piece has two ends
  allowed_HZ = tolerance + relative_tolerance * np.abs(bias_HZ)
  curve = _curve(bias_HZ, SHARE * allowed_HZ, max_width)
  reached, last = curve.end_W[-1], bias_HZ.shape[1] - 1
  if reached < last:
    raise errors.UserError(
      f'fire with {max_width=} equals this bias to {tolerance=} and {relative_tolerance=} up to '
      f'distance {reached} of {last}; allow more of one of them'
    )
  least = math.inf
  for found, error_HZ in _networks(curve, bias_HZ, tolerance):
    if (error_HZ <= allowed_HZ).all():
      return found
    least = min(least, float((error_HZ / allowed_HZ).max()))
  raise errors.UserError(
    f'rounding to float32 takes fire {least:.2g} times as far from this bias as {tolerance=} and '
    f'{relative_tolerance=} allow; allow more of one of them'
  )


def _networks(
  curve: _Curve, bias_HZ: np.ndarray, tolerance: float
) -> Iterator[tuple[Representation, np.ndarray]]:
  """Yields the curve by one hidden layer and by two, run in float32, with its error_HZ."""
  distance_Z = np.arange(len(curve.x_Z))
  for network in (functools.partial(_kinks, turn=TURN * tolerance), _ramps):
    mlp = network(curve, bias_HZ)
    depth = 1 + len(mlp.get('w_hidden_NWX', ()))
    shape: dict[str, Any] = {'hidden_layers': depth, 'width': len(mlp['w_in_W'])}
    options = curve.options | shape
    encoding, params = fire.fire(**options), _scalars(options) | mlp
    error_HZ = np.abs(_at_distances(encoding, params, len(bias_HZ), distance_Z) - bias_HZ)
    yield Representation(encoding, params, options, float(error_HZ.max())), error_HZ


def _at_distances(
  encoding: base.Encoding, params: base.Params, num_heads: int, distance_Z: np.ndarray
) -> np.ndarray:
  """Returns bias_HZ in float64, of one query and keys that lie so far before it, or after."""
  assert encoding.bias is not None
  query = max(0, int(distance_Z.max()))
  query_position_BQ = jnp.int32(np.array([[query]]))
  parts: list[np.ndarray] = []
  for start in range(0, len(distance_Z), KEYS_AT_ONCE):
    distance_K = distance_Z[start : start + KEYS_AT_ONCE]
    key_position_BK = jnp.int32(query - distance_K)[None]
    bias_BHQK = encoding.bias(params, query_position_BQ, key_position_BK, num_heads)
    parts.append(np.asarray(bias_BHQK[0, :, 0], np.float64))
  return np.concatenate(parts, axis=1)


def _scalars(options: dict[str, Any]) -> base.Params:
  """Returns the parameters of x."""
  c = {'c': jnp.float32(options['c'])} if 'c' in options else {}
  return {'length_multiplier': jnp.float32(1.0), **c}


# The psi and the pieces


def _curve(bias_HZ: np.ndarray, allowed_HZ: np.ndarray, max_width: int) -> _Curve:
  """Returns the curve of the fewest pieces, or if `max_width` are too few, the one that goes on."""
  last = bias_HZ.shape[1] - 1
  threshold = float(1 << last.bit_length())  # float32 divides by a power of two exactly
  curves: list[_Curve] = []
  for psi in _psis(bias_HZ):
    options = psi | {'threshold': threshold}
    x_Z = _x(options, last)
    if (np.diff(x_Z) > 0).all():  # a steep psi rounds neighbouring distances to one x
      curve = _Curve(options, x_Z, _ends(x_Z, bias_HZ, allowed_HZ, max_width))
      curves.append(curve)
      max_width = len(curve.end_W) if curve.end_W[-1] == last else max_width
  return min(curves, key=lambda curve: (-curve.end_W[-1], len(curve.end_W)))


def _x(options: dict[str, Any], last: int) -> np.ndarray:
  """Returns FIRE's x_Z at distances 0 to `last`, rounded as FIRE rounds it."""
  how: dict[str, Any] = {name: value for name, value in options.items() if name != 'c'}
  position_BK = jnp.int32(np.arange(last, -1, -1))[None]
  x_BQK = fire.interpolation(
    _scalars(options), position_BK[:, :1, None], position_BK[:, None], **how
  )
  return np.asarray(x_BQK[0, 0], np.float64)


def _psis(bias_HZ: np.ndarray) -> list[dict[str, Any]]:
  """Returns options of psi to try, the simpler first."""
  c_H, exponent_H = _fits(bias_HZ)
  return [
    {'psi': 'identity'},
    {'psi': 'sqrt'},
    {'psi': 'log', 'c': fire.INITIAL_C},
    *({'psi': 'log', 'c': c} for c in _among(c_H)),
    *({'psi': 'power', 'exponent': exponent} for exponent in _among(exponent_H)),
  ]


def _among(number_H: np.ndarray) -> list[float]:
  """Returns numbers from the least to the greatest of some, in equal ratios."""
  if not number_H.size:
    return []
  least, greatest = float(np.min(number_H)), float(np.max(number_H))
  return [least * (greatest / least) ** (n / (NUM_FITS - 1)) for n in range(NUM_FITS)]


def _fits(bias_HZ: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the c of a logarithm, and the exponents of a power, through three values of each head.

  How much farther a head has come at the last distance than at its root tells both. Heads of which
  it tells nothing are left out.
  """
  last = bias_HZ.shape[1] - 1
  middle = math.isqrt(last)
  near_H: np.ndarray = bias_HZ[:, middle] - bias_HZ[:, 0]
  far_H: np.ndarray = bias_HZ[:, last] - bias_HZ[:, 0]
  grows_H = (np.abs(far_H) > np.abs(near_H)) & (near_H * far_H > 0)
  ratio_H: np.ndarray = far_H[grows_H] / near_H[grows_H]
  log_c_H: np.ndarray = np.zeros(len(ratio_H))
  for step in MAX_LOG_C * 0.5 ** np.arange(1, 60):
    found_H = np.log1p(np.exp(log_c_H) * last) / np.log1p(np.exp(log_c_H) * middle)
    log_c_H = log_c_H + step * np.sign(found_H - ratio_H)  # it falls as c rises
  exponent_H = np.log(ratio_H) / math.log(last / middle)
  return (
    np.exp(log_c_H[np.abs(log_c_H) < 0.99 * MAX_LOG_C]),
    exponent_H[exponent_H <= fire.MAX_EXPONENT],
  )


def _ends(
  x_Z: np.ndarray, bias_HZ: np.ndarray, allowed_HZ: np.ndarray, max_width: int
) -> np.ndarray:
  """Returns the distances end_W at which the pieces end, each as far as a straight line serves.

  The last is short of the last distance if `max_width` pieces do not get there.
  """

  def serves(start: int, end: int) -> bool:
    inside = slice(start + 1, end)
    part_Z = (x_Z[inside] - x_Z[start]) / (x_Z[end] - x_Z[start])
    rise_H1 = (bias_HZ[:, end] - bias_HZ[:, start])[:, None]
    line_HZ = bias_HZ[:, start][:, None] + rise_H1 * part_Z[None]
    return bool((np.abs(line_HZ - bias_HZ[:, inside]) <= allowed_HZ[:, inside]).all())

  last, ends = len(x_Z) - 1, [0]
  while ends[-1] < last and len(ends) <= max_width:
    start, end = ends[-1], ends[-1] + 1
    step, growing = 1, True  # in steps that double until one fails, and then halve
    while step:
      if end + step <= last and serves(start, end + step):
        end += step
      else:
        growing = False
      step = 2 * step if growing else step // 2
    ends.append(end)
  return np.array(ends[1:])


# The networks


def _kinks(curve: _Curve, bias_HZ: np.ndarray, turn: float) -> base.Params:
  """Returns one hidden layer: a unit is 0 up to one end of its piece and rises from there.

  It may rise with x or against it. What is steep at small x and flat at large, as most biases are,
  is better made of units that rise against it: at large x they are 0, where others would add great
  numbers that cancel. Great biases, which grow with x, are better made of units that rise with it.
  So units turn where a bias exceeds `turn`; and at the last piece, for what is linear in psi to be
  so up to the threshold.
  """
  knots = np.append(0, curve.end_W)
  x_W, bias_HW = curve.x_Z[knots], bias_HZ[:, knots]
  beyond_W = np.append((np.abs(bias_HW[:, :-1]) > turn).any(axis=0), True)
  pivot = max(0, int(np.argmax(beyond_W)) - 1)
  sign_W = np.repeat([1.0, -1.0], [len(x_W) - 1 - pivot, pivot])
  start_W = np.append(x_W[pivot:-1], x_W[pivot:0:-1])
  ahead_WH = _slope_changes(x_W[pivot:], bias_HW[:, pivot:])
  back_WH = _slope_changes(-x_W[pivot::-1], bias_HW[:, pivot::-1])
  return {
    'w_in_W': jnp.float32(sign_W),
    'b_in_W': jnp.float32(-sign_W * start_W),
    'w_out_WH': jnp.float32(np.concatenate([ahead_WH, back_WH])),
    'b_out_H': jnp.float32(bias_HW[:, pivot]),
  }


def _slope_changes(x_W: np.ndarray, bias_HW: np.ndarray) -> np.ndarray:
  """Returns change_WH, of the slope at the start of each piece."""
  slope_WH = (np.diff(bias_HW) / np.diff(x_W)[None]).T
  return np.diff(slope_WH, axis=0, prepend=np.zeros((1, len(bias_HW))))


def _ramps(curve: _Curve, bias_HZ: np.ndarray) -> base.Params:
  """Returns two hidden layers: a unit is 0 before its piece, 1 behind it, and rises inside.

  1 - relu(1 - relu(.)) of what falls to 0 there: nothing large cancels, whatever the slope. Between
  two neighbouring distances it rises in the middle half only, and is exact at both.
  """
  start_W = np.append(0, curve.end_W[:-1])
  rise_WH = (bias_HZ[:, curve.end_W] - bias_HZ[:, start_W]).T
  low_W, high_W = curve.x_Z[start_W], curve.x_Z[curve.end_W]
  margin_W = np.where(curve.end_W - start_W == 1, (high_W - low_W) / 4, 0.0)
  low_W, high_W = low_W + margin_W, high_W - margin_W
  rises_W = (rise_WH != 0).any(axis=1) | (start_W == 0)  # the first, so that there is one
  steep_W = 1 / (high_W - low_W)[rises_W]
  return {
    'w_in_W': jnp.float32(-steep_W),
    'b_in_W': jnp.float32(steep_W * high_W[rises_W]),
    'w_hidden_NWX': jnp.float32(-np.eye(len(steep_W)))[None],
    'b_hidden_NX': jnp.float32(np.ones((1, len(steep_W)))),
    'w_out_WH': jnp.float32(rise_WH[rises_W]),
    'b_out_H': jnp.float32(bias_HZ[:, 0]),
  }
