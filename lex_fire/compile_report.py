"""What `python -m lex_fire.compile` found, in words and as a table."""

import sys
from typing import Any

from lex_fire import hosts

DOES_NOT_FIT = 3  # the exit status
Report = dict[str, Any]  # of JSON values; see compile.compile_run


def excess(report: Report) -> list[str]:
  """Returns a sentence for each program that does not fit."""
  memory = report['memory_bytes']
  return [
    f'the {one["name"]} needs {gib(one["bytes"]["total"])} GiB a chip, which is '
    f'{gib(one["excess_bytes"])} more than the {gib(memory)} that a program may have of a '
    f'{report["kind"]}'
    for one in report['programs']
    if one['excess_bytes']
  ]


def refuse(report: Report) -> None:
  """Ends the command with status 3 if a program does not fit, and says which and by how much."""
  sentences = excess(report)
  for sentence in sentences:
    print(f'{hosts.name()}error: {sentence}', file=sys.stderr)
  if sentences:
    hosts.leave(DOES_NOT_FIT)


def gib(count: float) -> str:
  """Returns bytes in GiB."""
  return f'{count / 2**30:.2f}'


_PARTS = (
  'parameters',
  'optimizer',
  'other arguments',
  'outputs',
  'temporaries',
  'program',
  'total',
)


def table(report: Report) -> str:
  """Returns a report for a terminal."""
  r, tokens = report, report['tokens_per_step']
  mesh = ', '.join(f'{axis}={size}' for axis, size in r['mesh'].items() if size > 1) or 'one chip'
  slices = f'{r["num_slices"]} slices of ' if r['num_slices'] > 1 else ''
  flops = r['model_flops_per_step']
  width = max(len(one['name']) for one in r['programs'])
  memory = r['memory_bytes']
  lines = [
    f'{r["chips"]} of {r["kind"]} ({slices}{r["topology"]}): {mesh}',
    f'{r["parameters"]:,} parameters; {tokens:,} tokens and {flops:.3g} model FLOPs a step, '
    f'{flops / r["chips"]:.3g} a chip',
    '',
    f'{"GiB a chip":{width}}  {"  ".join(_PARTS)}  of {"?" if memory is None else gib(memory)}',
  ]
  for one in r['programs']:
    numbers = (one['bytes'].get(part) for part in _PARTS)
    cells = ('' if n is None else gib(n) for n in numbers)
    row = '  '.join(f'{cell:>{len(part)}}' for cell, part in zip(cells, _PARTS, strict=True))
    fits = 'does not fit' if one['excess_bytes'] else 'fits' if memory else ''
    lines.append(f'{one["name"]:{width}}  {row}  {fits}'.rstrip())
  return '\n'.join([*lines, '', *map(_line, r['programs'])])


def _line(one: Report) -> str:
  """Returns what a program computes and sends."""
  how = '{implementation} ({reason})'.format(**one['attention'])
  line = f'{one["name"]}: {one["rows"]} rows of {one["length"]}; attention: {how}'
  if one['messages'] is None:
    return line
  sent = (
    f'{kind} {n["count"]:,} of {n["bytes"] / 2**20:,.1f} MiB together'
    for kind, n in one['messages'].items()
  )
  line += f'; messages: {", ".join(sent) or "none"}'
  if one['xla_flops'] is not None:  # of a GPU's program there is no count
    line += f'; XLA counts {one["xla_flops"]:.3g} FLOPs a chip (a loop once, a kernel not)'
  return f'{line}; compiled in {one["seconds"]:.0f} s'
