"""SCROLLS: seven tasks over long documents, and the file in which answers are handed in.

Shaham et al. 2022, "SCROLLS: Standardized CompaRison Over Long Language Sequences"
(arXiv:2201.03533), through TFDS `scrolls`; `build_scrolls` makes it from the benchmark's own files.
The inputs of all seven have the question first, if there is one, and then the document, so that
inputs cut at their end keep their question. The answers of the test split are withheld.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lex_fire import errors, scores
from lex_fire.data import examples as examples_lib
from lex_fire.data import files, language, questions
from lex_fire.data.spec import Spec

if TYPE_CHECKING:
  import seqio

VERSION = '1.0.0'
PREFIX = 'scrolls_'  # of the names of Tasks
FILE = 'scrolls_predictions.csv'
_COLUMNS = ('Task', 'ID', 'Prediction')

# In the order of the benchmark's submissions; the metrics are those of the paper's section 3.3. Of
# QMSum's answers 99 in 100 take at most 1014 bytes; ContractNLI's longest is 'Not mentioned'. The
# other limits are our own, three or more times the mean lengths in the paper.
CONFIGS: dict[str, questions.Question] = {
  'qmsum': questions.Question((scores.rouge,), 1200),
  'qasper': questions.Question((scores.f1,), 600),
  'summ_screen_fd': questions.Question((scores.rouge,), 2000),
  'quality': questions.Question((scores.exact_match,), 400),
  'narrative_qa': questions.Question((scores.f1,), 200),
  'contract_nli': questions.Question((scores.exact_match,), 13),
  'gov_report': questions.Question((scores.rouge,), 9000),
}


def question(spec: Spec) -> questions.Question:
  """Returns what the questions of a task of SCROLLS have in common."""
  return CONFIGS[spec.base.removeprefix(PREFIX)]


def task(spec: Spec) -> seqio.Task:
  """Returns the Task of a specification, over a dataset that must have been made in TFDS before.

  Raises:
    errors.UserError: if there are files or options, or as vocabularies.load does.
  """
  spec.refuse_files()
  spec.options()
  dataset = f'scrolls/{spec.base.removeprefix(PREFIX)}:{VERSION}'
  source = functools.partial(language.tfds_source, dataset, examples_lib.SPLITS, spec)
  return questions.add(f'{dataset}_{spec.tfds_directory}', spec, question(spec), source, _render)


def _render(example: questions.Tensors) -> questions.Tensors:
  return {'id': example['id'], 'inputs': example['input'], 'targets': example['output']}


def write_submission(
  directory: str | pathlib.Path,
  predictions: Mapping[str, Mapping[str, str]],
  ids: Mapping[str, Iterable[str]],
) -> pathlib.Path:
  """Writes answers as the benchmark takes them; returns the path of the file to hand in.

  That is FILE, with columns Task, ID and Prediction, tasks in the benchmark's order; beside it
  CONFIG.json, {id: prediction}, for each task: the formats of its evaluator ("Predictions Format",
  "Prepare Submission File": https://github.com/tau-nlp/scrolls/tree/main/evaluator). It scores one
  task by its JSON file, but takes a file to hand in only if all seven tasks are in it.

  Args:
    directory: made if it is not there; files of these names are written anew.
    predictions: {a key of CONFIGS: {id: answer}}.
    ids: {a key of CONFIGS: all ids of its split}, in the order to write them in.

  Raises:
    errors.UserError: if a task or an id is unknown, an id has no prediction, or a prediction is no
      text.
  """
  for config, answers in predictions.items():
    if config not in CONFIGS:
      raise errors.UserError(f'unknown task {config!r} of SCROLLS; known: {", ".join(CONFIGS)}')
    _check(config, answers, list(ids[config]))
  ordered = {
    config: {name: predictions[config][name] for name in dict.fromkeys(ids[config])}
    for config in CONFIGS
    if config in predictions
  }
  contents = {f'{config}.json': json.dumps(ordered[config], indent=2) for config in ordered}
  contents[FILE] = _csv(ordered)
  files.write_texts(directory, contents)
  return pathlib.Path(directory) / FILE


def _csv(ordered: Mapping[str, Mapping[str, str]]) -> str:
  text = io.StringIO(newline='')
  writer = csv.writer(text)  # its line ends, CRLF, have it quote a CR, which ends a row else
  writer.writerow(_COLUMNS)
  for config, answers in ordered.items():
    writer.writerows((config, *answer) for answer in answers.items())
  return text.getvalue()


def _check(config: str, answers: Mapping[str, Any], ids: list[str]) -> None:
  """Raises errors.UserError unless there is a text for each id, and none for another."""
  known = set(ids)
  unknown = [name for name in answers if name not in known]
  missing = [name for name in ids if name not in answers]
  if unknown:
    raise errors.UserError(
      f'{len(unknown)} predictions for {config!r} have an unknown id, as {unknown[0]!r}; known are '
      f'{len(ids)}, as {ids[:3]!r}; predict the same split'
    )
  if missing:
    raise errors.UserError(
      f'{len(missing)} of {len(ids)} ids of {config!r} have no prediction, as {missing[0]!r}; give '
      "one for each, '' at least"
    )
  for name, answer in answers.items():
    if not isinstance(answer, str):
      raise errors.UserError(
        f'the prediction for id {name!r} of {config!r} is {answer!r:.50}, not a text; give a text'
      )


TASKS = {f'{PREFIX}{config}': task for config in CONFIGS}
QUESTIONS = {f'{PREFIX}{config}': question for config in CONFIGS}
