"""What is kept of a step whose loss is not finite, so that it can be looked into."""

import collections
import io
import json
import pathlib

import jax
import numpy as np

from lex_fire import errors, feed, storage


class Recent:
  """The last batches of this process, from which a step that went wrong is written down."""

  def __init__(self, workdir: pathlib.Path, count: int):
    """Keeps `count` batches at most; writes into `workdir`/non_finite."""
    self._folder = workdir / 'non_finite'
    self._batches: collections.deque[tuple[int, feed.Batch]] = collections.deque(maxlen=count)

  def add(self, done: int, batch: feed.Batch) -> None:
    """Keeps the rows with which `done` steps will have been taken."""
    self._batches.append((done, batch))

  def write(self, done: int, values: dict[str, float]) -> pathlib.Path:
    """Writes the step that made it `done` steps; returns the folder.

    `step.json` has the step and its values, `batch-HOST.npz` the rows of each host, without what is
    None of them. With the config, and the state at the newest checkpoint before it, from which a
    run of the same config comes to the same state again, that is all the step was made of.

    Args:
      done: a step whose batch is kept.
      values: loss and gradient_norm.

    Raises:
      errors.UserError: if it cannot be written.
    """
    batch = dict(self._batches)[done]
    folder = self._folder / f'step-{done}'
    arrays = {name: x for name, x in batch.items() if x is not None}
    try:
      folder.mkdir(parents=True, exist_ok=True)
      rows = io.BytesIO()
      np.savez(rows, **arrays)
      storage.write(folder / f'batch-{jax.process_index()}.npz', rows.getvalue())
      # Not a number, in JSON: as text.
      written = {'step': done, **{name: str(value) for name, value in values.items()}}
      storage.write(folder / 'step.json', json.dumps(written, indent=2) + '\n')
    except OSError as error:
      raise errors.UserError(
        f'step {done} has {values}, and {str(folder)!r} cannot be written: {error.strerror}'
      ) from error
    return folder
