"""Tests `../lex_fire/benchmark_plots.py`: where pictures say what runs were trained on."""

import pathlib

import pytest
from matplotlib.figure import Figure

from lex_fire import benchmark_plots


def report(task, run='fire', train_length=512, train_task='stdlib'):
  """Returns the report of a run on one Task: an algorithm, a needle or any other."""
  lengths = (256, 512, 1024)
  score = {'scores': {'accuracy': 50.0}}
  facts = {'passkey': ['length', 'depth'], 'glue_sst2': []}.get(task, ['length'])
  groups = [[score | {'facts': {name: n for name in facts}}] if facts else [] for n in lengths]
  entries = zip(lengths, groups, strict=True)
  if facts == ['length']:
    entries = [(None, sum(groups, []))]
  tasks = [score | {'task': task, 'length': length, 'by': by} for length, by in entries]
  return {
    'run': run,
    'mask': 'causal',
    'train_length': train_length,
    'train_task': train_task,
    'tasks': tasks,
  }


@pytest.fixture
def drawn(monkeypatch):
  """Draws, and returns for each of the axes its vertical lines, {where: label}."""
  figures = []
  monkeypatch.setattr(Figure, 'savefig', lambda figure, path, **unused: figures.append(figure))

  def draw(*reports):
    benchmark_plots.draw(reports, reports[0]['tasks'][0]['task'], pathlib.Path('none.png'))
    return [
      {x[0]: line.get_label() for line in axes.lines if (x := line.get_xdata())[0] == x[-1]}
      for axes in figures[-1].axes
    ]

  return draw


def test_curves_by_tokens_have_a_line_at_each_length_of_training(drawn):
  (lines,) = drawn(report('glue_sst2'), report('glue_sst2', 'rope', 2048), report('glue_sst2', 'x'))

  assert lines == {512: 'trained at 512', 2048: 'trained at 2048'}


def test_curves_by_symbols_have_a_line_at_the_length_of_a_run_s_own_task(drawn):
  (own,) = drawn(report('copy:length=9', train_task='copy:hints=true,length=20'))
  (by_default,) = drawn(report('copy', train_task='copy'))
  (other,) = drawn(report('copy', train_task='sort:length=20'))

  assert own == by_default == {20: 'trained at 20'}
  assert other == {}


@pytest.mark.parametrize(
  'train_length, between', [(512, [1.5]), (700, [1.5]), (256, [0.5]), (100, []), (1024, [])]
)
def test_heat_maps_have_a_line_after_the_last_length_that_training_had(
  train_length, between, drawn
):
  lines, _ = drawn(report('passkey', train_length=train_length))  # and the bar of colours

  assert list(lines) == between


def test_a_table_tells_of_answers_that_are_all_the_same():
  reports = [report('glue_sst2'), report('glue_sst2', 'rope')]
  for of_run, counts in zip(reports, ([2, 1, 1], [1, 2, 100]), strict=True):
    for entry, questions, count in zip(of_run['tasks'], (100, 1, 100), counts, strict=True):
      entry |= {'questions': questions, 'questions_cut': 0, 'distinct_answers': count}

  lines = benchmark_plots.table(reports).splitlines()

  assert [line for line in lines if 'answers' in line] == [
    'fire: all 100 answers to glue_sst2 at 1024 are the same',
    'rope: all 100 answers to glue_sst2 at 256 are the same',
  ]
