"""What a run trains on and is judged by, as batches of this process's rows."""

import hashlib
import pathlib
from collections.abc import Callable, Collection, Iterator

from lex_fire import checkpoint, errors, storage
from lex_fire import config as config_lib
from lex_fire.data import (
  batches,
  draws,
  live,
  masking,
  positions,
  prepare,
  reading,
  stream,
  tasks,
)

Batch = batches.Batch


def is_counted(config: config_lib.Config) -> bool:
  """Returns whether batches have no positions and segments: rows are whole, and count from 0."""
  return not (config.data.isolate_documents or config.data.position_range)


def own_rows(config: config_lib.Config) -> int:
  """Returns how many rows of what is computed at once have positions of their own; 1: they share.

  As attention.choice counts them.
  """
  c = config.data
  return c.batch_size // config.train.accumulation if c.isolate_documents else 1


class Data:
  """The windows that this process trains on and is judged by; prepared once, read by memory map.

  With data.streaming those of training are read from the Task as the run goes on.

  For a bidirectional model with tokens masked, and at randomized positions if the config says so:
  in training other ones at each step, and always the same when it is judged.
  """

  def __init__(
    self,
    config: config_lib.Config,
    say: Callable[[str], None] = lambda line: None,
    share: tuple[int, int] = (0, 1),
  ):
    """Prepares and opens both splits.

    Args:
      config: of the run.
      say: is told what is cut of questions.
      share: which part of each batch's rows this process reads, and of how many; see
        `sharding.share`.

    Raises:
      errors.UserError: as data.prepare and data.live do; for a vocabulary larger than the model's,
        with a mask if it is bidirectional; for a split without one window.
    """
    self._config, self._say = config, say
    c = config.data
    self._process = {'process_index': share[0], 'process_count': share[1]}
    self._validation, self.validation_manifest = self._rows('validation')
    self._vocabulary_size = self.validation_manifest['vocabulary']['size']
    self._check_ids()
    self._live, train_hash = self._streamed() if c.streaming else (None, '')
    if self._live is None:
      rows, manifest = self._rows('train')
      seed = config.train.seed
      self._drawn = batches.TrainSampler(rows, c.batch_size, seed=seed, **self._process)
      train_hash = manifest['sha256']
    self.hashes = {
      'train': train_hash,
      'validation': self.validation_manifest['sha256'],
      checkpoint.VOCABULARY: self.validation_manifest['vocabulary']['name'],
    }

  def _check_ids(self):
    c = self._config.model
    ids, masks = self._vocabulary_size, 0 if c.causal else 1
    if ids + masks > c.vocab_size:
      mask = '' if c.causal else f' and the mask of a bidirectional model, {ids + masks} together'
      raise errors.UserError(
        f'model.vocab_size={c.vocab_size} is less than the {ids} ids of task '
        f'{self._config.data.task!r}{mask}; raise it, as by --config.model.vocab_size={ids + masks}'
      )

  def _streamed(self):
    """Returns the Task's windows as they are read, and a hash of what they are read from."""
    c = self._config.data
    task = tasks.get_task(c.spec('train', 'validation'))
    found = live.Live(
      task,
      c.length,
      c.batch_size,
      seed=self._config.train.seed,
      isolate_documents=c.isolate_documents,
      **self._process,
    )
    content = [reading.fingerprint(task, live.SPLIT), reading.vocabulary_of(task).name]
    return found, hashlib.sha256(' '.join(content).encode()).hexdigest()

  def _rows(self, split):
    c = self._config.data
    directory = storage.local(c.directory, 'data.directory')
    # Both splits, as no file may be in both.
    prepared = stream.read(prepare.prepare(c.spec('train', 'validation'), split, directory))
    eos_id = prepared.manifest['vocabulary']['eos_id']
    isolate = c.isolate_documents
    if prepared.ends is None:
      rows = batches.Windows(prepared.parts, c.length, eos_id=eos_id, isolate_documents=isolate)
    else:
      self._check_questions()
      rows = batches.Questions(
        prepared.parts, prepared.ends, c.length, eos_id=eos_id, isolate_documents=isolate
      )
      in_rows = f' in {rows.num_windows:,} rows' if isolate else ''
      self._say(
        f'{split}: {rows.num_questions:,} questions{in_rows}, of which {rows.num_cut:,} are cut to '
        f'{c.length} tokens, by {rows.cut_tokens:,} in all'
      )
    return rows, prepared.manifest

  def _check_questions(self):
    c = self._config
    if not c.model.causal:
      raise errors.UserError(
        f'task {c.data.task!r} asks questions for a decoder to answer; model.causal=False does not '
        'go with it'
      )

  def train_batch(self, step: int) -> Batch:
    """Reads this host's rows of the batch of a step, counted from 0."""
    seed = self._config.train.seed
    batch = (self._live or self._drawn).batch(step)
    return self._changed(batch, step, self._config.data.batch_size, seed)

  def save_place(self, workdir: pathlib.Path, keep: Collection[int]) -> None:
    """Saves where the batches so far end, for a checkpoint to come; see live.Live.save.

    Nothing has to be saved of prepared streams, whose batches follow from the step alone.

    Raises:
      errors.UserError: if it cannot be written.
    """
    if self._live is not None:
      self._live.save(workdir, keep)

  def restore_place(self, workdir: pathlib.Path, step: int) -> None:
    """Goes on after `step` steps; see live.Live.restore.

    Raises:
      errors.UserError: if the place was not saved, or is damaged.
    """
    if self._live is not None:
      self._live.restore(workdir, step)

  def validation_batches(self) -> Iterator[Batch]:
    """Yields the first train.validation_windows windows of the validation split, every time."""
    # What training computes at once fits in memory, so this does too.
    rows = self._config.data.batch_size // self._config.train.accumulation
    most = self._config.train.validation_windows
    in_order = batches.batches_in_order(self._validation, rows, most, **self._process)
    return (
      self._changed(batch, ordinal, rows, draws.JUDGE) for ordinal, batch in enumerate(in_order)
    )

  def _changed(self, batch, ordinal, batch_size, seed):
    """Masks tokens and draws positions; batch `ordinal` is of `batch_size` rows over all hosts."""
    c = self._config.data
    if not self._config.model.causal:
      draw_B = ordinal * batch_size + batches.host_rows(batch_size, **self._process)
      batch = masking.corrupt(
        batch, draw_B, seed=seed, rate=c.mask_rate, vocabulary_size=self._vocabulary_size
      )
    if c.position_range:
      batch = positions.randomize(batch, c.position_range, seed=seed, ordinal=ordinal)
    return batch
