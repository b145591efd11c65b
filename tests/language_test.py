"""Tests of `lex_fire/data/language.py` and of what `reading` does with its Tasks, C4 among them."""

import json

import numpy as np
import pytest
import tiny

from lex_fire import errors
from lex_fire.data import corpora, language, prepare, reading, stream, tasks
from lex_fire.data.spec import Spec

seqio = pytest.importorskip('seqio')

TEXTS = [
  f'Document {number}: café, naïve\n\n  and  spaces\t{"so " * number}on.' for number in range(11)
]


@pytest.fixture(scope='session')
def c4_directory(tmp_path_factory):
  """C4 as TFDS has it, in three files, of few documents."""
  import tensorflow as tf
  import tensorflow_datasets as tfds

  directory = tmp_path_factory.mktemp('c4')
  names = ('text', 'url', 'content-type', 'content-length', 'timestamp')
  columns = {name: TEXTS if name == 'text' else [name] * len(TEXTS) for name in names}
  tfds.dataset_builders.store_as_tfds_dataset(
    name='c4',
    config='en',
    version='3.0.1',
    data_dir=directory,
    split_datasets={
      'train': tf.data.Dataset.from_tensor_slices(columns).take(9),
      'validation': tf.data.Dataset.from_tensor_slices(columns).take(4),
    },
    features=tfds.features.FeaturesDict({name: tfds.features.Text() for name in names}),
    download_config=tfds.download.DownloadConfig(num_shards=3),
    disable_shuffling=True,
  )
  return str(directory)


@pytest.fixture(scope='session')
def pieces(tmp_path_factory):
  """The path of a tiny SentencePiece model."""
  return tiny.write_vocabulary(tmp_path_factory.mktemp('vocabulary') / 'tiny.model', TEXTS)


@pytest.fixture(params=['bytes', 'pieces'])
def vocabulary(request, pieces):
  return pieces if request.param == 'pieces' else 'bytes'


@pytest.fixture
def c4(c4_directory, vocabulary):
  return Spec('c4', vocabulary, tfds_directory=c4_directory)


@pytest.fixture
def jsonl(tmp_path, vocabulary):
  """The same documents as lines of three files."""
  for start in range(3):
    lines = [json.dumps({'text': text, 'meta': {}}) + '\n' for text in TEXTS[start::3]]
    (tmp_path / f'{start}.jsonl').write_text(''.join(lines))
  return Spec('jsonl', vocabulary, {'train': f'{tmp_path}/*.jsonl'})


@pytest.fixture(params=['c4', 'jsonl'])
def spec(request, c4, jsonl):
  return {'c4': c4, 'jsonl': jsonl}[request.param]


def expected(task, texts):
  """Each text as the vocabulary has it, one by one, and EOS."""
  vocabulary = task.output_features['targets'].vocabulary
  return [[*vocabulary.encode(text), vocabulary.eos_id] for text in texts]


def lists(documents):
  return [document.tokens_L.tolist() for document in documents]


# C4


def test_c4_is_its_texts_in_its_version(c4):
  task = tasks.get_task(c4)

  documents = list(reading.documents(task, 'train'))

  assert language.PUBLIC['c4'].dataset == 'c4/en:3.0.1'
  assert sorted(lists(documents)) == sorted(expected(task, TEXTS[:9]))
  assert sum(x.text_bytes for x in documents) == sum(len(text.encode()) for text in TEXTS[:9])
  assert {x.tokens_L.dtype for x in documents} == {np.dtype(np.int32)}


def test_c4_is_prepared_a_part_a_file(c4, tmp_path, monkeypatch):
  monkeypatch.setattr(prepare.os, 'sched_getaffinity', lambda _: {0})

  path = prepare.prepare(c4, 'train', tmp_path)

  task, found = tasks.get_task(c4), stream.read(path)
  assert len(found.parts) == 3
  assert found.manifest['documents'] == 9
  assert found.manifest['corpus'].startswith('c4/en:3.0.1-3-9-')
  assert np.concatenate(found.parts).tolist() == sum(expected(task, TEXTS[:9]), [])
  assert prepare.prepare(c4, 'train', tmp_path) == path


def test_the_validation_split_of_c4_is_another_stream(c4, tmp_path, monkeypatch):
  monkeypatch.setattr(prepare.os, 'sched_getaffinity', lambda _: {0})

  path = prepare.prepare(c4, 'validation', tmp_path)

  assert stream.read(path).manifest['documents'] == 4


@pytest.mark.parametrize('name', sorted(language.PUBLIC))
def test_a_public_corpus_that_is_not_there_is_refused_by_name(name, tmp_path):
  spec = Spec(name, tfds_directory=str(tmp_path / 'none'))

  message = f"TFDS has no '{language.PUBLIC[name].dataset}' in '{tmp_path}/none'; make it there"
  with pytest.raises(errors.UserError, match=message):
    prepare.prepare(spec, 'train', tmp_path)


def test_a_split_that_a_public_corpus_has_not_is_refused(c4_directory, tmp_path):
  with pytest.raises(errors.UserError, match="no split 'test'; it has: train, validation"):
    prepare.prepare(Spec('c4', tfds_directory=c4_directory), 'test', tmp_path)


def test_files_for_a_public_corpus_are_refused(c4_directory):
  with pytest.raises(errors.UserError, match=r"task 'c4' takes no files, not \{'train': 'x'\}"):
    tasks.get_task(Spec('c4', files={'train': 'x'}, tfds_directory=c4_directory))


@pytest.mark.parametrize('hosts', [1, 3])
def test_hosts_that_each_have_a_file_are_enough(c4_directory, hosts):
  reading.check_hosts(tasks.get_task(Spec('c4', tfds_directory=c4_directory)), 'train', hosts)


def test_more_hosts_than_files_are_refused(c4_directory):
  task = tasks.get_task(Spec('c4', tfds_directory=c4_directory))

  message = "split 'train' of task 'c4_en_3.*' is read in 3 parts.* for process_count=4; use 3"
  with pytest.raises(errors.UserError, match=message):
    reading.check_hosts(task, 'train', 4)
  with pytest.raises(errors.UserError, match="no split 'test'"):
    reading.check_hosts(task, 'test', 1)


# What holds for every Task of language


def test_documents_are_those_that_the_task_itself_gives(spec):
  task = tasks.get_task(spec)

  dataset = task.get_dataset(split='train', shuffle=False, try_in_mem_cache=False)

  examples = list(dataset.as_numpy_iterator())
  documents = list(reading.documents(task, 'train'))
  assert lists(documents) == [example['targets'].tolist() for example in examples]
  assert [x.text_bytes for x in documents] == [len(x['targets_pretokenized']) for x in examples]
  assert list(reading.texts(task, 'train')) == [x['targets_pretokenized'] for x in examples]


def test_parts_together_are_the_documents_each_once(spec, monkeypatch):
  monkeypatch.setattr(reading, '_PART_BYTES', 1)
  task = tasks.get_task(spec)

  count = reading.parts(task, 'train')

  parts = [lists(reading.documents(task, 'train', part, count)) for part in range(count)]
  assert count == 3
  assert sorted(sum(parts, [])) == sorted(lists(reading.documents(task, 'train')))
  assert parts == [lists(reading.documents(task, 'train', part, count)) for part in range(count)]


def test_a_line_of_json_is_a_document(jsonl):
  task = tasks.get_task(jsonl)

  assert sorted(lists(reading.documents(task, 'train'))) == sorted(expected(task, TEXTS))
  assert reading.num_documents(task, 'train') is None


# Parts of a corpus


def test_the_parts_of_a_corpus_follow_from_its_size(tmp_path, monkeypatch):
  for number, size in enumerate((100, 100, 100, 700)):
    (tmp_path / f'{number}.txt').write_text('x' * size)
  task = tasks.get_task(Spec('text', files={'train': f'{tmp_path}/*'}))

  def parts(size):
    monkeypatch.setattr(reading, '_PART_BYTES', size)
    return reading.parts(task, 'train')

  assert [parts(size) for size in (1, 334, 400, 999, 1000, 10**9)] == [4, 3, 3, 2, 1, 1]
  with pytest.raises(errors.UserError, match="no split 'test'; it has: train"):
    reading.parts(task, 'test')


@pytest.mark.parametrize('sizes', [[5] * 8, [1, 1, 1, 90, 1, 1], [90, 1], [1]])
@pytest.mark.parametrize('num_parts', [1, 2, 3, 7])
def test_parts_of_texts_follow_one_another_and_are_the_whole(tmp_path, sizes, num_parts):
  for number, size in enumerate(sizes):
    (tmp_path / f'{number}.txt').write_text(f'{number}' * size)
  corpus = corpora.text({'train': f'{tmp_path}/*'})

  parts = [list(corpus.texts('train', part, num_parts)) for part in range(num_parts)]

  assert sum(parts, []) == list(corpus.texts('train'))
  assert sorted(sum(parts, [])) == sorted(f'{n}' * size for n, size in enumerate(sizes))


def test_parts_of_equal_files_have_equally_many(tmp_path):
  for number in range(8):
    (tmp_path / f'{number}.txt').write_text('text')
  corpus = corpora.text({'train': f'{tmp_path}/*'})

  assert [len(list(corpus.texts('train', part, 4))) for part in range(4)] == [2, 2, 2, 2]


def test_a_line_without_text_is_refused_by_file_and_line(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"text": "a"}\n{"text": ""}\n')
  task = tasks.get_task(Spec('jsonl', files={'train': f'{tmp_path}/*'}))

  with pytest.raises(errors.UserError, match="a.jsonl' line 2 has an empty 'text'"):
    list(reading.documents(task, 'train'))


def test_fingerprints_of_a_public_corpus_are_of_the_split(c4_directory):
  task = tasks.get_task(Spec('c4', tfds_directory=c4_directory))

  train, validation = (reading.fingerprint(task, split) for split in ('train', 'validation'))

  assert train != validation
  assert validation.startswith('c4/en:3.0.1-3-4-')
  with pytest.raises(errors.UserError, match="no split 'test'"):
    reading.fingerprint(task, 'test')
