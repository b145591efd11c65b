"""Tests of `lex_fire/data/prepare.py`: parts, kills and restarts, several processes, command."""

import concurrent.futures
import fcntl
import gzip
import json
import multiprocessing
import os
import pathlib
import re
import resource
import signal
import sys
import threading
import time
import types
from concurrent.futures import process as process_lib

import numpy as np
import pytest
import tiny

from lex_fire import errors
from lex_fire.data import (
  batches,
  beam,
  corpora,
  prepare,
  prepare_beam,
  progress,
  reading,
  stream,
  tasks,
)
from lex_fire.data.spec import Spec

pytest.importorskip('seqio')

EOS = 1


def bytes_of(text):
  """The tokens of a text as bytes: UTF-8 plus 3, then EOS."""
  return [byte + 3 for byte in text.encode()] + [EOS]


@pytest.fixture
def globs(tmp_path):
  """Seven files of text in train and one in validation."""
  for number in range(7):
    (tmp_path / f'train-{number}.txt').write_text(f'text number {number}\n' * 9)
  (tmp_path / 'validation.txt').write_text('hé')
  return {split: f'{tmp_path}/{split}*.txt' for split in ('train', 'validation')}


def make_parts(monkeypatch, workers=1):
  """Makes a part of each file, and so many cores."""
  monkeypatch.setattr(reading, '_PART_BYTES', 1)
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: set(range(workers)))


@pytest.fixture
def a_part_a_file(monkeypatch):
  make_parts(monkeypatch)


def contents(directory):
  return {path.name: path.read_bytes() for path in directory.iterdir()}


def stamp(file):
  """What changes when a file is written again."""
  return file.stat().st_ino, file.stat().st_mtime_ns


def stamps(directory):
  """Those of each part that is finished."""
  finished = [path.name[1 : -len('.json')] for path in directory.glob('.part-*.npy.json')]
  return {name: stamp(directory / name) for name in finished}


def partial(directory):
  """The directory in which a stream that is not finished has its parts."""
  (path,) = directory.glob('.*.partial')
  return path


def all_tokens(path):
  return np.concatenate(stream.read(path).parts).tolist()


def expected_tokens(globs, split):
  return sum(map(bytes_of, corpora.text(globs).texts(split)), [])


# What a stream holds


def test_a_stream_is_the_documents_of_its_corpus_in_order(globs, tmp_path):
  path = prepare.prepare(Spec('text', files=globs), 'train', tmp_path / 'streams')

  manifest = stream.read(path).manifest
  fingerprint = corpora.text(globs).fingerprint(['train'])
  assert all_tokens(path) == expected_tokens(globs, 'train')
  assert path.name == f'text-train-bytes-{fingerprint}-format3'
  assert {key: manifest[key] for key in ('format', 'task', 'split', 'corpus', 'vocabulary')} == {
    'format': 3,
    'task': 'text',
    'split': 'train',
    'corpus': fingerprint,
    'vocabulary': {'name': 'bytes', 'size': 259, 'eos_id': 1},
  }
  assert (manifest['documents'], manifest['text_bytes']) == (7, 7 * 9 * 14)
  assert [file.name for file in (tmp_path / 'streams').iterdir()] == [path.name]


def test_parts_follow_one_another_and_change_nothing_of_the_tokens(globs, tmp_path, monkeypatch):
  one = prepare.prepare(Spec('text', files=globs), 'train', tmp_path / 'one')
  make_parts(monkeypatch)
  many = prepare.prepare(Spec('text', files=globs), 'train', tmp_path / 'many')

  assert len(stream.read(one).parts) == 1
  assert len(stream.read(many).parts) == 7
  assert all_tokens(many) == all_tokens(one)


def test_a_stream_of_another_format_is_another_stream(globs, tmp_path, monkeypatch):
  first = prepare.prepare(Spec('text', files=globs), 'validation', tmp_path / 'streams')
  monkeypatch.setattr(prepare, '_FORMAT', 4)
  second = prepare.prepare(Spec('text', files=globs), 'validation', tmp_path / 'streams')

  assert (first.name[-8:], second.name[-8:]) == ('-format3', '-format4')
  assert all_tokens(second) == all_tokens(first)


def test_a_prepared_stream_is_found_again_without_making_the_task(globs, tmp_path, monkeypatch):
  first = prepare.prepare(Spec('text', files=globs), 'train', tmp_path / 'streams')
  monkeypatch.delattr(tasks, 'get_task')

  assert prepare.prepare(Spec('text', files=globs), 'train', tmp_path / 'streams') == first


def test_a_changed_corpus_is_another_stream(globs, tmp_path):
  first = prepare.prepare(Spec('text', files=globs), 'validation', tmp_path / 'streams')
  (tmp_path / 'validation.txt').write_text('longer')
  second = prepare.prepare(Spec('text', files=globs), 'validation', tmp_path / 'streams')

  assert all_tokens(first) == bytes_of('hé')
  assert all_tokens(second) == bytes_of('longer')


def test_a_damaged_stream_is_refused(globs, tmp_path):
  path = prepare.prepare(Spec('text', files=globs), 'train', tmp_path / 'streams')
  (path / 'part-00000.npy').unlink()

  with pytest.raises(errors.UserError, match=f"'{path}/part-00000.npy' is unreadable"):
    prepare.prepare(Spec('text', files=globs), 'train', tmp_path / 'streams')


# Kills and restarts


def prepare_and_die(globs, directory, part):
  """Is killed after the first document of a part."""
  with pytest.MonkeyPatch.context() as patch:
    make_parts(patch)
    write_part = stream.write_part

    def cut(documents):
      yield next(documents)
      os.kill(os.getpid(), signal.SIGKILL)

    def write(work, number, size, documents):
      return write_part(work, number, size, cut(documents) if number == part else documents)

    patch.setattr(stream, 'write_part', write)
    prepare.prepare(Spec('text', files=globs), 'train', directory)


def test_a_killed_preparation_goes_on_where_it_was(globs, tmp_path, a_part_a_file):
  spec = Spec('text', files=globs)
  whole = prepare.prepare(spec, 'train', tmp_path / 'whole')

  killed = tiny.start(prepare_and_die, globs, tmp_path / 'killed', 4)
  killed.join()
  names = [path.name for path in (tmp_path / 'killed').iterdir() if path.is_dir()]
  before = stamps(partial(tmp_path / 'killed'))
  again = prepare.prepare(spec, 'train', tmp_path / 'killed')

  assert killed.exitcode == -signal.SIGKILL
  assert names == [f'.{whole.name}.partial']
  assert sorted(before) == [f'part-0000{part}.npy' for part in range(4)]
  assert {name: stamp(again / name) for name in before} == before
  assert contents(again) == contents(whole)
  assert [path.name for path in (tmp_path / 'killed').iterdir()] == [whole.name]


def prepare_by_two(globs, directory):
  with pytest.MonkeyPatch.context() as patch:
    make_parts(patch, workers=2)
    prepare.prepare(Spec('jsonl', files=globs), 'train', directory)


def is_running(number):
  """Whether there is such a process: one that has ended may wait for its parent to take note."""
  try:
    stat = pathlib.Path(f'/proc/{number}/stat').read_text()
  except OSError:
    return False
  return stat.rpartition(')')[2].split()[0] != 'Z'


def wait_until(condition, seconds=60):
  start = time.monotonic()
  while not (found := condition()):
    assert time.monotonic() - start < seconds
    time.sleep(0.005)
  return found


def test_workers_end_with_a_killed_parent_and_their_parts_are_those_of_one_process(
  tmp_path, monkeypatch
):
  """Files of 8 MB of text, so that there is something to interrupt."""
  for number in range(8):
    line = json.dumps({'text': f'{number} times ' * 1000}).encode() + b'\n'
    (tmp_path / f'{number}.jsonl.gz').write_bytes(gzip.compress(line * 1000, 1))
  globs = {'train': f'{tmp_path}/*.jsonl.gz'}

  def written_by():
    work = next((tmp_path / 'killed').glob('.*.partial'), None)
    if work is None or len(stamps(work)) < 2:
      return set()
    return {int(path.suffix[1:]) for path in work.glob('.part-0000[0-9].npy.[0-9]*')}

  parent = tiny.start(prepare_by_two, globs, tmp_path / 'killed')
  workers = wait_until(written_by)
  parent.kill()
  parent.join()
  wait_until(lambda: not any(map(is_running, workers)), seconds=10)
  before = stamps(partial(tmp_path / 'killed'))
  make_parts(monkeypatch)
  again = prepare.prepare(Spec('jsonl', files=globs), 'train', tmp_path / 'killed')
  whole = prepare.prepare(Spec('jsonl', files=globs), 'train', tmp_path / 'whole')

  assert parent.pid not in workers
  assert len(before) >= 2
  assert {name: stamp(again / name) for name in before} == before
  assert contents(again) == contents(whole)


def test_several_processes_write_the_files_that_one_writes(globs, tmp_path, monkeypatch, capfd):
  make_parts(monkeypatch)
  one = prepare.prepare(Spec('text', files=globs), 'train', tmp_path / 'one')
  make_parts(monkeypatch, workers=2)
  monkeypatch.setattr(progress, '_SECONDS_BETWEEN_REPORTS', 600.0)
  two = prepare.prepare(Spec('text', files=globs), 'train', tmp_path / 'two')

  assert len(stream.read(two).parts) == 7
  assert contents(two) == contents(one)
  assert capfd.readouterr() == ('', '')


def prepare_when_told(globs, directory, go):
  """Begins to write, and writes on when a file is there."""
  with pytest.MonkeyPatch.context() as patch:
    make_parts(patch)
    write_part = stream.write_part

    def write(*arguments):
      wait_until(go.exists)
      return write_part(*arguments)

    patch.setattr(stream, 'write_part', write)
    prepare.prepare(Spec('text', files=globs), 'train', directory)


def test_of_two_processes_at_once_one_works_and_the_other_waits(
  globs, tmp_path, a_part_a_file, monkeypatch, capfd
):
  directory, go = tmp_path / 'streams', tmp_path / 'go'
  first = tiny.start(prepare_when_told, globs, directory, go)
  wait_until(lambda: list(directory.glob('.*.partial')))
  monkeypatch.delattr(stream, 'write_part')

  threading.Timer(0.3, go.touch).start()
  path = prepare.prepare(Spec('text', files=globs), 'train', directory)
  first.join()

  assert first.exitcode == 0
  assert all_tokens(path) == expected_tokens(globs, 'train')
  assert capfd.readouterr().err == f'{path.name}: another process prepares it; waiting\n'
  assert [file.name for file in directory.iterdir()] == [path.name]


def test_a_worker_that_imports_a_script_which_prepares_says_so_and_does_not_wait(
  globs, tmp_path, monkeypatch
):
  """For its parent, which waits for it: both would for ever."""
  parent = types.SimpleNamespace(pid=12345)
  monkeypatch.setattr(multiprocessing, 'parent_process', lambda: parent)
  what = Spec('text', files=globs)
  name = prepare.name_of(prepare.identity_of(what, 'train'))
  with (tmp_path / f'.{name}.lock').open('w') as of_parent:
    print(parent.pid, file=of_parent, flush=True)
    fcntl.flock(of_parent, fcntl.LOCK_EX)

    with pytest.raises(errors.UserError, match="below if __name__ == '__main__':"):
      prepare.prepare(what, 'train', tmp_path)


def test_a_full_disk_is_said_in_a_sentence_and_loses_no_finished_part(
  globs, tmp_path, a_part_a_file
):
  """The limit on the size of a file stands for it."""
  last = corpora.text(globs).files['train'][-1]
  last.path.write_text('x' * 2_000_000)
  directory = tmp_path / 'streams'
  before = resource.getrlimit(resource.RLIMIT_FSIZE)

  resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
  try:
    with pytest.raises(errors.UserError, match=f"in '{directory}/.*': File too large; make room"):
      prepare.prepare(Spec('text', files=globs), 'train', directory)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  finished = stamps(partial(directory))
  left = list(partial(directory).glob('.part*.npy.[0-9]*'))
  path = prepare.prepare(Spec('text', files=globs), 'train', directory)

  assert left == []
  assert finished
  assert {name: stamp(path / name) for name in finished} == finished
  assert all_tokens(path) == expected_tokens(globs, 'train')


def test_a_worker_that_is_ended_from_outside_is_said(globs, tmp_path, monkeypatch):
  make_parts(monkeypatch, workers=2)

  def fail(*_):
    raise process_lib.BrokenProcessPool

  monkeypatch.setattr(concurrent.futures.ProcessPoolExecutor, 'map', fail)

  with pytest.raises(errors.UserError, match='one of 2 worker processes was ended'):
    prepare.prepare(Spec('text', files=globs), 'train', tmp_path / 'streams')


def test_a_mistake_in_a_file_is_said_by_its_name_and_loses_no_finished_part(
  tmp_path, a_part_a_file
):
  for number in range(3):
    (tmp_path / f'{number}.jsonl').write_text('{"text": "a"}\n{"text": "b"}\n')
  spec = Spec('jsonl', files={'train': f'{tmp_path}/*.jsonl'})
  last = corpora.jsonl(spec.files).files['train'][-1].path
  last.write_text('{"text": "a"}\n{"text": b}\n')

  with pytest.raises(errors.UserError, match=f"'{last}' line 2 is not JSON"):
    prepare.prepare(spec, 'train', tmp_path / 'streams')

  assert len(stamps(partial(tmp_path / 'streams'))) == 2


def test_a_directory_that_cannot_be_made_is_refused(globs, tmp_path):
  (tmp_path / 'file').touch()

  with pytest.raises(errors.UserError, match=f"cannot write in '{tmp_path}/file'"):
    prepare.prepare(Spec('text', files=globs), 'train', tmp_path / 'file')


def test_a_stream_that_another_machine_has_finished_meanwhile_is_left_as_it_is(globs, tmp_path):
  """A lock may not reach beyond a machine: what the other one wrote is the same."""
  spec = Spec('text', files=globs)
  other = prepare.prepare(spec, 'train', tmp_path / 'other')
  before = stamp(other / 'manifest.json')

  def write_parts(what, identity, work):
    os.rename(other, tmp_path / 'streams' / other.name)
    return []

  path = prepare.prepare(spec, 'train', tmp_path / 'streams', write_parts)

  assert stamp(path / 'manifest.json') == before
  assert all_tokens(path) == expected_tokens(globs, 'train')


def test_what_is_no_matter_of_writing_is_not_said_to_be(globs, tmp_path):
  def fail(*_):
    raise OSError('no connection')

  with pytest.raises(OSError, match='^no connection$'):
    prepare.prepare(Spec('text', files=globs), 'train', tmp_path / 'streams', fail)


def test_a_split_of_no_document_is_refused(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"text": "a"}\n')
  spec = Spec('jsonl', files={'train': f'{tmp_path}/*.jsonl'})

  with pytest.raises(errors.UserError, match="no split 'test'; it has: train"):
    prepare.prepare(spec, 'test', tmp_path / 'streams')


# Progress and the command


def test_preparation_reports_progress_only_when_it_lasts(
  globs, tmp_path, a_part_a_file, monkeypatch, capfd
):
  prepare.prepare(Spec('text', files=globs), 'train', tmp_path / 'quick')
  quiet = capfd.readouterr().err
  monkeypatch.setattr(progress, '_SECONDS_BETWEEN_REPORTS', 0.001)
  monkeypatch.setattr(progress, '_SECONDS_BETWEEN_LINES', 0.001)
  write_part = stream.write_part
  monkeypatch.setattr(stream, 'write_part', lambda *a: (time.sleep(0.02), write_part(*a))[1])
  prepare.prepare(Spec('text', files=globs), 'train', tmp_path / 'slow')
  loud = capfd.readouterr().err

  assert quiet == ''
  last = loud.splitlines()[-1]
  assert ' documents, part ' in last
  assert ' of 7, ' in last
  assert ' tokens/s, ' in last
  assert last.endswith(' s left  ')


def test_progress_counts_by_parts_where_the_documents_are_not_known():
  watch = progress.Progress('s', num_parts=10, num_documents=None)
  known = progress.Progress('s', num_parts=10, num_documents=200)
  few = progress.Progress('s', num_parts=10, num_documents=99)  # some give several

  line = watch._line((100, 5000, 3), (0, 1000, 1), seconds=4.0)
  by_documents = known._line((100, 5000, 3), (0, 1000, 1), seconds=4.0)

  assert line == 's: 100 documents, part 3 of 10, 1,000 tokens/s, 14 s left  '
  assert by_documents == 's: 100 documents, part 3 of 10, 1,000 tokens/s, 4 s left  '
  assert few._line((100, 5000, 3), (0, 1000, 1), seconds=4.0) == line


def arguments(globs, directory, split='validation'):
  files = [f'--{split}_files={pattern}' for split, pattern in globs.items()]
  return ['--task=text', f'--split={split}', f'--directory={directory}', *files]


def test_the_command_prints_the_directory_and_what_is_in_it(globs, tmp_path, capsys):
  status = prepare.main(arguments(globs, tmp_path / 'streams'))

  out, err = capsys.readouterr()
  assert status == 0
  assert json.loads((pathlib.Path(out.strip()) / 'manifest.json').read_text())['tokens'] == 4
  assert err == (
    '1 documents, 4 tokens, 1 parts, all hashes right\n'
    'windows: 0 of 512, 0 of 2,048, 0 of 8,192 tokens\n'
  )


def test_the_command_counts_windows_as_training_does(tmp_path, a_part_a_file, capsys):
  for name in 'ab':
    (tmp_path / f'{name}.txt').write_text(name * 8191)  # and EOS
  globs = {'train': f'{tmp_path}/*.txt'}

  assert prepare.main(arguments(globs, tmp_path / 'streams', 'train')) == 0

  out, err = capsys.readouterr()
  # A window takes one token more: of each part there are 15, 3 and none.
  assert err.endswith(
    '2 parts, all hashes right\nwindows: 30 of 512, 6 of 2,048, 0 of 8,192 tokens\n'
  )
  parts = stream.read(pathlib.Path(out.strip())).parts
  for length, expected in ((512, 30), (2048, 6)):
    windows = batches.Windows(parts, length, eos_id=1, isolate_documents=False)
    assert windows.num_windows == expected


def test_no_windows_are_counted_of_questions(tmp_path, capsys):
  question = stream.Document(np.array([5, 6, 7, EOS]), 1, ends=(1, 2))
  (tmp_path / 'work').mkdir()
  part = stream.write_part(tmp_path / 'work', 0, 259, [question])
  stream.finish(tmp_path / 'work', tmp_path / 'questions', {}, [part])

  prepare.report(tmp_path / 'questions')

  assert capsys.readouterr().err.endswith('1 parts, all hashes right\n')


def test_the_command_compares_the_hashes_of_a_stream_that_is_there(globs, tmp_path, capsys):
  path = prepare.prepare(Spec('text', files=globs), 'validation', tmp_path / 'streams')
  content = (path / 'part-00000.npy').read_bytes()
  (path / 'part-00000.npy').write_bytes(content[:-1] + b'\7')

  status = prepare.main(arguments(globs, tmp_path / 'streams'))

  assert status == 2
  assert "part-00000.npy' has other tokens than its manifest says" in capsys.readouterr().err


def test_the_command_writes_no_bucket_and_knows_a_home(globs, tmp_path, capsys, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))

  assert prepare.main(arguments(globs, 'gs://bucket/streams')) == 2
  assert prepare.main(arguments(globs, '~/streams')) == 0

  out, err = capsys.readouterr()
  assert "--directory='gs://bucket/streams' must be a directory of this machine" in err
  assert pathlib.Path(out.strip()).parent == tmp_path / 'streams'


def test_the_command_reports_a_mistake_in_one_sentence(tmp_path, capsys):
  status = prepare.main(arguments({}, tmp_path))

  assert status == 2
  assert capsys.readouterr().err == (
    "error: task 'text' has no files of --split=validation; give --train_files=GLOB or "
    '--validation_files=GLOB, and the split of that name\n'
  )


def test_a_corpus_without_files_is_refused(tmp_path):
  with pytest.raises(errors.UserError, match="corpus 'text' needs a glob .* not files=None"):
    prepare.prepare(Spec('text'), 'train', tmp_path)


def test_the_command_refuses_a_module_that_is_not_there(globs, tmp_path, capsys):
  status = prepare.main([*arguments(globs, tmp_path / 'streams'), '--module_import=no_such'])

  assert status == 2
  assert capsys.readouterr().err.startswith("error: cannot import module 'no_such': ")


def test_an_interrupted_command_says_what_to_do(
  globs, tmp_path, a_part_a_file, monkeypatch, capsys
):
  def interrupt(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(stream, 'write_part', interrupt)

  status = prepare.main(arguments(globs, tmp_path / 'streams'))

  assert status == 130
  expected = 'interrupted; the same command goes on with the parts that are missing\n'
  assert capsys.readouterr().err == expected


def test_without_beam_its_command_says_what_to_install(globs, tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, 'apache_beam', None)
  beam.load.cache_clear()

  status = prepare_beam.main([*arguments(globs, tmp_path / 'streams'), '--runner=FnApiRunner'])

  assert status == 2
  expected = (
    r'error: prepare_beam needs Apache Beam \(.*apache_beam.*\); pip install -r .*-beam.txt'
  )
  assert re.match(expected, capsys.readouterr().err)
