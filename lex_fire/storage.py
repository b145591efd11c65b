"""Where runs keep their files: directories, and buckets of Google Cloud Storage (gs://BUCKET/...).

A path of either is used alike, but for what a bucket cannot do: it replaces whole objects, so that
nothing is ever half written there, and to append is to write anew.
"""

import contextlib
import errno
import importlib.util
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import cast

from lex_fire import errors
from lex_fire.data import files

_BUCKETS = 'gs://'


def _has_client() -> bool:
  return importlib.util.find_spec('gcsfs') is not None


# Or etils imports TensorFlow for its reader of buckets; it asks once, when first used.
if _has_client():
  os.environ.setdefault('EPATH_USE_TF', '0')


def _of_this_machine(text: str | os.PathLike[str]) -> pathlib.Path:
  try:
    return pathlib.Path(text).expanduser()
  except RuntimeError as error:  # ~NAME
    raise errors.UserError(f'{os.fspath(text)!r}: there is no such user, so no home') from error


def path(text: str | os.PathLike[str]) -> pathlib.Path:
  """Returns the path of a directory or a file, or what has the methods of one, in a bucket.

  Raises:
    errors.UserError: if it is in a bucket, and what reads buckets is not installed; or of another
      kind of storage; or in the home of a user that is not there.
  """
  text = os.fspath(text)
  scheme, is_url, _ = text.partition('://')
  if not is_url:
    return _of_this_machine(text)
  if scheme != 'gs':
    raise errors.UserError(f'{text!r} must be a directory, or gs://BUCKET/... of Google Cloud')
  if not _has_client():
    raise errors.UserError(f'{text!r} is in a bucket; pip install -r requirements-gcs.txt first')
  from etils import epath

  return cast(pathlib.Path, epath.Path(text))


def local(text: str | os.PathLike[str], name: str) -> pathlib.Path:
  """Returns the path of what has to be a directory; `name` says what it is of.

  Raises:
    errors.UserError: if it is in a bucket, or in the home of a user that is not there.
  """
  if '://' in os.fspath(text):
    raise errors.UserError(f'{name}={os.fspath(text)!r} must be a directory of this machine')
  return _of_this_machine(text)


def is_bucket(where: str | os.PathLike[str]) -> bool:
  """Returns whether a path is in a bucket."""
  return os.fspath(where).startswith(_BUCKETS)


def absolute(where: pathlib.Path) -> pathlib.Path:
  """Returns a path that does not depend on the working directory."""
  return where if is_bucket(where) else where.absolute()


def common(paths: Sequence[pathlib.Path]) -> pathlib.Path:
  """Returns the deepest directory that has all of some paths.

  Raises:
    errors.UserError: if some are in a bucket and some are not, or in several.
  """
  texts = [os.fspath(absolute(where)) for where in paths]
  found = ''
  if len(set(map(is_bucket, texts))) == 1:
    found = os.path.commonpath([text.removeprefix(_BUCKETS) for text in texts])
  if not found:
    raise errors.UserError(f'{", ".join(texts)} are in no one place; give --output')
  return path(_BUCKETS * is_bucket(texts[0]) + found)


@contextlib.contextmanager
def _network() -> Iterator[None]:
  """Makes an OSError that says what went wrong of any of a network client's own errors."""
  try:
    yield
  except Exception as error:
    raise OSError(errno.EIO, f'{type(error).__name__}: {error}') from error


def write(where: pathlib.Path, content: bytes | str) -> None:
  """Writes a file whole or not at all.

  Raises:
    OSError: if it cannot be written.
  """
  data = content.encode() if isinstance(content, str) else content
  if is_bucket(where):
    with _network():
      where.write_bytes(data)
    return
  files.write_whole(where, lambda path: path.write_bytes(data))


def move(where: pathlib.Path, target: pathlib.Path) -> None:
  """Moves a file or a directory to a place whose directory is made if it is not there.

  Raises:
    OSError: if it is not there, or cannot be moved.
  """
  if is_bucket(where):
    write(target.parent / '.directory', '')  # which in a bucket is there if something is in it
  else:
    target.parent.mkdir(parents=True, exist_ok=True)
  where.rename(target)


def append(where: pathlib.Path, content: bytes | str) -> None:
  """Appends to a file, which is made if it is not there; all of it, or on an error nothing.

  Raises:
    OSError: if it cannot be written.
  """
  data = content.encode() if isinstance(content, str) else content
  if is_bucket(where):
    with _network():
      where.write_bytes((where.read_bytes() if where.exists() else b'') + data)
    return
  size = where.stat().st_size if where.exists() else 0
  try:
    with where.open('ab') as file:
      file.write(data)
  except OSError:
    if where.exists():
      os.truncate(where, size)
    raise
