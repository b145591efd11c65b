"""Tests of `lex_fire/data/glue_submission.py`: what is handed in to GLUE and SuperGLUE."""

import json

import pytest

from lex_fire import errors
from lex_fire.data import glue, glue_submission

# {task: (file, label of each word)} as t5/scripts/prepare_glue_submission.py has them: names from
# FILE_NAME_MAP, words of TFDS for USES_TEXT, its special cases, and class numbers for all others.
EXPECTED = {
  'glue_cola': ('CoLA.tsv', {'unacceptable': 0, 'acceptable': 1}),
  'glue_sst2': ('SST-2.tsv', {'negative': 0, 'positive': 1}),
  'glue_mrpc': ('MRPC.tsv', {'not_equivalent': 0, 'equivalent': 1}),
  'glue_qqp': ('QQP.tsv', {'not_duplicate': 0, 'duplicate': 1}),
  'glue_stsb': ('STS-B.tsv', {'2.6': 2.6}),
  'glue_mnli': ('MNLI-m.tsv', ['entailment', 'neutral', 'contradiction']),
  'glue_qnli': ('QNLI.tsv', ['entailment', 'not_entailment']),
  'glue_rte': ('RTE.tsv', ['entailment', 'not_entailment']),
  'glue_wnli': ('WNLI.tsv', {'not_entailment': 0, 'entailment': 1}),
  'super_glue_boolq': ('BoolQ.jsonl', {'False': 'false', 'True': 'true'}),
  'super_glue_cb': ('CB.jsonl', ['entailment', 'contradiction', 'neutral']),
  'super_glue_copa': ('COPA.jsonl', {'choice1': 0, 'choice2': 1}),
  'super_glue_multirc': ('MultiRC.jsonl', {'False': 0, 'True': 1}),
  'super_glue_record': ('ReCoRD.jsonl', ['Oslo', 'the Hague']),
  'super_glue_rte': ('RTE.jsonl', ['entailment', 'not_entailment']),
  'super_glue_wic': ('WiC.jsonl', {'False': 'false', 'True': 'true'}),
  'super_glue_wsc.fixed': ('WSC.jsonl', ['False', 'True']),
}


def read(path):
  """Returns [(id, label as text)] of a file to hand in."""
  if path.stem == 'MultiRC':
    return [
      (int(f'{line["idx"]}{question["idx"]}{answer["idx"]}'), answer['label'])
      for line in map(json.loads, path.read_text().splitlines())
      for question in line['passage']['questions']
      for answer in question['answers']
    ]
  if path.suffix == '.jsonl':
    rows = map(json.loads, path.read_text().splitlines())
    return [(row['idx'], row['label']) for row in rows]
  head, *rows = (line.split('\t') for line in path.read_text().splitlines())
  assert head == ['index', 'prediction']
  return [(int(name), label) for name, label in rows]


@pytest.mark.parametrize('task', glue.TASKS)
def test_a_task_has_the_file_and_the_labels_of_its_benchmark(task, tmp_path):
  name, labels = EXPECTED[task]
  labels = labels if isinstance(labels, dict) else {word: word for word in labels}
  prefix = '0-0-' if task == 'super_glue_multirc' else ''
  predictions = {f'{prefix}{number}': f' {word}\n' for number, word in enumerate(labels)}

  path, unclear = glue_submission.write(tmp_path / 'new', task, 'test', predictions)

  expected = list(enumerate(labels.values()))
  if name.endswith('.tsv'):
    expected = [(number, str(label)) for number, label in expected]
  assert (path, unclear) == (tmp_path / 'new' / name, 0)
  assert read(path) == expected


def test_the_two_test_splits_of_mnli_are_two_files(tmp_path):
  path, _ = glue_submission.write(tmp_path, 'glue_mnli', 'test_mismatched', {'0': 'neutral'})

  assert path.name == 'MNLI-mm.tsv'
  assert set(glue_submission.FILES) == {
    *((task, 'test') for task in glue.TASKS),
    ('glue_mnli', 'test_mismatched'),
  }


def test_rows_are_in_the_order_of_their_numbers(tmp_path):
  predictions = {'10': 'negative', '9': 'positive', '100': 'positive'}

  path, _ = glue_submission.write(tmp_path, 'glue_sst2', 'test', predictions)

  assert read(path) == [(9, '1'), (10, '0'), (100, '1')]


def test_a_line_of_multirc_is_a_paragraph_with_its_questions_and_their_answers(tmp_path):
  # The form that t5/scripts/prepare_glue_submission.py writes, and the data have.
  right = dict.fromkeys(['3-10-0', '3-9-1', '12-2-0'], 'True')
  wrong = dict.fromkeys(['3-9-0', '3-9-10', '3-9-2'], 'False')

  path, unclear = glue_submission.write(
    tmp_path, 'super_glue_multirc', 'test', {**right, **wrong, '12-2-1': 'Perhaps'}
  )

  def question(name, *labels):
    numbers = (0, 1, 2, 10)
    answers = [{'idx': n, 'label': x} for n, x in zip(numbers, labels, strict=False)]
    return {'idx': name, 'answers': answers}

  assert [json.loads(line) for line in path.read_text().splitlines()] == [
    {'idx': 3, 'passage': {'questions': [question(9, 0, 1, 0, 0), question(10, 1)]}},
    {'idx': 12, 'passage': {'questions': [question(2, 1, 0)]}},
  ]
  assert unclear == 1


def test_record_takes_any_text(tmp_path):
  path, unclear = glue_submission.write(
    tmp_path, 'super_glue_record', 'test', {'10': ' the "Hague"\n', '9': ''}
  )

  assert path.read_text() == ('{"idx": 9, "label": ""}\n{"idx": 10, "label": "the \\"Hague\\""}\n')
  assert unclear == 0


@pytest.mark.parametrize(
  'task, answers, count, labels',
  [
    ('glue_sst2', ['positive', 'Positive', ''], 2, ['1', '0', '0']),
    ('glue_rte', ['not_entailment', 'not'], 1, ['not_entailment', 'entailment']),
    ('glue_stsb', ['5.0', '5.2', '-1', 'nan', 'two', '0'], 4, ['5.0', *['0.0'] * 5]),
    ('super_glue_copa', ['choice2', 'choice3'], 1, [1, 0]),
  ],
)
def test_answers_that_have_no_place_are_counted_and_are_the_first_word(
  task, answers, count, labels, tmp_path
):
  path, unclear = glue_submission.write(
    tmp_path, task, 'test', dict(zip('012345', answers, strict=False))
  )

  assert unclear == count
  assert [label for _, label in read(path)] == labels


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
  (tmp_path / 'file').write_text('')

  with pytest.raises(errors.UserError, match=f"cannot write in '{tmp_path}/file/x': Not a direct"):
    glue_submission.write(tmp_path / 'file' / 'x', 'glue_rte', 'test', {'0': 'entailment'})
