"""Batches of fixed windows of a prepared stream: shuffled for training, in order for validation.

Window w of length L is stream[w L : w L + L + 1]: each token but the stream's first is a target of
one window. Training draws windows by a Grain index sampler that has no state but the step: a batch
is a pure function of seed and step, the same after a restart and on any number of hosts.

Questions of a Task are rows of their own, or share them as segments, and are drawn in the same way.

A batch is a dict of NumPy arrays, of B rows (this host's) and L tokens:
  inputs_BL: int32.
  targets_BL: int32, the token after each input.
  loss_weights_BL: float32, 1, or 0 in the rows that fill up a last batch and but for answers.
  position_BL: int32, from 0 in each segment; or [1, L] where all rows share it, which makes
    relative biases B times cheaper. None: 0 .. L - 1.
  segment_ids_BL: int32, from 1; a token sees only its own segment. None: a row is one segment.
What is None is known when a step is compiled, which may then be by a simpler kernel.
`masking` makes other inputs and weights of it, `positions` other positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from lex_fire import errors

Batch = dict[str, Any]


class Rows(Protocol):
  """What batches are made of.

  Attributes:
    num_windows: how many rows there are to draw.
  """

  num_windows: int

  def batch(self, index_B: np.ndarray) -> Batch:
    """Reads the rows of the given indices, from 0 to num_windows - 1, as a batch."""
    ...


class Windows:
  """A stream of tokens as windows of one length.

  Attributes:
    num_windows: how many there are; of each part a rest shorter than a window is left out.
  """

  def __init__(
    self, parts: Sequence[np.ndarray], length: int, *, eos_id: int, isolate_documents: bool
  ):
    """Looks at a stream, of which it reads nothing yet.

    Args:
      parts: tokens_L of each part, integers, memory-mapped or not.
      length: inputs of a window, in tokens.
      eos_id: the token that ends each document.
      isolate_documents: whether each document in a window is a segment of its own.

    Raises:
      errors.UserError: if no part is as long as a window.
    """
    windows_P = _windows(map(len, parts), length)
    self.num_windows = int(windows_P.sum())
    if self.num_windows < 1:
      raise errors.UserError(
        f'a stream of {sum(map(len, parts))} tokens has no window of {length=}, which takes'
        f' {length + 1}; use a shorter length or a larger corpus'
      )
    self._parts = parts
    self._first_P = np.cumsum(windows_P) - windows_P  # window of each part
    self._length = length
    self._eos_id = eos_id
    self._isolate_documents = isolate_documents

  def batch(self, index_B: np.ndarray) -> Batch:
    """Reads the windows of the given indices, from 0 to num_windows - 1, as a batch."""
    tokens_BL = np.empty((len(index_B), self._length + 1), np.int32)
    part_B = np.searchsorted(self._first_P, index_B, side='right') - 1
    start_B = (index_B - self._first_P[part_B]) * self._length
    for row_L, part, start in zip(tokens_BL, part_B, start_B, strict=True):
      row_L[:] = self._parts[part][start : start + self._length + 1]
    return of_tokens(tokens_BL, self._eos_id, self._isolate_documents)


def num_windows(sizes: Iterable[int], length: int) -> int:
  """Returns how many windows of a length a stream has; sizes: tokens of each of its parts."""
  return int(_windows(sizes, length).sum())


def _windows(sizes: Iterable[int], length: int) -> np.ndarray:
  """Returns windows_P of each part; the first of its tokens is no target."""
  return np.array([max(size - 1, 0) // length for size in sizes])


def of_tokens(tokens_BL: np.ndarray, eos_id: int, isolate_documents: bool) -> Batch:
  """Returns rows of L + 1 tokens as a batch of windows; arguments as for Windows.

  An EOS among the inputs begins the document after it: its target is that document's first token,
  which is so predicted from EOS alone, as in evaluation (`protocols`). Thus every target counts,
  and none is predicted from a document that is not its own, if documents are isolated.
  """
  inputs_BL, targets_BL = tokens_BL[:, :-1], tokens_BL[:, 1:]
  segment_ids = position = None
  if isolate_documents:
    is_first_BL = inputs_BL == eos_id
    is_first_BL[:, 0] = True
    segment_ids, position = _segments(is_first_BL)
  return {
    'inputs_BL': inputs_BL,
    'targets_BL': targets_BL,
    'loss_weights_BL': np.ones(targets_BL.shape, np.float32),
    'position_BL': position,
    'segment_ids_BL': segment_ids,
  }


_TOGETHER = 512  # questions whose rows are found together: enough that few stay half empty


class Questions:
  """A stream of questions in rows: EOS, inputs, separator and answer, as `questions.prompt`.

  Only the answer counts. Of inputs that are too long for a row the end is left out: questions stand
  before the text that they are about. A row has one question or, as segments of their own, as many
  as have room; the EOS of one answer then begins the next.

  Attributes:
    num_windows: how many rows there are.
    num_questions: and how many questions.
    cut_tokens: that are left out, in all.
    num_cut: questions of which some are.
  """

  def __init__(
    self,
    parts: Sequence[np.ndarray],
    ends: Sequence[np.ndarray],
    length: int,
    *,
    eos_id: int,
    isolate_documents: bool,
  ):
    """Looks at a stream.

    Args:
      parts: tokens_L of each part, as stream.read has them.
      ends: [E, 3] of each, likewise.
      length: inputs of a row, in tokens.
      eos_id: the token that begins each question.
      isolate_documents: whether a row has more than one question, if there is room.

    Raises:
      errors.UserError: if an answer has no room in a row.
    """
    self._parts, self._length, self._eos_id = parts, length, eos_id
    self._ends, self._index = ends, _index(ends)
    self._isolate_documents = isolate_documents
    kept_W, inputs_W, rest_W = np.concatenate([_kept(of_part, length) for of_part in ends], axis=1)
    self.num_questions = len(inputs_W)
    if self.num_questions and kept_W.min() < 0:
      raise errors.UserError(
        f'{np.count_nonzero(kept_W < 0)} of {self.num_questions} answers have no room in {length=}:'
        f' the longest takes {length - kept_W.min()} tokens; use a greater length'
      )
    alone = np.arange(self.num_questions)[:, None]
    self._rows = _packed(kept_W + rest_W, length) if isolate_documents else alone
    self.num_windows = len(self._rows)
    self.cut_tokens = int((inputs_W - kept_W).sum())
    self.num_cut = int(np.count_nonzero(inputs_W > kept_W))

  def batch(self, index_B: np.ndarray) -> Batch:
    """Reads the rows of the given indices, from 0 to num_windows - 1, as a batch."""
    tokens_BL = np.zeros((len(index_B), self._length + 1), np.int32)
    weights_BL = np.zeros((len(index_B), self._length), np.float32)
    is_first_BL = np.zeros(tokens_BL.shape, bool)
    tokens_BL[:, 0] = self._eos_id
    for row, index in enumerate(index_B):
      at = 0
      for question in self._index[self._rows[index]]:
        text_L, answer = self._read(*question)
        is_first_BL[row, at] = True
        tokens_BL[row, at + 1 : at + 1 + len(text_L)] = text_L
        at += len(text_L)
        weights_BL[row, at - answer : at] = 1
      is_first_BL[row, at] = True  # of what is left over
    segments = positions = None
    if self._isolate_documents:
      segments, positions = _segments(is_first_BL[:, :-1])
    return {
      'inputs_BL': tokens_BL[:, :-1],
      'targets_BL': tokens_BL[:, 1:],
      'loss_weights_BL': weights_BL,
      'position_BL': positions,
      'segment_ids_BL': segments,
    }

  def _read(self, part: int, number: int) -> tuple[np.ndarray, int]:
    """Returns the tokens_L of a question and its answer, and how many are the answer's."""
    start = self._ends[part][number - 1, 2] if number else 0
    inputs_end, answer, end = self._ends[part][number]
    kept = min(inputs_end - start, self._length - (end - inputs_end))
    of_part_L = self._parts[part]
    tokens_L = np.concatenate([of_part_L[start : start + kept], of_part_L[inputs_end:end]])
    return tokens_L, end - answer


def _index(ends: Sequence[np.ndarray]) -> np.ndarray:
  """Returns [W, 2]: the part of each question, and its number there."""
  parts = [np.full(len(of_part), part) for part, of_part in enumerate(ends)]
  numbers = [np.arange(len(of_part)) for of_part in ends]
  return np.stack([np.concatenate(parts), np.concatenate(numbers)], axis=1)


def _kept(of_part: np.ndarray, length: int) -> np.ndarray:
  """Returns [3, W]: tokens of inputs that a row of a length keeps, that there are, and the rest."""
  start_W = np.concatenate([[0], of_part[:-1, 2]]).astype(np.int64)[: len(of_part)]
  inputs_W, rest_W = of_part[:, 0] - start_W, of_part[:, 2] - of_part[:, 0]
  return np.stack([np.minimum(inputs_W, length - rest_W), inputs_W, rest_W])


def _packed(count_W: np.ndarray, length: int) -> list[list[int]]:
  """Returns the questions of each row, of so many tokens each.

  The longest of _TOGETHER questions come first, each in the first row that has room (first-fit
  decreasing): of lengths that are equally likely all but some percent of the rows is filled. Rows
  then follow one another in a random order, always the same, so that the first are like the rest.
  """
  rows = []
  for start in range(0, len(count_W), _TOGETHER):
    of_block_W = count_W[start : start + _TOGETHER]
    members, room_I = [[] for _ in of_block_W], np.full(len(of_block_W), length)
    for number in np.argsort(-of_block_W, kind='stable').tolist():
      row = int((room_I >= of_block_W[number]).argmax())
      members[row].append(start + number)
      room_I[row] -= of_block_W[number]
    found = list(filter(None, members))
    rows.extend(found[row] for row in np.random.default_rng(start).permutation(len(found)))
  return rows


class TrainSampler:
  """Draws windows without end, each once an epoch, in another order each epoch."""

  def __init__(
    self,
    windows: Rows,
    batch_size: int,
    *,
    seed: int,
    process_index: int,
    process_count: int,
  ):
    """Makes the sampler of one host.

    Args:
      windows: what to draw from, the same on all hosts.
      batch_size: rows of the global batch, over all hosts.
      seed: of the order, the same on all hosts; 0 to 2**32 - 1.
      process_index: the host, from 0; it reads rows from process_index * batch_size /
        process_count.
      process_count: number of hosts.

    Raises:
      errors.UserError: if the seed is out of range, or the rows cannot be shared out equally.
    """
    import grain

    if not 0 <= seed < 2**32:
      raise errors.UserError(f'{seed=} is out of range; use 0 to {2**32 - 1}')
    self._windows = windows
    self._batch_size = batch_size
    self._row_B = host_rows(batch_size, process_index, process_count)
    self._sampler = grain.samplers.IndexSampler(
      num_records=windows.num_windows,
      shard_options=grain.sharding.NoSharding(),
      shuffle=True,
      num_epochs=None,
      seed=seed,
    )

  def batch(self, step: int) -> Batch:
    """Reads this host's rows of the batch of a step, counted from 0."""
    draws = (step * self._batch_size + self._row_B).tolist()
    return self._windows.batch(np.array([self._sampler[draw].record_key for draw in draws]))


def batches_in_order(
  windows: Rows, batch_size: int, max_windows: int, *, process_index: int, process_count: int
) -> Iterator[Batch]:
  """Reads the first windows in order; rows after the last of them have loss weight 0.

  All hosts read equally many batches, so that a computation they share finds each of them.

  Args:
    windows: what to read.
    batch_size: rows of the global batch, over all hosts.
    max_windows: how many windows to read at most.
    process_index: the host, as for TrainSampler.
    process_count: number of hosts.

  Raises:
    errors.UserError: if the rows cannot be shared out equally.
  """
  row_B = host_rows(batch_size, process_index, process_count)
  total = min(max_windows, windows.num_windows)
  return (_padded(windows, start + row_B, total) for start in range(0, total, batch_size))


def _padded(windows: Rows, index_B: np.ndarray, total: int) -> Batch:
  batch = windows.batch(np.minimum(index_B, total - 1))
  batch['loss_weights_BL'][index_B >= total] = 0.0
  return batch


def host_rows(batch_size: int, process_index: int, process_count: int) -> np.ndarray:
  """Returns row_B: which rows of a global batch are those of a host; arguments as above.

  Raises:
    errors.UserError: if the rows cannot be shared out equally.
  """
  if batch_size % process_count:
    raise errors.UserError(
      f'{batch_size=} is not divisible by {process_count=}; use a multiple of the hosts'
    )
  rows = batch_size // process_count
  return np.arange(process_index * rows, (process_index + 1) * rows)


def _segments(is_first_BL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Numbers the segments of each row by where they begin, and the tokens of each.

  Returns:
    segment_ids_BL from 1 and position_BL from 0, int32.
  """
  index_1L = np.arange(is_first_BL.shape[1], dtype=np.int32)[None]
  first_BL = np.maximum.accumulate(np.where(is_first_BL, index_1L, 0), axis=1)
  return np.cumsum(is_first_BL, axis=1, dtype=np.int32), index_1L - first_BL
