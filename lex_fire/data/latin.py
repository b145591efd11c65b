"""A vocabulary of characters: each of Unicode's first four blocks is a token, others are unknown.

These are Basic Latin (ASCII), Latin-1 Supplement, Latin Extended-A and B, up to U+024F. Of ASCII
the ids are those of bytes. Above it a character of UTF-8 is two bytes or more, but here one: for
the index hints of `algorithms`, of which ASCII has too few.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from lex_fire.data import lazy, vocabularies

if TYPE_CHECKING:
  import seqio

_FIRST, _SIZE = vocabularies.FIRST_BYTE, vocabularies.LATIN.size
_UNKNOWN = 2


@functools.cache
def vocabulary() -> seqio.Vocabulary:
  """Returns the vocabulary, of a class that is made as TensorFlow is imported."""
  seqio = lazy.seqio()
  import tensorflow as tf

  class LatinVocabulary(seqio.Vocabulary):
    """The first 592 characters of Unicode, where seqio.ByteVocabulary has the 256 bytes."""

    bos_id = None
    eos_id = vocabularies.LATIN.eos_id
    unk_id = _UNKNOWN
    _base_vocab_size = _SIZE

    def _encode(self, s):
      ids = np.frombuffer(s.encode('utf-32-le'), np.uint32).astype(np.int64) + _FIRST
      return np.where(ids < _SIZE, ids, _UNKNOWN).tolist()

    def _decode(self, ids):
      return ''.join(chr(made - _FIRST) for made in ids if made >= _FIRST)

    def _encode_tf(self, s):
      ids = tf.strings.unicode_decode(s, 'UTF-8') + _FIRST
      return tf.where(ids < _SIZE, ids, _UNKNOWN)

    def _decode_tf(self, ids):
      kept = tf.ragged.boolean_mask(ids, ids >= _FIRST)
      return tf.strings.unicode_encode(kept - _FIRST, 'UTF-8')

    def __eq__(self, other):
      return isinstance(other, LatinVocabulary) and self.extra_ids == other.extra_ids

  return LatinVocabulary()
