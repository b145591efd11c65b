"""What the papers published, as data to stand beside what is measured here.

FIRE is Li et al. 2023 (arXiv:2310.04418), LeX is Sun et al. 2022 (arXiv:2212.10554, first version).
`None` is what is not known here; nothing is estimated. LeX's numbers are those of its tables 2, 3
and 5. Of FIRE's results these are what its introduction claims and a review of it says
(openreview.net/forum?id=rR03qFesqk): its curves and scores were not at hand, so that none stand
here, and which of Kerple's two forms it compared is our reading.

Other vocabularies make other losses: compare orders and changes by length, not levels.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from lex_fire import errors

Places = tuple[tuple[str, ...], ...]


class Run(NamedTuple):
  """Models of one size, one under each encoding.

  Attributes:
    source: where it is published.
    config: the file of configs/ that makes it.
    arguments: of that file.
    encodings: those compared, keys of encodings.ENCODINGS.
    lengths: at which the models were judged [tokens].
    tokens: seen in training.
    hardware: on which it was trained.
    best: the encoding that the paper calls the best at each of the lengths.
    finding: what came out, in words.
  """

  source: str
  config: str
  arguments: str
  encodings: tuple[str, ...]
  lengths: tuple[int, ...]
  tokens: int | None
  hardware: str | None
  best: str | None
  finding: str


_OF_FIRE = ('alibi', 'fire', 'fire_s', 'kerple_log', 'nope', 'rope', 't5')
_OF_LEX = ('alibi', 'rope', 'sinusoidal', 'xpos')
_FIRE_LENGTHS = (512, 1024, 2048, 4096, 8192)
_LEX_LENGTHS = (256, 512, 1024, 2048, 4096)

_FIRE_BASE = Run(
  source='Li et al. 2023, sections 1 and 4.1, 125M parameters',
  config='c4',
  arguments='size=base',
  encodings=_OF_FIRE,
  lengths=_FIRE_LENGTHS,
  tokens=314_572_800_000,
  hardware=None,
  best='fire',
  finding='FIRE loses least at every length, and leads the best baseline by 2.28 of perplexity, '
  'at a size and a length that are not known here',
)
RUNS: dict[str, Run] = {
  'fire_base': _FIRE_BASE,
  'fire_large': _FIRE_BASE._replace(
    source='Li et al. 2023, sections 1 and 4.1, 350M parameters',
    arguments='size=large',
    finding='FIRE loses least at every length',
  ),
  'fire_scrolls': Run(
    source='Li et al. 2023, sections 1 and 4.3',
    config='scrolls',
    arguments='task=qmsum',
    encodings=_OF_FIRE,
    lengths=(8192,),
    tokens=None,
    hardware=None,
    best='fire',
    finding='FIRE has the best mean score over SCROLLS, by over 1 point, in both sizes',
  ),
  'fire_glue': Run(
    source='Li et al. 2023, and a review of it',
    config='glue',
    arguments='task=glue_sst2',
    encodings=_OF_FIRE,
    lengths=(),
    tokens=None,
    hardware=None,
    best=None,
    finding='on short texts FIRE is not better than RoPE, as the reviewer reads its scores',
  ),
  'lex': Run(
    source='Sun et al. 2022, section 4.1',
    config='pile',
    arguments='size=lex_medium',
    encodings=_OF_LEX,
    lengths=_LEX_LENGTHS,
    tokens=50_000 * 512 * 1024,  # steps, rows, length; the first version does not tell the steps
    hardware='16 V100',
    best=None,
    finding='xPos in blocks is the only one whose perplexity falls up to 4096',
  ),
}


class Table(NamedTuple):
  """Published numbers.

  Attributes:
    run: a key of RUNS.
    source: where they are.
    measure: what they are.
    trained: length of training of the models [tokens].
    rows: {(encoding, mask): {length: value}}; the mask is one of kernels.mask, or UNCLEAR.
  """

  run: str
  source: str
  measure: str
  trained: int
  rows: dict[tuple[str, str], dict[int, float]]


# Section 4.2 says that all models are given blocks at 2048 and 4096; table 5 says that table 2's
# numbers there of RoPE and ALiBi are those without. What was done with sinusoids neither tells.
UNCLEAR = 'unclear'

# Table 2, up to the length of training, where blocks of half of it hide nothing.
_WITHIN = {
  'xpos': (34.3, 27.55, 23.31),
  'alibi': (37.66, 29.92, 24.99),
  'rope': (38.09, 30.38, 25.52),
  'sinusoidal': (46.34, 36.39, 29.94),
}
_PAST = {
  ('xpos', 'blockwise'): (21.6, 20.73),
  ('alibi', 'causal'): (23.14, 24.26),
  ('alibi', 'blockwise'): (24.6, 25.37),
  ('rope', 'blockwise'): (25.57, 25.65),
  ('xpos', 'causal'): (22.56, 28.43),
  ('rope', 'causal'): (73.6, 294.45),
  ('sinusoidal', UNCLEAR): (132.63, 1283.79),
}
_RESOLUTION = {
  ('xpos', 'blockwise'): (0.98, 1.08),
  ('alibi', UNCLEAR): (0.81, 0.88),
  ('xpos', 'causal'): (0.98, 0.54),
  ('sinusoidal', UNCLEAR): (0.87, 0.28),
  ('rope', UNCLEAR): (0.91, 0.08),
}
TABLES: dict[str, Table] = {
  'lex_perplexity': Table(
    'lex',
    'tables 2 and 5',
    'perplexity on arXiv, the first 4096 tokens of documents mostly longer than 6,000',
    1024,
    {
      (encoding, mask): dict(zip(_LEX_LENGTHS, (*_WITHIN[encoding], *past), strict=True))
      for (encoding, mask), past in _PAST.items()
    },
  ),
  'lex_resolution': Table(
    'lex',
    'table 3',
    'attention resolution',
    1024,
    {row: dict(zip((1024, 2048), values, strict=True)) for row, values in _RESOLUTION.items()},
  ),
}


def describe(name: str) -> str:
  """Returns a sentence on a run: where it is published, its cost and its outcome.

  Args:
    name: a key of RUNS.

  Raises:
    errors.UserError: for another.
  """
  run = _run(name)
  tokens = 'an unknown number of' if run.tokens is None else f'{run.tokens:,}'
  hardware = 'unknown hardware' if run.hardware is None else run.hardware
  return f'{run.source}: {tokens} tokens, on {hardware}; {run.finding}.'


def text(table: Table) -> str:
  """Returns a table as lines of text: a row an encoding and mask, a column a length."""
  names = [' '.join(row) for row in table.rows]
  width = max(map(len, names))
  lengths = list(next(iter(table.rows.values())))
  lines = [' ' * width + ''.join(f'{length:>10}' for length in lengths)]
  for name, values in zip(names, table.rows.values(), strict=True):
    lines.append(f'{name:<{width}}' + ''.join(f'{value:>10.2f}' for value in values.values()))
  return '\n'.join(lines)


def curves(table: Table) -> dict[tuple[str, str], dict[int, float]]:
  """Returns the rows of a table of perplexity as `evaluate` reports losses [nats per token]."""
  return {
    row: {length: math.log(value) for length, value in values.items()}
    for row, values in table.rows.items()
  }


def ranking(name: str, length: int, mask: str | None = None) -> Places:
  """Returns the encodings that a paper compared, the best first.

  Those whose order is not known here share a place.

  Args:
    name: a key of RUNS.
    length: one of the run's [tokens].
    mask: causal or blockwise; None: for each encoding the one that serves it best.

  Raises:
    errors.UserError: for an unknown run, or a length or mask under which it has no results.
  """
  run = _run(name)
  if length not in run.lengths:
    known = ', '.join(map(str, run.lengths)) or 'none known'
    raise errors.UserError(f'{name!r} has no results at {length=}; lengths: {known}')
  table = TABLES.get(f'{name}_perplexity')
  known_masks = {'causal'} if table is None else {of for _, of in table.rows} - {UNCLEAR}
  if mask not in {None, *known_masks}:
    known = ', '.join(sorted(known_masks))
    raise errors.UserError(f'{name!r} has no results under {mask=}; masks: {known}')
  if table is None:
    rest = tuple(encoding for encoding in run.encodings if encoding != run.best)
    return ((run.best,), rest) if run.best else (rest,)
  return tuple((encoding,) for encoding in _sorted(table, length, mask))


def agreement(places: Places, measured: Sequence[str]) -> tuple[int, int]:
  """Returns how many pairs of encodings are in the published order, and of how many.

  Args:
    places: of `ranking`; the pairs are those of encodings in different places of it.
    measured: encodings, the best first; those that were not published do not count.
  """
  place = {encoding: at for at, shared in enumerate(places) for encoding in shared}
  found = [place[encoding] for encoding in measured if encoding in place]
  pairs = [(first, second) for first, second in itertools.combinations(found, 2) if first != second]
  return sum(first < second for first, second in pairs), len(pairs)


def in_words(places: Places) -> str:
  """Returns a ranking as text: `xpos, alibi`; encodings that share a place are in brackets."""
  return ', '.join(shared[0] if len(shared) == 1 else f'({", ".join(shared)})' for shared in places)


def _run(name):
  if name not in RUNS:
    raise errors.UserError(f'unknown published run {name!r}; known: {", ".join(RUNS)}')
  return RUNS[name]


def _sorted(table: Table, length: int, mask: str | None) -> list[str]:
  """Returns the encodings of a table of perplexity, the least first."""
  least: dict[str, float] = {}
  for (encoding, of), values in table.rows.items():
    if mask in (None, of):
      least[encoding] = min(values[length], least.get(encoding, math.inf))
  return sorted(least, key=least.__getitem__)
