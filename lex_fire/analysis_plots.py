"""Plots of what `analyze` reports, drawn without a display."""

import pathlib
from collections.abc import Sequence

import numpy as np

from lex_fire import plot
from lex_fire import report as report_lib

Report = report_lib.Report

_COLUMNS = 4  # of panels, where nothing else says how many
_PANEL = (3.4, 2.6)  # inches
_MOST_LINEAR = 100.0  # nats: biases that span more are drawn by their logarithm


def expectation(drawn: Sequence[Report], path: pathlib.Path) -> None:
  """Draws g[n] / g[0] of encodings, a panel each."""
  columns = min(len(drawn), _COLUMNS)
  figure, panels = _panels(len(drawn), columns, sharey=True)
  for axes, of_one in zip(panels, drawn, strict=True):
    values = of_one['expectation']['by_distance']
    axes.plot([value / values[0] for value in values], linewidth=0.6)
    axes.axhline(0, color='grey', linewidth=0.6)
    _title(axes, f'{of_one["name"]} (width {of_one["expectation"]["width"]})')
  title = 'Attention expectation by distance, g[n] / g[0]'
  _finish(figure, None, columns, title, 'distance [tokens]', None)
  figure.savefig(path, dpi=150)


def biases(drawn: Sequence[Report], path: pathlib.Path) -> None:
  """Draws the biases of encodings: a panel a layer and query position, a line a head."""
  from matplotlib import colormaps

  of_panels = [
    (of_one, layer, of_query)
    for of_one in drawn
    for layer in range(len(of_one['biases'][0]['by_layer_and_head']))
    for of_query in of_one['biases']
  ]
  queries = len(drawn[0]['biases']) if len(drawn) == 1 else 1
  columns = queries if queries > 1 else min(len(of_panels), _COLUMNS)
  # Where a row is one layer's, its panels have one scale.
  shared = {'sharey': 'row'} if queries > 1 else {}
  figure, panels = _panels(len(of_panels), columns, **shared)
  for axes, (of_one, layer, of_query) in zip(panels, of_panels, strict=True):
    values_by_head = of_query['by_layer_and_head'][layer]
    for head, values in enumerate(values_by_head):
      color = colormaps['viridis'](head / max(len(values_by_head) - 1, 1))
      axes.plot(of_query['distance'], values, color=color, linewidth=1, label=f'head {head}')
    axes.set_xscale('symlog', linthresh=1)
    if np.ptp(values_by_head) > _MOST_LINEAR:
      axes.set_yscale('symlog', linthresh=1)
    layers = len(of_query['by_layer_and_head'])
    where = [f'layer {layer}'] * (layers > 1) + [f'query at {of_query["query_position"]}']
    begun = ', as training begins' * (of_one['learned'] and of_one['checkpoint_step'] is None)
    _title(axes, f'{of_one["name"]}{begun}\n{", ".join(where)}')
  _finish(figure, panels[0], columns, 'Bias by distance', 'distance [tokens]', 'bias [nats]')
  figure.savefig(path, dpi=150)


def heads(reports: Sequence[Report], path: pathlib.Path) -> None:
  """Draws, by length, the means over heads: a colour a run and encoding, a style of line a mask."""
  from matplotlib.ticker import FuncFormatter

  titles = {
    'resolution': 'Attention resolution',
    'entropy': 'Entropy of attention [nats]',
    'distance': 'Attended distance [tokens]',
  }
  plain = FuncFormatter(lambda value, _: f'{value:g}')
  figure, panels = _panels(len(titles), len(titles))
  names = report_lib.labels(reports)
  for axes, (metric, title) in zip(panels, titles.items(), strict=True):
    for name, report, look in zip(names, reports, plot.looks(reports), strict=True):
      rows = report['lengths']
      lengths, values = ([row[field] for row in rows] for field in ('length', metric))
      axes.plot(lengths, values, label=name, **look)
    _mark_training(axes, reports)
    axes.set_xscale('log', base=2)
    axes.xaxis.set_major_formatter(plain)
    _title(axes, title)
    _widen(axes)
  distances = [row['distance'] for report in reports for row in report['lengths']]
  if max(distances) > 4 * min(distances):
    panels[2].set_yscale('log', base=2)
    panels[2].yaxis.set_major_formatter(plain)
  _finish(figure, panels[0], len(titles), None, 'window length [tokens]', None, legend_columns=4)
  figure.savefig(path, dpi=150)


def _widen(axes) -> None:
  """Lets an axis span a twentieth of what it shows at least, so that noise makes no slope."""
  low, high = axes.get_ylim()
  short = 0.05 * max(abs(low), abs(high)) - (high - low)
  if short > 0:
    axes.set_ylim(low - short / 2, high + short / 2)


def scores(reports: Sequence[Report], path: pathlib.Path) -> None:
  """Draws s[n] - s[0] in the longest windows, mean over heads: a panel a report, a line a layer."""
  from matplotlib import colormaps

  masks = len({report['mask'] for report in reports})
  columns = masks if masks > 1 else min(len(reports), _COLUMNS)
  figure, panels = _panels(len(reports), columns)
  for axes, report in zip(panels, reports, strict=True):
    of_longest = report['lengths'][-1]['scores']
    values_by_layer = of_longest['mean_by_layer']
    for layer, values in enumerate(values_by_layer):
      color = colormaps['viridis'](layer / max(len(values_by_layer) - 1, 1))
      fall = [value - values[0] for value in values]
      axes.plot(of_longest['from'], fall, color=color, linewidth=1, label=f'layer {layer}')
    _mark_training(axes, [report])
    axes.set_xscale('symlog', linthresh=1)
    axes.set_xlim(left=0)
    _title(axes, f'{report_lib.series(report)} {report["mask"]}')
  longest = reports[0]['lengths'][-1]['length']
  title = f'Mean score by distance in windows of {longest}, less that at distance 0'
  _finish(figure, panels[0], columns, title, 'distance [tokens]', 'score [nats]')
  figure.savefig(path, dpi=150)


def _panels(count, columns, **shared):
  """Returns a figure, and as many axes as asked for, in rows of so many columns."""
  from matplotlib.figure import Figure

  rows = -(-count // columns)
  width, height = _PANEL
  # Room for a title and a legend, whatever the panels are.
  size = (max(width * columns, 6), height * rows + 1)
  figure = Figure(figsize=size, layout='constrained')
  panels = list(figure.subplots(rows, columns, squeeze=False, **shared).flat)
  for axes in panels[count:]:
    axes.remove()
  return figure, panels[:count]


def _title(axes, text):
  axes.set_title(text, fontsize=9)
  axes.grid(alpha=0.3)


def _mark_training(axes, reports):
  for train_length in sorted({report['train_length'] for report in reports}):
    label = f'trained at {train_length}'
    axes.axvline(train_length, color='grey', linestyle='--', linewidth=1, label=label)


def _finish(figure, first, columns, title, x, y, legend_columns=8):
  """Names the axes, the lines by those of the first panel if it is given, and the figure."""
  count = len(figure.axes)
  for index, axes in enumerate(figure.axes):
    if index + columns >= count:
      axes.set_xlabel(x, fontsize=9)
    if y and index % columns == 0:
      axes.set_ylabel(y, fontsize=9)
  if first is not None:
    figure.legend(
      *first.get_legend_handles_labels(),
      loc='outside lower center',
      ncols=legend_columns,
      fontsize=8,
    )
  figure.suptitle(title)
