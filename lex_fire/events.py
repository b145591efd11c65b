"""TensorBoard's events of a run, kept in memory and written by whoever calls.

tensorboardX makes the messages. Its own writers wait for a thread, which on a full disk ends, or
in a bucket try again for minutes as they are swept away: here a file is written as all others are.
"""

import pathlib
import socket
import struct
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
    from tensorboardX import record_writer, summary
    from tensorboardX.proto import event_pb2

    protos: Any = event_pb2  # its names are made as it is imported
    self._event, self._scalar = protos.Event, summary.scalar
    self._checksum = record_writer.masked_crc32c
    # By such a name TensorBoard knows what it can read.
    name = f'events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}'
    self._path, self._unwritten = directory / name, bytearray()
    start = protos.SessionLog(status=protos.SessionLog.START)
    self._add(self._event(file_version='brain.Event:2'))
    self._add(self._event(step=first_step, session_log=start))
    self.flush()

  def _add(self, event: Any) -> None:
    """Adds a record: its length, that length's checksum, the message and its own."""
    event.wall_time = time.time()
    for data in (struct.pack('<Q', event.ByteSize()), event.SerializeToString()):
      self._unwritten += data + struct.pack('<I', self._checksum(data))

  def write(self, step: int, values: dict[str, float]) -> None:
    """Adds scalars, which stay in memory until `flush`."""
    for name, value in values.items():
      self._add(self._event(step=step, summary=self._scalar(name, value)))

  def flush(self) -> None:
    """Writes what is in memory.

    Raises:
      OSError: if it cannot be written.
    """
    storage.append(self._path, bytes(self._unwritten))
    self._unwritten.clear()
