"""Rules, meshes, and the law that a training step on any mesh is the step on one device.

Eight virtual CPU devices, which conftest.py asks for, stand for the accelerators of a mesh.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lex_fire import config as config_lib
from lex_fire import encodings, errors, kernels, sharding, train
from lex_fire.kernels import chunked

LENGTH, VOCAB, NUM_LAYERS = 16, 32, 1
MESHES = [(8, 1), (4, 2), (1, 8)]
# A run with FIRE, and one whose batch is computed in two parts.
RUNS = {'fire': 1, 'rope': 2}

every_mesh = pytest.mark.parametrize('sizes', MESHES, ids='data={0[0]} fsdp={0[1]}'.format)


def run_config(name='fire', batch_size=16, accumulation=1, **shape):
  """Returns the config of a tiny run whose step is smooth in the gradient (see model_test.py)."""
  model = {
    'num_layers': NUM_LAYERS,
    'd_model': 16,
    'num_heads': 4,
    'num_kv_heads': 2,
    'head_dim': 4,
    'd_ff': 24,
    'vocab_size': VOCAB,
  }
  return config_lib.Config(
    model=config_lib.ModelConfig(**model | shape),
    encoding=config_lib.EncodingConfig(name),
    data=config_lib.DataConfig(length=LENGTH, batch_size=batch_size),
    optimizer=config_lib.OptimizerConfig(learning_rate=0.01, warmup_steps=0, epsilon=1e-2),
    train=config_lib.TrainConfig(accumulation=accumulation),
  )


def make_batch(packed=False):
  rng = np.random.default_rng(0)
  tokens_BL = rng.integers(0, VOCAB, (16, LENGTH + 1)).astype(np.int32)
  position_1L = np.arange(LENGTH, dtype=np.int32)[None]
  return {
    'inputs_BL': tokens_BL[:, :-1],
    'targets_BL': tokens_BL[:, 1:],
    'loss_weights_BL': rng.integers(0, 3, (16, LENGTH)).astype(np.float32),
    'position_BL': np.repeat(position_1L % 10, 16, axis=0) if packed else position_1L,
    'segment_ids_BL': np.repeat(position_1L // 10, 16, axis=0) if packed else None,
  }


def make_mesh(data, fsdp):
  return sharding.make_mesh(data, fsdp, devices=jax.devices()[: data * fsdp])


@functools.cache
def first_state(name):
  """Returns a run's first state on one device, as numpy arrays that no step can donate."""
  state = jax.jit(functools.partial(train.init, run_config(name)))()
  return jax.tree.map(np.asarray, state)


@functools.cache
def one_step(name, sizes):
  """Returns (state, values) after a step on a mesh, RoPE's with packed rows."""
  mesh = make_mesh(*sizes)
  program = train.Program(run_config(name, accumulation=RUNS[name]), mesh)
  with jax.set_mesh(mesh):
    state = jax.tree.map(
      lambda x, abstract: jax.device_put(x, abstract.sharding),
      first_state(name),
      program.abstract_state,
    )
    return program.step(state, program.put(make_batch(packed=name == 'rope')))


def named_leaves(tree):
  return [
    ('/'.join(str(getattr(key, 'key', getattr(key, 'name', key))) for key in path), leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  ]


# Rules


@pytest.mark.parametrize(
  ('letters', 'shape', 'expected'),
  [
    ('BLD', (8, 4, 16), PartitionSpec(('data', 'fsdp'), None, None)),
    ('BLHC', (16, 4, 3, 5), PartitionSpec(('data', 'fsdp'), None, None, None)),
    ('DF', (16, 24), PartitionSpec(('fsdp',), None)),
    ('FD', (24, 16), PartitionSpec(None, ('fsdp',))),
    ('DHC', (16, 4, 4), PartitionSpec(('fsdp',), None, None)),
    ('HCD', (4, 4, 16), PartitionSpec(None, None, ('fsdp',))),
    ('VD', (33, 16), PartitionSpec(None, ('fsdp',))),
    ('D', (2,), PartitionSpec(('fsdp',))),
    ('WH', (7, 3), PartitionSpec(None, None)),
    ('BL', (1, 5), PartitionSpec(None, None)),  # a leading 1 is shared by all rows
    ('DF', (3, 16, 24), PartitionSpec(None, ('fsdp',), None)),  # stacked by a scan over layers
    ('D', (3, 16), PartitionSpec(None, ('fsdp',))),
    ('', (), PartitionSpec()),
    ('', (5, 7), PartitionSpec(None, None)),
    ('DD', (16, 16), PartitionSpec(('fsdp',), None)),  # an axis splits one dimension
  ],
)
def test_letters_lie_on_the_mesh_by_rule(letters, shape, expected):
  assert sharding.spec(letters, shape, {'data': 4, 'fsdp': 2}, 'x') == expected


def test_axes_of_size_1_split_nothing():
  assert sharding.spec('DF', (15, 9), {'data': 8, 'fsdp': 1}, 'x') == PartitionSpec(None, None)


@pytest.mark.parametrize(
  ('letters', 'shape', 'message'),
  [
    ('DF', (15, 24), 'w_in has D=15, which mesh axes fsdp=2 do not divide'),
    ('BLD', (12, 4, 16), 'w_in has B=12, which mesh axes data=4 x fsdp=2 do not divide'),
    ('DF', (2, 7, 24), 'w_in has D=7, which mesh axes fsdp=2 do not divide'),
  ],
)
def test_a_dimension_that_the_mesh_does_not_divide_is_refused(letters, shape, message):
  with pytest.raises(errors.UserError, match=re.escape(message)):
    sharding.spec(letters, shape, {'data': 4, 'fsdp': 2}, 'w_in')


def test_the_suffix_of_a_name_is_its_shape():
  names = ['query_DHC', 'w_out_WH', 'scale_D', 'loss_weights_BL', 'mask_B1QK', 'step', 'c', 'D']

  assert [sharding.suffix(name) for name in names] == ['DHC', 'WH', 'D', 'BL', 'B1QK', '', '', '']


def test_a_tree_is_laid_out_by_the_innermost_name():
  mesh = make_mesh(4, 2)
  tree = {'block_0': {'in_DF': np.zeros((16, 24)), 'inner': [np.zeros(3)]}, 'count': np.int32(0)}

  layout = sharding.of_tree(tree, mesh)

  assert layout['block_0']['in_DF'].spec == PartitionSpec(('fsdp',), None)
  assert layout['block_0']['inner'][0].spec == PartitionSpec(None)
  assert layout['count'].spec == PartitionSpec()
  assert layout['count'].mesh == mesh


# Meshes


@pytest.mark.parametrize(
  ('sizes', 'expected'),
  [((8, 1), (8, 1)), ((-1, 2), (4, 2)), ((2, -1), (2, 4)), ((-1, 1), (8, 1)), ((-1, 8), (1, 8))],
)
def test_a_size_of_minus_1_takes_the_devices_that_are_left(sizes, expected):
  mesh = sharding.make_mesh(*sizes)

  assert dict(mesh.shape) == dict(zip(('data', 'fsdp'), expected, strict=True))
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize('sizes', [(3, 1), (-1, 3), (-1, -1), (0, 8), (-1, 0), (16, 1), (-2, -4)])
def test_sizes_that_do_not_fit_the_devices_are_refused(sizes):
  message = f'mesh data={sizes[0]}, fsdp={sizes[1]} does not fit 8 devices'

  with pytest.raises(errors.UserError, match=message):
    sharding.make_mesh(*sizes)


# Training on a mesh


@every_mesh
@pytest.mark.parametrize('name', RUNS)
def test_a_step_on_a_mesh_is_the_step_on_one_device(name, sizes):
  state, values = one_step(name, (1, 1))

  other_state, other_values = one_step(name, sizes)

  for scalar in ('loss', 'gradient_norm'):
    np.testing.assert_allclose(other_values[scalar], values[scalar], rtol=1e-5)
  other_leaves = dict(named_leaves(other_state))
  for path, leaf in named_leaves(state):
    np.testing.assert_allclose(other_leaves[path], leaf, rtol=0, atol=1e-5, err_msg=path)
  moved = jax.tree.map(
    lambda leaf, first: np.abs(leaf - first).max(), state['params'], first_state(name)['params']
  )
  assert moved['embedding_VD'] > 1e-3


def test_a_run_starts_from_the_same_state_on_any_mesh():
  mesh = make_mesh(4, 2)
  program = train.Program(run_config('fire'), mesh)

  with jax.set_mesh(mesh):
    state = program.init()

  first_leaves = dict(named_leaves(first_state('fire')))
  for path, leaf in named_leaves(state):
    np.testing.assert_allclose(leaf, first_leaves[path], rtol=1e-6, atol=1e-7, err_msg=path)


@every_mesh
def test_parameters_and_moments_are_split_over_fsdp(sizes):
  """Whatever has a dimension D is held in parts, and stays so after a step."""
  state, _ = one_step('fire', sizes)

  split = 0
  for path, leaf in named_leaves(state):
    letters = re.search(r'(?:_([A-Z]+))?$', path)[1] or ''
    whole = dict(zip(letters, leaf.shape, strict=True))
    expected = tuple(n // sizes[1] if letter == 'D' else n for letter, n in whole.items())
    assert {shard.data.shape for shard in leaf.addressable_shards} == {expected}, path
    assert len(leaf.addressable_shards) == 8, path
    split += 'D' in letters
  # two norms of two arrays, four matrices of attention, two of the MLP; a norm; the embedding
  assert split == 3 * (NUM_LAYERS * (2 * 2 + 4 + 2) + 2 + 1)  # parameters and Adam's two moments


def lowered(sizes, computation, **shape):
  """Returns the StableHLO of one of a program's computations on a mesh."""
  mesh = make_mesh(*sizes)
  program = train.Program(run_config(**shape), mesh)
  state = program.abstract_state
  if computation == 'loss_sums':
    return program.loss_sums.lower(state['params'], program.put(make_batch())).as_text()
  return program.step.lower(state, program.put(make_batch())).as_text()


def activation_constraints(text):
  """Returns the ranks of the arrays whose rows are asked to lie on data and fsdp, in order."""
  constraint = r'sdy\.sharding_constraint .*\[\{"data", "fsdp"\}, .*: tensor<16x([0-9x]+)xf32>'
  return [1 + len(sizes.split('x')) for sizes in re.findall(constraint, text)]


@every_mesh
def test_the_lowered_step_asks_for_the_layout_of_every_activation(sizes):
  """A constraint outside of `jax.set_mesh` would be dropped without a word."""
  embedded, query_key_value, hidden, block = [3], [4, 4, 4], [3], [3]
  forward = embedded + NUM_LAYERS * (query_key_value + hidden + block)

  assert activation_constraints(lowered(sizes, 'loss_sums')) == forward
  # Each has its transpose in the backward pass.
  assert len(activation_constraints(lowered(sizes, 'step'))) >= 2 * len(forward)


def test_scanned_and_rematerialized_layers_ask_for_it_too():
  text = lowered((4, 2), 'step', scan_layers=True, remat=True)

  # The embedding and the five of a layer, forward and backward; the last is not computed again.
  assert len(activation_constraints(text)) >= 2 * (1 + 5) + 4


def test_one_device_asks_for_nothing():
  assert 'sharding_constraint' not in lowered((1, 1), 'loss_sums')


def test_a_constraint_off_any_mesh_changes_nothing():
  x_BLD = jnp.ones((3, 2, 5))

  assert sharding.constrain(x_BLD, 'BLD') is x_BLD


def test_a_constraint_that_the_mesh_does_not_divide_is_refused():
  with (
    jax.set_mesh(make_mesh(8, 1)),
    pytest.raises(errors.UserError, match='an activation BLD has B=3, .* data=8 x fsdp=1'),
  ):
    jax.eval_shape(lambda x_BLD: sharding.constrain(x_BLD, 'BLD'), jnp.ones((3, 2, 5)))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'batch_size': 12}, r'batch_size / train.accumulation has B=12, .* data=4 x fsdp=2'),
    ({'batch_size': 16, 'accumulation': 4}, 'batch_size / train.accumulation has B=4, '),
    ({'d_model': 15}, '_D[A-Z]* has D=15, which mesh axes fsdp=2'),
  ],
)
def test_what_the_mesh_does_not_divide_is_refused_before_anything_is_computed(changes, message):
  with pytest.raises(errors.UserError, match=message):
    train.Program(run_config(**changes), make_mesh(4, 2))


def test_a_batch_is_split_by_rows_over_all_devices():
  program = train.Program(run_config(), make_mesh(4, 2))

  batch = program.put(make_batch())

  for name in ('inputs_BL', 'targets_BL', 'loss_weights_BL'):
    shards = sorted(batch[name].addressable_shards, key=lambda shard: shard.index[0].start)
    assert [shard.data.shape for shard in shards] == [(2, LENGTH)] * 8
    rows_BL = np.concatenate([shard.data for shard in shards])
    np.testing.assert_array_equal(rows_BL, make_batch()[name])
  assert {shard.data.shape for shard in batch['position_BL'].addressable_shards} == {(1, LENGTH)}
  assert batch['segment_ids_BL'] is None


# Kernels, which the compiler cannot divide


@every_mesh
def test_rows_split_over_devices_give_the_values_and_gradients_of_one(sizes):
  encoding = encodings.get('fire')
  params = encoding.init(jax.random.key(0), num_heads=4, head_dim=4, d_model=16)
  keys = jax.random.split(jax.random.key(1), 3)
  query_BQHC = jax.random.normal(keys[0], (16, LENGTH, 4, 4))
  key_BKGC, value_BKGC = (jax.random.normal(key, (16, LENGTH, 2, 4)) for key in keys[1:])
  batch = make_batch(packed=True)
  batch['position_BL'] = batch['position_BL'][:1]  # which rows share, and devices have whole
  seen = []

  def attend(params, query_BQHC, **arrays):
    seen.append(query_BQHC.shape)
    return chunked.attention(
      query_BQHC, **arrays, params=params, encoding=encoding, mask=kernels.Mask()
    )

  def total(params, query_BQHC, key_BKGC, value_BKGC):
    out_BQHC = sharding.split_rows(
      attend,
      params,
      {
        'query_BQHC': query_BQHC,
        'key_BKGC': key_BKGC,
        'value_BKGC': value_BKGC,
        'query_position_BQ': batch['position_BL'],
        'key_position_BK': batch['position_BL'],
        'query_segment_BQ': batch['segment_ids_BL'],
        'key_segment_BK': batch['segment_ids_BL'],
      },
    )
    return (out_BQHC * jnp.arange(4.0)[None, None, None]).sum(), out_BQHC

  gradient = jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True)
  arrays = params, query_BQHC, key_BKGC, value_BKGC
  expected = gradient(*arrays)
  with jax.set_mesh(make_mesh(*sizes)):
    found = jax.jit(gradient)(*arrays)

  assert seen == [(16, LENGTH, 4, 4), (2, LENGTH, 4, 4)]
  for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
