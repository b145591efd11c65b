"""Trains a SentencePiece vocabulary on the text of a Task.

    python -m lex_fire.data.train_vocabulary --task=text --train_files='books/**/*.txt.gz' \\
      --split=train --size=32000 --output=books.model

As for T5 (Raffel et al. 2020, arXiv:1910.10683, section 2.2.1, and the model they published): a
unigram model (Kudo 2018, arXiv:1804.10959) of 32,000 pieces, with padding 0, EOS 1, unknown 2 and
no beginning of a sequence. Two choices differ, so that tokens decode to the text they were made
of: a character too rare for a piece is spelt as UTF-8 bytes, which have 256 pieces of their own,
where T5's is unknown; and text is taken as it is, where T5's loses line ends, runs of spaces and
the difference between characters that look alike.
"""

from __future__ import annotations

import argparse
import io
import os
import pathlib
import re
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence

from lex_fire import errors
from lex_fire.data import files, reading, spec, tasks

# SentencePiece takes no line of more than 4,192 bytes; a character of UTF-8 has at most 4 of them.
_LINE_CHARACTERS = 1000


class _Lines:
  """The lines of the text of a Task: what SentencePiece wants to read.

  Attributes:
    texts: how many were read.
    characters: how many were read, line ends apart.
    error: that ended the reading, as SentencePiece keeps nothing but the text of one.
  """

  def __init__(self, what: spec.Spec, split: str, max_characters: int):
    self._texts = reading.texts(tasks.get_task(what), split)
    self._max_characters = max_characters
    self.texts = self.characters = 0
    self.error: Exception | None = None

  def __iter__(self) -> Iterator[str]:
    """Yields lines, long ones in pieces, until there are characters enough."""
    try:
      for text in self._texts:
        self.texts += 1
        for line in _short_lines(text.decode()):
          self.characters += len(line)
          yield line
        if self.characters >= self._max_characters:
          return
    except Exception as error:
      self.error = error
      raise


def _short_lines(text: str) -> Iterator[str]:
  for line in text.split('\n'):
    for start in range(0, len(line), _LINE_CHARACTERS):
      yield line[start : start + _LINE_CHARACTERS]


def train(
  what: spec.Spec, split: str, size: int, output: str | pathlib.Path, max_characters: int
) -> str:
  """Trains a vocabulary with all cores and writes its model, whole or not at all.

  Args:
    what: the Task; its own vocabulary plays no part.
    split: one of the Task's.
    size: number of token ids, those of padding, EOS, unknown and the 256 bytes among them.
    output: path of the model, where nothing is yet.
    max_characters: of text, after which no further document is read.

  Returns:
    A sentence of what was read.

  Raises:
    errors.UserError: if the output is there already or cannot be written, the size does not suit
      the text, or as tasks.get_task and reading.examples do.
  """
  output = pathlib.Path(output)
  if output.exists():
    raise errors.UserError(f'{str(output)!r} is there already; remove it or name another output')
  lines = _Lines(what, split, max_characters)
  try:
    tempfile.TemporaryFile(dir=output.parent).close()  # before the work: is it writable?
    model = _model(lines, size)
    files.write_whole(output, lambda path: path.write_bytes(model))
  except OSError as error:
    raise errors.UserError(
      f'cannot write {str(output)!r}: {error.strerror}; use another output'
    ) from error
  return f'{size:,} pieces of {lines.characters:,} characters in {lines.texts:,} texts'


def _model(lines: _Lines, size: int) -> bytes:
  """Returns a trained model, as SentencePiece writes it to a file."""
  import sentencepiece

  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(lines),
      model_writer=model,
      vocab_size=size,
      model_type='unigram',
      pad_id=0,
      eos_id=1,
      unk_id=2,
      bos_id=-1,
      byte_fallback=True,
      normalization_rule_name='identity',
      remove_extra_whitespaces=False,
      allow_whitespace_only_pieces=True,  # for the indentation of code
      num_threads=len(os.sched_getaffinity(0)),
      train_extremely_large_corpus=True,
    )
  except RuntimeError as error:
    if lines.error is not None:
      raise lines.error from None
    raise _unsuitable(size, str(error)) from error
  return model.getvalue()


def _unsuitable(size: int, reason: str) -> errors.UserError:
  """Says in one sentence why SentencePiece can make no model of a size."""
  if largest := re.search(r'too high .* <= (\d+)', reason):
    return errors.UserError(
      f'{size=} is too large for the text, which has pieces for {largest[1]}; use at most that, or '
      'more text'
    )
  if smallest := re.search(r'\d+ vs (\d+)', reason):
    return errors.UserError(
      f'{size=} is too small for the bytes and the characters of the text; use at least '
      f'{smallest[1]}'
    )
  return errors.UserError(
    f'SentencePiece can train no model of {size=}: {reason.partition("] ")[2] or reason}; '
    'use more text or another size'
  )


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command and returns its exit status, 2 for a mistake of the user's."""
  parser = argparse.ArgumentParser(
    'python -m lex_fire.data.train_vocabulary',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  spec.define_arguments(parser)
  parser.add_argument('--size', type=int, default=32_000, help='number of token ids')
  parser.add_argument(
    '--output', required=True, help='path of the model, by custom NAME.model, where nothing is yet'
  )
  parser.add_argument(
    '--max_characters',
    type=int,
    default=50_000_000,
    help='of text to read; each takes 40 bytes of memory',
  )
  flags = parser.parse_args(argv)
  signal.signal(signal.SIGINT, signal.SIG_DFL)  # SentencePiece would go on to its end
  try:
    what = spec.of_arguments(flags)
    done = train(what, flags.split, flags.size, flags.output, flags.max_characters)
  except errors.UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  print(done, file=sys.stderr)
  print(flags.output)
  return 0


if __name__ == '__main__':
  sys.exit(main())
