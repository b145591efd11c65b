"""Tests of `lex_fire/data/live.py`: windows of a Task read as a run goes, and its places."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest
import seqio
import tensorflow as tf
import tiny
from language_test import TEXTS, c4_directory  # noqa: F401  (a fixture: pytest finds it by name)

from lex_fire import checkpoint, errors, train
from lex_fire.data import flow, live, reading, stream, tasks
from lex_fire.data.spec import Spec

LENGTH, ROWS = 8, 2
TRAIN = TEXTS[:9]  # of which the fixture makes split train, in three files


@pytest.fixture(autouse=True)
def block_tokens(monkeypatch):
  """Makes blocks of four batches."""
  monkeypatch.setattr(live, 'BLOCK_TOKENS', 4 * ROWS * LENGTH)


@pytest.fixture
def in_order(monkeypatch):
  """Makes blocks of one batch, so that of one row a batch none changes places."""
  monkeypatch.setattr(live, 'BLOCK_TOKENS', 1)


@pytest.fixture
def c4(c4_directory):  # noqa: F811  (that fixture, as pytest gives it)
  return tasks.get_task(Spec('c4', tfds_directory=c4_directory))


def write_lines(path, texts):
  path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
  return {'train': str(path)}


@pytest.fixture
def lines(tmp_path):
  """A Task over one file, and so of one part."""
  return tasks.get_task(Spec('jsonl', files=write_lines(tmp_path / 'train.jsonl', TRAIN)))


def opened(task, process_index=0, process_count=1, seed=3, rows=ROWS):
  return live.Live(
    task,
    LENGTH,
    rows,
    seed=seed,
    isolate_documents=False,
    process_index=process_index,
    process_count=process_count,
  )


def windows(source, steps, start=0):
  """Returns [W, L + 1]: the inputs of windows, and the last target of each."""
  found = [source.batch(start + step) for step in range(steps)]
  return np.concatenate(
    [np.append(batch['inputs_BL'], batch['targets_BL'][:, -1:], axis=1) for batch in found]
  )


def tokens_of(text):
  return (*(byte + 3 for byte in text.encode()), 1)


def documents_of(targets_L):
  """The documents of a text of tokens, but the last, which may be cut."""
  ends = [index + 1 for index, token in enumerate(targets_L) if token == 1]
  return [tuple(targets_L[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def test_documents_of_a_part_come_end_to_end_epoch_after_epoch(lines, in_order):
  found = windows(opened(lines, rows=1), 150)

  text = np.concatenate([[1], found[:, 1:].ravel()])  # each window begins where one ended
  assert (found[:, 0] == text[:-1:LENGTH]).all()
  assert len(text) > 2 * sum(len(tokens_of(text)) for text in TRAIN)
  expected = [token for text in 3 * TRAIN for token in tokens_of(text)]
  assert text[1:].tolist() == expected[: len(text) - 1]


def uneven(sizes):
  """A function of documents, two tokens each: its part and number; of so many in each part."""

  def read(part, first):
    for number in range(first, sizes[part]):
      yield stream.Document(np.array([100 * part + number, 1]), 2)

  return read


@pytest.mark.parametrize('sizes', [(3, 3, 3), (90, 2, 2, 2), (0, 5, 0), (1,), (*[1] * 40, 30)])
def test_each_document_comes_once_an_epoch_however_uneven_the_parts_are(sizes):
  documents = flow.Documents(uneven(sizes), len(sizes), seed=5, place=None)
  expected = [100 * part + number for part, size in enumerate(sizes) for number in range(size)]

  epochs = [[int(documents.next()[0]) for _ in expected] for _ in range(3)]

  assert all(sorted(epoch) == expected for epoch in epochs)
  if sum(size > 0 for size in sizes) > 1:
    assert epochs[0] != epochs[1]  # parts in another order


def test_open_parts_give_a_document_each_by_turns():
  documents = flow.Documents(uneven((2, 2, 2)), 3, seed=5, place=None)

  parts = [int(documents.next()[0]) // 100 for _ in range(6)]

  assert parts[:3] == parts[3:] and set(parts) == {0, 1, 2}


@pytest.mark.parametrize('sizes', [(7, 2, 0, 2), (0, 0, 1), (*[1] * 20, 30)])
def test_documents_go_on_from_any_place(sizes):
  documents = flow.Documents(uneven(sizes), len(sizes), seed=5, place=None)
  places, found = [], []
  for _ in range(3 * sum(sizes)):
    places.append(json.loads(json.dumps(documents.place())))
    found.append(int(documents.next()[0]))

  for start in range(2 * sum(sizes)):
    again = flow.Documents(uneven(sizes), len(sizes), seed=5, place=places[start])
    assert [int(again.next()[0]) for _ in range(sum(sizes))] == found[start : start + sum(sizes)]


def test_a_document_that_has_become_shorter_than_its_place_is_refused(c4, tmp_path, monkeypatch):
  source = opened(c4)
  windows(source, 1)
  source.save(tmp_path, keep=[])
  read = reading.documents

  def first_tokens(*arguments):
    return (document._replace(tokens_L=document.tokens_L[-1:]) for document in read(*arguments))

  windows(source, 9, start=1)
  source.save(tmp_path, keep=[])
  monkeypatch.setattr(reading, 'documents', first_tokens)

  with pytest.raises(errors.UserError, match='a document of 1 tokens was one of'):
    opened(c4).restore(tmp_path, 10)


def test_an_epoch_has_all_of_a_task_before_the_next_begins(c4, in_order):
  total = sum(len(tokens_of(text)) for text in TRAIN)

  found = windows(opened(c4, rows=1), 3 * total // LENGTH)[:, 1:].ravel().tolist()

  for epoch in range(2):
    of_epoch = documents_of(found[epoch * total : (epoch + 1) * total])
    assert sorted(of_epoch) == sorted(map(tokens_of, TRAIN))


def test_windows_are_shuffled_in_their_block_and_none_leaves_it(lines, monkeypatch):
  shuffled = windows(opened(lines), 8).reshape(2, 8, LENGTH + 1)
  monkeypatch.setattr(live, 'BLOCK_TOKENS', 1)
  straight = windows(opened(lines, rows=1), 16).reshape(2, 8, LENGTH + 1)

  for block, expected in zip(shuffled.tolist(), straight.tolist(), strict=True):
    assert block != expected
    assert sorted(block) == sorted(expected)


@pytest.mark.parametrize('step', [1, 4, 43])
@pytest.mark.parametrize('name', ['c4', 'lines'])
def test_a_restored_place_goes_on_with_the_very_next_batch(name, request, step, tmp_path):
  task = request.getfixturevalue(name)
  source = opened(task)
  windows(source, step)
  source.save(tmp_path, keep=[])
  expected = windows(source, 30, start=step)

  resumed = opened(task)
  resumed.restore(tmp_path, step)

  assert windows(resumed, 30, start=step).tolist() == expected.tolist()


def test_what_is_passed_over_is_not_read_again(c4, tmp_path, monkeypatch):
  source = opened(c4)
  windows(source, 43)
  source.save(tmp_path, keep=[])
  read = []

  def documents(task, split, part, num_parts, start):
    read.append(start)
    return reading_documents(task, split, part, num_parts, start)

  reading_documents = reading.documents
  monkeypatch.setattr(reading, 'documents', documents)
  opened(c4).restore(tmp_path, 43)

  assert any(read[:3])


def test_a_place_is_small_whatever_was_read(c4, tmp_path):
  source = opened(c4)
  windows(source, 100)
  source.save(tmp_path, keep=[])

  assert (tmp_path / 'places' / '100' / 'host-0-of-1.json').stat().st_size < 400


def test_places_that_no_checkpoint_needs_are_removed(c4, tmp_path):
  source = opened(c4)
  for step in range(5):
    source.batch(step)
    source.save(tmp_path, keep=[1, 4] if step == 4 else [1])

  # 4 may still be on its way when 5 is saved, and 5 is not there yet.
  assert sorted(path.name for path in (tmp_path / 'places').iterdir()) == ['1', '4', '5']


def test_the_place_of_a_checkpoint_that_is_on_its_way_stays(run, tmp_path, monkeypatch):
  """A kill before the newest is whole leaves the one before, whose place must be there."""
  seen = []

  class Checkpoints(checkpoint.Checkpoints):
    def save(self, step, state, validation_loss):
      super().save(step, state, validation_loss)
      whole = [int(path.name) for path in (tmp_path / 'run' / 'checkpoints').glob('[0-9]')]
      places = [int(path.name) for path in (tmp_path / 'run' / 'places').iterdir()]
      seen.append(set(whole) <= set(places))

  monkeypatch.setattr(checkpoint, 'Checkpoints', Checkpoints)
  steps = {'steps': 9, 'checkpoint_every': 1, 'keep_latest': 1}
  config = dataclasses.replace(run, train=dataclasses.replace(run.train, **steps))
  train.train(config, tmp_path / 'run')

  assert seen == 9 * [True]
  assert len(list((tmp_path / 'run' / 'places').iterdir())) <= 4


def test_hosts_read_different_documents(c4, in_order):
  found = [windows(opened(c4, index, 2), 60)[:, 1:] for index in range(2)]

  read = [set(documents_of(of_host.ravel().tolist())) for of_host in found]
  assert all(read)
  assert read[0] | read[1] == set(map(tokens_of, TRAIN))
  assert not read[0] & read[1]


@pytest.fixture
def parts(tmp_path, monkeypatch):
  """A Task over five files in four parts or five, of which the first is longer than the others."""
  monkeypatch.setattr(reading, '_PART_BYTES', 1)
  for number, count in enumerate((4, 2, 2, 2, 2)):
    texts = [f'Of {number}, {line}: {"on and " * 9}on.' for line in range(count)]
    write_lines(tmp_path / f'{number}.jsonl', texts)
  task = tasks.get_task(Spec('jsonl', files={'train': str(tmp_path / '*.jsonl')}))
  assert len(reading.filled_parts(task, 'train')) >= 4
  return task


def hosts(task, count, rows):
  return [opened(task, index, count, rows=rows) for index in range(count)]


@pytest.mark.parametrize('step', [1, 7])
@pytest.mark.parametrize('count', [2, 4])
def test_each_of_several_hosts_goes_on_with_its_very_next_batch(parts, count, step, tmp_path):
  unbroken = hosts(parts, count, rows=4)
  for host in unbroken:
    windows(host, step)
    host.save(tmp_path, keep=[])
  expected = [windows(host, 30, start=step) for host in unbroken]

  resumed = hosts(parts, count, rows=4)
  for host in resumed:
    host.restore(tmp_path, step)
  found = [windows(host, 30, start=step) for host in resumed]

  assert [of.shape for of in found] == count * [(30 * 4 // count, LENGTH + 1)]
  assert np.array_equal(found, expected)
  names = {f'host-{index}-of-{count}.json' for index in range(count)}
  assert {path.name for path in (tmp_path / 'places' / str(step)).iterdir()} == names


@pytest.mark.parametrize('count', [1, 2, 4])
def test_an_epoch_of_all_hosts_is_the_documents_each_once_a_stop_on_the_way_or_not(
  parts, count, in_order, tmp_path
):
  read = [[] for _ in range(count)]
  for step in range(0, 150, 15):  # a kill after every 15 batches
    for index, host in enumerate(hosts(parts, count, rows=count)):
      if step:
        host.restore(tmp_path, step)
      read[index] += windows(host, 15, start=step)[:, 1:].ravel().tolist()
      host.save(tmp_path, keep=[step + 15])

  first_epochs = []
  for documents in map(documents_of, read):
    distinct = len(set(documents))
    assert len(documents) > distinct
    first_epochs += documents[:distinct]
  texts = reading.texts(parts, 'train')
  assert sorted(first_epochs) == sorted(tokens_of(text.decode()) for text in texts)


@pytest.mark.parametrize('saved_by, count', [(2, 4), (4, 2), (2, 1)])
def test_another_number_of_hosts_is_refused_and_the_right_one_is_named(
  parts, saved_by, count, tmp_path
):
  for host in hosts(parts, saved_by, rows=4):
    windows(host, 1)
    host.save(tmp_path, keep=[])

  for host in hosts(parts, count, rows=4):
    message = f'{tmp_path}/places/1. has places .* for process_count={saved_by}, not {count}; '
    with pytest.raises(errors.UserError, match=f'{message}go on with {saved_by} hosts'):
      host.restore(tmp_path, 1)
  for host in hosts(parts, saved_by, rows=4):  # as it says
    host.restore(tmp_path, 1)
    windows(host, 1, start=1)


def test_the_place_of_one_host_that_is_gone_is_named(parts, tmp_path):
  for host in hosts(parts, 2, rows=4):
    windows(host, 1)
    host.save(tmp_path, keep=[])
  (tmp_path / 'places' / '1' / 'host-1-of-2.json').unlink()

  first, second = hosts(parts, 2, rows=4)
  first.restore(tmp_path, 1)
  with pytest.raises(
    errors.UserError, match='1/host-1-of-2.json., the place .*: No such file .*; delete'
  ):
    second.restore(tmp_path, 1)


def test_a_seed_is_another_order(c4):
  first, second = (windows(opened(c4, seed=seed), 4).tolist() for seed in (1, 2))

  assert first != second


@pytest.fixture
def run(tmp_path):
  """The config of a run over lines."""
  texts = [9 * text for text in TEXTS]
  data = {
    'task': 'jsonl',
    'directory': str(tmp_path / 'prepared'),
    'train_files': write_lines(tmp_path / 'train.jsonl', texts)['train'],
    'validation_files': write_lines(tmp_path / 'validation.jsonl', texts)['train'],
  }
  steps = {'steps': 4, 'checkpoint_every': 2, 'keep_latest': 2}
  return tiny.config(data, data={'streaming': True, 'length': 16}, train=steps)


def test_a_resumed_run_ends_as_an_unbroken_one(run, tmp_path):
  unbroken = train.train(run, tmp_path / 'run')

  shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '4')  # as if killed after step 2
  resumed = train.train(run, tmp_path / 'run')

  for kept, again in zip(*map(jax.tree.leaves, (unbroken, resumed)), strict=True):
    assert np.array_equal(kept, again)
  assert not list((tmp_path / 'prepared').glob('*train*'))
  # From data that have changed it does not go on.
  write_lines(tmp_path / 'train.jsonl', TEXTS)
  with pytest.raises(errors.UserError, match='the train data have changed'):
    train.train(run, tmp_path / 'run')


def test_a_place_that_was_not_saved_is_refused(c4, tmp_path):
  source = opened(c4)
  windows(source, 1)
  source.save(tmp_path, keep=[])

  message = "places/7/host-0-of-1.json', the place of this host in the data, is unreadable: No such"
  with pytest.raises(errors.UserError, match=message):
    opened(c4).restore(tmp_path, 7)


@pytest.fixture
def saved(c4, tmp_path):
  """The file of a place after a batch."""
  source = opened(c4)
  windows(source, 1)
  source.save(tmp_path, keep=[])
  return tmp_path / 'places' / '1' / 'host-0-of-1.json'


@pytest.mark.parametrize('change', [lambda text: text[:-9], lambda text: '[]', lambda text: '{}'])
def test_a_damaged_place_is_refused(c4, saved, change):
  saved.write_text(change(saved.read_text()))

  with pytest.raises(errors.UserError, match='1/host-0-of-1.json. is damaged: .* delete the check'):
    opened(c4).restore(saved.parents[2], 1)


@pytest.mark.parametrize('change', [{'taken': 3}, {'taken': '2'}, {'place': {}}, {'more': 1}])
def test_a_place_that_somebody_changed_is_refused(c4, saved, change):
  saved.write_text(json.dumps({**json.loads(saved.read_text()), **change}))

  with pytest.raises(errors.UserError, match='is damaged: .*its hash is another'):
    opened(c4).restore(saved.parents[2], 1)


def test_a_place_in_other_data_is_refused(c4, saved):
  with pytest.raises(
    errors.UserError, match=r"place in other data, .*'seed': 3.*, not .*'seed': 4"
  ):
    opened(c4, seed=4).restore(saved.parents[2], 1)


def test_a_place_that_cannot_be_written_is_a_users_error(c4, tmp_path):
  source = opened(c4)
  windows(source, 1)
  (tmp_path / 'places').touch()

  with pytest.raises(errors.UserError, match="cannot write '.*/places/1/host-0-of-1.json': "):
    source.save(tmp_path, keep=[])


def test_parts_without_files_are_no_hosts_share(tmp_path, monkeypatch):
  monkeypatch.setattr(reading, '_PART_BYTES', 1000)
  big = ['word ' * 1000]
  for name, texts in {'a': big, 'b': TRAIN, 'c': TRAIN, 'd': TRAIN}.items():
    write_lines(tmp_path / f'{name}.jsonl', texts)
  task = tasks.get_task(Spec('jsonl', files={'train': str(tmp_path / '*.jsonl')}))
  filled = reading.filled_parts(task, 'train')
  assert len(filled) < reading.parts(task, 'train')

  for host in range(len(filled)):
    windows(opened(task, host, len(filled), rows=len(filled)), 2)
  with pytest.raises(errors.UserError, match=f'in {len(filled)} parts of whole files'):
    opened(task, 0, len(filled) + 1, rows=len(filled) + 1)


def test_more_hosts_than_parts_are_refused(c4):
  with pytest.raises(errors.UserError, match='in 3 parts.* too few for process_count=64'):
    opened(c4, 0, 64, rows=64)


def test_questions_are_refused():
  with pytest.raises(errors.UserError, match="'copy.*' asks questions; "):
    opened(tasks.get_task(Spec('copy')))


def test_a_line_that_is_wrong_is_told_to_who_reads(tmp_path):
  files = write_lines(tmp_path / 'bad.jsonl', TRAIN)
  with (tmp_path / 'bad.jsonl').open('a') as file:
    file.write('{"text": 3}\n')

  with pytest.raises(errors.UserError, match=r'bad\.jsonl. line 10'):
    windows(opened(tasks.get_task(Spec('jsonl', files=files))), 100)


def test_a_split_without_documents_is_refused():
  name = 'no_documents'
  if name not in seqio.TaskRegistry.names():
    seqio.TaskRegistry.add(
      name,
      source=seqio.FunctionDataSource(
        lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensors({'targets': [1]}).take(
          0
        ),
        splits=('train',),
      ),
      preprocessors=[],
      output_features={'targets': seqio.Feature(seqio.ByteVocabulary(), add_eos=True)},
    )

  with pytest.raises(errors.UserError, match='no document in any of 1 parts; '):
    windows(opened(tasks.get_task(Spec(name))), 1)


def test_a_step_out_of_turn_is_a_defect(c4):
  with pytest.raises(ValueError, match=re.escape('step=1 does not follow -1')):
    opened(c4).batch(1)


def test_a_place_before_the_first_batch_is_a_defect(c4, tmp_path):
  with pytest.raises(ValueError, match='nothing was read'):
    opened(c4).save(tmp_path, keep=[])
