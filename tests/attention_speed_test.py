"""Tests `../experiments/attention_speed`: what it shows is what it measured."""

import json
import pathlib
import re
import subprocess
import sys
import types

import pytest
from absl import flags

from experiments.attention_speed import alone, apart, gpu_results, programs, results, run, writing
from lex_fire import encodings, errors, kernels

HERE = pathlib.Path(run.__file__).parent
ROOT = pathlib.Path(__file__).parents[1]
MEASURED = sorted(HERE.glob('*.json'))
AGAIN = 'cpu_again'  # the targets alone


def row(implementation, encoding, seconds, length=2048, backward=True):
  return {
    'implementation': implementation,
    'encoding': encoding,
    'length': length,
    'backward': backward,
    'seconds': seconds,
  }


def found(times, platform='cpu', process_bytes=2e9, absent=()):
  memory = {'temporary_bytes': 5e8, 'process_bytes': process_bytes, 'device_bytes': None}
  return {
    'machine': {'platform': platform},
    'implementations': ['reference', 'chunked', 'other'],
    'times': times,
    'alone': [{**row('auto', 'fire', 100.0, length=32768), **memory}],
    'absent': list(absent),
  }


@pytest.mark.parametrize('name', encodings.ENCODINGS)
def test_every_encoding_can_be_timed_by_its_name(name):
  assert programs.encoding_of(name).name == encodings.get(name).name


@pytest.mark.parametrize('path', MEASURED, ids=lambda path: path.name)
def test_the_readme_shows_what_was_measured(path):
  found = json.loads(path.read_text())
  if path.stem == AGAIN:
    lines = results.of_targets(results.verdicts(found))
  else:
    lines = (gpu_results if path.stem == 'gpu' else results).table(found).splitlines()
    assert path.with_suffix('.png').exists()

  shown = '\n'.join(f'    {line}'.rstrip() for line in lines)
  assert shown in (HERE / 'README.md').read_text()


@pytest.mark.parametrize('path', MEASURED, ids=lambda path: path.name)
def test_a_result_says_on_what_it_was_measured(path):
  machine = json.loads(path.read_text())['machine']

  assert {'device', 'threads', 'python', 'jax', 'torch', 'commit'} <= set(machine)


def test_what_is_not_measured_gives_attention_what_one_that_is_measured_does():
  fields = 'rotate', 'log_decay', 'bias', 'table', 'coordinate', 'factors', 'waves'

  def given(name):
    encoding = programs.encoding_of(name)
    # A bias is that of the file that has it.
    own = encoding.table and encoding.table.__module__
    return own, [getattr(encoding, field) is not None for field in fields]

  measured = [given(name) for name in run.ENCODINGS]

  assert all(given(name) in measured for name in run.ALIKE)


def test_a_ratio_is_of_least_times_and_the_median_of_rounds():
  assert results.ratio([3.0, 2.0, 9.0], [1.0, 2.0, 3.0]) == (2.0, 3.0)


def test_a_target_is_met_by_the_implementation_that_is_fastest_under_fire():
  times = [
    row('reference', 'fire', [0.1, 0.1]),  # dense: never ours
    row('chunked', 'nope', [1.0, 1.0]),
    row('chunked', 'fire', [1.2, 1.4]),
    row('other', 'nope', [1.0, 1.0]),
    row('other', 'fire', [1.5, 1.4]),
  ]

  over_nope, over_dense, memory = results.verdicts(found(times))

  assert over_nope['what'] == 'chunked fire over chunked nope, forward and backward'
  assert (over_nope['found'], over_nope['met']) == (1.2, True)
  assert over_nope['median'] == pytest.approx(1.3)
  assert (over_dense['found'], over_dense['met']) == (pytest.approx(12.0), False)
  assert (memory['found'], memory['met']) == (2.0, True)


def test_a_library_kernel_is_compared_with_the_better_of_two():
  times = [
    row('other', 'nope', [3.0], length=8192),
    row('other', 'fire', [3.3], length=8192),
    row('jax.nn', 'nope', [2.5], length=8192),
    row('tokamax', 'nope', [2.0], length=8192),
  ]

  verdicts = results.verdicts(found(times, platform='gpu'))

  against_libraries = verdicts[1]
  assert against_libraries['what'].startswith('other nope over tokamax nope')
  assert (against_libraries['found'], against_libraries['met']) == (1.5, False)


def test_a_process_over_its_memory_misses_the_target():
  (memory,) = results.verdicts(found([], process_bytes=3.5e9))

  assert not memory['met']


def test_the_table_has_a_reason_for_what_could_not_run():
  times = [row('chunked', 'nope', [0.5]), row('chunked', 'fire', [0.6])]
  absent = [
    {**row('flex', 'nope', None, backward=backward), 'reason': 'no such thing'}
    for backward in (True, False)
  ]

  lines = results.table(found(times, absent=absent)).splitlines()

  assert [line.split() for line in lines if line.startswith('chunked fire')][0] == (
    ['chunked', 'fire', '600', '1.20', '1.20']
  )
  assert 'not here: flex, forward and backward or forward: no such thing' in lines


def test_beyond_2048_tokens_nothing_dense_is_timed():
  few, many = (run.wanted(['nope', 'fire', 'rope'], length) for length in (2048, 2049))

  assert {('reference', 'fire'), ('torch.sdpa', 'fire'), ('torch.flex', 'fire')} <= set(few)
  assert ('reference', 'rope') not in few
  assert ('chunked', 'rope') in many and ('torch.flex', 'fire') in many
  dense = {('reference', 'nope'), ('jax.nn', 'nope'), ('jax.nn', 'fire'), ('torch.sdpa', 'fire')}
  dense |= {('tokamax', 'nope'), ('tokamax', 'fire')}  # on a CPU
  assert not dense & set(many)


def test_programs_that_cannot_run_are_named_and_the_others_take_turns(monkeypatch):
  monkeypatch.setattr(programs, 'LEAST_TURN', 1e-6)
  case = programs.Case(32, True, 'float32')
  pairs = [('chunked', 'nope'), ('chunked', 'fire'), ('jax.nn', 'fire'), ('tokamax', 'nope')]
  pairs += [('tokamax', 'fire'), ('torch.sdpa', 'nope')]

  made, absent = run.compiled(pairs, case, programs.NoTorch('not at home').make)
  rows = run.take_turns(made, budget=1e-9)

  names = {(gone['implementation'], gone['encoding']) for gone in absent}
  assert ('torch.sdpa', 'nope') in names and ('tokamax', 'fire') not in names
  assert absent[-1]['reason'] == 'UserError: not at home'
  assert [len(taken['seconds']) for taken in rows] == [run.ROUNDS[0]] * len(made)
  assert all(second > 0 for taken in rows for second in taken['seconds'])


def test_a_pass_says_its_memory():
  case = programs.Case(32, True, 'float32')

  measured = alone.measure('chunked', 'fire', case)

  assert measured['seconds'] > 0
  assert 0 < measured['temporary_bytes'] < measured['process_bytes']


def test_the_table_goes_between_its_marks(tmp_path):
  (tmp_path / 'README.md').write_text('above\n<!-- cpu -->\nold\n<!-- /cpu -->\nbelow\n')
  measured = found([row('chunked', 'nope', [0.5]), row('chunked', 'fire', [0.6])])

  writing.write(measured, tmp_path, results)

  text = (tmp_path / 'README.md').read_text()
  assert re.fullmatch(r'above\n<!-- cpu -->\n\n    .*\n\n<!-- /cpu -->\nbelow\n', text, re.DOTALL)
  assert 'old' not in text and '    chunked fire' in text
  assert json.loads((tmp_path / 'cpu.json').read_text()) == measured
  assert (tmp_path / 'cpu.png').stat().st_size > 10_000


def test_without_torch_its_programs_are_absent(tmp_path):
  (tmp_path / 'torch.py').write_text('raise ImportError("nothing here")')
  python = tmp_path / 'python'
  python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
  python.chmod(0o755)

  for program, message in {
    str(python): 'has no torch .*nothing here.*torch_python',
    '/none': 'none',
  }.items():
    torch = programs.start_torch(program, threads=2)
    assert torch.about is None
    with pytest.raises(errors.UserError, match=message):
      torch.make('torch.sdpa', 'nope', programs.Case(32, True, 'float32'))
    torch.close()


def test_a_gpu_has_a_command_of_its_own(monkeypatch):
  monkeypatch.setattr(sys, 'argv', ['run'])
  monkeypatch.setattr(apart, 'in_own_process', lambda _: {'platform': 'gpu'})

  with pytest.raises(errors.UserError, match="platform='gpu'.*attention_speed.gpu"):
    run.main()


def test_torch_that_gives_no_answer_in_time_is_ended_and_not_asked_for_that_again(tmp_path):
  python = tmp_path / 'python'
  python.write_text("#!/bin/sh\necho '{}'\nread request\nexec sleep 100\n")
  python.chmod(0o755)
  torch = programs.start_torch(str(python), threads=2, limit=1.0)
  case = programs.Case(32, True, 'float32')

  with pytest.raises(TimeoutError, match='no answer within 1 s'):
    torch.make('torch.flex', 'fire', case)
  with pytest.raises(TimeoutError, match='too slow'):
    torch.make('torch.flex', 'fire', case._replace(length=64))
  with pytest.raises(TimeoutError, match='no answer'):  # of a new process
    torch.make('torch.flex', 'nope', case)


def test_of_torch_a_pass_that_takes_a_tenth_of_the_limit_is_told_and_has_no_turns(tmp_path):
  python = tmp_path / 'python'
  python.write_text("#!/bin/sh\necho '{}'\nread request\necho '{\"seconds\": 7.5}'\nread on\n")
  python.chmod(0o755)
  torch = programs.start_torch(str(python), threads=2, limit=60.0)

  with pytest.raises(TimeoutError, match=r'a pass takes 7\.5 s'):
    torch.make('torch.flex', 'fire', programs.Case(32, True, 'float32'))
  torch.close()


def test_it_runs_where_only_jax_is():
  """Images for accelerators have neither TensorFlow nor absl nor ml_collections."""
  script = (
    'import sys\n'
    "for name in ('absl', 'ml_collections', 'tensorflow', 'seqio', 'flax', 'torch', 'clu'):\n"
    '  sys.modules[name] = None\n'
    'import experiments.attention_speed.run\n'
  )

  subprocess.run([sys.executable, '-c', script], cwd=ROOT, check=True)


def test_a_library_with_flags_of_its_own_runs_beside_those_of_the_command(monkeypatch):
  """Tokamax would parse the command's, which has none of its, and fail."""
  theirs = flags.FlagValues()
  flags.DEFINE_bool('tuned', True, 'for tests', flag_values=theirs)
  monkeypatch.setattr(flags, 'FLAGS', theirs)
  library = types.ModuleType('tokamax')
  library.dot_product_attention = lambda query, key, value, **_: value * theirs.tuned
  monkeypatch.setitem(sys.modules, 'tokamax', library)

  assert programs.make('tokamax', 'nope', programs.Case(32, False, 'float32'))() > 0


def test_the_kernels_of_the_registry_are_all_tried():
  pairs = run.wanted(['nope'], 4096)

  tried = {implementation for implementation, _ in pairs}
  assert tried >= set(kernels.IMPLEMENTATIONS) - {results.DENSE}
