"""Tests `../lex_fire/analyze.py` and `analysis_plots.py`: reports of runs and of encodings."""

import contextlib
import dataclasses
import json
import operator
import re

import jax
import numpy as np
import pytest
import tiny

from lex_fire import analysis, analyze, checkpoint, comparison, documents, errors, sharding, train
from lex_fire import config as config_lib

LENGTHS, MASKS = (32, 64), ('causal', 'blockwise')
TOKENS = 192  # a window of 64 of each of the corpus's documents


NUM_LAYERS = 2


@pytest.fixture(scope='module')
def data(corpus):
  return corpus


@pytest.fixture(scope='module')
def workdirs(data, tmp_path_factory):
  """Returns a run of FIRE and one of RoPE, whose checkpoints are what training begins with."""
  root = tmp_path_factory.mktemp('runs')
  for name in ('fire', 'rope'):
    config = tiny.config(data, name, model={'num_layers': NUM_LAYERS, 'scan_layers': True})
    checkpoint.claim_workdir(root / name, config)
    with contextlib.closing(checkpoint.Checkpoints(root / name)) as checkpoints:
      checkpoints.save(3, train.Program(config, sharding.make_mesh()).init(), 5.0)
  return [root / 'fire', root / 'rope']


def request(lengths=LENGTHS, masks=MASKS):
  return config_lib.EvaluateConfig(lengths, 'same_tokens', TOKENS, masks)


@pytest.fixture(scope='module')
def of_fire(workdirs):
  """Returns the curves and reports of the run of FIRE, and what progress was told."""
  told = []
  curves, reports = analyze.analyze(
    workdirs[0], request(), (10, 63), lambda case, *numbers: told.append((case, *numbers))
  )
  return curves, reports, told


@pytest.fixture(scope='module')
def drawn():
  """Returns the curves of encodings from no run, by name."""
  names = ('sinusoidal', 'xpos', 'alibi', 'fire')
  return {name: analyze.of_encoding(name, 'tiny', (64, 128)) for name in names}


@pytest.fixture(scope='module')
def restored(workdirs):
  """Returns the parameters of the run of FIRE, and what is analyzed of it."""
  config = dataclasses.replace(checkpoint.read_config(workdirs[0]), evaluate=request())
  _, params = comparison.restore(config, workdirs[0], sharding.make_mesh())
  return params, comparison.cases(config), documents.windows(config)


def test_a_report_has_what_the_heads_do_at_each_length(of_fire, restored):
  params, (case, _), windows = restored
  _, (causal, _), _ = of_fire

  assert [row['length'] for row in causal['lengths']] == list(LENGTHS)
  for row in causal['lengths']:
    tokens_WL = windows[row['length']].inputs_WL
    with jax.set_mesh(sharding.make_mesh()):
      statistics = analysis.measure(case.transformer, params, tokens_WL)
    for metric, suffix, array in (
      ('resolution', '_by_layer_and_head', statistics.resolution_NH),
      ('resolution_of_mean', '_by_layer', statistics.resolution_of_mean_N),
      ('entropy', '_by_layer_and_head', statistics.entropy_NH),
      ('distance', '_by_layer_and_head', statistics.distance_NH),
    ):
      np.testing.assert_allclose(row[metric + suffix], array, rtol=1e-4, atol=1e-6)
      assert row[metric] == pytest.approx(array.mean(), rel=1e-4, abs=1e-6)
    of_scores = row['scores']
    assert (of_scores['from'][0], of_scores['to'][-1]) == (0, row['length'])
    assert of_scores['from'][1:] == of_scores['to'][:-1]
    for low, high, *values in zip(
      of_scores['from'], of_scores['to'], *of_scores['mean_by_layer'], strict=True
    ):
      expected_N = statistics.score_NHK[..., low:high].mean(axis=(1, 2))
      np.testing.assert_allclose(values, expected_N, rtol=1e-4, atol=1e-5)


def test_a_report_says_what_was_analyzed_and_how(of_fire):
  _, reports, _ = of_fire

  assert [report['mask'] for report in reports] == list(MASKS)
  for report in reports:
    assert (report['run'], report['checkpoint_step'], report['train_length']) == ('fire', 3, 32)
    assert (report['task'], report['split'], report['protocol']) == (
      'text',
      'validation',
      'same_tokens',
    )
    assert report['encoding']['name'] == 'fire'
    assert {row['tokens'] for row in report['lengths']} == {TOKENS}


def test_blocks_change_what_is_longer_than_two_of_them(of_fire):
  _, (causal, blockwise), _ = of_fire

  assert causal['lengths'][0] == blockwise['lengths'][0]  # two blocks of half the training length
  assert blockwise['lengths'][1]['distance'] < causal['lengths'][1]['distance']
  assert blockwise['lengths'][1]['scores']['to'][-1] == 32  # no query sees farther


def test_progress_is_told_of_every_token_the_longest_windows_first(of_fire):
  _, _, told = of_fire

  for mask in MASKS:
    of_mask = [numbers for case, *numbers in told if case == f'fire {mask}']
    assert [length for length, _ in of_mask] == sorted((n for n, _ in of_mask), reverse=True)
    for length in LENGTHS:
      assert sum(tokens for at, tokens in of_mask if at == length) == TOKENS


def test_the_biases_are_those_that_each_layer_has_learned(of_fire, restored):
  params, (case, _), _ = restored
  learned = params['blocks']['attention']['encoding']
  ((curves,), _, _) = of_fire

  assert (curves['name'], curves['checkpoint_step'], curves['expectation']) == ('fire', 3, None)
  assert [of_query['query_position'] for of_query in curves['biases']] == [10, 63]
  for of_query in curves['biases']:
    query_position = of_query['query_position']
    assert (of_query['distance'][0], of_query['distance'][-1]) == (0, query_position)
    assert len(of_query['by_layer_and_head']) == NUM_LAYERS
    key_position_1K = query_position - np.array([of_query['distance']], np.int32)
    for layer, by_head in enumerate(of_query['by_layer_and_head']):
      bias_BHQK = case.transformer.encoding.bias(
        jax.tree.map(operator.itemgetter(layer), learned),
        np.array([[query_position]], np.int32),
        key_position_1K,
        tiny.MODEL['num_heads'],
      )
      np.testing.assert_allclose(by_head, bias_BHQK[0, :, 0], rtol=1e-4, atol=1e-5)


def test_encodings_may_be_replaced_as_in_an_evaluation(workdirs):
  asked = dataclasses.replace(
    request((32,), ('causal',)), encodings=('as_trained', 'yarn:scale=4.0')
  )

  curves, reports = analyze.analyze(workdirs[1], asked)

  assert [of_one['name'] for of_one in curves] == ['rope', 'rope yarn:scale=4.0']
  as_trained, replaced = (report['lengths'][0]['resolution'] for report in reports)
  assert as_trained != replaced
  values = [of_one['expectation']['by_distance'] for of_one in curves]
  assert values[0] != values[1] and len(values[0]) == 32


@pytest.mark.parametrize('name', ['sinusoidal', 'xpos'])
def test_an_encoding_from_no_run_has_its_expectation(drawn, name):
  expectation = drawn[name]['expectation']

  assert expectation['width'] == {'sinusoidal': 128, 'xpos': 32}[name]
  assert expectation['by_distance'][0] == pytest.approx(expectation['width'] / 2, rel=1e-5)
  assert len(expectation['by_distance']) == 128
  assert drawn[name]['biases'] is None


def test_a_shift_invariant_encoding_has_the_biases_of_its_last_query(drawn):
  ((of_query,), of_fire) = drawn['alibi']['biases'], drawn['fire']['biases']

  assert of_query['query_position'] == 127
  assert [of_query['query_position'] for of_query in of_fire] == [63, 127]
  (by_head,) = of_query['by_layer_and_head']
  slopes = 2.0 ** (-8 * (np.arange(4) + 1) / 4)
  expected = -slopes[:, None] * np.array(of_query['distance'])[None]
  np.testing.assert_allclose(by_head, expected, rtol=1e-5)


def test_the_resolution_of_an_encoding_is_that_of_its_scores(drawn):
  biases_H = -(2.0 ** (-8 * (np.arange(4) + 1) / 4))

  for row in drawn['alibi']['resolution']:
    score_HK = biases_H[:, None] * np.arange(row['length'])[None]
    assert row['resolution'] == pytest.approx(analysis.resolution(score_HK).mean(), rel=1e-5)


def test_all_that_there_is_is_written(of_fire, tmp_path):
  curves, reports, _ = of_fire

  paths = analyze.write(curves, reports, tmp_path, 'both')

  assert [path.name for path in paths] == [
    'both.json',
    'both_heads.png',
    'both_scores.png',
    'both_biases_fire.png',
  ]
  assert json.loads(paths[0].read_text()) == {'encodings': curves, 'runs': reports}
  for path in paths[1:]:
    assert path.read_bytes().startswith(b'\x89PNG')
  assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_the_curves_of_encodings_are_written_together(drawn, tmp_path):
  paths = analyze.write(list(drawn.values()), [], tmp_path, 'analysis')

  names = ['analysis.json', 'analysis_expectation.png', 'analysis_biases.png']
  assert [path.name for path in paths] == names


def test_the_table_has_a_row_a_report_and_a_column_a_length(of_fire):
  _, reports, _ = of_fire

  header, *rows = analyze.table(reports, 'entropy').splitlines()

  assert header.split() == ['run', '32', '64']
  for row, report in zip(rows, reports, strict=True):
    values = [f'{of_length["entropy"]:.4g}' for of_length in report['lengths']]
    assert row.split() == ['fire', report['mask'], *values]


def test_the_table_of_encodings_has_their_resolution(drawn):
  header, *rows = analyze.table_of_encodings(list(drawn.values())).splitlines()

  assert header.split() == ['encoding', '64', '128']
  assert [row.split()[0] for row in rows] == list(drawn)
  values = [f'{row["resolution"]:.4g}' for row in drawn['alibi']['resolution']]
  assert rows[2].split() == ['alibi', *values]


@pytest.mark.parametrize(
  ('text', 'options', 'message'),
  [
    ('rop', {}, "unknown encoding 'rop'"),
    ('rope:slope=1', {}, "has no option 'slope'"),
    ('nope', {}, "encoding 'nope' neither rotates nor embeds nor adds a bias"),
    ('rope', {'size': 'huge'}, "size='huge'"),
    ('rope', {'lengths': (0,)}, r'lengths=\(0,\)'),
    ('learned', {'lengths': (4096,)}, 'length=4096 is past the 2048 positions'),
    ('alibi', {'query_positions': (5, -3)}, 'query position -3 must be at least 0'),
  ],
)
def test_curves_that_there_are_not_are_refused(text, options, message):
  with pytest.raises(errors.UserError, match=message):
    analyze.of_encoding(text, **{'size': 'tiny', 'lengths': (8,), **options})


@pytest.mark.parametrize(
  ('section', 'changes', 'message'),
  [
    ('model', {'causal': False, 'vocab_size': 260}, 'model.causal=False'),
    ('data', {'position_range': 512}, 'data.position_range=512'),
  ],
)
def test_runs_whose_distances_are_others_are_refused(data, tmp_path, section, changes, message):
  own = {'data': data, 'model': tiny.MODEL}[section]
  config = tiny.config(data, 'alibi', **{section: {**own, **changes}})
  checkpoint.claim_workdir(tmp_path / 'run', config)

  with pytest.raises(errors.UserError, match=f'{message}.*; analyze causal models'):
    analyze.analyze(tmp_path / 'run')


@pytest.mark.parametrize(('field', 'value'), [('stride', 8), ('sequence', 2)])
def test_what_is_of_losses_is_refused(field, value, data, tmp_path):
  config = tiny.config(data, 'alibi', evaluate={field: value})
  checkpoint.claim_workdir(tmp_path / 'run', config)

  with pytest.raises(errors.UserError, match=f'{field}={value} is of losses, and attention is'):
    analyze.analyze(tmp_path / 'run')


# Arguments of `python -m lex_fire.analyze`, and what the one line on stderr says.
MISTAKES = {
  'nothing': ([], '--workdir is missing: the run or runs (DIR,DIR) to analyze; or give --encoding'),
  'output': (['--encoding=rope'], '--output is missing'),
  'encoding': (['--encoding=rop,rope', '--output=OUT'], "unknown encoding 'rop'"),
  'no run': (['--workdir=OUT'], 'no run in workdir'),
  'lengths': (['--encoding=rope', '--output=OUT', '--lengths=long'], '--lengths=long must be'),
  'mask': (['--workdir=RUN', '--mask=causl'], "unknown mask 'causl'"),
  'positions': (
    ['--encoding=alibi', '--output=OUT', '--query_positions=1,x'],
    '--query_positions=1,x must be whole numbers',
  ),
}
GOOD = {
  'encodings': [
    '--encoding=rope,yarn:scale=2.0,ramp=code,alibi',
    '--size=tiny',
    '--lengths=64',
    '--output=OUT/curves',
  ],
  'runs': ['--workdir=RUN,OTHER', '--lengths=32', '--max_tokens=96', '--output=OUT/runs'],
  'one': [
    *('--workdir=RUN', '--lengths=32', '--max_tokens=96', '--query_positions=5,9'),
    '--output=OUT/one',
  ],
}


@pytest.fixture(scope='module')
def results(workdirs, tmp_path_factory):
  """Runs every command once: {name: (status, stdout, stderr)}."""
  out = tmp_path_factory.mktemp('out')

  def expand(argument):
    places = {'OUT': out, 'RUN': workdirs[0], 'OTHER': workdirs[1]}
    for place, path in places.items():
      argument = argument.replace(place, str(path))
    return argument

  found = {
    name: tiny.run_command('lex_fire.analyze', *map(expand, arguments))
    for name, arguments in ({name: given for name, (given, _) in MISTAKES.items()} | GOOD).items()
  }
  found['nothing'] = tiny.run_in_a_new_interpreter('lex_fire.analyze')  # as users do
  return found, out


@pytest.mark.parametrize('name', MISTAKES)
def test_a_mistake_gets_one_line_and_status_2(results, name):
  status, _, stderr = results[0][name]

  assert status == 2, stderr
  (line,) = (line for line in stderr.splitlines() if line.strip())
  assert line.startswith('error: ')
  assert MISTAKES[name][1] in line


def test_the_command_draws_encodings_whose_options_have_commas(results):
  status, stdout, stderr = results[0]['encodings']

  assert status == 0, stderr
  assert 'yarn:scale=2.0,ramp=code ' in stdout
  written = json.loads((results[1] / 'curves' / 'analysis.json').read_text())
  names = [of_one['name'] for of_one in written['encodings']]
  assert names == ['rope', 'yarn:scale=2.0,ramp=code', 'alibi']


def test_the_command_compares_runs(results):
  status, stdout, stderr = results[0]['runs']

  assert status == 0, stderr
  written = json.loads(
    (results[1] / 'runs' / 'analysis_fire_rope_same_tokens_lengths-32_tokens-96.json').read_text()
  )
  assert [of_one['name'] for of_one in written['encodings']] == ['fire', 'rope']
  assert [report['run'] for report in written['runs']] == ['fire', 'rope']
  for metric, title in analyze.METRICS.items():
    assert f'{title}\n{analyze.table(written["runs"], metric)}' in stdout
  assert 'attention at 32: reference, 32 x 32 logits are at most 16384 on cpu\n' in stdout


def test_files_of_a_run_elsewhere_tell_it_and_the_positions_asked_for(results):
  status, _, stderr = results[0]['one']

  assert status == 0, stderr
  names = {path.name for path in (results[1] / 'one').iterdir()}
  (name,) = (path.stem for path in (results[1] / 'one').glob('*.json'))
  assert re.fullmatch('analysis_.*-fire_same_tokens_lengths-32_tokens-96_positions-5-9', name)
  ends = ('.json', '_heads.png', '_scores.png', '_biases_fire.png')
  assert names == {f'{name}{end}' for end in ends}
  (drawn,) = json.loads((results[1] / 'one' / f'{name}.json').read_text())['encodings']
  assert [of_one['query_position'] for of_one in drawn['biases']] == [5, 9]
