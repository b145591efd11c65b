"""Tests that what the README shows is what was measured, and that its Python runs."""

import json
import pathlib
import re

from lex_fire import encodings, report

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()
RESULTS = ROOT / 'experiments' / 'quickstart' / 'fire_rope_same_tokens.json'


def test_the_table_is_the_one_that_was_measured():
  reports = json.loads(RESULTS.read_text())['runs']

  table = report.table(reports)

  for text in (README, (RESULTS.parent / 'README.md').read_text()):
    assert '\n'.join(f'    {line}' for line in table.splitlines()) in text


def test_the_zoo_lists_every_encoding_with_its_laws():
  rows = {}
  for line in README.splitlines():
    cells = [cell.strip() for cell in line.split('|')]
    if len(cells) == 7 and cells[1].startswith('`'):
      rows[cells[1].strip('`')] = cells[3:6]

  assert list(rows) == list(encodings.ENCODINGS)
  for name, (learned, shifts, any_length) in rows.items():
    encoding = encodings.get(name)
    assert learned == ('yes' if encoding.learned else 'no')
    assert shifts == ('no' if encoding.shift_invariant else 'yes')
    assert any_length.startswith('yes' if encoding.max_length is None else 'no')


def test_the_python_of_the_readme_runs():
  blocks = re.findall(r'```python\n(.*?)```', README, re.DOTALL)

  assert blocks
  for block in blocks:
    exec(compile(block, 'README.md', 'exec'), {})


def test_the_files_that_the_readme_points_to_exist():
  for target in re.findall(r'\]\((?!http)([^)]+)\)', README):
    assert (ROOT / target).exists(), target
