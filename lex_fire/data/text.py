"""Text to tokens, and tokens back to text as they come.

Bytes need no seqio.
"""

import codecs
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from lex_fire.data import spec, tasks, vocabularies

_NO_TEXT = 0xFF  # a byte that UTF-8 never has, so that it is shown as U+FFFD
_REPLACEMENT = '\ufffd'
_MAX_CONTINUED = 3  # bytes of a character without its last
_CONTEXT = 32  # tokens: enough that a piece decodes as it would after all of them


class Decoder(Protocol):
  """Turns tokens that come one after another into the text that they complete."""

  def feed(self, tokens: Sequence[int]) -> str:
    """Returns the whole characters that are certain now; what is no text is U+FFFD."""
    ...

  def close(self) -> str:
    """Returns the rest: U+FFFD for a character that was never completed."""
    ...


class Codec(NamedTuple):
  """The vocabulary of a Task.

  Attributes:
    vocabulary: its facts.
    encode: text -> tokens_L, int32, without EOS.
    decoder: () -> a Decoder.
  """

  vocabulary: vocabularies.Vocabulary
  encode: Callable[[str], np.ndarray]
  decoder: Callable[[], Decoder]

  @property
  def eos_id(self) -> int:
    """The token that ends a document."""
    return self.vocabulary.eos_id


def codec(what: spec.Spec) -> Codec:
  """Returns the codec of the vocabulary of a Task; it reads no document.

  Raises:
    errors.UserError: if the name or the vocabulary is unknown, or of an unknown kind.
  """
  if what.base in tasks.TASKS:
    vocabulary = (
      None if what.vocabulary == vocabularies.BYTES.name else vocabularies.load(what.vocabulary)
    )
  else:
    vocabulary = tasks.get_task(what).output_features['targets'].vocabulary
  facts = vocabularies.BYTES if vocabulary is None else vocabularies.facts(vocabulary)
  if vocabulary is None or facts == vocabularies.BYTES:
    return _BYTES
  return Codec(
    vocabulary=facts,
    encode=lambda text: np.array(vocabulary.encode(text), np.int32),
    decoder=lambda: _PiecesDecoder(vocabulary.decode),
  )


def _encode_bytes(text: str) -> np.ndarray:
  return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + vocabularies.FIRST_BYTE


class _BytesDecoder:
  """A Decoder of bytes."""

  def __init__(self):
    self._decoder = codecs.getincrementaldecoder('utf-8')('replace')

  def feed(self, tokens):
    values = [token - vocabularies.FIRST_BYTE for token in tokens]
    return self._decoder.decode(bytes(v if 0 <= v < 256 else _NO_TEXT for v in values))

  def close(self):
    return self._decoder.decode(b'', final=True)


class _PiecesDecoder:
  """A Decoder of any tokens. SentencePiece's text depends on those before: only the first is bare.

  It decodes the last few tokens again and shows what is new. Tokens may be bytes: up to 3 at the
  end, U+FFFD so far, can be a character in the making and are held back.
  """

  def __init__(self, decode):
    self._decode = decode
    self._tokens, self._shown = [], 0

  def feed(self, tokens):
    new = []
    for token in tokens:
      self._tokens.append(int(token))
      text = self._decode(self._tokens)
      held = min(len(text) - len(text.rstrip(_REPLACEMENT)), _MAX_CONTINUED)
      new.append(text[self._shown : len(text) - held])
      self._shown += len(new[-1])
      if len(self._tokens) >= 2 * _CONTEXT and not held:
        self._tokens = self._tokens[-_CONTEXT:]
        self._shown = len(self._decode(self._tokens))
    return ''.join(new)

  def close(self):
    return self._decode(self._tokens)[self._shown :]


_BYTES = Codec(vocabulary=vocabularies.BYTES, encode=_encode_bytes, decoder=_BytesDecoder)
