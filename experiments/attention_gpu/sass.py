"""What a GPU's kernel takes for a tile, by its instructions as its assembler lists them."""

import itertools
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

INSTRUCTION = re.compile(r'\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*(\S+)(.*?);')
LABEL = re.compile(r'\s*\.(L_\w+):')
TARGET = re.compile(r'`\(\.(L_\w+)\)')
PRODUCT = re.compile(r'HGMMA\.(\d+)x(\d+)x(\d+)')
PRODUCTS_A_CYCLE = 2048  # of bfloat16, an SM of Hopper: 989 TFLOPS of 132 at 1.83 GHz
MANY = 32  # of an operation that is done for each pair of a thread, at least
MANY_WAITS = 4  # for other warps, where a sum goes over all rows, at least


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

  def __sub__(self, other: 'Cost') -> 'Cost':
    """Returns the difference."""
    return self + other * -1

  def __mul__(self, times: float) -> 'Cost':
    """Returns so many of it."""
    return Cost(*(times * x for x in self))


class Work(NamedTuple):
  """The cost of each kind of work of a tile, or how often a sequence has it done.

  Attributes:
    near: of a tile of one line of the table, or of no bias, that no mask cuts.
    after: of a tile whose queries are all after its keys, likewise.
    far: of a tile whose keys are far, likewise; 0 if that is no other than the former.
    mask: where the mask hides some pairs.
    further_line: of bias and gradient, for each line beyond the first.
    other_line: of the table's gradient, where the first line is not the last of the tile before.
  """

  near: Cost
  after: Cost
  far: Cost = Cost()
  mask: Cost = Cost()
  further_line: Cost = Cost()
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
  loop = min(of_tiles, key=len)
  inner = [set(some) for some in loops if set(some) < set(loop)]

  def find(name: str, least: int = 1, most: float = math.inf, among=loop) -> list[int]:
    return [n for n in among if least <= blocks[n].count(name) <= most]

  of_gradient = [some for some in inner if find('SHFL', among=some)]
  of_bias = [some for some in inner if not find('SHFL', among=some)]
  if len(of_gradient) > 1 or len(of_bias) > 1:
    raise ValueError(f'{len(of_bias)} loops over lines of a bias, {len(of_gradient)} of a gradient')
  of_lines = set().union(*of_gradient, *of_bias)
  # Near keys have each their own distance, far ones are at nodes, and few steps take so long.
  near = find('I2FP', MANY)
  far = [n for n in find('I2FP', most=MANY - 1) if n in find('MUFU.LG2', most=MANY - 1)]
  hidden = [n for n in find('ISETP', MANY) if not blocks[n].count('HGMMA')]
  if len(near) > 1 or len(far) > 1:
    raise ValueError(f'{len(near)} ways to make x of near keys, {len(far)} of far ones')
  (by_pairs, *_) = [n for n in products if n not in far]
  hides = min(n for n in hidden if n > by_pairs)

  def way(*through: int, without: Iterable[int] = ()) -> Cost:
    """Returns the cost of the least way through a tile by some blocks; 0 if there is none."""
    stops, path = [loop[0], *through, loop[-1]], [loop[0]]
    for start, stop in itertools.pairwise(stops):
      more = _least_way(blocks, set(loop) - set(without), start, stop)
      if more is None:
        return Cost()
      path += more
    return total(path)

  def total(numbers: Iterable[int]) -> Cost:
    return sum((cost(blocks[n]) for n in numbers), Cost())

  of_near, of_after = way(*near, by_pairs), way(by_pairs, without={*near, *far})
  stores = [n for n in find('BAR', MANY_WAITS) if n > by_pairs and n not in of_lines]
  return Work(
    near=of_near,
    after=of_after if of_after.issued else of_near,
    far=way(*far) if far else Cost(),
    mask=way(*near, by_pairs, hides) - of_near,
    further_line=total(of_lines),
    other_line=way(*near, by_pairs, stores[0]) - of_near if of_gradient else Cost(),
  )


def _places(blocks):
  return {block.label: n for n, block in enumerate(blocks) if block.label}


def _loops(blocks):
  """Yields the blocks of each loop."""
  places = _places(blocks)
  for n, block in enumerate(blocks):
    if block.target is not None and places[block.target] <= n:
      yield range(places[block.target], n + 1)


def _least_way(blocks, among, start, stop):
  """Returns blocks from one to another, but the first, of the fewest instructions; None: no way."""
  places, reached = _places(blocks), {start: (0, [])}
  done = set()
  while stop not in done:
    ahead = [n for n in reached if n not in done]
    if not ahead:
      return None
    here = min(ahead, key=lambda n: reached[n][0])
    done.add(here)
    block, (so_far, path) = blocks[here], reached[here]
    following = [] if block.returns else [here + 1]
    following += [] if block.target is None else [places[block.target]]
    for n in following:
      length = so_far + len(blocks[n].operations)
      if n in among and length < reached.get(n, (math.inf,))[0]:
        reached[n] = length, [*path, n]
  return reached[stop][1]
