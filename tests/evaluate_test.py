"""Tests `../lex_fire/evaluate.py` and its `comparison.py`, `command.py`, `report.py` and `plot.py`.

The numbers are held against ones computed another way.
"""

import csv
import dataclasses
import errno
import functools
import json
import math
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lex_fire import (
  checkpoint,
  command,
  comparison,
  documents,
  encodings,
  errors,
  evaluate,
  kernels,
  model,
  plot,
  report,
  train,
)
from lex_fire import config as config_lib
from lex_fire.data import draws, masking, positions, protocols

LENGTHS = (32, 64, 128)


def request(lengths=LENGTHS, protocol='same_tokens', max_tokens=2048, **fields):
  """Returns what to evaluate; without changes, as the config of a tiny run says."""
  return config_lib.EvaluateConfig(lengths, protocol, max_tokens, **fields)


@functools.cache
def evaluated(workdir, asked=None):
  """Returns the reports of a run, computed once for all tests."""
  return evaluate.evaluate(workdir, asked)


@pytest.fixture(scope='module')
def workdir(fire_run):
  return fire_run[0]


@pytest.fixture(scope='module')
def rope_workdir(corpus, tmp_path_factory):
  out = tmp_path_factory.mktemp('runs') / 'rope'
  config = tiny.config(
    corpus,
    'rope',
    encoding={'pairing': 'interleaved', 'base_period': 500.0},
    model={'vocab_size': 260},  # room for a mask
    train={'steps': 3},
  )
  train.train(config, out)
  return out


@pytest.fixture(scope='module')
def masked_workdir(rope_workdir, tmp_path_factory):
  copy = tmp_path_factory.mktemp('masked') / 'rope'
  return tiny.as_if(rope_workdir, copy, model={'causal': False}, data={'mask_rate': 0.25})


@pytest.fixture(scope='module')
def fire_report(workdir):
  (only,) = evaluated(workdir)
  return only


@pytest.fixture(scope='module')
def four(workdir, rope_workdir):
  """Two runs under two masks each."""
  asked = request((32, 64), masks=('causal', 'blockwise'))
  return [*evaluated(workdir, asked), *evaluated(rope_workdir, asked)]


def losses_by_hand(workdir, asked, length, transformer=None, change=None, position=None):
  """Scores windows with a float64 softmax of the model's logits: {document: losses}.

  `change` makes other windows; `position` is of all windows.
  """
  config = evaluate.checkpoint.read_config(workdir)
  transformer = transformer or train.make_model(config)
  _, params = comparison.restore(config, workdir, evaluate.sharding.make_mesh())
  validation = config.data.validation_files.replace('*', '{}')
  texts = [pathlib.Path(validation.format(part)).read_bytes() for part in range(3)]
  cut = documents.windows(dataclasses.replace(config, evaluate=asked))[length]
  cut = change(cut) if change else cut
  position_1L = np.arange(length)[None] if position is None else position
  logits_WLV = np.float64(
    jax.jit(transformer.apply)({'params': params}, cut.inputs_WL, position_1L)
  )
  by_document = {}
  for logits_LV, targets_L, document, scored_L in zip(
    logits_WLV, cut.targets_WL, cut.document_W, cut.scored_WL, strict=True
  ):
    text = bytes((targets_L[targets_L > 2] - 3).astype(np.uint8))  # ids are bytes + 3
    assert any(text in whole for whole in texts)
    log_norm_L = np.log(np.exp(logits_LV).sum(axis=1))
    loss_L = log_norm_L - logits_LV[np.arange(length), targets_L]
    by_document.setdefault(int(document), []).append(loss_L[scored_L])
  return {document: np.concatenate(parts) for document, parts in by_document.items()}


def expect_row(row, by_document):
  loss_Z = np.concatenate(list(by_document.values()))
  assert row['tokens'] == loss_Z.size
  assert row['documents'] == len(by_document)
  assert row['nats_per_token'] == pytest.approx(loss_Z.mean(), abs=1e-5)
  assert row['perplexity'] == pytest.approx(math.exp(loss_Z.mean()), rel=1e-4)
  # the variance of a ratio of sums over independent documents
  excess = [(losses - loss_Z.mean()).sum() for losses in by_document.values()]
  count = len(excess)
  expected = math.sqrt(count / (count - 1) * sum(x**2 for x in excess)) / loss_Z.size
  assert row['standard_error'] == pytest.approx(expected, abs=1e-5)


# Numbers


@functools.cache
def fires_by_hand(workdir, protocol):
  """Returns the losses of the run of FIRE by length."""
  return {n: losses_by_hand(workdir, request(protocol=protocol), n) for n in LENGTHS}


@pytest.mark.parametrize('protocol', sorted(protocols.PROTOCOLS))
def test_losses_and_standard_errors_equal_those_computed_window_by_window(workdir, protocol):
  asked = request(protocol=protocol)

  (found,) = evaluated(workdir, None if asked == request() else asked)  # None: as its config says

  assert [row['length'] for row in found['lengths']] == list(LENGTHS)
  for row in found['lengths']:
    expect_row(row, fires_by_hand(workdir, protocol)[row['length']])


def expect_change(change, short, long):
  difference_Z = np.array([(long[document] - short[document]).sum() for document in short])
  tokens_Z = np.array([losses.size for losses in short.values()])
  mean = difference_Z.sum() / tokens_Z.sum()
  excess_Z = difference_Z - mean * tokens_Z
  count = len(excess_Z)
  expected = math.sqrt(count / (count - 1) * (excess_Z**2).sum()) / tokens_Z.sum()
  assert change['nats_per_token'] == pytest.approx(mean, abs=1e-5)
  assert change['standard_error'] == pytest.approx(expected, abs=1e-6)


def test_the_change_has_the_standard_error_of_paired_differences(workdir, fire_report):
  change, by_hand = fire_report['change'], fires_by_hand(workdir, 'same_tokens')

  assert (change['from'], change['to']) == (32, 128)
  expect_change(change, by_hand[32], by_hand[128])


def test_other_tokens_at_each_length_give_no_paired_error(workdir):
  (found,) = evaluated(workdir, request((32, 128), 'windows', 160))

  assert found['change']['standard_error'] is None


def test_each_length_counts_its_own_documents(workdir):
  (found,) = evaluated(workdir, request((32, 128), 'windows', 160))

  # 128 tokens of the first document, and at length 32 the 32 that are left, of the second
  assert [row['documents'] for row in found['lengths']] == [2, 1]
  assert found['documents'] == 1


def test_same_tokens_scores_equally_many_tokens_at_each_length(fire_report):
  assert fire_report['protocol'] == 'same_tokens'
  assert [row['length'] for row in fire_report['lengths']] == list(LENGTHS)
  assert len({row['tokens'] for row in fire_report['lengths']}) == 1


def test_the_report_says_what_was_evaluated_and_how(fire_report):
  assert fire_report['run'] == 'fire'
  assert fire_report['checkpoint_step'] == 12
  assert fire_report['encoding']['name'] == 'fire'
  assert fire_report['encoding']['threshold'] == 512.0
  assert fire_report['encoding_override'] is None
  assert fire_report['trained_encoding'] == fire_report['encoding']
  assert fire_report['mask'] == 'causal'
  assert fire_report['mask_fields'] == {'causal': True, 'block': None, 'window': None}
  assert (fire_report['objective'], fire_report['mask_rate']) == ('next_token', None)
  assert fire_report['position_range'] is None
  assert fire_report['attention'] == 'auto'
  assert fire_report['tokenizer'] == 'bytes'
  where = fire_report['train_length'], fire_report['task'], fire_report['split']
  assert where == (32, 'text', 'validation')
  assert fire_report['documents'] == 3


def test_loss_by_position_averages_to_the_loss_of_the_longest_windows(fire_report):
  buckets = fire_report['positions']

  assert [bucket['from'] for bucket in buckets] == [0, 16, 32, 64]
  assert [bucket['to'] for bucket in buckets] == [16, 32, 64, 128]
  total = sum((bucket['to'] - bucket['from']) * bucket['nats_per_token'] for bucket in buckets)
  assert total / 128 == pytest.approx(fire_report['lengths'][-1]['nats_per_token'], abs=1e-5)


def test_bytes_per_token_make_bits_per_byte(fire_report):
  for row in fire_report['lengths']:
    # one token is one byte, but for EOS, and no window of these documents holds one
    assert row['bits_per_byte'] == pytest.approx(row['nats_per_token'] / math.log(2), rel=1e-6)


def test_losses_of_scored_tokens_are_weighed_alike_wherever_they_stand():
  rng = np.random.default_rng(0)
  loss_L = rng.uniform(1, 3, 60).astype(np.float32)
  position_L = rng.integers(16, 32, 60)
  document_L = rng.choice([3, 7], 60)
  losses = report.Losses(40, loss_L, np.zeros(60, np.int32), position_L, document_L, 0)

  row = report.of_length(losses, None)

  by_document = {document: loss_L[document_L == document].astype(float) for document in (3, 7)}
  expect_row(row, by_document)
  assert row['length'] == 40
  assert row['bits_per_byte'] is None
  first, second, third = report.by_position(losses)
  assert (first['nats_per_token'], third['nats_per_token']) == (None, None)
  assert (third['from'], third['to']) == (32, 40)
  assert second['nats_per_token'] == pytest.approx(row['nats_per_token'])


# Masks


MASKS = {
  'causal': kernels.Mask(),
  'blockwise': kernels.Mask(block=16),
  'window:9': kernels.Mask(window=9),
  'window:64': kernels.Mask(window=64),
}


@pytest.fixture(scope='module')
def masked_differently(rope_workdir):
  """Returns the report of the run of RoPE under each of MASKS."""
  reports = evaluated(rope_workdir, request((32, 64), max_tokens=1024, masks=tuple(MASKS)))
  return dict(zip(MASKS, reports, strict=True))


def test_blockwise_is_causal_up_to_the_training_length_and_so_is_a_window_as_long_as_the_row(
  masked_differently,
):
  causal, blockwise, window = (
    [row['nats_per_token'] for row in masked_differently[mask]['lengths']]
    for mask in ('causal', 'blockwise', 'window:64')
  )

  # a block is half of the 32 tokens trained on, and a query sees its own and the one before
  assert blockwise[0] == pytest.approx(causal[0], abs=1e-6)
  assert abs(blockwise[1] - causal[1]) > 1e-5
  assert window == pytest.approx(causal, abs=1e-6)


@pytest.mark.parametrize('name', ['blockwise', 'window:9'])
def test_the_losses_are_those_of_the_mask_that_the_report_names(
  rope_workdir, masked_differently, name
):
  config, found = evaluate.checkpoint.read_config(rope_workdir), masked_differently[name]
  transformer = model.Transformer(config.model, config.encoding.make(), MASKS[name])

  by_hand = losses_by_hand(rope_workdir, request((32, 64), max_tokens=1024), 64, transformer)

  assert found['mask'] == name
  assert found['mask_fields'] == dataclasses.asdict(MASKS[name])
  expect_row(found['lengths'][1], by_hand)


def test_windows_that_devices_share_have_the_losses_of_whole_ones(workdir, four):
  asked = request((32, 64), masks=('causal', 'blockwise'), sequence=4)

  for found, expected in zip(evaluated(workdir, asked), four[:2], strict=True):
    assert {choice['implementation'] for choice in found['implementations'].values()} == {'ring'}
    for row, other in zip(found['lengths'], expected['lengths'], strict=True):
      assert row['tokens'] == other['tokens']
      assert row['nats_per_token'] == pytest.approx(other['nats_per_token'], abs=1e-5)
    for row, other in zip(found['positions'], expected['positions'], strict=True):
      assert row == pytest.approx(other, abs=1e-4)


def test_a_run_is_restored_once_and_cut_once_and_each_length_and_mask_is_compiled_once(
  workdir, rope_workdir, monkeypatch
):
  calls = []

  def count(module, name):
    function = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: (calls.append(name), function(*args))[1])

  count(evaluate.checkpoint, 'restore_params')
  count(documents.reading, 'documents')
  count(evaluate, 'step')
  asked = request((32, 64), max_tokens=4096, masks=('causal', 'window:9'))  # several batches
  monkeypatch.setattr(evaluate, 'TOKENS_PER_BATCH', 64)

  for run in (workdir, rope_workdir):
    evaluate.evaluate(run, asked)

  assert calls.count('restore_params') == 2
  assert calls.count('documents') == 1
  assert calls.count('step') == 2 * 2 * 2


def test_a_disk_that_is_full_in_the_end_costs_no_numbers(
  workdir, evaluate_command, monkeypatch, capsys
):
  write = command.storage.write

  def write_a_little(path, content):
    if path.suffix == '.json':
      raise OSError(errno.ENOSPC, 'No space left on device')
    write(path, content)

  monkeypatch.setattr(command.storage, 'write', write_a_little)

  with pytest.raises(errors.UserError, match="cannot write '.*_same_tokens.json' into .*: No sp"):
    evaluate_command(workdir)

  assert re.search(r'^fire( +\d\.\d{3}){3} ', capsys.readouterr().out, re.MULTILINE)


def test_the_checkpoint_asked_for_is_read(fire_run, fire_report, evaluate_command, tmp_path):
  workdir, state = shutil.copytree(fire_run[0], tmp_path / 'fire'), fire_run[1]
  checkpoints = checkpoint.Checkpoints(workdir)
  checkpoints.save(99, jax.tree.map(jnp.zeros_like, state), 99.0)  # the newest, and no good
  checkpoints.close()

  evaluate_command(workdir)
  out = evaluate_command(workdir, checkpoint='best')

  (best,) = out.glob('*-fire_checkpoint-best_same_tokens.json')
  (newest,) = set(out.glob('*.json')) - {best}
  (newest,), (best,) = (json.loads(path.read_text())['runs'] for path in (newest, best))
  assert newest['checkpoint_step'] == 99
  uniform = math.log(tiny.config({}).model.vocab_size)
  assert newest['lengths'][0]['nats_per_token'] == pytest.approx(uniform)
  assert best['checkpoint_step'] == fire_report['checkpoint_step']
  assert best['lengths'] == fire_report['lengths']


# Encodings and attention in the place of those trained with


def test_losses_under_another_encoding_are_those_of_a_model_that_has_it(rope_workdir):
  asked = request((64,), encodings=('as_trained', 'xpos:gamma=0.5', 'nope'))
  config = evaluate.checkpoint.read_config(rope_workdir)
  kept = {'pairing': 'interleaved', 'base_period': 500.0}
  expected = {
    None: encodings.get('rope', **kept),
    'xpos:gamma=0.5': encodings.get('xpos', gamma=0.5, **kept),
    'nope': encodings.get('nope'),
  }

  found = evaluate.evaluate(rope_workdir, asked)

  assert [one['encoding_override'] for one in found] == list(expected)
  for one, encoding in zip(found, expected.values(), strict=True):
    transformer = model.Transformer(config.model, encoding)
    expect_row(one['lengths'][0], losses_by_hand(rope_workdir, asked, 64, transformer))
    assert one['trained_encoding'] == {'name': 'rope', **kept}
  assert found[1]['encoding'] == {'name': 'xpos', 'gamma': 0.5, 'scale_base': 512.0, **kept}


@pytest.mark.parametrize('name', ['fire', 't5', 'learned'])
def test_an_encoding_that_learns_what_the_run_has_not_is_refused(rope_workdir, name):
  with pytest.raises(errors.UserError, match=f"'{name}' does not take .* learned with 'rope'"):
    evaluate.evaluate(rope_workdir, request(encodings=('as_trained', name)))


def test_an_encoding_of_other_sizes_is_refused_and_one_of_other_constants_is_not(workdir):
  asked = request((32,), encodings=('fire:threshold=64', 'as_trained'))
  found = evaluate.evaluate(workdir, asked)

  assert [one['encoding']['threshold'] for one in found] == [64.0, 512.0]
  assert found[0]['lengths'] != found[1]['lengths']
  with pytest.raises(errors.UserError, match="'fire:width=8' does not take .* learned with 'fire'"):
    evaluate.evaluate(workdir, request(encodings=('fire:width=8',)))


def test_every_attention_scores_the_same(rope_workdir):
  found = [
    evaluate.evaluate(rope_workdir, request((64,), attention=name))[0]
    for name in ('reference', 'chunked')
  ]

  assert [one['attention'] for one in found] == ['reference', 'chunked']
  values = [one['lengths'][0]['nats_per_token'] for one in found]
  assert values[0] == pytest.approx(values[1], abs=1e-5)


# Bidirectional models and randomized positions


def test_a_bidirectional_model_is_scored_on_masked_tokens_the_same_at_each_length(masked_workdir):
  def change(windows):
    return masking.corrupt_windows(windows, rate=0.25, vocabulary_size=259)

  asked = request((32, 64))
  by_hand = [losses_by_hand(masked_workdir, asked, length, change=change) for length in (32, 64)]

  (found,) = evaluate.evaluate(masked_workdir, asked)

  assert (found['objective'], found['mask_rate'], found['mask']) == ('masked', 0.25, 'full')
  assert found['mask_fields']['causal'] is False
  for row, by_document in zip(found['lengths'], by_hand, strict=True):
    expect_row(row, by_document)
    assert row['bits_per_byte'] is None
  assert found['lengths'][0]['tokens'] == found['lengths'][1]['tokens']
  expect_change(found['change'], *by_hand)


@pytest.mark.parametrize('mask', ['causal', 'blockwise', 'window:8'])
def test_a_causal_mask_for_a_bidirectional_model_is_refused(masked_workdir, mask):
  message = (
    f"mask '{mask}' needs a model of model.causal=True, but this is one of .*use mask 'full'"
  )
  with pytest.raises(errors.UserError, match=message):
    evaluate.evaluate(masked_workdir, request(masks=('as_trained', mask)))


def test_a_full_mask_for_a_causal_model_is_refused(workdir):
  with pytest.raises(errors.UserError, match="mask 'full' needs a model of model.causal=False"):
    evaluate.evaluate(workdir, request(masks=('full',)))


def test_a_run_of_randomized_positions_is_evaluated_at_such_positions(rope_workdir, tmp_path):
  run = tiny.as_if(rope_workdir, tmp_path / 'drawn', data={'position_range': 64})
  asked = request((32,))
  position_1L = positions.sample(32, 64, seed=draws.JUDGE, ordinal=0)[None]

  (found,) = evaluate.evaluate(run, asked)

  assert found['position_range'] == 64
  expect_row(found['lengths'][0], losses_by_hand(run, asked, 32, position=position_1L))
  with pytest.raises(errors.UserError, match='length=128 is past data.position_range=64, of which'):
    evaluate.evaluate(run, request((32, 128)))


# What is refused


def test_a_length_past_a_learned_table_is_refused_before_any_work(tmp_path):
  config = tiny.config({}, 'learned', encoding={'max_length': 64})
  evaluate.checkpoint.claim_workdir(tmp_path, config)

  with pytest.raises(errors.UserError, match='length=128 is past the 64 positions'):
    evaluate.evaluate(tmp_path, request((32, 128)))


@pytest.mark.parametrize('lengths', [(), (0,), (32, 32)])
def test_lengths_that_make_no_sense_are_refused(lengths):
  with pytest.raises(errors.UserError, match='lengths='):
    config_lib.EvaluateConfig(lengths, 'windows', 512)


# Files, table and plot


def test_json_csv_and_a_plot_are_written(fire_report, tmp_path):
  other = {**fire_report, 'run': 'other'}

  paths = evaluate.write([fire_report, other], tmp_path, 'both')

  assert [path.name for path in paths] == ['both.json', 'both.csv', 'both.png']
  assert json.loads(paths[0].read_text())['runs'] == [fire_report, other]
  with paths[1].open() as file:
    rows = list(csv.DictReader(file))
  assert [row['run'] for row in rows] == ['fire'] * 3 + ['other'] * 3
  assert {(row['encoding'], row['mask']) for row in rows} == {('fire', 'causal')}
  assert float(rows[0]['nats_per_token']) == fire_report['lengths'][0]['nats_per_token']
  assert paths[2].read_bytes().startswith(b'\x89PNG')
  assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_what_a_masked_token_has_not_is_empty_in_csv(fire_report, tmp_path):
  row = {**fire_report['lengths'][0], 'bits_per_byte': None}

  evaluate.write([{**fire_report, 'lengths': [row]}], tmp_path, 'masked')

  with (tmp_path / 'masked.csv').open() as file:
    assert [row['bits_per_byte'] for row in csv.DictReader(file)] == ['']


def test_the_table_has_a_row_a_run_and_the_change_to_the_longest(fire_report):
  lines = report.table([fire_report]).splitlines()

  assert lines[0].split() == ['run', '32', '64', '128', 'change']
  values = [row['nats_per_token'] for row in fire_report['lengths']]
  assert lines[1].split() == [
    'fire',
    *(f'{value:.3f}' for value in values),
    f'{values[-1] - values[0]:+.3f}',
    f'+-{fire_report["change"]["standard_error"]:.3f}',
  ]


def test_two_runs_under_two_masks_make_four_rows_with_a_name_each(four):
  lines = report.table(four).splitlines()

  assert [' '.join(re.findall('[a-z]+', line)) for line in lines[1:]] == [
    *('fire causal', 'fire blockwise', 'rope causal', 'rope blockwise')
  ]
  assert len({len(line.partition('+-')[0]) for line in lines[1:]}) == 1  # columns are in line
  for line, one in zip(lines[1:], four, strict=True):
    for row in one['lengths']:
      assert f'{row["nats_per_token"]:.3f}' in line


def test_a_name_says_what_is_not_as_trained(four):
  causal, blockwise = four[:2]
  yarn = {**causal, 'encoding_override': 'yarn:scale=4'}

  assert report.labels([causal]) == ['fire']
  assert report.labels([blockwise]) == ['fire blockwise']
  assert report.labels([causal, yarn]) == ['fire', 'fire yarn:scale=4']
  assert report.labels([yarn, blockwise]) == ['fire yarn:scale=4 causal', 'fire blockwise']
  assert report.labels([{**causal, 'mask': 'full'}]) == ['fire']
  assert report.unit(causal) == 'nats per token'
  assert report.unit({**causal, 'objective': 'masked'}) == 'nats per masked token'


def test_a_plot_has_a_colour_a_run_and_a_style_a_mask(four, tmp_path, monkeypatch):
  figures = []
  monkeypatch.setattr(
    'matplotlib.figure.Figure.savefig', lambda figure, path, **_: figures.append(figure)
  )

  plot.lengths(four, tmp_path / 'four.png')

  by_length, by_position = figures[0].axes
  looks = [(line.get_color(), line.get_linestyle()) for line in by_position.lines[:4]]
  assert len(set(looks)) == 4
  assert len({color for color, _ in looks}) == len({style for _, style in looks}) == 2
  assert looks[0][0] == looks[1][0] and looks[0][1] == looks[2][1]
  (legend,) = figures[0].legends
  assert [text.get_text() for text in legend.get_texts()] == [
    *('fire causal', 'fire blockwise', 'rope causal', 'rope blockwise', 'trained at 32')
  ]
  figures[0].draw_without_rendering()
  for axes in (by_length, by_position):
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())


def test_a_plot_tells_more_runs_apart_than_there_are_named_colours(fire_report):
  reports = [{**fire_report, 'run': str(number)} for number in range(30)]

  assert len({look['color'] for look in plot.looks(reports)}) == 30


def test_runs_are_named_by_as_much_of_their_paths_as_tells_them_apart():
  paths = [pathlib.Path(path) for path in ('runs/a/rope', 'runs/b/rope', 'runs/a/fire', 'x/../y')]

  assert comparison.names(paths) == ['a/rope', 'b/rope', 'fire', 'y']
  assert comparison.names([pathlib.Path('runs/a/rope')]) == ['rope']
  assert comparison.names([pathlib.Path('.')]) == [pathlib.Path.cwd().name]


def test_files_are_named_after_what_is_compared():
  def name(runs, **fields):
    asked = request(**fields)
    common = command._file_name(runs, asked, command._how(asked))
    return '_'.join([common, *command._otherwise(asked, request())])

  assert name(['fire', 'rope']) == 'fire_rope_same_tokens'
  assert name([]) == 'same_tokens'
  assert name(['a/rope', 'b/rope'], masks=('causal', 'window:128')) == (
    'a-rope_b-rope_causal_window-128_same_tokens'
  )
  assert name([], stride=8, protocol='windows') == 'windows_stride-8'
  assert name([], split='train') == 'train_same_tokens'
  assert name(['a', 'b'], documents='pg19', split='test') == 'a_b_pg19-test_same_tokens'
  globs = [name([], documents='text', files=f'books/{part}/*.gz') for part in ('x', 'y')]
  assert [re.sub('-[0-9a-f]{8}_', '_', one) for one in globs] == [
    f'text-books-{part}-.gz_same_tokens' for part in ('x', 'y')
  ]
  assert len({name([], documents='text', files=glob) for glob in ('x*', 'x?', 'x[1]', 'x1')}) == 4
  assert name(['runs/a/fire']) == 'runs-a-fire_same_tokens'
  assert name(['../a/fire', 'gs://b/rope']) == '..-a-fire_gs-b-rope_same_tokens'
  assert len(name([], documents='text', files='x' * 5000)) < 150
  assert name([], lengths=(64, 128)) == 'same_tokens_lengths-64-128'
  assert name([], max_tokens=9, attention='chunked') == 'same_tokens_tokens-9_attention-chunked'
  override = 'yarn:scale=4,train_length=32'
  assert name([], encodings=(override,)) == 'yarn-scale-4-train_length-32_same_tokens'


def test_the_command_compares_runs_and_masks_and_says_where_it_wrote(
  workdir, rope_workdir, tmp_path
):
  arguments = [f'--workdir={workdir},{rope_workdir}', f'--output={tmp_path}', '--max_tokens=256']

  status, stdout, stderr = tiny.run_command(
    'lex_fire.evaluate', *arguments, '--lengths=32,64', '--mask=causal,window:8'
  )

  assert status == 0, stderr
  file = tmp_path / 'fire_rope_causal_window-8_same_tokens_lengths-32-64_tokens-256.json'
  reports = json.loads(file.read_text())['runs']
  assert [(one['run'], one['mask']) for one in reports] == [
    *(('fire', 'causal'), ('fire', 'window:8'), ('rope', 'causal'), ('rope', 'window:8'))
  ]
  # of 256 at most, 64 of each of the 3 documents
  title = 'nats per token by length (same_tokens, 192 tokens of 3 documents), validation of text'
  assert f'{title} {reports[0]["files"]}\n{report.table(reports)}\nwritten: ' in stdout
  assert 'attention at 64: reference, 64 x 64 logits are at most 16384 on cpu\n' in stdout
  assert sorted(tmp_path.iterdir()) == [file.with_suffix(end) for end in ('.csv', '.json', '.png')]


# Progress


def test_progress_is_told_of_every_token_of_every_case(rope_workdir):
  told = []
  asked = request(
    (32,), max_tokens=96, encodings=('as_trained', 'nope'), masks=('causal', 'window:4')
  )

  evaluate.evaluate(rope_workdir, asked, lambda *what: told.append(what), 'run')

  names = ('run causal', 'run window:4', 'run nope causal', 'run nope window:4')
  assert told == [(name, 32, 96) for name in names]


def test_the_time_left_covers_all_cases_lengths_and_tokens_read_again(monkeypatch, capsys):
  now = [0.0]
  monkeypatch.setattr(command.time, 'monotonic', lambda: now[0])
  text = [np.arange(3, 103)]
  budget = {'eos_id': 1, 'max_tokens': 100, 'tokens_per_document': 100}
  progress = command.Progress(4, protocols.same_tokens(text, (10, 20), stride=5, **budget))

  for case, seconds in (('rope causal', 1.0), ('rope blockwise', 10.0)):
    now[0] = seconds
    progress(case, 20, 340)

  # At length 10 a document of 100 tokens makes 1 + 90 / 5 windows, at 20 1 + 80 / 5: 530 tokens
  # are read in each of 4 cases, 680 of them in 10 seconds; the first came too soon to be shown.
  assert capsys.readouterr().out == 'rope blockwise at 20: 68 tokens/s, ETA 0:21\n'


def test_an_encoding_that_learns_other_numbers_of_the_same_shape_is_refused():
  run = tiny.config({}, 'kerple_log', evaluate={'encodings': ('kerple_power',)})

  with pytest.raises(errors.UserError, match="'kerple_power' does not take the parameters"):
    comparison.cases(run)
