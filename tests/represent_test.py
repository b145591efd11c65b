"""FIRE made equal to other biases: to a stated error of their oracles, and an ordinary FIRE."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from lex_fire import encodings, errors
from lex_fire.encodings import piecewise, represent

# name: (encoding, options, heads, length, tolerances)
CASES = {
  'alibi': ('alibi', {}, 12, 4096, {'relative_tolerance': 3e-7}),
  't5': ('t5', {}, 3, 4096, {'relative_tolerance': 0.0}),
  't5 8 buckets': ('t5', {'num_buckets': 8, 'max_distance': 64}, 3, 512, {'tolerance': 1e-5}),
  'kerple_log': ('kerple_log', {}, 3, 4096, {'relative_tolerance': 0.0}),
  'kerple_power': ('kerple_power', {}, 3, 512, {}),
  'kerple_power, long': ('kerple_power', {}, 3, 4096, {'relative_tolerance': 1e-4}),
  'sandwich': ('sandwich', {}, 3, 512, {'tolerance': 1e-2, 'relative_tolerance': 0.0}),
  'sandwich short': ('sandwich', {'num_terms': 3, 'd_bar': 4}, 3, 200, {}),
}


def learned(encoding, num_heads, seed=0):
  """Returns parameters, T5's as far apart as training takes them."""
  params = encoding.init(jax.random.key(seed), num_heads=num_heads, head_dim=8, d_model=1)
  return {name: leaf * 3 if name == 'bias_ZH' else leaf for name, leaf in params.items()}


def alike(encoding, num_heads):
  """Returns parameters of heads that differ in r1 alone."""
  params = learned(encoding, num_heads)
  return params | {'r2_H': jnp.full_like(params['r2_H'], 0.37)}


def expected(name, params, options, num_heads, length):
  """The oracle's bias_HZ at distances from 0."""
  params = {key: np.float64(leaf) for key, leaf in params.items()}
  bias = oracles.ORACLES[name].bias
  return np.array([bias(params, d, 0, num_heads, **options) for d in range(length)]).T


def at_query(encoding, params, num_heads, query):
  """The library's bias_HZ of one query at the distances before it, from 0."""
  key_position_BK = np.arange(query, -1, -1, dtype=np.int32)[None]
  bias_BHQK = encoding.bias(params, np.int32([[query]]), key_position_BK, num_heads)
  return np.float64(bias_BHQK[0, :, 0])


# Equal


@pytest.mark.parametrize('case', CASES)
def test_fire_equals_the_given_bias_at_every_distance_to_the_error_it_states(case):
  name, options, num_heads, length, tolerances = CASES[case]
  given = encodings.get(name, **options)
  params = learned(given, num_heads)

  found = represent.as_fire(given, params, num_heads, length, **tolerances)

  given_HZ = at_query(given, params, num_heads, length - 1)
  fire_HZ = at_query(found.encoding, found.params, num_heads, length - 1)
  assert found.error == np.abs(fire_HZ - given_HZ).max()
  oracle_HZ = expected(name, params, options, num_heads, length)
  # What the library's own float32 lacks of the oracle: of a power that of r2 log d, some 16.
  rounding = 2e-6 if name == 'kerple_power' else 2.5e-7
  share = tolerances.get('relative_tolerance', 1e-6) + rounding
  allowed_HZ = tolerances.get('tolerance', 1e-4) + share * np.abs(oracle_HZ)
  queries, keys = np.array([0, length // 3, length - 1]), np.arange(length)
  bias_BHQK = found.encoding.bias(
    found.params, jnp.int32(queries)[None], jnp.int32(keys)[None], num_heads
  )
  for query, bias_HK in zip(queries, np.moveaxis(bias_BHQK[0], 1, 0), strict=True):
    seen_Z = query - np.arange(query + 1)
    error_HZ = np.abs(bias_HK[:, seen_Z] - oracle_HZ[:, : query + 1])
    assert (error_HZ <= allowed_HZ[:, : query + 1]).all(), query


@pytest.mark.parametrize('name', ['alibi', 'kerple_log'])
def test_keys_after_the_query_have_the_same_bias(name):
  given = encodings.get(name)
  params = learned(given, 3)

  found = represent.as_fire(given, params, 3, 200)

  position_BL = np.arange(200, dtype=np.int32)[None]
  bias_BHQK = given.bias(params, position_BL, position_BL, 3)
  fire_BHQK = found.encoding.bias(found.params, position_BL, position_BL, 3)
  np.testing.assert_allclose(fire_BHQK, bias_BHQK, rtol=1e-6, atol=1e-4)


def test_any_function_of_the_distance_is_met():
  bias_HZ = np.random.default_rng(0).normal(size=(3, 200)) * 10

  found = represent.table_as_fire(bias_HZ, relative_tolerance=0.0)

  bias_of_fire_HZ = at_query(found.encoding, found.params, 3, 199)
  np.testing.assert_allclose(bias_of_fire_HZ, bias_HZ, rtol=0, atol=1e-4)


@pytest.mark.parametrize('length', [1, 2, 3])
@pytest.mark.parametrize('name', ['t5', 'kerple_power'])
def test_the_shortest_sequences_are_met(name, length):
  given = encodings.get(name)
  params = learned(given, 3)

  found = represent.as_fire(given, params, 3, length)

  bias_HZ = at_query(found.encoding, found.params, 3, length - 1)
  oracle_HZ = expected(name, params, {}, 3, length)
  np.testing.assert_allclose(bias_HZ, oracle_HZ, rtol=1e-6, atol=1e-4)


# With no more than it takes


def test_alibi_is_one_unit_bit_for_bit():
  for length in (100, 700, 3000):
    found = represent.as_fire(encodings.get('alibi'), {}, 12, length)

    assert found.error == 0
    assert found.options['psi'] == 'identity' and found.options['threshold'] >= length
    assert found.options['width'] == found.options['hidden_layers'] == 1


@pytest.mark.parametrize('psi', ['log', 'power'])
def test_kerple_of_one_r2_is_one_unit_of_that_number(psi):
  given = encodings.get(f'kerple_{psi}')

  found = represent.as_fire(given, alike(given, 3), 3, 512)

  assert found.options['psi'] == psi
  assert found.options['width'] == found.options['hidden_layers'] == 1
  number = found.params['c'] if psi == 'log' else found.options['exponent']
  np.testing.assert_allclose(number, 0.37, rtol=1e-4)


@pytest.mark.parametrize('name', ['t5', 'kerple_log'])
def test_gentle_biases_take_one_hidden_layer_at_any_length(name):
  given = encodings.get(name)
  params = given.init(jax.random.key(0), num_heads=3, head_dim=8, d_model=48)

  for length in (200, 4096, 20_000):
    found = represent.as_fire(given, params, 3, length)

    assert found.options['hidden_layers'] == 1
    assert found.options['width'] < 100


def test_steps_between_t5s_buckets_are_exact():
  given = encodings.get('t5')
  params = learned(given, 3)

  found = represent.as_fire(given, params, 3, 4096, tolerance=5e-6)

  assert found.options['hidden_layers'] == 2
  assert found.options['width'] == 31, 'a unit an edge'
  assert found.error < 5e-6


def test_sandwich_comes_nearer_with_more_units():
  given = encodings.get('sandwich')

  width, error = zip(
    *(
      (found.options['width'], found.error)
      for tolerance in (1.0, 0.1, 1e-2, 1e-3)
      for found in [represent.as_fire(given, {}, 3, 200, tolerance, 0.0)]
    ),
    strict=True,
  )

  assert (np.array(error) <= [1.0, 0.1, 1e-2, 1e-3]).all()
  assert (np.diff(width) > 0).all() and width[-1] <= 199


# Ordinary


@pytest.mark.parametrize('case', ['t5', 'kerple_log', 'kerple_power'])
def test_what_comes_back_is_what_init_makes(case):
  name, options, num_heads, _, _ = CASES[case]
  given = encodings.get(name, **options)

  found = represent.as_fire(given, learned(given, num_heads), num_heads, 200)

  same = encodings.get('fire', **found.options)
  made = same.init(jax.random.key(0), num_heads=num_heads, head_dim=8, d_model=48)
  assert jax.tree.structure(found.params) == jax.tree.structure(made)
  for leaf, of_init in zip(jax.tree.leaves(found.params), jax.tree.leaves(made), strict=True):
    assert leaf.shape == of_init.shape and leaf.dtype == of_init.dtype
  np.testing.assert_array_equal(
    at_query(same, found.params, num_heads, 199),
    at_query(found.encoding, found.params, num_heads, 199),
  )


@pytest.mark.parametrize(
  ('name', 'allowed'),
  [('kerple_log', 2e-4), ('t5', 2e-3)],  # a table adds and takes away what is steep
)
def test_the_tables_of_fused_kernels_hold_it_too(name, allowed):
  given = encodings.get(name)
  params = learned(given, 3)

  found = represent.as_fire(given, params, 3, 200)

  position_BL = np.arange(200, dtype=np.int32)[None]
  table = found.encoding.table(found.params, 3)
  coordinate = found.encoding.coordinate
  bias_BHQK = piecewise.bias_of_table(table, position_BL, position_BL, 3, coordinate=coordinate)
  expected_BHQK = given.bias(params, position_BL, position_BL, 3)
  np.testing.assert_allclose(np.tril(bias_BHQK), np.tril(expected_BHQK), rtol=0, atol=allowed)


def gradients_of(name):
  """Gradients of the mean square of FIRE that equals an encoding's bias."""
  given = encodings.get(name)
  found = represent.as_fire(given, learned(given, 3), 3, 200)
  position_BL = np.arange(200, dtype=np.int32)[None]

  def mean_square(params):
    return jnp.square(found.encoding.bias(params, position_BL, position_BL, 3)).mean()

  return jax.grad(mean_square)(found.params)


def test_it_goes_on_learning():
  for name, gradient in gradients_of('kerple_power').items():
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, name


def test_steps_go_on_learning_their_heights_and_like_t5s_not_their_edges():
  gradients = gradients_of('t5')

  assert all(np.isfinite(gradient).all() for gradient in gradients.values())
  assert (np.abs(gradients['w_out_WH']) > 0).all() and (np.abs(gradients['b_out_H']) > 0).all()
  assert (gradients['w_in_W'] == 0).all() and (gradients['b_in_W'] == 0).all()


def test_layers_share_their_options_as_heads_of_one_table():
  given = encodings.get('t5')
  layers = [learned(given, 3, seed) for seed in range(2)]
  bias_HZ = np.concatenate([at_query(given, params, 3, 199) for params in layers])

  found = represent.table_as_fire(bias_HZ)

  for layer, params in enumerate(layers):
    heads = slice(3 * layer, 3 * layer + 3)
    own = {
      'w_out_WH': found.params['w_out_WH'][:, heads],
      'b_out_H': found.params['b_out_H'][heads],
    }
    fire_HZ = at_query(found.encoding, found.params | own, 3, 199)
    np.testing.assert_allclose(fire_HZ, at_query(given, params, 3, 199), rtol=0, atol=1e-4)


# Refused


@pytest.mark.parametrize('name', ['nope', 'rope', 'xpos', 'learned', 'fire'])
def test_what_has_no_bias_of_distance_is_refused(name):
  with pytest.raises(
    errors.UserError, match=f"'{name}' has no bias that is a function of distance"
  ):
    represent.as_fire(encodings.get(name), {}, 2, 16)


def test_what_differs_between_the_two_directions_is_refused():
  given = encodings.get('t5', bidirectional=True)
  params = {'bias_ZH': jnp.arange(32.0)[:, None]}

  with pytest.raises(errors.UserError, match="'t5' at one distance differs by up to 16 nats"):
    represent.as_fire(given, params, 1, 16)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'length': 0}, 'length=0'),
    ({'tolerance': 0.0}, 'tolerance=0.0 above 0'),
    ({'tolerance': float('nan')}, 'tolerance=nan'),
    ({'relative_tolerance': -1.0}, 'relative_tolerance=-1.0 from 0 up'),
    ({'relative_tolerance': float('inf')}, 'relative_tolerance=inf'),
    ({'max_width': 0}, 'max_width=0 of at least 1'),
    (
      {'max_width': 10},
      'max_width=10 equals this bias to tolerance=0.0001 and relative_tolerance=1e-06 up to '
      'distance 10 of 199',
    ),
    (
      {'tolerance': 1e-9, 'relative_tolerance': 0.0},
      'times as far from this bias as tolerance=1e-09 and relative_tolerance=0.0 allow',
    ),
  ],
)
def test_mistakes_are_answered_with_their_value(changes, message):
  arguments = {'num_heads': 3, 'length': 200} | changes

  with pytest.raises(errors.UserError, match=re.escape(message)):
    represent.as_fire(encodings.get('sandwich'), {}, **arguments)


def test_a_constant_that_float32_rounds_too_much_is_refused():
  with pytest.raises(errors.UserError, match='tolerance=1e-12'):
    represent.table_as_fire(np.full((1, 4), 0.1), tolerance=1e-12, relative_tolerance=0.0)


@pytest.mark.parametrize(
  ('bias_HZ', 'message'),
  [
    (np.zeros(3), 'shape (3,) with 0 not finite'),
    (np.zeros((2, 0)), 'shape (2, 0) with 0 not finite'),
    (np.array([[0.0, np.inf, np.nan]]), 'shape (1, 3) with 2 not finite'),
  ],
)
def test_what_is_no_table_of_numbers_is_refused(bias_HZ, message):
  with pytest.raises(errors.UserError, match=re.escape(message)):
    represent.table_as_fire(bias_HZ)
