"""What `python -m lex_fire.evaluate --tasks=...` does: asks runs, shows and writes their scores."""

import functools
import json
import pathlib
import time
from collections.abc import Callable, Iterable, Sequence

import jax
from absl import flags

from lex_fire import (
  answers,
  asking,
  attention,
  benchmark,
  command,
  errors,
  kernels,
  metrics,
  reporting,
  storage,
  submission,
)
from lex_fire import benchmark_plots as plots
from lex_fire import config as config_lib
from lex_fire import report as report_lib
from lex_fire.data import tasks

_SECONDS_BETWEEN_REPORTS = 2.0
_OF_LOSSES = ('protocol', 'stride', 'max_tokens', 'sequence', 'documents')


class Progress:
  """Prints what is answered and the time left, which it measures by the tokens of the questions."""

  def __init__(self, expected: Iterable[answers.Prompt]):
    """Expects answers to so many prompts."""
    sizes = [len(prompt.tokens_L) for prompt in expected]
    self._total, self._left = len(sizes), sum(sizes)
    self._done, self._read = 0, 0
    self._start = self._shown = time.monotonic()

  def __call__(self, case: str, prompts: Sequence[answers.Prompt], are_new: bool) -> None:
    """Takes note of a batch of answers, or of those that were there before."""
    tokens = sum(len(prompt.tokens_L) for prompt in prompts)
    self._done += len(prompts)
    self._left -= tokens
    self._read += tokens * are_new
    if prompts and not are_new:
      reporting.say(f'{case}: {len(prompts)} answers are there already')
    now = time.monotonic()
    if self._read and now - self._shown > _SECONDS_BETWEEN_REPORTS:
      left = self._left * (now - self._start) / self._read
      reporting.say(f'{case}: {self._done} of {self._total} answers, ETA {metrics.clock(left)}')
      self._shown = now


def main() -> None:
  """The command."""
  f = flags.FLAGS
  for name in _OF_LOSSES:
    if f[name].value is not None:
      raise errors.UserError(f'--{name}={f[name].value} is of losses, not of --tasks; leave it out')
  f.stride, f.sequence = 0, 1  # those of the run's config are of losses too
  asked = asking.Asked(
    asking.names(f.tasks), f.split or '', f.max_examples, f.files or '', f.tfds_directory or ''
  )
  first = f'first {asked.max_examples}' if asked.max_examples else ''
  about = ' '.join(filter(None, [*asked.tasks, asked.split, asked.files, first]))
  what = command.asked(about=benchmark.file_name(about), alike=())
  storage.local(what.directory, '--output')  # answers are appended as they come
  plans = benchmark.plan(what.workdirs, asked, what.request, what.runs)
  benchmark.check_same(plans)
  expected = [
    prompt for plan in plans for _ in plan.cases for q in plan.questions for prompt in q.prompts
  ]
  devices = f'{jax.device_count()} {jax.devices()[0].device_kind}'
  reporting.say(f'{len(expected):,} answers are asked for, on {devices}')
  progress = Progress(expected)
  kept = what.directory / what.common_name  # to which other lengths add
  reports = [report for plan in plans for report in benchmark.run(plan, kept, progress)]
  paths = write(reports, what.directory, what.name)
  reporting.say(report_lib.checkpoints(reports))
  for entries in zip(*(report['tasks'] for report in reports), strict=True):
    chosen = (kernels.Choice(**x) for entry in entries for x in entry['implementations'])
    asked_of = benchmark.named(entries[0]['task'], entries[0]['length'])
    reporting.say(attention.line(chosen, f' of {asked_of}'))
  reporting.say(plots.table(reports))
  reporting.say(f'written: {", ".join(map(str, paths))}, and answers in {kept}')
  if asked.max_examples is None and jax.process_index() == 0:  # which has the answers
    how = what.request.attention
    folder = 'submission' if how == config_lib.AS_TRAINED else f'submission-{how}'
    _hand_in(reports, kept, kept / folder)


def _hand_in(reports, kept, directory):
  for file in submission.write(reports, kept, directory):
    print(f'to hand in: {file.path}' + (f'\n{file.note}' if file.note else ''))


def refuse_flags() -> None:
  """Refuses what is of Tasks of questions alone where there are none.

  Raises:
    errors.UserError: if it is given.
  """
  if flags.FLAGS.max_examples is not None:
    raise errors.UserError(
      f'--max_examples={flags.FLAGS.max_examples} is of --tasks, which are missing; the budget of '
      'losses is --max_tokens'
    )


def write(
  reports: Sequence[benchmark.Report], directory: pathlib.Path, name: str
) -> list[pathlib.Path]:
  """Writes NAME.json, and a picture NAME_TASK.png of each Task, each whole or not at all."""

  def write_json(path):
    path.write_text(json.dumps({'runs': reports}, indent=2) + '\n')

  writers: dict[str, Callable[[pathlib.Path], None]] = {f'{name}.json': write_json}
  for task in dict.fromkeys(entry['task'] for entry in reports[0]['tasks']):
    if plots.can_draw(reports, task):
      picture = f'{name}_{benchmark.file_name(task, 50)}.png'
      writers[picture] = functools.partial(plots.draw, reports, task)
  return command.write_files(directory, writers)


def define_flags() -> None:
  """Declares the flags of Tasks of questions alone, beside those of `command`."""
  flags.DEFINE_string(
    'tasks',
    None,
    'instead of losses, the scores of answers: tasks of questions, NAME or NAME:OPTION=VALUE, as '
    f'in scrolls_qmsum,passkey:held_out=50; known: {", ".join(tasks.QUESTIONS)}, and those that '
    '--module_import registers, with inputs and metrics',
  )
  flags.DEFINE_integer('max_examples', None, 'of each task and length (default: all)', 1)
