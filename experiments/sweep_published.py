"""What the papers published, beside what a sweep measured: orders, and changes with length."""

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence

from lex_fire import published

# Rankings of the variants that are encodings, by mask: (paper, run, length, mask).
PUBLISHED = {
  'causal': (("FIRE's paper", 'fire_base', 8192, None), ("LeX's", 'lex', 4096, 'causal')),
  'blockwise': (("LeX's paper", 'lex', 4096, 'blockwise'),),
}
LEX = published.TABLES['lex_perplexity']
# A row of LeX's of which it does not tell the mask stands beside our causal ones.
_MASKS = {'causal': ('causal', published.UNCLEAR), 'blockwise': ('blockwise',)}

Losses = Mapping[str, Mapping[int, Sequence[float]]]  # {variant: {length: of each seed}}, in nats


def rankings(measured: Sequence[str], mask: str) -> list[str]:
  """Returns a sentence for each published ranking of some variants.

  Args:
    measured: variants, the best first.
    mask: under which they were measured.
  """
  sentences = []
  for paper, run, length, of in PUBLISHED[mask]:
    places = published.ranking(run, length, of)
    agreeing, pairs = published.agreement(places, measured)
    if pairs:
      common = {variant for shared in places for variant in shared}
      own = ', '.join(name for name in measured if name in common)
      sentences.append(
        f'Best first here: {own}. In {paper} at {length}: {published.in_words(places)}; in '
        f'brackets no order is known. Of {pairs} pairs of known order {agreeing} are in it here.'
      )
  return sentences


def changes(losses: Losses, trained: int, mask: str) -> list[str]:
  """Returns a sentence and a table of how losses change past training, in LeX's paper and here.

  Nothing if they share no encoding.

  Args:
    losses: of the variants; those that are encodings of LeX's table stand beside it.
    trained: the length of training here [tokens].
    mask: under which they were measured.
  """
  theirs = {
    row: {length: [loss] for length, loss in curve.items()}
    for row, curve in published.curves(LEX).items()
    if row[0] in losses and row[1] in _MASKS[mask]
  }
  if not theirs:
    return []
  there = set.intersection(*(_ratios(curve, LEX.trained) for curve in theirs.values()))
  here = set.intersection(*(_ratios(losses[encoding], trained) for encoding, _ in theirs))
  ratios = sorted(there & here)
  lines = [
    f'{"":10}' + ''.join(f'{f"{who} {at}x":>16}' for who in ('LeX', 'here') for at in ratios)
  ]
  for (encoding, _), curve in theirs.items():
    cells = _past(curve, LEX.trained, ratios) + _past(losses[encoding], trained, ratios)
    lines.append(f'{encoding:<10}' + ''.join(f'{cell:>16}' for cell in cells))
  unclear = [encoding for encoding, of in theirs if of == published.UNCLEAR]
  untold = f' Of {", ".join(unclear)} LeX does not tell the mask.' if unclear else ''
  return [
    f"LeX's {LEX.source} beside it: loss at the length of training (1x: {LEX.trained} tokens "
    f'there, {trained} here), and its change at longer ones, in nats per token. Texts and tokens '
    f'are others, so that signs and orders compare, not sizes.{untold}',
    textwrap.indent('\n'.join(lines), '    '),
  ]


def perplexities(losses: Losses, mask: str) -> list[str]:
  """Returns a sentence and a table in the form of LeX's table 2, of the encodings that are in it.

  Nothing if none is.

  Args:
    losses: of the variants, the best first.
    mask: under which they were measured.
  """
  of_lex = {row[0] for row in LEX.rows if row[1] in _MASKS[mask]}
  rows = {variant: curve for variant, curve in losses.items() if variant in of_lex}
  if not rows:
    return []
  lengths = sorted(next(iter(rows.values())))
  lines = [f'{"":10}' + ''.join(f'{length:>16}' for length in lengths)]
  for variant, curve in rows.items():
    cells = ([math.exp(loss) for loss in curve[length]] for length in lengths)
    lines.append(f'{variant:<10}' + ''.join(f'{over_seeds(cell):>16}' for cell in cells))
  return [
    "In perplexity, e to the loss of a token, as LeX's table 2 has it:",
    textwrap.indent('\n'.join(lines), '    '),
  ]


def _ratios(curve: Mapping[int, Sequence[float]], trained: int) -> set[int]:
  """Returns how many times the length of training the whole ones of a curve's lengths are."""
  return {length // trained for length in curve if length % trained == 0}


def _past(curve: Mapping[int, Sequence[float]], trained: int, ratios: Sequence[int]) -> list[str]:
  """Returns the loss at the length of training and its change at others, with deviations."""
  cells = []
  for ratio in ratios:
    found = curve[ratio * trained]
    change = [later - first for first, later in zip(curve[trained], found, strict=True)]
    cells.append(over_seeds(found) if ratio == 1 else over_seeds(change, '+'))
  return cells


def over_seeds(values: Sequence[float], sign: str = '', decimals: int = 3) -> str:
  """Returns the mean of what each seed gave, signed if so asked, and their deviation, as text."""
  spread = f' +-{statistics.stdev(values):.{decimals}f}' if len(values) > 1 else ''
  return f'{statistics.fmean(values):{sign}.{decimals}f}{spread}'
