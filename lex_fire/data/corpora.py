"""Corpora of text files on this machine: the Python standard library, and the user's own files.

A corpus lists files by split in a fixed order, reads them one document a file, and names its
content by a fingerprint, by which a stream prepared from it is found again.
"""

from __future__ import annotations

import dataclasses
import glob
import gzip
import hashlib
import os
import pathlib
import platform
import re
import sysconfig
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from lex_fire import errors

# Left out of the standard library: what some distributions of Python package apart or generate for
# the machine, so that the corpus is about the same everywhere; and `encodings`, whose nearly
# identical tables would leak from one split into the other.
_LEFT_OUT = re.compile(
  r'site-packages|dist-packages|__pycache__|tests?|idlelib|lib2to3|turtledemo|tkinter|ensurepip'
  r'|distutils|encodings|config-.*|_sysconfigdata.*|sitecustomize\.py'
)
_FILES_PER_VALIDATION_FILE = 20


class File(NamedTuple):
  """The file of a document.

  Attributes:
    name: its path below the root of the corpus, which alone decides order and split.
    path: where it lies.
    stamp: text that changes when its content does.
  """

  name: str
  path: pathlib.Path
  stamp: str

  @property
  def digest(self) -> str:
    """A hexadecimal number that is random but for the name: to shuffle by and to split by."""
    return hashlib.sha256(self.name.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Documents in files.

  Attributes:
    name: a key of CORPORA.
    edition: which one, for people to read: the version of Python.
    files: {split: its files in order}.
    read: path -> text of the document, '' to leave it out.
  """

  name: str
  edition: str
  files: Mapping[str, tuple[File, ...]]
  read: Callable[[pathlib.Path], str]

  def texts(self, split: str) -> Iterator[str]:
    """Reads the documents of a split, always in the same order.

    Raises:
      errors.UserError: if the split is unknown; on the way, if a file cannot be read.
    """
    return filter(None, (self.read(file.path) for file in self._files_of(split)))

  def fingerprint(self, splits: Iterable[str]) -> str:
    """Names the content of splits: the same for the same files, wherever their root lies.

    Raises:
      errors.UserError: if a split is unknown.
    """
    content = hashlib.sha256()
    for split in splits:
      for file in self._files_of(split):
        content.update(f'{split}\0{file.name}\0{file.stamp}\0'.encode())
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
  """The user's own files of UTF-8 text, plain or .gz, one document a file.

  Args:
    files: {split: glob}; `**` matches folders at any depth.

  Raises:
    errors.UserError: if no files are given, a glob matches none, or a file is in two splits.
  """
  if not files:
    raise errors.UserError(f"corpus 'text' needs a glob for each split, not {files=}")
  splits = {split: _matches(split, pattern) for split, pattern in files.items()}
  _check_disjoint(splits)
  return Corpus('text', 'files', splits, _read_text)


CORPORA: dict[str, Callable[[Mapping[str, str] | None], Corpus]] = {'stdlib': stdlib, 'text': text}


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
        stamp = hashlib.sha256(path.read_bytes()).hexdigest()
        yield File(path.relative_to(root).as_posix(), path, stamp)


def _distinct(files: Iterable[File]) -> Iterator[File]:
  """Yields the first of identical files: a copy might be in the other split."""
  seen = set()
  for file in files:
    if file.stamp not in seen:
      seen.add(file.stamp)
      yield file


def _read_source(path: pathlib.Path) -> str:
  try:
    with tokenize.open(path) as file:
      return file.read()
  except (SyntaxError, UnicodeDecodeError):  # SyntaxError: the file declares an unknown encoding
    return ''


def _matches(split: str, pattern: str) -> tuple[File, ...]:
  matches = map(pathlib.Path, glob.glob(os.path.expanduser(pattern), recursive=True))
  paths = [path for path in matches if path.is_file()]
  if not paths:
    raise errors.UserError(f'no file of split {split!r} matches {pattern!r}; correct the glob')
  root = os.path.commonpath([path.parent for path in paths])
  return _shuffled(File(path.relative_to(root).as_posix(), path, _stamp(path)) for path in paths)


def _stamp(path: pathlib.Path) -> str:
  """Size and time of change stand for content that may be too large to hash at every start."""
  stat = path.stat()
  return f'{stat.st_size} {stat.st_mtime_ns}'


def _check_disjoint(splits: Mapping[str, tuple[File, ...]]) -> None:
  split_of = {}
  for split, files in splits.items():
    for file in files:
      other = split_of.setdefault(file.path.resolve(), split)
      if other != split:
        raise errors.UserError(
          f'{str(file.path)!r} is in both {other!r} and {split!r}; make their globs disjoint'
        )


def _read_text(path: pathlib.Path) -> str:
  name = repr(str(path))
  try:
    content = path.read_bytes()
    document = (gzip.decompress(content) if path.suffix == '.gz' else content).decode('utf-8')
  except UnicodeDecodeError as error:
    raise errors.UserError(f'{name} is not UTF-8 at byte {error.start}; convert it') from error
  except (gzip.BadGzipFile, EOFError, zlib.error) as error:
    raise errors.UserError(f'{name} is not a whole gzip file: {error}; make it anew') from error
  except OSError as error:
    raise errors.UserError(f'{name} is unreadable: {error.strerror}; correct that') from error
  if not document:
    raise errors.UserError(f'{name} is empty; remove it or narrow the glob')
  return document
