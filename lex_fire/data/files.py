"""Files of text, plain or compressed; what is wrong with one is said by its name.

And how a file is written: whole or not at all.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import pathlib
import tokenize
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from lex_fire import errors


class _Zstandard(io.RawIOBase):
  """Reads all frames of a .zst file; one that is cut off is an EOFError, as in other formats."""

  def __init__(self, path: pathlib.Path):
    import zstandard  # of all that reads text, only files of this kind need it

    self._new_frame = zstandard.ZstdDecompressor().decompressobj
    self._file = path.open('rb')
    self._frame = None
    self._input, self._output = b'', memoryview(b'')

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    while not self._output:
      self._input = self._input or self._file.read(2**17)
      if not self._input:
        if self._frame is not None:
          raise EOFError('Compressed file ended before the end-of-stream marker was reached')
        return 0
      self._frame = self._frame or self._new_frame()
      self._output, self._input = memoryview(self._frame.decompress(self._input)), b''
      if self._frame.eof:
        self._frame, self._input = None, self._frame.unused_data
    count = min(len(buffer), len(self._output))
    buffer[:count], self._output = self._output[:count], self._output[count:]
    return count

  def close(self) -> None:
    self._file.close()
    super().close()


_OPEN: dict[str, Callable[[pathlib.Path], Any]] = {
  '.bz2': bz2.open,
  '.gz': gzip.open,
  '.xz': lzma.open,
  '.zst': lambda path: io.BufferedReader(_Zstandard(path), 2**17),
}
COMPRESSED = tuple(_OPEN)


def read_text(path: pathlib.Path) -> str:
  """Returns the text of a file, which is one document.

  Raises:
    errors.UserError: if the file is unreadable, damaged, not UTF-8, or empty.
  """
  with _reading(path) as file:
    content = file.read()
  document = _decoded(content, repr(str(path)))
  if not document:
    raise errors.UserError(f'{str(path)!r} is empty; remove it or narrow the glob')
  return document


def read_source(path: pathlib.Path) -> str:
  """Returns the text of a file of Python in the encoding that it declares, '' if it has none."""
  try:
    with tokenize.open(path) as file:
      return file.read()
  except (SyntaxError, UnicodeDecodeError):  # SyntaxError: the encoding is unknown
    return ''


def read_jsonl(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  """Yields the objects of a file of JSON lines.

  Raises:
    errors.UserError: on the way, naming file and line, for one that is not a JSON object in UTF-8;
      if the file is unreadable, damaged or empty.
  """
  number = 0
  with _reading(path) as file:
    for number, line in enumerate(file, start=1):
      yield parse_object(line, f'{str(path)!r} line {number}')
  if not number:
    raise errors.UserError(f'{str(path)!r} is empty; remove it or narrow the glob')


def parse_object(line: bytes, name: str) -> dict[str, Any]:
  """Reads a line as a JSON object; `name` says where it stands.

  Raises:
    errors.UserError: if it is none.
  """
  try:
    value = json.loads(_decoded(line, name))
  except (ValueError, RecursionError) as error:
    if isinstance(error, errors.UserError):
      raise
    if not isinstance(error, json.JSONDecodeError):  # a number or a nesting beyond Python's limits
      raise errors.UserError(f'{name} is no JSON to be read: {error}; correct the line') from error
    raise errors.UserError(
      f'{name} is not JSON: {error.msg} at column {error.colno}; correct or remove the line'
    ) from error
  if not isinstance(value, dict):
    raise errors.UserError(
      f'{name} is a JSON {type(value).__name__}, not an object with fields; correct the line'
    )
  return value


def text_field(values: dict[str, Any], field: str, name: str) -> str:
  """Returns a field that must be a text with something in it; `name` says where it stands.

  Raises:
    errors.UserError: if it is not.
  """
  value = values.get(field)
  if not isinstance(value, str) or not value:
    there = ', '.join(values) or 'nothing'
    what = f'an empty {field!r}' if value == '' else f'no text in {field!r}, but {value!r:.50}'
    raise errors.UserError(f'{name} has {what}, among {there}; correct or remove the line')
  try:
    value.encode()
  except UnicodeEncodeError as error:  # JSON can spell halves of characters
    raise errors.UserError(
      f'{name} has {value[error.start]!r} in {field!r}, which is no character; correct the line'
    ) from error
  return value


def write_whole(path: pathlib.Path, write: Callable[[pathlib.Path], Any]) -> Any:
  """Writes a file beside its place, and moves it there once it is on disk.

  Args:
    path: of the file; what is there is replaced.
    write: writes a file at the path that it is given.

  Returns:
    What `write` does.
  """
  temporary = path.with_name(f'.{path.name}.{os.getpid()}')
  try:
    found = write(temporary)
    with temporary.open('rb') as file:
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
  return found


def write_texts(directory: str | pathlib.Path, contents: Mapping[str, str]) -> None:
  """Writes files in UTF-8, each whole or not at all.

  Args:
    directory: made if it is not there.
    contents: {name of a file: its text}; what is there is replaced.

  Raises:
    errors.UserError: if they cannot be written.
  """
  directory = pathlib.Path(directory)
  try:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
      path = directory / name
      write_whole(path, lambda path, content=content: path.write_bytes(content.encode()))
  except OSError as error:
    raise errors.UserError(
      f'cannot write in {str(directory)!r}: {error.strerror}; use another directory'
    ) from error


def _decoded(content: bytes, name: str) -> str:
  try:
    return content.decode()
  except UnicodeDecodeError as error:
    raise errors.UserError(f'{name} is not UTF-8 at byte {error.start}; convert it') from error


@contextlib.contextmanager
def _reading(path: pathlib.Path) -> Iterator[BinaryIO]:
  """Opens a file by its suffix; what is wrong with it becomes a UserError."""
  name = repr(str(path))
  try:
    with _OPEN.get(path.suffix, lambda path: path.open('rb'))(path) as file:
      yield file
  except errors.UserError:
    raise
  except OSError as error:
    if error.strerror is None:  # gzip's and bz2's own, of a damaged file
      raise _damage(path, error) from error
    raise errors.UserError(f'{name} is unreadable: {error.strerror}; correct that') from error
  except Exception as error:
    # zstandard, which only .zst files need, has an error of its own.
    kinds = (EOFError, zlib.error, lzma.LZMAError)
    if not isinstance(error, kinds) and type(error).__name__ != 'ZstdError':
      raise
    raise _damage(path, error) from error


def _damage(path: pathlib.Path, error: Exception) -> errors.UserError:
  return errors.UserError(f'{str(path)!r} is not a whole {path.suffix} file: {error}; make it anew')
