"""Tests of `lex_fire/data/spec.py`: the names of Tasks, their options, and the arguments."""

import argparse
import re

import pytest

from lex_fire import errors
from lex_fire.data.spec import Spec, define_arguments, of_arguments

DEFAULTS = {'length': 10, 'rate': 0.5, 'hints': False, 'style': 'plain'}


def test_options_have_the_types_of_their_defaults():
  found = Spec('sort:length=20,rate=2.5,hints=true,style=a b').options(**DEFAULTS)

  assert found == {'length': 20, 'rate': 2.5, 'hints': True, 'style': 'a b'}


def test_options_that_are_not_given_keep_their_defaults():
  assert Spec('sort').options(**DEFAULTS) == DEFAULTS
  assert Spec('sort:').options(**DEFAULTS) == DEFAULTS
  assert Spec('sort:hints=False,').options(**DEFAULTS) == DEFAULTS


def test_the_base_of_a_name_has_no_options():
  assert Spec('sort:length=20').base == Spec('sort').base == 'sort'


@pytest.mark.parametrize('part', ['size=3', 'length', 'lengths=3'])
def test_an_unknown_option_is_refused_with_the_known(part):
  message = f"task 'sort:{part}' has no option '{part}'; known: length, rate, hints, style"
  with pytest.raises(errors.UserError, match=re.escape(message)):
    Spec(f'sort:{part}').options(**DEFAULTS)


def test_a_task_without_options_says_so():
  with pytest.raises(errors.UserError, match="has no option 'a=1'; known: none"):
    Spec('c4:a=1').options()


@pytest.mark.parametrize(
  ('part', 'message'),
  [
    ('length=2.5', "length=2.5 of task 'sort' must be of type int, as in length=10"),
    ('length=ten', 'length=ten .* must be of type int'),
    ('length=', 'length= .* must be of type int'),
    ('length=True', 'length=True .* must be of type int'),
    ('rate=1', 'rate=1 .* must be of type float, as in rate=0.5'),
    ('hints=1', 'hints=1 .* must be of type bool, as in hints=False'),
  ],
)
def test_a_value_of_another_type_is_refused(part, message):
  with pytest.raises(errors.UserError, match=message):
    Spec(f'sort:{part}').options(**DEFAULTS)


def test_files_are_refused_where_they_have_no_use():
  Spec('c4').refuse_files()
  with pytest.raises(errors.UserError, match=r"task 'c4' takes no files, not \{'train': 'x'\}"):
    Spec('c4:a=1', files={'train': 'x'}).refuse_files()


def parse(*arguments, split='train'):
  parser = argparse.ArgumentParser()
  define_arguments(parser)
  return of_arguments(parser.parse_args([f'--split={split}', *arguments]), 't5')


def test_the_arguments_of_a_command_make_a_specification():
  assert parse('--task=stdlib') == Spec('stdlib', 't5')
  assert parse('--task=c4', '--tfds_directory=/d') == Spec('c4', 't5', None, '/d')
  assert parse('--task=text', '--train_files=a*') == Spec('text', 't5', {'train': 'a*'})


@pytest.mark.parametrize(
  'arguments, split',
  [
    ([], 'train'),
    (['--train_files=a*'], 'validation'),
    (['--train_files=a*', '--validation_files=b*'], 'test'),
  ],
)
def test_files_of_a_split_that_are_not_given_are_asked_for_by_their_flag(arguments, split):
  message = (
    f"task 'jsonl' has no files of --split={split}; give --train_files=GLOB or "
    '--validation_files=GLOB, and the split of that name'
  )
  with pytest.raises(errors.UserError, match=re.escape(message)):
    parse('--task=jsonl', *arguments, split=split)
