"""Tests `../lex_fire/evaluate.py` and `plot.py`: the numbers against ones computed another way."""

import csv
import json
import math
import pathlib

import numpy as np
import pytest
import tiny

from lex_fire import config as config_lib
from lex_fire import errors, evaluate, train
from lex_fire.data import protocols

LENGTHS = (32, 64, 128)


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  data = tiny.write_corpus(tmp_path_factory.mktemp('corpus'))
  workdir = tmp_path_factory.mktemp('runs') / 'fire'
  train.train(tiny.config(data), workdir)
  return workdir


@pytest.fixture(scope='module')
def learned_workdir(workdir, tmp_path_factory):
  fields = json.loads((workdir / 'config.json').read_text())['data']
  config = tiny.config(fields, 'learned', encoding={'max_length': 64}, train={'steps': 3})
  out = tmp_path_factory.mktemp('runs') / 'learned'
  train.train(config, out)
  return out


@pytest.fixture(scope='module')
def report(workdir):
  return evaluate.evaluate(workdir)


def losses_by_hand(workdir, protocol, length, max_tokens):
  """Scores windows one by one with a float64 softmax of the model's logits: {document: losses}."""
  config = evaluate.checkpoint.read_config(workdir)
  transformer = train.make_model(config)
  _, params = evaluate._restore(config, workdir, evaluate.sharding.make_mesh())
  validation = config.data.validation_files.replace('*', '{}')
  texts = [pathlib.Path(validation.format(part)).read_bytes() for part in range(3)]
  by_document = {}
  task = evaluate.tasks.get_task('text', {'validation': config.data.validation_files})
  request = config_lib.EvaluateConfig(LENGTHS, protocol, max_tokens)
  cut = evaluate._windows(task, request)[length]
  for inputs_L, targets_L, document in zip(*cut, strict=True):
    text = bytes((targets_L[targets_L > 2] - 3).astype(np.uint8))  # ids are bytes + 3
    assert any(text in whole for whole in texts)
    logits_LV = np.asarray(transformer.apply({'params': params}, inputs_L[None])[0], np.float64)
    log_norm_L = np.log(np.exp(logits_LV).sum(axis=1))
    loss_L = log_norm_L - logits_LV[np.arange(length), targets_L]
    by_document.setdefault(int(document), []).append(loss_L)
  return {document: np.concatenate(parts) for document, parts in by_document.items()}


@pytest.mark.parametrize('protocol', sorted(protocols.PROTOCOLS))
def test_losses_and_standard_errors_equal_those_computed_window_by_window(workdir, protocol):
  report = evaluate.evaluate(workdir, config_lib.EvaluateConfig(LENGTHS, protocol, 1024))

  for row in report['lengths']:
    by_document = losses_by_hand(workdir, protocol, row['length'], 1024)
    loss_Z = np.concatenate(list(by_document.values()))
    assert row['tokens'] == loss_Z.size
    assert row['nats_per_token'] == pytest.approx(loss_Z.mean(), abs=1e-5)
    assert row['perplexity'] == pytest.approx(math.exp(loss_Z.mean()), rel=1e-4)
    # the variance of a ratio of sums over independent documents
    excess = [(losses - loss_Z.mean()).sum() for losses in by_document.values()]
    count = len(excess)
    expected = math.sqrt(count / (count - 1) * sum(x**2 for x in excess)) / loss_Z.size
    assert row['standard_error'] == pytest.approx(expected, abs=1e-5)


def test_the_change_has_the_standard_error_of_paired_differences(workdir):
  request = config_lib.EvaluateConfig(LENGTHS, 'same_tokens', 1024)
  change = evaluate.evaluate(workdir, request)['change']

  short, long = (losses_by_hand(workdir, 'same_tokens', length, 1024) for length in (32, 128))
  difference_Z = np.array([(long[document] - short[document]).sum() for document in short])
  tokens_Z = np.array([losses.size for losses in short.values()])
  mean = difference_Z.sum() / tokens_Z.sum()
  excess_Z = difference_Z - mean * tokens_Z
  count = len(excess_Z)
  expected = math.sqrt(count / (count - 1) * (excess_Z**2).sum()) / tokens_Z.sum()
  assert (change['from'], change['to']) == (32, 128)
  assert change['nats_per_token'] == pytest.approx(mean, abs=1e-5)
  assert change['standard_error'] == pytest.approx(expected, abs=1e-6)


def test_other_tokens_at_each_length_give_no_paired_error(workdir):
  request = config_lib.EvaluateConfig((32, 128), 'windows', 160)

  assert evaluate.evaluate(workdir, request)['change']['standard_error'] is None


def test_same_tokens_scores_equally_many_tokens_at_each_length(report):
  assert report['protocol'] == 'same_tokens'
  assert [row['length'] for row in report['lengths']] == list(LENGTHS)
  assert len({row['tokens'] for row in report['lengths']}) == 1


def test_the_report_says_what_was_evaluated_and_how(report):
  assert report['checkpoint_step'] == 12
  assert report['encoding']['name'] == 'fire'
  assert report['encoding']['threshold'] == 512.0
  assert report['mask'] == 'causal'
  assert report['tokenizer'] == 'bytes'
  assert (report['train_length'], report['task'], report['split']) == (32, 'text', 'validation')
  assert report['documents'] == 3


def test_loss_by_position_averages_to_the_loss_of_the_longest_windows(report):
  buckets = report['positions']

  assert [bucket['from'] for bucket in buckets] == [0, 16, 32, 64]
  assert [bucket['to'] for bucket in buckets] == [16, 32, 64, 128]
  total = sum((bucket['to'] - bucket['from']) * bucket['nats_per_token'] for bucket in buckets)
  assert total / 128 == pytest.approx(report['lengths'][-1]['nats_per_token'], abs=1e-5)


def test_bytes_per_token_make_bits_per_byte(report):
  for row in report['lengths']:
    # one token is one byte, but for EOS, and no window of these documents holds one
    assert row['bits_per_byte'] == pytest.approx(row['nats_per_token'] / math.log(2), rel=1e-6)


def test_json_csv_and_a_plot_are_written(report, tmp_path):
  other = {**report, 'run': 'other'}

  paths = evaluate.write([report, other], tmp_path, 'both')

  assert [path.name for path in paths] == ['both.json', 'both.csv', 'both.png']
  assert json.loads(paths[0].read_text())['runs'] == [report, other]
  with paths[1].open() as file:
    rows = list(csv.DictReader(file))
  assert [row['run'] for row in rows] == ['fire'] * 3 + ['other'] * 3
  assert float(rows[0]['nats_per_token']) == report['lengths'][0]['nats_per_token']
  assert paths[2].read_bytes().startswith(b'\x89PNG')
  assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_the_table_has_a_row_a_run_and_the_change_to_the_longest(report):
  lines = evaluate.table([report]).splitlines()

  assert lines[0].split() == ['run', '32', '64', '128', 'change']
  values = [row['nats_per_token'] for row in report['lengths']]
  assert lines[1].split() == [
    'fire',
    *(f'{value:.3f}' for value in values),
    f'{values[-1] - values[0]:+.3f}',
    f'+-{report["change"]["standard_error"]:.3f}',
  ]


def test_progress_is_told_of_every_token(workdir):
  told = []

  evaluate.evaluate(
    workdir,
    config_lib.EvaluateConfig((32,), 'windows', 96),
    lambda length, tokens: told.append(tokens),
  )

  assert sum(told) == 96


def test_a_length_past_a_learned_table_is_refused_before_any_work(learned_workdir):
  with pytest.raises(errors.UserError, match='length=128 is past the 64 positions'):
    evaluate.evaluate(learned_workdir, config_lib.EvaluateConfig((32, 128), 'same_tokens', 512))


@pytest.mark.parametrize('lengths', [(), (0,), (32, 32)])
def test_lengths_that_make_no_sense_are_refused(lengths):
  with pytest.raises(errors.UserError, match='lengths='):
    config_lib.EvaluateConfig(lengths, 'windows', 512)
