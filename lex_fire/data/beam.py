"""Apache Beam, imported when it is needed: its flags, its files, and what it makes of errors."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from lex_fire import errors
from lex_fire.data import stream

# They know no options but those that Beam's Python lists; others ask a server for theirs.
_SERVERLESS = ('DirectRunner', 'FnApiRunner', 'PrismRunner', 'DataflowRunner')


@functools.cache
def load() -> Any:
  """Imports Beam, without what it says of clouds that are not installed.

  Raises:
    errors.UserError: if it is not there.
  """
  logging.disable(logging.WARNING)
  try:
    import apache_beam  # pyright: ignore[reportMissingImports]
    import apache_beam.io.filesystems  # pyright: ignore[reportMissingImports]
    import apache_beam.options.pipeline_options  # pyright: ignore[reportMissingImports]
  except ModuleNotFoundError as error:
    raise errors.UserError(
      f'prepare_beam needs Apache Beam ({error}); pip install -r requirements-beam.txt into an '
      'environment of its own, or use lex_fire.data.prepare'
    ) from error
  finally:
    logging.disable(logging.NOTSET)
  return apache_beam


def options_of(flags: Sequence[str]) -> Any:
  """Returns Beam's options of flags.

  Raises:
    errors.UserError: for one that Beam does not know: it may be a misspelt one of ours.
  """
  # A part takes a whole process: `lazy` is not for several threads. Dataflow has a process for each
  # core; Flink and Spark take --sdk_worker_parallelism.
  flags = ['--number_of_worker_harness_threads=1', *flags]
  options = load().options.pipeline_options.PipelineOptions(flags)

  def check(parser):
    _, unknown = parser.parse_known_args(flags)
    if unknown:
      raise errors.UserError(
        f'unknown argument {unknown[0]!r}, here (see --help) and in the options of Beam and its '
        'runners; correct it'
      )

  runner = options.get_all_options(retain_unknown_options=True)['runner'] or _SERVERLESS[0]
  if runner.lower() in map(str.lower, _SERVERLESS):
    options.get_all_options(add_extra_args_fn=check)
  return options


def is_url(directory: str) -> bool:
  """Returns whether a directory is not one of the operating system."""
  return '://' in directory


def files(place: str) -> Any:
  """Returns what reads and writes files at a path or a URL.

  Raises:
    errors.UserError: if there is nothing for such a URL.
  """
  found = load().io.filesystems.FileSystems
  try:
    found.get_filesystem(place)
  except ValueError as error:
    raise errors.UserError(
      f'no file system for {place!r} is installed with Apache Beam; for gs:// pip install '
      "'apache-beam[gcp]', or use a directory that all workers have mounted"
    ) from error
  return found


def put(source: BinaryIO, place: str, name: str) -> None:
  """Writes a file whole or not at all.

  Args:
    source: what it holds.
    place: the path or URL of its directory.
    name: its name there; what is left of a killed attempt has one that begins with a dot.

  Raises:
    errors.UserError: if it cannot be written.
  """
  there = files(place)
  temporary = there.join(place, f'.{name}.{uuid.uuid4().hex}')
  with stream.writing(place):
    with there.create(temporary) as target:
      shutil.copyfileobj(source, target, 2**20)
    there.rename([temporary], [there.join(place, name)])


@contextlib.contextmanager
def mistakes() -> Iterator[None]:
  """Leaves of a user's mistake, in Beam's flags or on a worker, nothing but the sentence."""
  try:
    yield
  except Exception as error:
    # Of what is raised on a worker Beam keeps the type, with a longer text, or the text alone.
    _, found, message = f'{type(error).__name__}: {error}'.partition('UserError: ')
    if found:
      raise errors.UserError(re.split(r' \[while running |\n', message)[0]) from error
    if re.match('Unexpected pipeline runner|Pipeline has validations errors', str(error)):
      raise errors.UserError(' '.join(str(error).split())) from error
    raise


def quieten() -> None:
  """Keeps out of this process's log what becomes the one sentence at the end."""
  logging.basicConfig()
  for handler in logging.getLogger().handlers:
    handler.addFilter(_is_no_mistake)


def _is_no_mistake(record: logging.LogRecord) -> bool:
  return 'UserError: ' not in logging.Formatter().format(record)
