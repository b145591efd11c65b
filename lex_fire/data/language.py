"""Tasks of language modelling: documents of text, to be predicted token by token.

Those of `corpora`, which are this machine's files, and public ones through TFDS, each in a version
that is named: C4 (Raffel et al. 2020, arXiv:1910.10683), PG-19 (Rae et al. 2019, arXiv:1911.05507).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from lex_fire.data import corpora, lazy, vocabularies
from lex_fire.data.spec import Spec

if TYPE_CHECKING:
  import seqio
  import tensorflow as tf


class Public(NamedTuple):
  """A corpus in TFDS.

  Attributes:
    dataset: its name there, with configuration and version.
    field: that holds the text of a document.
    splits: of documents.
  """

  dataset: str
  field: str
  splits: tuple[str, ...]


# {name: the field that holds the text} of the Tasks registered here.
FIELDS: dict[str, str] = {}

PUBLIC = {
  'c4': Public('c4/en:3.0.1', 'text', ('train', 'validation')),
  'pg19': Public('pg19:0.1.1', 'book_text', ('train', 'validation', 'test')),
}


def corpus_task(spec: Spec) -> seqio.Task:
  """Returns the Task of a corpus; other files, or files changed since, are another Task.

  Raises:
    errors.UserError: as the corpus or vocabularies.load does.
  """
  spec.options()
  corpus = corpora.CORPORA[spec.base](spec.files)
  name = f'{corpus.name}_{corpus.fingerprint(corpus.files)}'
  return _add(name, lambda: _source(corpus), 'text', spec)


def public_task(spec: Spec) -> seqio.Task:
  """Returns the Task of a corpus in TFDS, which must have been made there before.

  Raises:
    errors.UserError: if there are files, or as vocabularies.load does.
  """
  spec.refuse_files()
  spec.options()
  public = PUBLIC[spec.base]
  source = functools.partial(tfds_source, public.dataset, public.splits, spec)
  return _add(f'{public.dataset}_{spec.tfds_directory}', source, public.field, spec)


def tfds_source(
  dataset: str, splits: Iterable[str] | Mapping[str, str], spec: Spec
) -> seqio.TfdsDataSource:
  """Returns a dataset of TFDS as a source that never tries to make it.

  Args:
    dataset: its name there, with configuration and version.
    splits: of the dataset; a mapping from other names gives them these.
    spec: says where datasets are.

  Returns:
    the source, with an attribute split_names: {split: its name in TFDS}.
  """
  names = dict(splits) if isinstance(splits, Mapping) else {split: split for split in splits}
  source = lazy.seqio().TfdsDataSource(
    tfds_name=dataset,
    tfds_data_dir=spec.tfds_directory or None,
    splits=names,
    read_only=True,
  )
  source.split_names = names
  return source


def _add(name: str, source: Any, field: str, spec: Spec) -> seqio.Task:
  """Registers a Task of documents, once."""
  seqio = lazy.seqio()
  vocabulary = vocabularies.load(spec.vocabulary)
  name = registry_name(f'{name}_{vocabularies.facts(vocabulary).name}')
  FIELDS[name] = field
  if name not in seqio.TaskRegistry.names():
    seqio.TaskRegistry.add(
      name,
      source=source(),
      preprocessors=[
        functools.partial(seqio.preprocessors.rekey, key_map={'targets': field}),
        seqio.preprocessors.tokenize,
        seqio.preprocessors.append_eos,
      ],
      output_features={'targets': seqio.Feature(vocabulary, add_eos=True)},
    )
  return seqio.TaskRegistry.get(name)


def registry_name(text: str) -> str:
  """Returns a text with but the characters that seqio admits in the name of a Task."""
  return ''.join(c if c.isascii() and c.isalnum() else '_' for c in text)


def _source(corpus: corpora.Corpus) -> seqio.DataSource:
  """Returns a corpus as a source, which can be read in parts of whole files."""
  seqio = lazy.seqio()

  class Source(seqio.DataSource):
    """A `seqio.DataSource` of a corpus.

    Attributes:
      corpus: that it reads.
    """

    supports_arbitrary_sharding = False

    def __init__(self):
      known = None if corpus.name == 'jsonl' else {s: len(f) for s, f in corpus.files.items()}
      super().__init__(splits=tuple(corpus.files), num_input_examples=known)
      self.corpus = corpus

    def list_shards(self, split):
      return [str(file.path) for file in corpus.files[split]]

    def get_dataset(self, split, shuffle=False, seed=None, shard_info=None, **unused):
      del shuffle, seed, unused  # a corpus is in shuffled order already
      part = (shard_info.index, shard_info.num_shards) if shard_info else (0, 1)
      return _dataset(corpus, split, *part)

  return Source()


def _dataset(corpus: corpora.Corpus, split: str, part: int, num_parts: int) -> tf.data.Dataset:
  import tensorflow as tf

  return tf.data.Dataset.from_generator(
    lambda: ({'text': document} for document in corpus.texts(split, part, num_parts)),
    output_signature={'text': tf.TensorSpec((), tf.string)},
  )


TASKS = {
  **dict.fromkeys(corpora.CORPORA, corpus_task),
  **dict.fromkeys(PUBLIC, public_task),
}
