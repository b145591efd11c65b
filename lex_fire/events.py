"""TensorBoard's events of a run, written by whoever calls and not by a thread.

tensorboardX' SummaryWriter hands events to a thread. One that cannot write, as on a full disk,
ends, and the run then waits for it for ever: so only the parts are taken that write.
"""

import contextlib
import pathlib
import time
from typing import Any

from lex_fire import storage


class Events:
  """A file of scalars by step, in a directory or a bucket."""

  def __init__(self, directory: pathlib.Path, first_step: int):
    """Begins a file whose first scalars are those after `first_step` steps.

    TensorBoard then drops what files before it have of later ones.

    Raises:
      OSError: if it cannot be written.
    """
    from tensorboardX import event_file_writer, record_writer, summary
    from tensorboardX.proto import event_pb2

    protos: Any = event_pb2  # its names are made as it is imported
    self._event, self._scalar = protos.Event, summary.scalar
    self._writing = storage.network if storage.is_bucket(directory) else contextlib.nullcontext
    start = protos.SessionLog(status=protos.SessionLog.START)
    with self._writing():
      record_writer.directory_check(str(directory))
      # A path of a bucket is one too, with a scheme.
      self._file = event_file_writer.EventsWriter(f'{directory}/events')
      self._file.write_event(self._event(step=first_step, session_log=start))

  def write(self, step: int, values: dict[str, float]) -> None:
    """Adds scalars, which may stay in memory until `flush`.

    Raises:
      OSError: if they cannot be written.
    """
    for name, value in values.items():
      summary = self._scalar(name, value)
      self._file.write_event(self._event(wall_time=time.time(), step=step, summary=summary))

  def flush(self) -> None:
    """Writes what is in memory.

    Raises:
      OSError: if it cannot be written.
    """
    with self._writing():
      self._file.flush()

  def close(self) -> None:
    """Writes what is in memory, and closes the file.

    Raises:
      OSError: if it cannot be written.
    """
    with self._writing():
      self._file.close()
