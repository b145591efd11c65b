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
  'super_glue_rte': ('RTE.jsonl', ['entailment', 'not_entailment']),
  'super_glue_wic': ('WiC.jsonl', {'False': 'false', 'True': 'true'}),
  'super_glue_wsc.fixed': ('WSC.jsonl', ['False', 'True']),
}


def read(path):
  """Returns [(id, label as text)] of a file to hand in."""
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
  predictions = {str(number): f' {word}\n' for number, word in enumerate(labels)}

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
