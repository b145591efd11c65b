"""The table form of a bias: equal to the bias that it is made from, in value and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from lex_fire import encodings
from lex_fire.encodings import piecewise, represent

NUM_HEADS = 3
CASES = {
  'fire': ('fire', {}),
  'fire 2 layers': ('fire', {'hidden_layers': 2}),
  'fire of one unit': ('fire', {'width': 1}),
  'fire sqrt': ('fire', {'psi': 'sqrt'}),
  'fire identity, no threshold': ('fire', {'psi': 'identity', 'threshold': 0.0}),
  'fire_s': ('fire_s', {}),
  'alibi': ('alibi', {}),
  'kerple_log': ('kerple_log', {}),
  'kerple_power': ('kerple_power', {}),
  'sandwich': ('sandwich', {}),
  't5': ('t5', {}),
  't5 bidirectional': ('t5', {'bidirectional': True}),
}
every_case = pytest.mark.parametrize('case', CASES)

# Tiles of queries and keys, all of one shape, so that they are one program: on the diagonal, before
# it and after it, across a threshold, far away.
TILES = {
  'the first': (range(24), range(50)),
  'before and after': (range(100, 124), range(90, 140)),
  'across the threshold': (range(500, 524), range(300, 350)),
  'far': (range(4000, 4024), range(64, 114)),
  'at a million': (range(999_990, 1_000_014), range(999_960, 1_000_010)),
  'everywhere': (range(0, 60_000, 2503), range(0, 60_000, 1200)),
}


def make(case, seed=0):
  """Returns an encoding and parameters that bend within the range of its inputs, and outside it."""
  name, options = CASES[case]
  encoding = encodings.get(name, **options)
  params = encoding.init(jax.random.key(seed), num_heads=NUM_HEADS, head_dim=8, d_model=24)
  if 'w_in_W' in params:
    rng = np.random.default_rng(seed)
    params['w_in_W'] = jnp.float32(rng.normal(size=params['w_in_W'].shape))
    params['b_in_W'] = -params['w_in_W'] * jnp.float32(
      rng.uniform(-0.3, 1.3, params['w_in_W'].shape)
    )
  return encoding, params


@every_case
def test_a_table_equals_the_bias_in_value_and_gradient(case):
  encoding, params = make(case)

  def of_table(params, where):
    table = encoding.table(params, NUM_HEADS)
    return piecewise.bias_of_table(table, *where, NUM_HEADS, coordinate=encoding.coordinate)

  def of_params(params, where):
    return encoding.bias(params, *where, NUM_HEADS)

  @functools.partial(jax.jit, static_argnums=0)
  def value_and_gradient(function, where):
    bias_BHQK, gradient = jax.vjp(functools.partial(function, where=where), params)
    probe_BHQK = np.random.default_rng(1).normal(size=bias_BHQK.shape).astype(np.float32)
    return bias_BHQK, gradient(probe_BHQK)[0]

  for tile, parts in TILES.items():
    where = tuple(np.array(list(part), np.int32)[None] for part in parts)
    expected_BHQK, expected = value_and_gradient(of_params, where)
    bias_BHQK, found = value_and_gradient(of_table, where)

    np.testing.assert_allclose(bias_BHQK, expected_BHQK, rtol=1e-5, atol=1e-5, err_msg=tile)
    for name in params:
      size = max(np.abs(expected[name]).max(), 1.0)
      message = f'{tile}: {name}'
      np.testing.assert_allclose(found[name], expected[name], atol=1e-4 * size, err_msg=message)


@pytest.mark.parametrize('hidden_layers', [1, 2])
def test_a_table_of_a_network_is_its_oracle_between_any_breakpoints(hidden_layers):
  """Also of units that never bend, always rest, or bend where another does."""
  _, params = make('fire' if hidden_layers == 1 else 'fire 2 layers', seed=2)
  slope_W = params['w_in_W'].at[:3].set(jnp.float32([0.0, 0.0, 1.0]))
  params['w_in_W'] = slope_W.at[3].set(2.0)
  params['b_in_W'] = params['b_in_W'].at[:4].set(jnp.float32([0.5, -0.5, -0.25, -0.5]))
  x_Z = np.float32(np.random.default_rng(3).uniform(0, 1, 500))

  table = piecewise.of_network(params, coordinate={})
  found_ZH = piecewise.bias(x_Z[None, None, :, None], table)[0, :, :, 0].T

  exact = {name: np.float64(value) for name, value in params.items()}
  for x, found_H in zip(np.float64(x_Z), found_ZH, strict=True):
    hidden = oracles.fire_hidden(exact, x, hidden_layers=hidden_layers)
    expected_H = np.maximum(hidden[-1], 0) @ exact['w_out_WH'] + exact['b_out_H']
    np.testing.assert_allclose(found_H, expected_H, atol=oracles.TOLERANCE['float32'])


def test_segments_jump_where_they_are_told_to():
  lower_Z = jnp.float32([-np.inf, 1.0, 2.0, np.inf])
  slope_ZH = jnp.float32([[1.0], [0.0], [-2.0], [9.0]])
  value_ZH = jnp.float32([[0.0], [5.0], [0.0], [9.0]])
  x_B1QK = jnp.float32([[[[-1.0, 0.5, 1.0, 1.5, 2.0, 2.5]]]])

  bias_BHQK = piecewise.bias(x_B1QK, piecewise.Table({}, lower_Z, jnp.zeros(4), slope_ZH, value_ZH))

  np.testing.assert_allclose(bias_BHQK[0, 0, 0], [-1.0, 0.5, 1.0, 5.0, 5.0, -5.0])


def test_only_breakpoints_within_the_tile_are_visited():
  """By what a breakpoint outside would do to the result: NaN."""
  lower_Z = jnp.float32([-np.inf, 0.2, 0.5, 0.8])
  slope_ZH = jnp.float32([[np.nan], [1.0], [2.0], [np.nan]])

  table = piecewise.Table({}, lower_Z, jnp.zeros(4), slope_ZH, jnp.zeros((4, 1)))
  bias_BHQK = piecewise.bias(jnp.full((1, 1, 2, 2), 0.4).at[0, 0, 0, 0].set(0.6), table)

  np.testing.assert_allclose(bias_BHQK[0, 0], [[1.2, 0.4], [0.4, 0.4]])


def test_a_table_of_steep_steps_is_as_exact_as_the_network():
  """T5's steps of several nats, as FIRE: slopes of thousands over the width of a token."""
  encoding = encodings.get('t5')
  params = {'bias_ZH': jnp.float32(np.random.default_rng(0).normal(size=(32, 2)) * 3)}
  fire, fire_params, *_ = represent.as_fire(encoding, params, num_heads=2, length=4096)
  where = np.int32([[4095]]), np.arange(4096, dtype=np.int32)[None]

  table = fire.table(fire_params, 2)
  found_BHQK = piecewise.bias_of_table(table, *where, 2, coordinate=fire.coordinate)

  np.testing.assert_allclose(found_BHQK, encoding.bias(params, *where, 2), atol=2e-4)


def test_rows_of_more_keys_than_a_tile_are_what_the_network_says():
  """Of two rows, one of whose positions do not rise, as in a cache that goes round."""
  encoding, params = make('fire')
  key_position_BK = np.arange(2 * piecewise.KEYS + 300, dtype=np.int32)[None]
  key_position_BK = np.concatenate([key_position_BK, np.roll(key_position_BK, 700)])
  where = np.int32([[2300], [2347]]), key_position_BK

  table = encoding.table(params, NUM_HEADS)
  found_BHQK = piecewise.tabulated(encoding).bias(table, *where, NUM_HEADS)

  np.testing.assert_allclose(found_BHQK, encoding.bias(params, *where, NUM_HEADS), atol=1e-5)
