"""One run at a time in a workdir: two that write the same checkpoints would destroy both.

The lock is the operating system's, so that it ends with its process, however that ends.
"""

import contextlib
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator

import jax

from lex_fire import errors, storage


@contextlib.contextmanager
def hold(workdir: pathlib.Path) -> Iterator[None]:
  """Holds the lock of a workdir, on the first process; in a bucket, which has none, nothing.

  Args:
    workdir: a directory that is there.

  Raises:
    errors.UserError: if another process holds it, or it cannot be written or locked.
  """
  if jax.process_index() or storage.is_bucket(workdir):
    yield
    return
  with contextlib.ExitStack() as stack:
    try:
      file = stack.enter_context((workdir / '.lock').open('a+'))
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      file.truncate(0)
      print(f'process {os.getpid()} on {socket.gethostname()}', file=file, flush=True)
    except BlockingIOError as error:
      file.seek(0)
      raise errors.UserError(
        f'workdir {str(workdir)!r} is in use by {file.read().strip() or "another process"}; wait '
        'for its end, or use another --workdir'
      ) from error
    except OSError as error:
      raise errors.UserError(
        f'workdir {str(workdir)!r} cannot be locked: {error.strerror or error}; make room, or use '
        'another --workdir'
      ) from error
    yield
