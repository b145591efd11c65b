"""Turns a split of a Task into a flat stream of tokens on disk, once.

    python -m lex_fire.data.prepare --task=c4 --vocabulary=t5 --split=train --directory=DIR
    python -m lex_fire.data.prepare --task=text --split=train --directory=DIR \\
      --train_files='books/**/*.txt.gz'

A stream is written in parts, by all cores at once, each part whole or not at all: run again after a
kill it goes on with those that are missing, and its files are the same as without the kill. The
name of a stream has the fingerprint of its corpus and of its vocabulary, so that another is another
stream. One that is there is found in milliseconds, without seqio if it is of bytes and its corpus
one of `corpora`; the command then reads it once and compares its hashes. Parts of a stream that was
never finished stay in `.NAME.partial`, to be deleted by hand once nobody wants it any more.
`prepare_beam` does the same on many machines.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import multiprocessing
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

from lex_fire import errors, storage
from lex_fire.data import (
  corpora,
  progress,
  reading,
  spec,
  stream,
  tasks,
  vocabularies,
  workers,
)

_FORMAT = 3  # raise it when what is written for the same corpus changes
Identity = dict[str, Any]  # what a stream is made of, as its manifest says it


def prepare(
  what: spec.Spec,
  split: str,
  directory: str | pathlib.Path,
  write_parts: Callable[[spec.Spec, Identity, pathlib.Path], list[dict[str, Any]]] | None = None,
) -> pathlib.Path:
  """Returns the directory of the stream of a split, for stream.read; writes it if it is not there.

  It may be killed and run again at any moment, and run by several processes at once, of which one
  works and the others wait.

  Args:
    what: the Task.
    split: one of the Task's.
    directory: where all streams are kept.
    write_parts: writes the parts that are missing in a directory and returns what the manifest says
      of all of them, in order; None: by all cores of this machine.

  Raises:
    errors.UserError: if the stream is damaged or the directory cannot be written, or as
      tasks.get_task and reading.documents do.
  """
  identity = identity_of(what, split)
  path = pathlib.Path(directory) / name_of(identity)
  if not path.exists():
    with _work_directory(path) as work:
      if not path.exists():  # another process was faster
        parts = (write_parts or _by_all_cores)(what, identity, work)
        if not path.exists():  # another machine was faster, where the lock does not reach
          stream.finish(work, path, identity, parts)
  stream.check(path, identity)
  return path


def identity_of(what: spec.Spec, split: str) -> Identity:
  """Says what the stream of a split is made of.

  Raises:
    errors.UserError: as tasks.get_task does, or if the corpus or the split is not there.
  """
  if what.base in corpora.CORPORA:
    what.options()  # it has none
    vocabulary = vocabularies.facts_of(what.vocabulary)
    corpus = corpora.CORPORA[what.base](what.files).fingerprint([split])
  else:
    task = tasks.get_task(what)
    vocabulary, corpus = reading.vocabulary_of(task), reading.fingerprint(task, split)
  return {
    'format': _FORMAT,
    'task': what.name,
    'split': split,
    'corpus': corpus,
    'vocabulary': dataclasses.asdict(vocabulary),
  }


def name_of(identity: Identity) -> str:
  """Returns the name of the directory of a stream; one of another format is another stream."""
  parts = [identity['task'], identity['split'], identity['vocabulary']['name'], identity['corpus']]
  parts.append(f'format{identity["format"]}')
  return '-'.join(''.join(c if c.isalnum() or c in '.-' else '_' for c in part) for part in parts)


@contextlib.contextmanager
def _work_directory(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Makes the directory beside a stream's place in which its parts are written, for one process.

  The lock is the operating system's, so that it ends with the process, however that ends.
  """
  work, place = path.with_name(f'.{path.name}.partial'), path.parent
  with contextlib.ExitStack() as stack:
    with stream.writing(place):
      place.mkdir(parents=True, exist_ok=True)
      lock = stack.enter_context(path.with_name(f'.{path.name}.lock').open('a+'))
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        _refuse_to_wait_for_parent(lock)
        print(f'{path.name}: another process prepares it; waiting', file=sys.stderr, flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
      lock.truncate(0)
      print(os.getpid(), file=lock, flush=True)
      if not path.exists():
        work.mkdir(exist_ok=True)
    yield work
    with stream.writing(place):
      pathlib.Path(lock.name).unlink(missing_ok=True)


def _refuse_to_wait_for_parent(lock: TextIO) -> None:
  """Ends a process whose parent waits for it: one of several that import the parent's script."""
  parent = multiprocessing.parent_process()
  lock.seek(0)
  if parent is not None and lock.read().strip() == str(parent.pid):
    raise errors.UserError(
      'a script that prepares data, or trains, does so as it is imported, and each of the '
      "processes that share the work imports it; put what it does below if __name__ == '__main__':"
    )


def _by_all_cores(what: spec.Spec, identity: Identity, work: pathlib.Path) -> list[dict[str, Any]]:
  """Writes the parts that are missing in processes of this machine."""
  task, split = tasks.get_task(what), identity['split']
  count = reading.parts(task, split)
  write = functools.partial(write_part, what, split, work, num_parts=count, count=workers.add)
  # A Task that only this process has registered cannot be made in another.
  number = min(count, len(os.sched_getaffinity(0))) if what.base in tasks.TASKS else 1
  watch = progress.Progress(name_of(identity), count, reading.num_documents(task, split))
  with watch, workers.pool(number, watch.counts) as map_parts:
    return list(map_parts(write, range(count)))


def write_part(
  what: spec.Spec,
  split: str,
  directory: pathlib.Path,
  part: int,
  num_parts: int,
  count: Callable[[int, int, int], None],
) -> dict[str, Any]:
  """Writes a part in this process and returns what a manifest says of it.

  Args:
    what: the Task.
    split: one of the Task's.
    directory: that exists.
    part: which, from 0.
    num_parts: in all, as reading.parts says.
    count: is told of documents, tokens and parts more, on the way, or at once if the part is there.

  Raises:
    errors.UserError: as reading.documents and stream.write_part do.
  """
  task, counted = tasks.get_task(what), []

  def documents():
    for document in reading.documents(task, split, part, num_parts):
      counted.append(len(document.tokens_L))
      count(1, counted[-1], 0)
      yield document

  size = reading.vocabulary_of(task).size
  written = stream.write_part(directory, part, size, documents())
  count(written['documents'] - len(counted), written['tokens'] - sum(counted), 1)
  return written


def define_parser(module: str, description: str | None) -> argparse.ArgumentParser:
  """Returns the parser of a command that prepares a stream."""
  parser = argparse.ArgumentParser(f'python -m {module}', description=description)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  spec.define_arguments(parser)
  parser.add_argument(
    '--vocabulary', default='bytes', help='bytes, latin, t5, or a SentencePiece model'
  )
  parser.add_argument('--directory', required=True, help='where all streams are kept')
  return parser


def status_of(command: Callable[[], None]) -> int:
  """Runs a command and returns its exit status, 2 for a mistake of the user's."""
  try:
    command()
  except errors.UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print('interrupted; the same command goes on with the parts that are missing', file=sys.stderr)
    return 130
  except OSError as error:
    if (sentence := errors.of_path(error)) is None:
      raise
    print(f'error: {sentence}', file=sys.stderr)
    return 2
  return 0


def report(path: pathlib.Path) -> None:
  """Compares the hashes of a stream and prints what is in it, and where it is.

  Raises:
    errors.UserError: if it is damaged.
  """
  stream.verify(path)
  manifest = stream.read(path).manifest
  counts = (f'{manifest[name]:,} {name}' for name in ('documents', 'tokens'))
  print(f'{", ".join(counts)}, {len(manifest["parts"])} parts, all hashes right', file=sys.stderr)
  if 'windows' in manifest:
    found = (f'{count:,} of {int(length):,}' for length, count in manifest['windows'].items())
    print(f'windows: {", ".join(found)} tokens', file=sys.stderr)
  print(path)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command and returns its exit status, 2 for a mistake of the user's."""
  flags = define_parser('lex_fire.data.prepare', __doc__).parse_args(argv)

  def run():
    what = spec.of_arguments(flags, flags.vocabulary)
    directory = storage.local(flags.directory, '--directory')
    report(prepare(what, flags.split, directory))

  return status_of(run)


if __name__ == '__main__':
  sys.exit(main())
