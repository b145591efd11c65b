"""Tests `../lex_fire/executables.py`: a step that is compiled once, and loaded by `train`."""

import json
import logging
import re

import jax
import numpy as np
import pytest
import tiny

from lex_fire import compile, errors, executables, feed, topologies, train

# What no step depends on, changed.
ELSEWHERE = {
  'data': {'directory': '/elsewhere', 'mask_rate': 0.5, 'streaming': True},
  'train': {'seed': 5, 'log_every': 3, 'checkpoint_every': 7, 'non_finite': 'skip'},
  'evaluate': {'lengths': (32,), 'max_tokens': 512},
}


@pytest.fixture(scope='module')
def saved(corpus, tmp_path_factory):
  """Returns the file that `compile` writes of the tiny run's step, for another place and seed."""
  path = tmp_path_factory.mktemp('compiled') / 'step.executable'
  config = tiny.config(corpus, **ELSEWHERE)
  compile.compile_run(config, topologies.find('here'), save=path)
  assert list(path.parent.iterdir()) == [path]  # and nothing half-written beside it
  return path


def mesh_of(**sizes):
  return train.sharding.make_mesh(**sizes)


def test_a_run_of_a_loaded_step_ends_as_one_that_compiles_it_and_compiles_none(
  saved, fire_run, corpus, tmp_path, caplog
):
  logging.getLogger('jax').propagate, before = True, logging.getLogger('jax').propagate
  try:
    with jax.log_compiles(True):
      state = train.train(tiny.config(corpus), tmp_path / 'run', executable=saved)
  finally:
    logging.getLogger('jax').propagate = before

  for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(fire_run[1]), strict=True):
    np.testing.assert_array_equal(np.asarray(leaf), np.asarray(expected))
  compiled = set(re.findall(r'Finished XLA compilation of jit\((\w+)\)', caplog.text))
  assert {'init', 'loss_sums'} <= compiled and 'step' not in compiled


def test_a_loaded_step_uses_the_memory_of_the_old_state_again(saved, corpus):
  config = tiny.config(corpus)
  program, batch = train.Program(config, mesh_of()), feed.Data(config).train_batch(0)
  state = jax.tree.map(
    lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding),
    program.abstract_state,
  )
  step = executables.load(saved, config, program.mesh)

  following, _ = step(state, program.put(batch))

  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state['params']))
  for leaf, expected in zip(
    jax.tree.leaves(following), jax.tree.leaves(program.abstract_state), strict=True
  ):
    assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)


def test_what_is_not_compared_does_not_change_the_step(corpus):
  def lowered(**sections):
    config = tiny.config(corpus, **sections)
    program = train.Program(config, mesh_of())
    return program.step.lower(*compile.training_step(config, program).arguments).as_text()

  assert lowered(**ELSEWHERE) == lowered()


@pytest.mark.parametrize(
  ('sections', 'message'),
  [
    ({'model': {'d_ff': 48}}, 'model.d_ff=32, not 48 as here; compile one for this run'),
    ({'model': {'remat': 'block'}}, "model.remat='none', not 'block' as here"),
    ({'encoding': {'threshold': 9.0}}, 'encoding.threshold=.*, not 9.0 as here'),
    ({'optimizer': {'clip_norm': 2.0}}, 'optimizer.clip_norm=1.0, not 2.0 as here'),
    ({'data': {'length': 64}}, 'data.length=32, not 64 as here'),
    ({'data': {'batch_size': 16}}, 'data.batch_size=8, not 16 as here'),
    ({'data': {'position_range': 64}}, 'data.position_range=0, not 64 as here'),
    ({'train': {'steps': 13}}, 'train.steps=12, not 13 as here'),
  ],
)
def test_a_step_of_another_config_is_refused_by_its_first_field(saved, corpus, sections, message):
  with pytest.raises(errors.UserError, match=f"step.executable' is of {message}"):
    executables.load(saved, tiny.config(corpus, **sections), mesh_of())


def test_a_step_of_another_mesh_is_refused(saved, corpus):
  with pytest.raises(errors.UserError, match='is of mesh.replica=8, not 2 as here'):
    executables.load(saved, tiny.config(corpus), mesh_of(replica=2, fsdp=4))
  with pytest.raises(errors.UserError, match='is of devices=8, not 4 as here'):
    executables.load(saved, tiny.config(corpus), mesh_of(devices=jax.devices()[:4]))


@pytest.mark.parametrize(
  ('name', 'value'),
  [('jax', '0.1.2'), ('jaxlib', '0.1.2'), ('libtpu', '0.0.1'), ('device', 'TPU v9')],
)
def test_a_step_of_another_version_or_device_is_refused(saved, corpus, tmp_path, name, value):
  header, _, body = saved.read_bytes().partition(b'\n')
  said = json.loads(header)
  said['of'][name] = value
  (tmp_path / 'other').write_bytes(json.dumps(said).encode() + b'\n' + body)

  with pytest.raises(errors.UserError, match=f"other' is of {name}='{value}', not .* as here"):
    executables.load(tmp_path / 'other', tiny.config(corpus), mesh_of())


def test_the_compiler_of_the_platform_is_among_the_versions(corpus, monkeypatch):
  monkeypatch.setattr(executables, '_COMPILERS', {'cpu': ('numpy', 'no-such-compiler')})

  found = executables._description(tiny.config(corpus), mesh_of())

  assert found['numpy'] == np.__version__
  assert found['no-such-compiler'] is None


@pytest.mark.parametrize('damage', [lambda b: b[:-9], lambda b: b[:-9] + b'x' + b[-8:]])
def test_a_damaged_file_is_refused_before_it_is_unpickled(saved, corpus, tmp_path, damage):
  (tmp_path / 'half').write_bytes(damage(saved.read_bytes()))

  with pytest.raises(
    errors.UserError, match="half' is damaged: its [0-9]+ bytes are not those once"
  ):
    executables.load(tmp_path / 'half', tiny.config(corpus), mesh_of())


@pytest.mark.parametrize('content', [b'', b'\x80\x04K\x01.', b'[1]\n', b'{"format": "another"}\n'])
def test_another_file_is_refused(corpus, tmp_path, content):
  (tmp_path / 'other').write_bytes(content)

  with pytest.raises(errors.UserError, match="other' is no executable of .*compile --save"):
    executables.load(tmp_path / 'other', tiny.config(corpus), mesh_of())


def test_a_file_that_is_not_there_is_named(corpus, tmp_path):
  with pytest.raises(errors.UserError, match='cannot read executable .*none.: No such file'):
    executables.load(tmp_path / 'none', tiny.config(corpus), mesh_of())


def test_what_the_devices_refuse_is_said_in_a_sentence(saved, corpus, monkeypatch):
  def refuse(*arguments, **named):
    raise jax.errors.JaxRuntimeError('INTERNAL: of another chip')

  monkeypatch.setattr(executables.serialize_executable, 'deserialize_and_load', refuse)

  with pytest.raises(errors.UserError, match='cannot be loaded on these .*INTERNAL: of another'):
    executables.load(saved, tiny.config(corpus), mesh_of())


def test_a_step_that_does_not_fit_is_not_written(corpus, monkeypatch, tmp_path):
  monkeypatch.setattr(compile, 'measure', lambda step, topology: ({'excess_bytes': 1}, object()))

  compile.compile_run(tiny.config(corpus), topologies.find('here'), save=tmp_path / 'step')

  assert not list(tmp_path.iterdir())


def test_slices_are_not_of_the_devices_that_are_here():
  with pytest.raises(errors.UserError, match='num_slices=2 is of TPUs that are not here'):
    topologies.find('here', 2)
