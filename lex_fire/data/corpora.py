"""Corpora of text files on this machine: the Python standard library, and the user's own files.

A corpus lists files by split in a fixed order, reads their documents, and names its content by a
fingerprint, by which a stream prepared from it is found again.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import os
import pathlib
import platform
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from lex_fire import errors
from lex_fire.data import files as files_lib

# Left out of the standard library: what some distributions of Python package apart or generate for
# the machine, so that the corpus is about the same everywhere; and `encodings`, whose nearly
# identical tables would leak from one split into the other.
_LEFT_OUT = re.compile(
  r'site-packages|dist-packages|__pycache__|tests?|idlelib|lib2to3|turtledemo|tkinter|ensurepip'
  r'|distutils|encodings|config-.*|_sysconfigdata.*|sitecustomize\.py'
)
_FILES_PER_VALIDATION_FILE = 20
_EXPANSION = 3  # about: bytes of text in a byte of a compressed file


class File(NamedTuple):
  """The file of a document.

  Attributes:
    name: its path below the root of the corpus, which alone decides order and split.
    path: where it lies.
    stamp: text that changes when its content does.
    size: bytes on disk.
  """

  name: str
  path: pathlib.Path
  stamp: str
  size: int

  @property
  def digest(self) -> str:
    """A hexadecimal number that is random but for the name: to shuffle by and to split by."""
    return hashlib.sha256(os.fsencode(self.name)).hexdigest()


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Documents in files.

  Attributes:
    name: a key of CORPORA.
    edition: which one, for people to read: the version of Python.
    files: {split: its files in order}.
    read: path -> the texts of its documents.
  """

  name: str
  edition: str
  files: Mapping[str, tuple[File, ...]]
  read: Callable[[pathlib.Path], Iterable[str]]

  def texts(self, split: str, part: int = 0, num_parts: int = 1) -> Iterator[str]:
    """Reads the documents of a split, always in the same order.

    Args:
      split: of the corpus.
      part: which part of it, from 0: those of a split follow one another in its order.
      num_parts: of about the same size, whole files each, so that some may have none.

    Raises:
      errors.UserError: if the split is unknown; on the way, if a file cannot be read.
    """
    placed = _placed(self._files_of(split), num_parts)
    return (text for of_file, file in placed if of_file == part for text in self.read(file.path))

  def filled_parts(self, split: str, num_parts: int) -> list[int]:
    """Returns which parts of a split have files.

    Raises:
      errors.UserError: if the split is unknown.
    """
    return sorted({part for part, _ in _placed(self._files_of(split), num_parts)})

  def size(self, split: str) -> int:
    """Returns about how many bytes of text a split has.

    Raises:
      errors.UserError: if the split is unknown.
    """
    return sum(map(_text_size, self._files_of(split)))

  def fingerprint(self, splits: Iterable[str]) -> str:
    """Names the content of splits: the same for the same files, wherever their root lies.

    Of a user's files the same by their size and time of change, which `cp -p` and `rsync -t` keep.

    Raises:
      errors.UserError: if a split is unknown.
    """
    content = hashlib.sha256()
    for split in splits:
      for file in self._files_of(split):
        content.update(os.fsencode(f'{split}\0{file.name}\0{file.stamp}\0'))
    return f'{self.edition}-{content.hexdigest()[:16]}'

  def _files_of(self, split: str) -> tuple[File, ...]:
    if split not in self.files:
      known = ', '.join(self.files)
      raise errors.UserError(f'corpus {self.name!r} has no split {split!r}; it has: {known}')
    return self.files[split]


def stdlib(files: Mapping[str, str] | None) -> Corpus:
  """The source and docstrings of the standard library of the Python that runs.

  A hash of a file's relative path puts one in 20 into validation and the rest into train.

  Raises:
    errors.UserError: if files are given, or the library is installed without its source.
  """
  if files is not None:
    raise errors.UserError(f"corpus 'stdlib' takes no files, not {files!r}; give them to 'text'")
  root = sysconfig.get_path('stdlib')
  splits = {'train': [], 'validation': []}
  for file in _distinct(_shuffled(_source_files(root))):
    is_validation = int(file.digest, 16) % _FILES_PER_VALIDATION_FILE == 0
    splits['validation' if is_validation else 'train'].append(file)
  if not all(splits.values()):
    raise errors.UserError(f"the standard library in {root!r} lacks its source; use 'text'")
  edition = f'{platform.python_implementation().lower()}-{platform.python_version()}'
  files_by_split = {split: tuple(members) for split, members in splits.items()}
  return Corpus('stdlib', edition, files_by_split, _read_source)


def text(files: Mapping[str, str] | None) -> Corpus:
  """The user's own files of UTF-8 text, plain or compressed, one document a file.

  Args:
    files: {split: glob}; `**` matches folders at any depth.

  Raises:
    errors.UserError: if no files are given, a glob matches none, or a file is in two splits.
  """
  return _own('text', files, lambda path: (files_lib.read_text(path),))


def jsonl(files: Mapping[str, str] | None) -> Corpus:
  """The user's own files of JSON lines, plain or compressed: a line a document, in field 'text'.

  So come the Pile, C4 outside TFDS, and most corpora of today.

  Args:
    files: as for text.

  Raises:
    errors.UserError: as text does.
  """
  return _own('jsonl', files, _read_lines)


CORPORA: dict[str, Callable[[Mapping[str, str] | None], Corpus]] = {
  'stdlib': stdlib,
  'text': text,
  'jsonl': jsonl,
}


def _own(name, files, read):
  """Returns the corpus of the files that globs match by split."""
  if not files:
    raise errors.UserError(f'corpus {name!r} needs a glob for each split, not {files=}')
  splits = {split: _matches(split, pattern) for split, pattern in files.items()}
  _check_disjoint(splits)
  return Corpus(name, 'files', splits, read)


def _read_source(path: pathlib.Path) -> Iterable[str]:
  return filter(None, (files_lib.read_source(path),))


def _read_lines(path: pathlib.Path) -> Iterator[str]:
  for number, values in enumerate(files_lib.read_jsonl(path), start=1):
    yield files_lib.text_field(values, 'text', f'{str(path)!r} line {number}')


def _text_size(file: File) -> int:
  return file.size * (_EXPANSION if file.path.suffix in files_lib.COMPRESSED else 1)


def _placed(files: tuple[File, ...], num_parts: int) -> Iterator[tuple[int, File]]:
  """Yields each file with its part: that in which its middle lies, if all are laid end to end."""
  total, start = sum(map(_text_size, files)), 0
  for file in files:
    size = _text_size(file)
    yield (2 * start + size) * num_parts // (2 * total + 1), file
    start += size


def _shuffled(files: Iterable[File]) -> tuple[File, ...]:
  """Orders files by a hash of their names, so that neighbours in a folder are not neighbours."""
  return tuple(sorted(files, key=lambda file: file.digest))


def _source_files(root: str) -> Iterator[File]:
  """Yields the library's .py files, hashed: some hundreds, in tens of milliseconds."""
  for folder, folders, names in os.walk(root):
    folders[:] = [name for name in folders if not _LEFT_OUT.fullmatch(name)]
    for name in names:
      if name.endswith('.py') and not _LEFT_OUT.fullmatch(name):
        path = pathlib.Path(folder, name)
        content = path.read_bytes()
        stamp = hashlib.sha256(content).hexdigest()
        yield File(path.relative_to(root).as_posix(), path, stamp, len(content))


def _distinct(files: Iterable[File]) -> Iterator[File]:
  """Yields the first of identical files: a copy might be in the other split."""
  seen = set()
  for file in files:
    if file.stamp not in seen:
      seen.add(file.stamp)
      yield file


def _matches(split: str, pattern: str) -> tuple[File, ...]:
  matches = map(pathlib.Path, glob.glob(os.path.expanduser(pattern), recursive=True))
  paths = [path for path in matches if path.is_file()]
  if not paths:
    raise errors.UserError(f'no file of split {split!r} matches {pattern!r}; correct the glob')
  root = os.path.commonpath([path.parent for path in paths])
  return _shuffled(_file(root, path) for path in paths)


def _file(root: str, path: pathlib.Path) -> File:
  """Size and time of change stand for content that may be too large to hash at every start."""
  stat = path.stat()
  stamp = f'{stat.st_size} {stat.st_mtime_ns}'
  return File(path.relative_to(root).as_posix(), path, stamp, stat.st_size)


def _check_disjoint(splits: Mapping[str, tuple[File, ...]]) -> None:
  split_of = {}
  for split, files in splits.items():
    for file in files:
      other = split_of.setdefault(file.path.resolve(), split)
      if other != split:
        raise errors.UserError(
          f'{str(file.path)!r} is in both {other!r} and {split!r}; make their globs disjoint'
        )
