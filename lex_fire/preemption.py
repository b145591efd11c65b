"""Machines that are taken away: SIGTERM asks a run to save and to end, on all its hosts at once."""

import signal
import threading
from types import TracebackType

import jax
from jax.experimental import multihost_utils


class Notice:
  """Whether SIGTERM came, which clouds and schedulers send some seconds before they kill.

  Of several hosts JAX tells each, at the same step, once any of them was told. A context: outside
  of it SIGTERM does what it did before. In a thread, where Python lets nobody listen, none comes.
  """

  def __enter__(self) -> 'Notice':
    """Begins to listen."""
    self._came = False
    self._listens = threading.current_thread() is threading.main_thread()
    # With several processes JAX's own service listens, since `jax.distributed.initialize`.
    self._listens &= jax.process_count() == 1
    if self._listens:
      self._before = signal.signal(signal.SIGTERM, self._note)
    return self

  def _note(self, number, frame) -> None:
    self._came = True

  def came(self, step: int) -> bool:
    """Returns whether to end after this step, to which all hosts must come with this question."""
    if jax.process_count() == 1:
      return self._came
    return multihost_utils.reached_preemption_sync_point(step)

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    """Ends to listen."""
    if self._listens:
      signal.signal(signal.SIGTERM, self._before)
