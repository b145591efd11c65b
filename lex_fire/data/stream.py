"""A prepared stream: flat arrays of tokens on disk, and a manifest that says what they are.

    DIRECTORY/part-00000.npy     uint16 or uint32, its documents end to end; read by memory map
    DIRECTORY/part-00000.ends.npy  of questions: int64 [E, 3], where inputs, prompt and answer end
    DIRECTORY/manifest.json      identity (task, split, corpus, vocabulary), counts, hashes

It is written beside its place, part by part, and moved there in one step, so it is either whole or
not there; parts that a killed writer had finished are not written again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from lex_fire import errors
from lex_fire.data import arrays, batches, files

MANIFEST = 'manifest.json'
WINDOW_LENGTHS = (512, 2048, 8192)  # of which a manifest counts the windows [tokens]
_COUNTS = ('documents', 'tokens', 'text_bytes')


class Document(NamedTuple):
  """A document to write.

  Attributes:
    tokens_L: its tokens, the last of which is EOS.
    text_bytes: the length of its text in UTF-8.
    ends: of a question, the number of tokens of its inputs, and of its inputs and the separator;
      then follows the answer. None: it is no question.
  """

  tokens_L: np.ndarray
  text_bytes: int
  ends: tuple[int, int] | None = None


class Stream(NamedTuple):
  """A stream to read.

  Attributes:
    parts: their tokens_L, memory-mapped.
    ends: of questions, [E, 3] of each part: in its tokens, where the inputs end, where the answer
      begins, and where it ends; None for documents.
    manifest: the identity it was written with; documents, tokens and text_bytes; of documents
      windows, {length: how many}; in `parts` those counts of each, its file's name and file_bytes,
      and sha256 of its tokens' little-endian bytes; and sha256 of the hashes of the parts, in
      hexadecimal, end to end.
  """

  parts: list[np.ndarray]
  ends: list[np.ndarray] | None
  manifest: dict[str, Any]


def _ends_name(name: str) -> str:
  """Returns the name of the file of ends beside a part's."""
  return f'{name.removesuffix(".npy")}.ends.npy'


def record_of(part: int) -> str:
  """Returns the name of the file that says a part is finished, and what a manifest says of it."""
  return f'.part-{part:05d}.npy.json'


@contextlib.contextmanager
def writing(directory: object) -> Iterator[None]:
  """Makes one sentence of what the operating system says when a directory cannot be written in."""
  try:
    yield
  except OSError as error:
    raise errors.UserError(
      f'cannot write in {str(directory)!r}: {error.strerror or error}; make room, or use another '
      'directory'
    ) from error


def write_part(
  directory: pathlib.Path, part: int, vocabulary_size: int, documents: Iterable[Document]
) -> dict[str, Any]:
  """Writes a part in constant memory, whole or not at all, and returns what a manifest says of it.

  A part that is there already is left as it is.

  Args:
    directory: that exists.
    part: its number.
    vocabulary_size: number of token ids.
    documents: all of them questions, or none.

  Raises:
    errors.UserError: if it cannot be written.
  """
  name = f'part-{part:05d}.npy'
  record = directory / record_of(part)
  if record.exists():
    return json.loads(record.read_text())
  with writing(directory):
    counts, ends = files.write_whole(
      directory / name, lambda path: arrays.write_tokens(path, vocabulary_size, documents)
    )
    if ends:
      files.write_whole(directory / _ends_name(name), lambda path: arrays.write_ends(path, ends))
      counts |= {'ends_bytes': 128 + 24 * len(ends), 'ends_sha256': _sha256(np.array(ends))}
    counts = {'file': name, **counts}
    files.write_whole(record, lambda path: path.write_text(json.dumps(counts)))
  return counts


def manifest_of(name: str, identity: Mapping[str, Any], parts: list[dict[str, Any]]) -> str:
  """Returns the content of the manifest of a stream.

  Args:
    name: the stream's.
    identity: JSON values that say what the tokens are.
    parts: what `write_part` returned, in order.

  Raises:
    errors.UserError: if there is no document.
  """
  totals = {name: sum(part[name] for part in parts) for name in _COUNTS}
  if not totals['documents']:
    raise errors.UserError(f'stream {name!r} would have no document; use another split')
  hashes = (part['sha256'] + part.get('ends_sha256', '') for part in parts)
  sha256 = hashlib.sha256(''.join(hashes).encode()).hexdigest()
  manifest = {**identity, **totals, **_windows(parts), 'sha256': sha256, 'parts': parts}
  return json.dumps(manifest, indent=2) + '\n'


def _windows(parts: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
  """Returns how many windows of WINDOW_LENGTHS there are, by length; {} of questions.

  A stream serves every length; these are told for people.
  """
  if is_of_questions({'parts': parts}):
    return {}
  sizes = [part['tokens'] for part in parts]
  counts = {str(length): batches.num_windows(sizes, length) for length in WINDOW_LENGTHS}
  return {'windows': counts}


def finish(
  work: pathlib.Path, path: pathlib.Path, identity: Mapping[str, Any], parts: list[dict[str, Any]]
) -> None:
  """Writes the manifest of parts and moves the stream to its place.

  Args:
    work: the directory that the parts were written in.
    path: the stream's, on the same disk, which does not exist yet.
    identity: JSON values that say what the tokens are.
    parts: what `write_part` returned, in order.

  Raises:
    errors.UserError: if there is no document, or its place cannot be written in.
  """
  content = manifest_of(path.name, identity, parts)
  with writing(path.parent):
    files.write_whole(work / MANIFEST, lambda path: path.write_text(content))
    os.replace(work, path)
    for record in path.glob('.*'):  # last: until the move they are what a restart goes by
      record.unlink()


def read(path: pathlib.Path) -> Stream:
  """Opens a stream if it is whole; its tokens are read when they are used.

  Args:
    path: the stream's directory.

  Raises:
    errors.UserError: if a file is missing or of another size.
  """
  manifest = _read_manifest(path)
  if not manifest.get('parts'):
    raise _damage(path / MANIFEST, 'names no parts')
  parts, ends = [], []
  for part in manifest['parts']:
    parts.append(_load(path / part['file'], part['file_bytes']))
    ends.append(np.empty((0, 3), np.int64))  # of a part without documents
    if 'ends_bytes' in part:
      ends[-1] = _load(path / _ends_name(part['file']), part['ends_bytes'])
  return Stream(parts, ends if any(map(len, ends)) else None, manifest)


def _load(file: pathlib.Path, expected: int) -> np.ndarray:
  """Maps the array of a file of an expected size into memory."""
  try:
    size = file.stat().st_size
  except OSError as error:
    raise _damage(file, f'is unreadable: {error.strerror}') from error
  if size != expected:
    raise _damage(file, f'has {size} bytes, not {expected}')
  try:
    return np.load(file, mmap_mode='r')
  except ValueError as error:
    raise _damage(file, 'is no array') from error


def is_of_questions(manifest: Mapping[str, Any]) -> bool:
  """Returns whether a stream is of questions, with where each answer begins."""
  return any('ends_bytes' in part for part in manifest['parts'])


def check(path: pathlib.Path, identity: Mapping[str, Any]) -> None:
  """Checks that a stream is whole and has the identity expected.

  Files that were written to since the manifest, which is the last when a stream is made, are read
  and compared with their hashes; the manifest is then touched, so that the next check need not.

  Raises:
    errors.UserError: if a file is missing or damaged, or the manifest has another identity.
  """
  found = read(path)
  for key, value in identity.items():
    if found.manifest.get(key) != value:
      raise _damage(path / MANIFEST, f'has {key}={found.manifest.get(key)!r}, not {value!r}')
  made = (path / MANIFEST).stat().st_mtime_ns
  if _verify(path, found, lambda file: file.stat().st_mtime_ns > made):
    with contextlib.suppress(OSError):  # one that may but be read is verified each time
      (path / MANIFEST).touch()


def verify(path: pathlib.Path) -> None:
  """Reads all of a stream and compares its hashes with the manifest's.

  Raises:
    errors.UserError: if a file is missing or damaged.
  """
  _verify(path, read(path), lambda file: True)


def _verify(path: pathlib.Path, found: Stream, choose: Callable[[pathlib.Path], bool]) -> int:
  """Compares the hashes of the files that are chosen; returns how many."""
  count = 0
  for index, part in enumerate(found.manifest['parts']):
    arrays_of = [(path / part['file'], found.parts[index], part['sha256'], 'tokens')]
    if 'ends_sha256' in part and found.ends:
      name = path / _ends_name(part['file'])
      arrays_of.append((name, found.ends[index], part['ends_sha256'], 'ends'))
    for file, array, sha256, what in arrays_of:
      if choose(file):
        count += 1
        if _sha256(array) != sha256:
          raise _damage(file, f'has other {what} than its manifest says')
  return count


def _sha256(array: np.ndarray) -> str:
  return hashlib.sha256(array.data).hexdigest()


def _read_manifest(path: pathlib.Path) -> dict[str, Any]:
  try:
    manifest = json.loads((path / MANIFEST).read_text())
    if not all(part['file'] and part['file_bytes'] for part in manifest.get('parts', ())):
      raise KeyError
    return manifest
  except OSError as error:
    raise _damage(path / MANIFEST, f'is unreadable: {error.strerror}') from error
  except ValueError as error:
    raise _damage(path / MANIFEST, f'is not JSON: {error}') from error
  except (AttributeError, KeyError, TypeError) as error:
    raise _damage(path / MANIFEST, 'is not a manifest of a stream') from error


def _damage(file: pathlib.Path, what: str) -> errors.UserError:
  return errors.UserError(f'{str(file)!r} {what}; delete its directory to have it prepared anew')
