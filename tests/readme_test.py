"""Tests that what the README shows is what was measured; docs_test.py has its links and code."""

import json
import pathlib
import re
import textwrap

import numpy as np
import pytest

from experiments import sweep, sweep_published, sweep_results
from experiments.attention_resolution import run as attention_resolution
from experiments.attention_tpu import run as attention_tpu
from experiments.compile_table import run as compile_table
from experiments.encoding_rate import run as encoding_rate
from experiments.length_generalization import run as length_generalization
from lex_fire import encodings, report

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()
DOCS = ROOT / 'docs'
RESULTS = ROOT / 'experiments' / 'quickstart' / 'fire_rope_same_tokens.json'


def test_the_table_is_the_one_that_was_measured():
  reports = json.loads(RESULTS.read_text())['runs']

  table = report.table(reports)

  for text in (README, (RESULTS.parent / 'README.md').read_text()):
    assert '\n'.join(f'    {line}' for line in table.splitlines()) in text
  assert (
    f'```text\n{table.strip()}\n```' in (DOCS / 'howto' / 'evaluate_a_checkpoint.md').read_text()
  )


def test_the_models_that_ship_have_what_was_measured():
  folder = ROOT / 'experiments' / 'shipped'

  table = report.table(json.loads((folder / 'shipped.json').read_text())['runs'])

  indented = '\n'.join(f'    {line}' for line in table.splitlines())
  assert indented in (folder / 'README.md').read_text()


def test_the_zoo_lists_every_encoding_as_it_was_measured():
  rows = {}
  for line in README.splitlines():
    cells = [cell.strip() for cell in line.split('|')]
    if len(cells) == 9 and cells[1].startswith('`'):
      rows[cells[1].strip('`')] = cells[3:8]

  measured = json.loads((ROOT / 'experiments' / 'zoo' / 'summary.json').read_text())['encodings']
  costs = json.loads((ROOT / 'experiments' / 'zoo' / 'costs.json').read_text())
  assert list(rows) == list(encodings.ENCODINGS) == list(measured) == list(costs)
  for name, (added, shortest, longest, change, cost) in rows.items():
    found = measured[name]
    assert added == f'{found["parameters_added"]:,}'
    assert (added != '0') == encodings.get(name).learned
    assert shortest == f'{found["shortest"]:.3f}'
    assert longest == f'{found["longest"]:.3f}'
    assert change == f'{found["change"]:+.3f}'
    assert cost == f'{costs[name]:.2f}'


def test_the_answers_about_encodings_are_what_was_measured():
  text = (DOCS / 'faq.md').read_text()

  measured = json.loads((ROOT / 'experiments' / 'zoo' / 'summary.json').read_text())['encodings']
  change = {name: f'{found["change"]:.2f}' for name, found in measured.items()}
  assert f"xPos loses {change['xpos']} nats, T5's bias {change['t5']}." in text
  assert f'RoPE loses {change["rope"]}, sinusoids {change["sinusoidal"]}.' in text
  for name in ('fire', 'kerple_log', 'kerple_power', 'sandwich', 'alibi'):
    assert measured[name]['change'] < 0.01
  longest = {name: found['longest'] for name, found in measured.items()}
  assert min(longest, key=lambda name: longest[name]) == 'kerple_power'
  best = f"Kerple's power, not FIRE: {longest['kerple_power']:.2f} nats a byte against"
  assert f'{best} {longest["fire"]:.2f}.' in text


def test_the_table_of_summaries_is_the_one_that_was_measured():
  table = re.search(
    r'```text\n(length .*?)```', (DOCS / 'howto' / 'finetune_on_scrolls.md').read_text(), re.DOTALL
  )

  measured = (ROOT / 'experiments' / 'qmsum' / 'README.md').read_text()
  assert all(f'    {line}\n' in measured for line in table.group(1).splitlines())


def test_the_table_of_compiled_kernels_is_the_one_that_was_measured():
  measured = json.loads((attention_tpu.HERE / 'attention_tpu.json').read_text())

  for line in attention_tpu.table(measured).splitlines():
    assert f'    {line}'.rstrip() in (attention_tpu.HERE / 'README.md').read_text()


def test_resolutions_beside_the_published_ones_are_those_that_were_measured():
  here = attention_resolution.HERE
  (path,) = here.glob('*_laptop.json')

  text = textwrap.indent(attention_resolution.table(json.loads(path.read_text())), '    ')

  assert path.with_suffix('.txt').read_text() == f'{text}\n'
  assert text in (here / 'README.md').read_text()


def test_what_length_generalization_tells_is_what_was_measured():
  readme = (length_generalization.HERE / 'README.md').read_text()
  lines = sweep_results.read(length_generalization.HERE / 'books_laptop.jsonl')

  built_in = sweep_results.read(length_generalization.HERE / 'stdlib_laptop.jsonl')
  for of_corpus in (lines, sweep_results.whole(built_in)):
    assert textwrap.indent(length_generalization.summary(of_corpus), '    ') in readme
  (trained,) = {line['train_length'] for line in lines}
  rows = {mask: sweep_results.rows(lines, 'same_tokens', mask) for mask in sweep.MASKS}
  for mask, made in rows.items():
    losses = {row.variant: row.values for row in made}
    for _, table in (
      sweep_published.changes(losses, trained, mask),
      sweep_published.perplexities(losses, mask),
    ):
      assert table in readme


def test_what_rates_of_learning_tell_is_what_was_measured():
  readme = (encoding_rate.HERE / 'README.md').read_text()

  longer = json.loads((encoding_rate.HERE / 't5_1500.json').read_text())['runs']
  for table in (encoding_rate.summary((1.0, 10.0, 30.0, 100.0)), report.table(longer)):
    assert textwrap.indent(table, '    ') in readme


@pytest.mark.parametrize(
  ('name', 'file', 'shown'),
  [
    ('fire_ablations', 'books_laptop', [sweep_results.LOSS]),
    ('qmsum', 'laptop', [sweep_results.ROUGE, sweep_results.ANSWER_LOSS]),
    ('arithmetic', 'laptop', [sweep_results.ACCURACY]),
    ('arithmetic', 'twenty', [sweep_results.ACCURACY]),
    ('shipped', 'seeds', [sweep_results.LOSS]),
  ],
)
def test_tables_of_sweeps_are_those_that_were_measured(name, file, shown):
  directory = ROOT / 'experiments' / name
  lines = sweep_results.whole(sweep_results.read(directory / f'{file}.jsonl'))
  protocol = lines[0]['protocol']

  for measure in shown:
    table = sweep_results.table(sweep_results.rows(lines, protocol, 'causal', measure))
    assert textwrap.indent(table, '    ') in (directory / 'README.md').read_text()


def prose(experiment):
  """Returns what a README says, in one line."""
  return ' '.join((ROOT / 'experiments' / experiment / 'README.md').read_text().split())


def test_how_much_seeds_move_a_loss_is_what_was_measured():
  lines = sweep_results.read(length_generalization.HERE / 'books_laptop.jsonl')
  rows = sweep_results.rows(lines, 'same_tokens', 'causal')
  stretched = length_generalization.variants(sweep.SCALES['laptop'])['rope'].after

  of = {row.variant: row.deviation(512) for row in rows}
  fire, most = of.pop('fire'), max(of.pop(name) for name in stretched)

  assert (
    f'at 512 is {fire:.3f} for FIRE, whose three happen to agree, {min(of.values()):.3f} to '
    f'{max(of.values()):.3f} for the others that are trained, and up to {most:.3f} for what '
    'stretches RoPE.' in prose('length_generalization')
  )


def test_what_is_said_of_orders_that_seeds_leave_open_is_what_was_measured():
  lines = sweep_results.read(length_generalization.HERE / 'books_laptop.jsonl')
  rows = sweep_results.rows(lines, 'same_tokens', 'causal')
  last = {row.variant: np.array(row.values[16384]) for row in rows}

  over_fire = {name: last[name] - last['fire'] for name in ('kerple_log', 'fire_s')}

  assert 'it is before each of them in two seeds of three' in prose('length_generalization')
  assert all((found > 0).sum() == 2 for found in over_fire.values())
  first, second, third = (f'{found:+.3f}' for found in over_fire['fire_s'])
  assert f'by {first}, {second} and {third} at 16,384' in prose('fire_ablations')


def test_what_a_run_costs_besides_its_steps_is_what_was_measured():
  directory = ROOT / 'experiments' / 'run_overhead'
  found = json.loads((directory / 'run_overhead.json').read_text())
  text, ratios = (directory / 'README.md').read_text(), found['over_bare_loop']['rounds']

  assert f'    {found["quickstart"]}\n' in text
  assert f'took {found["over_bare_loop"]["median"]:.2f} of its time' in text
  assert f'between {min(ratios):.2f} and {max(ratios):.2f}' in text


def test_the_table_of_compiled_steps_is_the_one_that_was_measured():
  results = json.loads((compile_table.HERE / 'compile_table.json').read_text())

  written = compile_table.table(results)

  for name in ('README.md', 'compile_table.md'):
    assert written in (compile_table.HERE / name).read_text()
