"""Tests of `lex_fire/data`: corpora, tasks, prepared streams, batches, masked tokens."""

import gzip
import hashlib
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import types

import numpy as np
import pytest

from lex_fire import errors
from lex_fire.data import (
  batches,
  corpora,
  draws,
  lazy,
  masking,
  positions,
  prepare,
  reading,
  stream,
  tasks,
  vocabularies,
)
from lex_fire.data.spec import Spec

EOS = 1
IDENTITY = {'format': 1, 'vocabulary': {'name': 'bytes', 'size': 259, 'eos_id': EOS}}


def bytes_of(text):
  """The tokens of a text as bytes: UTF-8 plus 3, then EOS."""
  return [byte + 3 for byte in text.encode()] + [EOS]


def write_files(folder, contents):
  for name, content in contents.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.fixture
def text_files(tmp_path):
  """Three files in two splits, given as globs."""
  contents = {'a/one.txt': 'hé', 'a/b/two.txt.gz': gzip.compress(b'x\r\ny'), 'c/three.txt': 'z'}
  write_files(tmp_path, contents)
  return {'train': f'{tmp_path}/a/**/*.txt*', 'validation': f'{tmp_path}/c/*.txt'}


@pytest.fixture
def library(tmp_path, monkeypatch):
  """A standard library of our own: the folder in which a test puts its files."""
  monkeypatch.setattr(sysconfig, 'get_path', lambda name: str(tmp_path))
  return tmp_path


@pytest.fixture
def register():
  """Registers a seqio Task over texts given in memory, and removes it after the test."""
  seqio = pytest.importorskip('seqio')
  tf = pytest.importorskip('tensorflow')
  names = []

  def add(name, texts, vocabulary, preprocessors):
    def dataset(split, shuffle_files):
      return tf.data.Dataset.from_tensor_slices({'targets': texts})

    seqio.TaskRegistry.add(
      name,
      source=seqio.FunctionDataSource(dataset, splits=['train']),
      preprocessors=[seqio.preprocessors.tokenize, *preprocessors],
      output_features={'targets': seqio.Feature(vocabulary, add_eos=True)},
    )
    names.append(name)
    return seqio.TaskRegistry.get(name)

  yield add
  for name in names:
    seqio.TaskRegistry.remove(name)


# Imports


def test_importing_the_room_imports_neither_tensorflow_nor_grain_nor_jax():
  code = (
    'import sys; from lex_fire.data import batches, masking, positions, prepare, protocols;'
    "print({'tensorflow', 'seqio', 'grain', 'jax'} & set(sys.modules))"
  )

  output = subprocess.check_output([sys.executable, '-c', code], text=True)

  assert output == 'set()\n'


# Corpora


def test_the_standard_library_is_split_by_file_and_leaves_out_what_distributions_package_apart():
  corpus = corpora.stdlib(None)

  names = {split: {file.name for file in files} for split, files in corpus.files.items()}
  sizes = {split: sum(map(len, corpus.texts(split))) for split in names}
  assert not names['train'] & names['validation']
  assert 'argparse.py' in names['train'] | names['validation']
  parts = {part for name in names['train'] | names['validation'] for part in name.split('/')}
  assert not parts & {'test', 'tests', 'site-packages', 'idlelib', 'tkinter', 'encodings'}
  assert 0.02 < sizes['validation'] / sizes['train'] < 0.1


def test_few_chunks_of_validation_occur_in_train():
  corpus = corpora.stdlib(None)
  train = '\0'.join(corpus.texts('train')).encode()
  chunks = [
    text.encode()[start : start + 256]
    for text in corpus.texts('validation')
    for start in range(0, len(text) - 256, 2048)
  ]

  leaked = sum(chunk in train for chunk in chunks)

  # Of all 1889 chunks in CPython 3.11 13 do, 12 of them from chunk.py, which wave.py copies.
  assert len(chunks) > 100
  assert leaked / len(chunks) < 0.03


def test_the_split_and_the_order_depend_on_names_alone(library):
  write_files(library, {f'{number}.py': str(number) for number in range(100)})

  corpus = corpora.stdlib(None)

  # sha256('NUMBER.py') in hexadecimal orders; divisible by 20 means validation.
  validation = ['60.py', '14.py', '75.py', '51.py', '89.py', '66.py', '76.py', '96.py']
  assert [file.name for file in corpus.files['validation']] == validation
  assert [file.name for file in corpus.files['train']][:3] == ['46.py', '35.py', '82.py']
  assert len(corpus.files['train']) == 92


def test_copies_and_undecodable_and_empty_files_are_no_documents(library):
  contents = {f'{number}.py': str(number) for number in range(100)}
  odd = {'copy.py': '7', 'broken.py': b'\xff', 'unknown.py': '# coding: no-such', 'empty.py': ''}
  write_files(library, contents | odd)

  corpus = corpora.stdlib(None)

  texts = [text for split in corpus.files for text in corpus.texts(split)]
  assert sorted(texts) == sorted(contents.values())


def test_source_in_another_encoding_is_read_as_it_declares(library):
  write_files(library, {f'{number}.py': str(number) for number in range(100)})
  source = '# coding: latin-1\nname = "é"\n'
  (library / 'latin.py').write_bytes(source.encode('latin-1'))

  corpus = corpora.stdlib(None)

  assert source in [text for split in corpus.files for text in corpus.texts(split)]


def test_a_fingerprint_follows_content_and_not_place(text_files, tmp_path):
  before = corpora.text(text_files).fingerprint(['train'])
  shutil.copytree(tmp_path / 'a', tmp_path / 'moved' / 'a')

  moved = corpora.text({'train': f'{tmp_path}/moved/**/*.txt*'}).fingerprint(['train'])
  (tmp_path / 'a/one.txt').write_text('longer')
  changed = corpora.text(text_files)

  assert moved == before
  assert changed.fingerprint(['train']) != before


def test_a_fingerprint_of_a_split_ignores_the_others(text_files, tmp_path):
  before = corpora.text(text_files)
  (tmp_path / 'c/three.txt').write_text('longer')
  after = corpora.text(text_files)

  assert after.fingerprint(['train']) == before.fingerprint(['train'])
  assert after.fingerprint(['validation']) != before.fingerprint(['validation'])


def test_a_library_without_source_is_refused(library):
  with pytest.raises(errors.UserError, match=f"standard library in '{library}' lacks its source"):
    corpora.stdlib(None)


def test_files_for_the_standard_library_are_refused():
  with pytest.raises(errors.UserError, match=r"takes no files, not \{'train': 'x'\}"):
    corpora.stdlib({'train': 'x'})


@pytest.mark.parametrize('files', [None, {}])
def test_text_without_files_is_refused(files):
  with pytest.raises(errors.UserError, match=f'not files={files}'):
    corpora.text(files)


def test_a_glob_that_matches_nothing_is_refused(tmp_path):
  with pytest.raises(errors.UserError, match=f"split 'train' matches '{tmp_path}/no"):
    corpora.text({'train': f'{tmp_path}/no*'})


def test_a_file_in_two_splits_is_refused(text_files):
  text_files['validation'] = text_files['train']

  with pytest.raises(errors.UserError, match=r"\.txt.*' is in both 'train' and 'validation'"):
    corpora.text(text_files)


def test_a_missing_split_is_refused(text_files):
  corpus = corpora.text(text_files)

  with pytest.raises(errors.UserError, match="no split 'test'; it has: train, validation"):
    corpus.texts('test')


# Tasks


def test_a_text_task_gives_utf8_bytes_plus_three_and_eos(text_files):
  task = tasks.get_task(Spec('text', files=text_files))

  documents = [document.tokens_L.tolist() for document in reading.documents(task, 'train')]

  assert sorted(documents) == sorted([[107, 198, 172, 1], [123, 16, 13, 124, 1]])
  assert [x.tokens_L.tolist() for x in reading.documents(task, 'validation')] == [bytes_of('z')]


def test_documents_come_in_the_same_order_each_time_as_int32(text_files):
  task = tasks.get_task(Spec('text', files=text_files))

  first, second = (list(reading.documents(task, 'train')) for _ in range(2))

  assert [x.tokens_L.tolist() for x in first] == [x.tokens_L.tolist() for x in second]
  assert {x.tokens_L.dtype for x in first} == {np.dtype(np.int32)}


def test_the_standard_library_is_a_task_of_its_texts():
  corpus = corpora.stdlib(None)

  task = tasks.get_task(Spec('stdlib'))

  documents = reading.documents(task, 'validation')
  for text, document in zip(corpus.texts('validation'), documents, strict=True):
    assert document.tokens_L.tolist() == bytes_of(text)
    assert document.text_bytes == len(text.encode())


def test_a_task_is_made_once_and_anew_for_changed_files(text_files, tmp_path):
  first, second = (tasks.get_task(Spec('text', files=text_files)) for _ in range(2))
  (tmp_path / 'c/three.txt').write_text('longer')
  third = tasks.get_task(Spec('text', files=text_files))

  assert first is second
  assert third is not first
  assert [x.tokens_L.tolist() for x in reading.documents(third, 'validation')] == [
    bytes_of('longer')
  ]


def test_the_constant_byte_vocabulary_is_that_of_the_tasks(text_files):
  assert reading.vocabulary_of(tasks.get_task(Spec('text', files=text_files))) == vocabularies.BYTES


def test_text_bytes_of_bytes_are_the_tokens_without_eos(text_files):
  task = tasks.get_task(Spec('text', files=text_files))

  assert reading.text_bytes(task, np.array(bytes_of('hé'))) == 3
  assert reading.text_bytes(task, np.array(bytes_of('hé')[1:-2])) == 1


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('a.txt', b'', "a.txt' is empty"),
    ('a.txt.gz', gzip.compress(b'', mtime=0), "a.txt.gz' is empty"),
    ('a.txt', b'ab\xff', "a.txt' is not UTF-8 at byte 2"),
    ('a.txt.gz', b'plain', "a.txt.gz' is not a whole .gz file: Not a gzipped file"),
    (
      'a.txt.gz',
      gzip.compress(b'text', mtime=0)[:-9],
      "a.txt.gz' is not a whole .gz file: Compressed",
    ),
  ],
)
def test_a_file_that_is_no_text_is_refused_by_name(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  task = tasks.get_task(Spec('text', files={'train': f'{tmp_path}/*'}))

  with pytest.raises(errors.UserError, match=message):
    list(reading.documents(task, 'train'))


def test_an_unreadable_file_is_refused_by_name(text_files, tmp_path):
  task = tasks.get_task(Spec('text', files=text_files))
  (tmp_path / 'c/three.txt').unlink()

  with pytest.raises(errors.UserError, match="three.txt' is unreadable: No such file"):
    list(reading.documents(task, 'validation'))


def test_an_unknown_task_is_refused_with_the_known():
  with pytest.raises(
    errors.UserError, match="unknown task 'c5'; known: stdlib, text, jsonl, c4, pg19"
  ):
    tasks.get_task(Spec('c5'))


def test_a_split_that_a_task_has_not_is_refused(text_files):
  task = tasks.get_task(Spec('text', files=text_files))

  with pytest.raises(errors.UserError, match="no split 'test'; it has: train, validation"):
    next(reading.documents(task, 'test'))


def test_files_for_a_registered_task_are_refused(register):
  register('mine', ['a'], pytest.importorskip('seqio').ByteVocabulary(), [])

  with pytest.raises(errors.UserError, match=r"task 'mine' takes no files, not \{'train': 'x'\}"):
    tasks.get_task(Spec('mine', files={'train': 'x'}))


def test_a_registered_task_without_eos_is_refused(register):
  task = register('mine', ['a'], pytest.importorskip('seqio').ByteVocabulary(), [])

  with pytest.raises(errors.UserError, match=r"'mine' ends in \[100\], not in EOS, 1"):
    next(reading.documents(task, 'train'))


def test_a_vocabulary_that_cannot_be_identified_is_refused(register):
  seqio = pytest.importorskip('seqio')
  task = register('mine', ['a'], seqio.PassThroughVocabulary(size=9), [])

  with pytest.raises(errors.UserError, match='a PassThroughVocabulary is no vocabulary'):
    reading.vocabulary_of(task)


@pytest.mark.parametrize('kind', ['DataLossError', 'NotFoundError'])
def test_files_of_tfds_that_are_damaged_or_missing_are_named(kind):
  tf = pytest.importorskip('tensorflow')
  dataset = types.SimpleNamespace(name='c4/en:3.0.1', data_dir='/tfds')

  message = "the files of 'c4/en:3.0.1' in '/tfds' are damaged or not all there: record 9 is cut;"
  with (
    pytest.raises(errors.UserError, match=message),
    lazy.source_errors(types.SimpleNamespace(tfds_dataset=dataset)),
  ):
    raise getattr(tf.errors, kind)(None, None, 'record 9 is cut\nand more')


def test_a_name_that_is_no_utf_8_has_a_digest_too():
  file = corpora.File('caf\udce9.txt', pathlib.Path('there'), 'stamp', 9)

  assert file.digest == hashlib.sha256(b'caf\xe9.txt').hexdigest()


def test_a_failure_of_tensorflow_that_is_no_users_mistake_keeps_its_type(register):
  seqio = pytest.importorskip('seqio')
  tf = pytest.importorskip('tensorflow')

  def fail(dataset):
    return dataset.map(lambda example: {'targets': tf.ensure_shape(example['targets'], [5])})

  task = register('mine', ['a'], seqio.ByteVocabulary(), [fail])

  with pytest.raises(tf.errors.InvalidArgumentError):
    next(reading.documents(task, 'train'))


@pytest.fixture
def sentencepiece_task(register, tmp_path):
  """A registered Task with a small SentencePiece vocabulary."""
  seqio = pytest.importorskip('seqio')
  sentencepiece = pytest.importorskip('sentencepiece')
  texts = ['the cat sat on the mat', 'the dog sat on the log']
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(texts * 20),
    model_prefix=f'{tmp_path}/model',
    vocab_size=40,
    hard_vocab_limit=False,
    minloglevel=2,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
  )
  vocabulary = seqio.SentencePieceVocabulary(f'{tmp_path}/model.model')
  return register('pieces', texts, vocabulary, [seqio.preprocessors.append_eos])


def test_a_registered_sentencepiece_task_goes_the_same_way(sentencepiece_task, tmp_path):
  path = prepare.prepare(Spec('pieces'), 'train', tmp_path)

  (tokens_L,), _, manifest = stream.read(path)
  vocabulary = sentencepiece_task.output_features['targets'].vocabulary
  of_vocabulary, version = manifest['vocabulary']['name'], manifest['format']
  assert path.name == f'pieces-train-{of_vocabulary}-pieces-format{version}'
  assert manifest['vocabulary']['size'] == vocabulary.vocab_size
  assert manifest['text_bytes'] == 2 * len('the cat sat on the mat')
  expected = [
    vocabulary.encode(x) + [EOS] for x in ('the cat sat on the mat', 'the dog sat on the log')
  ]
  assert tokens_L.tolist() == expected[0] + expected[1]


# Batches


def make_windows(tokens, length, isolate_documents=False):
  tokens_L = np.array(tokens, np.uint16)
  return batches.Windows([tokens_L], length, eos_id=EOS, isolate_documents=isolate_documents)


def make_sampler(windows, batch_size=4, seed=0, process_index=0, process_count=1):
  return batches.TrainSampler(
    windows, batch_size, seed=seed, process_index=process_index, process_count=process_count
  )


def test_windows_lie_end_to_end_and_targets_follow_inputs():
  windows = make_windows(range(10, 18), length=3)

  batch = windows.batch(np.array([1, 0]))

  assert windows.num_windows == 2
  assert batch['inputs_BL'].tolist() == [[13, 14, 15], [10, 11, 12]]
  assert batch['targets_BL'].tolist() == [[14, 15, 16], [11, 12, 13]]
  assert batch['loss_weights_BL'].tolist() == [[1, 1, 1], [1, 1, 1]]
  assert batch['position_BL'] is None and batch['segment_ids_BL'] is None
  dtypes = {key: str(batch[key].dtype) for key in ('inputs_BL', 'targets_BL', 'loss_weights_BL')}
  assert dtypes == {
    'inputs_BL': 'int32',
    'targets_BL': 'int32',
    'loss_weights_BL': 'float32',
  }


@pytest.mark.parametrize(('tokens', 'expected'), [(6, 1), (7, 2), (8, 2), (9, 2), (10, 3)])
def test_a_window_needs_one_token_more_than_its_length(tokens, expected):
  assert make_windows(range(tokens), length=3).num_windows == expected


def test_isolated_documents_begin_with_the_eos_before_them():
  # Two documents (5 6 EOS) (7 EOS), an empty one (EOS), and the beginning of a fourth.
  windows = make_windows([5, 6, 1, 7, 1, 1, 8, 9], length=7, isolate_documents=True)

  batch = windows.batch(np.array([0]))

  assert batch['inputs_BL'].tolist() == [[5, 6, 1, 7, 1, 1, 8]]
  assert batch['targets_BL'].tolist() == [[6, 1, 7, 1, 1, 8, 9]]
  assert batch['segment_ids_BL'].tolist() == [[1, 1, 2, 2, 3, 4, 4]]
  assert batch['position_BL'].tolist() == [[0, 1, 0, 1, 0, 0, 1]]
  assert batch['loss_weights_BL'].tolist() == [[1, 1, 1, 1, 1, 1, 1]]
  assert batch['segment_ids_BL'].dtype == batch['position_BL'].dtype == np.int32


def test_segments_count_from_one_in_a_window_that_begins_with_eos():
  windows = make_windows([5, 1, 1, 6, 7, 1, 8], length=2, isolate_documents=True)

  batch = windows.batch(np.array([0, 1, 2]))

  assert batch['inputs_BL'].tolist() == [[5, 1], [1, 6], [7, 1]]
  assert batch['segment_ids_BL'].tolist() == [[1, 2], [1, 1], [1, 2]]
  assert batch['position_BL'].tolist() == [[0, 0], [0, 1], [0, 0]]


@pytest.mark.parametrize('isolate_documents', [False, True])
@pytest.mark.parametrize('hosts', [2, 4])
def test_hosts_together_read_the_batch_that_one_host_reads(hosts, isolate_documents):
  windows = make_windows([1, 5, 6, 7] * 20, 3, isolate_documents)

  for step in (0, 1, 17):
    whole = make_sampler(windows, batch_size=8).batch(step)
    parts = [
      make_sampler(windows, batch_size=8, process_index=index, process_count=hosts).batch(step)
      for index in range(hosts)
    ]
    for key in ('inputs_BL', 'targets_BL', 'loss_weights_BL'):
      assert np.concatenate([part[key] for part in parts]).tolist() == whole[key].tolist()


def test_a_batch_depends_on_seed_and_step_alone():
  windows = make_windows(range(100), length=3)
  unbroken = [make_sampler(windows, seed=3)] * 20
  restarted = [make_sampler(windows, seed=3) for _ in range(20)]

  for step in (19, 0, 7):
    expected = unbroken[step].batch(step)['inputs_BL'].tolist()
    assert restarted[step].batch(step)['inputs_BL'].tolist() == expected

  another = make_sampler(windows, seed=4)
  assert another.batch(7)['inputs_BL'].tolist() != unbroken[7].batch(7)['inputs_BL'].tolist()


def test_each_window_is_drawn_once_an_epoch_in_another_order():
  windows = make_windows(range(1, 32), length=3)  # 10 windows, which batches of 4 do not divide
  sampler = make_sampler(windows)

  drawn = np.concatenate([sampler.batch(step)['inputs_BL'][:, 0] for step in range(5)])

  first, second = drawn[:10].tolist(), drawn[10:].tolist()
  assert sorted(first) == sorted(second) == list(range(1, 31, 3))
  assert first != second
  assert first != sorted(first)


def test_the_batches_of_a_stream_on_disk_are_those_of_one_in_memory(tmp_path):
  tokens = list(range(3, 40))
  counts = stream.write_part(tmp_path, 0, 259, [stream.Document(np.array(tokens), 37)])
  stream.finish(tmp_path, tmp_path.with_name('s'), {}, [counts])
  parts = stream.read(tmp_path.with_name('s')).parts
  on_disk = batches.Windows(parts, 3, eos_id=EOS, isolate_documents=False)

  expected = make_sampler(make_windows(tokens, 3)).batch(2)

  assert make_sampler(on_disk).batch(2)['targets_BL'].tolist() == expected['targets_BL'].tolist()


def test_batches_in_order_fill_up_the_last_with_weight_zero():
  windows = make_windows(range(10, 18), length=2)  # 3 windows

  result = list(batches.batches_in_order(windows, 2, 9, process_index=0, process_count=1))

  assert [batch['inputs_BL'].tolist() for batch in result] == [
    [[10, 11], [12, 13]],
    [[14, 15], [14, 15]],
  ]
  assert [batch['loss_weights_BL'].tolist() for batch in result] == [
    [[1, 1], [1, 1]],
    [[1, 1], [0, 0]],
  ]


def test_batches_in_order_stop_at_the_most_windows_asked_for():
  windows = make_windows(range(10, 30), length=2)

  result = list(batches.batches_in_order(windows, 2, 3, process_index=0, process_count=1))

  assert sum(batch['loss_weights_BL'].sum() for batch in result) == 3 * 2


def test_hosts_read_equally_many_batches_in_order():
  windows = make_windows(range(10, 18), length=2)  # 3 windows: host 1 has one row of padding

  first, second = (
    list(batches.batches_in_order(windows, 4, 9, process_index=index, process_count=2))
    for index in range(2)
  )

  assert [batch['inputs_BL'].tolist() for batch in first] == [[[10, 11], [12, 13]]]
  assert [batch['inputs_BL'].tolist() for batch in second] == [[[14, 15], [14, 15]]]
  assert [batch['loss_weights_BL'].tolist() for batch in second] == [[[1, 1], [0, 0]]]


def test_a_stream_shorter_than_a_window_is_refused():
  with pytest.raises(errors.UserError, match='stream of 8 tokens has no window of length=8'):
    make_windows(range(8), length=8)


def test_a_batch_that_hosts_cannot_share_is_refused():
  windows = make_windows(range(20), length=2)

  with pytest.raises(errors.UserError, match='batch_size=6 is not divisible by process_count=4'):
    make_sampler(windows, batch_size=6, process_count=4)
  with pytest.raises(errors.UserError, match='batch_size=6 is not divisible by process_count=4'):
    batches.batches_in_order(windows, 6, 9, process_index=0, process_count=4)


@pytest.mark.parametrize('seed', [-1, 2**32])
def test_a_seed_out_of_range_is_refused(seed):
  with pytest.raises(errors.UserError, match=f'seed={seed} is out of range; use 0 to 4294967295'):
    make_sampler(make_windows(range(20), length=2), seed=seed)


# Random numbers by address


def split_mix(seed, n):
  """Output n of SplitMix64, in whole numbers of Python."""
  x = (seed + (n + 1) * 0x9E3779B97F4A7C15) % 2**64
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
  x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
  return x ^ x >> 31


def test_draws_are_the_published_outputs_of_split_mix():
  """The first five of seed 1234567, as Rosetta Code lists them."""
  published = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
  ]

  assert [split_mix(1234567, n) for n in range(5)] == published
  number_Z = draws.uniform(1234567, np.arange(5))
  assert (number_Z * 2.0**53).astype(np.uint64).tolist() == [x >> 11 for x in published]


def test_an_index_seeds_the_generator_of_the_next():
  number_BL = draws.uniform(2**32, 3, np.arange(4)[:, None], np.arange(5)[None])

  for row in range(4):
    for column in range(5):
      output = split_mix(split_mix(split_mix(2**32, 3), row), column)
      assert number_BL[row, column] == (output >> 11) / 2**53
  assert number_BL.shape == (4, 5)


# Masked tokens

SIZE = 259  # ids of tokens; that of the mask


def make_batch(rows=4, length=20, seed=0):
  rng = np.random.default_rng(seed)
  return {
    'inputs_BL': np.zeros((rows, length), np.int32),
    'targets_BL': rng.integers(0, SIZE, (rows, length), np.int32),
    'loss_weights_BL': np.ones((rows, length), np.float32),
    'position_BL': None,
    'segment_ids_BL': None,
  }


def corrupt(batch, draw_B=None, seed=7, rate=0.15):
  draw_B = np.arange(len(batch['targets_BL'])) if draw_B is None else np.array(draw_B)
  return masking.corrupt(batch, draw_B, seed=seed, rate=rate, vocabulary_size=SIZE)


def test_of_the_chosen_tokens_80_percent_are_masked_10_random_and_10_kept():
  batch = make_batch(rows=512, length=512)

  out = corrupt(batch)

  chosen_BL = out['loss_weights_BL'] == 1
  assert set(chosen_BL.sum(axis=1)) == {round(0.15 * 512)}
  # About 39,000 chosen tokens: 0.01 is five standard deviations of a fraction of them.
  input_Z, target_Z = out['inputs_BL'][chosen_BL], batch['targets_BL'][chosen_BL]
  assert (input_Z == SIZE).mean() == pytest.approx(0.8, abs=0.01)
  assert (input_Z == target_Z).mean() == pytest.approx(0.1 + 0.1 / SIZE, abs=0.01)
  random_Z = input_Z[(input_Z != SIZE) & (input_Z != target_Z)]
  assert set(random_Z) == set(range(SIZE))
  assert np.bincount(random_Z).max() < 40  # 15 on average
  # No place in a row is preferred: 512 rows, five standard deviations.
  np.testing.assert_allclose(chosen_BL.mean(axis=0), 0.15, atol=0.08)


def test_tokens_that_are_not_chosen_are_inputs_as_they_are_and_weigh_nothing():
  batch = make_batch()

  out = corrupt(batch)

  kept_BL = out['loss_weights_BL'] == 0
  assert (out['inputs_BL'][kept_BL] == batch['targets_BL'][kept_BL]).all()
  assert set(np.unique(out['loss_weights_BL'])) == {0, 1}
  assert {name: getattr(x, 'dtype', None) for name, x in out.items()} == {
    name: getattr(x, 'dtype', None) for name, x in batch.items()
  }


def test_targets_are_the_original_tokens_where_they_stand():
  batch = make_batch()
  before = {name: np.copy(x) for name, x in batch.items()}

  out = corrupt(batch)

  assert out['targets_BL'].tolist() == before['targets_BL'].tolist()
  changed_BL = out['inputs_BL'] != before['targets_BL']
  assert changed_BL.any() and (out['loss_weights_BL'][changed_BL] == 1).all()
  for name in ('inputs_BL', 'targets_BL', 'loss_weights_BL'):  # the batch itself is left alone
    assert batch[name].tolist() == before[name].tolist()


@pytest.mark.parametrize(('length', 'rate', 'chosen'), [(1, 0.01, 1), (3, 0.15, 1), (20, 0.99, 20)])
def test_every_row_has_a_chosen_token(length, rate, chosen):
  out = corrupt(make_batch(length=length), rate=rate)

  assert out['loss_weights_BL'].sum(axis=1).tolist() == [chosen] * 4


def test_rows_of_padding_keep_weight_zero():
  batch = make_batch()
  batch['loss_weights_BL'][2:] = 0

  out = corrupt(batch)

  assert (out['loss_weights_BL'].sum(axis=1) > 0).tolist() == [True, True, False, False]


def test_a_row_is_masked_by_its_draw_on_any_host():
  batch = make_batch(rows=8)
  whole = corrupt(batch)

  for rows in ([0, 1, 2, 3], [4, 5, 6, 7], [6], [3, 1]):
    part = {name: x if x is None or len(x) == 1 else x[rows] for name, x in batch.items()}
    out = corrupt(part, rows)
    for name in ('inputs_BL', 'targets_BL', 'loss_weights_BL'):
      assert out[name].tolist() == whole[name][rows].tolist()


def test_masks_differ_by_seed_and_by_draw_and_so_by_epoch():
  batch = make_batch(rows=1, length=200)

  outs = [
    corrupt(batch, [draw], seed=seed)['inputs_BL'].tolist()
    for draw in (0, 1, 900)
    for seed in (0, 1)
  ]

  assert all(outs.count(out) == 1 for out in outs)


# Randomized positions


@pytest.mark.parametrize('position_range', [16, 17, 100, 5000])
def test_randomized_positions_are_sorted_different_and_in_range(position_range):
  for ordinal in range(10):
    position_L = positions.sample(16, position_range, seed=3, ordinal=ordinal)
    assert position_L.dtype == np.int32
    assert len(position_L) == 16
    assert (np.diff(position_L) > 0).all()
    assert 0 <= position_L[0] and position_L[-1] < position_range


def test_every_position_of_the_range_is_drawn_equally_often():
  drawn = [positions.sample(8, 32, seed=0, ordinal=ordinal) for ordinal in range(2000)]

  # Each 500 times on average, with a standard deviation of 19.
  np.testing.assert_allclose(np.bincount(np.concatenate(drawn)), 500, atol=5 * 19)


def test_positions_differ_by_seed_and_by_batch_and_are_drawn_alike_again():
  def draw(seed, ordinal):
    return positions.sample(16, 1000, seed=seed, ordinal=ordinal).tolist()

  drawn = [draw(seed, ordinal) for seed in (0, 1) for ordinal in (0, 1, 2)]

  assert all(drawn.count(sample) == 1 for sample in drawn)
  assert drawn == [draw(seed, ordinal) for seed in (0, 1) for ordinal in (0, 1, 2)]


def test_rows_share_one_sample_and_stay_one_row():
  out = positions.randomize(make_batch(), 100, seed=0, ordinal=5)

  sample = positions.sample(20, 100, seed=0, ordinal=5)
  assert out['position_BL'].tolist() == [sample.tolist()]


def test_isolated_documents_begin_anew_in_the_sample():
  windows = make_windows([5, 6, 1, 7, 1, 1, 8, 9], length=7, isolate_documents=True)

  batch = positions.randomize(windows.batch(np.array([0])), 90, seed=2, ordinal=0)

  first, second = positions.sample(7, 90, seed=2, ordinal=0)[:2].tolist()
  expected = [first, second, first, second, first, first, second]
  assert batch['position_BL'].tolist() == [expected]
  assert batch['segment_ids_BL'].tolist() == [[1, 1, 2, 2, 3, 4, 4]]
