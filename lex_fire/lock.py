"""One run at a time in a workdir: two that write the same checkpoints would destroy both.

The lock is the operating system's, so that it ends with its process, however that ends; that of a
network file system may outlive a machine that vanishes.
"""

import contextlib
import errno
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator

import jax

from lex_fire import errors, storage


@contextlib.contextmanager
def hold(workdir: pathlib.Path) -> Iterator[None]:
  """Holds the lock of a workdir, on the first process; of a bucket, which has none, nothing.

  Args:
    workdir: a directory that is there.

  Raises:
    errors.UserError: if another process holds it, or it cannot be written or locked.
  """
  if jax.process_index() or storage.is_bucket(workdir):
    yield
    return
  path = workdir / '.lock'
  with contextlib.ExitStack() as stack:
    try:
      file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
      stack.callback(os.close, file)
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      os.ftruncate(file, 0)
      os.write(file, f'process {os.getpid()} on {socket.gethostname()}'.encode())
    except BlockingIOError as error:
      raise errors.UserError(
        f'workdir {str(workdir)!r} is in use by {path.read_text() or "another process"}; wait for '
        f'its end, use another --workdir or, if that machine is gone, delete {str(path)!r}'
      ) from error
    except OSError as error:
      is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
      remedy = 'make room' if is_full else 'use another --workdir'
      raise errors.UserError(
        f'workdir {str(workdir)!r} cannot be locked: {error.strerror}; {remedy}'
      ) from error
    yield
