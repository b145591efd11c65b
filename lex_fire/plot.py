"""Plots, drawn without a display."""

import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from lex_fire import report as report_lib

# By mask: four styles and five markers make twenty pairs before one returns.
_STYLES, _MARKERS = ('-', '--', ':', '-.'), ('o', 's', '^', 'D', 'v')


def lengths(reports: Sequence[report_lib.Report], path: pathlib.Path) -> None:
  """Draws reports of `evaluate`: a colour a run and encoding, a style of line a mask.

  Loss by length with standard errors, and by position in the longest windows.
  """
  from matplotlib.figure import Figure
  from matplotlib.ticker import FuncFormatter

  names = report_lib.labels(reports)
  height = 0.25 * (len(names) // 2 + 2)  # of the legend below, two names a row [inches]
  figure = Figure(figsize=(10, 4 + height), layout='constrained')
  by_length, by_position = figure.subplots(1, 2, sharey=True)
  entries = []  # of the legend
  for name, report, look in zip(names, reports, looks(reports), strict=True):
    rows = report['lengths']
    line = by_length.errorbar(
      [row['length'] for row in rows],
      [row['nats_per_token'] for row in rows],
      yerr=[row['standard_error'] or 0.0 for row in rows],
      capsize=3,
      label=name,
      **look,
    )
    entries.append(line)
    buckets = [row for row in report['positions'] if row['nats_per_token'] is not None]
    by_position.plot(
      [row['to'] for row in buckets], [row['nats_per_token'] for row in buckets], **look
    )
  longest = max(row['length'] for report in reports for row in report['lengths'])
  titles = {
    by_length: (f'Loss by window length ({report_lib.how(reports[0])})', 'window length [tokens]'),
    by_position: (f'Loss by position in windows of {longest}', 'position, up to [tokens]'),
  }
  for axes, (title, label) in titles.items():
    axes.set_xscale('log', base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
    trained = mark_training(axes, {report['train_length'] for report in reports})
    axes.set(title=title, xlabel=label)
    axes.grid(alpha=0.3)
  figure.suptitle(report_lib.documents(reports[0]))
  by_length.set_ylabel(f'loss [{report_lib.unit(reports[0])}]')
  figure.legend(handles=[*entries, *trained], loc='outside lower center', ncols=2)
  figure.savefig(path, dpi=150)


def mark_training(axes: Any, lengths: Iterable[float]) -> list[Any]:
  """Draws a vertical line at each length of training, and returns the lines."""
  return [
    axes.axvline(length, color='grey', linestyle='--', linewidth=1, label=f'trained at {length}')
    for length in sorted(lengths)
  ]


def looks(reports: Sequence[report_lib.Report]) -> list[dict[str, Any]]:
  """Returns the colour, style and marker of each report's lines."""
  from matplotlib import colormaps

  series = list(dict.fromkeys(map(report_lib.series, reports)))
  masks = list(dict.fromkeys(report['mask'] for report in reports))
  # An index of the ten named colours, or a share of a rainbow.
  colors = {
    name: colormaps['tab10'](i) if len(series) <= 10 else colormaps['turbo'](i / len(series))
    for i, name in enumerate(series)
  }
  styles = {
    mask: {'linestyle': _STYLES[i % len(_STYLES)], 'marker': _MARKERS[i % len(_MARKERS)]}
    for i, mask in enumerate(masks)
  }
  return [
    {'color': colors[report_lib.series(report)], **styles[report['mask']]} for report in reports
  ]
