"""What sweeps measured: as tables, as plots and as rankings. Nothing here measures.

    python -m experiments.sweep_results

remakes NAME.txt and NAME.png from every QUESTION/NAME.jsonl, whose lines are a run's evaluations.
"""

import itertools
import json
import math
import pathlib
import statistics
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from experiments import sweep_plot, sweep_published
from lex_fire import cli, errors

HERE = pathlib.Path(__file__).parent
FIELDS = ('length', 'tokens', 'documents', 'nats_per_token')  # of a line of losses, at each length
Line = dict[str, Any]  # of a run's evaluation under one mask, by one protocol


class Measure(NamedTuple):
  """What lines tell of a run at each length.

  Attributes:
    field: of a line, at each length.
    y_label: of the axis on which it is drawn, with its unit.
    x_label: of the lengths, likewise.
    sign: 1 if less is better, -1 if more is.
    describe: a line's lengths -> what the numbers are, and of how much.
    decimals: that are shown of it.
    near: how far from the best is drawn enlarged; infinite: nothing is.
    is_drawn: whether there is a picture of it.
  """

  field: str
  y_label: str
  x_label: str
  sign: int
  describe: Callable[[Sequence[dict[str, Any]]], str]
  decimals: int = 3
  near: float = math.inf
  is_drawn: bool = True


def _describe_losses(lengths: Sequence[dict[str, Any]]) -> str:
  counts, last = dict.fromkeys(f'{at["tokens"]:,}' for at in lengths), lengths[-1]
  return (
    f'nats per token of {", ".join(counts)} tokens, of {last["documents"]} documents at '
    f'{last["length"]}'
  )


_WINDOW = 'window length [tokens]'
LOSS = Measure('nats_per_token', 'loss [nats per token]', _WINDOW, 1, _describe_losses, near=0.3)
ROUGE = Measure(
  'rouge_geometric_mean',
  'ROUGE, geometric mean [percent]',
  _WINDOW,
  -1,
  lambda lengths: (
    f'geometric mean of ROUGE-1, 2 and L of {lengths[-1]["questions"]} questions, in percent'
  ),
  decimals=2,
)
ACCURACY = Measure(
  'accuracy',
  'right answers [percent]',
  'digits of a number',
  -1,
  lambda lengths: f'right answers to {lengths[-1]["questions"]} questions a length, in percent',
  decimals=1,
)
ANSWER_LOSS = Measure(
  'nats_per_answer_token',
  'loss of the right answers [nats per token]',
  _WINDOW,
  1,
  lambda lengths: f'nats per token of the right answers to {lengths[-1]["questions"]} questions',
)
DISTINCT = Measure(
  'distinct_answers',
  'different answers',
  _WINDOW,
  -1,
  lambda lengths: f'different answers to {lengths[-1]["questions"]} questions',
  decimals=1,
  is_drawn=False,
)
MEASURES = (LOSS, ROUGE, ACCURACY, ANSWER_LOSS, DISTINCT)


class Row(NamedTuple):
  """What a variant does, over seeds.

  Attributes:
    variant: its name.
    seeds: how many.
    values: {length: that of each seed}, of what the lines measure.
    decimals: that are shown of a value.
  """

  variant: str
  seeds: int
  values: dict[int, list[float]]
  decimals: int

  def mean(self, length: int) -> float:
    """Returns the mean over seeds."""
    return statistics.fmean(self.values[length])

  def deviation(self, length: int) -> float:
    """Returns the sample standard deviation over seeds; one has none."""
    return statistics.stdev(self.values[length]) if self.seeds > 1 else math.nan

  def text(self, length: int) -> str:
    """Returns both as text."""
    return sweep_published.over_seeds(self.values[length], decimals=self.decimals)

  def curve(self) -> sweep_plot.Curve:
    """Returns what is drawn of it."""
    means = {length: self.mean(length) for length in self.values}
    deviations = {length: self.deviation(length) for length in self.values}
    return sweep_plot.Curve(self.variant, means, deviations)


def read(path: pathlib.Path) -> list[Line]:
  """Reads the lines of a file.

  Raises:
    errors.UserError: if one is no JSON.
  """
  lines = []
  for number, text in enumerate(path.read_text().splitlines(), 1):
    try:
      lines.append(json.loads(text))
    except ValueError as error:
      raise errors.UserError(
        f'line {number} of {str(path)!r} is no JSON: {error}; delete it and run again'
      ) from error
  return lines


def whole(lines: Sequence[Line]) -> list[Line]:
  """Returns the lines of seeds of which none is missing; all, if no seed is whole.

  So where one is, no variant is compared by other seeds than the rest while a sweep is going on.
  """
  found: dict[int, set[tuple[str, ...]]] = {}
  for line in lines:
    found.setdefault(line['seed'], set()).add((line['variant'], line['protocol'], line['mask']))
  every = set().union(*found.values())
  seeds = [seed for seed, of_seed in found.items() if of_seed == every]
  return [line for line in lines if line['seed'] in seeds] or list(lines)


def measures(lines: Sequence[Line]) -> list[Measure]:
  """Returns what lines tell: all of a file tell the same."""
  return [of for of in MEASURES if all(of.field in line['lengths'][0] for line in lines)]


def rows(lines: Sequence[Line], protocol: str, mask: str, of: Measure = LOSS) -> list[Row]:
  """Returns a row a variant of what is measured, the best at the longest length first."""
  found: dict[str, dict[int, Line]] = {}
  for line in lines:
    if (line['protocol'], line['mask']) == (protocol, mask):
      found.setdefault(line['variant'], {})[line['seed']] = line
  made = []
  for variant, of_seed in found.items():
    values: dict[int, list[float]] = {}
    for _, line in sorted(of_seed.items()):
      for at in line['lengths']:
        values.setdefault(at['length'], []).append(at[of.field])
    made.append(Row(variant, len(of_seed), values, of.decimals))
  return sorted(made, key=lambda row: of.sign * row.mean(max(row.values)))


def table(made: Sequence[Row]) -> str:
  """Returns rows as text: mean and standard deviation over seeds at each length."""
  lengths = sorted(made[0].values)
  width = max(len('variant'), *(len(row.variant) for row in made))
  lines = [f'{"variant":<{width}}  seeds' + ''.join(f'{length:>16}' for length in lengths)]
  for row in made:
    cells = ''.join(f'{row.text(length):>16}' for length in lengths)
    lines.append(f'{row.variant:<{width}}{row.seeds:>7}{cells}')
  return '\n'.join(lines)


def cases(lines: Sequence[Line]) -> list[tuple[str, str]]:
  """Returns each protocol and mask of some lines, in their order."""
  return list(dict.fromkeys((line['protocol'], line['mask']) for line in lines))


def heading(line: Line, of: Measure) -> str:
  """Says what the table of a protocol and mask shows, by one of its lines."""
  what = of.describe(line['lengths'])
  return f'`{line["protocol"]}`, {line["mask"]}: {what}; mean and standard deviation over seeds'


def tables(lines: Sequence[Line]) -> str:
  """Returns the table of each protocol, mask and measure."""
  parts = []
  for (protocol, mask), of in itertools.product(cases(lines), measures(lines)):
    some = next(line for line in lines if (line['protocol'], line['mask']) == (protocol, mask))
    made = rows(lines, protocol, mask, of)
    parts += [heading(some, of), textwrap.indent(table(made), '    ')]
    if of == LOSS:  # what is published is of it
      losses = {row.variant: row.values for row in made}
      parts += sweep_published.rankings(list(losses), mask)
      parts += sweep_published.changes(losses, some['train_length'], mask)
      parts += sweep_published.perplexities(losses, mask)
  return '\n\n'.join(parts) + '\n'


def draw(lines: Sequence[Line], path: pathlib.Path, of: Measure = LOSS) -> None:
  """Draws what is measured by length under each mask, with standard deviations over seeds."""
  protocol = lines[0]['protocol']
  panels = {
    f'{mask} ({protocol})': [row.curve() for row in rows(lines, protocol, mask, of)]
    for each, mask in cases(lines)
    if each == protocol
  }
  seeds, longest = len({line['seed'] for line in lines}), lines[0]['lengths'][-1]['length']
  over = 'one seed' if seeds == 1 else f'mean and standard deviation over {seeds} seeds'
  better = 'less' if of.sign > 0 else 'more'
  sweep_plot.draw(
    panels,
    path,
    title=f'{over}; beside each name the mean at {longest:,}; {better} is better',
    x_label=of.x_label,
    y_label=of.y_label,
    trained={line['train_length'] for line in lines},
    decimals=of.decimals,
    near=of.near,
  )


def write(path: pathlib.Path) -> str:
  """Writes the tables and the plots of a file of lines beside it, and returns the tables.

  Of the seeds that are `whole`. The plot of the first measure has the file's name, those of others
  their own after it.
  """
  lines = whole(read(path))
  text = tables(lines)
  path.with_suffix('.txt').write_text(text)
  for number, of in enumerate(each for each in measures(lines) if each.is_drawn):
    draw(lines, path.with_name(f'{path.stem}{f"_{of.field}" if number else ""}.png'), of)
  return text


def main() -> None:
  """The command."""
  paths = sorted(HERE.glob('*/*.jsonl'))
  if not paths:
    raise errors.UserError(f'{str(HERE)!r} has no results; run one of the sweeps first')
  for path in paths:
    print(f'{path.stem}\n\n{write(path)}')


if __name__ == '__main__':
  cli.run(main)
