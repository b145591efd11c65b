"""GLUE and SuperGLUE as questions in text, in the manner of T5.

Wang et al. 2018 (arXiv:1804.07461) and 2019 (arXiv:1905.00537), through TFDS, versions pinned. A
question is the name of its task and its fields by name, an answer the name of a class: 'sst2
sentence: a fine film' is 'positive' (Raffel et al. 2020, arXiv:1910.10683, appendix D). The scores
of STS-B, 0 to 5, are rounded to 0.2 as there (section 2.4), in all splits, so its correlations may
differ a little from those with the scores themselves.

An option of an answer in MultiRC (Khashabi et al. 2018, aclanthology.org/N18-1023) is a question of
its own, and the options of one question a group. A query of ReCoRD (Zhang et al. 2018,
arXiv:1810.12885) is an example for each of its answers, all with one id, and so one question when
it is asked. Both lose the marks of their markup, as in T5 (https://github.com/google-research/
text-to-text-transfer-transformer, t5/data/preprocessors.py).

Departures from T5: BoolQ has its question first, so that inputs cut at their end keep it; COPA's
answers are the names of its choices, WiC's part of speech is left out as TFDS lacks it, and WSC is
the question whether two marked spans are one, as in SuperGLUE itself, not for a noun.

The diagnostic sets are not here, as they have no training data.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from lex_fire import scores
from lex_fire.data import examples as examples_lib
from lex_fire.data import language, questions
from lex_fire.data.spec import Spec

if TYPE_CHECKING:
  import seqio
  import tensorflow as tf

_VERSIONS = {'glue': '2.0.0', 'super_glue': '1.0.2'}
_NAME_BYTES = 128  # at most, in a name of something in a text


class Template(NamedTuple):
  """How an example of TFDS becomes a question.

  Attributes:
    fields: features of text, or of several texts, in the order in which the question has them.
    words: the answer for each label; () where the label is a number from 0 to 5; None where the
      answers are texts of the example's own, in the feature 'answers'.
    metrics: of the benchmark.
    of_groups: likewise, as in questions.Question.
    splits: {split: its name in TFDS}.
    index: features of 'idx' that tell examples apart; () where 'idx' itself is a number.
    markup: pairs (regular expression, what stands for its matches in the question).
    spans: pairs (NAME, sign): the field 'text' gets the sign on both sides of the words NAME_text,
      which begin at its word NAME_index.
  """

  fields: tuple[str, ...]
  words: tuple[str, ...] | None
  metrics: tuple[scores.Metric, ...]
  of_groups: tuple[questions.OfGroups, ...] = ()
  splits: Mapping[str, str] = {split: split for split in examples_lib.SPLITS}
  index: tuple[str, ...] = ()
  markup: tuple[tuple[str, str], ...] = ()
  spans: tuple[tuple[str, str], ...] = ()

  @property
  def answer_bytes(self) -> int:
    """The most that an answer takes."""
    return _NAME_BYTES if self.words is None else max(map(len, self.words or ('0.0',)))


_PAIR = ('sentence1', 'sentence2')
_INFERENCE = ('hypothesis', 'premise')
_ACCURACY = (scores.accuracy,)
_TRUTH = ('False', 'True')
# Of the genres of training, unless the name says otherwise.
_MNLI_SPLITS = {
  'train': 'train',
  'validation': 'validation_matched',
  'validation_mismatched': 'validation_mismatched',
  'test': 'test_matched',
  'test_mismatched': 'test_mismatched',
}


def _f1_and_accuracy(positive: str) -> tuple[scores.Metric, ...]:
  return (scores.f1_of_class(positive), scores.accuracy)


# Words are in the order of TFDS' labels; metrics are those of arXiv:1804.07461, table 1, and
# arXiv:1905.00537, table 1.
GLUE = {
  'cola': Template(('sentence',), ('unacceptable', 'acceptable'), (scores.matthews,)),
  'sst2': Template(('sentence',), ('negative', 'positive'), _ACCURACY),
  'mrpc': Template(_PAIR, ('not_equivalent', 'equivalent'), _f1_and_accuracy('equivalent')),
  'qqp': Template(
    ('question1', 'question2'), ('not_duplicate', 'duplicate'), _f1_and_accuracy('duplicate')
  ),
  'stsb': Template(_PAIR, (), (scores.pearson_spearman,)),
  'mnli': Template(
    _INFERENCE, ('entailment', 'neutral', 'contradiction'), _ACCURACY, splits=_MNLI_SPLITS
  ),
  'qnli': Template(('question', 'sentence'), ('entailment', 'not_entailment'), _ACCURACY),
  'rte': Template(_PAIR, ('entailment', 'not_entailment'), _ACCURACY),
  'wnli': Template(_PAIR, ('not_entailment', 'entailment'), _ACCURACY),
}
SUPER_GLUE = {
  'boolq': Template(('question', 'passage'), _TRUTH, _ACCURACY),
  'cb': Template(
    _INFERENCE, ('entailment', 'contradiction', 'neutral'), (scores.macro_f1, scores.accuracy)
  ),
  'copa': Template(
    ('choice1', 'choice2', 'premise', 'question'), ('choice1', 'choice2'), _ACCURACY
  ),
  'multirc': Template(
    ('question', 'answer', 'paragraph'),
    _TRUTH,
    (scores.f1_of_class('True'),),
    (scores.exact_match_of_groups,),
    index=('paragraph', 'question', 'answer'),
    markup=(('<br>', ' '), ('</?b>', '')),
  ),
  'record': Template(
    ('query', 'entities', 'passage'),
    None,
    (scores.f1, scores.exact_match),
    index=('query',),
    # Lines between the sentences of a summary, which may lack their full stops.
    markup=((r'([.?!"\'])\n@highlight\n', r'\1 '), (r'\n@highlight\n', '. ')),
  ),
  'rte': Template(_INFERENCE, ('entailment', 'not_entailment'), _ACCURACY),
  'wic': Template((*_PAIR, 'word'), _TRUTH, _ACCURACY),
  'wsc.fixed': Template(('text',), _TRUTH, _ACCURACY, spans=(('span1', '*'), ('span2', '#'))),
}
BENCHMARKS = {'glue': GLUE, 'super_glue': SUPER_GLUE}
_NAMES = {
  f'{benchmark}_{config}': (benchmark, config)
  for benchmark, templates in BENCHMARKS.items()
  for config in templates
}


def template(name: str) -> Template:
  """Returns the template of a task by its name, a key of TASKS."""
  benchmark, config = _NAMES[name]
  return BENCHMARKS[benchmark][config]


def question(spec: Spec) -> questions.Question:
  """Returns what the questions of a task have in common."""
  own = template(spec.base)
  return questions.Question(own.metrics, own.answer_bytes, of_groups=own.of_groups)


def task(spec: Spec) -> seqio.Task:
  """Returns the Task of a specification, over a dataset that must have been made in TFDS before.

  Raises:
    errors.UserError: if there are files or options, or as vocabularies.load does.
  """
  spec.refuse_files()
  spec.options()
  benchmark, config = _NAMES[spec.base]
  own = template(spec.base)
  dataset = f'{benchmark}/{config}:{_VERSIONS[benchmark]}'
  source = functools.partial(language.tfds_source, dataset, own.splits, spec)
  name = f'{dataset}_{spec.tfds_directory}'
  return questions.add(name, spec, question(spec), source, functools.partial(render, config, own))


def render(config: str, template: Template, example: Mapping[str, Any]) -> questions.Tensors:
  """Makes a question of an example, in TensorFlow.

  Args:
    config: of TFDS.
    template: of `config`.
    example: the fields of `template`; 'idx', a whole number or several by name; 'label', -1 where
      withheld, or 'answers', none where withheld.

  Returns:
    'id', 'inputs' and 'targets', as questions.add takes them.
  """
  import tensorflow as tf

  texts = dict(example)
  if template.spans:
    texts['text'] = _marked(example, template.spans)
  fields = [tf.strings.join([f'{field}: ', _joined(texts[field])]) for field in template.fields]
  name = config.removesuffix('.fixed')
  inputs = tf.strings.join([name, *fields], separator=' ')
  for pattern, replacement in template.markup:
    inputs = tf.strings.regex_replace(inputs, pattern, replacement)
  index = [example['idx'][key] for key in template.index] or [example['idx']]
  number = tf.strings.join(list(map(tf.strings.as_string, index)), separator='-')
  return {'id': number, 'inputs': inputs, 'targets': _answer(template, example)}


def _joined(texts: tf.Tensor) -> tf.Tensor:
  """Makes one text of a text, or of several."""
  import tensorflow as tf

  return tf.strings.reduce_join(tf.reshape(texts, [-1]), separator=', ')


def _answer(template: Template, example: Mapping[str, Any]) -> tf.Tensor:
  """Returns the right answer, '' if it is withheld, or all that there are."""
  import tensorflow as tf

  if template.words is None:
    return example['answers']
  if not template.words:
    return _number(example['label'])
  return tf.constant(('', *template.words))[example['label'] + 1]


def _number(label: tf.Tensor) -> tf.Tensor:
  import tensorflow as tf

  rounded = tf.strings.as_string(tf.round(label * 5) / 5, precision=1)
  return tf.where(label < 0, '', rounded)


def _marked(example: Mapping[str, Any], spans: tuple[tuple[str, str], ...]) -> tf.Tensor:
  """Puts the sign of each span before its first word and after its last."""
  import tensorflow as tf

  words = tf.strings.split(example['text'], ' ')
  index = tf.range(tf.size(words))  # of a word with its signs, so that no span moves another
  for name, sign in spans:
    first = example[f'{name}_index']
    last = first + tf.size(tf.strings.split(example[f'{name}_text'], ' ')) - 1
    words = tf.where(index == first, tf.strings.join([f'{sign} ', words]), words)
    words = tf.where(index == last, tf.strings.join([words, f' {sign}']), words)
  return tf.strings.reduce_join(words, separator=' ')


TASKS = dict.fromkeys(_NAMES, task)
QUESTIONS = dict.fromkeys(_NAMES, question)
