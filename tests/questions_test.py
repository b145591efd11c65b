"""Tests of `lex_fire/data/questions.py`, and of the Tasks of the algorithms."""

import itertools

import pytest

from lex_fire import errors
from lex_fire.data import algorithm_tasks, algorithms, questions, reading, tasks, vocabularies
from lex_fire.data.spec import Spec

seqio = pytest.importorskip('seqio')
SMALL = 'length=5,count=13,held_out=10,seed=3'


def of(name, split):
  return list(questions.examples(tasks.get_task(Spec(name)), split))


@pytest.mark.parametrize(
  'name, split, hints',
  [
    *((name, 'test', False) for name in algorithms.ALGORITHMS),
    ('addition', 'train', False),
    ('addition', 'validation', True),
  ],
)
def test_a_task_of_an_algorithm_has_the_examples_of_its_generator(name, split, hints):
  found = of(f'{name}:{SMALL},hints={str(hints).lower()}', split)

  count = 13 if split == 'train' else 10
  expected = algorithms.examples(name, split, length=5, count=count, seed=3, hints=hints)
  assert found == list(expected)


def test_an_example_has_tokens_texts_an_id_and_facts():
  task = tasks.get_task(Spec(f'reverse:{SMALL}'))

  example = next(reading.examples(task, 'validation'))
  expected = next(algorithms.examples('reverse', 'validation', length=5, count=1, seed=3))

  assert example['inputs'].tolist() == [ord(character) + 3 for character in expected.inputs]
  assert example['targets'].tolist() == [ord(c) + 3 for c in expected.references[0]] + [1]
  assert example['inputs_pretokenized'].decode() == expected.inputs
  assert example['targets_pretokenized'].decode() == expected.references[0]
  assert (example['id'].decode(), example['length']) == (expected.id, 2)


@pytest.mark.parametrize('count, num_parts', [(13, 3), (2, 3)])
def test_the_parts_of_a_split_are_the_split(count, num_parts):
  task = tasks.get_task(Spec(f'sort:length=5,count={count}'))

  parts = [list(reading.examples(task, 'train', part, num_parts)) for part in range(num_parts)]

  whole = list(reading.examples(task, 'train'))
  assert [e['id'] for e in itertools.chain(*parts)] == [e['id'] for e in whole]
  assert max(map(len, parts)) - min(map(len, parts)) == 1


@pytest.mark.parametrize('count, parts', [(1, 1), (10_000, 1), (10_001, 2), (100_000, 10)])
def test_a_split_has_as_many_parts_as_its_count_asks_for(count, parts):
  task = tasks.get_task(Spec(f'copy:count={count}'))

  assert reading.parts(task, 'train') == parts
  assert reading.num_documents(task, 'train') == count


@pytest.mark.parametrize(
  'hints, length, vocabulary',
  [(False, 5, 'bytes'), (True, 5, 'bytes'), (False, 18, 'latin'), (True, 18, 'latin')],
)
@pytest.mark.parametrize('name', algorithms.ALGORITHMS)
def test_the_limit_of_answers_is_the_length_of_the_longest(name, hints, length, vocabulary):
  asked = f'count=40,held_out=10,seed=3,length={length},hints={str(hints).lower()}'
  question = tasks.QUESTIONS[name](Spec(f'{name}:{asked}', vocabulary))

  made = [
    *algorithms.examples(name, 'test', length=length, count=20, seed=3, hints=hints),
    *algorithms.examples(name, 'train', length=length, count=20, seed=3, hints=hints),
  ]
  encode = vocabularies.load(vocabulary).encode
  assert question.answer_bytes == max(len(encode(example.references[0])) for example in made)
  assert {question.facts} == {tuple(example.facts) for example in made}


def test_options_left_out_are_the_same_task():
  task = tasks.get_task(Spec('addition'))

  assert tasks.get_task(Spec('addition:length=20,hints=false,count=50000,seed=0')) is task
  assert tasks.get_task(Spec('addition:seed=1')) is not task


@pytest.mark.parametrize(
  'name, message',
  [
    ('parity:size=3', "task 'parity:size=3' has no option 'size=3'; known: length, hints, lengths"),
    ('parity:length=1', 'length=1 has no half to evaluate'),
    ('parity:count=0', 'count=0 is no number of examples'),
    ('parity:held_out=-2', 'count=-2 is no number of examples'),
    ('parity:length=100,hints=true', 'the 486 index hints are too few'),
    (
      'parity:length=8,hints=true',
      "the 64 index hints of .* 'bytes'; use 'latin'",
    ),
    ('parity:lengths=short', "unknown lengths='short'; known: uniform, log_uniform"),
  ],
)
def test_wrong_options_are_refused_before_anything_is_read(name, message):
  with pytest.raises(errors.UserError, match=message):
    tasks.get_task(Spec(name))
  with pytest.raises(errors.UserError, match=message):
    tasks.QUESTIONS['parity'](Spec(name))


def test_a_task_of_an_algorithm_takes_no_files():
  with pytest.raises(errors.UserError, match="'copy' takes no files"):
    tasks.get_task(Spec('copy', files={'train': '*.txt'}))


def render(example):
  return {'id': example['name'], 'inputs': example['asked'], 'targets': example['answer']}


@pytest.fixture
def add():
  """Registers a Task over examples given in memory, and removes it after the test."""
  import tensorflow as tf

  names = []

  def register(rows, metrics=()):
    columns = {key: [row[key] for row in rows] for key in rows[0]}

    def dataset(split, shuffle_files, seed=None):
      return tf.data.Dataset.from_tensor_slices(columns)

    source = seqio.FunctionDataSource(dataset, splits=['test'])
    question = questions.Question(metrics, 10)
    names.append(f'in_memory_{len(names)}')
    return questions.add(names[-1], Spec(names[-1]), question, lambda: source, render)

  yield register
  for name in names:
    seqio.TaskRegistry.remove(f'{name}_bytes')


def rows(*triples):
  return [dict(zip(('name', 'asked', 'answer'), triple, strict=True)) for triple in triples]


def test_a_question_stands_where_it_is_first_with_all_answers_in_order(add):
  task = add(rows(('b', 'B?', 'two'), ('a', 'A?', 'one'), ('b', 'B?', 'zwei'), ('b', 'B?', 'two')))

  found = list(questions.examples(task, 'test'))

  assert found == [('b', 'B?', ('two', 'zwei', 'two'), {}), ('a', 'A?', ('one',), {})]


def test_an_answer_that_is_withheld_is_none(add):
  found = list(questions.examples(add(rows(('a', 'A?', ''), ('b', 'B?', 'one'))), 'test'))

  assert [example.references for example in found] == [(), ('one',)]


def test_an_unknown_split_is_refused(add):
  with pytest.raises(errors.UserError, match="no split 'train'; it has: test"):
    list(questions.examples(add(rows(('a', 'A?', 'one'))), 'train'))


def test_the_metrics_of_a_task_judge_in_seqios_evaluator(add, tmp_path):
  from lex_fire import scores

  task = add(rows(('a', 'A?', 'one'), ('b', 'B?', 'two words')), (scores.f1, scores.accuracy))
  evaluator = seqio.Evaluator(
    task.name,
    seqio.DecoderFeatureConverter(pack=False),
    eval_split='test',
    sequence_length={'inputs': 8, 'targets': 16},
    use_memory_cache=False,
  )
  answers = ['one', 'two']

  def predict(dataset, *unused):
    tokens = [seqio.ByteVocabulary().encode(answer) for answer in answers]
    return [(index, row + [1] + [0] * (8 - len(row))) for index, row in enumerate(tokens)]

  metrics, *_ = evaluator.evaluate(
    compute_metrics=True, step=0, predict_fn=predict, score_fn=lambda *unused: []
  )

  # 'two' for 'two words': precision 1, recall 1/2, F1 2/3
  found = metrics.result()[task.name]
  assert found['f1'] == pytest.approx(100 * (1 + 2 / 3) / 2)
  assert found['accuracy'] == 50


def test_every_task_of_questions_is_a_task():
  assert set(tasks.QUESTIONS) <= set(tasks.TASKS)
  assert set(algorithm_tasks.TASKS) == set(algorithms.ALGORITHMS)
