"""What a GPU's kernel takes for a tile, by its instructions as its assembler lists them."""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

INSTRUCTION = re.compile(r'\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*(\S+)(.*?);')
LABEL = re.compile(r'\s*\.(L_\w+):')
TARGET = re.compile(r'`\(\.(L_\w+)\)')
PRODUCT = re.compile(r'HGMMA\.(\d+)x(\d+)x(\d+)')
PRODUCTS_A_CYCLE = 2048  # of bfloat16, an SM of Hopper: 989 TFLOPS of 132 at 1.83 GHz
MANY = 32  # of an operation that is done for each pair of a thread, at least


class Block(NamedTuple):
  """Instructions of which either all or none are issued.

  Attributes:
    label: where it begins; '' if nothing jumps there.
    operations: names of its instructions.
    target: the label that its last instruction may jump to, or None.
    returns: whether it always jumps.
  """

  label: str
  operations: list[str]
  target: str | None
  returns: bool

  def count(self, name: str) -> int:
    """Returns how many instructions have a name that begins so."""
    return sum(operation.startswith(name) for operation in self.operations)


def parse(listing: str) -> list[Block]:
  """Returns the blocks of a listing in order."""
  blocks, label, operations = [], '', []

  def end(target=None, returns=False):
    nonlocal label, operations
    if operations:
      blocks.append(Block(label, operations, target, returns))
    label, operations = '', []

  for line in listing.splitlines():
    if found := LABEL.match(line):
      end()
      label = found[1]
    elif found := INSTRUCTION.match(line):
      operations.append(found[1])
      if found[1].startswith('BRA') and (target := TARGET.search(found[2])):
        # A condition stands before it, or, if it is all lanes', before its target.
        end(target[1], returns='@' not in line and 'P' not in found[2].split('`')[0])
  end()
  return blocks


class Cost(NamedTuple):
  """What some instructions take of a quarter of an SM, or of all of its tensor cores.

  Attributes:
    issued: instructions of a warp.
    special: of them, those of the unit for logarithms, exponentials and inverses.
    products: cycles of the tensor cores.
  """

  issued: float = 0
  special: float = 0
  products: float = 0

  def __add__(self, other: tuple) -> 'Cost':
    """Returns the sum."""
    return Cost(*(a + b for a, b in zip(self, other, strict=True)))

  def __mul__(self, times: float) -> 'Cost':
    """Returns so many of it."""
    return Cost(*(times * x for x in self))


class Work(NamedTuple):
  """The cost of each kind of work of a tile, or how often a sequence has it done.

  Attributes:
    tile: all that follows left out.
    near: of x of pairs, if there are two ways to make it.
    far: likewise, of keys far before their queries.
    mask: where the mask hides some pairs.
    further_line: of a bias of several lines, for each beyond the first.
    line: of the table's gradient, for each.
    pairs_of_line: likewise, where there are several, of which each pair has one.
    other_line: likewise, where it is not that of the tile before.
  """

  tile: Cost
  near: Cost = Cost()
  far: Cost = Cost()
  mask: Cost = Cost()
  further_line: Cost = Cost()
  line: Cost = Cost()
  pairs_of_line: Cost = Cost()
  other_line: Cost = Cost()


def cost(block: Block) -> Cost:
  """Returns that of a block."""
  sizes = (PRODUCT.match(operation) for operation in block.operations)
  products = sum(int(m) * int(n) * int(k) for m, n, k in (size.groups() for size in sizes if size))
  return Cost(len(block.operations), block.count('MUFU'), products / PRODUCTS_A_CYCLE)


def work(blocks: list[Block]) -> Work:
  """Returns what a kernel takes for a tile.

  Raises:
    ValueError: if the kernel has other loops or branches than those that are known here.
  """
  loops = list(_loops(blocks))
  products = [n for n, block in enumerate(blocks) if block.count('HGMMA')]
  of_tiles = [loop for loop in loops if {products[0], products[-1]} <= set(loop)]
  tile = set(min(of_tiles, key=len))
  inner = [set(loop) for loop in loops if set(loop) < tile]

  def has(name, loop, least=1):
    return sum(blocks[n].count(name) for n in loop) >= least

  of_gradient = [loop for loop in inner if has('SHFL', loop)]
  of_bias = [loop for loop in inner if not has('SHFL', loop)]
  if len(of_gradient) > 1 or len(of_bias) > 1:
    raise ValueError(f'{len(of_bias)} loops over lines of a bias, {len(of_gradient)} of a gradient')
  line, further_line = set().union(*of_gradient), set().union(*of_bias)
  skipped = [set(some) for some in _skipped(blocks) if set(some) < tile]

  def optional(of: set, is_it: Callable[[set], bool]) -> set:
    found = [some for some in skipped if some < of and is_it(some)]
    return max(found, key=len, default=set())

  outside = tile - line - further_line
  ways = [both for both in _either(blocks) if both[0] | both[1] < outside]
  if len(ways) > 1:
    raise ValueError(f'{len(ways)} choices of a tile')
  # Near keys have each their own distance.
  far, near = sorted(ways[0], key=lambda some: has('I2FP', some, MANY)) if ways else (set(), set())
  mask = optional(outside, lambda some: has('ISETP', some, MANY) and not has('HGMMA', some))
  pairs_of_line = optional(line, lambda some: has('FSETP', some, MANY))
  other_line = optional(line, lambda some: has('BAR', some))
  of_each_line = line - pairs_of_line - other_line
  others = outside - mask - near - far
  parts = others, near, far, mask, further_line, of_each_line, pairs_of_line, other_line

  def total(numbers: Iterable[int]) -> Cost:
    return sum((cost(blocks[n]) for n in numbers), Cost())

  return Work(*map(total, parts))


def _places(blocks):
  return {block.label: n for n, block in enumerate(blocks) if block.label}


def _loops(blocks):
  """Yields the blocks of each loop."""
  places = _places(blocks)
  for n, block in enumerate(blocks):
    if block.target is not None and places[block.target] <= n:
      yield range(places[block.target], n + 1)


def _either(blocks):
  """Yields two sets of blocks, of which one is gone through."""
  places = _places(blocks)
  for some in map(list, _skipped(blocks)):
    last = blocks[some[-1]]
    if last.returns and places[last.target] > some[-1] + 1:
      yield set(some), set(range(some[-1] + 1, places[last.target]))


def _skipped(blocks):
  """Yields the blocks that a jump leaves out."""
  places = _places(blocks)
  for n, block in enumerate(blocks):
    if block.target is not None and not block.returns and places[block.target] > n + 1:
      yield range(n + 1, places[block.target])
