"""What the bundles of a TPU's kernel, as its compiler lists them, say of the work of a tile."""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax

from lex_fire.kernels import mosaic_tpu_heads

LONG = 1000  # bundles of a loop over heads at least
SHORT = 100  # and more than these of what is done once a tile


class Loop(NamedTuple):
  """A loop of a schedule.

  Attributes:
    stretches: bundles between its branches that are in no loop within it, in order; None where such
      a loop stands.
    inner: the loops within it.
  """

  stretches: list[int | None]
  inner: list['Loop']

  @property
  def own(self) -> int:
    """Bundles that are in no loop within it."""
    return sum(count or 0 for count in self.stretches)


LINE = re.compile(r'\s*(?:0x[0-9a-f]+|\d+)\s+(LB|LH|LE|PB|PF|CT)?\s*:\s*((?:> ?)*)\{')
# What a bundle computes of floating numbers, a register of REGISTER each: no comparison, no choice.
ARITHMETIC = re.compile(r'\bv(?:add|sub|mul|max|min|pow2|log2|rcp|rsqrt)[\w.]*\.(?:f32|bf16)\b')
REGISTER = 8 * 128


def arithmetic(bundle: str) -> int:
  """Returns how many registers a bundle computes."""
  return len(ARITHMETIC.findall(bundle))


def parse(listing: str, weigh: Callable[[str], int] = lambda bundle: 1) -> Loop:
  """Returns the outermost loop, over the steps of the grid, of a listing of final bundles.

  Args:
    listing: of a kernel.
    weigh: what is counted of a bundle; itself by default.
  """
  stack, branches = [Loop([0], [])], False
  for line in listing.splitlines():
    if not (found := LINE.match(line)):
      continue
    tag, depth = found[1], found[2].count('>')
    # Bundles after a branch that are issued before it is taken have no depth of their own.
    depth = depth or len(stack) - 1
    del stack[depth + 1 :]
    if tag == 'LB':
      del stack[depth:]
      stack[-1].stretches.append(None)
      stack[-1].inner.append(Loop([0], []))
      stack.append(stack[-1].inner[-1])
    elif tag == 'PF' or branches or stack[-1].stretches[-1] is None:
      stack[-1].stretches.append(0)
    branches = 'sbr.rel' in line
    stack[-1].stretches[-1] += weigh(line)
  return stack[0].inner[0]


class Lines(NamedTuple):
  """What pieces of a bias take, of a head in a tile, or what a sequence asks of it.

  Attributes:
    few: a part of few breakpoints.
    rest: a breakpoint of it, beyond those that are gone through together.
    many: a part of many.
    add_part: either, whose gradient of the table is added up.
    add: a breakpoint of it.
  """

  few: float = 0
  rest: float = 0
  many: float = 0
  add_part: float = 0
  add: float = 0


class Work(NamedTuple):
  """The bundles of each kind of work of a kernel, or how often a sequence has it done.

  Attributes:
    tile: what is done once in a tile whose positions are in order, where its bias is made for it.
    tile_in_band: likewise, where it is that of the band.
    tile_far: likewise, where its products have it.
    list_part: likewise, for a part of a tile under pieces.
    find_part: likewise, for a part of many breakpoints, to find the segments of all heads.
    find: likewise, for a breakpoint of such a part.
    find_in_band: once for a breakpoint of a band that has many.
    line: a head in a tile under one line, or without a bias, of those that are visited together.
    pieces: a head in a tile under several lines, but for what follows.
    in_band: a head in a tile of the band.
    far: a head in a far tile, if products have its bias.
    band: a head's band, but for what follows.
    of_pairs: what else pieces of a head take in a tile.
    of_band: likewise, in a band, which is one part.
  """

  tile: float
  tile_in_band: float = 0
  tile_far: float = 0
  list_part: float = 0
  find_part: float = 0
  find: float = 0
  find_in_band: float = 0
  line: float = 0
  pieces: float = 0
  in_band: float = 0
  far: float = 0
  band: float = 0
  of_pairs: Lines = Lines()
  of_band: Lines = Lines()


OF_TILE = 7  # kinds of work that are done once for all heads


def work(values: list) -> Work:
  """Returns what JSON made a list of."""
  return Work(*values[:-2], *(Lines(*lines) for lines in values[-2:]))


def cost(grid: Loop, has_bias: bool, of: Loop | None = None) -> Work:
  """Returns what a kernel's loops take.

  Args:
    grid: of `parse`, by whose bundles loops are told apart.
    has_bias: whether the kernel has one.
    of: of `parse`, with other counts; None: bundles.

  Raises:
    ValueError: if the kernel has other loops than those that are known here.
  """
  of = of or grid
  heads = _over_heads(grid)
  known = (3, 4) if has_bias else (1,)
  if len(heads) not in known:
    raise ValueError(f'{len(heads)} loops over heads, not {" or ".join(map(str, known))}')
  places = [_position(grid, number) for number in heads]
  long = [at for at, count in enumerate(grid.stretches) if (count or 0) > SHORT]

  def between(start, end):
    return [at for at in long if start < at < end]

  def of_head(number):
    return of.inner[number].own / mosaic_tpu_heads.HEADS_TOGETHER

  before, has_far = between(-1, places[0]), len(heads) == 4
  in_all = before[-2 if has_far else -1]
  once = of.stretches[in_all]
  if not has_bias:
    line = of_head(heads[0])
    works = dict.fromkeys(('line', 'pieces', 'in_band', 'far'), line)
    return Work(tile=once, tile_in_band=once, tile_far=once, **works)
  first, tile_far, far = heads[0], 0, 0
  if has_far:
    of_far = [in_all, before[-1], *between(places[0], places[1])]
    tile_far, far = sum(of.stretches[at] for at in of_far), of_head(first)
  (in_band, line), at_pieces = map(of_head, heads[-3:-1]), heads[-1]
  between_made = between(places[-3], places[-2])
  after = between(places[-1], len(grid.stretches))
  pieces, fill = of.inner[at_pieces], of.inner[first - 1]
  has_gradient = len(pieces.inner) > 2
  # What is done once by pairs comes twice, for positions in order and for any others.
  in_order, _ = between_made
  by_pairs = [in_all, in_order, *after[: 1 if has_gradient else 0]]
  list_part, find = of.inner[at_pieces - 2 : at_pieces]
  finish = of.inner[at_pieces + 2] if has_gradient else Loop([], [])
  return Work(
    tile=sum(of.stretches[at] for at in by_pairs),
    tile_in_band=once,
    tile_far=tile_far,
    list_part=list_part.own,
    find_part=find.own,
    find=find.inner[0].own,
    find_in_band=of.inner[first - 2].inner[0].own,
    line=line,
    pieces=pieces.own,
    in_band=in_band,
    far=far,
    band=fill.own + finish.own,
    of_pairs=_lines(pieces.inner),
    of_band=_lines([*fill.inner, *finish.inner]),
  )


def _lines(loops):
  """Returns what pieces take in the loops of a head."""
  few, many, *gradient = loops
  return Lines(
    few=few.own,
    rest=few.inner[0].own,
    many=many.own + many.inner[0].own,
    add_part=sum(part.own for part in gradient),
    add=sum(part.inner[0].own for part in gradient),
  )


def _over_heads(grid):
  """Returns which loops of a grid are over the heads of a tile.

  A band, as long where it has many blocks, is laid out before them and its gradient is divided
  after; it has loops within it, and so, of those over heads, has the last alone.
  """
  long = [number for number, loop in enumerate(grid.inner) if loop.own > LONG]
  plain = [number for number in long if not grid.inner[number].inner]
  with_parts = [
    number for number in long if number > max(plain, default=-1) and number not in plain
  ]
  return plain + with_parts[:1]


def _position(grid, number):
  """Returns where in the stretches of a grid one of its loops stands."""
  return [at for at, count in enumerate(grid.stretches) if count is None][number]


def splash_cost(grid: Loop) -> int:
  """Returns the bundles that JAX's kernel takes for a head in a tile, but for all that it adds."""
  return max(count or 0 for count in grid.stretches)


def cycles(cost: Work, reach: Work, heads: int) -> float:
  """Returns the cycles of a kernel, of all heads of a tile and all tiles of a sequence."""
  each = [one * count for one, count in zip(*map(jax.tree.leaves, (cost, reach)), strict=True)]
  return sum(each[:OF_TILE]) + heads * sum(each[OF_TILE:])
