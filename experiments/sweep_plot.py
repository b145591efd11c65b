"""Plots of sweeps: a curve a variant by length, and below, enlarged, those near the best.

One variant that collapses sets the scale of a plot, and all that hold are then one line. So there
is a second row with a scale of its own, and each curve has its name where it ends.
"""

import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lex_fire import plot

_BARS = 8  # beside each other: error bars of curves that are nearly one are drawn apart
_LABEL = 0.15  # height of a label [inches]
_LEADER = {'arrowstyle': '-', 'linewidth': 0.7, 'relpos': (0.0, 0.5)}  # to the middle of its left
_FIRE = ('fire', 'as it is')  # what a sweep calls it; drawn thick


class Curve(NamedTuple):
  """What a variant does at each length.

  Attributes:
    name: of the variant.
    means: {length: mean over seeds}.
    deviations: {length: standard deviation over seeds}, NaN of one seed.
  """

  name: str
  means: Mapping[int, float]
  deviations: Mapping[int, float]

  @property
  def last(self) -> int:
    """The longest length."""
    return max(self.means)

  @property
  def end(self) -> float:
    """The mean at the longest length."""
    return self.means[self.last]

  @property
  def height(self) -> tuple[float, float]:
    """Where it ends and, of those that end at one place, how high it comes there."""
    return self.end, _mean(list(self.means.values()))


Panels = Mapping[str, Sequence[Curve]]  # by title, of a column each


def draw(
  panels: Panels,
  path: pathlib.Path,
  *,
  title: str,
  x_label: str,
  y_label: str,
  trained: Iterable[int],
  decimals: int,
  near: float,
) -> None:
  """Draws curves by length, a column a panel.

  Args:
    panels: of the same variants.
    path: of the picture.
    title: of all.
    x_label: of the lengths, with their unit.
    y_label: of what is drawn, with its unit.
    trained: lengths of training, each marked by a vertical line.
    decimals: of the number beside a name.
    near: how far from the least end a curve may end to be enlarged in the second row; there is
      none if all are within twice that. Infinite: never a second row.
  """
  from matplotlib.figure import Figure

  frame = enlarged(panels, near)
  heights = [4.4] if frame is None else [3.7, 5.3]  # of the rows [inches]
  figure = Figure(figsize=(6.2 * len(panels), sum(heights) + 0.9), layout='constrained')
  rows = figure.subplots(
    len(heights), len(panels), sharex=True, sharey='row', squeeze=False, height_ratios=heights
  )
  ranks = {curve.name: rank for rank, curve in enumerate(next(iter(panels.values())))}
  for axes, (name, curves) in zip(rows[0], panels.items(), strict=True):
    axes.set_title(name)
    _draw_curves(axes, curves, ranks)
  for axes, curves in zip(rows[0], panels.values(), strict=True):
    named = curves if frame is None else [one for one in curves if not _ends_in(one, frame)]
    _name_ends(axes, named, ranks, heights[0], decimals)
    marks = plot.mark_training(axes, set(trained))
    if frame is not None:
      marks.append(axes.axhspan(*frame, color='grey', alpha=0.2, lw=0, label='enlarged below'))
  if frame is not None:
    rows[1][0].set_ylim(*frame)
    for axes, curves in zip(rows[1], panels.values(), strict=True):
      _draw_curves(axes, [one for one in curves if _enters(one, frame)], ranks)
      ending = [one for one in curves if _ends_in(one, frame)]
      _name_ends(axes, ending, ranks, heights[1], decimals)
      plot.mark_training(axes, set(trained))
  for row in rows:
    row[0].set_ylabel(y_label)
  for axes in rows[-1]:
    axes.set_xlabel(x_label)
  figure.suptitle(title, fontsize=11)
  figure.legend(handles=marks, loc='outside lower center', ncols=len(marks))
  figure.savefig(path, dpi=110, bbox_inches='tight')  # names of ends may reach past the edge


def enlarged(panels: Panels, near: float) -> tuple[float, float] | None:
  """Returns the limits of the second row, or None if the first shows enough.

  They hold the curves that end near the least, with their deviations.
  """
  every = [curve for curves in panels.values() for curve in curves]
  best = min(curve.end for curve in every)
  if max(curve.end for curve in every) <= best + 2 * near:
    return None
  held = [
    mean + sign * (0.0 if math.isnan(curve.deviations[length]) else curve.deviations[length])
    for curve in every
    if curve.end <= best + near
    for length, mean in curve.means.items()
    for sign in (-1, 1)
  ]
  margin = 0.03 * (max(held) - min(held))
  return min(held) - margin, max(held) + margin


def apart(heights: Sequence[float], gap: float) -> list[float]:
  """Returns rising heights moved apart to at least a gap, in all (of squares) as little as can be.

  >>> apart([1.0, 1.0, 5.0], 2.0)
  [0.0, 2.0, 5.0]
  """
  groups: list[list[float]] = []  # whose members stand a gap apart, by their heights less that
  for at, height in enumerate(heights):
    groups.append([height - at * gap])
    while len(groups) > 1 and _mean(groups[-2]) >= _mean(groups[-1]):
      groups[-2:] = [groups[-2] + groups[-1]]
  levels = [_mean(group) for group in groups for _ in group]
  return [level + at * gap for at, level in enumerate(levels)]


def _mean(values: Sequence[float]) -> float:
  return math.fsum(values) / len(values)


def _ends_in(curve: Curve, frame: tuple[float, float]) -> bool:
  return frame[0] <= curve.end <= frame[1]


def _enters(curve: Curve, frame: tuple[float, float]) -> bool:
  """Whether more of a curve than its bars is to be seen there."""
  return min(curve.means.values()) < frame[1] - 0.02 * (frame[1] - frame[0])


def _look(rank: int) -> dict[str, Any]:
  """Returns colour and style of the curve of a rank: of those that are near each other unlike."""
  from matplotlib import colormaps

  return {
    'color': colormaps['tab10'](rank % 10),
    'linestyle': '-' if rank < 10 else '--',
    'marker': 'osD^vP'[rank % 6],
  }


def _draw_curves(axes: Any, curves: Sequence[Curve], ranks: Mapping[str, int]) -> None:
  """Draws curves on an axis of octaves, those with deviations each a little beside the next."""
  lengths = sorted(curves[0].means)
  for curve in curves:
    barred = not all(map(math.isnan, curve.deviations.values()))
    beside = 2 ** (barred * 0.3 * ((ranks[curve.name] % _BARS) / (_BARS - 1) - 0.5))
    axes.errorbar(
      [length * beside for length in lengths],
      [curve.means[length] for length in lengths],
      yerr=[curve.deviations[length] for length in lengths],
      linewidth=2.6 if curve.name in _FIRE else 1.3,
      elinewidth=1,
      markersize=4.5,
      capsize=2.5,
      **_look(ranks[curve.name]),
    )
  axes.set_xscale('log', base=2)
  axes.grid(alpha=0.3)
  axes.set_xticks(lengths, [f'{length:,}' for length in lengths])


def _name_ends(
  axes: Any, curves: Sequence[Curve], ranks: Mapping[str, int], height: float, decimals: int
) -> None:
  """Writes the name and the end of each curve to the right of it, legibly apart."""
  low, high = axes.get_ylim()
  rising = sorted(curves, key=lambda curve: curve.height)
  places = apart([curve.end for curve in rising], _LABEL * (high - low) / height)
  for curve, place in zip(rising, places, strict=True):
    color = _look(ranks[curve.name])['color']
    axes.annotate(
      f'{curve.name} {curve.end:.{decimals}f}',
      xy=(curve.last * 2**0.2, curve.end),
      xytext=(curve.last * 2**0.75, place),
      arrowprops={**_LEADER, 'color': color},
      color=color,
      fontsize=9,
      fontweight='bold' if curve.name in _FIRE else 'normal',
      verticalalignment='center',
      annotation_clip=False,
    )
