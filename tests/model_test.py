"""The decoder against an oracle of its architecture, its laws, the loss, and a training step."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from lex_fire import config as config_lib
from lex_fire import encodings, errors, loss, model, rematerialization, train

LENGTH, VOCAB = 16, 32
SHAPE = {
  'num_layers': 2,
  'd_model': 16,
  'num_heads': 4,
  'num_kv_heads': 2,
  'head_dim': 4,
  'd_ff': 24,
  'vocab_size': VOCAB,
}
# Lengths at which tiny rows already tell an encoding's near from its far.
OPTIONS = {
  'learned': {'max_length': LENGTH},
  'fire': {'threshold': 6.0, 'width': 8},
  'fire_s': {'threshold': 6.0, 'width': 8},
  't5': {'num_buckets': 8, 'max_distance': 12},
}
# A float32 logit after two layers of sums of 16 to 24 terms; logits are of order 1 to 4.
ROUNDING = 1e-5

every_encoding = pytest.mark.parametrize('name', encodings.ENCODINGS)


def options_of(name, causal=True):
  """Returns the encoding's options; for an encoder, such as let it tell later keys apart."""
  options = OPTIONS.get(name, {})
  if causal or encodings.get(name, **options).bidirectional:
    return options
  return options | {'bidirectional': True}


def make(name='nope', options=None, **shape):
  """Returns the tiny model with an encoding: a decoder, or an encoder if not `causal`."""
  config = config_lib.ModelConfig(**SHAPE | shape)
  encoding = encodings.get(
    name, **(options_of(name, config.causal) if options is None else options)
  )
  return model.Transformer(config, encoding)


@functools.cache
def shapes(name='nope', **shape):
  """Returns the tiny decoder's parameters as shapes."""
  return jax.eval_shape(make(name, **shape).init, jax.random.key(0), tokens(1, 1))['params']


@functools.cache
def initial(name='nope', **shape):
  """Returns random parameters, away from their start, where norms do nothing and biases are 0."""
  rng = np.random.default_rng(5)

  def draw(path, leaf):
    mean = path[-1].key in ('scale_D', 'c', 'length_multiplier', 'r1_H', 'r2_H')
    return jnp.asarray(mean + 0.25 * rng.normal(size=leaf.shape), jnp.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes(name, **shape))


@functools.cache
def _compiled(name, shape):
  transformer = make(name, **dict(shape))
  return jax.jit(lambda params, *args: transformer.apply({'params': params}, *args))


def logits(name, params, *args, **shape):
  """Returns logits_BLV of the tiny decoder, compiled once a length."""
  return np.asarray(_compiled(name, tuple(sorted(shape.items())))(params, *args))


def tokens(rows, length, seed=0):
  return np.random.default_rng(seed).integers(0, VOCAB, (rows, length)).astype(np.int32)


def tokens_changed_one_by_one():
  """Returns a row, and then for each of its tokens the row in which that is another."""
  tokens_1L = tokens(1, LENGTH)
  changed_LL = (tokens_1L + np.eye(LENGTH, dtype=np.int32) * (VOCAB // 2)) % VOCAB
  return np.concatenate([tokens_1L, changed_LL])


@functools.cache
def logits_changed_one_by_one(name, causal=True):
  """Returns logits_BLV of those rows."""
  return logits(name, initial(name), tokens_changed_one_by_one(), causal=causal)


# Against the architecture


def expected_logits(c, name, params, tokens_BL, **options):
  """logits_BLV in float64 of tokens at positions 0, 1 ..., token by token where it can be."""
  params = jax.tree.map(np.float64, params)
  position_BL = np.broadcast_to(np.arange(tokens_BL.shape[1]), tokens_BL.shape)
  visible_BQK = oracles.visible_pairs(position_BL, position_BL, causal=c.causal)

  def norm(x_BLD, weights):
    if c.norm == 'layernorm':
      x_BLD = x_BLD - x_BLD.mean(axis=-1, keepdims=True)
    root_mean_square = np.sqrt((x_BLD**2).mean(axis=-1, keepdims=True) + 1e-6)
    return x_BLD / root_mean_square * weights['scale_D'] + weights.get('bias_D', 0.0)

  def attention(x_BLD, weights):
    query_BLHC = np.tensordot(x_BLD, weights['query_DHC'], 1)
    key_BLGC = np.tensordot(x_BLD, weights['key_DGC'], 1)
    value_BLGC = np.tensordot(x_BLD, weights['value_DGC'], 1)
    logits_BHQK = oracles.logits(
      name,
      weights.get('encoding', params.get('encoding')),
      query_BLHC,
      key_BLGC,
      position_BL,
      position_BL,
      only_BQK=visible_BQK,
      **options,
    )
    out_BLHC = oracles.attention(logits_BHQK, visible_BQK, value_BLGC)
    return np.tensordot(out_BLHC, weights['out_HCD'], 2)

  def mlp(x_BLD, weights):
    hidden_BLF = x_BLD @ weights['in_DF']
    if c.activation == 'swiglu':
      gate_BLF = x_BLD @ weights['gate_DF']
      return (gate_BLF / (1 + np.exp(-gate_BLF)) * hidden_BLF) @ weights['out_FD']
    inner_BLF = np.sqrt(2 / np.pi) * (hidden_BLF + 0.044715 * hidden_BLF**3)
    return (0.5 * hidden_BLF * (1 + np.tanh(inner_BLF))) @ weights['out_FD']

  x_BLD = params['embedding_VD'][tokens_BL] * np.sqrt(c.d_model)
  x_BLD = oracles.embedded(name, params.get('encoding'), x_BLD, position_BL, **options)
  for layer in range(c.num_layers):
    block = params[f'block_{layer}']
    x_BLD = x_BLD + attention(norm(x_BLD, block['attention_norm']), block['attention'])
    x_BLD = x_BLD + mlp(norm(x_BLD, block['mlp_norm']), block['mlp'])
  output_VD = params['embedding_VD'] if c.tied_embeddings else params['output_VD']
  return norm(x_BLD, params['norm']) @ output_VD.T


@pytest.mark.parametrize(
  'shape',
  [
    {},
    {'activation': 'swiglu', 'norm': 'rmsnorm', 'tied_embeddings': False},
    {'activation': 'swiglu', 'num_kv_heads': 1, 'd_model': 12},
    {'norm': 'rmsnorm', 'num_kv_heads': 4, 'head_dim': 6, 'num_layers': 3},
  ],
  ids=str,
)
def test_logits_are_those_of_the_architecture(shape):
  params, tokens_BL = initial(**shape), tokens(2, 6)

  logits_BLV = logits('nope', params, tokens_BL, **shape)

  c = config_lib.ModelConfig(**SHAPE | shape)
  assert logits_BLV.dtype == np.float32
  expected_BLV = expected_logits(c, 'nope', params, tokens_BL)
  np.testing.assert_allclose(logits_BLV, expected_BLV, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize('causal', [True, False])
@every_encoding
def test_logits_are_those_of_the_architecture_under_every_encoding(name, causal):
  params, tokens_1L = initial(name), tokens_changed_one_by_one()[:1]

  logits_1LV = logits_changed_one_by_one(name, causal)[:1]

  c = config_lib.ModelConfig(**SHAPE, causal=causal)
  options = options_of(name, causal)
  expected_1LV = expected_logits(c, name, params, tokens_1L, **options)
  np.testing.assert_allclose(logits_1LV, expected_1LV, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize('tied', [True, False])
def test_only_a_separate_output_has_a_matrix_of_its_own(tied):
  names = set(shapes(tied_embeddings=tied))

  assert names == {'embedding_VD', 'norm', 'block_0', 'block_1'} | (
    set() if tied else {'output_VD'}
  )


# What a token sees


@pytest.mark.parametrize('causal', [True, False])
@every_encoding
def test_a_logit_depends_on_no_later_token_in_a_decoder_and_on_all_in_an_encoder(name, causal):
  first_1LV, *changed = np.split(logits_changed_one_by_one(name, causal), LENGTH + 1)

  # [of the logit, of the token]
  size_LL = np.stack([np.abs(one - first_1LV)[0].max(axis=-1) for one in changed], axis=1)
  later_LL = np.triu(np.ones((LENGTH, LENGTH), bool), 1)
  assert (size_LL[~later_LL] > 10 * ROUNDING).all()
  if causal:
    assert (size_LL[later_LL] < ROUNDING).all()
  else:
    assert (size_LL[later_LL] > 10 * ROUNDING).all()


@every_encoding
def test_documents_of_a_packed_row_have_the_logits_they_have_alone(name):
  params, lengths = initial(name), (3, 8, 5)
  tokens_1L = tokens(1, LENGTH)
  position_1L = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])[None]
  segment_ids_1L = np.repeat(np.int32([1, 2, 3]), lengths)[None]

  packed_1LV = logits(name, params, tokens_1L, position_1L, segment_ids_1L)

  start = 0
  for n in lengths:
    alone_1LV = logits(name, params, np.pad(tokens_1L[:, start : start + n], ((0, 0), (0, 8 - n))))
    found_1LV = packed_1LV[:, start : start + n]
    np.testing.assert_allclose(found_1LV, alone_1LV[:, :n], rtol=0, atol=ROUNDING)
    start += n


@every_encoding
def test_logits_of_a_prefix_do_not_change_when_the_sequence_grows(name):
  tokens_1L, long_1LV = tokens_changed_one_by_one()[:1], logits_changed_one_by_one(name)[:1]

  short_1LV = logits(name, initial(name), tokens_1L[:, :8])

  np.testing.assert_allclose(long_1LV[:, :8], short_1LV, rtol=0, atol=ROUNDING)


def test_logits_of_a_prefix_do_not_change_when_the_sequence_is_64_times_as_long():
  params, tokens_BL = initial('fire'), tokens(1, 64 * 8)

  short_BLV = logits('fire', params, tokens_BL[:, :8])
  long_BLV = logits('fire', params, tokens_BL)

  np.testing.assert_allclose(long_BLV[:, :8], short_BLV, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize('name', ['sinusoidal', 'rope', 'fire'])  # embedded, turned, and biased
def test_positions_are_0_to_the_length_unless_they_are_given(name):
  params, tokens_BL = initial(name), tokens(2, LENGTH)
  position_1L = np.arange(LENGTH, dtype=np.int32)[None]

  implied_BLV = logits(name, params, tokens_BL)
  given_BLV = logits(name, params, tokens_BL, position_1L)
  doubled_BLV = logits(name, params, tokens_BL, 2 * position_1L)

  np.testing.assert_allclose(given_BLV, implied_BLV, rtol=0, atol=ROUNDING)
  assert np.abs(doubled_BLV - implied_BLV).max() > 100 * ROUNDING


def test_a_row_longer_than_a_learned_table_is_refused():
  params = initial('learned')

  logits('learned', params, tokens(1, LENGTH))
  with pytest.raises(errors.UserError, match=r"length=17 is past the 16 .*'learned'"):
    logits('learned', params, tokens(1, LENGTH + 1))


# Ways to compute the same


def restacked(params):
  """The parameters of an unrolled model as those of a scan over its layers."""
  blocks = [params[f'block_{layer}'] for layer in range(SHAPE['num_layers'])]
  rest = {name: value for name, value in params.items() if not name.startswith('block_')}
  return rest | {'blocks': jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


@functools.cache
def value_and_gradient(name, **shape):
  """Returns (logits_BLV, gradients as of the unrolled model), computed as `shape` says."""
  transformer, tokens_BL = make(name, **shape), tokens(2, LENGTH)
  arrange = restacked if shape.get('scan_layers') else lambda params: params

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def gradient(params):
    logits_BLV = transformer.apply({'params': arrange(params)}, tokens_BL)
    return jnp.sin(logits_BLV).mean(), logits_BLV

  gradients, logits_BLV = gradient(initial(name))
  return logits_BLV, gradients


@pytest.mark.parametrize(
  ('name', 'shape'),
  [
    ('fire', {'scan_layers': True}),
    ('fire', {'remat': 'block'}),
    ('fire', {'remat': 'elementwise', 'attention': 'chunked'}),
    ('fire', {'scan_layers': True, 'remat': 'block_but_attention', 'attention': 'chunked'}),
    ('fire', {'attention': 'chunked'}),
    ('fire_s', {'scan_layers': True}),
    ('fire_s', {'scan_layers': True, 'remat': 'block', 'attention': 'chunked'}),
  ],
  ids=str,
)
def test_scan_remat_and_tiles_change_neither_logits_nor_gradients(name, shape):
  """FIRE has parameters in each layer, FIRE-S one set for all."""
  logits_BLV, gradients = value_and_gradient(name, attention='reference')

  other_BLV, other_gradients = value_and_gradient(name, **{'attention': 'reference'} | shape)

  np.testing.assert_allclose(other_BLV, logits_BLV, rtol=0, atol=ROUNDING)
  for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
    other = functools.reduce(lambda tree, key: tree[key.key], path, other_gradients)
    # gradients of a mean over 1024 logits are of order 1e-2
    np.testing.assert_allclose(other, gradient, rtol=1e-4, atol=1e-6, err_msg=str(path))


def test_scanned_layers_start_from_different_parameters():
  params = jax.jit(make('fire', scan_layers=True).init)(jax.random.key(0), tokens(1, 1))['params']

  for path, leaf in jax.tree_util.tree_leaves_with_path(params['blocks']['attention']):
    assert leaf.shape[0] == SHAPE['num_layers']
    if path[-1].key not in ('c', 'length_multiplier'):
      assert np.abs(leaf[0] - leaf[1]).max() > 1e-3, path


@functools.cache
def kept_and_computed(remat):
  """Returns the numbers kept for the backward pass, and the loops and products of a gradient.

  A tiled attention is a loop in each pass.
  """
  params, tokens_BL = initial(), tokens(2, LENGTH)
  transformer = make(remat=remat, attention='chunked')

  def total(params):
    return transformer.apply({'params': params}, tokens_BL).sum()

  backward = jax.eval_shape(lambda params: jax.vjp(total, params)[1], params)
  text = str(jax.make_jaxpr(jax.grad(total))(params))
  kept = sum(leaf.size for leaf in jax.tree.leaves(backward))
  return kept, text.count('while['), text.count('dot_general[')


def test_each_rematerialization_keeps_less_than_the_one_before():
  kept = [kept_and_computed(name)[0] for name in rematerialization.POLICIES]

  assert all(less < 0.85 * more for more, less in itertools.pairwise(kept)), kept


def test_what_is_computed_again_is_what_the_name_says():
  loops, products = (
    {name: kept_and_computed(name)[index] for name in rematerialization.POLICIES}
    for index in (1, 2)
  )

  layers = SHAPE['num_layers']
  once = {'none': 2 * layers, 'elementwise': 2 * layers, 'block_but_attention': 2 * layers}
  assert loops == once | {'block': 3 * layers}
  assert products['none'] == products['elementwise'] < products['block_but_attention']


def test_fire_has_parameters_in_each_layer_and_fire_s_exactly_one_set():
  def places(name, **shape):
    leaves = jax.tree_util.tree_leaves_with_path(shapes(name, **shape))
    paths = ['/'.join(key.key for key in path) for path, _ in leaves]
    return {path.rpartition('/')[0] for path in paths if 'encoding' in path}

  assert places('fire') == {f'block_{layer}/attention/encoding' for layer in (0, 1)}
  assert places('fire', scan_layers=True) == {'blocks/attention/encoding'}
  assert places('fire_s') == places('fire_s', scan_layers=True) == {'encoding'}
  assert places('rope') == set()


def test_implementations_agree_on_packed_rows_longer_than_a_tile():
  length, params = 150, initial('fire')
  tokens_BL = tokens(2, length)
  segment_ids_BL = np.int32([[1] * 100 + [2] * 50, [1] * 10 + [2] * 140])
  position_BL = np.int32([[*range(100), *range(50)], [*range(10), *range(140)]])
  args = (params, tokens_BL, position_BL, segment_ids_BL)

  dense_BLV = logits('fire', *args, attention='reference')
  tiled_BLV = logits('fire', *args, attention='chunked')

  np.testing.assert_allclose(tiled_BLV, dense_BLV, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize('name', ['fire', 'xpos'])
def test_bfloat16_computes_near_float32_and_keeps_parameters_and_logits_float32(name):
  params, tokens_BL = initial(name), tokens(2, LENGTH)

  own = shapes(name, dtype='bfloat16')
  logits_BLV = logits(name, params, tokens_BL)
  half_BLV = logits(name, params, tokens_BL, dtype='bfloat16')

  assert {leaf.dtype for leaf in jax.tree.leaves(own)} == {np.dtype(np.float32)}
  assert half_BLV.dtype == np.float32
  error_BLV = np.abs(half_BLV - logits_BLV)
  # Some ten roundings to 8 bits, each 2^-9 of a value of up to 4, add up as a random walk.
  assert 1e-4 < error_BLV.mean() < 0.02 and error_BLV.max() < 0.1


@pytest.mark.parametrize('name', ['fire', 'rope'])
def test_a_second_call_does_not_recompile(name):
  transformer, params, traces = make(name), initial(name), []

  @jax.jit
  def apply(params, *args):
    traces.append(name)
    return transformer.apply({'params': params}, *args)

  position_1L = np.arange(8, dtype=np.int32)[None]
  apply(params, tokens(1, 8), position_1L)
  apply(params, tokens(1, 8, seed=1), position_1L + 100)

  assert len(traces) == 1


# Training on one device


def run_config(name='fire', **sections):
  """Returns the config of a tiny run, without warmup, whose step is smooth in the gradient.

  With Adam's epsilon far below a gradient, its first step is the sign of it, which rounding turns.
  """
  optimizer = {'learning_rate': 0.01, 'warmup_steps': 0, 'epsilon': 1e-2}
  return config_lib.Config(
    model=config_lib.ModelConfig(**SHAPE | {'num_layers': 1}),
    encoding=config_lib.EncodingConfig(name, tuple(sorted(OPTIONS.get(name, {}).items()))),
    data=config_lib.DataConfig(length=LENGTH, batch_size=8),
    optimizer=config_lib.OptimizerConfig(**optimizer | sections.get('optimizer', {})),
    train=config_lib.TrainConfig(**sections.get('train', {})),
  )


def make_batch(packed=False, seed=0):
  """Returns a batch of 8 rows whose weights are far from equal, in rows and in tokens."""
  rng, tokens_BL = np.random.default_rng(seed), tokens(8, LENGTH + 1, seed)
  weights_BL = rng.integers(0, 3, (8, LENGTH)).astype(np.float32)
  weights_BL[[0, 2, 5]] = 0.0
  position = np.arange(LENGTH, dtype=np.int32)[None]
  first_of_second_B1 = rng.integers(1, LENGTH, (8, 1))
  second_BL = (position >= first_of_second_B1).astype(np.int32)
  return {
    'inputs_BL': tokens_BL[:, :-1],
    'targets_BL': tokens_BL[:, 1:],
    'loss_weights_BL': weights_BL,
    'position_BL': position - second_BL * first_of_second_B1.astype(np.int32)
    if packed
    else position,
    'segment_ids_BL': second_BL + 1 if packed else None,
  }


@functools.cache
def first_state():
  return jax.jit(functools.partial(train.init, run_config()))()


@functools.cache
def compiled_step(accumulation):
  config = run_config(train={'accumulation': accumulation})
  return jax.jit(functools.partial(train.step, config))


@functools.cache
def one_step(accumulation, packed):
  return compiled_step(accumulation)(first_state(), make_batch(packed))


@pytest.mark.parametrize(
  ('accumulation', 'packed'),
  [(2, False), (4, True)],
  ids=['2 parts, shared positions', '4 parts, packed'],
)
def test_accumulation_gives_the_same_step_to_rounding(accumulation, packed):
  """Its loss is the mean over all weighted tokens, whatever the parts weigh."""
  state, values = one_step(1, packed)

  other_state, other_values = one_step(accumulation, packed)

  for name in ('loss', 'gradient_norm'):
    np.testing.assert_allclose(other_values[name], values[name], rtol=1e-5)
  jax.tree.map(
    lambda other, leaf: np.testing.assert_allclose(other, leaf, rtol=1e-5, atol=2e-6),
    other_state['params'],
    state['params'],
  )


def test_parts_of_a_batch_need_no_second_copy_of_the_gradients():
  """Only one of a layer: 16 layers, whose parameters are most of the memory, as many rows a part.

  The layers are a scan; where they are not, it is the compiler's to say when each is added.
  """
  wide = {'num_layers': 16, 'd_model': 32, 'd_ff': 512, 'scan_layers': True, 'remat': 'block'}
  params = jax.eval_shape(make(**wide).init, jax.random.key(0), tokens(1, 1))['params']

  def temporaries(parts):
    config = dataclasses.replace(
      run_config('nope', train={'accumulation': parts}),
      model=config_lib.ModelConfig(**SHAPE | wide),
      data=config_lib.DataConfig(length=LENGTH, batch_size=parts),
    )
    batch = {
      name: None if x is None else x[: 1 if len(x) == 1 else parts]
      for name, x in make_batch().items()
    }
    sums = jax.jit(functools.partial(train.gradient_sums, config))
    return sums.lower(params, batch).compile().memory_analysis().temp_size_in_bytes

  copy = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
  assert temporaries(4) - temporaries(1) < 0.1 * copy


def test_the_loss_of_a_step_is_the_weighted_mean_before_it():
  params, batch = first_state()['params'], make_batch(packed=True)

  _, values = one_step(1, True)

  logits_BLV = np.float64(
    logits(
      'fire',
      params,
      batch['inputs_BL'],
      batch['position_BL'],
      batch['segment_ids_BL'],
      num_layers=1,
    )
  )
  total_BL = np.log(np.exp(logits_BLV).sum(axis=-1))
  chosen_BL = np.take_along_axis(logits_BLV, batch['targets_BL'][..., None], axis=-1)[..., 0]
  expected = np.average(total_BL - chosen_BL, weights=batch['loss_weights_BL'])
  np.testing.assert_allclose(values['loss'], expected, rtol=1e-5)


def test_only_the_ratios_of_loss_weights_matter():
  batch = make_batch(packed=True)
  batch['loss_weights_BL'] = batch['loss_weights_BL'] * 64.0

  _, values = one_step(1, True)
  _, scaled_values = compiled_step(1)(first_state(), batch)

  for name in ('loss', 'gradient_norm'):
    np.testing.assert_allclose(scaled_values[name], values[name], rtol=1e-5)


def test_thirty_steps_overfit_one_batch_and_compile_once():
  config = run_config(
    optimizer={'learning_rate': 0.03, 'epsilon': 1e-8, 'weight_decay': 0.0}, train={'steps': 30}
  )
  state, batch, traces, losses = first_state(), make_batch(), [], []

  @jax.jit
  def step(state, batch):
    traces.append('step')
    return train.step(config, state, batch)

  for _ in range(30):
    state, values = step(state, batch)
    losses.append(float(values['loss']))

  assert losses[0] > 3.0 and losses[-1] < 0.5, losses
  assert len(traces) == 1


def test_the_first_loss_of_a_separate_output_is_near_log_of_the_vocabulary():
  """Logits start as normal numbers of variance 1: log V + 1/2, to 0.25 in a mean of 128 tokens."""
  transformer, batch = make(tied_embeddings=False), make_batch()

  @jax.jit
  def first_losses():
    params = transformer.init(jax.random.key(0), batch['inputs_BL'])
    return loss.token_losses(transformer.apply(params, batch['inputs_BL']), batch['targets_BL'])

  assert abs(first_losses().mean() - (np.log(VOCAB) + 0.5)) < 0.25
