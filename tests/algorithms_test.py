"""Tests of `lex_fire/data/algorithms.py`, and of the splits and addresses of `examples.py`."""

import itertools
import math
import re

import numpy as np
import pytest

from lex_fire import errors
from lex_fire.data import algorithms, vocabularies
from lex_fire.data import examples as examples_lib

NAMES = sorted(algorithms.ALGORITHMS)
every_algorithm = pytest.mark.parametrize('name', NAMES)
both_ways = pytest.mark.parametrize('hints', [False, True])


def make(name, split='train', *, length=6, count=20, seed=0, **options):
  return list(algorithms.examples(name, split, length=length, count=count, seed=seed, **options))


def bare(text):
  return re.sub('[^a-z0-9+=]', '', text)


def solve(name, question):
  """The answer by Python's own means; a sum is padded to one digit more than its numbers."""
  operands = question.removesuffix('=').split('+')
  if name == 'addition':
    total = sum(int(digits[::-1]) for digits in operands)
    return str(total).zfill(len(operands[0]) + 1)[::-1]
  (symbols,) = operands
  return {
    'copy': symbols,
    'reverse': ''.join(reversed(symbols)),
    'sort': ''.join(sorted(symbols)),
    'parity': str(symbols.count('1') & 1),
  }[name]


def marked(text):
  """The (marker, symbol) pairs of a text."""
  return re.findall('([^a-z0-9+=]+)([a-z0-9])', text)


@every_algorithm
@both_ways
@pytest.mark.parametrize('split', examples_lib.SPLITS)
def test_answers_are_right_with_and_without_hints(name, hints, split):
  for example in make(name, split, count=50, hints=hints):
    (answer,) = example.references
    assert bare(answer) == solve(name, bare(example.inputs))


@every_algorithm
def test_a_symbol_is_a_byte_and_the_length_counts_the_symbols_of_an_operand(name):
  for example in make(name, count=50):
    operands = example.inputs.removesuffix('=').split('+')
    assert [len(operand.encode()) for operand in operands] == [example.facts['length']] * len(
      operands
    )


@every_algorithm
@pytest.mark.parametrize('split', examples_lib.SPLITS)
def test_hints_change_nothing_but_the_markers(name, split):
  hinted, plain = (make(name, split, hints=hints) for hints in (True, False))

  for one, other in zip(hinted, plain, strict=True):
    assert bare(one.inputs) == other.inputs
    assert tuple(map(bare, one.references)) == other.references
    assert (one.id, one.facts) == (other.id, other.facts)


# A ring has no more than the places of 8 times the length and, of a sum, a carry.
ASCII = 'ABCDEFGHIJKLMNOPQRSTUVWXYZ!"#$%&\'()*,-./:;<>?@[\\]^_`{|}~'
LATIN = ''.join(map(chr, [*range(0xA1, 0xAD), *range(0xAE, 0x250)]))


@every_algorithm
@pytest.mark.parametrize('length', [6, 20])
def test_every_symbol_follows_a_marker_and_markers_follow_their_order(name, length):
  ring = (ASCII + LATIN)[: 8 * length + (name == 'addition')]
  for example in make(name, length=length, count=50, hints=True):
    for text in (*example.inputs.removesuffix('=').split('+'), *example.references):
      assert re.fullmatch('([^a-z0-9+=][a-z0-9])+', text)
    for operand in example.inputs.removesuffix('=').split('+'):
      markers = [marker for marker, _ in marked(operand)]
      first = ring.index(markers[0])
      assert markers == [ring[(first + place) % len(ring)] for place in range(len(markers))]


@pytest.mark.parametrize('name', ['copy', 'reverse', 'sort'])
def test_a_symbol_of_the_answer_bears_the_marker_that_it_has_in_the_question(name):
  for example in make(name, length=20, count=50, hints=True):
    question, answer = marked(example.inputs), marked(example.references[0])
    assert sorted(question) == sorted(answer)
    if name == 'sort':
      places = {marker: place for place, (marker, _) in enumerate(question)}
      keys = [(symbol, places[marker]) for marker, symbol in answer]
      assert keys == sorted(keys)


def test_a_digit_of_a_sum_bears_the_marker_of_its_place():
  for example in make('addition', count=50, hints=True):
    left, right = (marked(operand) for operand in example.inputs.split('+'))
    answer = marked(example.references[0])
    markers = [marker for marker, _ in answer]
    assert [marker for marker, _ in left] == [marker for marker, _ in right] == markers[:-1]
    ring = algorithms.ALGORITHMS['addition'].markers(6)
    assert ring.index(markers[-1]) == (ring.index(markers[-2]) + 1) % len(ring)


def test_a_parity_bears_the_marker_of_the_last_bit():
  for example in make('parity', hints=True):
    assert marked(example.references[0])[0][0] == marked(example.inputs)[-1][0]


def test_short_questions_show_every_marker_and_every_step_to_the_next():
  seen = set()
  for example in make('copy', length=5, count=4000, hints=True):
    seen |= set(itertools.pairwise(marker for marker, _ in marked(example.inputs)))

  ring = algorithms.ALGORITHMS['copy'].markers(5)
  assert seen == set(zip(ring, (*ring[1:], ring[0]), strict=True))


@every_algorithm
@pytest.mark.parametrize('length', [2, 6, 20, 60])
def test_each_place_has_a_marker_of_its_own_of_one_character_that_is_no_symbol(name, length):
  algorithm = algorithms.ALGORITHMS[name]
  ring = algorithm.markers(length)

  assert len(set(ring)) == len(ring) == 8 * length + (name == 'addition')
  assert not set(ring) & {*algorithm.alphabet, '+', '='}
  assert ring.isprintable() and max(map(ord, ring)) < vocabularies.LATIN.size - 3
  assert ring.isascii() == (length <= 6)


@every_algorithm
def test_training_has_all_lengths_up_to_the_longest_and_evaluation_its_multiples(name):
  train = [example.facts['length'] for example in make(name, length=5, count=1000)]
  test = [example.facts['length'] for example in make(name, 'test', length=5, count=10)]

  for length in range(1, 6):
    assert train.count(length) == pytest.approx(200, abs=60)
  assert set(train) == {1, 2, 3, 4, 5}
  assert test == [2, 5, 10, 25, 40] * 2


@every_algorithm
def test_short_questions_come_more_often_where_lengths_are_log_uniform(name):
  train, validation = (
    [example.facts['length'] for example in make(name, split, count=2000, lengths='log_uniform')]
    for split in ('train', 'validation')
  )

  for drawn in (train, validation):
    for length in range(1, 7):
      share = math.log((length + 1) / length) / math.log(7)
      assert drawn.count(length) == pytest.approx(2000 * share, abs=100)
    assert set(drawn) == {1, 2, 3, 4, 5, 6}
  assert make(name, 'test', lengths='log_uniform') == make(name, 'test')


def test_digits_of_the_second_number_are_zeros_in_training_and_what_they_may_be_in_tests():
  for split in examples_lib.SPLITS:
    made = make('addition', split, length=20, count=400, zeros=0.5, hints=True)
    for place, share in enumerate((0.1, 0.1 if split == 'test' else 0.55)):
      digits = ''.join(bare(example.inputs)[:-1].split('+')[place] for example in made)
      assert digits.count('0') / len(digits) == pytest.approx(share, abs=0.03)
    for example in made:
      assert bare(example.references[0]) == solve('addition', bare(example.inputs))


@pytest.mark.parametrize(('name', 'zeros'), [('addition', 1.0), ('addition', -0.1), ('copy', 0.5)])
def test_zeros_of_no_share_or_of_no_second_number_are_refused(name, zeros):
  with pytest.raises(errors.UserError, match=f'zeros={zeros} must be from 0 to below 1 for a sum'):
    make(name, zeros=zeros)


def test_unknown_lengths_are_refused_with_the_known():
  with pytest.raises(errors.UserError, match="lengths='short'; known: uniform, log_uniform"):
    make('copy', lengths='short')


@every_algorithm
@pytest.mark.parametrize('split', examples_lib.SPLITS)
def test_a_part_of_a_split_is_made_alone_as_in_the_whole(name, split):
  whole = make(name, split, count=12)

  parts = [make(name, split, start=start, count=4) for start in (0, 4, 8)]

  assert sum(parts, []) == whole
  assert len({example.id for example in whole}) == 12


@every_algorithm
def test_examples_depend_on_the_seed_and_differ_within_a_split(name):
  first, again, other = (make(name, 'test', length=40, seed=seed) for seed in (0, 0, 1))

  questions = {example.inputs for example in first}
  assert first == again
  assert len(questions) == len(first)
  assert not questions & {example.inputs for example in other}


@both_ways
def test_no_question_is_in_two_splits_where_there_are_a_thousand_of_its_length(hints):
  """Parities of ten bits are 1024, so that nearly all of a split are met here."""
  questions = {
    split: {
      bare(example.inputs)
      for example in make('parity', split, length=10, count=3000, seed=seed, hints=hints)
      if example.facts['length'] == 10
    }
    for seed, split in enumerate(examples_lib.SPLITS)
  }

  train, validation, test = (questions[split] for split in examples_lib.SPLITS)
  assert not train & validation and not train & test and not validation & test
  assert len(validation) > 90 and len(test) > 90
  assert len(train) > 200


def test_short_questions_are_too_few_to_hold_any_out():
  short = [example.inputs for example in make('parity', length=9, count=3000)]

  assert {f'{a}{b}=' for a in '01' for b in '01'} <= set(short)
  assert not algorithms.ALGORITHMS['parity'].can_split(9)
  assert algorithms.ALGORITHMS['parity'].can_split(10)
  assert not algorithms.ALGORITHMS['addition'].can_split(1)


def test_splits_of_questions_are_about_six_eighths_and_one_each():
  splits = [examples_lib.split_of(str(number)) for number in range(8000)]

  assert splits.count('train') == pytest.approx(6000, abs=150)
  assert splits.count('validation') == pytest.approx(1000, abs=120)


def test_equal_addresses_alone_draw_equal_numbers():
  draws = [
    examples_lib.generator(*address).integers(2**60)
    for address in (('a', 1), ('a', np.int64(1)), ('a', '1'), ('a', 11), ('a1',), (1, 'a'))
  ]

  assert draws[0] == draws[1]
  assert len(set(draws)) == 5


def test_an_unknown_algorithm_is_refused_with_the_known():
  with pytest.raises(errors.UserError, match="unknown name 'median'; known: copy, reverse, sort"):
    make('median')


def test_an_unknown_split_is_refused_with_the_known():
  with pytest.raises(errors.UserError, match="no split 'dev'; it has: train, validation, test"):
    make('copy', 'dev')


def test_a_length_without_a_half_is_refused():
  with pytest.raises(errors.UserError, match='length=1 has no half'):
    make('copy', length=1)


def test_no_examples_are_refused():
  with pytest.raises(errors.UserError, match='count=0 is no number of examples'):
    make('copy', count=0)


@every_algorithm
def test_lengths_for_which_there_are_too_few_markers_are_refused(name):
  most = 60
  longest = make(name, 'test', length=most, count=5, hints=True)[-1]

  assert len(longest.inputs) == (2 if name == 'addition' else 1) * (16 * most + 1)
  with pytest.raises(errors.UserError, match=f'evaluated up to {8 * most + 8}.* at most {most},'):
    make(name, length=most + 1, hints=True)
  assert make(name, length=most + 1)
