"""Vocabularies: bytes, characters, T5's 32,000 pieces, or a SentencePiece model of the user's."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import TYPE_CHECKING, Any

from lex_fire import errors
from lex_fire.data import lazy

if TYPE_CHECKING:
  import seqio

FIRST_BYTE = 3  # in seqio.ByteVocabulary 0 is padding, 1 EOS, 2 unknown; then come the 256 bytes
# Of Raffel et al. 2020, "Exploring the Limits of Transfer Learning" (arXiv:1910.10683), as they
# published it; its hundred sentinels are left out, which no task here has.
PUBLISHED = {'t5': 'gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model'}


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """The facts of a vocabulary; equal facts mean the same vocabulary.

  Attributes:
    name: 'bytes', 'latin', or 'sentencepiece-' and a hash of the model.
    size: number of token ids.
    eos_id: the token that ends each document.
  """

  name: str
  size: int
  eos_id: int


BYTES = Vocabulary(name='bytes', size=FIRST_BYTE + 256, eos_id=1)
LATIN = Vocabulary(name='latin', size=FIRST_BYTE + 0x250, eos_id=BYTES.eos_id)


@functools.lru_cache(maxsize=8)
def load(name: str) -> seqio.Vocabulary:
  """Returns the vocabulary of a name.

  Args:
    name: 'bytes', 'latin', a key of PUBLISHED, or the path of a SentencePiece model.

  Raises:
    errors.UserError: if no model can be read there, or it has no EOS.
  """
  seqio = lazy.seqio()
  if name == BYTES.name:
    return seqio.ByteVocabulary()
  if name == LATIN.name:
    return _latin()
  path = PUBLISHED.get(name, name)
  vocabulary = seqio.SentencePieceVocabulary(path)
  try:
    eos_id = vocabulary.eos_id
  except Exception as error:  # the file system's, TensorFlow's and SentencePiece's are of all kinds
    reason = ' '.join(str(error).split())[:150] or type(error).__name__
    others = ', '.join(known for known in (BYTES.name, LATIN.name, *PUBLISHED) if known != name)
    network = ' (which a network would fetch)' if name in PUBLISHED else ''
    raise errors.UserError(
      f'no SentencePiece model in vocabulary {path!r}{network}: {reason}; use {others} or the path '
      'of a model'
    ) from error
  if eos_id is None or eos_id < 0:
    raise errors.UserError(
      f'vocabulary {path!r} has no EOS, which ends each document; train it with eos_id=1, as '
      '`python -m lex_fire.data.train_vocabulary` does'
    )
  return vocabulary


def _latin() -> seqio.Vocabulary:
  from lex_fire.data import latin  # which imports this

  return latin.vocabulary()


def facts(vocabulary: seqio.Vocabulary) -> Vocabulary:
  """Returns the facts of a vocabulary.

  Raises:
    errors.UserError: if it is of a kind whose content cannot be told from another's.
  """
  seqio = lazy.seqio()
  made: Any = vocabulary
  if isinstance(made, seqio.ByteVocabulary):
    name = BYTES.name
  elif made == _latin():
    name = LATIN.name
  elif isinstance(made, seqio.SentencePieceVocabulary):
    name = f'sentencepiece-{hashlib.sha256(made.sp_model).hexdigest()[:16]}'
  else:
    raise errors.UserError(
      f'a {type(vocabulary).__name__} is no vocabulary that can be told from another;'
      ' use a ByteVocabulary, a LatinVocabulary or a SentencePieceVocabulary'
    )
  return Vocabulary(name=name, size=made.vocab_size, eos_id=made.eos_id)


def facts_of(name: str) -> Vocabulary:
  """Returns the facts of the vocabulary of a name, of bytes without seqio.

  Raises:
    errors.UserError: as `load` does.
  """
  return BYTES if name == BYTES.name else facts(load(name))
