"""How answers to questions are shown: a table of scores, heat maps of needles, curves by length."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from lex_fire import benchmark, plot
from lex_fire import report as report_lib
from lex_fire.data import algorithm_tasks, spec

Report = dict[str, Any]
_MAIN = ('rouge_geometric_mean', 'f1', 'exact_match', 'accuracy', 'matthews', 'spearman')


def main_score(scores: dict[str, float]) -> str:
  """Returns the name of the score that stands for a Task."""
  return next((name for name in _MAIN if name in scores), next(iter(scores)))


def table(reports: Sequence[Report]) -> str:
  """Returns scores as text: a row a Task and length, a column a case [percent]."""
  labels = report_lib.labels(reports)
  width = max(12, *(len(label) + 2 for label in labels))
  names = [_row_name(entry) for entry in reports[0]['tasks']]
  first = max(map(len, names)) + 2
  lines = [f'{"":<{first}}' + ''.join(f'{label:>{width}}' for label in labels)]
  for index, name in enumerate(names):
    cells = (_cell(report['tasks'][index]['scores']) for report in reports)
    lines.append(f'{name:<{first}}' + ''.join(f'{cell:>{width}}' for cell in cells))
  # Runs of one vocabulary cut alike.
  cuts = {
    f'{entry["task"]} at {entry["length"]}: {entry["questions_cut"]} of {entry["questions"]} '
    f'questions are cut, by {entry["tokens_cut"]:,} tokens ({report["tokenizer"]}) in all': None
    for report in reports
    for entry in report['tasks']
    if entry['questions_cut']
  }
  # Such a score is of the Task's commonest answer, and says nothing of what was read.
  alike = [
    f'{label}: all {entry["questions"]} answers to '
    f'{benchmark.named(entry["task"], entry["length"])} are the same'
    for label, report in zip(labels, reports, strict=True)
    for entry in report['tasks']
    if entry['distinct_answers'] == 1 < entry['questions']
  ]
  return '\n'.join([*lines, *cuts, *alike])


def _row_name(entry: Report) -> str:
  at = '' if entry['length'] is None else f' at {entry["length"]}'
  scores = entry['scores']
  return f'{entry["task"]}{at}' + (f' [{main_score(scores)}, %]' if scores else '')


def _cell(scores: dict[str, float] | None) -> str:
  return 'withheld' if scores is None else f'{scores[main_score(scores)]:.2f}'


def _entries(report: Report, task: str) -> list[Report]:
  return [entry for entry in report['tasks'] if entry['task'] == task]


def can_draw(reports: Sequence[Report], task: str) -> bool:
  """Returns whether there is a score of a Task to show."""
  return _entries(reports[0], task)[0]['scores'] is not None


def draw(reports: Sequence[Report], task: str, path: pathlib.Path) -> None:
  """Draws the scores of a Task: by length and depth, by length of the question, or by length."""
  from matplotlib.figure import Figure

  entries = _entries(reports[0], task)
  facts = list(entries[0]['by'][0]['facts']) if entries[0]['by'] else []
  if facts == ['length', 'depth']:
    figure = Figure(figsize=(1 + 4.2 * len(reports), 4), layout='constrained')
    _heat_maps(figure, reports, task)
  else:
    figure = Figure(figsize=(7, 4.5), layout='constrained')
    _curves(figure.subplots(), reports, task)
  figure.savefig(path, dpi=150)


def _heat_maps(figure, reports, task):
  """Draws a map for each report: a column a length, a row a depth, a line after training's."""
  all_axes = figure.subplots(1, len(reports), squeeze=False, sharey=True)[0]
  for axes, label, report in zip(all_axes, report_lib.labels(reports), reports, strict=True):
    groups = [group for entry in _entries(report, task) for group in entry['by']]
    lengths = sorted({group['facts']['length'] for group in groups})
    depths = sorted({group['facts']['depth'] for group in groups})
    # [depths, lengths]
    grid = np.full((len(depths), len(lengths)), np.nan)
    for group in groups:
      row, column = depths.index(group['facts']['depth']), lengths.index(group['facts']['length'])
      grid[row, column] = group['scores'][main_score(group['scores'])]
    image = axes.imshow(grid, vmin=0, vmax=100, cmap='RdYlGn', aspect='auto')
    for (row, column), value in np.ndenumerate(grid):
      if np.isfinite(value):
        axes.text(column, row, f'{value:.0f}', ha='center', va='center', fontsize=8)
    within = sum(length <= report['train_length'] for length in lengths)
    if 0 < within < len(lengths):
      axes.axvline(within - 0.5, color='black', linestyle='--', linewidth=1.5)
    axes.set_xticks(range(len(lengths)), [f'{length:,}' for length in lengths], rotation=45)
    axes.set_yticks(range(len(depths)), [f'{depth:.2g}' for depth in depths])
    axes.set(title=f'{label}, trained at {report["train_length"]}', xlabel='length [tokens]')
  all_axes[0].set_ylabel('depth of the needle')
  figure.colorbar(image, ax=list(all_axes), label='right [%]')
  figure.suptitle(task)


def _curves(axes, reports, task):
  """Draws a line for each report: its score by the length of questions, or of what was read."""
  for label, report, look in zip(
    report_lib.labels(reports), reports, plot.looks(reports), strict=True
  ):
    entries = _entries(report, task)
    if entries[0]['length'] is None:
      points = [(group['facts']['length'], group['scores']) for group in entries[0]['by']]
    else:
      points = [(entry['length'], entry['scores']) for entry in entries]
    name = main_score(points[0][1])
    axes.plot(
      [length for length, _ in points], [scores[name] for _, scores in points], label=label, **look
    )
  own = entries[0]['length'] is None
  plot.mark_training(axes, _trained(reports, task) if own else {r['train_length'] for r in reports})
  axes.set_xscale('log', base=2)
  axes.xaxis.set_major_formatter(lambda value, _: f'{value:g}')
  axes.set(
    title=task,
    xlabel='length of the question [symbols]' if own else 'length [tokens]',
    ylabel=f'{name} [%]',
    ylim=(-2, 102) if name == 'accuracy' else None,
  )
  axes.grid(alpha=0.3)
  axes.legend()


def _trained(reports, task) -> set[int]:
  """Returns the lengths of questions that runs were trained on, of those trained on the Task."""
  trained = (spec.Spec(report['train_task']) for report in reports)
  base = spec.Spec(task).base
  return {algorithm_tasks.options(what)['length'] for what in trained if what.base == base}
