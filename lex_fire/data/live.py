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
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from lex_fire import errors, storage
from lex_fire.data import batches, flow, reading

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
        f'task {task.name!r} asks questions; data.streaming=True is for documents'
      )
    num_parts = reading.parts(task, SPLIT)
    own = reading.filled_parts(task, SPLIT)[process_index::process_count]
    reading.check_hosts(task, SPLIT, process_count)
    self._eos_id = reading.vocabulary_of(task).eos_id
    self._isolate_documents = isolate_documents
    self._rows = len(batches.host_rows(batch_size, process_index, process_count))
    self._name, self._process_count = f'host-{process_index}-of-{process_count}', process_count
    self._made_of = {
      'task': [reading.fingerprint(task, SPLIT), reading.vocabulary_of(task).name],
      'seed': seed,
      'length': length,
      'rows': self._rows,
    }

    def documents(part, start):
      return reading.documents(task, SPLIT, own[part], num_parts, start)

    def blocks(place, taken):
      text = flow.Documents(documents, len(own), seed, place and place['documents'])
      windows = flow.Windows(text, length, self._eos_id, place)
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
      keep: steps whose places are still needed; others before the last of them are removed.

    Raises:
      errors.UserError: if it cannot be written.
    """
    if self._blocks is None:
      raise ValueError('nothing was read that a place could come after')
    path, place = self._path(workdir, self._done), self._blocks.place()
    content = json.dumps({'made_of': self._made_of, 'sha256': _sha256(place), **place})
    try:
      for old in path.parents[1].glob(f'*/{path.name}'):
        if int(old.parent.name) < max(keep, default=0) and int(old.parent.name) not in keep:
          old.unlink(missing_ok=True)
          with contextlib.suppress(OSError):  # another host's place is there still
            old.parent.rmdir()
      path.parent.mkdir(parents=True, exist_ok=True)
      storage.write(path, content)
    except OSError as error:
      raise errors.UserError(
        f'cannot write {str(path)!r}: {error.strerror}; make room, and start the run again'
      ) from error

  def restore(self, workdir: pathlib.Path, step: int) -> None:
    """Goes to the place that was saved after `step` steps.

    Raises:
      errors.UserError: if none was saved, or by another number of hosts or another run, or it is
        damaged.
    """
    path = self._path(workdir, step)
    try:
      saved = json.loads(path.read_text())
      made_of, sha256 = saved.pop('made_of'), saved.pop('sha256')
      if _sha256(saved) != sha256:
        raise ValueError('its hash is another')
    except OSError as error:
      raise self._unread(path, error) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise errors.UserError(
        f'{str(path)!r} is damaged: {error!r}; '
        'delete the checkpoint of that step to go on from the one before'
      ) from error
    if made_of != self._made_of:
      raise errors.UserError(
        f'{str(path)!r} is a place in other data, {made_of}, not {self._made_of}; use another '
        '--workdir'
      )
    self._blocks = self._open(saved['place'], saved['taken'])
    self._done = step

  def _path(self, workdir, step):
    return workdir / _FOLDER / str(step) / f'{self._name}.json'

  def _unread(self, path: pathlib.Path, error: OSError) -> errors.UserError:
    """Returns why there is no place: all are of another number of hosts, or this one is gone."""
    found = {int(other.stem.rpartition('-')[2]) for other in path.parent.glob('host-*-of-*.json')}
    if found and self._process_count not in found:
      hosts = ' or '.join(map(str, sorted(found)))
      return errors.UserError(
        f'{str(path.parent)!r} has places in the data for process_count={hosts}, not '
        f'{self._process_count}; go on with {hosts} hosts, as the run had'
      )
    return errors.UserError(
      f'{str(path)!r}, the place of this host in the data, is unreadable: {error.strerror}; '
      'delete the checkpoint of that step to go on from the one before'
    )


def _sha256(place: flow.Place) -> str:
  return hashlib.sha256(json.dumps(place, sort_keys=True).encode()).hexdigest()
