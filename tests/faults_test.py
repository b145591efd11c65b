"""A run cannot be lost: kills, notices, damage, a full disk, losses that are no numbers.

`python -m pytest -s tests/faults_test.py -k random_moments --faults=100` gives a run a hundred of
the first four, one after the other.
"""

import functools
import json
import multiprocessing
import os
import random
import resource
import runpy
import shutil
import signal
import sys
import time

import jax
import numpy as np
import pytest
import tiny

from lex_fire import checkpoint, errors, feed, lock, optimizer, train

STEPS = 12  # of a tiny run, with a checkpoint after each fourth


def assert_equal_bits(tree, expected):
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), tree, expected
  )


def metrics_of(workdir):
  """Returns the metrics of a run, if it has any, but for those that are measured in seconds."""
  path = workdir / 'metrics.jsonl'
  lines = path.read_text().splitlines(keepends=True) if path.exists() else []
  rows = [json.loads(line) for line in lines if line.endswith('\n')]  # but what a kill cut short
  return tiny.untimed(rows)


def start(workdir, values, out=os.devnull, err=os.devnull):
  command = ['lex_fire.train', f'--workdir={workdir}', *tiny.flags(values)]
  return tiny.start_command(*command, out=str(out), err=str(err))


def size(path):
  return path.stat().st_size if path.exists() else 0


def has_grown(path, enough):
  return size(path) >= enough


def wait_for(condition, process):
  deadline = time.monotonic() + 120
  while not condition():
    assert process.is_alive() and time.monotonic() < deadline
    time.sleep(0.002)


def train_where_files_stay_small(limit, arguments, err):
  """Trains where no file can grow past so many bytes, as none can on a full disk."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
  os.dup2(err.fileno(), 2)  # which is no file, so that it takes all there is to say
  err.close()
  sys.dont_write_bytecode = True  # they would be cut short too
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
  sys.argv = ['lex_fire.train', *arguments]
  sys.modules.pop('lex_fire.train', None)
  runpy.run_module('lex_fire.train', run_name='__main__')


def run_on_a_full_disk(workdir, values, limit):
  """Runs the command where no file can grow past `limit` bytes; returns its status and stderr."""
  heard, err = multiprocessing.Pipe(duplex=False)
  arguments = [f'--workdir={workdir}', *tiny.flags(values)]
  process = tiny.start(train_where_files_stay_small, limit, arguments, err)
  err.close()
  with os.fdopen(os.dup(heard.fileno())) as file:
    said = ' '.join(file.read().split())
  process.join()
  return process.exitcode, said


# One after the other, at random moments


def kill(process):
  process.kill()
  process.join()
  assert process.exitcode == -signal.SIGKILL


def tell(process):
  os.kill(process.pid, signal.SIGTERM)
  process.join()
  assert process.exitcode == 0


def damage(folder):
  """Cuts the files short that say where a checkpoint's parameters are."""
  for file in (folder / 'params' / 'd').iterdir():
    file.write_bytes(file.read_bytes()[:100])


def blot(folder):
  """Makes zeros of the numbers of a checkpoint, a disk's way to lose them."""
  file = max((folder / 'params').glob('ocdbt.process_0/d/*'), key=size)
  file.write_bytes(bytes(size(file)))


def harm_the_newest(workdir, harm):
  steps = checkpoint.Checkpoints(workdir, read_only=True).steps()
  if len(steps) > 1:  # or there would be no other to go on from
    harm(workdir / 'checkpoints' / str(steps[-1]))


def meet(fault, workdir, values, draw):
  """Goes on with a run until it has met a fault, some bytes of metrics further."""
  metrics = workdir / 'metrics.jsonl'
  enough = size(metrics) + draw.randint(1, 1000)
  if fault == 'full disk':
    status, said = run_on_a_full_disk(workdir, values, enough)
    assert status == 2
    assert 'error: ' in said and '; make room' in said  # metrics, a checkpoint, or the config
    return
  process = start(workdir, values)
  wait_for(functools.partial(has_grown, metrics, enough), process)
  # Then any moment: of a step, of a save, of what goes for it.
  time.sleep(draw.uniform(0, 0.2))
  (tell if fault == 'told to end' else kill)(process)
  process.close()
  if fault == 'damaged':
    harm_the_newest(workdir, draw.choice([damage, blot]))


FAULTS = ('killed', 'told to end', 'damaged', 'full disk')


def test_a_run_that_meets_faults_at_random_moments_equals_an_unbroken_one_bit_for_bit(
  corpus, tmp_path, request
):
  count = request.config.getoption('--faults')
  steps = 12 * (count + 2)
  course = {'steps': steps, 'checkpoint_every': 4, 'log_every': 1}
  values = tiny.values(corpus, train=course)
  config = train.config_lib.Config.from_dict(values)
  unbroken = train.train(config, tmp_path / 'unbroken')
  draw, workdir = random.Random(count), tmp_path / 'broken'

  faults = [fault for _ in range(0, count, len(FAULTS)) for fault in draw.sample(FAULTS, 4)]
  for number, fault in enumerate(faults[:count], start=1):
    meet(fault, workdir, values, draw)
    kept = checkpoint.Checkpoints(workdir, read_only=True).steps()
    print(f'{number} of {count}: {fault}, after step {metrics_of(workdir)[-1:]}; {kept=}')
  # In a process of its own: Orbax leaves the other reads of a failed restore behind.
  last = start(workdir, values)
  last.join()

  assert last.exitcode == 0
  program = train.Program(config, train.sharding.make_mesh())
  kept = checkpoint.Checkpoints(workdir).restore(steps, program.abstract_state)
  assert_equal_bits(kept, unbroken)
  found, expected = metrics_of(workdir), metrics_of(tmp_path / 'unbroken')
  assert [row for row in found if 'loss' in row] == [row for row in expected if 'loss' in row]
  assert all(row in expected for row in found)  # a run that is told to end is not judged there


def test_a_run_that_goes_on_on_other_meshes_has_the_same_batches_and_agrees_to_rounding(
  corpus, fire_run, tmp_path, monkeypatch
):
  seen, train_batch = [], feed.Data.train_batch

  def told_after_4_steps(data, step):
    seen.append(step)
    if len(seen) % 4 == 0:
      signal.raise_signal(signal.SIGTERM)
    return train_batch(data, step)

  monkeypatch.setattr(feed.Data, 'train_batch', told_after_4_steps)
  for mesh in ({}, {'replica': 2, 'fsdp': 4}, {'replica': 1, 'fsdp': 2, 'sequence': 4}):
    state = train.train(tiny.config(corpus, mesh=mesh), tmp_path)

  assert seen == list(range(STEPS))
  losses, expected = (
    [row['loss'] for row in metrics_of(workdir) if 'loss' in row]
    for workdir in (tmp_path, fire_run[0])
  )
  assert losses == pytest.approx(expected, rel=1e-5)
  for leaf, of_one in zip(*map(jax.tree.leaves, (state, fire_run[1])), strict=True):
    # Adam makes steps of a learning rate, 3e-3, also of gradients that are little but rounding, as
    # is that of FIRE's last biases, which move all logits of a head alike.
    np.testing.assert_allclose(leaf, of_one, rtol=1e-3, atol=6e-4)


@pytest.mark.parametrize(
  ('sections', 'message'),
  [
    ({'model': {'attention': 'mosaic_tpu'}}, "implementation='mosaic_tpu' is for tpu, but this is"),
    (  # which only a kernel finds out, of rows of that length
      {
        'model': {'attention': 'reference'},
        'encoding': {'scale_base': 1.0},
        'data': {'length': 80},
      },
      'nats a token is too fast for one tile of 80 queries',
    ),
  ],
)
def test_what_attention_refuses_is_refused_before_there_is_a_workdir(
  corpus, tmp_path, sections, message
):
  with pytest.raises(errors.UserError, match=message):
    train.train(tiny.config(corpus, 'xpos', **sections), tmp_path / 'run')

  assert not (tmp_path / 'run').exists()


def test_a_workdir_in_use_is_refused_and_free_again_in_the_end(corpus, fire_run):
  workdir, expected = fire_run

  with lock.hold(workdir):
    message = f'is in use by process {os.getpid()} on .*; wait for its end, use another'
    with pytest.raises(errors.UserError, match=message):
      train.train(tiny.config(corpus), workdir)

  assert_equal_bits(train.train(tiny.config(corpus), workdir), expected)


def test_a_workdir_that_cannot_be_locked_is_refused(tmp_path):
  (tmp_path / '.lock').mkdir()

  with (
    pytest.raises(errors.UserError, match='cannot be locked: Is a directory; use another'),
    lock.hold(tmp_path),
  ):
    pass


def hold_on_a_full_disk(workdir, err):
  resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
  with pytest.raises(errors.UserError) as refused, lock.hold(workdir):
    pass
  err.send_bytes(str(refused.value).encode())


def test_a_full_disk_is_told_of_the_lock_too(tmp_path):
  heard, err = multiprocessing.Pipe(duplex=False)

  process = tiny.start(hold_on_a_full_disk, tmp_path, err)
  err.close()
  said = heard.recv_bytes().decode()
  process.join()

  assert said.endswith('cannot be locked: File too large; make room')


# Asked to end


def test_a_run_that_is_told_to_end_saves_ends_well_and_goes_on_bit_for_bit(
  corpus, fire_run, tmp_path
):
  workdir, out = tmp_path / 'run', tmp_path / 'out'
  out.touch()
  metrics = workdir / 'metrics.jsonl'
  # A tiny run is over before it can be told anything: its twelve steps are the first of many.
  values = tiny.values(corpus, train={'checkpoint_every': 4000, 'steps': 4000})
  process = start(workdir, values, out=out)
  wait_for(metrics.exists, process)
  os.kill(process.pid, signal.SIGTERM)
  process.join()

  assert process.exitcode == 0
  (line,) = (line for line in out.read_text().splitlines() if 'SIGTERM' in line)
  (step,) = checkpoint.Checkpoints(workdir).steps()
  assert line == f'SIGTERM: saved after step {step}; the same command goes on from there'
  config = train.config_lib.Config.from_dict(values)
  program = train.Program(config, train.sharding.make_mesh())
  data = feed.Data(config)
  state = program.init()
  for index in range(step):
    state, _ = program.step(state, program.put(data.train_batch(index)))
  kept = checkpoint.Checkpoints(workdir).restore(step, program.abstract_state)
  assert_equal_bits(kept, state)


def test_outside_of_a_run_sigterm_does_what_it_did(fire_run, corpus):
  before = signal.getsignal(signal.SIGTERM)

  train.train(tiny.config(corpus), fire_run[0])

  assert signal.getsignal(signal.SIGTERM) is before


# Damaged


@pytest.mark.parametrize('harm', [damage, blot])
def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(
  corpus, fire_run, tmp_path, harm
):
  workdir = shutil.copytree(fire_run[0], tmp_path / 'run')
  harm(workdir / 'checkpoints' / '12')

  # In a process of its own: Orbax leaves the other reads of a failed restore behind.
  command = [f'--workdir={workdir}', *tiny.flags(tiny.values(corpus))]
  status, stdout, _ = tiny.run_command('lex_fire.train', *command)

  assert status == 0
  (line,) = (line for line in stdout.splitlines() if 'damaged' in line)
  assert "checkpoints/12' is damaged: " in line
  assert line.endswith('and the run goes on from step 8')
  assert list((workdir / 'damaged').glob('12-*/params'))
  config = tiny.config(corpus)
  program = train.Program(config, train.sharding.make_mesh())
  kept = checkpoint.Checkpoints(workdir).restore(12, program.abstract_state)
  assert_equal_bits(kept, fire_run[1])
  assert metrics_of(workdir) == metrics_of(fire_run[0])


def test_a_run_without_a_whole_checkpoint_is_not_begun_anew(corpus, fire_run, tmp_path):
  workdir = shutil.copytree(fire_run[0], tmp_path / 'run')
  for folder in (workdir / 'checkpoints').iterdir():
    damage(folder)

  command = [f'--workdir={workdir}', *tiny.flags(tiny.values(corpus))]
  status, _, stderr = tiny.run_command('lex_fire.train', *command)

  assert status == 2
  assert 'there is no other that is whole: restore one, or use another --workdir' in stderr
  assert (workdir / 'checkpoints' / '12').exists()


def test_a_checkpoint_of_another_model_is_refused_by_its_first_parameter(fire_run, tmp_path):
  workdir = tiny.as_if(fire_run[0], tmp_path / 'run', model={'d_ff': 64})

  message = (
    "checkpoints/12' is of another model: of block_0.mlp.in_DF it has .16, 32., and the config "
    '.16, 64.; restore config.json'
  )
  with pytest.raises(errors.UserError, match=message):
    train.train(checkpoint.read_config(workdir), workdir)
  assert (workdir / 'checkpoints' / '12').exists()


# A full disk


def test_a_full_disk_ends_the_run_in_a_sentence_and_keeps_what_was_saved(corpus, tmp_path):
  workdir = tmp_path / 'run'
  values = tiny.values(corpus, train={'steps': 4, 'log_every': 4})
  train.train(train.config_lib.Config.from_dict(values), workdir)
  # As if it had been asked for eight steps from the beginning, and the disk were full by now.
  config = json.loads((workdir / 'config.json').read_text())
  config['train']['steps'] = values['train']['steps'] = 8
  (workdir / 'config.json').write_text(json.dumps(config))

  status, said = run_on_a_full_disk(workdir, values, limit=4096)

  assert status == 2
  # Threads of Orbax's that fail too may say so in the middle of a line of ours.
  assert 'error: a checkpoint cannot be written into' in said
  assert 'make room, and run the same command again, which goes on from the one before' in said
  assert checkpoint.Checkpoints(workdir).steps() == [4]


# No number


@pytest.fixture
def poisoned(monkeypatch):
  """Batches of which the sixth has a loss that is no number."""
  train_batch = feed.Data.train_batch

  def batch_of(data, step):
    batch = train_batch(data, step)
    if step == 5:
      batch['loss_weights_BL'][0, 0] = np.nan
    return batch

  monkeypatch.setattr(feed.Data, 'train_batch', batch_of)


@pytest.mark.parametrize('log_every', [1, 4, 12])
def test_a_loss_that_is_no_number_stops_the_run_by_step_and_batch(
  corpus, poisoned, log_every, tmp_path
):
  config = tiny.config(corpus, train={'log_every': log_every})

  with pytest.raises(errors.UserError, match="loss=nan, .* at step 6; its batch is in '.*/step-6'"):
    train.train(config, tmp_path)

  assert checkpoint.Checkpoints(tmp_path).steps() == [4]
  folder = tmp_path / 'non_finite' / 'step-6'
  assert json.loads((folder / 'step.json').read_text())['step'] == 6
  with np.load(folder / 'batch-0.npz') as batch:
    expected = feed.Data(config).train_batch(5)
    assert np.isnan(batch['loss_weights_BL'][0, 0])
    np.testing.assert_array_equal(batch['inputs_BL'], expected['inputs_BL'])


def test_a_step_that_went_wrong_can_be_taken_again_from_what_is_kept(corpus, poisoned, tmp_path):
  config = tiny.config(corpus)
  with pytest.raises(errors.UserError, match='at step 6'):
    train.train(config, tmp_path)
  program = train.Program(config, train.sharding.make_mesh())
  (before,) = checkpoint.Checkpoints(tmp_path, read_only=True).steps()
  state = checkpoint.Checkpoints(tmp_path, read_only=True).restore(before, program.abstract_state)
  for index in range(before, 5):
    state, values = program.step(state, program.put(feed.Data(config).train_batch(index)))
    assert np.isfinite(values['loss'])

  with np.load(tmp_path / 'non_finite' / 'step-6' / 'batch-0.npz') as kept:
    batch = {'position_BL': None, 'segment_ids_BL': None, **kept}
  _, values = program.step(state, program.put(batch))

  assert np.isnan(values['loss'])


def test_a_step_that_is_skipped_changes_nothing(corpus, poisoned, tmp_path, capsys):
  config = tiny.config(corpus, train={'non_finite': 'skip', 'log_every': 4})

  skipped = train.train(config, tmp_path)

  # The rate goes by the steps that were taken.
  rate = optimizer.schedule(config)
  rows = map(json.loads, (tmp_path / 'metrics.jsonl').read_text().splitlines())
  logged = {row['step']: row['learning_rate'] for row in rows if 'learning_rate' in row}
  assert logged == pytest.approx({step: float(rate(step - 1 - (step > 6))) for step in (4, 8, 12)})
  assert optimizer.count(skipped['optimizer']) == STEPS - 1

  assert 'at step 6: skipped (1 so far); ' in capsys.readouterr().out
  program = train.Program(config, train.sharding.make_mesh())
  data, state = feed.Data(config), program.init()
  for index in [i for i in range(STEPS) if i != 5]:
    state, _ = program.step(state, program.put(data.train_batch(index)))
  assert_equal_bits(skipped, state)
  assert (tmp_path / 'non_finite' / 'step-6' / 'batch-0.npz').exists()


def test_a_resume_knows_how_many_steps_were_skipped(corpus, poisoned, tmp_path):
  config = tiny.config(corpus, train={'non_finite': 'skip', 'log_every': 4, 'keep_latest': 2})
  train.train(config, tmp_path)
  logged = (tmp_path / 'metrics.jsonl').read_text()
  shutil.rmtree(tmp_path / 'checkpoints' / str(STEPS))
  assert checkpoint.Checkpoints(tmp_path, read_only=True).steps()[-1] == 8  # past what was skipped

  train.train(config, tmp_path)

  first, again = (
    {
      row['step']: row['learning_rate']
      for row in map(json.loads, text.splitlines())
      if 'loss' in row
    }
    for text in (logged, (tmp_path / 'metrics.jsonl').read_text())
  )
  assert again == first


@pytest.mark.parametrize('non_finite', ['stop', 'skip'])
def test_a_run_that_diverges_stops(corpus, tmp_path, non_finite):
  config = tiny.config(
    corpus,
    optimizer={'learning_rate': 1e30, 'warmup_steps': 1},
    train={'log_every': 3, 'checkpoint_every': 12, 'non_finite': non_finite},
  )

  with pytest.raises(errors.UserError, match=r'loss=(nan|inf), gradient_norm=\w+ at step \d+'):
    train.train(config, tmp_path)

  assert checkpoint.Checkpoints(tmp_path).steps() == []


def test_what_cannot_be_written_of_a_step_is_said(corpus, poisoned, tmp_path):
  (tmp_path / 'non_finite').touch()

  with pytest.raises(errors.UserError, match="step 6 has .*'loss': nan.* cannot be written: "):
    train.train(tiny.config(corpus), tmp_path)


def test_another_word_for_what_to_do_is_refused(corpus):
  with pytest.raises(errors.UserError, match="non_finite='go on' must be 'stop' or 'skip'"):
    tiny.config(corpus, train={'non_finite': 'go on'})
