"""The documents of a split's parts as windows, end to end, from any place in them.

Some parts are open at once, in an order drawn for each epoch, and give a window each by turns;
windows are shuffled in blocks. All that there is to remember is a place: numbers of parts,
documents and tokens.
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


class Windows:
  """Windows of tokens_L of parts, by turns of those that are open; all its state is its place."""

  def __init__(
    self,
    documents: Callable[[int, int], Iterator[stream.Document]],
    num_parts: int,
    length: int,
    eos_id: int,
    seed: int,
    place: Place | None,
  ):
    """Opens parts by (part, first document) -> documents; at their beginning without a place."""
    self._num_parts, self._length, self._seed = num_parts, length, seed
    self._count = self._drawn = 0
    if place is None:
      places = [[self._draw(), 0, 0, eos_id] for _ in range(min(num_parts, _OPEN_PARTS))]
    else:
      self._count, self._drawn, places = place['windows'], place['parts'], place['open']
    self._readers = [_Reader(documents, self._draw, num_parts, *of_part) for of_part in places]

  def _draw(self) -> int:
    """Returns the part to be opened next: each once an epoch."""
    epoch, index = divmod(self._drawn, self._num_parts)
    self._drawn += 1
    key_P = draws.uniform(self._seed, draws.PART, epoch, np.arange(self._num_parts))
    return int(np.argsort(key_P)[index])

  def next(self) -> np.ndarray:
    reader = self._readers[self._count % len(self._readers)]
    self._count += 1
    return reader.window(self._length)

  def place(self) -> Place:
    open_parts = [reader.place() for reader in self._readers]
    return {'windows': self._count, 'parts': self._drawn, 'open': open_parts}


class _Reader:
  """Cuts the documents of one part after another into windows."""

  def __init__(self, documents, draw, num_parts, part, document, token, last):
    """Goes to a token of a document of a part; the one before it was `last`."""
    self._documents, self._draw, self._num_parts = documents, draw, num_parts
    self._part, self._document, self._token, self._last = part, document, token, last
    self._coming, self._tokens_L = documents(part, document), None

  def place(self) -> list[int]:
    return [self._part, self._document, self._token, self._last]

  def window(self, length: int) -> np.ndarray:
    """Returns `length` tokens after the last of the window before, which comes first."""
    window_L = np.full(length + 1, self._last, np.int32)
    filled = 1
    while filled <= length:
      taken_L = self._rest()[: length + 1 - filled]
      window_L[filled : filled + len(taken_L)] = taken_L
      filled += len(taken_L)
      self._token += len(taken_L)
    self._last = int(window_L[-1])
    return window_L

  def _rest(self) -> np.ndarray:
    """Returns what is left of the document; if nothing, the next one."""
    if self._tokens_L is None:  # not read since the place was taken
      self._tokens_L = self._read()
    elif self._token == len(self._tokens_L):
      self._document, self._token = self._document + 1, 0
      self._tokens_L = self._read()
    return self._tokens_L[self._token :]

  def _read(self) -> np.ndarray:
    for _ in range(self._num_parts + 1):
      for document in self._coming:
        return document.tokens_L
      self._part, self._document = self._draw(), 0
      self._coming = self._documents(self._part, 0)
    raise errors.UserError(
      f'no document in any of {self._num_parts} parts; train on another split or Task'
    )
