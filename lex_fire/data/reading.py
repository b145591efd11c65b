"""Reads the examples of a seqio Task, in parts, and documents as arrays of tokens.

A document of a Task of questions is its inputs, a separator and the answer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from lex_fire import errors
from lex_fire.data import corpora, language, lazy, stream, vocabularies

if TYPE_CHECKING:
  import seqio

SEPARATOR = '\n\nAnswer: '  # between the inputs of a question and its answer
_AT_ONCE = 32  # examples that TensorFlow hands over
_PART_BYTES = 16_000_000  # of text, at least, in a part of a corpus: tokenized within seconds


def vocabulary_of(task: seqio.Task) -> vocabularies.Vocabulary:
  """Returns the facts of the vocabulary of a Task's targets.

  Raises:
    errors.UserError: if it is of a kind whose content cannot be told from another's.
  """
  return vocabularies.facts(task.output_features['targets'].vocabulary)


def documents(
  task: seqio.Task, split: str, part: int = 0, num_parts: int = 1, start: int = 0
) -> Iterator[stream.Document]:
  """Yields the documents of a split, or of a part of it, in a fixed order.

  Args:
    task: of targets that end in EOS; with inputs if it asks questions.
    split: of the Task's.
    part: which part, from 0.
    num_parts: in all, as `parts` says.
    start: how many of its first documents to pass over, which of the Tasks of `language` are not
      tokenized.

  Raises:
    errors.UserError: if the split is unknown; on the way, if a document lacks its EOS, or as the
      corpus does.
  """
  if task.name in language.FIELDS:
    yield from _tokenized(task, texts(task, split, part, num_parts, start))
    return
  separator = encode(task, SEPARATOR) if is_of_questions(task) else None
  eos_id = task.output_features['targets'].vocabulary.eos_id
  for example in examples(task, split, part, num_parts, start):
    tokens_L = example['targets'].astype(np.int32)
    if not tokens_L.size or tokens_L[-1] != eos_id:
      raise errors.UserError(
        f'a document of task {task.name!r} ends in {tokens_L[-1:].tolist()}, not in EOS,'
        f' {eos_id}; add seqio.preprocessors.append_eos to its preprocessors'
      )
    text = example.get('targets_pretokenized')
    size = text_bytes(task, tokens_L) if text is None else len(text)
    if separator is None:
      yield stream.Document(tokens_L, size)
    else:
      inputs_L = example['inputs'].astype(np.int32)
      if inputs_L.size and inputs_L[-1] == eos_id:  # the answer comes before the end
        inputs_L = inputs_L[:-1]
      ends = (len(inputs_L), len(inputs_L) + len(separator))
      yield stream.Document(np.concatenate([inputs_L, separator, tokens_L]), size, ends)


def _tokenized(task: seqio.Task, texts: Iterator[bytes]) -> Iterator[stream.Document]:
  """Tokenizes texts as a Task of documents does, in a quarter of the time that TensorFlow takes."""
  vocabulary: Any = task.output_features['targets'].vocabulary
  name = vocabularies.facts(vocabulary).name
  for text in texts:
    if name == vocabularies.BYTES.name:
      tokens_L = np.frombuffer(text, np.uint8) + np.int32(vocabularies.FIRST_BYTE)
    elif name == vocabularies.LATIN.name:
      tokens_L = np.array(vocabulary.encode(text.decode(errors='replace')), np.int32)
    else:
      tokens_L = np.array(vocabulary.tokenizer.EncodeAsIds(text), np.int32)
    yield stream.Document(np.append(tokens_L, np.int32(vocabulary.eos_id)), len(text))


def texts(
  task: seqio.Task, split: str, part: int = 0, num_parts: int = 1, start: int = 0
) -> Iterator[bytes]:
  """Yields the texts of a split, or of a part of it, as they are before they become tokens.

  Those of a Task of questions are inputs and targets by turns. Arguments and errors are those of
  `examples`.
  """
  check_split(task, split)
  corpus: corpora.Corpus | None = getattr(task.source, 'corpus', None)
  if corpus is not None:
    found = corpus.texts(split, part, num_parts)
    yield from (text.encode() for text in itertools.islice(found, start, None))
  elif task.name in language.FIELDS:
    field = language.FIELDS[task.name]
    shard = lazy.seqio().ShardInfo(part, num_parts)
    with lazy.source_errors(task.source):
      dataset = task.source.get_dataset(split, shuffle=False, shard_info=shard)
      dataset = dataset.skip(start).map(lambda example: example[field]).batch(_AT_ONCE)
      for batch in dataset.as_numpy_iterator():
        yield from batch
  else:
    for example in examples(task, split, part, num_parts, start):
      names = ('inputs_pretokenized', 'targets_pretokenized')
      yield from (example[name] for name in names if name in example)


def is_of_questions(task: seqio.Task) -> bool:
  """Returns whether a Task has inputs, to which its targets are the answers."""
  return 'inputs' in task.output_features


def encode(task: seqio.Task, text: str) -> np.ndarray:
  """Returns a text as tokens_L of a Task, int32, without EOS."""
  return np.array(task.output_features['targets'].vocabulary.encode(text), np.int32)


def examples(
  task: seqio.Task, split: str, part: int = 0, num_parts: int = 1, start: int = 0
) -> Iterator[dict[str, Any]]:
  """Yields the examples of a split, or of a part of it, as a Task has them, in a fixed order.

  Args:
    task: any.
    split: of the Task's.
    part: which part, from 0.
    num_parts: in all.
    start: how many of its first examples to pass over.

  Raises:
    errors.UserError: if the split is unknown or not there; on the way, as the corpus does.
  """
  check_split(task, split)
  shard = lazy.seqio().ShardInfo(part, num_parts)
  with lazy.source_errors(task.source):
    dataset = task.get_dataset(split=split, shuffle=False, shard_info=shard, try_in_mem_cache=False)
    dataset = dataset.skip(start)
    # TensorFlow takes a millisecond to hand one over, or thirty-two.
    for batch in dataset.ragged_batch(_AT_ONCE).as_numpy_iterator():
      for index in range(len(next(iter(batch.values())))):
        yield {name: _row(values, index) for name, values in batch.items()}


def check_split(task: seqio.Task, split: str) -> None:
  """Raises errors.UserError if a Task has no such split."""
  if split not in task.splits:
    known = ', '.join(task.splits)
    raise errors.UserError(f'task {task.name!r} has no split {split!r}; it has: {known}')


def parts(task: seqio.Task, split: str) -> int:
  """Returns the number of parts that a split is read in; it follows from the data alone.

  A corpus has them by its size; of other sources each shard is one, as is each file of TFDS.

  Raises:
    errors.UserError: if the split is unknown or not there.
  """
  check_split(task, split)
  with lazy.source_errors(task.source):
    shards = len(task.source.list_shards(split))
  corpus: corpora.Corpus | None = getattr(task.source, 'corpus', None)
  if corpus is None:
    return shards
  return max(1, min(shards, math.ceil(corpus.size(split) / _PART_BYTES)))


def filled_parts(task: seqio.Task, split: str) -> list[int]:
  """Returns those of the `parts` of a split that have files, as far as can be told unread.

  Raises:
    errors.UserError: if the split is unknown or not there.
  """
  count = parts(task, split)
  corpus: corpora.Corpus | None = getattr(task.source, 'corpus', None)
  return list(range(count)) if corpus is None else corpus.filled_parts(split, count)


def check_hosts(task: seqio.Task, split: str, process_count: int) -> None:
  """Checks that each host has a part of its own to read.

  Without one seqio has each host read all of them, and keep but its share of the examples.

  Raises:
    errors.UserError: if there are more hosts than parts, or the split is unknown or not there.
  """
  count = len(filled_parts(task, split))
  if process_count > count:
    raise errors.UserError(
      f'split {split!r} of task {task.name!r} is read in {count} parts of whole files, too few for '
      f'{process_count=}; use {count} hosts at most, or prepare it (data.streaming=False)'
    )


def num_documents(task: seqio.Task, split: str) -> int | None:
  """Returns the number of documents of a split, or None if it is not known before they are read."""
  with lazy.source_errors(task.source):
    return task.source.num_input_examples(split)


def fingerprint(task: seqio.Task, split: str) -> str:
  """Names the content of a split, as well as its source can tell it.

  A corpus says its own; a dataset of TFDS is named by its version, the number of its files, which
  decides the parts, and its size; any other source by the name of the Task alone.

  Raises:
    errors.UserError: if the split is unknown or not there.
  """
  check_split(task, split)
  corpus: corpora.Corpus | None = getattr(task.source, 'corpus', None)
  if corpus is not None:
    return corpus.fingerprint([split])
  dataset = getattr(task.source, 'tfds_dataset', None)
  if dataset is None:
    return task.name
  names: dict[str, str] = getattr(task.source, 'split_names', {})
  with lazy.source_errors(task.source):
    info = dataset.info.splits[names.get(split, split)]
  return f'{dataset.name}-{info.num_shards}-{info.num_examples}-{int(info.num_bytes)}'


def text_bytes(task: seqio.Task, tokens_L: np.ndarray) -> int:
  """Counts the UTF-8 bytes of the text of tokens, EOS apart: a measure common to vocabularies.

  It is the decoded text: what a SentencePiece model normalizes away, such as runs of spaces, is
  not counted.
  """
  seqio = lazy.seqio()
  vocabulary = task.output_features['targets'].vocabulary
  if isinstance(vocabulary, seqio.ByteVocabulary):
    first, size = vocabularies.FIRST_BYTE, vocabularies.BYTES.size
    return int(np.count_nonzero((tokens_L >= first) & (tokens_L < size)))
  return len(vocabulary.decode(tokens_L[tokens_L != vocabulary.eos_id].tolist()).encode())


def _row(values: Any, index: int) -> Any:
  """Returns one of a batch's values: of texts, numbers, or arrays of one or of several lengths."""
  if isinstance(values, np.ndarray):
    return values[index]
  start, end = values.row_splits[index : index + 2]
  return values.values[start:end]
