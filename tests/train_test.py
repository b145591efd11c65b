"""Tests `../lex_fire/train.py` and `checkpoint.py`: runs, resumes, and what a run leaves behind."""

import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny

from lex_fire import checkpoint, errors, feed, optimizer, presets, sharding, train
from lex_fire import compile as compile_command
from lex_fire import config as config_lib
from lex_fire.data import spec, train_vocabulary


@pytest.fixture(scope='module', autouse=True)
def _programs_of_equal_configs_compile_once():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train, 'Program', functools.cache(train.Program))
    yield


@pytest.fixture(scope='module')
def data(corpus):
  return corpus


@pytest.fixture(scope='module')
def whole(fire_run):
  """A run from start to end, never interrupted: its workdir and state."""
  return fire_run


def read_metrics(workdir):
  """Returns the metrics of a run but for those that are measured in seconds."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return tiny.untimed([json.loads(line) for line in lines])


def assert_equal_bits(tree, expected):
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), tree, expected
  )


def final_state(workdir, config):
  """Returns what the newest checkpoint of a workdir holds."""
  checkpoints = checkpoint.Checkpoints(workdir)
  program = train.Program(config, train.sharding.make_mesh())
  state = checkpoints.restore(checkpoints.latest(), program.abstract_state)
  checkpoints.close()
  return state


def test_the_loss_falls_and_every_step_is_logged_once(whole):
  workdir, _ = whole

  rows = read_metrics(workdir)

  trained = [row for row in rows if 'loss' in row]
  assert [row['step'] for row in trained] == list(range(1, 13))
  assert trained[-1]['loss'] < trained[0]['loss'] - 0.5
  assert [row['step'] for row in rows if 'validation_loss' in row] == [4, 8, 12]
  for row in trained:  # bytes: one token is one byte but for EOS, which stands for none
    ratio = row['bits_per_byte'] / row['loss'] * np.log(2)
    assert 1.0 < ratio < 1.001


def test_each_step_is_logged_with_the_rate_that_it_learned_at(whole, data):
  rate = optimizer.schedule(tiny.config(data))

  logged = [row['learning_rate'] for row in read_metrics(whole[0]) if 'loss' in row]

  assert logged == pytest.approx([float(rate(step)) for step in range(12)])


def test_tensorboard_gets_the_same_numbers(whole):
  from tensorboard.backend.event_processing import event_accumulator

  workdir, _ = whole
  accumulator = event_accumulator.EventAccumulator(str(workdir))
  accumulator.Reload()

  logged = {event.step: event.value for event in accumulator.Scalars('loss')}

  rows = {row['step']: row['loss'] for row in read_metrics(workdir) if 'loss' in row}
  assert logged == pytest.approx(rows)


def test_latest_and_best_checkpoints_are_kept(data, tmp_path):
  config = tiny.config(data, train={'keep_latest': 1, 'keep_best': 1})
  state = train.Program(config, train.sharding.make_mesh()).init()

  for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5)):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep_latest=1, keep_best=1)  # as after a resume
    checkpoints.save(step, state, loss)
    checkpoints.close()

  kept = sorted(int(path.name) for path in (tmp_path / 'checkpoints').iterdir())
  assert kept == [2, 4]
  checkpoints = checkpoint.Checkpoints(tmp_path)
  found = {name: checkpoints.named(name) for name in ('latest', 'best', '2', '3', '4')}
  assert found == {'latest': 4, 'best': 2, '2': 2, '3': None, '4': 4}
  message = "no checkpoint '3' in '.*'; use latest, best or a step that is there: 2, 4$"
  with pytest.raises(errors.UserError, match=message):
    checkpoint.restore_params(tmp_path, state['params'], '3')


def test_what_a_save_has_begun_is_swept_away_by_who_writes_and_left_by_who_reads(whole, tmp_path):
  workdir = shutil.copytree(whole[0], tmp_path / 'run')
  begun = shutil.copytree(
    workdir / 'checkpoints' / '12', workdir / 'checkpoints' / '13.orbax-checkpoint-tmp'
  )

  step, _ = checkpoint.restore_params(workdir, whole[1]['params'])
  assert step == 12 and begun.exists()
  checkpoints = checkpoint.Checkpoints(workdir)
  checkpoints.save(14, whole[1], 1.0)
  checkpoints.close()
  assert not begun.exists()


def test_who_reads_a_run_without_a_checkpoint_makes_none(whole, data, tmp_path):
  shutil.copy(whole[0] / 'config.json', tmp_path)

  with pytest.raises(errors.UserError, match='no checkpoint in '):
    checkpoint.restore_params(tmp_path, whole[1]['params'])

  assert [path.name for path in tmp_path.iterdir()] == ['config.json']


def test_of_checkpoints_without_a_loss_none_is_the_best(data, tmp_path):
  config = tiny.config(data)
  checkpoints = checkpoint.Checkpoints(tmp_path)
  checkpoints.save(1, train.Program(config, train.sharding.make_mesh()).init(), None)
  checkpoints.wait()

  assert checkpoints.named('best') is None
  checkpoints.close()


def test_a_finished_run_is_left_alone(whole, data, capsys):
  workdir, state = whole
  before = (workdir / 'metrics.jsonl').read_bytes()

  again = train.train(tiny.config(data), workdir)

  assert 'done already' in capsys.readouterr().out
  assert (workdir / 'metrics.jsonl').read_bytes() == before
  assert_equal_bits(again, state)


def test_a_checkpoint_restores_to_another_mesh_bit_for_bit(whole, data):
  workdir, state = whole
  config = tiny.config(data, mesh={'replica': 2, 'fsdp': 2, 'tensor': 2})
  program = train.Program(config, train.sharding.make_mesh(2, 4))
  checkpoints = checkpoint.Checkpoints(workdir)

  restored = checkpoints.restore(12, program.abstract_state)
  checkpoints.close()

  assert_equal_bits(restored, state)
  embedding_VD = restored['params']['embedding_VD']
  assert embedding_VD.sharding.spec == jax.sharding.PartitionSpec(None, ('fsdp',))


def test_a_damaged_checkpoint_is_named(whole, tmp_path):
  workdir = shutil.copytree(whole[0], tmp_path / 'damaged')
  for file in (workdir / 'checkpoints' / '12' / 'params' / 'd').iterdir():
    file.write_bytes(file.read_bytes()[:100])

  # In a process of its own: Orbax leaves the other reads of a failed restore behind, which at
  # times complain before the command does.
  status, _, stderr = tiny.run_command('lex_fire.evaluate', f'--workdir={workdir}')

  assert status == 2
  (line,) = (line for line in stderr.splitlines() if line.startswith('error: '))
  assert line.startswith('error: checkpoint ')
  assert "checkpoints/12' is damaged: " in line
  assert '; delete that directory to use the one before' in line  # Orbax may add to the line


def test_a_loss_that_a_power_cut_emptied_is_named_with_its_checkpoint(whole, tmp_path):
  workdir = shutil.copytree(whole[0], tmp_path / 'cut')
  (path,) = workdir.glob('checkpoints/12/metrics/metrics')
  path.write_text('')

  with pytest.raises(errors.UserError, match=f"{path}' is damaged: .*; delete .*/checkpoints/12'"):
    checkpoint.Checkpoints(workdir)


def test_hashes_of_data_that_a_power_cut_emptied_are_named(tmp_path):
  (tmp_path / 'data.json').write_text('')

  for claim in (
    lambda: checkpoint.claim_data(tmp_path, {}),
    lambda: checkpoint.check_vocabulary(tmp_path, 'bytes'),
  ):
    with pytest.raises(errors.UserError, match="data.json' is damaged: .*; delete it"):
      claim()


def test_a_workdir_belongs_to_one_config(whole, data):
  workdir, _ = whole
  other = tiny.config(data, optimizer={'weight_decay': 0.5})

  with pytest.raises(errors.UserError, match=r'optimizer.weight_decay=0.1 \(asked: 0.5\)'):
    train.train(other, workdir)


def test_a_run_older_than_a_field_of_the_config_has_its_default(tmp_path):
  values = presets.make('tiny', 'fire')
  config = config_lib.Config.from_dict(values)
  del values['data']['mask_rate'], values['evaluate']['masks'], values['encoding']['psi']
  (tmp_path / 'config.json').write_text(json.dumps(values))

  assert checkpoint.read_config(tmp_path) == config


def test_a_run_whose_config_calls_an_axis_by_its_old_name_is_read(tmp_path):
  values = presets.make('tiny', 'fire')
  config = config_lib.Config.from_dict({**values, 'mesh': {**values['mesh'], 'replica': 4}})
  (tmp_path / 'config.json').write_text(json.dumps({**values, 'mesh': {'data': 4, 'fsdp': 1}}))

  assert checkpoint.read_config(tmp_path) == config


@pytest.mark.parametrize(('said', 'meant'), [(False, 'none'), (True, 'block')])
def test_a_run_whose_config_says_whether_to_rematerialize_is_read(said, meant, tmp_path):
  values = presets.make('tiny', 'fire', model={'remat': meant})
  config = config_lib.Config.from_dict(values)
  values['model']['remat'] = said
  (tmp_path / 'config.json').write_text(json.dumps(values))

  assert checkpoint.read_config(tmp_path) == config


def test_a_run_may_go_on_on_another_mesh(whole, data):
  workdir, state = whole

  again = train.train(tiny.config(data, mesh={'replica': 2, 'fsdp': 4}), workdir)

  assert_equal_bits(again, state)


def test_a_config_that_is_no_json_is_refused(tmp_path):
  (tmp_path / 'config.json').write_text('{"model"')

  with pytest.raises(errors.UserError, match='config.json.* is not JSON'):
    checkpoint.read_config(tmp_path)


@pytest.mark.parametrize(
  ('text', 'value'), [('{"model": 3}', '3'), ('{"encoding": 4}', '4'), ('[]', r'\[\]')]
)
def test_a_config_of_another_shape_is_refused_by_file(tmp_path, text, value):
  (tmp_path / 'config.json').write_text(text)

  with pytest.raises(errors.UserError, match=f'config.json.*{value}'):
    checkpoint.read_config(tmp_path)


def test_a_workdir_that_cannot_be_written_is_refused(data, tmp_path):
  (tmp_path / 'file').write_text('')

  with pytest.raises(errors.UserError, match='cannot write workdir .*file/run.*Not a directory'):
    train.train(tiny.config(data), tmp_path / 'file' / 'run')


def test_a_vocabulary_larger_than_the_models_is_refused(data, tmp_path):
  config = tiny.config(data, model={'vocab_size': 100})

  with pytest.raises(errors.UserError, match='model.vocab_size=100 is less than the 259 ids'):
    train.train(config, tmp_path)


def test_a_bidirectional_model_needs_an_id_for_the_mask(data, tmp_path):
  config = tiny.config(data, model={'causal': False, 'vocab_size': 259})

  with pytest.raises(errors.UserError, match='vocab_size=259 is less than the 259 .* 260 together'):
    train.train(config, tmp_path)


def test_a_resume_on_other_data_is_refused(whole, tmp_path):
  config = tiny.config(tiny.write_corpus(tmp_path / 'corpus'))
  workdir = shutil.copytree(whole[0], tmp_path / 'run')
  (workdir / 'config.json').write_text(json.dumps(config.to_dict()))

  train.train(config, workdir)  # the same text in another place
  (tmp_path / 'corpus' / 'train' / 'more.txt').write_text('more text\n' * 9)

  with pytest.raises(errors.UserError, match='the train data have changed since the run'):
    train.train(config, workdir)


def test_a_file_in_the_place_of_checkpoints_is_refused(data, tmp_path):
  (tmp_path / 'checkpoints').write_text('')

  with pytest.raises(errors.UserError, match="checkpoints' must be a directory"):
    train.train(tiny.config(data), tmp_path)


# Bidirectional models, and randomized positions

ENCODER = {**tiny.MODEL, 'causal': False, 'vocab_size': 260}


# Sections of configs of runs that do more than predict next tokens at positions counted from 0.
MASKED = {'model': ENCODER, 'data': {'batch_size': 32}}  # 160 masked tokens a step
MASKED_AT_DRAWN = {'model': ENCODER, 'data': {'batch_size': 32, 'position_range': 500}}
OTHER_RUNS = {
  'alibi bidirectional': MASKED,
  'fire bidirectional at randomized positions': MASKED_AT_DRAWN,
  'xpos bidirectional at randomized positions': MASKED_AT_DRAWN,
  'learned at randomized positions of isolated documents, in two parts': {
    'data': {'batch_size': 16, 'isolate_documents': True, 'position_range': 500},
    'train': {'accumulation': 2},
  },
}


@pytest.mark.parametrize('run', OTHER_RUNS)
def test_other_runs_train_and_only_those_of_next_tokens_report_bits_per_byte(
  run, data, tmp_path, capsys
):
  sections = OTHER_RUNS[run]
  train_section = {'steps': 16, 'checkpoint_every': 16, **sections.get('train', {})}
  optimizer = {'learning_rate': 0.01}
  config = tiny.config(
    data, run.partition(' ')[0], **sections | {'optimizer': optimizer, 'train': train_section}
  )

  train.train(config, tmp_path)

  rows = read_metrics(tmp_path)
  losses = [row['loss'] for row in rows if 'loss' in row]
  assert max(losses[-3:]) < losses[0] - 0.5
  assert [row['step'] for row in rows if 'validation_loss' in row] == [16]
  in_rows, is_causal = any('bits' in key for row in rows for key in row), config.model.causal
  assert in_rows == ('bits' in capsys.readouterr().out) == is_causal


@pytest.mark.parametrize(
  ('accumulation', 'name'), [(1, 'chunked'), (2, 'reference')], ids=['whole', 'in two parts']
)
def test_what_is_told_of_packed_rows_is_what_attends(accumulation, name, data, taken):
  sections = {
    'data': {'batch_size': 8, 'length': 64, 'isolate_documents': True},
    'train': {'accumulation': accumulation},
  }
  config = tiny.config(data, **sections)
  program = train.Program(config, sharding.make_mesh(devices=jax.devices()[:1]))
  taken.clear()  # by which parameters were made

  step = compile_command.training_step(config, program)
  step.function.lower(*step.arguments)

  assert set(taken) == {step.about['attention']['implementation']} == {name}


CHANGES = {'position_range': 500, 'isolate_documents': True}


def test_a_resumed_run_draws_the_masks_and_positions_of_an_unbroken_one(data, tmp_path):
  steps = {'steps': 4, 'checkpoint_every': 2, 'keep_latest': 2}
  config = tiny.config(data, model=ENCODER, data=CHANGES, train=steps)
  unbroken = train.train(config, tmp_path / 'run')
  before = read_metrics(tmp_path / 'run')

  shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '4')  # as if killed after step 2
  resumed = train.train(config, tmp_path / 'run')

  assert_equal_bits(resumed, unbroken)
  assert read_metrics(tmp_path / 'run') == before


def read_batches(config, index=0, count=1):
  """Returns the batches of three steps and those of validation, as one of the hosts reads them."""
  data = feed.Data(config, share=(index, count))
  return [data.train_batch(step) for step in range(3)], list(data.validation_batches())


@pytest.mark.parametrize('isolate_documents', [False, True])
def test_hosts_together_read_what_one_host_reads(isolate_documents, data):
  changes = CHANGES | {'isolate_documents': isolate_documents}
  config = tiny.config(data, model=ENCODER, data=changes)

  whole = sum(read_batches(config), [])
  parts = [sum(read_batches(config, index, 2), []) for index in range(2)]

  for batch, *of_hosts in zip(whole, *parts, strict=True):
    for name, x in batch.items():
      of_name = [part[name] for part in of_hosts]
      if x is None or len(x) == 1:  # all hosts' rows share it
        assert_equal_bits(of_name, [x] * 2)
      else:
        np.testing.assert_array_equal(np.concatenate(of_name), x)


def test_training_draws_anew_at_each_step_and_validation_always_the_same(data):
  def read(seed):
    config = tiny.config(data, model=ENCODER, data={'position_range': 500}, train={'seed': seed})
    return read_batches(config)

  def drawn(batch):
    return (batch['loss_weights_BL'].tolist(), batch['position_BL'].tolist())

  (steps, judged), (other_steps, other_judged) = read(0), read(1)

  for drawn_alike in zip(*map(drawn, [*steps, *other_steps, *judged]), strict=True):
    assert all(drawn_alike.count(x) == 1 for x in drawn_alike)
  assert_equal_bits(judged, other_judged)


def test_a_bidirectional_model_restores_the_targets_of_a_causal_one(data):
  restored, _ = read_batches(tiny.config(data, model=ENCODER))
  predicted, _ = read_batches(tiny.config(data))

  for masked, plain in zip(restored, predicted, strict=True):
    np.testing.assert_array_equal(masked['targets_BL'], plain['targets_BL'])
    assert plain['loss_weights_BL'].all()
    kept_BL = masked['loss_weights_BL'] == 0
    assert kept_BL.mean() == 1 - 5 / 32  # the nearest to 15% of 32 tokens
    np.testing.assert_array_equal(masked['inputs_BL'][kept_BL], plain['targets_BL'][kept_BL])
    for name in ('position_BL', 'segment_ids_BL'):
      assert_equal_bits(masked[name], plain[name])


# Finetuning, and questions

FEW_STEPS = {'steps': 4, 'checkpoint_every': 2, 'log_every': 1, 'validation_windows': 8}


def finetuned(corpus, source, **sections):
  """Returns the config of a short run at twice the length that starts from another."""
  sections = {'data': {'length': 64}, 'train': {}} | sections
  start = FEW_STEPS | {'start_from': str(source)} | sections.pop('train')
  return tiny.config(corpus, **sections, train=start)


def test_a_run_starts_from_the_newest_parameters_of_another_and_a_fresh_optimizer(
  whole, data, tmp_path
):
  source = shutil.copytree(whole[0], tmp_path / 'source')
  config = finetuned(data, source)
  unbroken = train.train(config, tmp_path / 'run')
  before = read_metrics(tmp_path / 'run')

  program, batches = train.Program(config, train.sharding.make_mesh()), feed.Data(config)
  expected = {**program.init(), 'params': jax.tree.map(jax.numpy.copy, whole[1]['params'])}
  for step in range(4):
    expected, _ = program.step(expected, program.put(batches.train_batch(step)))
  assert_equal_bits(unbroken, expected)
  # A resume goes on from its own parameters, and does not ask for the others again.
  shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '4')
  shutil.rmtree(source)
  assert_equal_bits(train.train(config, tmp_path / 'run'), unbroken)
  assert read_metrics(tmp_path / 'run') == before


@pytest.mark.parametrize(
  'sections, message',
  [
    ({'model': {'d_ff': 48}}, 'is a run of model.d_ff=32, not 48 as here; make them the same'),
    ({'model': {'norm': 'rmsnorm'}}, "is a run of model.norm='layernorm', not 'rmsnorm' as here"),
    ({'name': 'rope'}, "is a run of encoding.name='fire', not 'rope' as here"),
    ({'encoding': {'width': 5}}, r'is a run of .*b_in_W=\(32,\), not \(5,\) as here'),
    ({'train': {'start_from': '/nowhere'}}, "no run in workdir '/nowhere'"),
  ],
)
def test_a_run_of_another_model_is_no_start_and_is_refused_before_the_workdir_is_claimed(
  sections, message, whole, data, tmp_path
):
  with pytest.raises(errors.UserError, match=message):
    train.train(finetuned(data, whole[0], **sections), tmp_path / 'run')

  assert not (tmp_path / 'run').exists()


def test_a_run_of_another_vocabulary_is_no_start(whole, data, tmp_path):
  path = tmp_path / 'tiny.model'
  written = spec.Spec('text', files={'train': __file__})
  train_vocabulary.train(written, 'train', 400, path, max_characters=10**6)
  sections = {'data': {'vocabulary': str(path)}}

  with pytest.raises(errors.UserError, match="data.vocabulary='bytes', not 'sentencepiece-"):
    train.train(finetuned(data, whole[0], **sections), tmp_path / 'run')


def test_attention_and_precision_may_differ_from_the_run_to_start_from(whole, data, tmp_path):
  config = finetuned(data, whole[0], model={'attention': 'reference', 'dtype': 'bfloat16'})

  assert train._check_source(config) == whole[0]


def test_of_a_run_on_questions_only_answers_count(data, tmp_path, capsys):
  no_files = {'train_files': '', 'validation_files': ''}
  task = {'task': 'addition:length=2,count=50,held_out=10', 'length': 40}
  config = tiny.config(data, data=no_files | task, train=FEW_STEPS | {'steps': 3})
  batch = feed.Data(config).train_batch(0)
  capsys.readouterr()

  train.train(config, tmp_path)

  apply, params = jax.jit(train.make_model(config).apply), train.init(config)['params']
  logits_BLV = apply({'params': params}, batch['inputs_BL'])
  losses = []
  for logits_LV, row_L in zip(np.float64(logits_BLV), batch['inputs_BL'], strict=True):
    question, _, rest = bytes((row_L[row_L > 2] - 3).astype(np.uint8)).partition(b'\n\nAnswer: ')
    first = len(question) + len('\n\nAnswer: ')  # the input before the answer, after EOS
    left, right = (int(part[::-1]) for part in question.rstrip(b'=').split(b'+'))
    assert int(rest[::-1]) == left + right
    for index, target in enumerate([*(byte + 3 for byte in rest), 1], start=first):
      losses.append(np.log(np.exp(logits_LV[index]).sum()) - logits_LV[index, target])
  rows = read_metrics(tmp_path)
  assert rows[0]['loss'] == pytest.approx(np.mean(losses), rel=1e-4)
  assert not any('bits' in name for row in rows for name in row)
  out = capsys.readouterr().out
  assert 'bits' not in out
  assert 'train: 50 questions, of which 0 are cut to 40 tokens, by 0 in all' in out
  assert out.splitlines()[-1].startswith('time: step ')


def test_importing_the_library_imports_no_tensorflow():
  code = (
    'import sys, lex_fire, lex_fire.train, lex_fire.evaluate\n'
    'assert not {"tensorflow", "seqio", "grain", "ml_collections"} & set(sys.modules)'
  )
  environment = {**os.environ, 'PYTHONPATH': str(pathlib.Path(__file__).parents[1])}

  subprocess.run([sys.executable, '-c', code], check=True, env=environment)
