"""What the text of a compiled program says of the messages between its devices."""

import math
import re
from typing import NamedTuple

KINDS = ('all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', 'collective-permute')


class Messages(NamedTuple):
  """All collectives of a kind that a device takes part in, in one run of a program.

  Attributes:
    count: of them.
    bytes: of what a device gives to each, or gets of it, whichever is more.
  """

  count: int
  bytes: int


class _Instruction(NamedTuple):
  name: str
  shape: str
  operation: str
  operands: list[str]
  line: str


def collectives(text: str) -> dict[str, Messages]:
  """Returns the messages of a program by kind, without kinds of which there are none.

  What stands in a loop counts as often as the loop runs; once, if the text does not say how often.

  Args:
    text: of a compiled program, `compiled.as_text()`.
  """
  computations, entry = _computations(text)
  found = {kind: [0, 0] for kind in KINDS}

  def count(computation, times):
    shapes = {one.name: one.shape for one in computations[computation]}
    for one in computations[computation]:
      kind = one.operation.removesuffix('-start')
      if kind in found:
        found[kind][0] += times
        found[kind][1] += times * _message_bytes(one, shapes)
      for callee, repeats in _calls(one, computations):
        count(callee, times * repeats)

  count(entry, 1)
  return {kind: Messages(*sums) for kind, sums in found.items() if sums[0]}


_HEADER = re.compile(r'(ENTRY )?%?([\w.-]+) .*\{$')
_LINE = re.compile(r'\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*?)\)')


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
  """Returns the instructions of each computation by name, and the name of the first to run."""
  computations: dict[str, list[_Instruction]] = {}
  entry = name = ''
  for line in text.splitlines():
    header, instruction = _HEADER.match(line), _LINE.match(line)
    if header and not line.startswith(' '):
      name = header[2]
      computations[name] = []
      entry = name if header[1] else entry
    elif instruction and name:
      operands = re.findall(r'%?([\w.-]+)(?:,|$)', instruction[4])
      own, shape, operation = instruction.group(1, 2, 3)
      computations[name].append(_Instruction(own, shape, operation, operands, line))
  return computations, entry


def _calls(one: _Instruction, computations) -> list[tuple[str, int]]:
  """Returns what an instruction calls, and how often."""
  if one.operation.endswith(('-done', '-update')):
    return []  # of what `-start` called
  names = re.findall(r'(?:calls|to_apply|body)=%?([\w.-]+)', one.line)
  for branches in re.findall(r'branch_computations=\{(.*?)\}', one.line):
    names += re.findall(r'[\w.-]+', branches)
  times = _trips(one.line, computations) if one.operation == 'while' else 1
  return [(name, times) for name in names if name in computations]


def _trips(line: str, computations) -> int:
  """Returns how often a loop runs: as XLA noted it, or by its condition, counter < constant."""
  known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
  if known:
    return int(known[1])
  condition = re.search(r'condition=%?([\w.-]+)', line)
  assert condition is not None
  lines = [one.line for one in computations[condition[1]]]
  limits = re.findall(r' s32\[\]\S* constant\((\d+)\)', '\n'.join(lines))
  is_less = any('direction=LT' in text for text in lines)
  return int(limits[0]) if is_less and len(limits) == 1 else 1


def _message_bytes(one: _Instruction, shapes: dict[str, str]) -> int:
  into = sum(_bytes(shapes.get(name, '')) for name in one.operands)
  out = _bytes(one.shape)
  # What starts one, returns what went into it, too, but of an all-reduce.
  return max(into, out - into if one.operation.endswith('-start') else out)


def _bytes(shape: str) -> int:
  """Returns the bytes of all arrays in a text such as '(bf16[1,8]{1,0}, pred[])'."""
  arrays = re.findall(r'\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]', shape)
  return sum(
    math.prod(int(size) for size in sizes.split(',') if size) * int(bits or 8) // 8
    for bits, sizes in arrays
  )
