"""Attention over rows that devices hold in parts: the law that it is attention on one device.

Eight virtual CPU devices, which conftest.py asks for, stand for the accelerators of a mesh.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lex_fire import attention, encodings, errors, kernels, model, sharding
from lex_fire import config as config_lib
from lex_fire.kernels import chunked, flash, mosaic_tpu, ring

LENGTH, HEADS, KV_HEADS, CHANNELS = 64, 4, 2, 8
FOUR, MIXED = (1, 1, 4, 1), (1, 2, 2, 2)  # sequence=4; fsdp=2, sequence=2, tensor=2
# Each mask on one of the meshes, as either costs a compilation.
MASKS = {
  'causal': (kernels.Mask(), MIXED),
  'blockwise within a window': (kernels.Mask(block=6, window=9), FOUR),  # each hides some keys
  'bidirectional': (kernels.Mask(causal=False), FOUR),
}
# Where the defaults would be another encoding, or have but one tile, at this length.
OPTIONS = {'dynamic_ntk': {'train_length': 8}, 't5': {'bidirectional': True}}
FAST_XPOS = {'scale_base': 0.05}  # tiles of 3 tokens, which do not divide a chunk
CASES = [
  (name, mask)
  for name in encodings.ENCODINGS
  for mask in MASKS
  if encodings.get(name, **OPTIONS.get(name, {})).bidirectional or MASKS[mask][0].causal
]


def make_mesh(sizes):
  return sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])


def parameters(encoding):
  return encoding.init(jax.random.key(0), num_heads=HEADS, head_dim=CHANNELS, d_model=HEADS * 8)


@functools.cache
def arrays(length=LENGTH):
  """Returns queries, keys and values of four rows, and positions and segments: half are packed."""
  rng = np.random.default_rng(0)
  heads = (HEADS, KV_HEADS, KV_HEADS)
  tokens = [np.float32(rng.normal(size=(4, length, count, CHANNELS))) for count in heads]
  position_L, first = np.arange(length), 19
  position_BL = np.stack([position_L, np.where(position_L < first, position_L, position_L - first)])
  segment_BL = np.stack([0 * position_L, position_L >= first])
  return *tokens, *(np.int32(np.repeat(x_BL, 2, axis=0)) for x_BL in (position_BL, segment_BL))


def attend(encoding, mask, implementation='auto'):
  """Returns (params, query, key, value, position, segment) -> out_BQHC, from tokens on."""

  def of_tokens(params, query_BLHC, key_BLGC, value_BLGC, position_BL, segment_BL):
    if encoding.embed is not None:
      embedded_BLD = encoding.embed(params, position_BL, HEADS * CHANNELS)
      query_BLHC += embedded_BLD.reshape(query_BLHC.shape)
    if encoding.rotate is not None:
      query_BLHC, key_BLGC = (
        encoding.rotate(params, x_BLHC, position_BL) for x_BLHC in (query_BLHC, key_BLGC)
      )
    return kernels.attention(
      query_BLHC,
      key_BLGC,
      value_BLGC,
      encoding=encoding,
      params=params,
      query_position_BQ=position_BL,
      key_position_BK=position_BL,
      query_segment_BQ=segment_BL,
      key_segment_BK=segment_BL,
      mask=mask,
      implementation=implementation,
      split=sharding.split,
      sequence_axis=sharding.sequence_axis(query_BLHC.shape[1]),
    )

  return of_tokens


def gradients(function):
  """Returns (arguments of `attend`) -> out_BQHC, gradients of params, query, key and value."""

  def total(*arguments):
    out_BQHC = function(*arguments)
    weight_C = jnp.arange(-3.0, CHANNELS - 3)
    return (out_BQHC * weight_C[None, None, None]).sum(), out_BQHC

  def both(*arguments):
    found, out_BQHC = jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True)(*arguments)
    return out_BQHC, *found

  return both


def on_ring(encoding, mask, sizes, order_L, dtype=np.float32):
  """Returns what `gradients` does, by a mesh whose rows lie in an order, and back in their own."""
  back_L = np.argsort(order_L)
  with jax.set_mesh(make_mesh(sizes)):
    laid = [x_BL[:, order_L] for x_BL in arrays(len(order_L))]
    laid[:3] = [jnp.asarray(x_BLHC, dtype) for x_BLHC in laid[:3]]
    out_BLHC, of_params, *rest = jax.jit(gradients(attend(encoding, mask)))(
      parameters(encoding), *laid
    )
  return out_BLHC[:, back_L], of_params, *(x_BLHC[:, back_L] for x_BLHC in rest)


def check_alike(found, expected, most=1e-5):
  """Compares values, and gradients of params, query, key and value, each by its own scale."""
  for index, (one, other) in enumerate(zip(found, expected, strict=True)):
    scale = max((np.abs(leaf).max() for leaf in jax.tree.leaves(other)), default=0)
    # Of parameters it is a sum over all pairs, most of which cancel: softmax sees no constant.
    tolerance = scale * most * (3 if index == 1 else 1)
    for path, leaf in jax.tree_util.tree_leaves_with_path(other):
      part = functools.reduce(lambda tree, key: tree[key.key], path, one)
      np.testing.assert_allclose(part, leaf, rtol=0, atol=tolerance, err_msg=f'{index} {path}')


# One device


@pytest.mark.parametrize(('name', 'mask_name'), CASES)
def test_the_ring_gives_the_values_and_gradients_of_one_device(name, mask_name):
  """Heads are grouped, two rows of four packed, and tokens in the order that balances devices."""
  encoding = encodings.get(name, **OPTIONS.get(name, {}))
  mask, sizes = MASKS[mask_name]

  found = on_ring(encoding, mask, sizes, ring.zigzag(LENGTH, sizes[2], 'a row'))

  check_alike(
    found, gradients(attend(encoding, mask, 'reference'))(parameters(encoding), *arrays())
  )


@pytest.fixture
def kernel_for_tpu(monkeypatch):
  """Has attention go by the ring of the kernel for TPU, interpreted, in tiles of 8 x 16 tokens."""
  chosen = kernels.Choice('mosaic_tpu_ring', 'as the test has it')
  of_chunks = {'block': 8, 'interpret': True, 'pieces': ring.CHUNKS}
  interpreted = functools.partial(mosaic_tpu.attention, **of_chunks)
  in_ring = functools.partial(ring.attention, interpreted, flash.on_ring)
  monkeypatch.setattr(kernels, 'choose', lambda *_, **__: chosen)
  monkeypatch.setitem(kernels.RINGS, 'mosaic_tpu_ring', in_ring)


@pytest.mark.parametrize(
  ('name', 'mask_name'),
  [
    ('nope', 'blockwise within a window'),
    ('alibi', 'causal'),
    ('fire', 'causal'),
    ('fire', 'blockwise within a window'),
    ('t5', 'bidirectional'),
    ('xpos', 'causal'),
    ('xpos', 'bidirectional'),
  ],
)
def test_the_ring_of_the_kernel_for_tpu_gives_those_of_one_device(
  name, mask_name, kernel_for_tpu, monkeypatch
):
  encoding = encodings.get(name, **OPTIONS.get(name, {}))
  mask, sizes = MASKS[mask_name]

  found = on_ring(encoding, mask, sizes, ring.zigzag(LENGTH, sizes[2], 'a row'))

  monkeypatch.undo()
  check_alike(
    found, gradients(attend(encoding, mask, 'reference'))(parameters(encoding), *arrays())
  )


def test_the_ring_of_the_kernel_for_tpu_is_near_one_device_in_bfloat16(kernel_for_tpu, monkeypatch):
  """What is added up over devices is float32. Parts are of 18 tokens, and tiles of 8."""
  encoding, length = encodings.get('fire'), 72

  order_L = ring.zigzag(length, 4, 'a row')
  found = on_ring(encoding, kernels.Mask(), FOUR, order_L, jnp.bfloat16)

  monkeypatch.undo()
  rounded = [np.float32(jnp.bfloat16(x_BLHC)) for x_BLHC in arrays(length)[:3]]
  expected = gradients(attend(encoding, kernels.Mask(), 'reference'))(
    parameters(encoding), *rounded, *arrays(length)[3:]
  )
  assert all(x_BLHC.dtype == jnp.bfloat16 for x_BLHC in (found[0], *found[2:]))
  check_alike(jax.tree.map(np.float32, found), expected, most=0.01)


@pytest.mark.parametrize('mask_name', ['causal', 'bidirectional'])
def test_a_decay_is_exact_where_tiles_are_smaller_than_a_chunk_and_do_not_divide_it(mask_name):
  encoding, mask = encodings.get('xpos', **FAST_XPOS), MASKS[mask_name][0]

  found = on_ring(encoding, mask, MIXED, ring.zigzag(LENGTH, 2, 'a row'))

  # The reference would be one tile, too wide for it.
  expected = jax.jit(gradients(attend(encoding, mask, 'chunked')))
  check_alike(found, expected(parameters(encoding), *arrays()))


def test_a_learned_bias_without_a_table_is_that_of_one_device():
  """As FIRE's is with layers that make too many segments."""
  encoding = encodings.get('fire')._replace(table=None)

  found = on_ring(encoding, kernels.Mask(), FOUR, ring.zigzag(LENGTH, 4, 'a row'))

  expected = gradients(attend(encoding, kernels.Mask(), 'reference'))
  check_alike(found, expected(parameters(encoding), *arrays()))
  with pytest.raises(errors.UserError, match="'fire' has a bias and, .*no table, .*mesh.tensor=1"):
    on_ring(encoding, kernels.Mask(), MIXED, ring.zigzag(LENGTH, 2, 'a row'))


@pytest.mark.parametrize('name', ['fire', 'dynamic_ntk'])
def test_tokens_may_lie_in_any_order(name):
  """Only their positions say where they are."""
  encoding = encodings.get(name, **OPTIONS.get(name, {}))
  order_L = np.random.default_rng(1).permutation(LENGTH)

  found = on_ring(encoding, kernels.Mask(), FOUR, order_L)

  expected = gradients(attend(encoding, kernels.Mask(), 'reference'))
  check_alike(found, expected(parameters(encoding), *arrays()))


def test_the_reference_is_divided_by_the_compiler():
  encoding, order_L = encodings.get('fire'), ring.zigzag(LENGTH, 4, 'a row')
  function = attend(encoding, kernels.Mask(), 'reference')
  expected_BLHC = function(parameters(encoding), *arrays())

  with jax.set_mesh(make_mesh(FOUR)):
    laid = [sharding.constrain(x_BL[:, order_L], 'BL') for x_BL in arrays()[3:]]
    tokens = [x_BLHC[:, order_L] for x_BLHC in arrays()[:3]]
    found_BLHC = jax.jit(function)(parameters(encoding), *tokens, *laid)

  np.testing.assert_allclose(found_BLHC, expected_BLHC[:, order_L], atol=1e-5)


def test_a_model_of_rows_in_parts_gives_the_logits_of_whole_ones():
  """In the text's own order, which needs no positions to be given."""
  c = config_lib.ModelConfig(num_layers=1, d_model=16, head_dim=4, d_ff=16, vocab_size=9)
  transformer = model.Transformer(c, encodings.get('xpos'))
  tokens_BL = np.int32(np.random.default_rng(0).integers(0, 9, (2, LENGTH)))
  variables = jax.jit(transformer.init)(jax.random.key(0), tokens_BL[:, :1])
  expected_BLV = jax.jit(transformer.apply)(variables, tokens_BL)

  with jax.set_mesh(make_mesh(FOUR)):
    found_BLV = jax.jit(transformer.apply)(variables, tokens_BL)

  np.testing.assert_allclose(found_BLV, expected_BLV, atol=1e-5)


# What devices do


def test_the_order_that_balances_devices_gives_each_a_first_and_a_last_chunk():
  """The example of Dubey et al. 2024, section 3.3.2, for two devices: chunks 0 and 3, 1 and 2."""
  np.testing.assert_array_equal(ring.zigzag(8, 2, 'a row'), [0, 1, 6, 7, 2, 3, 4, 5])
  np.testing.assert_array_equal(ring.zigzag(6, 3, 'a row'), [0, 5, 1, 4, 2, 3])
  np.testing.assert_array_equal(ring.zigzag(5, 1, 'a row'), range(5))


def tiles(order_L, devices, block, mask):
  """Returns the number of tiles that each device visits in each step of the ring."""
  position_DJ1K = np.int32(order_L).reshape(devices, -1, 1, block)

  def visited(device, step):
    own_J1K, held_J1K = position_DJ1K[device], position_DJ1K[(device - step) % devices]
    queries = chunked.Queries(None, own_J1K, None)
    return int(
      chunked.tiles_to_visit(mask, queries, chunked.Keys(None, None, held_J1K, None)).sum()
    )

  return np.array([[visited(d, step) for step in range(devices)] for d in range(devices)])


@pytest.mark.parametrize('devices', [2, 4])
def test_no_device_waits_for_another_under_a_causal_mask(devices):
  """All visit the same number of tiles, not only in sum but in every step."""
  length, block = 512, 8

  balanced = tiles(ring.zigzag(length, devices, 'a row'), devices, block, kernels.Mask())
  in_order = tiles(np.arange(length), devices, block, kernels.Mask())

  assert (balanced == balanced[:1]).all()
  assert balanced.sum() == in_order.sum() == (length // block) * (length // block + 1) // 2
  # Without it the last has some 2 n - 1 times as much to do as the first, for whom all wait.
  assert in_order[-1].sum() > 0.85 * (2 * devices - 1) * in_order[0].sum()
  assert balanced.max(axis=0).sum() < 1.1 * balanced.sum() / devices


def test_steps_whose_keys_are_out_of_reach_visit_no_tile():
  visited = tiles(np.arange(256), 8, 8, kernels.Mask(window=20))

  assert (visited[:, 2:] == 0).all()
  assert (visited[:, 0] > 0).all()


def compiled(encoding, devices, length):
  """Returns the program of values and gradients, given and giving each device its own tokens."""
  mesh = make_mesh((1, 1, devices, 1))

  def abstract(letters, shape, dtype=jnp.float32):
    layout = sharding.spec(letters, shape, dict(mesh.shape), 'x')
    layout = jax.sharding.NamedSharding(mesh, layout)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=layout)

  tokens = [abstract('BLHC', (1, length, HEADS, CHANNELS))] * 3
  position_BL = abstract('BL', (1, length), jnp.int32)
  function = gradients(attend(encoding, kernels.Mask()))
  with jax.set_mesh(mesh):
    return jax.jit(function).lower(parameters(encoding), *tokens, position_BL, None).compile()


def test_the_memory_of_a_device_is_linear_in_its_own_tokens():
  encoding = encodings.get('alibi')

  def temporary(devices, length):
    return compiled(encoding, devices, length).memory_analysis().temp_size_in_bytes

  small, large, shared = temporary(2, 4096), temporary(2, 8192), temporary(4, 8192)

  assert 1.7 * small < large < 2.2 * small
  assert shared < 1.05 * small  # twice the tokens, on twice the devices


def test_keys_go_round_and_no_device_gathers_them():
  text = compiled(encodings.get('rope'), 4, LENGTH).as_text()

  assert 'collective-permute' in text
  assert 'all-gather' not in text
  assert 'all-to-all' not in text


# What is refused, and what is chosen


@pytest.mark.parametrize('length', [4, 12, 20])
def test_a_row_that_does_not_divide_in_two_chunks_a_device_is_refused(length):
  message = f'a row has L={length}, which the 8 chunks of mesh axis sequence=4, 2 a device, do not'
  tokens = [x_BL[:, :length] for x_BL in arrays()]

  with pytest.raises(errors.UserError, match=message):
    ring.zigzag(length, 4, 'a row')
  with (
    jax.set_mesh(make_mesh(FOUR)),
    pytest.raises(errors.UserError, match=f'attention has L={length}, which the 8 chunks'),
  ):
    jax.eval_shape(attend(encodings.get('rope'), kernels.Mask()), {}, *tokens)


def test_a_row_that_the_axis_does_not_divide_is_refused_by_name():
  tokens = [x_BL[:, :30] for x_BL in arrays()]

  with (
    jax.set_mesh(make_mesh(FOUR)),
    pytest.raises(errors.UserError, match='key_BKGC has K=30, which mesh axes sequence=4'),
  ):
    jax.eval_shape(attend(encodings.get('rope'), kernels.Mask()), {}, *tokens)


def test_an_implementation_of_whole_rows_is_refused_where_they_are_cut():
  message = re.escape("implementation='splash' needs whole rows, but mesh axis 'sequence' cuts")

  with (
    jax.set_mesh(make_mesh(FOUR)),
    jax.default_device('tpu'),
    pytest.raises(errors.UserError, match=message),
  ):
    jax.eval_shape(attend(encodings.get('rope'), kernels.Mask(), 'splash'), {}, *arrays())


@pytest.mark.parametrize(
  ('asked', 'platform', 'taken'),
  [
    ('chunked', 'tpu', 'ring'),
    ('mosaic_tpu', 'tpu', 'mosaic_tpu_ring'),
    ('mosaic_gpu', 'gpu', 'mosaic_gpu_ring'),
    ('reference', 'gpu', 'reference'),
  ],
)
def test_what_is_asked_for_is_taken_by_its_ring(asked, platform, taken):
  c = config_lib.ModelConfig(attention=asked)
  transformer = model.Transformer(c, encodings.get('fire'))

  with jax.set_mesh(make_mesh(FOUR)), jax.default_device(platform):
    choice = attention.choice(transformer, LENGTH, counted=True)

  assert choice.implementation == taken
  assert choice.reason.startswith('as asked')


@pytest.mark.parametrize(
  ('sizes', 'length', 'expected'), [(FOUR, 64, 'ring'), (FOUR, 1, 'reference')]
)
def test_attention_goes_by_the_ring_where_rows_are_cut_in_parts(sizes, length, expected):
  transformer = model.Transformer(config_lib.ModelConfig(), encodings.get('fire'))
  off_any_mesh = attention.choice(transformer, length, counted=True)

  with jax.set_mesh(make_mesh(sizes)):
    choice = attention.choice(transformer, length, counted=True)

  assert choice.implementation == expected
  assert off_any_mesh.implementation == 'reference'
  assert "mesh axis 'sequence' cuts rows in parts" in choice.reason or expected != 'ring'


@pytest.mark.parametrize(
  ('options', 'length', 'expected', 'reason'),
  [
    ({}, 512, 'mosaic_tpu_ring', 'with a kernel for TPU for what meets on a device'),
    ({}, 504, 'ring', '(mosaic_tpu has tiles of 128 queries at least, not of 126)'),
    ({}, 3, 'ring', '(mosaic_tpu has tiles of 128 queries at least, not of 0)'),
    ({'hidden_layers': 3}, 512, 'ring', "needs a table of the bias, which 'fire' has not)"),
  ],
)
def test_a_tpu_takes_its_kernel_for_the_parts_of_rows_that_it_can(
  options, length, expected, reason
):
  """By what each of its chips holds."""
  transformer = model.Transformer(config_lib.ModelConfig(), encodings.get('fire', **options))

  with jax.set_mesh(make_mesh(FOUR)), jax.default_device('tpu'):
    choice = attention.choice(transformer, length, counted=True)

  assert choice.implementation == expected
  assert choice.reason.startswith("as mesh axis 'sequence' cuts rows in parts")
  assert choice.reason.endswith(reason)


def test_a_tpu_takes_its_kernel_for_parts_of_a_row_whose_whole_it_has_no_room_for():
  transformer = model.Transformer(config_lib.ModelConfig(), encodings.get('fire'))
  length = 2**20

  with jax.default_device('tpu'):
    whole = attention.choice(transformer, length, counted=True)
    with jax.set_mesh(make_mesh(FOUR)):
      parts = attention.choice(transformer, length, counted=True)

  assert 'of scalar memory' in whole.reason
  assert parts.implementation == 'mosaic_tpu_ring'
