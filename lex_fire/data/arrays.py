"""The .npy files of a prepared stream, written in constant memory."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

if TYPE_CHECKING:
  from lex_fire.data import stream


def write_tokens(
  path: pathlib.Path, vocabulary_size: int, documents: Iterable[stream.Document]
) -> tuple[dict[str, Any], list[tuple[int, int, int]]]:
  """Writes the tokens of documents end to end, document by document.

  Args:
    path: of the file.
    vocabulary_size: number of token ids, which decides on uint16 or uint32.
    documents: to write.

  Returns:
    Their counts, hash and size, and of questions where inputs, prompt and answer end.
  """
  dtype = np.dtype('<u2' if vocabulary_size <= 2**16 else '<u4')
  sha256, ends = hashlib.sha256(), []
  count = tokens = text_bytes = 0
  with path.open('wb') as file:
    _write_header(file, dtype, tokens)
    for document in documents:
      content = document.tokens_L.astype(dtype).tobytes()
      file.write(content)
      sha256.update(content)
      if document.ends is not None:
        ends.append((*(tokens + end for end in document.ends), tokens + len(document.tokens_L)))
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
  }, ends


def write_ends(path: pathlib.Path, ends: list[tuple[int, int, int]]) -> None:
  """Writes where inputs, prompt and answer of each question end, int64."""
  with path.open('wb') as file:
    np.save(file, np.array(ends, np.int64))


def _write_header(file: BinaryIO, dtype: np.dtype, tokens: int) -> None:
  """Writes the header of an .npy file; NumPy pads it to one size for any number of tokens."""
  file.seek(0)
  header = {'descr': dtype.str, 'fortran_order': False, 'shape': (tokens,)}
  np.lib.format.write_array_header_1_0(file, header)
