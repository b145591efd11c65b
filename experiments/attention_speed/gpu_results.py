"""What was measured on a GPU: as a table, as a plot, and against targets. Nothing here measures."""

import pathlib
from collections.abc import Iterator
from typing import Any

from experiments.attention_speed import results

Found = dict[str, Any]  # what `gpu.py` writes as JSON
# Relative, of the kernel in bfloat16 to attention in float32. An encoding's gradients are sums of
# which most cancels: tiles in XLA, in bfloat16 too, come to 0.01 to 0.05 for FIRE.
MOST_ERROR = {'out': 0.02, 'params': 0.1, 'query': 0.02, 'key': 0.02, 'value': 0.02}


def rows(found: Found, stage: str) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields the name and the row of each figure of a stage that was measured."""
  for name, row in found['figures'].items():
    if row['stage'] == stage and 'reason' not in row:
      yield name, row


def timed(found: Found) -> Iterator[tuple[str, results.Results]]:
  """Yields each stage whose programs took turns, with them as `results` wants them."""
  for stage in dict.fromkeys(row['stage'] for row in found['figures'].values()):
    figures = [row for _, row in rows(found, stage) if 'times' in row]
    times, absent = ([one for row in figures for one in row[part]] for part in ('times', 'absent'))
    if figures:
      yield stage, {**found, 'times': times, 'absent': absent, 'alone': []}


def is_correct(row: dict[str, Any]) -> bool:
  """Returns whether a kernel agrees with the reference, and with itself in each bit."""
  return row['same_bits'] and all(
    error <= MOST_ERROR[name] for name, error in row['errors'].items()
  )


def learns(row: dict[str, Any]) -> bool:
  """Returns whether the loss fell, which no number that is not finite does."""
  return row['losses'][-1] < row['losses'][0]


def verdicts(found: Found) -> list[dict[str, Any]]:
  """Returns, for each target that was measured, what was found and if it is met."""
  return [row for _, part in timed(found) for row in results.verdicts(part)]


def _of_checks(found: Found) -> list[str]:
  """Returns a row for each comparison with dense attention in float32."""
  lines = [
    f'{row["implementation"] + ", " + name:<60}'
    + ''.join(f'{row["errors"][one]:>9.1e}' for one in MOST_ERROR)
    + f'{"yes" if row["same_bits"] else "no":>11}  {"met" if is_correct(row) else "missed"}'
    for name, row in rows(found, 'correctness')
  ]
  head = f'{"relative errors, of values and gradients":<60}'
  head += ''.join(f'{name:>9}' for name in MOST_ERROR) + '  same bits'
  most = f'{"at most":<60}' + ''.join(f'{most:>9.1e}' for most in MOST_ERROR.values())
  return [head, *lines, most] if lines else []


def _of_training(found: Found) -> list[str]:
  lines = [
    f'{row["size"]:<8}{row["implementation"]:<12}{row["rows"]:>5} x {row["length"]:<8}'
    f'{row["a_step"]:>8.3g}{row["tokens_per_second"]:>10.0f}'
    + ('       -' if row['utilization'] is None else f'{row["utilization"]:>8.1%}')
    + f'{row["bytes"]["total"] / 2**30:>8.1f}   {row["losses"][0]:.3f} to {row["losses"][-1]:.3f}'
    + f' in {len(row["losses"])}{"" if learns(row) else ", which is no learning"}'
    for _, row in rows(found, 'training')
  ]
  head = (
    f'{"FIRE, training":<20}rows x tokens   s a step  tokens/s     MFU     GiB   loss, in steps'
  )
  return [head, *lines] if lines else []


def _of_failures(found: Found) -> list[str]:
  lines = [
    f'failed: {name}: {row["reason"]}' for name, row in found['figures'].items() if 'reason' in row
  ]
  return lines + [f'not reached: {name}' for name in found['not_reached']]


def _of_absent(part: results.Results) -> list[str]:
  """Returns a row for each reason that a program gave, with its lengths."""
  lengths: dict[str, dict[int, None]] = {}
  for row in part['absent']:
    what = f'not here: {row["implementation"]} {row["encoding"]}: {row["reason"]}'
    lengths.setdefault(what, {})[row['length']] = None
  return [f'{what} ({", ".join(map(str, found))})' for what, found in lengths.items()]


def table(found: Found) -> str:
  """Returns everything as text."""
  parts = [_of_checks(found)]
  for stage, part in timed(found):
    for backward in results.PASSES:
      if any(row['backward'] == backward for row in part['times']):
        parts.append([f'{stage}:', *results.of_times(part, backward)])
    parts.append(_of_absent(part))
  parts += [_of_training(found), _of_failures(found), results.of_targets(verdicts(found))]
  return '\n\n'.join('\n'.join(lines) for lines in parts if lines)


def plot(found: Found, path: pathlib.Path) -> None:
  """Draws what attention takes over the kernel without a bias, and how training uses the GPU."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(11, 4), layout='constrained')
  cost, use = figure.subplots(1, 2)
  for part in (part for stage, part in timed(found) if stage == 'attention'):
    lengths = sorted({row['length'] for row in part['times']})
    for backward, passes in results.PASSES.items():
      for program, points in _costs(part, lengths, backward).items():
        style = 'o-' if backward else 'o:'
        cost.plot(*zip(*points, strict=True), style, label=f'{" ".join(program)}, {passes}')
    cost.set(xscale='log', xlabel='length [tokens]', ylabel='time over that of the first')
    cost.set_xticks(lengths, [str(length) for length in lengths])
    cost.minorticks_off()
    cost.legend(fontsize=7)
  measured = [row for _, row in rows(found, 'training')]
  names = [f'{r["size"]} {r["implementation"]}\n{r["rows"]} x {r["length"]}' for r in measured]
  use.barh(names, [100 * (row['utilization'] or 0.0) for row in measured])
  use.set(xlabel="model FLOPs of training over the GPU's peak [%]")
  use.tick_params(labelsize=7)
  for axes in (cost, use):
    axes.grid(alpha=0.3)
  figure.savefig(path, dpi=120)


def _costs(part: results.Results, lengths: list[int], backward: bool) -> dict[Any, Any]:
  """Returns (length, time over the first program's) of each program."""
  points: dict[Any, Any] = {}
  for length in lengths:
    times = results.times_at(part, length, backward)
    for program, seconds in times.items():
      ratio, _ = results.ratio(seconds, next(iter(times.values())))
      points.setdefault(program, []).append((length, ratio))
  return points
