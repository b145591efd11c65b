"""What was measured: as a table, as a plot, and against targets. Nothing here measures."""

import pathlib
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

Results = dict[str, Any]  # what `run.py` writes as JSON
Times = dict[tuple[str, str], list[float]]  # seconds of each round by (implementation, encoding)

PASSES = {True: 'forward and backward', False: 'forward'}
OURS = 'ours'  # in a target: the implementation that is fastest under FIRE
DENSE = 'reference'  # the implementation that holds all logits


class Target(NamedTuple):
  """A program's time over that of the fastest of others.

  Attributes:
    program: (implementation, encoding).
    others: likewise.
    lengths: [tokens].
    backward: whether the backward pass is timed too.
    most: that the ratio may be.
  """

  program: tuple[str, str]
  others: tuple[tuple[str, str], ...]
  lengths: tuple[int, ...]
  backward: bool
  most: float


FIRE, NOPE = (OURS, 'fire'), (OURS, 'nope')
LIBRARIES = (('jax.nn', 'nope'), ('tokamax', 'nope'))
LONG = (8192, 32768, 131072)
TARGETS = {  # by platform
  'cpu': (
    Target(FIRE, (NOPE,), (2048, 4096, 8192), True, 1.3),
    Target(FIRE, ((DENSE, 'fire'),), (2048,), True, 0.3),
    Target(FIRE, (('torch.sdpa', 'fire'),), (2048,), True, 0.35),
  ),
  'gpu': (
    Target(FIRE, (NOPE,), LONG, False, 1.1),
    Target(FIRE, (NOPE,), LONG, True, 1.15),
    Target(NOPE, LIBRARIES, LONG, False, 1 / 0.7),
    Target(NOPE, LIBRARIES, LONG, True, 1 / 0.7),
    Target(FIRE, (('torch.flex', 'fire'),), LONG, True, 1 / 5),
  ),
  'tpu': (),
}
# Bytes of a process that runs FIRE forward and backward at a length, at most.
MOST_BYTES = {'cpu': (32768, 3e9)}


def times_at(results: Results, length: int, backward: bool) -> Times:
  """Returns what took turns in the same rounds."""
  return {
    (row['implementation'], row['encoding']): row['seconds']
    for row in results['times']
    if (row['length'], row['backward']) == (length, backward)
  }


def ratio(seconds: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
  """Returns the ratio of the least times, and the median of the ratios by round."""
  pairs = zip(seconds, others, strict=True)
  return min(seconds) / min(others), statistics.median(one / other for one, other in pairs)


def ours(results: Results, times: Times) -> str | None:
  """Returns which of the library's implementations is fastest under FIRE, dense ones aside."""
  names = [name for name in results['implementations'] if name != DENSE and (name, 'fire') in times]
  return min(names, key=lambda name: min(times[name, 'fire']), default=None)


def _of_target(results: Results, target: Target, length: int) -> dict[str, Any] | None:
  """Returns what was found for a target at a length; None if it was not measured."""
  times = times_at(results, length, target.backward)
  own = ours(results, times)
  program, *others = (
    (own if implementation == OURS else implementation, encoding)
    for implementation, encoding in (target.program, *target.others)
  )
  others = [other for other in others if other in times]
  if program not in times or not others:
    return None
  other = min(others, key=lambda other: min(times[other]))
  least, median = ratio(times[program], times[other])
  what = f'{" ".join(program)} over {" ".join(other)}, {PASSES[target.backward]}'
  return {'what': what, 'found': least, 'median': median, 'most': target.most}


def verdicts(results: Results) -> list[dict[str, Any]]:
  """Returns, for each target at each length that was measured, what was found and if it is met."""
  platform = results['machine']['platform']
  found = [
    {'length': length, **row}
    for target in TARGETS[platform]
    for length in target.lengths
    if (row := _of_target(results, target, length))
  ]
  for row in results['alone']:
    at = (row['length'], row['encoding'], row['backward'])
    if platform in MOST_BYTES and at == (MOST_BYTES[platform][0], 'fire', True):
      what = f'GB of a process, {row["implementation"]} fire, {PASSES[True]}'
      size, most = row['process_bytes'] / 1e9, MOST_BYTES[platform][1] / 1e9
      found.append(
        {'length': row['length'], 'what': what, 'found': size, 'median': None, 'most': most}
      )
  return [{**row, 'met': row['found'] <= row['most']} for row in found]


def _three_digits(number: float) -> str:
  return f'{float(f"{number:.3g}"):g}'


def of_times(results: Results, backward: bool) -> list[str]:
  """Returns a row a program: at each length its least time and its ratio to the same without bias.

  A library that could not run it has no number there; the reasons stand below.
  """
  lengths = sorted({row['length'] for row in results['times']})
  by_length = [times_at(results, length, backward) for length in lengths]
  lines = [
    f'{PASSES[backward]:<30}' + ''.join(f'{length:>12}{"":12}' for length in lengths),
    ' ' * 30 + '      ms of nope  median' * len(lengths),
  ]
  for program in dict.fromkeys(program for times in by_length for program in times):
    line = f'{" ".join(program):<30}'
    for times in by_length:
      seconds, others = times.get(program), times.get((program[0], 'nope'))
      line += f'{"-" if seconds is None else _three_digits(min(seconds) * 1e3):>8}'
      numbers = ratio(seconds, others) if seconds and others else ()
      line += ''.join(f'{number:>8.2f}' for number in numbers).ljust(16)
    lines.append(line.rstrip())
  return lines


def _bytes(row: dict[str, Any]) -> int:
  """Returns the most memory that was in use: of an accelerator where there is one."""
  return row['process_bytes'] if row['device_bytes'] is None else row['device_bytes']


def _of_memory(results: Results) -> list[str]:
  """Returns a row for each pass that had a process for itself."""
  if not results['alone']:
    return []
  lines = [f'{"alone in a process, " + PASSES[True]:<42}length        s  in use MB  temporary MB']
  for row in results['alone']:
    lines.append(
      f'{row["implementation"] + " " + row["encoding"]:<40}{row["length"]:>8}'
      f'{_three_digits(row["seconds"]):>9}{_bytes(row) / 1e6:>11.0f}'
      f'{row["temporary_bytes"] / 1e6:>14.0f}'
    )
  return lines


def of_targets(rows: Sequence[dict[str, Any]]) -> list[str]:
  """Returns a line for each of `verdicts`."""
  width = max((len(row['what']) for row in rows), default=0)
  lines = [f'{"target":<{width}}  length   found  median  at most'] if rows else []
  for row in rows:
    median = '' if row['median'] is None else f'{row["median"]:.2f}'
    lines.append(
      f'{row["what"]:<{width}}{row["length"]:>8}{row["found"]:>8.2f}{median:>8}{row["most"]:>9.2f}'
      f'  {"met" if row["met"] else "missed"}'
    )
  return lines


def _of_absent(results: Results) -> list[str]:
  """Returns a row for each reason that a library gave."""
  found: dict[tuple[str, str], dict[str, None]] = {}
  for row in results['absent']:
    found.setdefault((row['implementation'], row['reason']), {})[PASSES[row['backward']]] = None
  return [
    f'not here: {name}, {" or ".join(passes)}: {reason}' for (name, reason), passes in found.items()
  ]


def table(results: Results) -> str:
  """Returns everything as text."""
  parts = [of_times(results, backward) for backward in PASSES]
  parts += [_of_absent(results), _of_memory(results), of_targets(verdicts(results))]
  return '\n\n'.join('\n'.join(lines) for lines in parts if lines)


def plot(results: Results, path: pathlib.Path) -> None:
  """Draws the cost of each encoding by length, and the memory of a process."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(11, 4), layout='constrained')
  cost, memory = figure.subplots(1, 2)
  lengths = sorted({row['length'] for row in results['times']})
  for encoding in dict.fromkeys(row['encoding'] for row in results['times']):
    points = []
    for length in lengths:
      times = times_at(results, length, True)
      own = ours(results, times)
      if (own, encoding) in times and (own, 'nope') in times:
        points.append((length, ratio(times[own, encoding], times[own, 'nope'])[0]))
    cost.plot(*zip(*points, strict=True), marker='o', label=encoding)
  cost.set(ylabel=f"time over nope's, {PASSES[True]}", xscale='log')
  cost.set_xticks(lengths, [str(length) for length in lengths])
  cost.minorticks_off()
  for encoding in dict.fromkeys(row['encoding'] for row in results['alone']):
    rows = [row for row in results['alone'] if row['encoding'] == encoding]
    points = sorted((row['length'], _bytes(row) / 1e6) for row in rows)
    if len(points) > 1:  # most are measured at the longest length alone
      memory.plot(*zip(*points, strict=True), marker='o', label=encoding)
  memory.set(ylabel=f'memory [MB], {PASSES[True]}', ylim=(0, None))
  for axes in (cost, memory):
    axes.set(xlabel='length [tokens]')
    axes.grid(alpha=0.3)
    if axes.lines:
      axes.legend(fontsize=8, loc='center left', bbox_to_anchor=(1, 0.5))
  figure.savefig(path, dpi=120)
