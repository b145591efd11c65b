"""Rules, meshes, and the law that a training step on any mesh is the step on one device.

Eight virtual CPU devices, which conftest.py asks for, stand for the accelerators of a mesh.
"""

import dataclasses
import functools
import itertools
import math
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
MESHES = [(8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 1, 2), (4, 1, 1, 2), (1, 2, 2, 2), (2, 1, 4, 1)]
ONE = (1, 1, 1, 1)
# A run with FIRE, and one whose batch is computed in two parts.
RUNS = {'fire': 1, 'rope': 2}

every_mesh = pytest.mark.parametrize(
  'sizes', MESHES, ids='replica={0[0]} fsdp={0[1]} sequence={0[2]} tensor={0[3]}'.format
)


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
    'position_BL': np.repeat(position_1L % 10, 16, axis=0) if packed else None,
    'segment_ids_BL': np.repeat(position_1L // 10, 16, axis=0) if packed else None,
  }


def make_mesh(replica, fsdp, sequence=1, tensor=1):
  devices = jax.devices()[: replica * fsdp * sequence * tensor]
  return sharding.make_mesh(replica, fsdp, sequence, tensor, devices=devices)


@functools.cache
def first_state(name, **shape):
  """Returns a run's first state on one device, as numpy arrays that no step can donate."""
  state = jax.jit(functools.partial(train.init, run_config(name, **shape)))()
  return jax.tree.map(np.asarray, state)


def put(state, program):
  return jax.tree.map(
    lambda x, abstract: jax.device_put(x, abstract.sharding), state, program.abstract_state
  )


@functools.cache
def one_step(name, sizes):
  """Returns (state, values) after a step on a mesh, RoPE's with packed rows."""
  mesh = make_mesh(*sizes)
  program = train.Program(run_config(name, accumulation=RUNS[name]), mesh)
  with jax.set_mesh(mesh):
    state = put(first_state(name), program)
    return program.step(state, program.put(make_batch(packed=name == 'rope')))


def named_leaves(tree):
  return [
    ('/'.join(str(getattr(key, 'key', getattr(key, 'name', key))) for key in path), leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  ]


# Rules

MESH_SHAPE = {'replica': 4, 'fsdp': 2, 'sequence': 5, 'tensor': 3}


@pytest.mark.parametrize(
  ('letters', 'shape', 'expected'),
  [
    ('BLD', (8, 4, 16), PartitionSpec(('replica', 'fsdp'), None, None)),
    ('BLHC', (16, 4, 3, 5), PartitionSpec(('replica', 'fsdp'), None, ('tensor',), None)),
    ('BLV', (8, 4, 33), PartitionSpec(('replica', 'fsdp'), None, ('tensor',))),
    ('DF', (16, 24), PartitionSpec(('fsdp',), ('tensor',))),
    ('FD', (24, 16), PartitionSpec(('tensor',), ('fsdp',))),
    ('DHC', (16, 3, 4), PartitionSpec(('fsdp',), ('tensor',), None)),
    ('DGC', (16, 1, 4), PartitionSpec(('fsdp',), None, None)),  # one head of keys serves all
    ('HCD', (3, 4, 16), PartitionSpec(('tensor',), None, ('fsdp',))),
    ('VD', (33, 16), PartitionSpec(('tensor',), ('fsdp',))),
    ('D', (2,), PartitionSpec(('fsdp',))),
    ('WH', (7, 3), PartitionSpec(None, ('tensor',))),
    ('BL', (1, 5), PartitionSpec(None, None)),  # a leading 1 is shared by all rows
    ('DF', (3, 16, 24), PartitionSpec(None, ('fsdp',), ('tensor',))),  # stacked by a scan
    ('D', (3, 16), PartitionSpec(None, ('fsdp',))),
    ('', (), PartitionSpec()),
    ('', (5, 7), PartitionSpec(None, None)),
    ('DD', (16, 16), PartitionSpec(('fsdp',), None)),  # an axis splits one dimension
  ],
)
def test_letters_lie_on_the_mesh_by_rule(letters, shape, expected):
  assert sharding.spec(letters, shape, MESH_SHAPE | {'sequence': 1}, 'x') == expected


@pytest.mark.parametrize(
  ('letters', 'shape', 'expected'),
  [
    ('BLD', (8, 10, 16), PartitionSpec(('fsdp',), ('sequence',), None)),
    ('BL', (1, 10), PartitionSpec(None, ('sequence',))),
    ('BLHC', (8, 10, 4, 5), PartitionSpec(('fsdp',), ('sequence',), ('tensor',), None)),
    ('BKGC', (8, 10, 2, 5), PartitionSpec(('fsdp',), ('sequence',), ('tensor',), None)),
    ('BQ', (8, 10), PartitionSpec(('fsdp',), ('sequence',))),
    ('BL', (8, 1), PartitionSpec(('fsdp',), None)),  # one token has no parts
  ],
)
def test_tokens_are_split_over_sequence(letters, shape, expected):
  mesh_shape = {'fsdp': 2, 'sequence': 5, 'tensor': 2}

  assert sharding.spec(letters, shape, mesh_shape, 'x') == expected


@pytest.mark.parametrize('name', encodings.ENCODINGS)
def test_no_parameter_is_split_over_sequence(name):
  mesh = make_mesh(1, 1, 2)
  config = dataclasses.replace(run_config(), encoding=config_lib.EncodingConfig(name))

  state = train.Program(config, mesh).abstract_state

  assert not any('sequence' in str(leaf.sharding.spec) for leaf in jax.tree.leaves(state))


def test_axes_of_size_1_split_nothing():
  mesh_shape = {'replica': 8, 'fsdp': 1, 'tensor': 1}

  assert sharding.spec('DF', (15, 9), mesh_shape, 'x') == PartitionSpec(None, None)


@pytest.mark.parametrize(
  ('letters', 'shape', 'message'),
  [
    ('DF', (15, 24), 'w_in has D=15, which mesh axes fsdp=2 do not divide'),
    ('BLD', (12, 4, 16), 'w_in has B=12, which mesh axes replica=4 x fsdp=2 do not divide'),
    ('DF', (2, 7, 24), 'w_in has D=7, which mesh axes fsdp=2 do not divide'),
    ('DGC', (16, 2, 4), 'w_in has G=2, which mesh axes tensor=3 do not divide'),
    ('BLD', (8, 12, 4), 'w_in has L=12, which mesh axes sequence=5 do not divide'),
  ],
)
def test_a_dimension_that_the_mesh_does_not_divide_is_refused(letters, shape, message):
  with pytest.raises(errors.UserError, match=re.escape(message)):
    sharding.spec(letters, shape, MESH_SHAPE, 'w_in')


@pytest.mark.parametrize(('batch_size', 'accumulation'), [(4, 2), (4, 4), (1, 1)])
def test_rows_computed_at_once_that_the_mesh_does_not_divide_are_refused(batch_size, accumulation):
  """One row too, which else each device would compute for itself."""
  config = run_config(batch_size=batch_size, accumulation=accumulation)

  message = f'train.accumulation has B={batch_size // accumulation}, which mesh axes replica=4 x fs'
  with pytest.raises(errors.UserError, match=message):
    train.Program(config, make_mesh(4, 1))


@pytest.mark.parametrize('packed', [False, True])
def test_a_process_of_one_row_shares_positions_as_one_of_more_does(packed, monkeypatch):
  program = train.Program(run_config(), make_mesh(2, 1, 2))
  row = {name: x if x is None else x[:1] for name, x in make_batch(packed).items()}
  asked = []
  monkeypatch.setattr(
    train.jax, 'make_array_from_process_local_data', lambda _, x, shape: asked.append(shape)
  )
  program.share = 0, 4  # of four processes, each of which has a row

  program.put(row)

  lengths = [shape[0] for shape in asked]
  assert lengths == ([4] * 5 if packed else [4, 4, 4, 1])


def test_the_suffix_of_a_name_is_its_shape():
  names = ['query_DHC', 'w_out_WH', 'scale_D', 'loss_weights_BL', 'mask_B1QK', 'step', 'c', 'D']

  assert [sharding.suffix(name) for name in names] == ['DHC', 'WH', 'D', 'BL', 'B1QK', '', '', '']


def test_a_tree_is_laid_out_by_the_innermost_name():
  mesh = make_mesh(4, 2)
  tree = {'block_0': {'in_DF': np.zeros((16, 24)), 'inner': [np.zeros(3)]}, 'count': np.int32(0)}

  layout = sharding.of_tree(tree, mesh)

  assert layout['block_0']['in_DF'].spec == PartitionSpec(('fsdp',), None)  # tensor=1
  assert layout['block_0']['inner'][0].spec == PartitionSpec(None)
  assert layout['count'].spec == PartitionSpec()
  assert layout['count'].mesh == mesh


# Meshes


@pytest.mark.parametrize(
  ('sizes', 'expected'),
  [
    ((8, 1, 1, 1), (8, 1, 1, 1)),
    ((-1, 2, 1, 1), (4, 2, 1, 1)),
    ((2, -1, 1, 2), (2, 2, 1, 2)),
    ((1, 2, -1, 2), (1, 2, 2, 2)),
    ((1, 2, 1, -1), (1, 2, 1, 4)),
    ((-1, 1, 1, 1), (8, 1, 1, 1)),
  ],
)
def test_a_size_of_minus_1_takes_the_devices_that_are_left(sizes, expected):
  mesh = sharding.make_mesh(*sizes)

  axes = ('replica', 'fsdp', 'sequence', 'tensor')
  assert dict(mesh.shape) == dict(zip(axes, expected, strict=True))
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
  'sizes',
  [
    *((3, 1, 1, 1), (-1, 3, 1, 1), (-1, -1, 1, 1), (0, 8, 1, 1), (-1, 0, 1, 1)),
    *((8, 1, 1, 2), (8, 1, 2, 1), (-2, -4, 1, 1)),
  ],
)
def test_sizes_that_do_not_fit_the_devices_are_refused(sizes):
  message = 'mesh replica={}, fsdp={}, sequence={}, tensor={} does not fit 8'.format(*sizes)

  with pytest.raises(errors.UserError, match=message):
    sharding.make_mesh(*sizes)


# Training on a mesh


@every_mesh
@pytest.mark.parametrize('name', RUNS)
def test_a_step_on_a_mesh_is_the_step_on_one_device(name, sizes):
  state, values = one_step(name, ONE)

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


EVERY_SPLIT = sorted(
  sizes for sizes in itertools.product((1, 2, 4, 8), repeat=4) if math.prod(sizes) == 8
)


def gradients(name, sizes):
  """Returns {path: array} of loss, weight and gradients of a packed batch and eight heads."""
  shape = {'num_heads': 8, 'num_kv_heads': 8}
  config, mesh = run_config(name, **shape), make_mesh(*sizes)
  program = train.Program(config, mesh)
  compute = jax.jit(functools.partial(train.gradient_sums, config))
  with jax.set_mesh(mesh):
    state = put(first_state(name, **shape), program)
    sums = compute(state['params'], program.put(make_batch(packed=True)))
  return {path: np.asarray(leaf) for path, leaf in named_leaves(sums)}


@functools.cache
def gradients_of_one(name):
  return gradients(name, ONE)


@pytest.mark.parametrize(
  'sizes', EVERY_SPLIT, ids='replica={0[0]} fsdp={0[1]} sequence={0[2]} tensor={0[3]}'.format
)
@pytest.mark.parametrize('name', ['fire', 'xpos'])
def test_every_split_of_eight_devices_gives_the_loss_and_gradients_of_one(name, sizes):
  """To 1e-5 of the largest of a module, for some cancel: biases of FIRE that shift all logits."""
  expected, found = gradients_of_one(name), gradients(name, sizes)

  scales: dict[str, float] = {}
  for path, of_one in expected.items():
    module = path.rpartition('/')[0] or path
    scales[module] = max(scales.get(module, 0.0), np.abs(of_one).max())
  differ = {
    path: np.abs(found[path] - of_one).max() / scales[path.rpartition('/')[0] or path]
    for path, of_one in expected.items()
  }
  worst = max(differ, key=differ.__getitem__)
  print(f'{name} {sizes}: {differ[worst]:.1e} ({worst})')  # the matrix, by `pytest -s`
  assert differ[worst] < 1e-5, worst


def test_a_step_takes_the_memory_of_the_state_before_it():
  mesh = make_mesh(4, 2)
  program = train.Program(run_config('fire'), mesh)
  with jax.set_mesh(mesh):
    state = put(first_state('fire'), program)

  program.step(state, program.put(make_batch()))

  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_a_run_starts_from_the_same_state_on_any_mesh():
  mesh = make_mesh(4, 2)
  program = train.Program(run_config('fire'), mesh)

  with jax.set_mesh(mesh):
    state = program.init()

  first_leaves = dict(named_leaves(first_state('fire')))
  for path, leaf in named_leaves(state):
    np.testing.assert_allclose(leaf, first_leaves[path], rtol=1e-6, atol=1e-7, err_msg=path)


@every_mesh
def test_parameters_and_moments_are_split_over_fsdp_and_tensor(sizes):
  """Whatever has a dimension D, or one of heads, width or words, stays in parts after a step."""
  state, _ = one_step('fire', sizes)

  split = 0
  for path, leaf in named_leaves(state):
    letters = re.search(r'(?:_([A-Z]+))?$', path)[1] or ''
    whole = dict(zip(letters, leaf.shape, strict=True))
    ways = {'D': sizes[1], **dict.fromkeys('FGHV', sizes[3])}
    expected = tuple(n // ways.get(letter, 1) for letter, n in whole.items())
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
  """Returns the ranks of arrays whose rows are asked to lie on replica and fsdp, in order.

  Those of which something lies on sequence have an S, on tensor a T.
  """
  constraint = (
    r'sdy\.sharding_constraint .*\[\{"replica", "fsdp"\}, (.*)\].*: tensor<16x([0-9x]+)xf32>'
  )
  found = re.findall(constraint, text)
  return [
    f'{1 + len(sizes.split("x"))}{"S" * ("sequence" in rest)}{"T" * ("tensor" in rest)}'
    for rest, sizes in found
  ]


@every_mesh
def test_the_lowered_step_asks_for_the_layout_of_every_activation(sizes):
  """A constraint outside of `jax.set_mesh` would be dropped without a word."""
  s, t = 'S' * (sizes[2] > 1), 'T' * (sizes[3] > 1)
  layer = ['4' + s + t] * 3 + ['3' + s + t, '3' + s]  # query, key, value; hidden layer; block
  forward = ['3' + s, *NUM_LAYERS * layer, '3' + s + t]  # the embedding first, logits last

  assert activation_constraints(lowered(sizes, 'loss_sums')) == forward
  # Each has its transpose in the backward pass.
  assert len(activation_constraints(lowered(sizes, 'step'))) >= 2 * len(forward)


def test_scanned_and_rematerialized_layers_ask_for_it_too():
  text = lowered((4, 2), 'step', scan_layers=True, remat='block')

  # Embedding, logits and the five of a layer, and backward; the last of a layer is not made again.
  assert len(activation_constraints(text)) >= 2 * (2 + 5) + 4


def test_one_device_asks_for_nothing():
  assert 'sharding_constraint' not in lowered(ONE, 'loss_sums')


def test_a_constraint_off_any_mesh_changes_nothing():
  x_BLD = jnp.ones((3, 2, 5))

  assert sharding.constrain(x_BLD, 'BLD') is x_BLD


def test_a_constraint_that_the_mesh_does_not_divide_is_refused():
  with (
    jax.set_mesh(make_mesh(8, 1)),
    pytest.raises(errors.UserError, match='an activation BLD has B=3, .* replica=8 x fsdp=1'),
  ):
    jax.eval_shape(lambda x_BLD: sharding.constrain(x_BLD, 'BLD'), jnp.ones((3, 2, 5)))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'batch_size': 12}, r'batch_size / train.accumulation has B=12, .* replica=4 x fsdp=2'),
    ({'batch_size': 16, 'accumulation': 4}, 'batch_size / train.accumulation has B=4, '),
    ({'d_model': 15}, '_D[A-Z]* has D=15, which mesh axes fsdp=2'),
  ],
)
def test_what_the_mesh_does_not_divide_is_refused_before_anything_is_computed(changes, message):
  with pytest.raises(errors.UserError, match=message):
    train.Program(run_config(**changes), make_mesh(4, 2))


@pytest.mark.parametrize('sizes', [(1, 1, 4), (2, 2, 2)])
def test_a_row_is_split_in_first_and_last_tokens_of_each_device(sizes):
  program = train.Program(run_config(), make_mesh(*sizes))

  batch = program.put(make_batch())

  devices, chunk = sizes[2], LENGTH // (2 * sizes[2])
  given = make_batch() | {'position_BL': np.arange(LENGTH)[None]}  # which no place tells any more
  for name in ('inputs_BL', 'targets_BL', 'loss_weights_BL', 'position_BL'):
    for device in range(devices):
      first, last = device * chunk, LENGTH - (device + 1) * chunk
      own_L = [*range(first, first + chunk), *range(last, last + chunk)]
      at = slice(2 * device * chunk, 2 * (device + 1) * chunk)
      np.testing.assert_array_equal(batch[name][:, at], given[name][:, own_L])
    shapes = {shard.data.shape[1] for shard in batch[name].addressable_shards}
    assert shapes == {2 * chunk}


@pytest.mark.parametrize('length', [1, 7, 10])
def test_a_window_that_does_not_divide_in_two_chunks_a_device_is_refused(length):
  config = dataclasses.replace(run_config(), data=config_lib.DataConfig(length=length))
  message = f'data.length has L={length}, which the 8 chunks of mesh axis sequence=4'

  with pytest.raises(errors.UserError, match=message):
    train.Program(config, make_mesh(1, 1, 4))


def test_a_batch_is_split_by_rows_over_all_devices():
  program = train.Program(run_config(), make_mesh(4, 2))

  batch = program.put(make_batch())

  for name in ('inputs_BL', 'targets_BL', 'loss_weights_BL'):
    shards = sorted(batch[name].addressable_shards, key=lambda shard: shard.index[0].start)
    assert [shard.data.shape for shard in shards] == [(2, LENGTH)] * 8
    rows_BL = np.concatenate([shard.data for shard in shards])
    np.testing.assert_array_equal(rows_BL, make_batch()[name])
  assert batch['position_BL'] is None and batch['segment_ids_BL'] is None


# Kernels, which the compiler cannot divide


@pytest.mark.parametrize('sizes', [sizes for sizes in MESHES if sizes[2] == 1])
@pytest.mark.parametrize('name', ['fire', 'alibi', 'kerple_log', 't5', 'sandwich', 'xpos'])
def test_kernels_on_rows_and_heads_of_a_device_give_the_values_and_gradients_of_one(
  name, sizes, monkeypatch
):
  """What a kernel would be given: tiles stand in for it, and each device's share is asked of."""
  encoding = encodings.get(name)
  params = encoding.init(jax.random.key(0), num_heads=4, head_dim=4, d_model=16)
  keys = jax.random.split(jax.random.key(1), 3)
  query_BQHC = jax.random.normal(keys[0], (16, LENGTH, 4, 4))
  key_BKGC, value_BKGC = (jax.random.normal(key, (16, LENGTH, 2, 4)) for key in keys[1:])
  batch = make_batch(packed=True)
  position_1L = batch['position_BL'][:1]  # which rows share, and devices have whole
  seen = []

  def kernel(query_BQHC, **rest):
    seen.append(query_BQHC.shape)
    return chunked.attention(query_BQHC, **rest)

  monkeypatch.setitem(kernels.IMPLEMENTATIONS, 'kernel', kernel)
  monkeypatch.setitem(kernels.PLATFORM, 'kernel', 'cpu')

  def total(params, query_BQHC, key_BKGC, value_BKGC):
    out_BQHC = kernels.attention(
      query_BQHC,
      key_BKGC,
      value_BKGC,
      encoding=encoding,
      params=params,
      query_position_BQ=position_1L,
      key_position_BK=position_1L,
      query_segment_BQ=batch['segment_ids_BL'],
      key_segment_BK=batch['segment_ids_BL'],
      implementation='kernel',
      split=sharding.split,
    )
    return (out_BQHC * jnp.arange(4.0)[None, None, None]).sum(), out_BQHC

  gradient = jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True)
  arrays = params, query_BQHC, key_BKGC, value_BKGC
  expected = gradient(*arrays)
  with jax.set_mesh(make_mesh(*sizes)):
    found = jax.jit(gradient)(*arrays)

  share = (16 // (sizes[0] * sizes[1]), LENGTH, 4 // sizes[3], 4)
  assert seen == [(16, LENGTH, 4, 4), share]
  for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    # Gradients are sums over all rows, of which a device has a share.
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=3e-5)
