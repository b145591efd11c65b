"""What names a Task, and where its data are."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Mapping
from typing import Any, NamedTuple

from lex_fire import errors
from lex_fire.data import lazy


class Spec(NamedTuple):
  """A Task by name, with what it is to be made of.

  Attributes:
    name: of the Task, as NAME or NAME:OPTION=VALUE,OPTION=VALUE.
    vocabulary: 'bytes', 'latin', 't5', or the path of a SentencePiece model.
    files: {split: glob} for Tasks over the user's own files, None for any other.
    tfds_directory: where TensorFlow Datasets are; '': where TFDS itself looks.
  """

  name: str
  vocabulary: str = 'bytes'
  files: Mapping[str, str] | None = None
  tfds_directory: str = ''

  @property
  def base(self) -> str:
    """The name without options."""
    return self.name.partition(':')[0]

  def options(self, **defaults: Any) -> dict[str, Any]:
    """Reads the options of the name; each has the type of its default.

    Raises:
      errors.UserError: for an unknown option, or a value of another type.
    """
    found = dict(defaults)
    for part in filter(None, self.name.partition(':')[2].split(',')):
      option, equals, text = part.partition('=')
      if option not in defaults or not equals:
        known = ', '.join(defaults) or 'none'
        raise errors.UserError(f'task {self.name!r} has no option {part!r}; known: {known}')
      kind = type(defaults[option])
      try:
        value = text if kind is str else ast.literal_eval(text.title() if kind is bool else text)
      except (ValueError, SyntaxError):
        value = None
      if type(value) is not kind:
        raise errors.UserError(
          f'option {option}={text} of task {self.base!r} must be of type {kind.__name__}, as in '
          f'{option}={defaults[option]}'
        )
      found[option] = value
    return found

  def refuse_files(self) -> None:
    """Raises errors.UserError if there are files, for a Task that takes none."""
    if self.files is not None:
      raise errors.UserError(
        f"task {self.base!r} takes no files, not {self.files!r}; give them to 'text' or 'jsonl'"
      )


FILE_TASKS = ('text', 'jsonl')  # that read the user's own files
SPLITS_OF_FILES = ('train', 'validation')


def define_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of a command that `of_arguments` reads."""
  parser.add_argument(
    '--task', required=True, help='stdlib, text, jsonl, c4, pg19, ... or a registered seqio Task'
  )
  parser.add_argument(
    '--module_import',
    action='append',
    default=[],
    help='a module that registers seqio Tasks; may be given several times',
  )
  parser.add_argument('--tfds_directory', default='', help='where TensorFlow Datasets are')
  for split in SPLITS_OF_FILES:
    parser.add_argument(
      f'--{split}_files', help=f'of text and jsonl, and around needles: glob of split {split!r}'
    )
  parser.add_argument('--split', required=True, help='train or validation, or another of the Task')


def of_arguments(arguments: argparse.Namespace, vocabulary: str = 'bytes') -> Spec:
  """Returns what the arguments of a command specify, once the modules they name are imported.

  Raises:
    errors.UserError: if one cannot be imported, or a task over files lacks those of the split.
  """
  lazy.import_modules(arguments.module_import)
  globs = {split: getattr(arguments, f'{split}_files') for split in SPLITS_OF_FILES}
  files = {split: pattern for split, pattern in globs.items() if pattern is not None}
  if arguments.task in FILE_TASKS and arguments.split not in files:
    named = ' or '.join(f'--{split}_files=GLOB' for split in SPLITS_OF_FILES)
    raise errors.UserError(
      f'task {arguments.task!r} has no files of --split={arguments.split}; give {named}, and the '
      'split of that name'
    )
  return Spec(arguments.task, vocabulary, files or None, arguments.tfds_directory)
