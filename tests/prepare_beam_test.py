"""Tests of `lex_fire/data/prepare_beam.py` and `beam.py`: the same stream by Apache Beam's runner.

`make test-beam` runs them, in an environment of their own.
"""

import json
import os
import pathlib
import runpy
import signal
import sys

import pytest
import tiny

from lex_fire import errors
from lex_fire.data import beam as beam_lib
from lex_fire.data import lazy, prepare, prepare_beam, reading, stream
from lex_fire.data.spec import Spec

beam = pytest.importorskip('apache_beam', reason='needs Apache Beam: make test-beam')
from apache_beam.io import localfilesystem  # noqa: E402

# TFDS calls it, and the protobuf that Beam wants, which is older than ours, warns of it.
pytestmark = pytest.mark.filterwarnings(r'ignore:label\(\) is deprecated:DeprecationWarning')

HERE = ['--runner=FnApiRunner']  # DirectRunner would first look for a program to download
PROCESSES = [*HERE, '--direct_running_mode=multi_processing', '--direct_num_workers=1']


@pytest.fixture
def jsonl(tmp_path, monkeypatch):
  """Five files of JSON lines, a part each."""
  monkeypatch.setattr(reading, '_PART_BYTES', 1)
  for number in range(5):
    lines = [json.dumps({'text': f'{number}: {line} é'}) + '\n' for line in range(3)]
    (tmp_path / f'{number}.jsonl').write_text(''.join(lines))
  return Spec('jsonl', files={'train': f'{tmp_path}/*.jsonl'})


@pytest.fixture(scope='session')
def c4(tmp_path_factory):
  """C4 as TFDS has it, in three files."""
  import tensorflow as tf
  import tensorflow_datasets as tfds

  directory = tmp_path_factory.mktemp('c4')
  texts = {'text': [f'Document {number}: naïve' for number in range(8)]}
  tfds.dataset_builders.store_as_tfds_dataset(
    name='c4',
    config='en',
    version='3.0.1',
    data_dir=directory,
    split_datasets={'train': tf.data.Dataset.from_tensor_slices(texts)},
    features=tfds.features.FeaturesDict({'text': tfds.features.Text()}),
    download_config=tfds.download.DownloadConfig(num_shards=3),
    disable_shuffling=True,
  )
  return Spec('c4', tfds_directory=str(directory))


@pytest.fixture
def qmsum(scrolls_directory):
  """Questions, whose streams have the ends of answers too."""
  return Spec('scrolls_qmsum', tfds_directory=str(scrolls_directory))


def contents(directory):
  return {path.name: path.read_bytes() for path in directory.iterdir()}


def expected(spec, directory, monkeypatch):
  """The stream that `prepare` writes."""
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {0})
  return prepare.prepare(spec, 'train', directory / 'expected')


def stamps(directory, records):
  """What changes when one of the parts that have these records is written again."""
  names = [record.name[1 : -len('.json')] for record in records]
  return {
    name: ((directory / name).stat().st_ino, (directory / name).stat().st_mtime_ns)
    for name in names
  }


# The stream is the same


@pytest.mark.parametrize(('name', 'parts'), [('jsonl', 5), ('c4', 3), ('qmsum', 1)])
def test_the_stream_is_that_of_prepare_file_by_file(name, parts, request, tmp_path, monkeypatch):
  spec = request.getfixturevalue(name)
  whole = expected(spec, tmp_path, monkeypatch)

  path = pathlib.Path(prepare_beam.prepare(spec, 'train', str(tmp_path / 'streams'), HERE))

  assert path == tmp_path / 'streams' / whole.name
  assert contents(path) == contents(whole)
  assert len(stream.read(path).parts) == parts
  assert [file.name for file in path.parent.iterdir()] == [whole.name]
  assert prepare.prepare(spec, 'train', path.parent) == path


def test_workers_in_other_processes_write_the_same(c4, tmp_path, monkeypatch, capsys):
  whole = expected(c4, tmp_path, monkeypatch)
  monkeypatch.delattr(prepare, 'write_part')  # here

  path = prepare_beam.prepare(c4, 'train', str(tmp_path / 'streams'), PROCESSES)

  assert contents(pathlib.Path(path)) == contents(whole)
  assert 'wrote 8 documents, 152 tokens, 3 parts in ' in capsys.readouterr().err


def arguments(spec, directory):
  files = f'--train_files={spec.files["train"]}'
  return ['--task=jsonl', '--split=train', files, f'--directory={directory}', *HERE]


def command_and_die(spec, directory):
  """Runs the command, which is killed while it writes the fourth part."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(reading, '_PART_BYTES', 1)
    write_part, begun = stream.write_part, []

    def write(work, number, size, documents):
      begun.append(number)
      if len(begun) == 4:
        next(documents)
        os.kill(os.getpid(), signal.SIGKILL)
      return write_part(work, number, size, documents)

    patch.setattr(stream, 'write_part', write)
    patch.setattr(sys, 'argv', ['prepare_beam', *arguments(spec, directory)])
    patch.delitem(sys.modules, 'lex_fire.data.prepare_beam')
    runpy.run_module('lex_fire.data.prepare_beam', run_name='__main__')


def test_a_killed_pipeline_goes_on_where_it_was(jsonl, tmp_path, monkeypatch, capsys):
  whole = expected(jsonl, tmp_path, monkeypatch)

  killed = tiny.start(command_and_die, jsonl, tmp_path / 'streams')
  killed.join()
  (work,) = (tmp_path / 'streams').glob('.*.partial')
  records = list(work.glob('.part-*.npy.json'))
  before = stamps(work, records)
  again = pathlib.Path(prepare_beam.prepare(jsonl, 'train', str(tmp_path / 'streams'), HERE))

  assert killed.exitcode == -signal.SIGKILL
  assert len(records) == 3
  assert stamps(again, records) == before
  assert contents(again) == contents(whole)
  assert capsys.readouterr().err.startswith('wrote 6 documents, 48 tokens, 2 parts in ')
  assert prepare_beam.main(arguments(jsonl, tmp_path / 'streams')) == 0
  last = (
    '15 documents, 120 tokens, 5 parts, all hashes right\n'
    'windows: 0 of 512, 0 of 2,048, 0 of 8,192 tokens\n'
  )
  assert capsys.readouterr() == (f'{again}\n', last)


def test_prepare_goes_on_with_what_a_pipeline_has_left(jsonl, tmp_path, monkeypatch):
  whole = expected(jsonl, tmp_path, monkeypatch)
  with monkeypatch.context() as patch:
    patch.setattr(stream, 'finish', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
      prepare_beam.prepare(jsonl, 'train', str(tmp_path / 'streams'), HERE)

  monkeypatch.delattr(reading, 'documents')
  path = prepare.prepare(jsonl, 'train', tmp_path / 'streams')

  assert contents(path) == contents(whole)


# At a URL


class Bucket(localfilesystem.LocalFileSystem):
  """A file system of Beam's with URLs, bucket:///PATH, and without a way to move a directory."""

  @classmethod
  def scheme(cls):
    return 'bucket'

  def _path_open(self, path, *arguments, **options):
    return super()._path_open(_path(path), *arguments, **options)

  def create(self, path, *arguments, **options):
    return super().create(_path(path), *arguments, **options)

  def exists(self, path):
    return os.path.exists(_path(path))

  def rename(self, source_file_names, destination_file_names):
    assert not any(os.path.isdir(_path(name)) for name in source_file_names)
    super().rename(map_paths(source_file_names), map_paths(destination_file_names))

  def delete(self, paths):
    super().delete(map_paths(paths))


def _path(url):
  return url.removeprefix('bucket://')


def map_paths(urls):
  return list(map(_path, urls))


def test_at_a_url_a_stream_has_its_manifest_when_it_is_whole(jsonl, tmp_path, monkeypatch, capsys):
  whole = expected(jsonl, tmp_path, monkeypatch)
  place = tmp_path / 'streams' / whole.name
  put, url = beam_lib.put, f'bucket://{tmp_path}/streams'

  def fail(source, directory, name):
    if name == stream.MANIFEST:
      raise KeyboardInterrupt
    put(source, directory, name)

  with monkeypatch.context() as patch:
    patch.setattr(beam_lib, 'put', fail)
    with pytest.raises(KeyboardInterrupt):
      prepare_beam.prepare(jsonl, 'train', url, HERE)
  left = contents(place)
  found = prepare_beam.prepare(jsonl, 'train', url, HERE)
  monkeypatch.setattr(beam, 'Pipeline', None)
  again = prepare_beam.prepare(jsonl, 'train', url, HERE)

  assert stream.MANIFEST not in left
  assert again == found == f'bucket://{place}'
  assert contents(place) == contents(whole)
  assert prepare.prepare(jsonl, 'train', tmp_path / 'streams') == place
  first, second = capsys.readouterr().err.splitlines()
  assert first.startswith('wrote 15 documents, 120 tokens, 5 parts in ')
  assert second.startswith('wrote 0 documents, 0 tokens, 0 parts in ')


def test_the_command_prints_a_url(jsonl, tmp_path, capsys):
  status = prepare_beam.main(arguments(jsonl, f'bucket://{tmp_path}/streams'))

  assert status == 0
  assert capsys.readouterr().out.startswith(f'bucket://{tmp_path}/streams/jsonl-train-bytes-')


def test_a_url_without_a_file_system_is_refused(jsonl):
  with pytest.raises(errors.UserError, match="no file system for 'nowhere://a' is installed"):
    prepare_beam.prepare(jsonl, 'train', 'nowhere://a', HERE)


def test_a_url_that_cannot_be_written_at_is_refused(jsonl, tmp_path):
  (tmp_path / 'file').touch()

  with pytest.raises(errors.UserError, match=f"cannot write in 'bucket://{tmp_path}/file/.*': Not"):
    prepare_beam.prepare(jsonl, 'train', f'bucket://{tmp_path}/file', HERE)


# Mistakes


def test_a_damaged_line_is_one_line_of_error_and_loses_no_part(jsonl, tmp_path, capfd):
  (tmp_path / '3.jsonl').write_text('{"text": "a"}\n{"text": b}\n')

  status = prepare_beam.main(arguments(jsonl, tmp_path / 'streams'))

  assert status == 2
  message = f"error: '{tmp_path}/3.jsonl' line 2 is not JSON: Expecting value at column 10; correct"
  assert capfd.readouterr().err == f'{message} or remove the line\n'
  assert not list((tmp_path / 'streams').glob('jsonl*'))


def test_a_mistake_is_found_in_what_a_worker_far_away_raised():
  traceback = 'Traceback:\n  File "a.py"\nlex_fire.errors.UserError: \'a\' is [bad]; correct it'

  for ending in ('', '\n', " [while running 'write a part-ptransform-45']\n\nTraceback"):
    with pytest.raises(errors.UserError, match=r"^'a' is \[bad\]; correct it$"):
      with beam_lib.mistakes():
        raise RuntimeError(traceback + ending)


def test_what_is_no_mistake_of_the_user_keeps_its_traceback(jsonl, tmp_path, monkeypatch):
  def fail(*_):
    raise ZeroDivisionError('a defect')

  monkeypatch.setattr(reading, 'documents', fail)

  with pytest.raises(ZeroDivisionError, match='a defect'):
    prepare_beam.prepare(jsonl, 'train', str(tmp_path / 'streams'), HERE)


def test_a_worker_that_sees_other_files_is_refused(jsonl, tmp_path, monkeypatch):
  identity_of, seen = prepare.identity_of, []

  def other(what, split):
    seen.append(split)
    identity = identity_of(what, split)
    return identity if len(seen) == 1 else identity | {'corpus': 'files-0123'}

  monkeypatch.setattr(prepare, 'identity_of', other)

  with pytest.raises(errors.UserError, match="corpus='files-0123' for task 'jsonl', not 'files-"):
    prepare_beam.prepare(jsonl, 'train', str(tmp_path / 'streams'), HERE)


def test_an_unknown_task_is_refused(tmp_path):
  with pytest.raises(errors.UserError, match="unknown task 'enwik9'; known: stdlib"):
    prepare_beam.prepare(Spec('enwik9'), 'train', str(tmp_path), HERE)


def test_a_task_that_only_this_process_knows_is_refused(tmp_path):
  import seqio

  seqio.TaskRegistry.add(
    'only_here',
    source=seqio.FunctionDataSource(lambda split, shuffle_files: None, splits=['train']),
    output_features={'targets': seqio.Feature(seqio.ByteVocabulary())},
  )
  try:
    with pytest.raises(errors.UserError, match="'only_here' is registered in this process alone"):
      prepare_beam.prepare(Spec('only_here'), 'train', str(tmp_path), HERE)
  finally:
    seqio.TaskRegistry.remove('only_here')


def test_a_task_of_a_module_is_made_on_workers(tmp_path, monkeypatch):
  (tmp_path / 'registers_mine.py').write_text("""if True:
    import seqio
    import tensorflow as tf
    def read(split, shuffle_files, seed=None):
      return tf.data.Dataset.from_tensors({'targets': 'abc'})
    seqio.TaskRegistry.add(
      'mine',
      source=seqio.FunctionDataSource(read, splits=['train']),
      preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
      output_features={'targets': seqio.Feature(seqio.ByteVocabulary())},
    )
  """)
  monkeypatch.syspath_prepend(tmp_path)
  import_modules, asked = lazy.import_modules, []

  def note(names):
    asked.append(names)
    import_modules(names)

  monkeypatch.setattr(lazy, 'import_modules', note)
  flags = ['--task=mine', '--split=train', f'--directory={tmp_path}/streams', *HERE]

  status = prepare_beam.main([*flags, '--module_import=registers_mine'])

  assert status == 0
  assert asked == [['registers_mine']] * 2  # by the command and by the worker
  (path,) = (tmp_path / 'streams').iterdir()
  assert stream.read(path).parts[0].tolist() == [100, 101, 102, 1]


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--vocabluary=t5', "unknown argument '--vocabluary=t5', here .* options of Beam"),
    ('t5', "unknown argument 't5', here"),
    ('--runner=Mill', 'Unexpected pipeline runner: Mill. Valid values are .*FlinkRunner'),
    ('--runner=DataflowRunner', 'Pipeline has validations errors: .*Missing .* temp_location'),
  ],
)
def test_a_wrong_flag_is_refused(flag, message, jsonl, tmp_path):
  with pytest.raises(errors.UserError, match=message):
    prepare_beam.prepare(jsonl, 'train', str(tmp_path / 'streams'), [*HERE, flag])


def test_a_runner_with_a_server_may_know_more_flags():
  flags = ['--runner=FlinkRunner', '--parallelism=8']

  assert beam_lib.options_of(flags).get_all_options()['runner'] == 'FlinkRunner'


def test_a_pipeline_that_was_ended_from_outside_is_said(jsonl, tmp_path, monkeypatch):
  class Cancelled:
    def wait_until_finish(self):
      return 'CANCELLED'

  monkeypatch.setattr(beam.Pipeline, 'run', lambda _: Cancelled())

  with pytest.raises(errors.UserError, match='the pipeline ended as CANCELLED; run the same again'):
    prepare_beam.prepare(jsonl, 'train', str(tmp_path / 'streams'), HERE)
