"""Tests `../experiments/attention_speed/gpu.py`: what fails, hangs or has no time ends alone."""

import functools
import json
import os
import subprocess
import sys
import time

import pytest

from experiments.attention_speed import alone, apart, gpu, gpu_plan, gpu_results, gpu_training
from lex_fire import errors

TINY = gpu_plan.Sizes(
  kernel='chunked',
  rival='reference',
  lengths=(32, 64),
  ragged=36,
  turns=1e-6,
  runs=(('tiny', 32, 1, 2, 5.0), ('tiny', 32, 2, 3, 5.0)),
  model={'dtype': 'float32'},
)
FINE = functools.partial(dict, number=1)
WRONG = functools.partial(int, 'seven')
DEAD = functools.partial(os._exit, 3)
HANGS = functools.partial(time.sleep, 100)


def figure(name, measure, expected=0.0, of='kernel', stage='stage'):
  return gpu_plan.Figure(stage, name, of, expected, measure)


def measured(figures, found=None, seconds=100.0):
  found = found or {'figures': {}, 'not_reached': []}
  saved = []
  gpu.measure(figures, found, seconds, lambda: saved.append(json.dumps(found)))
  return found, saved


def test_an_error_and_the_end_of_a_process_are_told_and_the_others_go_on():
  names = 'first', 'wrong', 'dead', 'last'
  figures = list(map(figure, names, (FINE, WRONG, DEAD, FINE)))

  found, saved = measured(figures)

  rows = found['figures']
  assert rows['first']['number'] == rows['last']['number'] == 1
  assert rows['wrong']['reason'].startswith('ValueError: invalid literal')
  assert 'ended with 3' in rows['dead']['reason']
  assert (len(saved), found['not_reached']) == (4, [])
  assert json.loads(saved[1])['not_reached'] == ['dead', 'last']  # what a kill would leave


def test_what_hangs_is_given_up_and_after_twice_not_tried_again(monkeypatch):
  monkeypatch.setattr(gpu_plan.Figure, 'limit', 1.5)
  figures = [figure(name, HANGS) for name in ('one', 'two', 'three')]

  found, _ = measured([*figures, figure('other', FINE, of='rival')])

  rows = found['figures']
  assert rows['one']['reason'] == rows['two']['reason'] == 'no end within 2 s'
  assert rows['three']['reason'] == 'not tried, as kernel had no end 2 times'
  assert rows['other']['number'] == 1


def test_the_time_ends_a_figure_and_the_next_call_goes_on_there_and_with_what_failed_last():
  figures = [
    figure('wrong', WRONG),
    figure('too long', FINE, expected=1e6),
    figure('cut', HANGS),
    figure('later', FINE),
  ]
  start = time.monotonic()

  found, _ = measured(figures, seconds=8.0)

  assert time.monotonic() - start < 20
  assert set(found['figures']) == {'wrong'}
  assert found['not_reached'] == ['too long', 'cut', 'later']

  found, saved = measured([one._replace(measure=FINE) for one in figures], found, seconds=1e7)

  assert list(found['figures']) == ['wrong', 'too long', 'cut', 'later']
  assert all(row['number'] == 1 for row in found['figures'].values())
  assert 'number' not in json.loads(saved[2])['figures']['wrong']
  assert measured(figures, found)[1] == []  # nothing is left


def test_the_plan_has_the_most_important_first_and_fits_its_time():
  figures = list(gpu_plan.plan(gpu_plan.H200, 'python'))

  stages = list(dict.fromkeys(one.stage for one in figures))
  assert stages == ['correctness', 'attention', 'PyTorch', 'encodings', 'training']
  assert len({one.name for one in figures}) == len(figures)
  assert sum(one.expected for one in figures) <= 480
  assert all(
    check.length % 128 for check in gpu_plan.checks(gpu_plan.H200).values() if not check.queries
  )
  sizes = {one.measure.args[0][:2] for one in figures if one.stage == 'training'}
  assert sizes == {('large', 131072)} | {(n, k) for n in ('base', 'large') for k in (2048, 32768)}


def call(monkeypatch, out, *flags):
  monkeypatch.setattr(sys, 'argv', ['gpu', f'--out={out}', *flags])
  gpu.main(TINY, 'cpu')


def test_the_command_measures_on_any_platform_and_shows_it(monkeypatch, tmp_path, capsys):
  wanted = {
    'nope, packed',
    'fire, 64 tokens, their last 128 queries',
    'attention, forward, 32',
    'tiny, 2 x 32 tokens, chunked',
  }
  plan = gpu_plan.plan
  monkeypatch.setattr(gpu_plan, 'plan', lambda *a: (f for f in plan(*a) if f.name in wanted))
  (tmp_path / 'README.md').write_text('<!-- cpu -->\nnot yet\n<!-- /cpu -->\n')

  call(monkeypatch, tmp_path)

  found = json.loads((tmp_path / 'cpu.json').read_text())
  assert {'device', 'threads', 'python', 'jax', 'torch', 'commit'} <= set(found['machine'])
  assert set(found['figures']) == wanted
  (check,) = (row for name, row in gpu_results.rows(found, 'correctness') if 'packed' in name)
  assert gpu_results.is_correct(check)
  (training,) = (row for _, row in gpu_results.rows(found, 'training'))
  assert gpu_results.learns(training) and training['tokens_per_second'] > 0
  table, readme = capsys.readouterr().out, (tmp_path / 'README.md').read_text()
  assert 'ETA' in table
  for shown in (table, readme):
    assert 'chunked, nope, packed' in shown
    assert "No module named 'tokamax'" in shown
    assert 'failed: fire, 64 tokens' in shown  # which has fewer than 128
  assert (tmp_path / 'cpu.png').stat().st_size > 10_000

  (tmp_path / 'README.md').write_text('<!-- cpu -->\n<!-- /cpu -->\n')
  call(monkeypatch, tmp_path, '--seconds=0')

  assert (tmp_path / 'README.md').read_text() == readme


def test_results_of_another_machine_are_not_added_to(monkeypatch, tmp_path):
  here = {'platform': 'cpu', 'device': 'this', 'jax': '1'}
  monkeypatch.setattr(apart, 'in_own_process', lambda _: here)
  found = {'machine': {**here, 'device': 'that'}, 'figures': {}, 'not_reached': []}
  (tmp_path / 'cpu.json').write_text(json.dumps(found))

  with pytest.raises(errors.UserError, match="is of device='that', not 'this'.*--out"):
    call(monkeypatch, tmp_path)


def test_without_its_platform_or_results_it_says_so(monkeypatch, tmp_path):
  monkeypatch.setattr(apart, 'in_own_process', lambda _: {'platform': 'tpu'})

  with pytest.raises(errors.UserError, match="for platform='cpu', but JAX finds 'tpu'.*seconds=0"):
    call(monkeypatch, tmp_path)
  with pytest.raises(errors.UserError, match='cpu.json is not there.*--seconds'):
    call(monkeypatch, tmp_path, '--seconds=0')


def times(length, **seconds):
  names = {'nope': 'mosaic_gpu', 'fire': 'mosaic_gpu', 'cudnn': 'jax.nn', 'flex': 'torch.flex'}
  encodings = {'nope': 'nope', 'fire': 'fire', 'cudnn': 'nope', 'flex': 'fire'}
  case = {'length': length, 'backward': True, 'dtype': 'bfloat16'}
  return [
    {**case, 'implementation': names[n], 'encoding': encodings[n], 'seconds': [s, s]}
    for n, s in seconds.items()
  ]


def test_the_table_holds_figures_to_their_targets():
  trained = {'losses': [9.0, float('nan')], 'a_step': 2.0, 'tokens_per_second': 16384.0}
  trained |= gpu_training.Run('large', 32768, 1, 'mosaic_gpu', 2)._asdict()
  trained |= {'implementation': 'mosaic_gpu', 'utilization': 0.4, 'bytes': {'total': 2**34}}
  errors_found = dict.fromkeys(gpu_results.MOST_ERROR, 0.001)
  check = {'stage': 'correctness', 'implementation': 'mosaic_gpu', 'errors': errors_found}
  absent = {'absent': [], 'torch': None}
  figures = {
    'good': {**check, 'same_bits': True},
    'racing': {**check, 'same_bits': False},
    'wrong': {**check, 'same_bits': True, 'errors': {**errors_found, 'key': float('nan')}},
    'a': {'stage': 'attention', 'times': times(8192, nope=1.0, fire=1.2, cudnn=0.8), **absent},
    'b': {'stage': 'PyTorch', 'times': times(8192, fire=1.0, flex=6.0), **absent},
    'c': {'stage': 'encodings', 'reason': 'XlaRuntimeError: no memory'},
    'd': {'stage': 'training', **trained},
  }
  machine = {'platform': 'gpu'}
  found = {'machine': machine, 'implementations': ['mosaic_gpu'], 'not_reached': ['e']}

  lines = gpu_results.table({**found, 'figures': figures}).splitlines()

  ends = {name: line for line in lines for name in figures if f'mosaic_gpu, {name} ' in line}
  assert ends['good'].endswith('met')
  assert ends['racing'].endswith('no  missed') and ends['wrong'].endswith('missed')
  targets = [line.split() for line in lines if 'mosaic_gpu' in line and ' over ' in line]
  assert [line[-4:] for line in targets] == [
    ['1.20', '1.20', '1.15', 'missed'],
    ['1.25', '1.25', '1.43', 'met'],
    ['0.17', '0.17', '0.20', 'met'],
  ]
  (training,) = (line for line in lines if line.startswith('large'))
  assert '16384' in training and '40.0%' in training and training.endswith('no learning')
  assert 'failed: c: XlaRuntimeError: no memory' in lines and 'not reached: e' in lines


def test_it_runs_where_jax_and_its_libraries_are():
  """Images for accelerators have neither TensorFlow nor ml_collections, and some no matplotlib."""
  missing = 'ml_collections', 'tensorflow', 'seqio', 'grain', 'clu', 'torch', 'matplotlib'
  script = (
    'import sys\n'
    f'for name in {missing}: sys.modules[name] = None\n'
    'import experiments.attention_speed.gpu, lex_fire.compile, lex_fire.presets\n'
  )

  root = gpu.HERE.parents[1]
  subprocess.run([sys.executable, '-c', script], cwd=root, check=True)


def test_a_machine_says_what_it_is():
  assert {'platform', 'device', 'jax', 'commit'} <= set(alone.machine())
