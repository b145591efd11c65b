"""Answers to withheld test splits of SCROLLS, GLUE and SuperGLUE, in the files that these take."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from lex_fire import answers, benchmark
from lex_fire import report as report_lib
from lex_fire.data import glue_submission, scrolls

Report = dict[str, Any]


class File(NamedTuple):
  """A file to hand in.

  Attributes:
    path: of it.
    note: what to know of it; '': nothing.
  """

  path: pathlib.Path
  note: str


def write(reports: Sequence[Report], kept: pathlib.Path, directory: pathlib.Path) -> list[File]:
  """Writes files to hand in for each report and length, of those tasks that withhold answers.

  Args:
    reports: of `benchmark.run`, with all questions of each task.
    kept: the directory of their answers.
    directory: where each report and length has a directory of its own.

  Returns:
    The files, in the order of reports; none, if no answers are withheld.

  Raises:
    errors.UserError: if they cannot be written.
  """
  handed: list[File] = []
  for report, label in zip(reports, report_lib.labels(reports), strict=True):
    by_length: dict[int, list[Report]] = {}
    for entry in report['tasks']:
      if entry['scores'] is None:
        by_length.setdefault(entry['length'], []).append(entry)
    for length, entries in by_length.items():
      where = directory / benchmark.file_name(f'{label} at {length}')
      handed += _scrolls(entries, kept, where)
      handed += _glue(entries, kept, where)
  return handed


def _scrolls(entries, kept, directory) -> list[File]:
  predictions = {
    entry['task'].removeprefix(scrolls.PREFIX): answers.read(kept / entry['predictions'])
    for entry in entries
    if entry['task'] in scrolls.TASKS
  }
  if not predictions:
    return []
  ids = {config: sorted(of_task) for config, of_task in predictions.items()}
  path = scrolls.write_submission(directory, predictions, ids)
  all_tasks = f'SCROLLS takes all tasks in one file: {", ".join(scrolls.TASKS)}'
  return [File(path, '' if set(predictions) == set(scrolls.CONFIGS) else all_tasks)]


def _glue(entries, kept, directory) -> list[File]:
  handed = []
  for entry in entries:
    task, split = entry['task'], entry['split']
    if (task, split) in glue_submission.FILES:
      predictions = answers.read(kept / entry['predictions'])
      path, count = glue_submission.write(directory, task, split, predictions)
      note = f'{count} of {len(predictions)} answers are none that the file has a place for'
      handed.append(File(path, note if count else ''))
  return handed
