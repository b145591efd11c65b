"""The documents of a split's parts as windows, end to end, from any place in them.

Some parts are open at once, in an order drawn for each epoch, and give a document each by turns; an
epoch begins when all parts of the one before are read to their ends, however long each is. The
documents so form one text, which is cut into windows, and these are shuffled in blocks. All that
there is to remember is a place: numbers of parts, documents and tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import numpy as np

from lex_fire import errors
from lex_fire.data import draws, stream

_OPEN_PARTS = 16  # at once, at most

Place = dict[str, Any]  # JSON values


class Documents:
  """The documents of all parts, epoch after epoch."""

  def __init__(
    self,
    read: Callable[[int, int], Iterator[stream.Document]],
    num_parts: int,
    seed: int,
    place: Place | None,
  ):
    """Goes to a place, or to the beginning.

    Args:
      read: (part, first document) -> its documents from there.
      num_parts: how many there are.
      seed: of their order.
      place: from `place`.
    """
    self._read, self._num_parts, self._seed = read, num_parts, seed
    place = place or {'epoch': 0, 'opened': 0, 'turn': 0, 'open': []}
    self._epoch, self._opened, self._turn = place['epoch'], place['opened'], place['turn']
    self._open = [[part, document, read(part, document)] for part, document in place['open']]

  def place(self) -> Place:
    """Returns where it is: parts that are open, each with the number of its next document."""
    return {
      'epoch': self._epoch,
      'opened': self._opened,
      'turn': self._turn,
      'open': [[part, document] for part, document, _ in self._open],
    }

  def next(self) -> np.ndarray:
    """Returns the tokens_L of the next document.

    Raises:
      errors.UserError: if a whole epoch has none.
    """
    begun = self._epoch
    while self._epoch < begun + 2:  # of the first, the documents may lie before the place
      self._fill()
      self._turn %= len(self._open)
      of_part = self._open[self._turn]
      for document in of_part[2]:
        of_part[1] += 1
        self._turn += 1
        return document.tokens_L
      del self._open[self._turn]
      if not self._open and self._opened == self._num_parts:
        self._epoch, self._opened = self._epoch + 1, 0
    raise errors.UserError(f'no document in any of {self._num_parts} parts; use another split')

  def _fill(self) -> None:
    """Opens parts of this epoch, in its order, up to as many as may be open."""
    while len(self._open) < _OPEN_PARTS and self._opened < self._num_parts:
      key_P = draws.uniform(self._seed, draws.PART, self._epoch, np.arange(self._num_parts))
      part = int(np.argsort(key_P)[self._opened])
      self._open.append([part, 0, self._read(part, 0)])
      self._opened += 1


class Windows:
  """The text of documents, cut into windows of L + 1 tokens, the first of each the last before."""

  def __init__(self, documents: Documents, length: int, eos_id: int, place: Place | None):
    """Goes to a place of `documents`, which are there, and to the token in it.

    Raises:
      errors.UserError: if the document there is shorter than it was.
    """
    self._documents, self._length = documents, length
    self._count, self._token, self._last = 0, 0, eos_id
    self._begin()
    if place is not None:
      self._count, self._token, self._last = place['windows'], place['token'], place['last']
      if self._token > len(self._tokens_L):
        raise errors.UserError(
          f'a document of {len(self._tokens_L)} tokens was one of {self._token} at least when the '
          'run stopped; restore the data, or use another --workdir'
        )

  def _begin(self) -> None:
    """Takes the next document."""
    self._before, self._tokens_L = self._documents.place(), self._documents.next()

  def place(self) -> Place:
    """Returns where it is: the place before the document it is in, and how far it is in that."""
    return {
      'documents': self._before,
      'token': self._token,
      'last': self._last,
      'windows': self._count,
    }

  def next(self) -> np.ndarray:
    """Returns the tokens of the next window."""
    window_L = np.full(self._length + 1, self._last, np.int32)
    filled = 1
    while filled <= self._length:
      if self._token == len(self._tokens_L):
        self._begin()
        self._token = 0
      taken_L = self._tokens_L[self._token : self._token + self._length + 1 - filled]
      window_L[filled : filled + len(taken_L)] = taken_L
      filled += len(taken_L)
      self._token += len(taken_L)
    self._last = int(window_L[-1])
    self._count += 1
    return window_L


class Blocks:
  """Windows in blocks, each shuffled; a thread reads the next one while one is used."""

  def __init__(self, windows: Windows, size: int, seed: int, taken: int):
    """Reads the first block, of `size` windows, of which some are taken already."""
    self._windows, self._size, self._seed = windows, size, seed
    self._thread = futures.ThreadPoolExecutor(1)
    self._ahead = self._thread.submit(self._read)
    self._next()
    self._taken = taken

  def _read(self) -> tuple[Place, np.ndarray]:
    """Returns the place before a block, and the block's tokens_WL."""
    place = self._windows.place()
    block_WL = np.stack([self._windows.next() for _ in range(self._size)])
    key_W = draws.uniform(self._seed, draws.WINDOW, place['windows'], np.arange(self._size))
    return place, block_WL[np.argsort(key_W)]

  def _next(self) -> None:
    self._place, self._block_WL = self._ahead.result()
    self._ahead = self._thread.submit(self._read)
    self._taken = 0

  def take(self, rows: int) -> np.ndarray:
    """Returns the next `rows` windows, which divide the size of a block."""
    if self._taken == self._size:
      self._next()
    self._taken += rows
    return self._block_WL[self._taken - rows : self._taken]

  def place(self) -> Place:
    """Returns where it is: the place before the block, and how many of its windows are taken."""
    return {'place': self._place, 'taken': self._taken}
