"""Tests of `lex_fire/data/glue.py`: examples of GLUE and SuperGLUE as questions in text."""

import pytest
from tiny_glue import WSC

from lex_fire import errors
from lex_fire.data import glue, questions, reading, tasks
from lex_fire.data.spec import Spec

pytest.importorskip('seqio')
ALL = [(benchmark, name) for benchmark, table in glue.BENCHMARKS.items() for name in table]


def rendered(benchmark, config, example):
  import tensorflow as tf

  found = glue.render(config, glue.BENCHMARKS[benchmark][config], example)
  return {key: tf.convert_to_tensor(value).numpy().decode() for key, value in found.items()}


def published(benchmark, config):
  """TFDS' own description of a dataset, which costs no download."""
  import tensorflow_datasets as tfds

  return tfds.builder_cls(benchmark).builder_configs[config]


@pytest.mark.parametrize('benchmark, config', ALL)
def test_a_question_names_its_task_and_each_field_in_order(benchmark, config):
  template = glue.BENCHMARKS[benchmark][config]
  spans = {'span1_text': 'a', 'span1_index': 0, 'span2_text': 'b', 'span2_index': 1}
  example = {field: f'text {n}' for n, field in enumerate(template.fields)}
  others = {'idx': dict.fromkeys(template.index, 7) or 7, 'label': -1, 'answers': ''}

  found = rendered(benchmark, config, {**example, **spans, **others})

  expected = ' '.join(f'{field}: text {n}' for n, field in enumerate(template.fields))
  if config == 'wsc.fixed':  # the one with marks
    expected = 'text: * text * # 0 #'
  number = {'multirc': '7-7-7'}.get(config, '7')
  assert found == {'id': number, 'inputs': f'{config.partition(".")[0]} {expected}', 'targets': ''}


@pytest.mark.parametrize('benchmark, config', ALL)
def test_a_template_is_of_the_dataset_in_tfds(benchmark, config):
  template, found = glue.BENCHMARKS[benchmark][config], published(benchmark, config)

  assert str(found.version) == glue._VERSIONS[benchmark]
  features = found.features if benchmark == 'super_glue' else found.text_features
  used = {f'{name}_text' for name, _ in template.spans} | set(template.fields)
  used |= {'answers'} if template.words is None else set()
  assert set(features) - used <= {'span1_index', 'span2_index', 'start1', 'start2', 'end1', 'end2'}
  assert used <= set(features)
  if template.words is not None:
    assert template.words == tuple(found.label_classes or ())


# The tasks' examples in Raffel et al. 2020, appendix D (of MNLI but the beginnings of its texts).
@pytest.mark.parametrize(
  'config, example, inputs, targets',
  [
    (
      'cola',
      {'sentence': 'John made Bill master of himself.', 'label': 1},
      'cola sentence: John made Bill master of himself.',
      'acceptable',
    ),
    (
      'mnli',
      {
        'hypothesis': 'The St. Louis Cardinals have always won.',
        'premise': 'yeah well losing is',
        'label': 2,
      },
      'mnli hypothesis: The St. Louis Cardinals have always won. premise: yeah well losing is',
      'contradiction',
    ),
    (
      'stsb',
      {'sentence1': 'Representatives for Puretunes', 'sentence2': 'Puretunes', 'label': 3.25},
      'stsb sentence1: Representatives for Puretunes sentence2: Puretunes',
      '3.2',
    ),
  ],
)
def test_questions_are_in_the_words_of_t5(config, example, inputs, targets):
  found = rendered('glue', config, {'idx': 0, **example})

  assert found == {'id': '0', 'inputs': inputs, 'targets': targets}


@pytest.mark.parametrize(
  'label, answer', [(5.0, '5.0'), (0.0, '0.0'), (2.57, '2.6'), (2.51, '2.6'), (-1.0, '')]
)
def test_scores_are_rounded_to_a_fifth(label, answer):
  example = {'sentence1': '', 'sentence2': '', 'idx': 0, 'label': label}

  assert rendered('glue', 'stsb', example)['targets'] == answer


@pytest.mark.parametrize('benchmark, config', ALL)
def test_an_answer_is_no_longer_than_its_limit(benchmark, config):
  template = glue.BENCHMARKS[benchmark][config]
  limit = glue.QUESTIONS[f'{benchmark}_{config}'](Spec(f'{benchmark}_{config}')).answer_bytes

  longest = 'x' * 128 if template.words is None else max(template.words or ('5.0',), key=len)
  assert len(longest.encode()) == limit


def test_spans_are_marked_by_the_number_of_their_first_word():
  turned = {
    **WSC,
    **{f'span1_{key}': WSC[f'span2_{key}'] for key in ('text', 'index')},
    **{f'span2_{key}': WSC[f'span1_{key}'] for key in ('text', 'index')},
  }

  found = rendered('super_glue', 'wsc.fixed', {**WSC, 'idx': 0, 'label': 1})
  other = rendered('super_glue', 'wsc.fixed', {**turned, 'idx': 0, 'label': 0})

  marked = 'wsc text: Mark told Pete # many lies, # which * Pete * told him.'
  assert (found['inputs'], found['targets']) == (marked, 'True')
  swapped = marked.translate({ord('*'): '#', ord('#'): '*'})
  assert (other['inputs'], other['targets']) == (swapped, 'False')


@pytest.fixture
def directory(glue_directory):
  return str(glue_directory)


def test_a_task_over_tfds_gives_questions(directory):
  task = tasks.get_task(Spec('glue_sst2', tfds_directory=directory))

  found = list(questions.examples(task, 'validation'))

  assert len(found) == 4
  assert ('2', 'sst2 sentence: good', ('positive',), {}) in found
  assert ('3', 'sst2 sentence: bad', ('negative',), {}) in found


def test_a_withheld_label_is_no_reference(directory):
  task = tasks.get_task(Spec('super_glue_wsc.fixed', tfds_directory=directory))

  found = list(questions.examples(task, 'validation'))

  assert {example.id: example.references for example in found} == {'4': ('False',), '5': ()}


def test_a_query_of_record_is_in_the_words_of_t5():
  # The example of its preprocessor (t5/data/preprocessors.py), but for its second answer there,
  # which contradicts the sentence before.
  example = {
    'passage': 'This is the passage.',
    'query': 'A @placeholder is a bird.',
    'entities': ['penguin', 'potato', 'pigeon'],
    'answers': ['penguin', 'pigeon'],
    'idx': {'passage': 1, 'query': 2},
  }

  found = glue.render('record', glue.SUPER_GLUE['record'], example)

  expected = (
    'record query: A @placeholder is a bird. entities: penguin, potato, pigeon '
    'passage: This is the passage.'
  )
  assert (found['id'], found['inputs'], found['targets']) == (
    *(b'2', expected.encode()),
    ['penguin', 'pigeon'],
  )


def test_the_options_of_an_answer_are_questions_of_one_group(directory):
  task = tasks.get_task(Spec('super_glue_multirc', tfds_directory=directory))

  found = {made.id: made for made in questions.examples(task, 'validation')}

  assert found['3-1-10'][1:3] == (
    'multirc question: 1? answer: It is 10. paragraph: Sent 1: Of 3. So it is.',
    ('True',),
  )
  assert {name: made.references for name, made in found.items()} == {
    '3-1-9': ('False',),
    **dict.fromkeys(('3-1-10', '3-2-0', '12-30-0'), ('True',)),
  }


def test_multirc_is_scored_by_options_and_by_questions(directory):
  # An option is wrong of the first of three questions: 2 of 3 are right. Of three options that are
  # right all are found, and one that is not: precision 3 / 4, recall 1, F = 6 / 7.
  task = tasks.get_task(Spec('super_glue_multirc', tfds_directory=directory))
  found = list(questions.examples(task, 'validation'))
  question = glue.question(Spec('super_glue_multirc'))

  targets = [made.references for made in found]
  judges = question.judges([made.id for made in found])
  values = [metric(targets, ['True'] * len(found)) for metric in judges]

  expected = [{'f1_of_class': 600 / 7}, {'exact_match_of_groups': 200 / 3}]
  assert values == [pytest.approx(value) for value in expected]


def test_a_query_is_one_question_with_all_answers_and_a_row_of_training_for_each(directory):
  task = tasks.get_task(Spec('super_glue_record', tfds_directory=directory))

  found = {made.id: made for made in questions.examples(task, 'train')}
  rows = [
    (row['id'].decode(), row['targets_pretokenized'].decode())
    for row in reading.examples(task, 'train')
  ]

  assert found['7'][1:] == (
    'record query: 7 went to @placeholder. entities: New York, Oslo, the Hague '
    'passage: It was 7. All went. None came',
    ('New York', 'the Hague'),
    {},
  )
  assert {name: made.references for name, made in found.items()} == {
    '5': (),
    '6': ('Oslo',),
    '7': ('New York', 'the Hague'),
  }
  assert sorted(rows) == [('5', ''), ('6', 'Oslo'), ('7', 'New York'), ('7', 'the Hague')]


def test_mnli_has_two_splits_of_validation_and_of_test():
  task = tasks.get_task(Spec('glue_mnli'))

  assert set(task.splits) == {
    *('train', 'validation', 'validation_mismatched', 'test', 'test_mismatched')
  }


@pytest.mark.parametrize('split, in_tfds', glue.GLUE['mnli'].splits.items())
def test_a_split_of_mnli_is_one_of_tfds(split, in_tfds, directory):
  task = tasks.get_task(Spec('glue_mnli', tfds_directory=directory))

  (found,) = questions.examples(task, split)

  assert found.inputs == f'mnli hypothesis: A. premise: In {in_tfds}.'
  assert reading.parts(task, split) == 1
  assert reading.fingerprint(task, split).startswith('glue/mnli:2.0.0-1-1-')


def test_a_task_takes_neither_files_nor_options():
  with pytest.raises(errors.UserError, match="'glue_rte' takes no files"):
    tasks.get_task(Spec('glue_rte', files={'train': '*.tsv'}))
  with pytest.raises(errors.UserError, match="'glue_rte:count=1' has no option 'count=1'"):
    tasks.get_task(Spec('glue_rte:count=1'))


@pytest.mark.parametrize('benchmark, config', ALL)
def test_the_metrics_of_a_task_give_full_marks_to_the_answers(benchmark, config):
  words = glue.BENCHMARKS[benchmark][config].words or ('1.0', '2.0', '3.2')
  question = glue.QUESTIONS[f'{benchmark}_{config}'](Spec(f'{benchmark}_{config}'))

  for metric in question.judges([f'7-{number}' for number in range(len(words))]):
    for value in metric([(word,) for word in words], words).values():
      assert value == pytest.approx(100)
