"""A line on stderr of what several processes have written, if that takes long."""

from __future__ import annotations

import multiprocessing
import sys
import threading
import time
from typing import Any

_SECONDS_BETWEEN_REPORTS = 2.0
_SECONDS_BETWEEN_LINES = 30.0
_DOCUMENTS, _TOKENS, _PARTS = range(3)


class Progress:
  """Reports counts that all processes share.

  Attributes:
    counts: of documents, tokens and parts; `add` adds to them, in any process.
  """

  def __init__(self, name: str, num_parts: int, num_documents: int | None):
    """Expects so many parts and, if it is known, so many documents."""
    self.counts: Any = multiprocessing.get_context('spawn').Array('q', 3)
    self._name, self._num_parts, self._num_documents = name, num_parts, num_documents
    self._done = threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True)

  def __enter__(self) -> Progress:
    """Begins to watch."""
    self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    """Ends the line."""
    self._done.set()
    self._thread.join()

  def _watch(self):
    start, first, line, shown = 0.0, None, '', -_SECONDS_BETWEEN_LINES
    while not self._done.wait(_SECONDS_BETWEEN_REPORTS):
      now, found = time.monotonic(), self.counts[:]
      if found[_TOKENS] and first is None:  # from the first documents on: imports are no pace
        start, first = now, found
      elif first is not None:
        line = self._line(found, first, now - start)
        if sys.stderr.isatty():  # a line that changes; in a log, lines, and fewer
          print(f'\r{line}', end='', file=sys.stderr, flush=True)
        elif now - shown > _SECONDS_BETWEEN_LINES:
          print(line, file=sys.stderr, flush=True)
          shown = now
    if line and sys.stderr.isatty():
      print(file=sys.stderr)

  def _line(self, found, first, seconds):
    documents, tokens, parts = (now - then for now, then in zip(found, first, strict=True))
    line = (
      f'{self._name}: {found[_DOCUMENTS]:,} documents, part {found[_PARTS]} of {self._num_parts},'
      f' {tokens / seconds:,.0f} tokens/s'
    )
    done, total, pace = found[_DOCUMENTS], self._num_documents or 0, documents
    if done > total:  # it is not known, or a Task makes several documents of one
      done, total, pace = found[_PARTS], self._num_parts, parts
    left = f', {(total - done) * seconds / pace:,.0f} s left' if pace else ''
    return f'{line}{left}  '


def add(counts: Any, *numbers: int) -> None:
  """Adds documents, tokens and parts to the counts of a Progress."""
  with counts.get_lock():
    for index, number in enumerate(numbers):
      counts[index] += number
