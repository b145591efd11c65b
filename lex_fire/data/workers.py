"""Processes of this machine that share counts and end together."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import process
from typing import Any

from lex_fire import errors
from lex_fire.data import progress

_counts: Any = None  # over all processes


@contextlib.contextmanager
def pool(count: int, counts: Any) -> Iterator[Any]:
  """Yields a `map` whose calls run in so many processes; one is this process itself.

  Args:
    count: of processes.
    counts: of a progress.Progress, for `add`.

  Raises:
    errors.UserError: if a process is ended from outside.
  """
  if count == 1:
    _count_in(counts)
    yield map
    return
  spawn = multiprocessing.get_context('spawn')  # TensorFlow does not survive a fork
  arguments = {'initializer': _begin, 'initargs': (counts,)}
  executor = concurrent.futures.ProcessPoolExecutor(count, mp_context=spawn, **arguments)
  try:
    yield executor.map
  except process.BrokenProcessPool as error:
    raise errors.UserError(
      f'one of {count} worker processes was ended by what is said above or, if nothing is, from '
      'outside, as when memory is short; run the same again, which goes on with the parts that are '
      'missing'
    ) from error
  finally:
    executor.shutdown(cancel_futures=True)


def add(documents: int, tokens: int, parts: int) -> None:
  """Adds to the counts that all processes of the pool share."""
  progress.add(_counts, documents, tokens, parts)


def _begin(counts: Any) -> None:
  """What a process does first: it takes the shared counts, and ends when its parent does."""
  _count_in(counts)
  signal.signal(signal.SIGINT, signal.SIG_DFL)  # at once and without a word
  parent: Any = multiprocessing.parent_process()
  threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _count_in(counts: Any) -> None:
  global _counts
  _counts = counts
