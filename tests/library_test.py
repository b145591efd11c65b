"""Attention by the kernels that others keep: right where it serves, and chosen there alone."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from lex_fire import attention, config, encodings, errors, kernels, model, sharding
from lex_fire.kernels import library

JAX_CUDNN = 'jax._src.cudnn.fused_attention_stablehlo'
LENGTH, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 256, 4, 2, 8
MASKS = {'causal': {}, 'window': {'window': 100}, 'bidirectional': {'causal': False}}
# On CPU: splash attention is interpreted, and XLA stands in for cuDNN under the same arguments.
HERE = {
  'splash': functools.partial(library.splash, interpret=True),
  'cudnn': functools.partial(library.cudnn, kernel='xla'),
}
NOWHERE = dict.fromkeys(
  ('query_position_BQ', 'key_position_BK', 'query_segment_BQ', 'key_segment_BK')
)
PLAIN = [
  name
  for name in encodings.ENCODINGS
  if encodings.get(name).bias is None and encodings.get(name).log_decay is None
]


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch):
  """As if this host had one, and cuDNN, of which JAX asks the version."""
  monkeypatch.setattr(library, 'why_no_cudnn_here', lambda: None)
  monkeypatch.setattr(f'{JAX_CUDNN}.check_cudnn_version', lambda: 91_000)


@pytest.mark.parametrize('mask', MASKS)
@pytest.mark.parametrize('name', HERE)
def test_values_and_gradients_equal_the_oracle(name, mask, monkeypatch):
  """In two tiles by two, of grouped heads."""
  for name_of_size in ('SPLASH_QUERIES', 'SPLASH_KEYS', 'LEAST_QUERIES'):
    monkeypatch.setattr(library, name_of_size, library.LANES)
  rng = np.random.default_rng(0)
  heads = NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS
  *arrays, d_out_BQHC = (
    jnp.bfloat16(rng.normal(size=(2, LENGTH, count, HEAD_DIM))) for count in (*heads, NUM_HEADS)
  )
  attend = functools.partial(
    HERE[name],
    encoding=encodings.get('nope'),
    params={},
    mask=kernels.Mask(**MASKS[mask]),
    **NOWHERE,
  )

  @jax.jit
  def both(arrays, d_out_BQHC):
    out_BQHC, pull = jax.vjp(attend, *arrays)
    return out_BQHC, pull(d_out_BQHC)

  out_BQHC, gradients = both(arrays, d_out_BQHC)

  arrays, d_out_BQHC = [np.float32(x) for x in arrays], np.float32(d_out_BQHC)
  position_BL = np.arange(LENGTH)[None].repeat(2, axis=0)
  visible_BQK = oracles.visible_pairs(position_BL, position_BL, **MASKS[mask])
  pairs = oracles.pairs('nope', {}, arrays, position_BL, position_BL, visible_BQK)
  expected_BQHC = oracles.attention(pairs.logits_BHQK, visible_BQK, arrays[2])
  np.testing.assert_allclose(
    np.float32(out_BQHC), expected_BQHC, atol=oracles.TOLERANCE['bfloat16']
  )
  oracles.assert_gradients(({}, gradients), pairs, visible_BQK, arrays, d_out_BQHC, 'bfloat16')


def structs(length, num_keys, head_dim, dtype):
  return (
    jax.ShapeDtypeStruct((1, count, heads, head_dim), dtype)
    for count, heads in ((length, NUM_HEADS), (num_keys or length, NUM_KV_HEADS))
  )


def chosen(
  platform,
  name='rope',
  length=4096,
  num_keys=None,
  head_dim=64,
  dtype=jnp.bfloat16,
  counted=True,
  **mask,
):
  query, key = structs(length, num_keys, head_dim, dtype)
  with jax.default_device(platform):
    return kernels.choose(
      'auto', encodings.get(name), kernels.Mask(**mask), query, key, counted=counted
    )


@pytest.mark.parametrize('mask', MASKS.values())
@pytest.mark.parametrize(('platform', 'name'), [('tpu', 'splash'), ('gpu', 'cudnn')])
def test_auto_takes_it_for_exactly_what_has_no_bias_and_no_decay(platform, name, mask):
  found = [
    encoding
    for encoding in encodings.ENCODINGS
    if chosen(platform, encoding, **mask).implementation == name
  ]

  assert found == PLAIN
  assert 'where there is no bias and no decay' in chosen(platform, **mask).reason


@pytest.mark.parametrize(
  ('case', 'reason'),
  [
    ({'name': 'fire'}, "cudnn knows no bias, which 'fire' has"),
    ({'name': 'xpos'}, "cudnn knows no log_decay, which 'xpos' has"),
    (
      {'counted': False},
      'cudnn needs rows of one segment whose positions are known to count from 0',
    ),
    ({'num_keys': 8192}, 'cudnn takes as many keys as queries, not 8192 for 4096'),
    ({'block': 128}, 'cudnn has no blockwise mask'),
    ({'dtype': jnp.float32}, 'cudnn: Q must be fp16/bf16/fp8_e4m3fn/fp8_e5m2, got float32'),
  ],
)
def test_where_it_cannot_serve_auto_takes_another_and_says_why(case, reason):
  choice = chosen('gpu', **case)

  assert choice.implementation == 'chunked' and choice.reason.endswith(f' ({reason})')
  assert chosen('tpu', **case).implementation == 'mosaic_tpu'


def test_cudnn_is_not_taken_for_a_topology_by_a_host_without_a_gpu(monkeypatch):
  monkeypatch.undo()

  assert chosen('gpu').reason.endswith(' (cudnn cannot be compiled for without a GPU)')


@pytest.mark.parametrize('capability', ['7.5', 'gfx942', None])
def test_cudnn_is_not_taken_on_a_gpu_that_it_does_not_serve(monkeypatch, capability):
  monkeypatch.undo()
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  device = types.SimpleNamespace(compute_capability=capability)
  monkeypatch.setattr(jax, 'local_devices', lambda: [device])

  why_not = f' (cudnn needs compute capability 8.0 or above, and not {capability})'
  assert chosen('gpu').reason.endswith(why_not)


def test_a_gpu_without_the_library_goes_on_without_it(monkeypatch):
  monkeypatch.undo()
  monkeypatch.setattr(library, 'why_no_cudnn_here', lambda: None)

  assert chosen('gpu').implementation == 'chunked'
  assert chosen('gpu').reason.endswith(' (cudnn: cuDNN is not detected)')


@pytest.mark.parametrize(
  ('why_not', 'sizes', 'reason'),
  [
    (library.why_not_splash, (4000, 64), 'rows of a multiple of 128 tokens, not of 4000'),
    (library.why_not_splash, (4736, 64), 'would cut rows of 4736 tokens in tiles of 128'),
    (library.why_not_splash, (65_536, 64), 'on the host, up to 2048, not 8192'),
    (
      library.why_not_cudnn,
      (4096, 60),
      'cudnn: The head dim must be <= 128 and a multiple of 8, but got 60',
    ),
    (
      library.why_not_cudnn,
      (4096, 256),
      'cudnn: The head dim must be <= 128 and a multiple of 8, but got 256',
    ),
  ],
)
def test_a_size_that_it_does_not_take_is_told(why_not, sizes, reason):
  length, head_dim = sizes
  query, key = structs(length, None, head_dim, jnp.bfloat16)

  assert reason in why_not(encodings.get('nope'), kernels.Mask(), query, key, True)


@pytest.mark.parametrize('name', HERE)
def test_positions_are_refused_not_ignored(name):
  arrays = [jnp.zeros((1, 128, 2, 8), jnp.bfloat16)] * 3
  where = NOWHERE | {'query_position_BQ': np.arange(128)[None]}

  with pytest.raises(
    errors.UserError, match="positions are known to count from 0; ask for 'auto' "
  ):
    HERE[name](*arrays, encoding=encodings.get('nope'), params={}, mask=kernels.Mask(), **where)


@pytest.mark.parametrize(('window', 'told'), [(None, '0'), (100, '100')])
def test_a_model_without_positions_is_by_cudnn_forward_and_backward_on_a_gpu(window, told):
  """On a mesh, each device its own rows and heads."""
  shape = config.ModelConfig(num_layers=1, vocab_size=256, head_dim=32, dtype='bfloat16')
  transformer = model.Transformer(shape, encodings.get('rope'), kernels.Mask(window=window))
  tokens_BL = jax.ShapeDtypeStruct((4, 4096), jnp.int32)
  mesh = sharding.make_mesh(replica=2, tensor=2, devices=jax.devices()[:4])

  def loss(params, tokens_BL):
    return transformer.apply({'params': params}, tokens_BL, None, None, tokens_BL).sum()

  params = jax.eval_shape(lambda: model.initial(transformer, jax.random.key(0)))
  with jax.set_mesh(mesh), jax.default_device('gpu'):
    choice = attention.choice(transformer, 4096, counted=True)
    traced = jax.jit(jax.grad(loss)).trace(params, tokens_BL)
    text = traced.lower(lowering_platforms=('cuda',)).as_text()

  assert choice.implementation == 'cudnn'
  rows_and_heads = 'tensor<2x4096x2x32xbf16>'  # of a device
  for target in ('__cudnn$fmhaSoftmax', '__cudnn$fmhaSoftmaxBackward'):
    (call,) = (line for line in text.splitlines() if f'@{target}(' in line)
    assert rows_and_heads in call and 'CAUSAL' in call
    assert re.search(r'sliding_window_length\\22: (\d+)', call).group(1) == told


@pytest.mark.parametrize('implementation', kernels.IMPLEMENTATIONS)
def test_a_model_that_asks_for_it_has_the_parameters_of_any_other(implementation):
  """Though splash attention takes no row of one token."""
  shape = config.ModelConfig(num_layers=1, attention=implementation)

  rope = encodings.get('rope')
  tokens_BL = jnp.zeros((1, 3), jnp.int32)

  found = jax.eval_shape(lambda: model.initial(model.Transformer(shape, rope), jax.random.key(0)))

  other = model.Transformer(dataclasses.replace(shape, attention='chunked'), rope)
  assert found == jax.eval_shape(other.init, jax.random.key(0), tokens_BL)['params']
