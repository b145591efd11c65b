"""Tests `../lex_fire/dry_run.py`: what a run would meet, without a trace of it."""

import functools
import json
import re
import shutil

import numpy as np
import pytest
import tiny

from lex_fire import compile as compile_lib
from lex_fire import dry_run, errors, feed, topologies, train

ALL_IS_WELL = 'dry run: all is well, and nothing was written'


@pytest.fixture(scope='module', autouse=True)
def _steps_of_equal_configs_compile_once():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train, 'Program', functools.cache(train.Program))
    patch.setattr(dry_run, '_compile', functools.cache(dry_run._compile))
    yield


def files(directory):
  """Returns all that is to be seen of the files of a directory."""
  return {
    path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
    for path in [directory, *directory.rglob('*')]
  }


def losses(workdir):
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return {row['step']: row['loss'] for row in rows if 'loss' in row}


def said(out, step):
  """Returns the loss that a dry run says of a step."""
  (line,) = (line for line in out.splitlines() if line.startswith(f'step {step}: '))
  return float(re.match(rf'step {step}: loss ([\d.]+), gradient norm [\d.]+, in [\d.]+ s', line)[1])


def test_without_a_workdir_it_reports_on_memory_and_takes_the_first_step(corpus, fire_run, capsys):
  dry_run.dry_run(tiny.config(corpus))

  out = capsys.readouterr().out
  assert said(out, 1) == pytest.approx(losses(fire_run[0])[1], abs=1e-3)
  assert '8 of cpu (here): replica=8' in out
  assert re.search(r'GiB a chip +parameters .* total  of \?\ntraining step +0\.00 .*0\.00\n', out)
  assert 'attention: reference' in out
  assert out.splitlines()[-1].startswith(f'{ALL_IS_WELL} (prepared data are in ')


def test_a_workdir_that_is_not_there_is_not_made(corpus, tmp_path, capsys):
  dry_run.dry_run(tiny.config(corpus), tmp_path / 'run')

  assert not list(tmp_path.iterdir())
  assert f'{ALL_IS_WELL} into {tmp_path / "run"}' in capsys.readouterr().out


def test_of_a_run_that_has_begun_it_takes_the_next_step_and_leaves_all_as_it_was(
  corpus, fire_run, tmp_path, capsys
):
  workdir = shutil.copytree(fire_run[0], tmp_path / 'run')
  shutil.rmtree(workdir / 'checkpoints' / '12')
  before = files(workdir)

  dry_run.dry_run(tiny.config(corpus), workdir)

  assert files(workdir) == before
  assert said(capsys.readouterr().out, 9) == pytest.approx(losses(workdir)[9], abs=1e-3)


def test_a_run_that_is_done_has_no_next_step(corpus, fire_run, capsys):
  dry_run.dry_run(tiny.config(corpus), fire_run[0])

  assert f'{fire_run[0]}: done already, 12 steps' in capsys.readouterr().out


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(
  corpus, fire_run, tmp_path, capsys
):
  workdir = shutil.copytree(fire_run[0], tmp_path / 'run')
  shutil.rmtree(workdir / 'checkpoints')
  (workdir / 'checkpoints').mkdir()

  dry_run.dry_run(tiny.config(corpus), workdir)

  assert said(capsys.readouterr().out, 1) == pytest.approx(losses(workdir)[1], abs=1e-3)


def test_another_config_or_other_data_than_the_workdirs_are_refused(corpus, fire_run, tmp_path):
  other = tiny.config(corpus, optimizer={'weight_decay': 0.5})
  with pytest.raises(errors.UserError, match=r'optimizer.weight_decay=0.1 \(asked: 0.5\)'):
    dry_run.dry_run(other, fire_run[0])

  workdir = shutil.copytree(fire_run[0], tmp_path / 'run')
  (workdir / 'data.json').write_text('{"train": "of others"}')
  with pytest.raises(errors.UserError, match='the train data have changed .*then of others'):
    dry_run.dry_run(tiny.config(corpus), workdir)


def test_a_step_that_does_not_fit_ends_with_status_3_and_its_excess(
  corpus, monkeypatch, tmp_path, capsys
):
  here = topologies.here()._replace(memory_bytes=2**10)
  monkeypatch.setattr(dry_run, '_compile', dry_run._compile.__wrapped__)
  monkeypatch.setattr(topologies, 'here', lambda: here)

  with pytest.raises(SystemExit) as ended:
    dry_run.dry_run(tiny.config(corpus), tmp_path / 'run')

  assert ended.value.code == 3
  captured = capsys.readouterr()
  assert 'does not fit' in captured.out
  assert captured.err.startswith('error: the training step needs 0.00 GiB a chip, which is ')
  assert 'step 1' not in captured.out
  assert not list(tmp_path.iterdir())


def test_a_loss_that_is_no_number_is_refused(corpus, monkeypatch):
  train_batch = feed.Data.train_batch

  def poisoned(data, step):
    batch = train_batch(data, step)
    batch['loss_weights_BL'][0, 0] = np.nan
    return batch

  monkeypatch.setattr(feed.Data, 'train_batch', poisoned)

  with pytest.raises(errors.UserError, match='step 1: loss nan, .* which is no number; look at'):
    dry_run.dry_run(tiny.config(corpus))


def test_devices_that_say_their_memory_are_held_to_it(monkeypatch):
  class Device:
    def memory_stats(self):
      return {'bytes_limit': 2**34}

  monkeypatch.setattr(compile_lib.jax, 'local_devices', lambda: [Device()])

  assert topologies.here().memory_bytes == 2**34


def test_the_command_refuses_a_damaged_checkpoint_and_leaves_it_there(corpus, fire_run, tmp_path):
  workdir = shutil.copytree(fire_run[0], tmp_path / 'run')
  for file in (workdir / 'checkpoints' / '12' / 'params' / 'd').iterdir():
    file.write_bytes(file.read_bytes()[:100])
  before = files(workdir)

  # In a process of its own: Orbax leaves the other reads of a failed restore behind.
  command = ['--dry_run', f'--workdir={workdir}', *tiny.flags(tiny.values(corpus))]
  status, _, stderr = tiny.run_command('lex_fire.train', *command)

  assert status == 2
  assert "checkpoints/12' is damaged: " in stderr
  assert files(workdir) == before
