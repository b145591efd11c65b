"""Batches of fixed windows of a prepared stream: shuffled for training, in order for validation.

Window w of length L is stream[w L : w L + L + 1]: each token but the stream's first is a target of
one window. Training draws windows by a Grain index sampler that has no state but the step: a batch
is a pure function of seed and step, the same after a restart and on any number of hosts.

A batch is a dict of NumPy arrays, of B rows (this host's) and L tokens:
  inputs_BL: int32.
  targets_BL: int32, the token after each input.
  loss_weights_BL: float32, 1, or 0 in the rows that fill up a last batch.
  position_BL: int32, from 0 in each segment; or [1, L] where all rows share it, which makes
    relative biases B times cheaper.
  segment_ids_BL: int32, from 1; a token sees only its own segment. None: a row is one segment.
`masking` makes other inputs and weights of it, `positions` other positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from lex_fire import errors

Batch = dict[str, Any]


class Windows:
  """A stream of tokens as windows of one length.

  Attributes:
    num_windows: how many there are; a rest shorter than a window is left out.
  """

  def __init__(self, tokens_L: np.ndarray, length: int, *, eos_id: int, isolate_documents: bool):
    """Looks at a stream, of which it reads nothing yet.

    Args:
      tokens_L: the stream, integers, memory-mapped or not.
      length: inputs of a window, in tokens.
      eos_id: the token that ends each document.
      isolate_documents: whether each document in a window is a segment of its own.

    Raises:
      errors.UserError: if the stream is shorter than one window.
    """
    self.num_windows = (len(tokens_L) - 1) // length
    if self.num_windows < 1:
      raise errors.UserError(
        f'a stream of {len(tokens_L)} tokens has no window of {length=}, which takes'
        f' {length + 1}; use a shorter length or a larger corpus'
      )
    self._tokens_L = tokens_L
    self._length = length
    self._eos_id = eos_id
    self._isolate_documents = isolate_documents

  def batch(self, index_B: np.ndarray) -> Batch:
    """Reads the windows of the given indices, from 0 to num_windows - 1, as a batch."""
    offset_1L = np.arange(self._length + 1)[None]
    tokens_BL = self._tokens_L[index_B[:, None] * self._length + offset_1L].astype(np.int32)
    inputs_BL, targets_BL = tokens_BL[:, :-1], tokens_BL[:, 1:]
    if self._isolate_documents:
      segment_ids, position = _segments(inputs_BL, self._eos_id)
    else:
      segment_ids, position = None, np.arange(self._length, dtype=np.int32)[None]
    return {
      'inputs_BL': inputs_BL,
      'targets_BL': targets_BL,
      'loss_weights_BL': np.ones(targets_BL.shape, np.float32),
      'position_BL': position,
      'segment_ids_BL': segment_ids,
    }


class TrainSampler:
  """Draws windows without end, each once an epoch, in another order each epoch."""

  def __init__(
    self,
    windows: Windows,
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
  windows: Windows, batch_size: int, max_windows: int, *, process_index: int, process_count: int
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


def _padded(windows: Windows, index_B: np.ndarray, total: int) -> Batch:
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


def _segments(inputs_BL: np.ndarray, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
  """Numbers the documents of each row, and the tokens of each document.

  An EOS among the inputs begins the document after it: its target is that document's first token,
  which is so predicted from EOS alone, as in evaluation (`protocols`). Thus every target counts,
  and none is predicted from a document that is not its own.

  Returns:
    segment_ids_BL from 1 and position_BL from 0, int32.
  """
  is_first_BL = inputs_BL == eos_id
  is_first_BL[:, 0] = True
  index_1L = np.arange(inputs_BL.shape[1], dtype=np.int32)[None]
  first_BL = np.maximum.accumulate(np.where(is_first_BL, index_1L, 0), axis=1)
  return np.cumsum(is_first_BL, axis=1, dtype=np.int32), index_1L - first_BL
