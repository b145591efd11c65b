"""Turns a split of a Task into a flat stream of tokens on disk, once.

    python -m lex_fire.data.prepare --task=stdlib --split=train --directory=DIR
    python -m lex_fire.data.prepare --task=text --split=train --directory=DIR \
      --train_files='books/**/*.txt'

The name of a stream has the fingerprint of its corpus, so a changed corpus is another stream. One
that is there is found in milliseconds, and without seqio if its corpus is one of `corpora`.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lex_fire import errors
from lex_fire.data import corpora, stream, tasks

if TYPE_CHECKING:
  import seqio

_FORMAT = 1  # raise it when what is written for the same corpus changes
_SECONDS_BETWEEN_REPORTS = 2.0


def prepare(
  task: str,
  split: str,
  directory: str | pathlib.Path,
  files: Mapping[str, str] | None = None,
) -> pathlib.Path:
  """Returns the directory of the stream of a split, for stream.read; writes it if it is not there.

  It may be killed and run again at any moment, and run by several processes at once. A killed one
  leaves a directory whose name begins with a dot; it is never read and may be deleted.

  Args:
    task: name, as for tasks.get_task.
    split: one of the Task's.
    directory: where all streams are kept.
    files: as for tasks.get_task.

  Raises:
    errors.UserError: if the stream is damaged, or as tasks.get_task, tasks.documents and
      stream.write do.
  """
  identity = _identity(task, split, files)
  path = pathlib.Path(directory) / f'{task}-{split}-{identity["corpus"]}'
  if not path.exists():
    documents = _documents(tasks.get_task(task, files), split)
    stream.write(path, identity, _with_progress(documents, path.name))
  stream.check(path, identity)
  return path


def _identity(task: str, split: str, files: Mapping[str, str] | None) -> dict[str, Any]:
  """Says what a stream is made of; the name of a registered Task stands for its corpus."""
  if task in corpora.CORPORA:
    vocabulary = tasks.BYTES
    corpus = corpora.CORPORA[task](files).fingerprint([split])
  else:
    vocabulary = tasks.vocabulary_of(tasks.get_task(task, files))
    corpus = vocabulary.name
  return {
    'format': _FORMAT,
    'task': task,
    'split': split,
    'corpus': corpus,
    'vocabulary': dataclasses.asdict(vocabulary),
  }


def _documents(task: seqio.Task, split: str) -> Iterator[stream.Document]:
  for tokens_L in tasks.documents(task, split):
    yield stream.Document(tokens_L, tasks.text_bytes(task, tokens_L))


def _with_progress(documents: Iterator[stream.Document], name: str) -> Iterator[stream.Document]:
  """Passes documents on, and if that takes long keeps a line of progress on stderr."""
  tokens, start, reported = 0, None, None
  for count, document in enumerate(documents, start=1):
    now = time.monotonic()
    start, reported = start or now, reported or now  # from the first document: imports are no pace
    yield document
    tokens += len(document.tokens_L)
    if now - reported > _SECONDS_BETWEEN_REPORTS:
      line = f'\r{name}: {count:,} documents, {tokens / (now - start):,.0f} tokens/s'
      print(line, end='', file=sys.stderr, flush=True)
      reported = now
  if reported != start:
    print(file=sys.stderr)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser('python -m lex_fire.data.prepare', description=__doc__)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.add_argument('--task', required=True, help='stdlib, text, or a registered seqio Task')
  parser.add_argument('--split', required=True, help='train or validation, or another of the Task')
  parser.add_argument('--directory', required=True, help='where all streams are kept')
  for split in ('train', 'validation'):
    parser.add_argument(f'--{split}_files', help=f'for --task=text: glob of split {split!r}')
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command and returns its exit status, 2 for a mistake of the user's."""
  flags = _parse(argv)
  globs = {'train': flags.train_files, 'validation': flags.validation_files}
  files = {split: pattern for split, pattern in globs.items() if pattern is not None}
  try:
    print(prepare(flags.task, flags.split, flags.directory, files or None))
  except errors.UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main())
