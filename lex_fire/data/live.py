"""Windows of a Task that is read while a run goes on, for those who will not prepare a stream.

Documents come end to end and are cut into windows without a gap, so that every token but the first
is the target of one, as in a prepared stream; `flow` opens the parts and shuffles the windows.

The place that a run has come to is saved beside each checkpoint as numbers of parts, documents and
tokens and not as their content: some hundred bytes, from which a resume goes on with the very next
batch. It is the place of one host among a number of hosts, and of no other number, and of a Task
that is the same whenever it is read: its preprocessors draw nothing.

Departure: seqio leaves such places to TensorFlow's symbolic checkpoints; but in TensorFlow 2.21 a
pipeline with them may hang once it is restored, or crash when it ends, and they know no corpus that
Python reads.
"""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from lex_fire import errors
from lex_fire.data import batches, files, flow, reading

if TYPE_CHECKING:
  import seqio

SPLIT = 'train'
BLOCK_TOKENS = 2**22  # about, in the windows of a host that are shuffled together
_FOLDER = 'places'  # in a workdir


class Live:
  """This host's rows of a run's batches, one after another."""

  def __init__(
    self,
    task: seqio.Task,
    length: int,
    batch_size: int,
    *,
    seed: int,
    isolate_documents: bool,
    process_index: int,
    process_count: int,
  ):
    """Looks at split train, of which it reads nothing yet.

    Args:
      task: of documents.
      length: inputs of a window, in tokens.
      batch_size: rows of the global batch, over all hosts.
      seed: of the order, the same on all hosts.
      isolate_documents: whether each document in a window is a segment of its own.
      process_index: the host, from 0.
      process_count: number of hosts.

    Raises:
      errors.UserError: if there are more hosts than parts, the rows cannot be shared out equally,
        or the Task asks questions.
    """
    if reading.is_of_questions(task):
      raise errors.UserError(
        f'task {task.name!r} asks questions, a row each; data.streaming=True is for documents'
      )
    reading.check_hosts(task, SPLIT, process_count)
    self._eos_id = reading.vocabulary_of(task).eos_id
    self._isolate_documents = isolate_documents
    self._rows = len(batches.host_rows(batch_size, process_index, process_count))
    self._host = f'host-{process_index}-of-{process_count}'
    num_parts = reading.parts(task, SPLIT)
    own = range(process_index, num_parts, process_count)

    def documents(part, start):
      return reading.documents(task, SPLIT, own[part], num_parts, start)

    def blocks(place, taken):
      windows = flow.Windows(documents, len(own), length, self._eos_id, seed, place)
      steps = math.ceil(BLOCK_TOKENS / (self._rows * length))
      return flow.Blocks(windows, steps * self._rows, seed, taken)

    self._open: Callable[[flow.Place | None, int], flow.Blocks] = blocks
    self._blocks: flow.Blocks | None = None
    self._done = 0

  def batch(self, step: int) -> batches.Batch:
    """Reads the rows of a step, which must be the one after the last.

    Raises:
      errors.UserError: as reading.documents does, or if the split has no document.
    """
    if step != self._done:
      raise ValueError(f'{step=} does not follow {self._done - 1}')
    if self._blocks is None:
      self._blocks = self._open(None, 0)
    self._done += 1
    tokens_BL = self._blocks.take(self._rows)
    return batches.of_tokens(tokens_BL, self._eos_id, self._isolate_documents)

  def save(self, workdir: pathlib.Path, keep: Collection[int]) -> None:
    """Saves the place after the batches so far, before the checkpoint of that step is saved.

    Args:
      workdir: of the run.
      keep: steps whose places are still needed; others are removed.

    Raises:
      errors.UserError: if it cannot be written.
    """
    if self._blocks is None:
      raise ValueError('nothing was read that a place could come after')
    path, content = self._path(workdir, self._done), json.dumps(self._blocks.place())
    try:
      for old in path.parents[1].glob(f'*/{path.name}'):
        if int(old.parent.name) not in keep:
          old.unlink()
          with contextlib.suppress(OSError):  # another host's place is there still
            old.parent.rmdir()
      path.parent.mkdir(parents=True, exist_ok=True)
      files.write_whole(path, lambda path: path.write_text(content))
    except OSError as error:
      raise errors.UserError(
        f'cannot write {str(path)!r}: {error.strerror}; make room, and start the run again'
      ) from error

  def restore(self, workdir: pathlib.Path, step: int) -> None:
    """Goes to the place that was saved after `step` steps.

    Raises:
      errors.UserError: if none was saved, or by another number of hosts, or it is damaged.
    """
    path = self._path(workdir, step)
    try:
      saved = json.loads(path.read_text())
      self._blocks = self._open(saved['place'], saved['taken'])
    except OSError as error:
      there = ', '.join(sorted(found.stem for found in path.parent.glob('host-*.json')))
      raise errors.UserError(
        f'{str(path.parent)!r} has no place in the data of {self._host}, but of: '
        f'{there or "no host"}; go on with as many hosts as the run had'
      ) from error
    except (ValueError, KeyError, TypeError) as error:
      raise errors.UserError(
        f'{str(path)!r} is not a place in the data: {error!r}; delete the checkpoint of that step '
        'to go on from the one before'
      ) from error
    self._done = step

  def _path(self, workdir, step):
    return workdir / _FOLDER / str(step) / f'{self._host}.json'
