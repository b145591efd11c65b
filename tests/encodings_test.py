"""Every encoding against its paper's oracle, and the laws that its `Encoding` declares."""

import decimal
import functools
import inspect
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from lex_fire import encodings, errors
from lex_fire.encodings import alibi, base, checks, fire, kerple, ntk, rotary, t5, yarn

GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'encodings.txt'
NUM_HEADS, HEAD_DIM = 6, 8
D_MODEL = NUM_HEADS * HEAD_DIM

# Options worth a second look; the defaults of every registered name come by themselves.
VARIANTS = {
  'fire 2 layers': ('fire', {'hidden_layers': 2}),
  'fire 3 layers': ('fire', {'hidden_layers': 3, 'width': 8}),
  'fire narrow': ('fire', {'width': 4, 'threshold': 64.0, 'c': 1.0}),
  'fire square root': ('fire', {'psi': 'sqrt'}),
  'fire identity': ('fire', {'psi': 'identity'}),
  'fire power': ('fire', {'psi': 'power', 'exponent': 1.6}),
  'fire without threshold': ('fire', {'threshold': 0.0}),
  'fire square root without threshold': ('fire', {'psi': 'sqrt', 'threshold': 0.0}),
  'rope interleaved': ('rope', {'pairing': 'interleaved', 'base_period': 500.0}),
  'rope_pi interleaved': ('rope_pi', {'pairing': 'interleaved', 'scale': 16.0}),
  'ntk interleaved': ('ntk', {'pairing': 'interleaved', 'scale': 3.5}),
  'dynamic_ntk interleaved': ('dynamic_ntk', {'pairing': 'interleaved', 'train_length': 7}),
  'yarn interleaved': (
    'yarn',
    {'pairing': 'interleaved', 'scale': 32.0, 'train_length': 1000, 'base_period': 500.0},
  ),
  'yarn as published': ('yarn', {'ramp': 'code'}),
  'yarn as published, in one step': ('yarn', {'ramp': 'code', 'beta_fast': 3.0, 'beta_slow': 2.9}),
  'xpos halves': ('xpos', {'pairing': 'halves', 'gamma': 0.2, 'scale_base': 100.0}),
  'sandwich short': ('sandwich', {'num_terms': 3, 'd_bar': 4, 'compression': 2.5}),
  't5 8 buckets': ('t5', {'num_buckets': 8, 'max_distance': 64}),
  't5 bidirectional': ('t5', {'bidirectional': True}),
  't5 bidirectional 12 buckets': (
    't5',
    {'num_buckets': 12, 'max_distance': 40, 'bidirectional': True},
  ),
  'learned 64': ('learned', {'max_length': 64}),
  'learned 64 clamped': ('learned', {'max_length': 64, 'clamp': True}),
}
CASES = {name: (name, {}) for name in encodings.ENCODINGS} | VARIANTS
every_case = pytest.mark.parametrize('case', CASES)

# Rows of positions: training length 512, and 64 times that.
WIDE = (0, 1, 2, 15, 16, 100, 127, 128, 511, 512, 513, 2000, 32_768, 500_000, 999_999, 1_000_000)
POSITIONS = {
  'below': range(16),
  'at the training length': range(505, 521),
  '64 times past it': range(32_760, 32_776),
  'a million': range(1_000_000, 1_000_016),
  'packed': (*range(7), *range(4), *range(5)),
  'wide': WIDE,
}


@functools.cache
def make(case):
  """Returns the encoding of a case, its parameters moved off any round value, and its options."""
  name, options = CASES[case]
  encoding = encodings.get(name, **options)
  params = encoding.init(jax.random.key(1), num_heads=NUM_HEADS, head_dim=HEAD_DIM, d_model=D_MODEL)
  if 'length_multiplier' in params:
    params['length_multiplier'] = jnp.float32(0.9)
  return encoding, params, options


def positions(encoding):
  """Returns position_BL: the rows of POSITIONS, wrapped where an encoding ends."""
  position_BL = np.array(list(map(list, POSITIONS.values())), np.int32)
  return position_BL if encoding.max_length is None else position_BL % encoding.max_length


def tokens(length, seed=0):
  """Returns x_query_BLD and x_key_BLD, a row for each of POSITIONS."""
  rng = np.random.default_rng(seed)
  return rng.normal(size=(2, len(POSITIONS), length, D_MODEL)).astype(np.float32) * 0.5


def heads(encoding, params, x_BLD, position_BL):
  """Queries or keys that are their tokens' own channels, embedded and rotated."""
  if encoding.embed is not None:
    x_BLD = x_BLD + encoding.embed(params, position_BL, D_MODEL)
  x_BLHC = x_BLD.reshape(*x_BLD.shape[:2], NUM_HEADS, HEAD_DIM)
  return x_BLHC if encoding.rotate is None else encoding.rotate(params, x_BLHC, position_BL)


def logits(encoding, params, x_query_BQD, x_key_BKD, query_position_BQ, key_position_BK):
  """The formula in Encoding's docstring, of `heads`."""
  query_BQHC = heads(encoding, params, x_query_BQD, query_position_BQ)
  key_BKHC = heads(encoding, params, x_key_BKD, key_position_BK)
  where = query_position_BQ, key_position_BK
  return logits_of_heads(encoding, params, query_BQHC, key_BKHC, *where)


def logits_of_heads(encoding, params, query_BQHC, key_BKHC, query_position_BQ, key_position_BK):
  """The rest of that formula.

  A decay grows for keys after the query, which a causal mask keeps out of sight: held at 1 there.
  """
  distance_BQK = query_position_BQ[:, :, None] - key_position_BK[:, None, :]
  rate_C = np.zeros(HEAD_DIM) if encoding.log_decay is None else encoding.log_decay(HEAD_DIM)
  decay_BQKC = jnp.exp(jnp.maximum(distance_BQK, 0)[..., None] * rate_C[None, None, None])
  logits_BHQK = jnp.einsum('BQHC,BKHC,BQKC->BHQK', query_BQHC, key_BKHC, decay_BQKC)
  logits_BHQK /= HEAD_DIM**0.5
  if encoding.bias is not None:
    logits_BHQK += encoding.bias(params, query_position_BQ, key_position_BK, NUM_HEADS)
  return logits_BHQK


def expected_logits(case, params, x_query_BQD, x_key_BKD, position_BL):
  """The oracle's logits of the same tokens; 0 for keys after the query."""
  name, options = CASES[case]
  params = {key: np.float64(value) for key, value in params.items()}

  def embedded(x_BLD):
    x_BLD = oracles.embedded(name, params, x_BLD, position_BL, **options)
    return x_BLD.reshape(*x_BLD.shape[:2], NUM_HEADS, HEAD_DIM)

  return oracles.logits(
    name,
    params,
    embedded(x_query_BQD),
    embedded(x_key_BKD),
    position_BL,
    position_BL,
    only_BQK=position_BL[:, None] <= position_BL[:, :, None],
    **options,
  )


def bias_alone(case, positions_Q, positions_K):
  """Returns (the library's bias_HQK, the oracle's) for one row of positions."""
  encoding, params, options = make(case)
  bias_BHQK = encoding.bias(
    params, np.int32(positions_Q)[None], np.int32(positions_K)[None], NUM_HEADS
  )
  params = {key: np.float64(value) for key, value in params.items()}
  oracle = oracles.ORACLES[CASES[case][0]].bias
  rows = [[oracle(params, i, j, NUM_HEADS, **options) for j in positions_K] for i in positions_Q]
  return np.array(bias_BHQK[0]), np.moveaxis(np.array(rows), 2, 0)


def error(found, expected):
  """Returns |found - expected|; of values above 4 in proportion, as that is how floats round."""
  return np.abs(found - expected) / np.maximum(1, np.abs(expected) / 4)


def cases_where(holds):
  return pytest.mark.parametrize('case', [case for case in CASES if holds(*CASES[case])])


with_bias = cases_where(lambda name, options: encodings.get(name, **options).bias is not None)
with_threshold = cases_where(
  lambda name, _: 'threshold' in inspect.signature(encodings.ENCODINGS[name]).parameters
)
with_rotation = cases_where(lambda name, options: encodings.get(name, **options).rotate is not None)


# Against the papers


@pytest.mark.parametrize('name', encodings.ENCODINGS)
def test_every_encoding_has_an_oracle(name):
  assert name in oracles.ORACLES, f'write the oracle of {name!r} in tests/oracles.py'


@functools.cache
def jitted(case):
  """Returns the logits of a case as one program of their arguments, and a list of its traces."""
  encoding, _, _ = make(case)
  traces = []

  @jax.jit
  def counted(*arguments):
    traces.append(case)
    return logits(encoding, *arguments)

  return counted, traces


@every_case
def test_logits_equal_the_oracle_at_every_length_and_under_jit(case):
  encoding, params, _ = make(case)
  position_BL = positions(encoding)
  x_query_BLD, x_key_BLD = tokens(position_BL.shape[1])

  arguments = (params, x_query_BLD, x_key_BLD, position_BL, position_BL)
  eager_BHQK = logits(encoding, *arguments)
  jitted_BHQK = jitted(case)[0](*arguments)

  assert eager_BHQK.dtype == jnp.float32
  expected_BHQK = expected_logits(case, params, x_query_BLD, x_key_BLD, position_BL)
  past_BHQK = (position_BL[:, None] <= position_BL[:, :, None])[:, None]
  error_B = (error(eager_BHQK, expected_BHQK) * past_BHQK).max(axis=(1, 2, 3))
  for where, largest in zip(POSITIONS, error_B, strict=True):
    assert largest < oracles.TOLERANCE['float32'], where
  np.testing.assert_allclose(jitted_BHQK, eager_BHQK, rtol=1e-5, atol=2e-6)


@with_bias
def test_bias_of_keys_after_the_query_is_the_oracles_too(case):
  bias_HQK, expected_HQK = bias_alone(case, range(0, 1200, 97), range(0, 1200, 83))

  np.testing.assert_allclose(bias_HQK, expected_HQK, rtol=1e-6, atol=oracles.TOLERANCE['float32'])


@with_bias
def test_bias_tells_keys_after_the_query_apart_as_declared(case):
  encoding, _, _ = make(case)
  bias_HQK, _ = bias_alone(case, [100], range(101, 200))

  spread = np.ptp(bias_HQK, axis=2).max()
  assert spread > 1e-3 if encoding.bidirectional else spread == 0


def test_alibi_slopes_are_the_published_ones():
  for num_heads in range(1, 34):
    np.testing.assert_allclose(alibi.slopes(num_heads), oracles.alibi_slopes(num_heads), rtol=1e-12)

  np.testing.assert_allclose(alibi.slopes(8), [2.0**-n for n in range(1, 9)])
  np.testing.assert_allclose(alibi.slopes(12)[8:], [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])
  np.testing.assert_allclose(alibi.slopes(6), [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8])


@pytest.mark.parametrize('bidirectional', [False, True])
@pytest.mark.parametrize(
  ('num_buckets', 'max_distance'), [(32, 128), (32, 256), (8, 64), (16, 100)]
)
def test_t5_bias_reads_the_published_bucket_of_every_distance(
  num_buckets, max_distance, bidirectional
):
  options = {
    'num_buckets': num_buckets,
    'max_distance': max_distance,
    'bidirectional': bidirectional,
  }
  encoding = encodings.get('t5', **options)
  params = {'bias_ZH': jnp.arange(float(num_buckets))[:, None]}

  bias_BHQK = encoding.bias(params, np.int32([[1000]]), np.arange(2001, dtype=np.int32)[None], 1)

  expected = [oracles.t5_bucket(1000 - j, **options) for j in range(2001)]
  np.testing.assert_array_equal(bias_BHQK[0, 0, 0], expected)
  unused = {num_buckets // 2} if bidirectional else set()  # distance 0 is counted with the past
  assert set(expected) == set(range(num_buckets)) - unused


def test_t5_counts_keys_after_the_query_in_the_second_half_of_its_buckets():
  bucket_Z = t5.buckets(32, 128, bidirectional=True)

  past_Z, future_Z = bucket_Z[128:], bucket_Z[:128][::-1]
  np.testing.assert_array_equal(future_Z, past_Z[1:] + 16)
  np.testing.assert_array_equal(past_Z, t5.buckets(16, 128))
  np.testing.assert_array_equal(past_Z[:12], [0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 8])


# Kerple's bounds


def test_kerples_numbers_are_its_parameters_within_the_bounds():
  inside_H = np.float32([0.01, 0.0123, 0.3, 1.7, 2.0])

  for numbers in (kerple.log_numbers, kerple.power_numbers):
    for found_H in numbers({'r1_H': inside_H, 'r2_H': inside_H}):
      np.testing.assert_array_equal(found_H, inside_H)


@pytest.mark.parametrize(
  ('numbers', 'name', 'greatest'),
  [
    (kerple.log_numbers, 'r1_H', np.inf),
    (kerple.log_numbers, 'r2_H', np.inf),
    (kerple.power_numbers, 'r1_H', np.inf),
    (kerple.power_numbers, 'r2_H', 2.0),
  ],
)
def test_kerples_numbers_stay_in_the_bounds_and_never_stop_learning(numbers, name, greatest):
  x_H = jnp.linspace(-30.0, 30.0, 6001) + 0.0023
  index = ['r1_H', 'r2_H'].index(name)

  def number(x):
    return numbers({'r1_H': jnp.ones(1), 'r2_H': jnp.ones(1)} | {name: x[None]})[index][0]

  number_H, slope_H = jax.vmap(jax.value_and_grad(number))(x_H)

  assert (number_H >= 0.01 - 1e-6).all() and (number_H <= greatest + 1e-6).all()
  np.testing.assert_array_equal(np.abs(slope_H), 1)
  assert np.abs(np.diff(number_H)).max() < 0.011, 'it jumps'


def test_kerple_returns_from_a_bound_as_soon_as_it_should():
  encoding = encodings.get('kerple_power')
  position_BL = np.arange(8, dtype=np.int32)[None]
  params = {'r1_H': jnp.full(1, 0.5), 'r2_H': jnp.full(1, 1.0)}

  @jax.jit
  @jax.grad
  def gradient(params):
    return -encoding.bias(params, position_BL, position_BL, 1).mean()

  def descend(params, sign):
    slope = gradient(params)
    return {name: params[name] - sign * 0.03 * np.sign(slope[name]) for name in params}

  for _ in range(200):
    params = descend(params, 1)
  flat = kerple.power_numbers(params)
  for _ in range(10):
    params = descend(params, -1)
  steep = kerple.power_numbers(params)

  for low_H, high_H in zip(flat, steep, strict=True):
    assert low_H < 0.06 and high_H > low_H + 0.2


@pytest.mark.parametrize('d_model', [8, 48, 9])
def test_sinusoids_are_the_papers(d_model):
  encoding = encodings.get('sinusoidal')

  embedding_BLD = encoding.embed({}, np.int32([WIDE]), d_model)

  expected = [oracles.sinusoidal_embed({}, n, d_model) for n in WIDE]
  np.testing.assert_allclose(embedding_BLD[0], expected, atol=oracles.TOLERANCE['float32'])


def exact_angles(position, num_pairs, base_period):
  """Position times theta_m modulo 2 pi, from 50 decimal digits."""
  with decimal.localcontext() as context:
    context.prec = 50
    two_pi = 2 * decimal.Decimal('3.14159265358979323846264338327950288419716939937511')
    period = decimal.Decimal(base_period)
    theta_R = [period ** (-decimal.Decimal(m) / num_pairs) for m in range(num_pairs)]
    return np.array([float(position * theta % two_pi) for theta in theta_R])


@pytest.mark.parametrize('base_period', [10_000, 500_000, 2])
def test_rotations_are_exact_to_the_last_position(base_period):
  position_L = [0, 1, 3, 511, 65_535, 65_536, 2**20 - 1, 2**20, 2**24 + 1, 2**30 + 7, 2**31 - 1]
  turn_R = rotary.turns_per_token(16, float(base_period))

  cos_BLR, sin_BLR = rotary.cos_sin(np.int32([position_L]), turn_R)

  for row, position in enumerate(position_L):
    angle_R = exact_angles(position, 8, base_period)
    # Half a unit of the 48-bit fraction a token, beside float32's own rounding.
    bound = 1e-6 + position * 2.0**-49 * 2 * np.pi
    np.testing.assert_allclose(cos_BLR[0, row], np.cos(angle_R), rtol=0, atol=bound)
    np.testing.assert_allclose(sin_BLR[0, row], np.sin(angle_R), rtol=0, atol=bound)


def test_rope_pairs_are_the_two_halves_or_neighbours():
  x_BLHC = np.float32([1, 2, 3, 4]).reshape(1, 1, 1, 4)
  position_BL = np.int32([[1]])
  quarter_turn_R = np.array([0.25, 0.5])

  angles = rotary.cos_sin(position_BL, quarter_turn_R)
  halves_BLHC = rotary.turn_pairs(x_BLHC, *angles, 'halves')
  neighbours_BLHC = rotary.turn_pairs(x_BLHC, *angles, 'interleaved')

  np.testing.assert_allclose(halves_BLHC.ravel(), [-3, -2, 1, -4], atol=1e-6)
  np.testing.assert_allclose(neighbours_BLHC.ravel(), [-2, 1, -3, -4], atol=1e-6)


# Laws of every encoding


@every_case
def test_a_tile_is_the_slice_of_the_whole(case):
  encoding, params, _ = make(case)
  position_BL = positions(encoding)
  x_query_BLD, x_key_BLD = tokens(position_BL.shape[1])

  query_BLHC, key_BLHC = (heads(encoding, params, x, position_BL) for x in (x_query_BLD, x_key_BLD))

  whole_BHQK = logits_of_heads(encoding, params, query_BLHC, key_BLHC, position_BL, position_BL)
  tile_BHQK = logits_of_heads(
    encoding,
    params,
    query_BLHC[:, 9:14],
    key_BLHC[:, 2:11],
    position_BL[:, 9:14],
    position_BL[:, 2:11],
  )

  np.testing.assert_allclose(tile_BHQK, whole_BHQK[:, :, 9:14, 2:11], rtol=1e-6, atol=2e-6)


@every_case
def test_a_part_of_a_row_is_rotated_alone_as_in_the_row_as_declared(case):
  """Its end is cut off too: what follows in the longest rows is far past the training length."""
  encoding, params, _ = make(case)
  position_BL = positions(encoding)
  x_BLD, _ = tokens(position_BL.shape[1])

  whole_BLHC = heads(encoding, params, x_BLD, position_BL)
  part_BLHC = heads(encoding, params, x_BLD[:, 2:11], position_BL[:, 2:11])

  change = np.abs(part_BLHC - whole_BLHC[:, 2:11]).max()
  assert change < 1e-6 if encoding.prefix_stable else change > 1e-2


@every_case
def test_rows_that_share_positions_may_share_one_row_of_them(case):
  encoding, params, _ = make(case)
  position_1L = positions(encoding)[:1]
  x_query_BLD, x_key_BLD = tokens(position_1L.shape[1])

  shared_BHQK = logits(encoding, params, x_query_BLD, x_key_BLD, position_1L, position_1L)
  position_BL = np.repeat(position_1L, len(POSITIONS), axis=0)
  own_BHQK = logits(encoding, params, x_query_BLD, x_key_BLD, position_BL, position_BL)

  np.testing.assert_allclose(shared_BHQK, own_BHQK, rtol=1e-6, atol=2e-6)


@every_case
def test_logits_change_under_a_shift_as_declared(case):
  encoding, params, _ = make(case)
  last = 1_000_000 if encoding.max_length is None else encoding.max_length
  apart = min(30, last // 32)
  position_BL = np.repeat(apart * np.arange(16, dtype=np.int32)[None], len(POSITIONS), axis=0)
  shift_B = np.geomspace(1, last - 16 * apart, len(POSITIONS)).astype(np.int32)
  shifted_BL = position_BL + shift_B[:, None]
  x_query_BLD, x_key_BLD = tokens(16)

  before_BHQK = logits(encoding, params, x_query_BLD, x_key_BLD, position_BL, position_BL)
  after_BHQK = logits(encoding, params, x_query_BLD, x_key_BLD, shifted_BL, shifted_BL)

  change_B = error(after_BHQK, before_BHQK).max(axis=(1, 2, 3))
  if encoding.shift_invariant:
    assert change_B.max() < oracles.TOLERANCE['float32'], shift_B[change_B.argmax()]
  else:
    assert change_B[-1] > 1e-2


HAVE_TABLES = [case for case in CASES if make(case)[0].table is not None]


@pytest.mark.parametrize('case', HAVE_TABLES)
def test_x_of_keys_far_before_a_query_follows_from_that_of_nine_as_declared(case):
  """Where they are further away than there are of them: by the polynomial through nine."""
  encoding, params, _ = make(case)
  numbers = encoding.table(params, NUM_HEADS).coordinate
  of_first = jax.tree.map(lambda number_H: number_H[0], numbers)
  count, gap_Q1 = 16, np.arange(16, 4000, 7)[:, None]
  node_Y = np.round((count - 1) / 2 * (1 - np.cos(np.pi * np.arange(9) / 8))).astype(int)
  x_QK = np.float64(encoding.coordinate(of_first, count + gap_Q1, np.arange(count)[None]))

  follows_KQ = np.vander(np.arange(count) / count, 9) @ np.linalg.solve(
    np.vander(node_Y / count, 9), x_QK[:, node_Y].T
  )

  error = np.abs(follows_KQ.T - x_QK).max() / np.abs(x_QK).max()
  if encoding.smooth:
    assert error < 3e-6  # powers near 2 are no more exact in float32
  elif case in encodings.ENCODINGS:
    assert error > 1e-3


@every_case
def test_value_and_gradient_are_finite_everywhere(case):
  """At a million positions too, and for keys after the query, which a mask would hide."""
  encoding, params, _ = make(case)
  position_BL = positions(encoding)
  x_query_BLD, x_key_BLD = tokens(position_BL.shape[1])

  def total(params, x_query_BLD, x_key_BLD):
    return logits(encoding, params, x_query_BLD, x_key_BLD, position_BL, position_BL).sum()

  value, gradients = jax.value_and_grad(total, argnums=(0, 1, 2))(params, x_query_BLD, x_key_BLD)

  assert np.isfinite(value)
  for leaf in jax.tree.leaves(gradients):
    assert np.isfinite(leaf).all()


@with_rotation
def test_rotating_bfloat16_gives_bfloat16_near_the_oracle(case):
  encoding, params, options = make(case)
  name, _ = CASES[case]
  position_BL = positions(encoding)
  x_query_BLD, x_key_BLD = (
    x.astype(jnp.bfloat16).reshape(*x.shape[:2], NUM_HEADS, HEAD_DIM)
    for x in tokens(position_BL.shape[1])
  )

  query_BLHC = encoding.rotate(params, x_query_BLD, position_BL)
  key_BLHC = encoding.rotate(params, x_key_BLD, position_BL)

  assert query_BLHC.dtype == key_BLHC.dtype == jnp.bfloat16
  if encoding.log_decay is not None:
    # A decay is no part of `rotate`: what it turns is RoPE's, with the pairing of its own factory.
    options = encodings.options(name) | options
    options = {option: options[option] for option in encodings.options('rope')}
    name = 'rope'
  expected_BHQK = oracles.logits(
    name, {}, x_query_BLD, x_key_BLD, position_BL, position_BL, **options
  )
  logits_BHQK = np.einsum(
    'BQHC,BKHC->BHQK', np.float64(query_BLHC), np.float64(key_BLHC)
  ) / np.sqrt(HEAD_DIM)
  np.testing.assert_allclose(logits_BHQK, expected_BHQK, atol=oracles.TOLERANCE['bfloat16'])


@every_case
def test_other_positions_do_not_recompile(case):
  encoding, params, _ = make(case)
  position_BL = positions(encoding)
  x_query_BLD, x_key_BLD = tokens(position_BL.shape[1])
  counted, traces = jitted(case)

  for row_BL in (position_BL, position_BL[::-1], position_BL + 1):
    counted(params, x_query_BLD, x_key_BLD, row_BL, row_BL)

  assert len(traces) == 1


@every_case
def test_what_an_encoding_declares_is_what_it_has(case):
  encoding, params, _ = make(case)
  name, _ = CASES[case]

  assert encoding.name == name
  assert encoding.learned == bool(jax.tree.leaves(params))
  if encoding.log_decay is not None:
    rate_C = encoding.log_decay(HEAD_DIM)
    assert rate_C.shape == (HEAD_DIM,) and rate_C.dtype == np.float64 and (rate_C <= 0).all()
  if encoding.embed is not None:
    embedding_BLD = encoding.embed(params, np.int32([[0, 1, 2]]), D_MODEL)
    assert embedding_BLD.shape == (1, 3, D_MODEL) and embedding_BLD.dtype == jnp.float32
    assert encoding.shared, 'embeddings are added once, before all layers'


# RoPE stretched beyond its training length


@pytest.mark.parametrize(
  ('name', 'options'),
  [
    ('rope_pi', {'scale': 1.0}),
    ('ntk', {'scale': 1.0}),
    ('yarn', {'scale': 1.0}),
    ('yarn', {'scale': 1.0, 'ramp': 'code'}),
    ('dynamic_ntk', {'train_length': 1_000_001}),
  ],
)
def test_what_is_not_stretched_is_rope(name, options):
  position_BL = np.int32([WIDE])
  x_BLD, _ = tokens(len(WIDE))

  stretched_BLHC = heads(encodings.get(name, **options), {}, x_BLD[:1], position_BL)
  rope_BLHC = heads(encodings.get('rope'), {}, x_BLD[:1], position_BL)

  np.testing.assert_allclose(stretched_BLHC, rope_BLHC, rtol=0, atol=1e-6)


def angle_and_growth(position, name, **options):
  """Returns the angle_R, modulo 2 pi, and growth_R of the pairs of a head of 64 at a position."""
  first_of_pairs_C = np.repeat(np.float32([1, 0]), 32)
  turned_BLHC = encodings.get(name, **options).rotate(
    {}, first_of_pairs_C[None, None, None], np.int32([[position]])
  )
  cos_R, sin_R = np.float64(turned_BLHC).reshape(2, 32)
  return np.arctan2(sin_R, cos_R) % (2 * np.pi), np.hypot(cos_R, sin_R)


def test_position_interpolation_at_the_far_end_is_rope_at_the_training_length():
  position_BL = np.int32([[1, 511, 2048]])
  x_BLD, _ = tokens(3)

  rope_BLHC = heads(encodings.get('rope'), {}, x_BLD[:1], position_BL)
  pi_BLHC = heads(encodings.get('rope_pi', scale=8.0), {}, x_BLD[:1], 8 * position_BL)

  np.testing.assert_allclose(pi_BLHC, rope_BLHC, rtol=0, atol=1e-6)


def test_ntk_leaves_the_fastest_pair_and_interpolates_the_slowest():
  rope_R, _ = angle_and_growth(6, 'rope')
  ntk_R, _ = angle_and_growth(6, 'ntk', scale=8.0)

  np.testing.assert_allclose(ntk_R[[0, -1]], [rope_R[0], rope_R[-1] / 8], rtol=1e-5)
  assert (np.diff(ntk_R / rope_R) < 0).all()


@pytest.mark.parametrize('ramp', yarn.RAMPS)
def test_yarn_leaves_fast_pairs_interpolates_slow_ones_and_grows(ramp):
  """Heads of 64: pair 8 turns 32.6 times in 2048 tokens, pair 20 once, and pair 21 less."""
  rope_R, _ = angle_and_growth(6, 'rope')
  yarn_R, growth_R = angle_and_growth(6, 'yarn', scale=4.0, ramp=ramp)

  ratio_R = yarn_R / rope_R
  np.testing.assert_allclose(ratio_R[:9], 1, rtol=1e-5)
  np.testing.assert_allclose(ratio_R[21:], 1 / 4, rtol=1e-5)
  assert (np.diff(ratio_R[8:22]) < 0).all()
  np.testing.assert_allclose(growth_R, 0.1 * np.log(4.0) + 1, rtol=1e-6)


def test_yarn_as_published_departs_from_its_paper_by_as_much_as_the_docstring_says():
  paper_R, _ = angle_and_growth(1, 'yarn', ramp='paper')
  code_R, _ = angle_and_growth(1, 'yarn', ramp='code')

  assert 1.75 < (code_R / paper_R).max() <= 1.85 and (code_R / paper_R).min() > 1 - 1e-5


@pytest.mark.parametrize('train_length', [1, 100, 2048])
def test_dynamic_ntks_scale_is_the_published_one_and_at_most_a_tenth_more(train_length):
  """s from the slow one of two pairs, theta = 1 / (10 s), by the angle at position 1."""
  encoding = encodings.get('dynamic_ntk', train_length=train_length, base_period=100.0)
  lengths = (train_length * np.geomspace(0.1, 1e4, 80)).astype(np.int64)
  lengths = np.union1d(lengths[lengths > 2], [2, 100, 101, 109, 110, 2048, 2049, 2233, 2234])
  position_BL = np.stack([np.ones_like(lengths), lengths - 1], axis=1).astype(np.int32)
  x_BLHC = np.broadcast_to(np.float32([1, 1, 0, 0]), (len(lengths), 2, 1, 4))

  turned_BC = np.float64(encoding.rotate({}, x_BLHC, position_BL)[:, 0, 0])

  scale_B = 0.1 / np.arctan2(turned_BC[:, 3], turned_BC[:, 1])
  ratio_B = scale_B / np.maximum(1, lengths / train_length)
  # At a scale of 10,000 the angle is 10,000 units of 2^-32 turns.
  assert (ratio_B > 1 - 1e-4).all() and (ratio_B < 1.0906).all() and ratio_B.max() > 1.08
  np.testing.assert_allclose(ratio_B[lengths <= train_length], 1, rtol=1e-6)


def test_dynamic_ntk_levels_hold_every_length_that_a_position_can_reach():
  for train_length in (1, 7, 2048, 2**31 - 1, 2**31, 2**40):
    length_Z = ntk.longest(train_length)

    assert length_Z.dtype == np.int32 and (np.diff(length_Z) >= 0).all()
    exact = [int(decimal.Decimal(2) ** (decimal.Decimal(z) / 8) * train_length) for z in range(300)]
    assert length_Z.tolist() == [length for length in exact if length < 2**31]


# Parameters


def describe(params):
  """Each parameter as `name: dtype[shape]`."""
  return [
    f'  {name}: {leaf.dtype}[{", ".join(map(str, leaf.shape))}]'
    for name, leaf in sorted(params.items())
  ] or ['  nothing']


def test_parameters_are_the_golden_ones():
  """After a wanted change, run once with UPDATE_GOLDEN=1 in the environment and read the diff."""
  lines = [f'{NUM_HEADS} heads of {HEAD_DIM}, model width {D_MODEL}']
  for case in CASES:
    lines += ['', case, *describe(make(case)[1])]
  text = '\n'.join(lines) + '\n'

  if os.environ.get('UPDATE_GOLDEN'):
    GOLDEN.write_text(text, encoding='utf-8')
  assert text == GOLDEN.read_text(encoding='utf-8')


@every_case
def test_a_parameters_name_spells_its_axes(case):
  for name, leaf in make(case)[1].items():
    suffix = re.search(r'(_[A-Z]+)?$', name).group().lstrip('_')
    assert len(suffix) == leaf.ndim, name


@every_case
def test_init_is_a_function_of_its_key(case):
  name, options = CASES[case]
  encoding = encodings.get(name, **options)
  init = functools.partial(encoding.init, num_heads=NUM_HEADS, head_dim=HEAD_DIM, d_model=D_MODEL)

  first, again, other = init(jax.random.key(3)), init(jax.random.key(3)), init(jax.random.key(4))

  jax.tree.map(np.testing.assert_array_equal, first, again)
  for leaf, same in zip(first, other, strict=True):
    is_drawn = first[leaf].ndim > 0
    assert (first[leaf] != other[same]).any() == is_drawn, (
      f'{leaf}: arrays begin as drawn from the key, and scalars as told'
    )


MINE = base.Encoding('mine', init=base.no_parameters)


def one_number(rng, **sizes):
  return {'slope': jnp.float32(1)}


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'table': lambda params, num_heads: None},
      "'mine' has a table and no coordinate; give it both",
    ),
    (
      {'init': one_number},
      "'mine' says learned=False, and its init returns \\['slope'\\]; say learned=True",
    ),
    (
      {'learned': True},
      "'mine' says learned=True, and its init returns nothing; say learned=False",
    ),
    (
      {'bias': lambda params, i_BQ, j_BK, num_heads: jnp.zeros((1, 2, 3))},
      r"'mine' has a bias of float32\[1, 2, 3\] for 4 heads, 2 queries and 3 keys; it must be "
      r'float32\[1, 4, 2, 3\]: rows, heads',
    ),
    (
      {'bias': lambda params, i_BQ, j_BK, num_heads: jnp.zeros((1, num_heads, 2, 3), int)},
      r"'mine' has a bias of int32\[1, 4, 2, 3\] for",
    ),
  ],
)
def test_who_writes_an_encoding_is_told_what_is_wrong_with_it(changes, message, monkeypatch):
  monkeypatch.setitem(encodings.ENCODINGS, 'mine', lambda: MINE._replace(**changes))

  with pytest.raises(errors.UserError, match=message):
    encodings.get('mine')


def test_an_encoding_of_other_sizes_and_names_than_those_of_the_check_is_taken():
  def init(rng, *, num_heads, **sizes):
    if num_heads % 8:
      raise errors.UserError(f'{num_heads=} is not a multiple of 8')
    return {'slope_H': jax.random.uniform(rng, (num_heads,))}

  def bias(params, i, j, heads):
    return jnp.zeros((1, heads, i.shape[1], j.shape[1]))

  for changes in ({'init': init, 'learned': True}, {'bias': bias}):
    checks.check(MINE._replace(**changes))


def test_an_option_without_a_default_is_refused(monkeypatch):
  monkeypatch.setitem(encodings.ENCODINGS, 'mine', lambda slope: MINE)

  with pytest.raises(
    errors.UserError, match="option 'slope' of encoding 'mine' has no default; let"
  ):
    encodings.options('mine')


# FIRE alone


def with_scalars(params, **scalars):
  """Returns FIRE's parameters with other values of those scalars that they have."""
  return params | {name: jnp.float32(scalars[name]) for name in scalars if name in params}


@pytest.mark.parametrize('signs', [1.0, -1.0])
@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'hidden_layers': 2},
    {'hidden_layers': 3},
    {'psi': 'sqrt'},
    {'psi': 'identity', 'hidden_layers': 2},
    {'psi': 'power', 'exponent': 0.3},
    {'threshold': 0.0, 'hidden_layers': 2},
  ],
  ids=str,
)
def test_fire_gradient_of_every_parameter_is_the_oracles(changes, signs):
  """Queries lie on both sides of the threshold, so that the multiplier of L matters to some."""
  options = {'width': 5, **changes}
  encoding = encodings.get('fire', **options)
  params = encoding.init(jax.random.key(7), num_heads=2, head_dim=4, d_model=8)
  params = with_scalars(params, c=0.13 * signs, length_multiplier=0.8 * signs)
  queries, keys = [3, 60, 300, 405, 415, 900, 40_000], [0, 2, 3, 50, 299, 404, 899, 39_000]
  weight_HQK = np.random.default_rng(0).normal(size=(2, len(queries), len(keys)))

  def library(params):
    bias_BHQK = encoding.bias(params, np.int32([queries]), np.int32([keys]), 2)
    return (bias_BHQK[0] * weight_HQK.astype(np.float32)).sum()

  def oracle(params):
    bias_QKH = [[oracles.fire_bias(params, i, j, 2, **options) for j in keys] for i in queries]
    return (np.moveaxis(bias_QKH, 2, 0) * weight_HQK).sum()

  exact = {name: np.float64(leaf) for name, leaf in params.items()}
  hidden = [
    np.abs(before).min()
    for i in queries
    for j in keys
    for before in oracles.fire_hidden(exact, oracles.fire_input(exact, i, j, **options), **options)
  ]
  assert min(hidden) > 1e-5, 'a ReLU bends within the central difference; take another seed'

  found = jax.grad(library)(params)

  for name in exact:
    scale = max(1.0, np.abs(found[name]).max())
    for index in np.ndindex(exact[name].shape):
      direction = {key: np.zeros_like(leaf) for key, leaf in exact.items()}
      direction[name][index] = 1.0
      expected = oracles.slope(oracle, exact, direction)
      assert abs(found[name][index] - expected) < 1e-4 * scale, (name, index)
    assert np.abs(found[name]).max() > 1e-3, f'{name} has no say in this test'


@with_threshold
def test_fire_interpolates_and_never_extrapolates(case):
  _, params, options = make(case)
  options = {'psi': 'log', 'threshold': 512.0, 'exponent': 1.0} | options
  options = {option: options[option] for option in ('psi', 'threshold', 'exponent')}
  position_BL = np.int32([WIDE])

  for c in (1e-3, 0.1, 7.0):
    for multiplier in (0.01, 1.0, 50.0):
      changed = with_scalars(params, c=c, length_multiplier=multiplier)
      x_BQK = fire.interpolation(changed, position_BL[:, :, None], position_BL[:, None], **options)
      assert (x_BQK >= 0).all() and (x_BQK <= 1).all()


@with_threshold
def test_fire_reads_the_size_of_its_scalars_and_not_their_sign(case):
  encoding, params, _ = make(case)
  position_BL = np.int32([WIDE])

  bias_BHQK = encoding.bias(params, position_BL, position_BL, NUM_HEADS)

  for name in {'c', 'length_multiplier'} & set(params):
    flipped = params | {name: -params[name]}
    flipped_BHQK = encoding.bias(flipped, position_BL, position_BL, NUM_HEADS)
    np.testing.assert_array_equal(bias_BHQK, flipped_BHQK, err_msg=name)


@with_threshold
def test_fire_is_finite_where_its_scalars_were_learned_down_to_zero(case):
  encoding, params, _ = make(case)
  params = with_scalars(params, c=0.0, length_multiplier=0.0)
  position_BL = np.int32([WIDE])

  def total(params):
    return encoding.bias(params, position_BL, position_BL, NUM_HEADS).sum()

  for leaf in jax.tree.leaves(jax.value_and_grad(total)(params)):
    assert np.isfinite(leaf).all()


@with_threshold
def test_fire_starts_at_the_papers_scalars_and_has_none_that_would_cancel(case):
  name, options = CASES[case]
  params = encodings.get(name, **options).init(
    jax.random.key(0), num_heads=NUM_HEADS, head_dim=HEAD_DIM, d_model=D_MODEL
  )

  scalars = {name: float(leaf) for name, leaf in params.items() if leaf.ndim == 0}
  expected = {}
  if options.get('psi', 'log') == 'log':
    expected['c'] = float(np.float32(options.get('c', 0.1)))
  if options.get('threshold', 512.0) > 0:
    expected['length_multiplier'] = 1.0
  assert scalars == expected


# Ends and errors


def test_learned_positions_past_a_clamped_table_read_its_last_row():
  encoding, params, _ = make('learned 64 clamped')

  embedding_BLD = encoding.embed(params, np.int32([[0, 63, 64, 1_000_000]]), D_MODEL)

  np.testing.assert_array_equal(embedding_BLD[0], params['table_ZD'][np.array([0, 63, 63, 63])])
  assert encoding.max_length is None


def test_learned_positions_past_the_table_are_nan():
  encoding, params, _ = make('learned 64')

  embedding_BLD = encoding.embed(params, np.int32([[0, 63, 64, 65, 1_000_000]]), D_MODEL)

  np.testing.assert_array_equal(np.isnan(embedding_BLD).all(axis=2), [[0, 0, 1, 1, 1]])
  assert np.isfinite(embedding_BLD[:, :2]).all()


@pytest.mark.parametrize(
  ('name', 'options', 'message'),
  [
    ('fier', {}, "unknown encoding 'fier'; known: alibi, dynamic_ntk, fire,"),
    ('rope', {'theta': 3}, "'rope' has no option 'theta'; it takes: base_period, pairing"),
    ('nope', {'width': 3}, "'nope' has no option 'width'; it takes: none"),
    ('fire_s', {'shared': False}, "'fire_s' has no option 'shared'"),
    ('fire', {'hidden_layers': 0}, 'hidden_layers=0'),
    ('fire', {'width': 0}, 'width=0'),
    ('fire', {'threshold': -1.0}, 'threshold=-1.0'),
    ('fire', {'threshold': float('inf')}, 'threshold=inf'),
    ('fire', {'c': 0.0}, 'c=0.0'),
    ('fire', {'c': float('inf')}, 'c=inf'),
    ('fire', {'c': 1e38}, 'c=1e+38 above 0, c of at most 1e+09'),
    ('ntk', {'scale': 1e300}, 'positions are stretched by 1 to 1e+09, not by scale=1e+300'),
    ('xpos', {'gamma': float('inf')}, 'gamma=inf'),
    ('fire', {'psi': 'cube'}, "unknown psi='cube' of fire; known: log, sqrt, identity"),
    ('fire_s', {'psi': 'sqrt', 'c': 1.0}, "fire with psi='sqrt' has no c, but c=1.0"),
    ('fire', {'psi': 'power', 'exponent': 0.0}, 'exponent=0.0 above 0 and at most 4.0'),
    ('fire', {'psi': 'power', 'exponent': 4.1}, 'exponent=4.1 above 0 and at most 4.0'),
    ('fire', {'exponent': 2.0}, "fire with psi='log' has no exponent, but exponent=2.0"),
    ('learned', {'max_length': 0}, 'max_length=0'),
    ('rope', {'pairing': 'thirds'}, "pairing='thirds'; known: halves, interleaved"),
    ('xpos', {'pairing': 'thirds'}, "pairing='thirds'"),
    ('rope', {'base_period': 0.0}, 'base_period=0.0 above 0'),
    ('rope', {'base_period': float('inf')}, 'base_period=inf above 0, of at most 1e+30'),
    ('rope_pi', {'scale': 0.5}, 'positions are stretched by 1 to 1e+09, not by scale=0.5'),
    ('rope_pi', {'pairing': 'thirds'}, "pairing='thirds'"),
    ('rope_pi', {'base_period': 0.0}, 'base_period=0.0 above 0'),
    ('ntk', {'scale': float('nan')}, 'scale=nan'),
    ('ntk', {'base_period': -2.0}, 'base_period=-2.0 above 0'),
    ('dynamic_ntk', {'train_length': 0}, 'train_length=0 of at least 1'),
    ('dynamic_ntk', {'base_period': 0.0}, 'base_period=0.0 above 0'),
    ('yarn', {'scale': float('inf')}, 'scale=inf'),
    ('yarn', {'train_length': -1}, 'train_length=-1'),
    ('yarn', {'beta_slow': 32.0}, 'beta_slow=32.0 above 0 and below a finite beta_fast=32.0'),
    ('yarn', {'beta_slow': 0.0}, 'beta_slow=0.0'),
    ('yarn', {'beta_fast': float('inf')}, 'beta_fast=inf'),
    ('yarn', {'ramp': 'line'}, "ramp='line'; known: paper, code"),
    ('yarn', {'base_period': 0.0}, 'base_period=0.0 above 0'),
    ('yarn', {'ramp': 'code', 'base_period': 1.0}, 'base_period=1.0 above 1'),
    ('yarn', {'ramp': 'code', 'train_length': 6}, 'train_length=6 from 2 pi beta_slow (6.28)'),
    (
      'yarn',
      {'ramp': 'code', 'base_period': 2.0, 'train_length': 900},
      'train_length=900 from 2 pi beta_slow (6.28) to below 2 pi beta_fast base_period^2 (804)',
    ),
    ('xpos', {'base_period': -1.0}, 'base_period=-1.0 above 0'),
    ('fire', {'name': 'x'}, "'fire' has no option 'name'"),
    ('xpos', {'gamma': 0.0}, 'gamma=0.0'),
    ('xpos', {'scale_base': -512.0}, 'scale_base=-512.0'),
    ('t5', {'num_buckets': 7}, 'num_buckets=7'),
    ('t5', {'num_buckets': 0}, 'num_buckets=0'),
    ('t5', {'max_distance': 16}, 'max_distance=16 to be above num_buckets / 2'),
    (
      't5',
      {'num_buckets': 6, 'bidirectional': True},
      'bidirectional=True needs num_buckets=6 to be a multiple of 4',
    ),
    (
      't5',
      {'max_distance': 8, 'bidirectional': True},
      'max_distance=8 to be above num_buckets / 4',
    ),
    ('sandwich', {'num_terms': 0}, 'num_terms=0'),
    ('sandwich', {'d_bar': 0}, 'd_bar=0'),
    ('sandwich', {'compression': 0.0}, 'compression=0.0'),
    ('sandwich', {'compression': float('inf')}, 'compression=inf'),
  ],
)
def test_mistakes_are_answered_with_their_value(name, options, message):
  with pytest.raises(errors.UserError, match=re.escape(message)):
    encodings.get(name, **options)


@pytest.mark.parametrize('name', encodings.ENCODINGS)
def test_options_are_the_defaults_that_get_accepts(name):
  options = encodings.options(name)

  assert 'name' not in options
  assert encodings.get(name, **options).name == name


@with_rotation
def test_rotary_encodings_refuse_an_odd_head_width(case):
  name, options = CASES[case]
  with pytest.raises(errors.UserError, match='head_dim=7'):
    encodings.get(name, **options).init(jax.random.key(0), num_heads=2, head_dim=7, d_model=14)


@pytest.mark.parametrize('name', ['ntk', 'dynamic_ntk'])
def test_ntk_refuses_heads_of_one_pair(name):
  with pytest.raises(errors.UserError, match=f"head_dim=2, for '{name}' of at least 4"):
    encodings.get(name).init(jax.random.key(0), num_heads=2, head_dim=2, d_model=4)


def test_equal_options_make_one_encoding_for_which_nothing_compiles_twice():
  assert encodings.get('fire', width=8) is encodings.get('fire', width=8)
  assert encodings.get('fire', width=8) != encodings.get('fire', width=9)


def test_a_table_is_made_only_of_networks_whose_segments_are_few():
  assert encodings.get('fire', hidden_layers=2, width=127).table is not None
  assert encodings.get('fire', hidden_layers=2, width=128).table is None
  assert encodings.get('fire', hidden_layers=3).table is None
