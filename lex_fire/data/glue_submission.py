"""Answers to the test splits of GLUE and SuperGLUE, in the files that the benchmarks take.

GLUE takes tables of `index` and `prediction`, SuperGLUE JSON lines of `idx` and `label`; names and
labels are those that T5's authors hand in (https://github.com/google-research/
text-to-text-transfer-transformer, t5/scripts/prepare_glue_submission.py). A line of MultiRC is a
paragraph, with its questions and their answers. The benchmarks want the files of all their tasks
together, those of the diagnostic sets (AX, AX-b, AX-g) too, which are not here.
"""

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lex_fire.data import files, glue


class File(NamedTuple):
  """What a benchmark takes for a split of a task.

  Attributes:
    name: of the file.
    labels: for each of the task's words; (): the words themselves, or numbers or any texts.
  """

  name: str
  labels: tuple[int | str, ...] = ()


_NUMBERS, _TRUTH = (0, 1), ('false', 'true')
# {(task, split): ...}
FILES = {
  ('glue_cola', 'test'): File('CoLA.tsv', _NUMBERS),
  ('glue_sst2', 'test'): File('SST-2.tsv', _NUMBERS),
  ('glue_mrpc', 'test'): File('MRPC.tsv', _NUMBERS),
  ('glue_qqp', 'test'): File('QQP.tsv', _NUMBERS),
  ('glue_stsb', 'test'): File('STS-B.tsv'),
  ('glue_mnli', 'test'): File('MNLI-m.tsv'),
  ('glue_mnli', 'test_mismatched'): File('MNLI-mm.tsv'),
  ('glue_qnli', 'test'): File('QNLI.tsv'),
  ('glue_rte', 'test'): File('RTE.tsv'),
  ('glue_wnli', 'test'): File('WNLI.tsv', _NUMBERS),
  ('super_glue_boolq', 'test'): File('BoolQ.jsonl', _TRUTH),
  ('super_glue_cb', 'test'): File('CB.jsonl'),
  ('super_glue_copa', 'test'): File('COPA.jsonl', _NUMBERS),
  ('super_glue_multirc', 'test'): File('MultiRC.jsonl', _NUMBERS),
  ('super_glue_record', 'test'): File('ReCoRD.jsonl'),
  ('super_glue_rte', 'test'): File('RTE.jsonl'),
  ('super_glue_wic', 'test'): File('WiC.jsonl', _TRUTH),
  ('super_glue_wsc.fixed', 'test'): File('WSC.jsonl'),
}


def write(
  directory: str | pathlib.Path, task: str, split: str, predictions: Mapping[str, str]
) -> tuple[pathlib.Path, int]:
  """Writes the answers to a split as the benchmark takes them.

  It has no place for an answer that is none of the task's words, or no number from 0 to 5: in its
  stead stands the first word, or 0. ReCoRD takes any text.

  Args:
    directory: made if it is not there; a file of that name is written anew.
    task: one of FILES, with its split.
    split: likewise.
    predictions: {id: answer}, of all questions.

  Returns:
    The path of the file, and the number of answers that have no place in it.

  Raises:
    errors.UserError: if it cannot be written.
  """
  file = FILES[task, split]
  found = {
    _numbers(name): _label(task, split, answer.strip()) for name, answer in predictions.items()
  }
  stead = _label(task, split, (glue.template(task).words or ('0',))[0])
  made = [(name, stead if found[name] is None else found[name]) for name in sorted(found)]
  if file.name.endswith('.tsv'):
    lines = ['index\tprediction', *(f'{name[0]}\t{label}' for name, label in made)]
  elif task == 'super_glue_multirc':
    lines = map(json.dumps, _paragraphs(made))
  else:
    lines = [json.dumps({'idx': name[0], 'label': label}) for name, label in made]
  files.write_texts(directory, {file.name: '\n'.join([*lines, ''])})
  return pathlib.Path(directory) / file.name, list(found.values()).count(None)


def _numbers(name: str) -> tuple[int, ...]:
  return tuple(map(int, name.split('-')))


def _label(task: str, split: str, answer: str) -> int | float | str | None:
  """Returns what stands for an answer; None if it has no place."""
  words = glue.template(task).words
  if words is None:
    return answer
  if not words:
    return _number(answer)
  return dict(zip(words, FILES[task, split].labels or words, strict=True)).get(answer)


def _paragraphs(made: Iterable[tuple[tuple[int, ...], Any]]) -> list[dict[str, Any]]:
  """Returns the lines of MultiRC, of the labels of (paragraph, question, answer) in order."""
  found: dict[int, dict[int, list[dict[str, Any]]]] = {}
  for (paragraph, question, answer), label in made:
    answers = found.setdefault(paragraph, {}).setdefault(question, [])
    answers.append({'idx': answer, 'label': label})
  return [
    {
      'idx': paragraph,
      'passage': {'questions': [{'idx': name, 'answers': of} for name, of in questions.items()]},
    }
    for paragraph, questions in found.items()
  ]


def _number(text: str) -> float | None:
  try:
    number = float(text)
  except ValueError:
    return None
  return number if 0 <= number <= 5 else None  # nor is NaN
