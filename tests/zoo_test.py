"""Tests `../lex_fire/zoo.py`: the named models, and the weights that ship with the package."""

import contextlib
import re
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.shipped import cards
from lex_fire import checkpoint, encodings, errors, loss, presets, sharding, train, zoo
from lex_fire import config as config_lib

FIRST_BYTE = 3
LARGEST = 10e6  # bytes that all weights may take together


def test_all_that_ships_is_small():
  assert 'fire-tiny' in zoo.shipped()
  assert sum(path.stat().st_size for path in zoo.WEIGHTS.iterdir()) <= LARGEST


@pytest.mark.parametrize('name', zoo.shipped())
def test_a_shipped_model_reads_python(name):
  """A model that knows nothing has a loss of log 259 = 5.6 nats a byte; these have 1.25 to 1.41."""
  transformer, params = zoo.load(name)
  tokens_1L = np.frombuffer(string.__doc__.encode() + b'\n' * 3, np.uint8)[None] + FIRST_BYTE
  tokens_1L = np.insert(tokens_1L.astype(np.int32), 0, 1, axis=1)

  logits_1LV = jax.jit(transformer.apply)({'params': params}, tokens_1L[:, :-1])

  assert float(loss.token_losses(logits_1LV, tokens_1L[:, 1:]).mean()) < 1.7


@pytest.mark.parametrize('name', zoo.shipped())
def test_a_shipped_model_is_what_its_name_says(name):
  run = zoo.config(name)

  assert name == f'{run.encoding.name}-tiny'
  assert run == config_lib.Config.from_dict(run.to_dict())
  for leaf in jax.tree.leaves(zoo.load(name)[1]):
    assert leaf.dtype == jnp.float32 and np.isfinite(leaf).all()


def test_each_shipped_model_has_a_card_of_what_was_measured():
  for name, card in cards.cards().items():
    assert (zoo.WEIGHTS / f'{name}.md').read_text() == card


def test_a_shipped_model_becomes_a_run_whose_newest_checkpoint_it_is(tmp_path, caplog):
  with caplog.at_level('WARNING', logger='absl'):
    zoo.unpack('fire-tiny', tmp_path / 'fire')
  zoo.unpack('fire-tiny', str(tmp_path / 'fire'))  # again: nothing changes

  run = checkpoint.read_config(tmp_path / 'fire')
  program = train.Program(run, sharding.make_mesh())
  abstract = program.abstract_state['params']
  step, params = checkpoint.restore_params(tmp_path / 'fire', abstract)

  assert not caplog.messages  # Orbax has nothing to warn of
  assert run == zoo.config('fire-tiny')
  assert step == run.train.steps
  expected = zoo.load('fire-tiny')[1]
  jax.tree.map(np.testing.assert_array_equal, params, expected)
  with refuses('holds a run of another config, encoding.name='):
    zoo.unpack('rope-tiny', tmp_path / 'fire')


def test_a_run_of_a_shipped_models_config_is_not_taken_for_it(tmp_path):
  run, (_, params) = zoo.config('fire-tiny'), zoo.load('fire-tiny')
  checkpoint.claim_workdir(tmp_path, run)
  state = {'params': jax.tree.map(jnp.zeros_like, params), 'optimizer': params}
  with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as checkpoints:
    checkpoints.save(run.train.steps, state, None)

  with refuses(f"run of the config of 'fire-tiny' at step {run.train.steps}, and not its shipped"):
    zoo.unpack('fire-tiny', tmp_path)


def test_any_encoding_has_the_published_sizes():
  for encoding in encodings.ENCODINGS:
    for size in set(presets.PRESETS) - {'tiny'}:
      run = zoo.config(f'{encoding}-{size}')
      assert run.encoding.name == encoding
      assert run.model.d_model == presets.PRESETS[size]['model']['d_model']


def test_weights_come_back_to_half_precision(tmp_path):
  rng = np.random.default_rng(0)
  params = {'block_0': {'in_DF': rng.normal(size=(4, 5)), 'encoding': {'c': np.float32(0.1)}}}

  zoo.write(tmp_path / 'a.npz', params)
  found = zoo.read(tmp_path / 'a.npz')

  assert jax.tree.structure(found) == jax.tree.structure(params)
  for leaf, expected in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
    np.testing.assert_allclose(leaf, expected, rtol=2**-11)


def refuses(message):
  return pytest.raises(errors.UserError, match=re.escape(message))


def test_mistakes_are_answered_with_their_value(tmp_path):
  with refuses("unknown model 'fire-huge'; known: with weights"):
    zoo.load('fire-huge')
  with refuses("unknown model 'wire-base'"):
    zoo.config('wire-base')
  with refuses("no weights ship for 'fire-base', only for: "):
    zoo.load('fire-base')
  with refuses('in_DF is beyond the range of half precision'):
    zoo.write(tmp_path / 'a.npz', {'in_DF': np.array([1e6])})
  with refuses('cannot read weights'):
    zoo.read(tmp_path / 'none.npz')


@pytest.mark.parametrize('kept', [0.0, 0.1, 0.5, 0.99])
def test_damaged_weights_are_refused(tmp_path, kept):
  path = tmp_path / 'a.npz'
  zoo.write(path, {'in_DF': np.random.default_rng(0).normal(size=(40, 50))})
  whole = path.read_bytes()
  path.write_bytes(whole[: int(kept * len(whole))])

  with refuses('cannot read weights'):
    zoo.read(path)


def test_no_pickle_is_read(tmp_path):
  np.savez(tmp_path / 'a.npz', in_DF=np.array([{'a': 1}], dtype=object))

  with refuses('cannot read weights'):
    zoo.read(tmp_path / 'a.npz')


def test_weights_of_another_model_are_refused(tmp_path, monkeypatch):
  zoo.write(tmp_path / 'fire-tiny.npz', {'in_DF': np.zeros((4, 5))})
  (tmp_path / 'fire-tiny.json').write_text((zoo.WEIGHTS / 'fire-tiny.json').read_text())
  monkeypatch.setattr(zoo, 'WEIGHTS', tmp_path)

  with refuses("the weights of 'fire-tiny' do not fit its config"):
    zoo.load('fire-tiny')
