"""What a run's wall time goes to: its steps, or what its devices wait for in between.

The host works ahead: while devices compute a step it reads the next batch and reports the last
step, and what it does then costs nothing. Only what it does while they wait is lost.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax

PARTS: tuple[str, ...] = ('input', 'logging', 'validation', 'checkpoint', 'profile')
_Seconds = dict[str, float]  # by part, and 'step', which has what no part lost


class Spent:
  """The wall time of a run after its first step, which compiles; by what it was spent on.

  After each part of the host's work it asks whether the newest step is done, and never waits for
  it. If it is not, nothing was lost; if it is, all of the part counts as lost. So a part that began
  while the step was still computed counts for more than it cost, never for less.
  """

  def __init__(self):
    """Begins with the first step."""
    self._lost = dict.fromkeys(PARTS, 0.0)
    self._newest: Any = None  # a jax.Array, whose declared type lacks is_ready
    self._begun, self._warm = time.monotonic(), None
    self._part_begun: float | None = None  # of the part that is going on
    self._last: _Seconds = {}

  def dispatched(self, value: jax.Array) -> None:
    """Says that devices were given a step, of which `value` is an output."""
    self._newest = value

  def warm(self) -> None:
    """Says that the first step is done: what is spent from here on counts."""
    self._warm = time.monotonic()
    self._lost = dict.fromkeys(PARTS, 0.0)
    self._last = self._seconds()

  @contextlib.contextmanager
  def on(self, part: str) -> Iterator[None]:
    """Measures what the host does inside as one of PARTS."""
    self._part_begun = start = time.monotonic()
    try:
      yield
    finally:
      self._part_begun = None
      if self._newest is None or self._newest.is_ready():
        self._lost[part] += time.monotonic() - start

  def shares(self) -> dict[str, float]:
    """Returns the share of each part and of the steps since the last call; together 1.

    A part that is going on counts from the next call on.
    """
    now = self._seconds()
    since = {name: seconds - self._last[name] for name, seconds in now.items()}
    self._last = now
    return _shares(since)

  def lines(self) -> list[str]:
    """Returns the shares of the run so far in words, a line; none if it took no step."""
    if self._warm is None:
      return []
    seconds = self._seconds()
    shown = ', '.join(
      f'{name} {share:.1%}'
      for name, share in _shares(seconds).items()
      if name != 'profile' or share
    )
    return [
      f'time: {shown} of {sum(seconds.values()):,.1f} s; the first step, which compiles, took '
      f'{self._warm - self._begun:,.1f} s'
    ]

  def _seconds(self) -> _Seconds:
    """Returns the seconds since the first step was done."""
    total = (self._part_begun or time.monotonic()) - (self._warm or self._begun)
    return {'step': total - sum(self._lost.values()), **self._lost}


def _shares(seconds: _Seconds) -> dict[str, float]:
  total = max(sum(seconds.values()), 1e-9)
  return {name: part / total for name, part in seconds.items()}
