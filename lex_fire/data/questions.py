"""Tasks of questions: how one is registered, and how its examples are read for evaluation.

An example of such a Task has
  'inputs', 'targets': tokens of the question, without EOS, and of a right answer, with EOS;
  'inputs_pretokenized', 'targets_pretokenized': their texts;
  'id': a text, in which '-' may stand before the number in a group of questions;
and facts, numbers or texts by which scores are broken down. The answer is '' where it is withheld,
as in the test split of a benchmark. Examples with one 'id' are one question with several right
answers. What a decoder reads between a question and its answer is reading.SEPARATOR.

A Task that the user has registered without `add` needs no 'id' and no texts, but metrics.

The metrics of `scores` are those of the Task too, so that seqio.Evaluator can judge by them; it
knows of one answer each, and of no groups.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lex_fire import errors, scores
from lex_fire.data import examples as examples_lib
from lex_fire.data import language, lazy, reading, vocabularies
from lex_fire.data.spec import Spec

if TYPE_CHECKING:
  import seqio
  import tensorflow as tf

_TEXTS = ('inputs_pretokenized', 'targets_pretokenized')
_NOT_FACTS = frozenset({'id', 'inputs', 'targets', *_TEXTS})

Tensors = dict[str, 'tf.Tensor']
OfGroups = Callable[[Sequence[str]], scores.Metric]


class Question(NamedTuple):
  """What the questions of a Task have in common.

  Attributes:
    metrics: by which answers are judged.
    answer_bytes: the most that an answer takes in UTF-8, or in tokens if these are its characters;
      there it may be cut when it is generated.
    facts: names of what scores are broken down by.
    split: to be asked, unless another is named.
    of_groups: each makes one more metric of the groups that answers belong to; questions are one
      group whose ids agree before their last '-'.
  """

  metrics: tuple[scores.Metric, ...]
  answer_bytes: int
  facts: tuple[str, ...] = ()
  split: str = 'validation'
  of_groups: tuple[OfGroups, ...] = ()

  def judges(self, ids: Sequence[str]) -> tuple[scores.Metric, ...]:
    """Returns all metrics, for answers to the questions of these ids in this order."""
    groups = [name.rpartition('-')[0] for name in ids]
    return (*self.metrics, *(make(groups) for make in self.of_groups))


_ADDED: dict[str, Question] = {}  # by the name that a Task has in seqio.TaskRegistry


def add(
  name: str,
  spec: Spec,
  question: Question,
  source: Callable[[], seqio.DataSource],
  render: Callable[[Tensors], Tensors],
) -> seqio.Task:
  """Returns a Task of questions, registered on the first call.

  Args:
    name: that no Task of other questions has.
    spec: of the Task; its vocabulary is that of inputs and targets.
    question: of the Task.
    source: makes what it reads.
    render: an example of the source -> 'id', 'inputs' and 'targets', scalars of tf.string, and the
      facts of `question`; in TensorFlow. If 'targets' is a vector, of all right answers, an example
      of the Task is made of each, and one of '' where there is none.

  Raises:
    errors.UserError: as vocabularies.load does.
  """
  seqio = lazy.seqio()
  vocabulary = vocabularies.load(spec.vocabulary)
  name = language.registry_name(f'{name}_{vocabularies.facts(vocabulary).name}')
  if name not in seqio.TaskRegistry.names():
    seqio.TaskRegistry.add(
      name,
      source=source(),
      preprocessors=[
        lambda dataset: _one_each(dataset.map(render)),
        seqio.preprocessors.tokenize,
        seqio.preprocessors.append_eos,
      ],
      output_features={
        'inputs': seqio.Feature(vocabulary, add_eos=False),
        'targets': seqio.Feature(vocabulary, add_eos=True),
      },
      metric_fns=list(question.metrics),
      postprocess_fn=_as_metrics_want,
    )
  _ADDED[name] = question
  return seqio.TaskRegistry.get(name)


def _one_each(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """Makes of an example with a vector of answers one of each, or one without if it is empty."""
  import tensorflow as tf

  made: Any = dataset.element_spec
  if made['targets'].shape.rank == 0:
    return dataset

  def one_each(example):
    answers = example['targets']
    found = tf.cond(tf.size(answers) > 0, lambda: answers, lambda: tf.constant(['']))
    of_each = tf.data.Dataset.from_tensor_slices(found)
    return of_each.map(lambda answer: {**example, 'targets': answer})

  return dataset.flat_map(one_each)


def of_registered(task: seqio.Task, split: str) -> Question:
  """Returns what the questions of a Task have in common that the user has registered.

  Of one that `add` has made it is what that was told. Of any other each example is a question with
  one answer; its metrics are its own, of targets and predictions after its postprocess_fn, which is
  given no example, and should be in percent; and answers may be as long as the longest right one of
  the split.

  Args:
    task: with inputs.
    split: to be asked.

  Raises:
    errors.UserError: if the Task has no such metric, the split no right answer, or as
      reading.examples does.
  """
  if task.name in _ADDED:
    return _ADDED[task.name]
  if not task.predict_metric_fns:
    raise errors.UserError(
      f'registered task {task.name!r} has no metric of targets and predictions; give it one in '
      'metric_fns'
    )
  found = (_text(task, example, 'targets') for example in reading.examples(task, split))
  longest = max((len(answer.encode()) for answer in found), default=0)
  if not longest:
    raise errors.UserError(
      f'split {split!r} of registered task {task.name!r} has no right answer; use another'
    )

  def metric(targets: scores.Targets, predictions: scores.Predictions) -> dict[str, float]:
    right = [task.postprocess_fn(answers[0], example=None, is_target=True) for answers in targets]
    made = [task.postprocess_fn(text, example=None, is_target=False) for text in predictions]
    values: list[Any] = [function(right, made) for function in task.predict_metric_fns]
    # A number, or a seqio.metrics.Scalar of one.
    return {name: float(getattr(x, 'value', x)) for found in values for name, x in found.items()}

  return Question((metric,), longest, split=split)


def examples(task: seqio.Task, split: str) -> Iterator[examples_lib.Example]:
  """Yields the questions of a split, each once and with all its answers, in the order of the Task.

  The split is read twice, as a question's answers may stand far apart and its inputs may be too
  long to keep: the memory it takes is that of ids and answers.

  Args:
    task: of questions.
    split: of the Task's.

  Raises:
    errors.UserError: as reading.examples does.
  """
  references: dict[str, list[str]] = collections.defaultdict(list)
  for name, example in _named(task, split):
    answer = _text(task, example, 'targets')
    references[name] += [answer] if answer else []
  for name, example in _named(task, split):
    if name in references:
      facts = {
        key: _plain(value)
        for key, value in example.items()
        if key not in _NOT_FACTS and np.ndim(value) == 0
      }
      inputs, answers = _text(task, example, 'inputs'), tuple(references.pop(name))
      yield examples_lib.Example(name, inputs, answers, facts)


def _named(task: seqio.Task, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields examples with their ids; those of a Task that has none in our sense are numbered."""
  for index, example in enumerate(reading.examples(task, split)):
    yield example['id'].decode() if task.name in _ADDED else str(index), example


def _text(task: seqio.Task, example: dict[str, Any], feature: str) -> str:
  """Returns the text of 'inputs' or 'targets', of their tokens if the Task has not kept it."""
  kept = example.get(f'{feature}_pretokenized')
  if kept is None:
    return task.output_features[feature].vocabulary.decode(example[feature].tolist())
  return kept.decode()


def _as_metrics_want(text: str, is_target: bool = False, **_: Any) -> str | tuple[str, ...]:
  """Makes of a target, as seqio gives it, the one right answer that there is."""
  return (text,) if is_target else text


def _plain(value: Any) -> int | float | str:
  return value.decode() if isinstance(value, bytes) else value.item()
