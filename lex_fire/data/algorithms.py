"""Algorithmic tasks: learn a rule on short questions, be asked long ones.

Of the tasks of Kazemnejad et al. 2023, "The Impact of Positional Encoding on Length Generalization
in Transformers" (arXiv:2305.19466): copy, reverse, sort, parity and addition. A question is its
symbols and '=', one byte each: 'dacb=', '0110=', '957+301='. Numbers stand with their least
significant digit first, as in Zhou et al. 2024, "Transformers Can Achieve Length Generalization But
Not Robustly" (arXiv:2402.09371, on data formats): the order in which carries arise. All digits are
drawn alike, but for `zeros` in training, so that numbers may have leading zeros (at their ends,
here), and a sum has one digit more than its numbers, be it 0.

Index hints (Zhou et al. 2023, "What Algorithms can Transformers Learn?", arXiv:2310.16028; again
arXiv:2402.09371) put a marker before each symbol. A symbol of the answer bears the marker of the
symbol that it comes from, so that a model can find one by the other: 'PaQb=' reversed is 'QbPa'.
Digits of one place share a marker in both numbers and their sum; a parity bears the last bit's.
Markers follow one another from a random first one, as in both papers, so that the many markers of a
long question are all known from short ones. Departure: the order is a ring, from its first to its
last and round again, so that no marker is more frequent than another. A marker is one token, as in
the papers, of the vocabulary `latin` or, if there are few enough, of bytes.

A question of a length that has at least MIN_TO_SPLIT of them belongs to one split by a hash of it
without its hints. Shorter ones are too few to hold any out: they may stand in every split.
"""

from __future__ import annotations

import dataclasses
import functools
import string
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from lex_fire import errors
from lex_fire.data import examples as examples_lib

MULTIPLES = (0.5, 1, 2, 5, 8)  # of the longest length in training: the lengths to evaluate
MIN_TO_SPLIT = 1000
LENGTHS = ('uniform', 'log_uniform')  # how those of questions of training are drawn
VERSION = 5  # of what is made of an address; prepared streams of another are others
# Printed characters of the vocabulary `latin` that no question has: those of ASCII first, each of
# which is a byte too.
_MARKERS = ''.join(
  character
  for character in (*string.ascii_uppercase, *string.punctuation, *map(chr, range(0xA1, 0x250)))
  if character.isprintable() and character not in '+='
)
_NO_MARKERS = str.maketrans('', '', _MARKERS)

Placed = Iterable[tuple[int, str]]  # symbols, each with the place whose marker it bears


@dataclasses.dataclass(frozen=True)
class Algorithm:
  """A rule that makes an answer of operands of the same length.

  Attributes:
    alphabet: the symbols of an operand.
    operands: how many.
    solve: the operands -> the symbols of the answer, and their places.
    carries: places that an answer may have past those of its operands.
  """

  alphabet: str
  operands: int
  solve: Callable[..., Placed]
  carries: int = 0

  def __call__(
    self, generator: np.random.Generator, length: int, ring: str = '', zeros: float = 0.0
  ) -> tuple[str, str]:
    """Draws a question; returns it and its answer.

    Args:
      generator: draws the same symbols with any ring.
      length: symbols of an operand.
      ring: the markers in their order, at least one a place; '': no hints.
      zeros: share of the symbols of a second operand that are then the first of the alphabet.
    """
    first = int(generator.random() * len(ring))
    drawn = generator.integers(len(self.alphabet), size=(self.operands, length))
    if zeros:
      drawn[1:] *= generator.random(size=drawn[1:].shape) >= zeros
    operands = [''.join(self.alphabet[index] for index in row) for row in drawn]

    def write(symbols: Placed) -> str:
      if not ring:
        return ''.join(symbol for _, symbol in symbols)
      return ''.join(ring[(first + place) % len(ring)] + symbol for place, symbol in symbols)

    inputs = '+'.join(write(enumerate(operand)) for operand in operands) + '='
    return inputs, write(self.solve(*operands))

  def can_split(self, length: int) -> bool:
    """Says whether there are enough questions of a length to hold some out."""
    return len(self.alphabet) ** (self.operands * length) >= MIN_TO_SPLIT

  def markers(self, length: int) -> str:
    """Returns the ring of markers for training up to a length.

    >>> ALGORITHMS['addition'].markers(3)  # 25 places of 24 digits and a carry
    'ABCDEFGHIJKLMNOPQRSTUVWXY'

    Args:
      length: of the longest question in training, in symbols of an operand.

    Raises:
      errors.UserError: if there are fewer characters than places.
    """
    longest = round(max(MULTIPLES) * length)
    if longest + self.carries > len(_MARKERS):
      most = (len(_MARKERS) - self.carries) // round(max(MULTIPLES))
      raise errors.UserError(
        f'{length=} is evaluated up to {longest}, for which the {len(_MARKERS)} index hints are '
        f'too few; use at most {most}, or no hints'
      )
    return _MARKERS[: longest + self.carries]


def _copy(symbols: str) -> Placed:
  return enumerate(symbols)


def _reverse(symbols: str) -> Placed:
  return reversed(list(enumerate(symbols)))


def _sort(symbols: str) -> Placed:
  """Sorts; equal symbols stay in order, which only their markers show."""
  return sorted(enumerate(symbols), key=lambda placed: placed[1])


def _parity(bits: str) -> Placed:
  return [(len(bits) - 1, str(bits.count('1') % 2))]


def _addition(left: str, right: str) -> Placed:
  carry = 0
  for place, (a, b) in enumerate(zip(left + '0', right + '0', strict=True)):
    carry, digit = divmod(int(a) + int(b) + carry, 10)
    yield place, str(digit)


ALGORITHMS: dict[str, Algorithm] = {
  'copy': Algorithm(string.ascii_lowercase, 1, _copy),
  'reverse': Algorithm(string.ascii_lowercase, 1, _reverse),
  'sort': Algorithm(string.ascii_lowercase, 1, _sort),
  'parity': Algorithm('01', 1, _parity),
  'addition': Algorithm(string.digits, 2, _addition, carries=1),
}


def examples(
  name: str,
  split: str,
  *,
  length: int,
  count: int,
  seed: int,
  hints: bool = False,
  lengths: str = 'uniform',
  zeros: float = 0.0,
  start: int = 0,
) -> Iterator[examples_lib.Example]:
  """Makes `count` examples of a split, from number `start` on.

  Example i is the same in whatever part of the split it is made; with and without hints its
  symbols are the same.

  Args:
    name: a key of ALGORITHMS.
    split: 'train' and 'validation' have lengths from 1 to `length`; 'test' takes the MULTIPLES of
      `length` in turn, so that a multiple of five has equally many of each.
    length: symbols of an operand, the most in training; a half is rounded down.
    count: number of examples.
    seed: of all that is drawn, a whole number.
    hints: whether each symbol follows its marker.
    lengths: 'uniform', all equally likely, or 'log_uniform', short ones more often: up to n symbols
      have log(n + 1) / log(length + 1) of the questions.
    zeros: share of the digits of a second number that are made 0 in 'train' and 'validation'. Where
      none is, a digit of one number tells nothing of the sum's; over a 0 it tells all but a carry.
    start: index of the first example, >= 0.

  Returns:
    Examples with one answer each and the fact 'length', in symbols of an operand.

  Raises:
    errors.UserError: if the name, split or lengths are unknown, count is less than 1, length less
      than 2 or zeros out of range or of no second number, or there are too few markers for the
      longest questions.
  """
  examples_lib.check(ALGORITHMS, name, split, count)
  if length < 2:
    raise errors.UserError(f'{length=} has no half to evaluate; use at least 2')
  if lengths not in LENGTHS:
    raise errors.UserError(f'unknown {lengths=}; known: {", ".join(LENGTHS)}')
  if zeros and not (0 < zeros < 1 and ALGORITHMS[name].operands > 1):
    raise errors.UserError(
      f'{zeros=} must be from 0 to below 1 for a sum, and 0 for what has no second number'
    )
  draw = functools.partial(
    ALGORITHMS[name],
    ring=ALGORITHMS[name].markers(length) if hints else '',
    zeros=0.0 if split == 'test' else zeros,
  )
  sizes = _sizes(split, length, lengths)
  return (_example(name, split, sizes, seed, draw, index) for index in range(start, start + count))


def _sizes(split: str, length: int, lengths: str) -> Callable[[int, np.random.Generator], int]:
  """Returns what draws the symbols of an operand for the example of an index."""
  if split == 'test':
    return lambda index, _: int(MULTIPLES[index % len(MULTIPLES)] * length)
  if lengths == 'uniform':
    return lambda _, generator: int(generator.integers(1, length + 1))
  return lambda _, generator: min(length, int((length + 1) ** generator.random()))


def _example(name, split, sizes, seed, draw, index) -> examples_lib.Example:
  """Draws the example of an address, again and again until its question is of the split."""
  algorithm = ALGORITHMS[name]
  generator = examples_lib.generator('algorithms', name, split, seed, index)
  size = sizes(index, generator)
  while True:
    inputs, answer = draw(generator, size)
    home = examples_lib.split_of(name + inputs.translate(_NO_MARKERS))
    if home == split or not algorithm.can_split(size):
      return examples_lib.Example(f'{name}_{split}_{index}', inputs, (answer,), {'length': size})
