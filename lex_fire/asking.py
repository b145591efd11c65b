"""What a checkpoint is asked: Tasks of questions by name, at each length, as prompts.

Needles are made for a length, algorithms have lengths of their own, and of any other Task the
inputs are cut to it.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from lex_fire import answers, errors
from lex_fire import config as config_lib
from lex_fire.data import (
  algorithms,
  glue,
  needles,
  questions,
  scrolls,
  spec,
  tasks,
  vocabularies,
)
from lex_fire.data import text as text_lib

_BYTES_PER_PIECE = 3  # of an answer in SentencePiece tokens, at least about


class Asked(NamedTuple):
  """What is asked besides lengths, masks and encodings.

  Attributes:
    tasks: names with their options.
    split: of each; '': the one to be asked, as the Task says.
    max_examples: of each; None: all there are.
    files: a glob of the split's text, for needles; '': the standard library's.
    tfds_directory: '': that of the run.
  """

  tasks: tuple[str, ...]
  split: str = ''
  max_examples: int | None = None
  files: str = ''
  tfds_directory: str = ''


def names(text: str) -> tuple[str, ...]:
  """Reads names of Tasks between commas, each with its options between commas too.

  Raises:
    errors.UserError: for an unknown name, one without questions, or one named twice.
  """
  found: list[str] = []
  for part in filter(None, text.split(',')):
    is_option = found and '=' in part and ':' not in part
    found[-1:] = [f'{found[-1]},{part}'] if is_option else [*found[-1:], part]
  for name in found:
    if not tasks.asks_questions(name):
      known = ', '.join(tasks.QUESTIONS)
      raise errors.UserError(
        f'--tasks={name!r} asks no questions; known: {known}, and those that --module_import '
        f'registers; the losses of a task of documents are those of --documents={name}'
      )
  if len(set(found)) < len(found) or not found:
    raise errors.UserError(f'--tasks={text!r} must name one or more tasks, each once')
  return tuple(found)


def own_name(task: str) -> str:
  """Returns the name by which a run is asked its own Task; needles have theirs without length."""
  base, _, options = task.partition(':')
  is_needle = base in needles.NEEDLES
  kept = [x for x in options.split(',') if not (is_needle and x.startswith('length='))]
  return ':'.join(filter(None, [base, ','.join(kept)]))


def resolved(asked: Asked, own: Sequence[str]) -> Asked:
  """Gives a bare name the options of the Task that all runs were trained on, if it is that one.

  Args:
    asked: the Tasks.
    own: of each run, data.task.
  """
  names = set(map(own_name, own))
  if len(names) > 1:
    return asked
  (name,) = names
  return asked._replace(tasks=tuple(name if task == _base(name) else task for task in asked.tasks))


def no_losses(task: str) -> errors.UserError:
  """Returns what is wrong with the losses of a Task of questions."""
  return errors.UserError(
    f'task {task!r} asks questions, of which answers are scored, not losses; use '
    f'`python -m lex_fire.evaluate --tasks={own_name(task)}`, or losses of other text by '
    '--documents'
  )


class Questions(NamedTuple):
  """The questions of a Task at a length.

  Attributes:
    task: its name.
    split: of the Task.
    length: [tokens], of prompt and answer; None: the questions have lengths of their own.
    files: a glob of the text around them; '': none is named.
    common: what they have in common.
    max_tokens: of an answer, its EOS among them.
    prompts: the questions, the longest first.
  """

  task: str
  split: str
  length: int | None
  files: str
  common: questions.Question
  max_tokens: int
  prompts: list[answers.Prompt]


def read(asked: Asked, config: config_lib.Config, codec: text_lib.Codec) -> list[Questions]:
  """Reads the questions that are asked of a run, at each of config.evaluate.lengths.

  Args:
    asked: the Tasks.
    config: of the run.
    codec: of its vocabulary.

  Raises:
    errors.UserError: if a length leaves no room for a question, of any Task, or a Task cannot be
      read or has no question to ask.
  """
  if asked.files and not any(_base(name) in needles.NEEDLES for name in asked.tasks):
    raise errors.UserError(
      f'files={asked.files!r} are the text around needles, which tasks {", ".join(asked.tasks)} '
      'have not; leave them out'
    )
  found = [
    _of_task(asked, config, codec, name, length)
    for name in asked.tasks
    for length in _lengths(name, config.evaluate.lengths)
  ]
  for of_task in found:  # all of them, before the first is read
    _prompts((), codec, of_task)
  return [_read(asked, config, codec, of_task) for of_task in found]


def _base(name: str) -> str:
  return name.partition(':')[0]


def _lengths(name: str, lengths: Sequence[int]) -> Sequence[int | None]:
  return (None,) if _base(name) in algorithms.ALGORITHMS else lengths


def _of_task(asked, config, codec, name, length) -> Questions:
  """Returns what is known of the questions before they are read."""
  what = _spec(asked, config, name, length, asked.split)
  common = tasks.question(what, asked.split)
  max_tokens = common.answer_bytes + 1  # and EOS
  # Of numbers and made-up words each byte may be a token, and so of what nobody knows.
  is_prose = what.base in {**scrolls.TASKS, **glue.TASKS}
  if is_prose and codec.vocabulary not in (vocabularies.BYTES, vocabularies.LATIN):
    max_tokens = min(max_tokens, common.answer_bytes // _BYTES_PER_PIECE + 16)
  split = asked.split or common.split
  files = asked.files if what.base in needles.NEEDLES else ''
  return Questions(name, split, length, files, common, max_tokens, [])


def _spec(asked, config, name, length, split) -> spec.Spec:
  """Returns the specification of a Task at a length."""
  base, _, options = name.partition(':')
  files = None
  if base in needles.NEEDLES:
    if any(option.startswith('length=') for option in options.split(',')):
      raise errors.UserError(
        f'needles of task {name!r} are made for each of --lengths; leave out its option length'
      )
    name = f'{base}:{",".join(filter(None, [options, f"length={length}"]))}'
    files = {split: asked.files} if asked.files else None
  directory = asked.tfds_directory or config.data.tfds_directory
  return spec.Spec(name, config.data.vocabulary, files, directory)


def _read(asked, config, codec, of_task) -> Questions:
  task = tasks.get_task(_spec(asked, config, of_task.task, of_task.length, of_task.split))
  made = questions.examples(task, of_task.split)
  found = _prompts(itertools.islice(made, asked.max_examples), codec, of_task)
  if not found:
    raise errors.UserError(
      f'split {of_task.split!r} of task {of_task.task!r} has no question; use another'
    )
  return of_task._replace(prompts=found)


def _prompts(examples, codec, of_task) -> list[answers.Prompt]:
  try:
    return answers.prompts(examples, codec, of_task.length, of_task.max_tokens)
  except errors.UserError as error:
    raise errors.UserError(f'task {of_task.task!r}: {error}') from error
