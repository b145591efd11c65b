"""Traces of some steps of a run, which TensorBoard's profile plugin and XProf find in its workdir.

    tensorboard --logdir=WORKDIR          (pip install xprof)

Both look for RUN/HOST.xplane.pb in plugins/profile (openxla.org/xprof).
"""

import pathlib
import tempfile
from collections.abc import Sequence

import jax

from lex_fire import errors, reporting, storage


def check(steps: Sequence[int] | None, last: int) -> tuple[int, int] | None:
  """Returns the first and the last step to trace, as they are counted in the logs: from 1.

  Args:
    steps: these two; None: none are to be traced.
    last: step of the run.

  Raises:
    errors.UserError: if they are not two, or not in order, or not of the run.
  """
  if steps is None:
    return None
  if len(steps) != 2 or not 1 <= steps[0] <= steps[1] <= last:
    raise errors.UserError(
      f'--profile={",".join(map(str, steps))} must be the first and the last step to trace, in '
      f'order and from 1 to train.steps={last}, like 11,15'
    )
  return steps[0], steps[1]


class Profile:
  """A trace of some steps of this process, or of none.

  Attributes:
    first: step of it, before which `start` is called; 0: there is none.
    last: step of it, after which `stop` is called; likewise.
  """

  def __init__(self, workdir: pathlib.Path, steps: tuple[int, int] | None, done: int):
    """Plans a trace.

    Args:
      workdir: of the run.
      steps: first and last; None: nothing is traced.
      done: steps taken already, which cannot be traced any more.
    """
    self._workdir = workdir
    self._written: tempfile.TemporaryDirectory[str] | None = None  # while it traces
    asked_first, self.last = steps or (0, 0)
    self.first = max(asked_first, done + 1)
    if self.first > self.last:
      if steps:
        reporting.say(f'steps {asked_first} to {self.last} are taken already, and not profiled')
      self.first = self.last = 0

  def start(self) -> None:
    """Begins to trace."""
    self._written = tempfile.TemporaryDirectory()
    jax.profiler.start_trace(self._written.name)

  def stop(self) -> None:
    """Writes the trace if one was begun.

    Raises:
      errors.UserError: if it cannot be written.
    """
    if self._written is None:
      return
    folder = self._workdir / 'plugins' / 'profile' / f'steps-{self.first}-{self.last}'
    try:
      with self._written as written:
        self._written = None
        jax.profiler.stop_trace()
        folder.mkdir(parents=True, exist_ok=True)
        # By process: those of one machine would overwrite each other's.
        for path in pathlib.Path(written).glob('plugins/profile/*/*'):
          host, _, kind = path.name.partition('.')
          storage.write(folder / f'{host}-{jax.process_index()}.{kind}', path.read_bytes())
    except (OSError, RuntimeError) as error:
      raise errors.UserError(
        f'the profile of steps {self.first} to {self.last} cannot be written into '
        f'{str(folder)!r}: {error}; make room, or leave out --profile'
      ) from error
    reporting.say(f'profile written: tensorboard --logdir={self._workdir}')

  close = stop  # when the run ends before
