"""A dataset is a seqio Task, made and registered on demand; its documents are arrays of tokens.

The corpora of `corpora` are read as bytes. A Task that is already in seqio.TaskRegistry, such as C4
through TFDS with a SentencePiece vocabulary, goes through the same functions by its name.

seqio, which imports TensorFlow, costs seconds and 800 MB: it is imported when a Task is asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lex_fire import errors
from lex_fire.data import corpora

if TYPE_CHECKING:
  import seqio
  import tensorflow as tf

FIRST_BYTE = 3  # in seqio.ByteVocabulary 0 is padding, 1 EOS, 2 unknown; then come the 256 bytes


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """The facts of a vocabulary; equal facts mean the same vocabulary.

  Attributes:
    name: 'bytes', or 'sentencepiece-' and a hash of the model.
    size: number of token ids.
    eos_id: the token that ends each document.
  """

  name: str
  size: int
  eos_id: int


BYTES = Vocabulary(name='bytes', size=FIRST_BYTE + 256, eos_id=1)


def get_task(name: str, files: Mapping[str, str] | None = None) -> seqio.Task:
  """Returns the Task of a name, made and registered on the first call.

  Args:
    name: a key of corpora.CORPORA or of seqio.TaskRegistry.
    files: {split: glob} for the corpus 'text', None for any other.

  Raises:
    errors.UserError: if the name is unknown, or as the corpus does.
  """
  seqio = _import_seqio()
  if name in corpora.CORPORA:
    return _corpus_task(corpora.CORPORA[name](files))
  registered = seqio.TaskRegistry.names()
  if name not in registered:
    known = ', '.join([*corpora.CORPORA, *sorted(registered)])
    raise errors.UserError(
      f'unknown task {name!r}; known: {known}; import the module that registers any other'
    )
  if files is not None:
    raise errors.UserError(f"task {name!r} takes no files, not {files!r}; give them to 'text'")
  return seqio.TaskRegistry.get(name)


def vocabulary_of(task: seqio.Task) -> Vocabulary:
  """Returns the facts of the vocabulary of a Task's targets.

  Raises:
    errors.UserError: if it is of a kind whose content cannot be told from another's.
  """
  seqio = _import_seqio()
  vocabulary: Any = task.output_features['targets'].vocabulary
  if isinstance(vocabulary, seqio.ByteVocabulary):
    name = BYTES.name
  elif isinstance(vocabulary, seqio.SentencePieceVocabulary):
    name = f'sentencepiece-{hashlib.sha256(vocabulary.sp_model).hexdigest()[:16]}'
  else:
    raise errors.UserError(
      f'task {task.name!r} has a {type(vocabulary).__name__};'
      ' use a ByteVocabulary or a SentencePieceVocabulary'
    )
  return Vocabulary(name=name, size=vocabulary.vocab_size, eos_id=vocabulary.eos_id)


def documents(task: seqio.Task, split: str) -> Iterator[np.ndarray]:
  """Yields the documents of a split in a fixed order, each as int32 tokens_L that end in EOS.

  Raises:
    errors.UserError: if the split is unknown; on the way, if a document lacks its EOS, or as the
      corpus does.
  """
  if split not in task.splits:
    known = ', '.join(task.splits)
    raise errors.UserError(f'task {task.name!r} has no split {split!r}; it has: {known}')
  eos_id = task.output_features['targets'].vocabulary.eos_id
  with _source_errors():
    for example in _quietly(task.get_dataset(split=split, shuffle=False).as_numpy_iterator()):
      tokens_L = example['targets'].astype(np.int32)
      if not tokens_L.size or tokens_L[-1] != eos_id:
        raise errors.UserError(
          f'a document of task {task.name!r} ends in {tokens_L[-1:].tolist()}, not in EOS,'
          f' {eos_id}; add seqio.preprocessors.append_eos to its preprocessors'
        )
      yield tokens_L


def text_bytes(task: seqio.Task, tokens_L: np.ndarray) -> int:
  """Counts the UTF-8 bytes of the text of tokens, EOS apart: a measure common to vocabularies.

  It is the decoded text: what a SentencePiece model normalizes away, such as runs of spaces, is
  not counted.
  """
  seqio = _import_seqio()
  vocabulary = task.output_features['targets'].vocabulary
  if isinstance(vocabulary, seqio.ByteVocabulary):
    return int(np.count_nonzero((tokens_L >= FIRST_BYTE) & (tokens_L < BYTES.size)))
  return len(vocabulary.decode(tokens_L[tokens_L != vocabulary.eos_id].tolist()).encode())


def _corpus_task(corpus: corpora.Corpus) -> seqio.Task:
  """Returns the Task of a corpus; other files, or files changed since, are another Task."""
  seqio = _import_seqio()
  name = f'{corpus.name}_{corpus.fingerprint(corpus.files)}'.replace('-', '_')
  if name not in seqio.TaskRegistry.names():
    seqio.TaskRegistry.add(
      name,
      source=seqio.FunctionDataSource(_dataset_function(corpus), splits=tuple(corpus.files)),
      preprocessors=[
        functools.partial(seqio.preprocessors.rekey, key_map={'targets': 'text'}),
        seqio.preprocessors.tokenize,
        seqio.preprocessors.append_eos,
      ],
      output_features={'targets': seqio.Feature(seqio.ByteVocabulary(), add_eos=True)},
    )
  return seqio.TaskRegistry.get(name)


def _dataset_function(corpus: corpora.Corpus) -> Callable[[str, bool], tf.data.Dataset]:
  import tensorflow as tf

  def dataset(split: str, shuffle_files: bool) -> tf.data.Dataset:
    del shuffle_files  # a corpus is in shuffled order already
    return tf.data.Dataset.from_generator(
      lambda: ({'text': document} for document in corpus.texts(split)),
      output_signature={'text': tf.TensorSpec((), tf.string)},
    )

  return dataset


@contextlib.contextmanager
def _source_errors() -> Iterator[None]:
  """Restores a UserError raised in a corpus, of which TensorFlow keeps nothing but the text."""
  import tensorflow as tf

  try:
    yield
  except tf.errors.OpError as error:
    _, found, message = error.message.partition('UserError: ')
    if not found:
      raise
    raise errors.UserError(message.splitlines()[0]) from error


def _import_seqio() -> types.ModuleType:
  """Imports seqio and keeps TensorFlow off the GPUs, whose memory it would take from JAX."""
  with _quiet_stderr():
    import seqio
    import tensorflow as tf

    # RuntimeError: TensorFlow is at work on a GPU already, as in a notebook whose owner wants that.
    with contextlib.suppress(RuntimeError):
      tf.config.set_visible_devices([], 'GPU')
  return seqio


def _quietly(examples: Iterator[Any]) -> Iterator[Any]:
  """Passes examples on; what TensorFlow's C++ code says of an error stands in the error too."""
  while True:
    with _quiet_stderr():
      example = next(examples, None)
    if example is None:
      return
    yield example


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
  """Drops what C++ code writes to stderr: TensorFlow's start-up notes obey no log level."""
  sys.stderr.flush()
  saved = os.dup(2)
  with open(os.devnull, 'wb') as nowhere:
    os.dup2(nowhere.fileno(), 2)
  try:
    yield
  finally:
    sys.stderr.flush()
    os.dup2(saved, 2)
    os.close(saved)
