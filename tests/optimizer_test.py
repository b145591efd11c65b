"""The optimizer against AdamW in float64, its schedule, and which parameters it treats how."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lex_fire import config as config_lib
from lex_fire import optimizer, train


def run_config(steps=100, name='fire', **fields):
  """Returns the config of a tiny run with these fields of its optimizer."""
  return config_lib.Config(
    model=config_lib.ModelConfig(num_layers=1, d_model=8, num_heads=2, num_kv_heads=1, head_dim=4),
    encoding=config_lib.EncodingConfig(name),
    optimizer=config_lib.OptimizerConfig(**fields),
    train=config_lib.TrainConfig(steps=steps),
  )


# Schedule


def expected_rate(step, *, peak, warmup, steps, final_fraction):
  """Up on a line, down on half a cosine, then level."""
  if step < warmup:
    return peak * step / warmup
  progress = min((step - warmup) / (steps - warmup), 1.0)
  height = (1 + np.cos(np.pi * progress)) / 2
  return peak * (final_fraction + (1 - final_fraction) * height)


@pytest.mark.parametrize('warmup', [0, 10])
@pytest.mark.parametrize('final_fraction', [0.0, 0.1, 1.0])
def test_the_learning_rate_warms_up_on_a_line_and_falls_on_a_cosine(warmup, final_fraction):
  config = run_config(
    steps=50, learning_rate=0.3, warmup_steps=warmup, final_fraction=final_fraction
  )

  rate = jax.jit(optimizer.schedule(config))

  for step in (0, 1, 5, 9, 10, 11, 30, 49, 50, 51, 1000):
    expected = expected_rate(step, peak=0.3, warmup=warmup, steps=50, final_fraction=final_fraction)
    np.testing.assert_allclose(rate(step), expected, rtol=1e-5, atol=1e-8, err_msg=str(step))


def test_the_learning_rate_is_0_then_its_peak_then_its_final_fraction():
  rate = jax.jit(
    optimizer.schedule(
      run_config(steps=400, learning_rate=6e-4, warmup_steps=40, final_fraction=0.1)
    )
  )

  found = [float(rate(step)) for step in (0, 20, 40, 220, 400)]

  # Half way down the cosine, at 40 + 360 / 2, is the mean of both ends.
  np.testing.assert_allclose(found, [0.0, 3e-4, 6e-4, 3.3e-4, 6e-5], rtol=1e-5)


# Which parameters


@functools.cache
def abstract_params(name, **shape):
  config = config_lib.Config(
    model=config_lib.ModelConfig(**shape), encoding=config_lib.EncodingConfig(name)
  )
  return jax.eval_shape(functools.partial(train.init, config))['params']


def chosen(choose, params):
  """Returns the names where `choose` is true."""
  return [
    '/'.join(key.key for key in path)
    for path, is_chosen in jax.tree_util.tree_leaves_with_path(choose(params))
    if is_chosen
  ]


def test_matrices_decay_and_norms_biases_and_encodings_do_not():
  params = abstract_params(
    'fire', num_layers=1, activation='swiglu', tied_embeddings=False, norm='layernorm'
  )

  assert chosen(optimizer.decays, params) == [
    'block_0/attention/key_DGC',
    'block_0/attention/out_HCD',
    'block_0/attention/query_DHC',
    'block_0/attention/value_DGC',
    'block_0/mlp/gate_DF',
    'block_0/mlp/in_DF',
    'block_0/mlp/out_FD',
    'embedding_VD',
    'output_VD',
  ]
  others = set(chosen(lambda tree: jax.tree.map(lambda _: True, tree), params))
  assert sorted(others - set(chosen(optimizer.decays, params))) == [
    'block_0/attention/encoding/b_in_W',
    'block_0/attention/encoding/b_out_H',
    'block_0/attention/encoding/c',
    'block_0/attention/encoding/length_multiplier',
    'block_0/attention/encoding/w_in_W',
    'block_0/attention/encoding/w_out_WH',
    'block_0/attention_norm/bias_D',
    'block_0/attention_norm/scale_D',
    'block_0/mlp_norm/bias_D',
    'block_0/mlp_norm/scale_D',
    'norm/bias_D',
    'norm/scale_D',
  ]


def test_stacking_layers_for_a_scan_makes_no_norm_a_matrix():
  decaying = chosen(optimizer.decays, abstract_params('t5', num_layers=3, scan_layers=True))

  assert decaying == [
    'blocks/attention/key_DGC',
    'blocks/attention/out_HCD',
    'blocks/attention/query_DHC',
    'blocks/attention/value_DGC',
    'blocks/mlp/in_DF',
    'blocks/mlp/out_FD',
    'embedding_VD',
  ]


@pytest.mark.parametrize(
  ('name', 'expected'),
  [
    ('rope', []),
    ('learned', ['encoding/table_ZD']),
    ('t5', ['block_0/attention/encoding/bias_ZH']),
    ('kerple_log', [f'block_0/attention/encoding/{name}' for name in ('r1_H', 'r2_H')]),
    ('fire_s', [f'encoding/{name}' for name in ('b_in_W', 'b_out_H', 'w_in_W', 'w_out_WH')]),
  ],
)
def test_the_arrays_of_an_encoding_and_not_its_scalars_learn_at_their_own_rate(name, expected):
  params = abstract_params(name, num_layers=1)

  assert chosen(optimizer.encoding_weights, params) == expected
  assert not set(expected) & set(chosen(optimizer.decays, params))


# Steps


def expected_steps(c, steps, params, gradients):
  """AdamW (Loshchilov & Hutter 2019, algorithm 2) of {name: array}, clipped by the norm of all."""
  params = {name: np.float64(value) for name, value in params.items()}
  first = {name: np.zeros_like(value) for name, value in params.items()}
  second = {name: np.zeros_like(value) for name, value in params.items()}
  for step, gradient in enumerate(gradients):
    gradient = {name: np.float64(value) for name, value in gradient.items()}
    norm = np.sqrt(sum((value**2).sum() for value in gradient.values()))
    shrink = min(1.0, c.clip_norm / norm)
    rate = expected_rate(
      step,
      peak=c.learning_rate,
      warmup=c.warmup_steps,
      steps=steps,
      final_fraction=c.final_fraction,
    )
    for name in params:
      clipped = shrink * gradient[name]
      first[name] = c.beta1 * first[name] + (1 - c.beta1) * clipped
      second[name] = c.beta2 * second[name] + (1 - c.beta2) * clipped**2
      mean = first[name] / (1 - c.beta1 ** (step + 1))
      variance = second[name] / (1 - c.beta2 ** (step + 1))
      update = mean / (np.sqrt(variance) + c.epsilon)
      if name == 'in_DF':
        update = update + c.weight_decay * params[name]
      if name == 'table_ZD':
        update = c.encoding_rate * update
      params[name] = params[name] - rate * update
  return params


def nested(flat):
  """The encoding's array and scalar lie under 'encoding', as in a model."""
  return {
    'block_0': {'in_DF': flat['in_DF'], 'norm': {'scale_D': flat['scale_D']}},
    'encoding': {'table_ZD': flat['table_ZD'], 'c': flat['c']},
  }


@pytest.mark.parametrize('gradient_size', [0.01, 10.0], ids=['whole', 'clipped'])
@pytest.mark.parametrize('encoding_rate', [1.0, 0.2])
def test_steps_are_adamw_with_clipping_decay_of_matrices_and_a_rate_for_encodings(
  gradient_size, encoding_rate
):
  config = run_config(
    steps=20,
    learning_rate=0.3,
    warmup_steps=2,
    encoding_rate=encoding_rate,
    beta1=0.8,
    beta2=0.9,
    epsilon=1e-3,
    weight_decay=0.25,
    clip_norm=0.5,
  )
  rng = np.random.default_rng(0)
  shapes = {'in_DF': (4, 3), 'scale_D': (4,), 'table_ZD': (5, 4), 'c': ()}
  start = {name: np.float32(rng.normal(size=shape)) for name, shape in shapes.items()}
  gradients = [
    {name: np.float32(gradient_size * rng.normal(size=shape)) for name, shape in shapes.items()}
    for _ in range(4)
  ]

  transformation = optimizer.make(config)
  params, update = jax.tree.map(jnp.asarray, nested(start)), jax.jit(transformation.update)
  state = transformation.init(params)
  for gradient in gradients:
    updates, state = update(nested(gradient), state, params)
    params = jax.tree.map(jnp.add, params, updates)

  expected = nested(expected_steps(config.optimizer, 20, start, gradients))
  jax.tree.map(
    lambda leaf, oracle: np.testing.assert_allclose(leaf, oracle, rtol=0, atol=1e-5),
    params,
    expected,
  )
  assert np.abs(params['block_0']['in_DF'] - start['in_DF']).max() > 0.1


def test_the_first_step_of_a_warmup_moves_nothing():
  transformation = optimizer.make(run_config(warmup_steps=2))
  params = {'in_DF': jnp.ones((2, 3))}

  updates, _ = jax.jit(transformation.update)(params, transformation.init(params), params)

  assert (np.asarray(updates['in_DF']) == 0).all()
