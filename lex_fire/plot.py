"""Plots, drawn without a display."""

import pathlib
from collections.abc import Sequence
from typing import Any


def lengths(reports: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
  """Draws reports of `evaluate`.

  Loss by length with standard errors, and by position in the longest windows.
  """
  from matplotlib.figure import Figure
  from matplotlib.ticker import FuncFormatter

  figure = Figure(figsize=(10, 4), layout='constrained')
  by_length, by_position = figure.subplots(1, 2, sharey=True)
  for report in reports:
    rows = report['lengths']
    by_length.errorbar(
      [row['length'] for row in rows],
      [row['nats_per_token'] for row in rows],
      yerr=[row['standard_error'] or 0.0 for row in rows],
      marker='o',
      capsize=3,
      label=report['run'],
    )
    by_position.plot(
      [row['to'] for row in report['positions']],
      [row['nats_per_token'] for row in report['positions']],
      marker='o',
      label=report['run'],
    )
  longest = max(row['length'] for report in reports for row in report['lengths'])
  titles = {
    by_length: (f'Loss by window length ({reports[0]["protocol"]})', 'window length [tokens]'),
    by_position: (f'Loss by position in windows of {longest}', 'position, up to [tokens]'),
  }
  for axes, (title, label) in titles.items():
    axes.set_xscale('log', base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
    for train_length in sorted({report['train_length'] for report in reports}):
      axes.axvline(
        train_length, color='grey', linestyle='--', linewidth=1, label=f'trained at {train_length}'
      )
    axes.set(title=title, xlabel=label)
    axes.grid(alpha=0.3)
  by_length.set_ylabel('loss [nats per token]')
  by_length.legend(loc='upper left')
  figure.savefig(path, dpi=150)
