"""Tests `../experiments/arithmetic/run.py`: what is asked, and when an answer is right."""

import dataclasses
import functools
import json
import string

import numpy as np
import pytest
import tiny

from experiments import sweep_results
from experiments.arithmetic import run as arithmetic
from lex_fire import errors, generate, sampling, train
from lex_fire.data import algorithms, draws, positions, reading
from lex_fire.data import text as text_lib

pytest.importorskip('seqio')
every_scale = pytest.mark.parametrize('scale', arithmetic.SCALES.values(), ids=arithmetic.SCALES)
TINY = arithmetic.Scale(
  2,
  {
    'model': tiny.MODEL,
    'data': {'batch_size': 8},
    'optimizer': {'warmup_steps': 1},
    'train': {'steps': 2, 'checkpoint_every': 2, 'validation_windows': 8},
  },
  questions=3,
)


def codec(config):
  return text_lib.codec(config.data.spec())


@every_scale
def test_every_run_has_a_config_of_its_own_with_positions_for_the_longest_questions(scale):
  configs = [
    arithmetic.config(scale, variant, seed)
    for variant in arithmetic.VARIANTS.values()
    for seed in (0, 1)
  ]

  asked = arithmetic.rows(scale._replace(questions=1), codec(configs[0]))

  assert len(set(configs)) == 4 * len(arithmetic.ENCODINGS)
  longest = max(of_length.tokens_WL.shape[1] for of_length in asked.values())
  for config in configs:
    assert config.data.position_range == 0 or config.data.position_range >= longest
  drawn = [bool(config.data.position_range) for config in configs]
  assert drawn == [False, False, True, True] * len(arithmetic.ENCODINGS)


@every_scale
def test_rows_are_questions_with_their_answers_at_every_multiple(scale):
  config = arithmetic.config(scale, arithmetic.Variant('nope', False), 0)
  asked = arithmetic.rows(scale._replace(questions=2), codec(config))

  assert list(asked) == [int(multiple * scale.digits) for multiple in algorithms.MULTIPLES]
  for digits, of_length in asked.items():
    assert len(of_length.tokens_WL) == 2
    for tokens_L in of_length.tokens_WL:
      assert tokens_L[0] == tokens_L[-1] == codec(config).eos_id
      question, answer = (
        ''.join(chr(token - 3) for token in part_L)
        for part_L in np.split(tokens_L[1:-1], [of_length.answer - 1])
      )
      assert question.endswith('=' + reading.SEPARATOR)
      left, right, total = (
        int(''.join(filter(string.digits.__contains__, text))[::-1])
        for text in (*question.split('+'), answer)
      )
      assert left + right == total and len(answer) == 2 * (digits + 1)


@pytest.fixture(scope='module')
def untrained():
  config = arithmetic.config(TINY, arithmetic.Variant('rope', False), 0)
  params = functools.partial(train.init, config)()['params']
  return config, train.make_model(config), params


def test_an_answer_is_right_if_it_is_what_the_model_writes(untrained):
  config, transformer, params = untrained
  asked = arithmetic.rows(TINY, codec(config))[4]
  prompts, room = asked.tokens_WL[:, : asked.answer], asked.tokens_WL.shape[1] - asked.answer
  written = generate.generate(
    transformer, params, list(prompts), max_tokens=room, sampling=sampling.GREEDY
  )

  own = np.concatenate([prompts, np.stack(written)], axis=1).astype(np.int32)
  early, late = own.copy(), own.copy()
  early[0, asked.answer] ^= 1
  late[1, -1] ^= 1

  for tokens_WL, expected in (
    (own, [True, True, True]),
    (early, [False, True, True]),
    (late, [True, False, True]),
    (asked.tokens_WL, [False, False, False]),
  ):
    found = arithmetic.right(transformer, params, asked._replace(tokens_WL=tokens_WL), config.data)
    assert found.tolist() == expected


def test_drawn_positions_are_those_of_a_row_of_training_until_a_question_is_longer():
  data = arithmetic.config(TINY, arithmetic.Variant('fire', True), 0).data
  counted = {
    'inputs_BL': np.zeros((1, data.length), np.int32),
    'position_BL': None,
  }
  of_training = positions.randomize(counted, data.position_range, seed=draws.JUDGE, ordinal=3)

  short, row, long = (
    arithmetic.position(data, length, 3)[0] for length in (10, data.length, data.length + 50)
  )

  np.testing.assert_array_equal(row, of_training['position_BL'][0])
  np.testing.assert_array_equal(short, row[:10])
  assert (np.diff(long) > 0).all() and long[-1] < data.position_range
  assert arithmetic.position(data, 10, 4)[0].tolist() != short.tolist()


def test_answers_are_judged_at_the_positions_of_their_batch(untrained):
  """What a model says last at drawn positions is right there, in every batch, and not elsewhere."""
  _, transformer, params = untrained
  data = arithmetic.config(TINY, arithmetic.Variant('rope', True), 0).data
  count, length = arithmetic.ROWS + 3, 24
  tokens_WL = np.random.default_rng(0).integers(3, 259, (count, length + 1)).astype(np.int32)
  for start in (0, arithmetic.ROWS):
    batch = slice(start, start + arithmetic.ROWS)
    position_1L = arithmetic.position(data, length, start // arithmetic.ROWS)
    logits_BLV = transformer.apply({'params': params}, tokens_WL[batch, :-1], position_1L)
    tokens_WL[batch, -1] = np.asarray(logits_BLV[:, -1].argmax(axis=-1))
  asked = arithmetic.Rows(tokens_WL, answer=length)

  assert arithmetic.right(transformer, params, asked, data).tolist() == [True] * count
  counted = dataclasses.replace(data, position_range=0)
  assert not arithmetic.right(transformer, params, asked, counted).all()


def test_the_sweep_measures_what_is_left_and_shows_it(tmp_path, monkeypatch):
  trained, train_as_ever = [], train.train

  def train_and_tell(config, workdir):
    trained.append(workdir.name)
    return train_as_ever(config, workdir)

  monkeypatch.setattr(train, 'train', train_and_tell)
  monkeypatch.setattr(
    arithmetic,
    'VARIANTS',
    {name: arithmetic.VARIANTS[name] for name in ('nope', 'nope, randomized')},
  )
  scale = TINY._replace(
    sections={
      **TINY.sections,
      'data': {
        'task': 'addition:length=2,hints=true,count=40,held_out=10',
        **{'batch_size': 8, 'directory': str(tmp_path / 'data')},
      },
    }
  )
  path = tmp_path / 'measured.jsonl'

  text = arithmetic.run(scale, (0,), path, tmp_path / 'runs')
  again = arithmetic.run(scale, (0,), path, tmp_path / 'runs')

  assert trained == ['nope-0', 'nope_randomized-0']
  assert again == text == path.with_suffix('.txt').read_text()
  lines = sweep_results.read(path)
  for line in lines:
    assert [at['length'] for at in line['lengths']] == [2 * m for m in algorithms.MULTIPLES]
  assert 'right answers to 3 questions a length, in percent' in text
  assert path.with_suffix('.png').stat().st_size > 10_000
  assert len(lines) == 2


def test_lines_of_another_task_are_not_taken_for_those_of_this(tmp_path):
  path = tmp_path / 'laptop.jsonl'
  line = {'variant': 'fire', 'seed': 0, 'protocol': 'addition:length=10,hints=true'}
  path.write_text(json.dumps(line) + '\n')

  message = r'has lines of addition:length=10,hints=true, but this scale asks addition:length=2,.*;'
  with pytest.raises(errors.UserError, match=message):
    arithmetic.run(TINY, (0,), path, tmp_path / 'runs')

  assert not (tmp_path / 'runs').exists()
