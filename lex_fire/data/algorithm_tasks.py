"""Tasks of the algorithms of `algorithms`, whose examples are made as they are read.

    addition:length=20,hints=true,count=50000,seed=0

Options: `length`, the longest in training, `hints`, `lengths`, `zeros` and `seed` as
algorithms.examples has them; `count`, the examples of split train; `held_out`, those of validation
and of test each. Test takes algorithms.MULTIPLES of the length in turn.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lex_fire import errors, scores
from lex_fire.data import algorithms, generated, questions, vocabularies
from lex_fire.data import examples as examples_lib
from lex_fire.data.spec import Spec

if TYPE_CHECKING:
  import seqio


def question(spec: Spec) -> questions.Question:
  """Returns what the questions of a specification have in common.

  Raises:
    errors.UserError: for options that are unknown or wrong.
  """
  _, asked = _asked(spec)
  longest = _examples(spec.base, asked, 'test', 0, len(algorithms.MULTIPLES))
  # All answers of a length are equally long, and of these examples one has the largest. A character
  # is a byte, or a token of the vocabulary `latin`.
  answer = max(len(example.references[0]) for example in longest)
  return questions.Question((scores.accuracy,), answer, ('length',), 'test')


def task(spec: Spec) -> seqio.Task:
  """Returns the Task of a specification.

  Raises:
    errors.UserError: if there are files, for options that are unknown or wrong, or as
      vocabularies.load does.
  """
  spec.refuse_files()
  counts, asked = _asked(spec)
  make = functools.partial(_examples, spec.base, asked)
  source = functools.partial(generated.source, counts, make, {'length': int})
  name = '_'.join(map(str, [spec.base, *counts.values(), *asked.values(), algorithms.VERSION]))
  return questions.add(name, spec, question(spec), source, dict)


def options(spec: Spec) -> dict[str, Any]:
  """Returns the options of a specification.

  Raises:
    errors.UserError: for one that is unknown or of another type.
  """
  return spec.options(
    length=20, hints=False, lengths='uniform', zeros=0.0, count=50_000, held_out=1000, seed=0
  )


def _asked(spec: Spec) -> tuple[dict[str, int], dict[str, Any]]:
  """Returns the number of examples by split, and options for algorithms.examples, all checked."""
  made = options(spec)
  train, held_out = made.pop('count'), made.pop('held_out')
  counts = {split: train if split == 'train' else held_out for split in examples_lib.SPLITS}
  for split, count in counts.items():
    _examples(spec.base, made, split, 0, count)  # refuses what is wrong; makes none yet
  hints = ring(spec, made)
  if spec.vocabulary != vocabularies.LATIN.name and not hints.isascii():
    raise errors.UserError(
      f'the {len(hints)} index hints of {spec.name!r} are no tokens of vocabulary '
      f'{spec.vocabulary!r}; use {vocabularies.LATIN.name!r}, a shorter length, or no hints'
    )
  return counts, made


def ring(spec: Spec, asked: dict[str, Any]) -> str:
  """Returns the index hints of all that is asked; '': there are none."""
  return algorithms.ALGORITHMS[spec.base].markers(asked['length']) if asked['hints'] else ''


def _examples(
  name: str, options: dict[str, Any], split: str, start: int, stop: int
) -> Iterator[examples_lib.Example]:
  """Makes the examples of a split from number `start` to before `stop`."""
  return algorithms.examples(name, split, count=stop - start, start=start, **options)


TASKS = dict.fromkeys(algorithms.ALGORITHMS, task)
QUESTIONS = dict.fromkeys(algorithms.ALGORITHMS, question)
