"""Tests of `experiments/sweep.py`, of the sweeps, and that what they show is what they measured."""

import dataclasses
import importlib
import json
import math
import pathlib
import re

import numpy as np
import pytest
import tiny
from absl import flags
from matplotlib import figure

from experiments import sweep, sweep_plot, sweep_published, sweep_results
from experiments.shipped import run as shipped_run
from experiments.shipped import seeds as shipped_seeds
from lex_fire import encodings, errors, published, train

ROOT = pathlib.Path(sweep.__file__).parent
QUESTIONS = ('encoding_rate', 'fire_ablations', 'length_generalization')
MEASURED = sorted(ROOT.glob('*/*.jsonl'))
ANYWHERE = sweep.Corpus('stdlib', {}, ('same_tokens', 'windows'))


def variants_of(question, scale):
  return importlib.import_module(f'experiments.{question}.run').variants(scale)


def line(variant, seed, losses, mask='causal', protocol='same_tokens'):
  lengths = [
    {'length': length, 'tokens': 64, 'documents': 2, 'nats_per_token': loss}
    for length, loss in losses.items()
  ]
  common = {'seed': seed, 'protocol': protocol, 'mask': mask, 'train_length': 32}
  return {'variant': variant, **common, 'lengths': lengths}


# What is measured


@pytest.mark.parametrize('scale', sweep.SCALES.values(), ids=sweep.SCALES)
@pytest.mark.parametrize('question', QUESTIONS)
def test_every_run_of_a_sweep_has_a_config_of_its_own_that_reaches_all_lengths(question, scale):
  variants = variants_of(question, scale)

  configs = [sweep.config(scale, ANYWHERE, of, seed) for of in variants.values() for seed in (0, 1)]

  assert len(set(configs)) == 2 * len(variants)
  for config in configs:
    assert config.data.length == scale.lengths[0] == min(config.evaluate.lengths)
    assert (config.encoding.make().max_length or math.inf) >= max(config.evaluate.lengths)
    for text in variants['rope'].after.values() if 'rope' in variants else ():
      config.encoding.replaced_by(text, config.data.length)


def test_length_generalization_compares_every_encoding():
  variants = variants_of('length_generalization', sweep.SCALES['laptop'])

  names = [name for own, variant in variants.items() for name in (own, *variant.after)]

  assert sorted(names) == sorted(encodings.ENCODINGS)


def test_runs_that_lack_a_line_are_left_seed_by_seed():
  variants = {'a': sweep.Variant('nope'), 'b': sweep.Variant('rope', after={'c': 'ntk:scale=2'})}
  lines = [
    line(variant, 0, {32: 1.0}, mask, protocol)
    for variant in 'abc'
    for mask in sweep.MASKS
    for protocol in ANYWHERE.protocols
  ]

  def left(seeds, lines):
    return sweep.left(variants, seeds, ANYWHERE.protocols, sweep.MASKS, lines)

  assert left((0,), []) == [('a', 0), ('b', 0)]
  assert left((0, 1), lines) == [('a', 1), ('b', 1)]
  assert left((0,), lines[:-1]) == [('b', 0)]


def test_a_variant_may_differ_in_how_it_is_trained():
  scale = sweep.SCALES['laptop']
  variant = sweep.Variant('fire', optimizer={'encoding_rate': 30.0})

  as_ever, other = (
    sweep.config(scale, ANYWHERE, of, 0).optimizer for of in (sweep.Variant('fire'), variant)
  )

  assert other == dataclasses.replace(as_ever, encoding_rate=30.0) != as_ever


def test_a_directory_without_books_is_named(tmp_path):
  with pytest.raises(errors.UserError, match=f"--data_dir='{tmp_path}' has no '.*books/train"):
    sweep.corpus(str(tmp_path))


def test_a_sweep_measures_what_is_left_and_shows_it(corpus, tmp_path, monkeypatch):
  scale = sweep.Scale(
    {
      'model': tiny.MODEL,
      'data': {**corpus, 'length': 32, 'batch_size': 8},
      'optimizer': {'warmup_steps': 1},
      'train': {'steps': 2, 'validation_windows': 8},
    },
    lengths=(32, 64),
    max_tokens=256,
  )
  own = {'turned': sweep.Variant('rope', {'pairing': 'halves'}, after={'ntk': 'ntk:scale=2'})}
  of = sweep.Corpus('tiny', {}, ('same_tokens',))
  trained, train_as_ever = [], train.train

  def train_and_tell(config, workdir):
    trained.append((config.encoding.name, config.train.seed, workdir.name))
    return train_as_ever(config, workdir)

  monkeypatch.setattr(train, 'train', train_and_tell)
  path = tmp_path / 'measured.jsonl'

  sweep.run(scale, of, own, (0,), path, tmp_path / 'runs')
  assert trained == [('rope', 0, 'turned-0')]
  text = sweep.run(scale, of, own, (0, 1), path, tmp_path / 'runs')
  assert trained[1:] == [('rope', 1, 'turned-1')]

  lines = sweep_results.read(path)
  assert len(lines) == 2 * 2 * len(sweep.MASKS)
  rows = sweep_results.rows(lines, 'same_tokens', 'blockwise')
  assert {row.variant: row.seeds for row in rows} == {'turned': 2, 'ntk': 2}
  assert (tmp_path / 'measured.txt').read_text() == text == sweep_results.tables(lines)
  assert (tmp_path / 'measured.png').stat().st_size > 10_000


def test_lines_that_cannot_be_written_are_one_sentence(tmp_path):
  path = tmp_path / 'measured.jsonl'
  path.mkdir()

  with pytest.raises(errors.UserError, match=f"cannot write in '{tmp_path}': Is a directory; make"):
    sweep.complete([('a', 0)], lambda name, seed: iter([line(name, seed, {32: 1.0})]), path)


@pytest.mark.parametrize('text', ['', '-1'])
def test_seeds_are_one_or_more_of_at_least_0(text):
  found = flags.FlagValues()
  flags.DEFINE_list('seeds', text, 'seeds', flag_values=found)
  found.mark_as_parsed()

  with (
    pytest.MonkeyPatch.context() as patch,
    pytest.raises(errors.UserError, match=f'--seeds={text} must be one or more whole numbers of'),
  ):
    patch.setattr(flags, 'FLAGS', found)
    sweep.seeds_of_flags()


# What is shown


def test_rows_are_means_and_deviations_over_seeds_the_best_at_the_longest_first():
  losses = np.array([[2.0, 2.5], [2.25, 2.75], [1.0, 3.5]])
  lines = [line('far', seed, {32: a, 64: b}) for seed, (a, b) in enumerate(losses)]
  lines += [line('near', 0, {32: 9.0, 64: 1.5}), line('near', 0, {32: 0.0, 64: 0.0}, 'blockwise')]

  near, far = sweep_results.rows(lines, 'same_tokens', 'causal')

  assert (near.variant, near.seeds, near.mean(64)) == ('near', 1, 1.5)
  assert math.isnan(near.deviation(64))
  for at, length in enumerate((32, 64)):
    np.testing.assert_allclose(far.mean(length), losses[:, at].mean(), rtol=1e-15)
    np.testing.assert_allclose(far.deviation(length), losses[:, at].std(ddof=1), rtol=1e-15)
  assert sweep_results.table([near, far]).splitlines()[1:] == [
    'near         1           9.000           1.500',
    'far          3   1.750 +-0.661   2.917 +-0.520',
  ]


def test_a_seed_that_is_going_on_waits_for_its_last_line():
  seed_0 = [line(variant, 0, {32: 1.0}, mask) for variant in 'ab' for mask in sweep.MASKS]
  seed_1 = [of_0 | {'seed': 1} for of_0 in seed_0]

  assert sweep_results.whole([*seed_0, *seed_1[:3]]) == seed_0
  assert sweep_results.whole([*seed_0, *seed_1]) == [*seed_0, *seed_1]
  assert sweep_results.whole([*seed_0[:2], *seed_1[2:]]) == [*seed_0[:2], *seed_1[2:]]


def test_a_ranking_stands_beside_the_published_one():
  lines = [line(name, 0, {64: at}) for at, name in enumerate(('xpos', 'rope', 'late', 'alibi'))]

  made = sweep_results.rows(lines, 'same_tokens', 'causal')
  # And of FIRE's no two of known order.
  (of_lex,) = sweep_published.rankings([row.variant for row in made], 'causal')

  assert of_lex.startswith('Best first here: xpos, rope, alibi. ')
  places = published.ranking('lex', 4096, 'causal')
  assert f': {published.in_words(places)}; ' in of_lex
  assert of_lex.endswith('Of 3 pairs of known order 1 are in it here.')


def test_losses_stand_as_perplexities_too_in_the_form_of_lexs_table():
  losses = {'rope': {32: [0.0, np.log(3.0)], 64: [1.0, 1.0]}, 'fire': {32: [1.0], 64: [1.0]}}

  _, text = sweep_published.perplexities(losses, 'causal')

  heads, row = (line.split() for line in text.splitlines())
  assert heads == ['32', '64']
  assert row == ['rope', '2.000', '+-1.414', '2.718', '+-0.000']  # sqrt 2, e
  assert sweep_published.perplexities({'fire': losses['fire']}, 'causal') == []


def test_changes_past_training_stand_beside_lexs_at_as_many_times_its_length():
  """LeX's perplexity under xPos without blocks is 23.31, 22.56 and 28.43 at 1, 2 and 4 times 1024.

  Under RoPE it is 25.52, 73.6 and 294.45, and of the sinusoids LeX does not tell the mask.
  """
  losses = {
    'xpos': {32: [1.5, 2.0], 64: [1.25, 2.25], 128: [1.0, 1.5], 96: [7.0, 7.0]},
    'rope': {32: [2.0], 64: [2.5], 128: [3.0], 256: [9.0]},
    'sinusoidal': {32: [3.0], 64: [3.0], 128: [3.0]},
    'fire': {32: [1.0], 64: [1.0], 128: [1.0]},
  }

  how, text = sweep_published.changes(losses, 32, 'causal')
  _, in_blocks = sweep_published.changes({'xpos': losses['xpos']}, 32, 'blockwise')

  head, *rows = (re.split(r' {2,}', line.strip()) for line in text.splitlines())
  assert head == ['LeX 1x', 'LeX 2x', 'LeX 4x', 'here 1x', 'here 2x', 'here 4x']
  assert 'tables 2 and 5' in how and '(1x: 1024 tokens there, 32 here)' in how
  assert how.endswith('Of sinusoidal LeX does not tell the mask.')
  of_name = {name: cells for name, *cells in rows}
  assert set(of_name) == {'xpos', 'rope', 'sinusoidal'}
  lex = [math.log(23.31), math.log(22.56 / 23.31), math.log(28.43 / 23.31)]
  assert [float(cell) for cell in of_name['xpos'][:3]] == pytest.approx(lex, abs=5e-4)
  # Over two seeds the sample deviation is their difference by the root of 2: 0.5, 0.5 and 0.
  assert of_name['xpos'][3:] == ['1.750 +-0.354', '+0.000 +-0.354', '-0.500 +-0.000']
  lex = [math.log(25.52), math.log(73.6 / 25.52), math.log(294.45 / 25.52)]
  assert [float(cell) for cell in of_name['rope'][:3]] == pytest.approx(lex, abs=5e-4)
  assert of_name['rope'][3:] == ['2.000', '+0.500', '+1.000']
  blocks = re.split(r' {2,}', in_blocks.splitlines()[1].strip())
  assert float(blocks[3]) == pytest.approx(math.log(20.73 / 23.31), abs=5e-4)
  assert sweep_published.changes({'fire': losses['fire']}, 32, 'causal') == []


def test_no_table_of_lex_stands_beside_lengths_that_it_does_not_have():
  how, text = sweep_published.changes({'xpos': {32: [1.0], 48: [2.0]}}, 32, 'causal')

  assert text.split() == ['LeX', '1x', 'here', '1x', 'xpos', '3.149', '1.000']


def curve(name, means, deviation=math.nan):
  return sweep_plot.Curve(name, means, dict.fromkeys(means, deviation))


def test_what_ends_near_the_best_is_enlarged_if_something_else_sets_the_scale():
  near = [curve('best', {32: 1.5, 64: 1.0}, 0.25), curve('near', {32: 1.125, 64: 1.25})]
  far = [*near, curve('far', {32: 1.0, 64: 2.0}), curve('farther', {32: 1.0, 64: 3.0})]

  low, high = sweep_plot.enlarged({'causal': near, 'blockwise': far}, 0.5)

  held = 0.75, 1.75  # of the best alone, with its deviations
  assert held[0] - 0.1 < low < held[0] and held[1] < high < held[1] + 0.1
  assert sweep_plot.enlarged({'causal': far}, 1.0) is None
  assert sweep_plot.enlarged({'causal': far}, math.inf) is None


@pytest.mark.parametrize('seed', range(4))
def test_names_are_moved_apart_as_little_as_can_be(seed):
  """No others that are far enough apart are nearer, by squares, to where they should be."""
  rng = np.random.default_rng(seed)
  heights = np.sort(rng.normal(size=7))

  found = np.array(sweep_plot.apart(list(heights), 0.3))

  assert (np.diff(found) >= 0.3 - 1e-12).all()
  moved = ((found - heights) ** 2).sum()
  for scale in np.geomspace(1e-3, 1, 200):
    other = found + scale * rng.normal(size=7)
    if (np.diff(other) >= 0.3).all():
      assert ((other - heights) ** 2).sum() >= moved
  np.testing.assert_array_equal(sweep_plot.apart([1.0, 2.0, 4.0], 0.5), [1.0, 2.0, 4.0])


def test_a_plot_names_each_curve_once_where_its_end_is_to_be_read(tmp_path, monkeypatch):
  lines = [
    line(name, seed, {32: 1.0 + seed / 8, 64: end}, mask)
    for name, end in (('fire', 1.0), ('xpos', 1.25), ('rope', 3.0))
    for seed in (0, 1)
    for mask in sweep.MASKS
  ]
  figures = []
  monkeypatch.setattr(figure.Figure, 'savefig', lambda of, *_, **__: figures.append(of))

  sweep_results.draw(lines, tmp_path / 'measured.png')
  sweep_results.draw([one for one in lines if one['variant'] != 'rope'], tmp_path / 'near.png')

  names = [[[text.get_text() for text in axes.texts] for axes in of.axes] for of in figures]
  near = ['fire 1.000', 'xpos 1.250']
  assert names == [[['rope 3.000']] * 2 + [near] * 2, [near] * 2]
  for axes in figures[0].axes[2:]:
    assert axes.get_ylim()[1] < 1.5
  assert figures[0].get_suptitle().startswith('mean and standard deviation over 2 seeds; ')


def test_of_curves_that_end_at_one_place_the_higher_has_the_higher_name(tmp_path, monkeypatch):
  figures = []
  monkeypatch.setattr(figure.Figure, 'savefig', lambda of, *_, **__: figures.append(of))
  curves = [curve('high', {4: 97.0, 8: 0.0}), curve('low', {4: 50.0, 8: 0.0})]

  sweep_plot.draw(
    {'causal': curves},
    tmp_path / 'tied.png',
    title='sums',
    x_label='digits',
    y_label='right',
    trained=[4],
    decimals=1,
    near=math.inf,
  )

  low, high = sorted(figures[0].axes[0].texts, key=lambda text: text.get_position()[1])
  assert (low.get_text(), high.get_text()) == ('low 0.0', 'high 0.0')


def test_a_line_that_is_torn_is_named(tmp_path):
  path = tmp_path / 'torn.jsonl'
  path.write_text(f'{json.dumps(line("a", 0, {32: 1.0}))}\n{{"variant"')

  with pytest.raises(errors.UserError, match=f"line 2 of '{path}' is no JSON"):
    sweep_results.read(path)


@pytest.mark.parametrize('path', MEASURED, ids=lambda path: f'{path.parent.name}-{path.stem}')
def test_tables_are_those_of_what_was_measured(path):
  lines = sweep_results.whole(sweep_results.read(path))
  assert path.with_suffix('.txt').read_text() == sweep_results.tables(lines)
  assert path.with_suffix('.png').exists()


# What ships


def test_other_seeds_of_what_ships_are_of_its_recipe():
  """All but what a variant's name says that it goes without, and the masks."""
  of = sweep.corpus('')

  for name, variant in shipped_seeds.variants().items():
    found = sweep.config(shipped_seeds.SCALE, of, variant, seed=0).to_dict()
    shipped = shipped_run.config(variant.encoding).to_dict()
    if name.startswith('one'):
      shipped['encoding']['hidden_layers'] = 1
    if 'hidden' in name:
      shipped['optimizer']['encoding_rate'] = 10.0
    assert found.pop('evaluate')['masks'] == sweep.MASKS
    assert found == {
      section: of_one for section, of_one in shipped.items() if section != 'evaluate'
    }
