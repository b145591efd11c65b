"""A prepared stream: one flat array of tokens on disk, and a manifest that says what it is.

    DIRECTORY/tokens.npy     uint16 or uint32, the documents end to end; read by memory map
    DIRECTORY/manifest.json  identity (task, split, corpus, vocabulary), counts, hash of the tokens

It is written beside its place and moved there in one step, so it is either whole or not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from lex_fire import errors

_TOKENS = 'tokens.npy'
_MANIFEST = 'manifest.json'


class Document(NamedTuple):
  """A document to write.

  Attributes:
    tokens_L: its tokens, the last of which is EOS.
    text_bytes: the length of its text in UTF-8.
  """

  tokens_L: np.ndarray
  text_bytes: int


class Stream(NamedTuple):
  """A stream to read.

  Attributes:
    tokens_L: all tokens, memory-mapped.
    manifest: the identity it was written with, and documents, tokens, text_bytes, sha256 (of the
      tokens' little-endian bytes), file_bytes.
  """

  tokens_L: np.ndarray
  manifest: dict[str, Any]


def write(path: pathlib.Path, identity: Mapping[str, Any], documents: Iterable[Document]) -> None:
  """Writes a stream document by document; if another process was faster, its stream stays.

  Args:
    path: the stream's directory, which does not exist yet.
    identity: JSON values that say what the tokens are; its 'vocabulary' has their 'size'.
    documents: at least one.

  Raises:
    errors.UserError: if there is no document, or no directory can be made there.
  """
  with _temporary_directory(path) as temporary:
    work = pathlib.Path(temporary, 'stream')  # inside, for `temporary` is private to its user
    work.mkdir()
    counts = _write_tokens(work / _TOKENS, identity['vocabulary']['size'], documents)
    if not counts['documents']:
      raise errors.UserError(f'stream {path.name!r} would have no document; use another split')
    (work / _MANIFEST).write_text(json.dumps({**identity, **counts}, indent=2) + '\n')
    try:
      os.replace(work, path)
    except OSError:
      if not path.exists():
        raise


def read(path: pathlib.Path) -> Stream:
  """Opens a stream if it is whole; its tokens are read when they are used.

  Args:
    path: the stream's directory.

  Raises:
    errors.UserError: if a file is missing or damaged.
  """
  manifest = _read_manifest(path)
  try:
    size = (path / _TOKENS).stat().st_size
  except OSError as error:
    raise _damage(path / _TOKENS, f'is unreadable: {error.strerror}') from error
  if size != manifest.get('file_bytes'):
    raise _damage(path / _TOKENS, f'has {size} bytes, not {manifest.get("file_bytes")}')
  return Stream(np.load(path / _TOKENS, mmap_mode='r'), manifest)


def check(path: pathlib.Path, identity: Mapping[str, Any]) -> None:
  """Checks that a stream is whole and has the identity expected.

  Raises:
    errors.UserError: if a file is missing or damaged, or the manifest has another identity.
  """
  manifest = read(path).manifest
  for key, value in identity.items():
    if manifest.get(key) != value:
      raise _damage(path / _MANIFEST, f'has {key}={manifest.get(key)!r}, not {value!r}')


def _read_manifest(path: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads((path / _MANIFEST).read_text())
  except OSError as error:
    raise _damage(path / _MANIFEST, f'is unreadable: {error.strerror}') from error
  except ValueError as error:
    raise _damage(path / _MANIFEST, f'is not JSON: {error}') from error


def _damage(file: pathlib.Path, what: str) -> errors.UserError:
  return errors.UserError(f'{str(file)!r} {what}; delete its directory to have it prepared anew')


def _temporary_directory(path: pathlib.Path) -> tempfile.TemporaryDirectory[str]:
  """Makes a directory beside a path, on the same disk, so that it can be moved in one step."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix=f'.{path.name}.', dir=path.parent)
  except OSError as error:
    raise errors.UserError(
      f'cannot write in {str(path.parent)!r}: {error.strerror}; use another directory'
    ) from error


def _write_tokens(
  path: pathlib.Path, vocabulary_size: int, documents: Iterable[Document]
) -> dict[str, Any]:
  """Writes tokens.npy in constant memory and returns what the manifest says of it."""
  dtype = np.dtype('<u2' if vocabulary_size <= 2**16 else '<u4')
  sha256 = hashlib.sha256()
  count = tokens = text_bytes = 0
  with path.open('wb') as file:
    _write_header(file, dtype, tokens)
    for document in documents:
      content = document.tokens_L.astype(dtype).tobytes()
      file.write(content)
      sha256.update(content)
      count += 1
      tokens += len(document.tokens_L)
      text_bytes += document.text_bytes
    _write_header(file, dtype, tokens)
  return {
    'documents': count,
    'tokens': tokens,
    'text_bytes': text_bytes,
    'sha256': sha256.hexdigest(),
    'file_bytes': path.stat().st_size,
  }


def _write_header(file: BinaryIO, dtype: np.dtype, tokens: int) -> None:
  """Writes the header of an .npy file; NumPy pads it to one size for any number of tokens."""
  file.seek(0)
  header = {'descr': dtype.str, 'fortran_order': False, 'shape': (tokens,)}
  np.lib.format.write_array_header_1_0(file, header)
