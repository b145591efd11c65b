"""Tests of `lex_fire/storage.py`, and of a run whose workdir is in a bucket."""

import functools
import importlib.util
import json
import os
import pathlib
import resource
import signal
import time

import bucket
import pytest
import tiny

from lex_fire import errors, events, storage, train


@pytest.fixture
def served(monkeypatch):
  """A bucket that clients of this process find in the place of Google's."""
  with bucket.Bucket() as server:
    monkeypatch.setenv('STORAGE_EMULATOR_HOST', server.address)
    yield server


@pytest.fixture
def place(served):
  # A file system of fsspec lives as long as the process, and with it the address that it knows.
  import gcsfs

  gcsfs.GCSFileSystem.clear_instance_cache()
  yield storage.path(f'gs://{bucket.NAME}/runs')
  gcsfs.GCSFileSystem.clear_instance_cache()


@pytest.fixture(params=['directory', 'bucket'])
def folder(request, tmp_path):
  """A directory, or a place in a bucket."""
  return tmp_path if request.param == 'directory' else request.getfixturevalue('place')


def test_a_file_is_written_read_and_appended_to_alike(folder):
  path = folder / 'metrics.jsonl'

  storage.append(path, 'one\n')
  storage.append(path, 'two\n')
  storage.write(folder / 'other', b'\0')
  storage.write(folder / 'other', 'another')

  assert path.read_text() == 'one\ntwo\n'
  assert (folder / 'other').read_text() == 'another'
  assert sorted(found.name for found in folder.iterdir()) == ['metrics.jsonl', 'other']


def test_what_cannot_be_written_leaves_what_was_there(folder, monkeypatch):
  path = folder / 'config.json'
  storage.write(path, 'old')

  def fail(*arguments, **options):
    raise (OSError(28, 'No space left on device') if folder == path.parent else ValueError)

  monkeypatch.setattr(type(path), 'write_bytes', fail)
  with pytest.raises(OSError, match='No space left') as raised:
    storage.write(path, 'new')

  assert raised.value.strerror
  assert path.read_text() == 'old'
  assert [found.name for found in folder.iterdir()] == ['config.json']


def test_what_cannot_be_appended_whole_is_taken_back(tmp_path):
  """A file may have as many bytes as the process lets it."""
  path, limits = tmp_path / 'metrics.jsonl', resource.getrlimit(resource.RLIMIT_FSIZE)
  storage.append(path, 'one\n')
  ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

  resource.setrlimit(resource.RLIMIT_FSIZE, (6, limits[1]))
  try:
    with pytest.raises(OSError, match='File too large'):
      storage.append(path, 'two\n')
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, ignored)

  assert path.read_text() == 'one\n'
  storage.append(path, 'two\n')
  assert path.read_text() == 'one\ntwo\n'


def test_a_bucket_that_refuses_what_is_written_is_an_error_of_the_system(served, place):
  begun = events.Events(place, 0)
  begun.write(1, {'loss': 1.0})
  served.is_read_only = True

  for refused in (
    begun.flush,
    lambda: events.Events(place, 1),
    lambda: storage.append(place / 'metrics.jsonl', 'one'),
  ):
    with pytest.raises(OSError, match='over its quota'):
      refused()
  served.is_read_only = False
  begun.flush()

  (name,) = (name for name in served.objects if 'events.out' in name)
  assert b'loss' in served.objects[name][1]


def test_runs_share_the_deepest_directory_that_has_them_all():
  home, runs = pathlib.Path('/runs'), storage.path('gs://bucket/runs')

  assert storage.common([home / 'a' / 'fire', home / 'a' / 'rope']) == home / 'a'
  assert storage.common([runs / 'fire', runs / 'rope']) == runs
  assert storage.common([runs / 'fire']) == runs / 'fire'


@pytest.mark.parametrize('other', ['/runs/rope', 'gs://other/rope'])
def test_runs_in_no_one_place_need_to_be_told_where_to_write(other):
  with pytest.raises(errors.UserError, match=f'gs://bucket/fire, {other} are in no one place'):
    storage.common([storage.path('gs://bucket/fire'), storage.path(other)])


def test_another_kind_of_storage_is_refused():
  with pytest.raises(errors.UserError, match="'s3://bucket/run' must be a directory, or gs://"):
    storage.path('s3://bucket/run')


@pytest.mark.parametrize('read', [storage.path, functools.partial(storage.local, name='--runs')])
def test_a_home_of_nobody_is_refused(read):
  with pytest.raises(errors.UserError, match="'~no-such-user/run': there is no such user"):
    read('~no-such-user/run')


def test_what_has_to_be_a_directory_is_none_in_a_bucket(corpus):
  config = tiny.config({**corpus, 'directory': 'gs://bucket/prepared'})

  with pytest.raises(errors.UserError, match="data.directory='gs://bucket/prepared' must be a dir"):
    train.feed.Data(config)


def test_a_bucket_without_its_client_says_what_to_install(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)

  with pytest.raises(errors.UserError, match='pip install -r requirements-gcs.txt first'):
    storage.path('gs://bucket/run')


# A run


def run_at(address, module, arguments, out, err):
  """Runs a command that finds the bucket of this machine in the place of Google's."""
  os.environ |= {'STORAGE_EMULATOR_HOST': address, 'TENSORSTORE_GCS_HTTP_URL': address}
  tiny.run(module, arguments, out, err)


def start_at(served, directory, module, *arguments):
  paths = [directory / name for name in ('out', 'err')]
  for path in paths:
    path.write_text('')
  return tiny.start(run_at, served.address, module, arguments, *map(str, paths))


def ended(process, directory):
  process.join()
  assert process.exitcode == 0, (directory / 'err').read_text()
  process.close()
  return (directory / 'out').read_text()


def test_a_run_in_a_bucket_is_killed_damaged_goes_on_and_is_evaluated(
  served, corpus, fire_run, tmp_path
):
  workdir = f'gs://{bucket.NAME}/runs/fire'
  arguments = [f'--workdir={workdir}', *tiny.flags(tiny.values(corpus))]
  begin = functools.partial(start_at, served, tmp_path, 'lex_fire.train', *arguments)

  killed = begin()
  deadline = time.monotonic() + 120
  while 'runs/fire/checkpoints/4/commit_success.txt' not in served.objects:
    assert time.monotonic() < deadline and killed.is_alive(), (tmp_path / 'err').read_text()
    time.sleep(0.01)
  killed.kill()
  killed.join()
  said = ended(begin(), tmp_path)
  manifest = next(name for name in served.objects if name.endswith('12/params/manifest.ocdbt'))
  served.put(manifest, b'no manifest')
  warned = ended(begin(), tmp_path)
  arguments = [f'--workdir={workdir}', '--lengths=32,64', '--max_tokens=512']
  name = 'same_tokens_lengths-32-64_tokens-512.json'
  told = ended(start_at(served, tmp_path, 'lex_fire.evaluate', *arguments), tmp_path)

  assert f'{workdir}: fire, ' in said
  assert f"checkpoint '{workdir}/checkpoints/12' is damaged: " in warned
  assert f'{workdir}: fire, 6,164 parameters, steps 8 to 12' in warned
  assert any(name.startswith('runs/fire/damaged/12-') for name in served.objects)
  found, expected = (
    [{name: row[name] for name in ('step', 'loss') if name in row} for row in map(json.loads, rows)]
    for rows in (
      served.objects['runs/fire/metrics.jsonl'][1].splitlines(),
      (fire_run[0] / 'metrics.jsonl').read_text().splitlines(),
    )
  )
  assert found == expected
  assert any('runs/fire/events.out' in name for name in served.objects)
  assert f'written: {workdir}/evaluations/{name}' in told
  (report,) = json.loads(served.objects[f'runs/fire/evaluations/{name}'][1])['runs']
  assert report['checkpoint_step'] == 12
