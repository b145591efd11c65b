"""A process of its own for what may fail in any way: it may hang, or end with the process.

A kernel that waits for what never comes never returns, and one that reads past an array leaves a
GPU's context of no use to its process. Neither must end what else is to be measured.
"""

import concurrent.futures
import multiprocessing
import os
import signal
from collections.abc import Callable
from typing import Any


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
  """Returns function(*arguments), computed where nothing else ever was."""
  spawn = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
    return pool.submit(function, *arguments).result()


def reason(error: Exception) -> str:
  """Returns the first line of what an exception says."""
  lines = f'{type(error).__name__}: {error}'.splitlines()
  return lines[0][:200]


def _serve(connection: Any) -> None:
  """Calls the functions that come, until no more do."""
  os.setsid()  # so that what it starts ends with it
  while True:
    try:
      function = connection.recv()
    except EOFError:
      return
    try:
      answer = function(), None
    except Exception as error:  # libraries say in many kinds of exceptions what they cannot do
      answer = None, reason(error)
    connection.send(answer)


class Worker:
  """Calls functions in processes of their own, one after another.

  Functions of one kind share a process that has done nothing else, until one fails: who knows what
  that leaves behind.
  """

  def __init__(self):
    """Starts nothing yet."""
    self._process, self._connection, self._kind = None, None, ''

  def call(self, kind: str, function: Callable[[], Any], limit: float) -> Any:
    """Returns what a function does.

    Args:
      kind: of the function.
      function: that can be pickled.
      limit: seconds that it may take, and the start of a process.

    Raises:
      TimeoutError: if it takes longer.
      RuntimeError: with the first line of the exception that it raised, or if the process ended.
    """
    if self._process is None or kind != self._kind:
      self.end()
      self._start(kind)
    try:
      return self._call(function, limit)
    except (TimeoutError, RuntimeError):
      self.end()
      raise

  def _start(self, kind: str) -> None:
    context = multiprocessing.get_context('spawn')
    self._connection, other = context.Pipe()
    self._process = context.Process(target=_serve, args=(other,), daemon=True)
    self._process.start()
    other.close()
    self._kind = kind

  def _call(self, function: Callable[[], Any], limit: float) -> Any:
    try:
      self._connection.send(function)
      answer = self._connection.recv() if self._connection.poll(limit) else None
    except (EOFError, OSError):
      self._process.join()
      raise RuntimeError(f'its process ended with {self._process.exitcode}') from None
    if answer is None:
      raise TimeoutError(f'no end within {limit:.0f} s')
    found, failure = answer
    if failure is not None:
      raise RuntimeError(failure)
    return found

  def end(self) -> None:
    """Ends the process that there is, and what it has started, at once."""
    if self._process is None:
      return
    try:
      os.killpg(self._process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has ended, or not begun to serve
      self._process.kill()
    self._process.join()
    self._connection.close()
    self._process = None
