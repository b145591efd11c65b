"""The kernels compile for the chips of a TPU topology, without a TPU: `make test-tpu`."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest

from experiments.attention_tpu import run as attention_tpu
from lex_fire import attention, encodings, model, sharding
from lex_fire import config as config_lib

if importlib.util.find_spec('libtpu') is None:
  pytest.skip('needs the compiler for TPU: make test-tpu', allow_module_level=True)


@functools.cache
def compiled(chip, name, length):
  return attention_tpu.compiled(chip, name, length)


@pytest.mark.parametrize('chip', attention_tpu.CHIPS)
def test_fire_compiles_at_128k(chip):
  assert 'tpu_custom_call' in compiled(chip, 'fire', 131_072).as_text()


@pytest.mark.parametrize('chip', attention_tpu.CHIPS)
def test_the_kernels_of_fire_move_what_those_without_bias_do(chip):
  """The table and the plan are all that they read besides, at most 5%."""
  with_bias, without = (compiled(chip, name, 131_072) for name in ('fire', 'nope'))

  assert attention_tpu.kernel_bytes(without) > 131_072 * 8 * 128 * 2 * 6  # it counts
  assert attention_tpu.kernel_bytes(with_bias) < 1.05 * attention_tpu.kernel_bytes(without)


@pytest.mark.parametrize(('case', 'most'), [('fire', 1.002), ('fire 2 layers', 1.015)])
@pytest.mark.parametrize('chip', ['v5e', 'v6e'])
def test_of_the_gradient_of_a_table_memory_sees_one_number_a_line(chip, case, most):
  """The sums of which it is made, in each lane, would be 5% of a short row's bytes, and 20%.

  The lines, in registers and as scalars, are what is left.
  """
  name, options = attention_tpu.CASES[case]
  with_bias = attention_tpu.compiled(chip, name, 2048, **options)

  without = attention_tpu.kernel_bytes(compiled(chip, 'nope', 2048))
  assert without < attention_tpu.kernel_bytes(with_bias) < most * without


def test_the_constants_of_far_tiles_are_a_small_part_of_a_row_that_may_have_some():
  """The shortest, and with the largest table."""
  name, options = attention_tpu.CASES['fire 2 layers']
  with_bias = attention_tpu.compiled('v6e', name, 2176, **options)

  without = attention_tpu.kernel_bytes(compiled('v6e', 'nope', 2176))
  assert attention_tpu.kernel_bytes(with_bias) < 1.05 * without


@pytest.mark.parametrize('length', [32_768, 131_072])
@pytest.mark.parametrize('chip', attention_tpu.CHIPS)
def test_memory_is_that_of_a_few_arrays_as_large_as_the_queries(chip, length):
  """So it is linear in length. The float32 logits of a dense pass are L / 64 such arrays."""
  query_bytes = length * 8 * 128 * 2

  memory = compiled(chip, 'fire', length).memory_analysis()

  assert memory.temp_size_in_bytes < 5 * query_bytes


def small(name, *, num_heads=4, num_kv_heads=2, head_dim=128):
  """Returns a model of one layer."""
  config = config_lib.ModelConfig(
    num_layers=1,
    d_model=256,
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    head_dim=head_dim,
    d_ff=512,
    vocab_size=512,
    dtype='bfloat16',
  )
  return model.Transformer(config, encodings.get(name))


def choice(name, mesh, length, **shape):
  """Returns by what a model attends over the chips of a mesh."""
  with jax.set_mesh(mesh), jax.default_device(mesh.devices.flat[0]):
    return attention.choice(small(name, **shape), length, counted=True).implementation


def of_a_model(name, mesh, rows, length, **shape):
  """Returns the program of a model's gradients, in bfloat16, over the chips of a mesh."""
  transformer = small(name, **shape)
  tokens_BL = jax.ShapeDtypeStruct((rows, length), jnp.int32)
  abstract = jax.eval_shape(
    lambda: transformer.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
  )

  def total(variables, tokens_BL):
    return transformer.apply(variables, tokens_BL).sum()

  arguments = {'variables': abstract, 'tokens_BL': tokens_BL}
  with jax.set_mesh(mesh), jax.default_device(mesh.devices.flat[0]):
    placed = jax.tree.map(
      lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
      arguments,
      sharding.of_tree(arguments, mesh),
    )
    return jax.jit(jax.grad(total)).lower(*(placed[name] for name in arguments)).compile()


def calls(text):
  """Returns the calls of kernels in a program's text."""
  return re.findall(r'custom-call\(.*tpu_custom_call', text)


@pytest.mark.parametrize(('name', 'is_splash'), [('fire', False), ('rope', True)])
def test_gradients_of_a_model_over_four_chips_compile_with_the_kernel(name, is_splash):
  """Which the compiler cannot divide by itself: each chip has its own rows."""
  mesh = sharding.make_mesh(2, 2, devices=attention_tpu.devices('v5e'))

  text = of_a_model(name, mesh, 8, 512).as_text()

  assert ('splash_mha_fwd' in text) == is_splash
  assert (
    len(calls(text)) == 3
  )  # forward, the gradient of queries and of the table, and that of keys
  assert re.search(r'bf16\[2,4,512,128\]', text)  # a chip's share: 2 rows of 8


@pytest.mark.parametrize('name', ['fire', 'xpos'])
def test_chips_that_share_the_tokens_of_a_row_compile_with_the_kernel(name):
  """Keys go round, and no chip has those of a whole row."""
  mesh = sharding.make_mesh(1, 1, 4, devices=attention_tpu.devices('v5e'))

  text = of_a_model(name, mesh, 1, 4096).as_text()

  assert len(calls(text)) == 3
  assert re.search(r'bf16\[1,2,1024,128\].* collective-permute', text)
  assert not re.search(r'bf16\[1,2,4096,128\]', text)


@pytest.mark.parametrize(
  ('num_heads', 'head_dim', 'implementation'),
  [(64, 128, 'mosaic_tpu_ring'), (64, 256, 'ring'), (128, 128, 'ring')],
)
def test_a_ring_takes_the_kernel_where_it_has_memory_for_it(num_heads, head_dim, implementation):
  """Which these compile with; more heads of one key head are left to tiles in XLA."""
  mesh = sharding.make_mesh(1, 1, 4, devices=attention_tpu.devices('v5p'))
  shape = {'num_heads': num_heads, 'num_kv_heads': 1, 'head_dim': head_dim}

  program, chosen = of_a_model('fire', mesh, 1, 8192, **shape), choice('fire', mesh, 8192, **shape)

  assert chosen == implementation
  assert bool(calls(program.as_text())) == (implementation == 'mosaic_tpu_ring')


@pytest.mark.parametrize(
  'case',
  [
    {'name': 'fire', 'hidden_layers': 2, 'num_kv_heads': 8, 'head_dim': 64},
    {'name': 'fire', 'dtype': jnp.float32, 'packed': True},
    {'name': 'fire', 'head_dim': 256, 'num_kv_heads': 1, 'mask': {'window': 700}},
    {'name': 'fire', 'mask': {'causal': False}, 'length': 1000},
    {'name': 'fire', 'num_heads': 64, 'num_kv_heads': 1},
    {'name': 'fire', 'num_heads': 64, 'num_kv_heads': 1, 'head_dim': 64},
    {'name': 'fire', 'num_heads': 64, 'num_kv_heads': 1, 'dtype': jnp.float32},
    {'name': 'fire', 'num_heads': 32, 'num_kv_heads': 32, 'head_dim': 16},
    {'name': 'fire', 'num_heads': 64, 'num_kv_heads': 1, 'length': 131_072},
    {'name': 'fire', 'hidden_layers': 2, 'num_heads': 32, 'num_kv_heads': 8, 'length': 131_072},
    {'name': 'fire', 'num_heads': 16, 'num_kv_heads': 16, 'batch': 2},
    # As long as a band can be.
    {
      **{'name': 'fire', 'hidden_layers': 2, 'num_kv_heads': 8, 'batch': 2},
      **{'dtype': jnp.float32, 'length': 8192},
    },
    {'name': 't5', 'num_heads': 32, 'num_kv_heads': 32, 'batch': 2, 'length': 8192},
    {'name': 'fire', 'num_heads': 32, 'num_kv_heads': 8, 'length': 262_144},
    {'name': 'nope', 'length': 262_144},
    {'name': 'xpos', 'mask': {'block': 512}, 'packed': True},
    {'name': 'xpos', 'length': 65_536},
    {'name': 'xpos', 'mask': {'causal': False}},
    {'name': 't5', 'bidirectional': True, 'mask': {'causal': False}},
    {'name': 'alibi', 'head_dim': 64},
    {'name': 'kerple_log'},
    {'name': 'kerple_power'},
    {'name': 'sandwich', 'length': 300},
  ],
  ids=lambda case: ' '.join(f'{key}={value}' for key, value in case.items()),
)
def test_every_shape_that_users_bring_compiles(case):
  program = attention_tpu.compiled('v5e', **{'length': 2048} | case)

  assert 'tpu_custom_call' in program.as_text()


@pytest.mark.parametrize('case', attention_tpu.CASES)
@pytest.mark.parametrize('chip', ['v5p', 'v6e'])
def test_every_encoding_compiles_for_the_other_chips(chip, case):
  name, options = attention_tpu.CASES[case]

  program = attention_tpu.compiled(chip, name, 2048, **options)

  assert 'tpu_custom_call' in program.as_text()


@pytest.mark.parametrize(
  'case',
  [
    {'head_dim': 64},
    {'head_dim': 16, 'packed': True},
    {'dtype': jnp.float32, 'mask': {'window': 4096}},
    {'num_heads': 64, 'num_kv_heads': 1, 'length': 131_072, 'threshold': 16_384.0},
    {'hidden_layers': 2, 'batch': 8},
  ],
  ids=lambda case: ' '.join(f'{key}={value}' for key, value in case.items()),
)
def test_shapes_whose_products_have_the_bias_of_far_tiles_compile(case):
  """For v6e, which has room for it."""
  program = attention_tpu.compiled('v6e', 'fire', **{'length': 8192} | case)

  assert 'tpu_custom_call' in program.as_text()
