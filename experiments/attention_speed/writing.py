"""Writes results: JSON, a plot, and a table into README.md."""

import json
import pathlib
from typing import Any


def write_json(found: dict[str, Any], path: pathlib.Path) -> None:
  """Writes results; a kill leaves those that were there before."""
  unfinished = path.with_suffix('.unfinished')
  unfinished.write_text(json.dumps(found, indent=1) + '\n')
  unfinished.replace(path)


def write(found: dict[str, Any], out: pathlib.Path, show: Any) -> None:
  """Writes JSON and plot, and puts the table in README.md between its platform's marks.

  Args:
    found: the results, of a machine.
    out: where they go.
    show: a module with `table` and `plot`.
  """
  platform = found['machine']['platform']
  write_json(found, out / f'{platform}.json')
  try:
    show.plot(found, out / f'{platform}.png')
  except ImportError as error:
    print(f'no plot: {error}')
  readme, (first, last) = out / 'README.md', (f'<!-- {platform} -->\n', f'<!-- /{platform} -->')
  text = readme.read_text() if readme.exists() else ''
  if first not in text or last not in text:
    print(f'{readme} has no {first.strip()} for the table')
    return
  before, _, rest = text.partition(first)
  after = rest.partition(last)[2]
  lines = (f'    {line}'.rstrip() for line in show.table(found).splitlines())
  readme.write_text(before + first + '\n'.join(('', *lines, '', '')) + last + after)
