"""What predictions in text are worth: the metrics of SCROLLS, GLUE and SuperGLUE.

A metric is a function metric(targets, predictions) -> {name: value in percent}:
  targets: all right answers of each example, at least one.
  predictions: one text for each example, which need not be any of the answers.
It serves as a metric of a seqio Task too, which wants these names of its arguments. Where several
answers are right, the best one counts. All but `rouge`, `f1` and `exact_match` compare texts as
they are but for spaces around them.

Every metric raises errors.UserError if there is no example, if there are not as many targets as
predictions, or if an example has no answer, or a text in the place of its answers. The metrics of
classes and of numbers raise it for several answers too, which to them have no meaning.
"""

from __future__ import annotations

import collections
import math
import re
import statistics
import string
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from lex_fire import errors

Targets = Sequence[Sequence[str]]
Predictions = Sequence[str]
Metric = Callable[[Targets, Predictions], dict[str, float]]

_ROUGE_TYPES = ('rouge1', 'rouge2', 'rougeL')
_ARTICLES = re.compile(r'\b(?:a|an|the)\b')
_WITHOUT_PUNCTUATION = str.maketrans('', '', string.punctuation)
_LARGEST_NUMBER = 1e100  # the square of a larger one may overflow


def rouge(targets: Targets, predictions: Predictions) -> dict[str, float]:
  """ROUGE (Lin 2004) as in SCROLLS (Shaham et al. 2022, arXiv:2201.03533, section 3.3).

  Words are runs of a-z and 0-9 in the lower-cased text, as they are (no stemming); a text in
  another script has none. Each F measure is the harmonic mean of precision and recall: of common
  words (ROUGE-1), of common pairs of neighbours (ROUGE-2), of the longest common subsequence of the
  whole texts (ROUGE-L, which knows no sentences). Of several answers each measure takes the one
  that is best for it, so the three may take three answers, as in the benchmark's evaluator.

  Returns:
    'rouge1', 'rouge2', 'rougeL': means over the examples; and 'rouge_geometric_mean', that of the
    three means, which is the benchmark's score.
  """
  from rouge_score import rouge_scorer

  _check(targets, predictions)
  scorer = rouge_scorer.RougeScorer(_ROUGE_TYPES, use_stemmer=False)
  scores = list(map(scorer.score_multi, targets, predictions))
  means = {
    name: 100.0 * statistics.fmean(score[name].fmeasure for score in scores)
    for name in _ROUGE_TYPES
  }
  return {**means, 'rouge_geometric_mean': math.cbrt(math.prod(means.values()))}


def f1(targets: Targets, predictions: Predictions) -> dict[str, float]:
  """F1 of common words, as in SQuAD (Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1).

  The harmonic mean of precision and recall of the words of `normalize`, counted with repetition.
  As in the evaluator of SQuAD 1.1, a text of which `normalize` leaves nothing scores 0, against
  itself too. SCROLLS takes F1 for Qasper and NarrativeQA, SuperGLUE for ReCoRD.
  """
  return {'f1': _mean_of_best(_word_f1, targets, predictions)}


def exact_match(targets: Targets, predictions: Predictions) -> dict[str, float]:
  """Predictions that equal an answer once both are normalized, as in SQuAD and in SCROLLS.

  SCROLLS (section 3.3) takes it for QuALITY and ContractNLI, SuperGLUE for ReCoRD. `normalize`
  ruins numbers and single letters, 1.5 is 15 to it and 'a' is nothing: use `accuracy` there.
  """

  def equal(answer: str, prediction: str) -> bool:
    return normalize(answer) == normalize(prediction)

  return {'exact_match': _mean_of_best(equal, targets, predictions)}


def accuracy(targets: Targets, predictions: Predictions) -> dict[str, float]:
  """Predictions that equal an answer to the letter, but for spaces around them."""

  def equal(answer: str, prediction: str) -> bool:
    return answer.strip() == prediction.strip()

  return {'accuracy': _mean_of_best(equal, targets, predictions)}


def matthews(targets: Targets, predictions: Predictions) -> dict[str, float]:
  """Matthews' correlation of classes, -100 to 100, for CoLA (GLUE, arXiv:1804.07461, section 3.1).

  A prediction that is no class of the targets' is one more class. 0 if all targets or all
  predictions are the same, where it is undefined.
  """
  from sklearn import metrics

  answers, guesses = _classes(targets, predictions)
  if _are_constant(answers, guesses):
    return {'matthews': 0.0}
  return {'matthews': 100.0 * float(metrics.matthews_corrcoef(answers, guesses))}


def pearson_spearman(targets: Targets, predictions: Predictions) -> dict[str, float]:
  """Two correlations of numbers, -100 to 100, for STS-B (GLUE, arXiv:1804.07461, section 3.2).

  A prediction that is no number, or not below 1e100 in size, counts as 0. Both correlations are 0
  if all targets or all predictions are the same, where they are undefined.

  Returns:
    'pearson', of the numbers, and 'spearman', of their ranks.

  Raises:
    errors.UserError: if a target is no number, or as the module says.
  """
  from scipy import stats

  answers, guesses = _classes(targets, predictions)
  for index, answer in enumerate(answers):
    if _number(answer) is None:
      raise errors.UserError(f'target {index} is {answer!r}, not a number; use another metric')
  numbers = [_number(answer) or 0.0 for answer in answers]
  guessed_numbers = [_number(guess) or 0.0 for guess in guesses]
  if _are_constant(numbers, guessed_numbers):
    return {'pearson': 0.0, 'spearman': 0.0}
  with warnings.catch_warnings():
    # It warns of rounding where numbers differ in their last digits alone.
    warnings.simplefilter('ignore', stats.NearConstantInputWarning)
    pearson: Any = stats.pearsonr(numbers, guessed_numbers)
  spearman: Any = stats.spearmanr(numbers, guessed_numbers)
  return {
    'pearson': 100.0 * float(pearson.statistic),
    'spearman': 100.0 * float(spearman.statistic),
  }


def f1_of_class(positive: str) -> Metric:
  """Makes the metric of one of two classes, for MRPC and QQP (GLUE, arXiv:1804.07461, section 3.2).

  F1 is the harmonic mean of the class's precision and recall. A prediction that is neither class
  counts as the other one, so it goes unpunished where that one is right: report `accuracy` beside
  it, as GLUE does. 0 if no target is positive.

  Args:
    positive: the class, as targets spell it.

  Returns:
    a metric whose one value is 'f1_of_class'.
  """

  def metric(targets: Targets, predictions: Predictions) -> dict[str, float]:
    from sklearn import metrics

    answers, guesses = _classes(targets, predictions)
    is_positive = [answer == positive.strip() for answer in answers]
    is_guessed = [guess == positive.strip() for guess in guesses]
    if not any(is_positive):
      return {'f1_of_class': 0.0}
    return {'f1_of_class': 100.0 * float(metrics.f1_score(is_positive, is_guessed))}

  return metric


def exact_match_of_groups(groups: Sequence[str]) -> Metric:
  """Makes the metric of groups of which every prediction is right, for MultiRC.

  SuperGLUE (arXiv:1905.00537, section 3) calls it EM: a question of MultiRC is right if all options
  of its answer are; beside it stands F1 over the options of all questions, `f1_of_class`.

  Args:
    groups: the name of each example's group; a group counts by those examples that are given.

  Returns:
    a metric whose one value is 'exact_match_of_groups', and which raises errors.UserError too if
    there are not as many groups as predictions.
  """

  def metric(targets: Targets, predictions: Predictions) -> dict[str, float]:
    answers, guesses = _classes(targets, predictions)
    if len(groups) != len(guesses):
      raise errors.UserError(
        f'{len(groups)} groups for {len(guesses)} predictions; give one of each an example'
      )
    right: dict[str, bool] = {}
    for group, answer, guess in zip(groups, answers, guesses, strict=True):
      right[group] = right.get(group, True) and answer == guess
    return {'exact_match_of_groups': 100.0 * statistics.fmean(right.values())}

  return metric


def macro_f1(targets: Targets, predictions: Predictions) -> dict[str, float]:
  """The mean of the F1 of each class, for CB (SuperGLUE, arXiv:1905.00537, section 3).

  Classes are those of the targets, however often they occur; a prediction that is none of them is
  a miss of the right one.
  """
  from sklearn import metrics

  answers, guesses = _classes(targets, predictions)
  classes = sorted(set(answers))
  score = metrics.f1_score(answers, guesses, labels=classes, average='macro')
  return {'macro_f1': 100.0 * float(score)}


def normalize(text: str) -> str:
  """Lower-cases, drops ASCII punctuation, then the words a, an, the, and joins the rest by spaces.

  As the evaluator of SQuAD 1.1 does, in its order: "don't" becomes the one word dont.
  """
  words = text.lower().translate(_WITHOUT_PUNCTUATION)
  return ' '.join(_ARTICLES.sub(' ', words).split())


def _word_f1(answer: str, prediction: str) -> float:
  words, guessed_words = normalize(answer).split(), normalize(prediction).split()
  common = collections.Counter(words) & collections.Counter(guessed_words)
  if not common:
    return 0.0
  return 2 * common.total() / (len(words) + len(guessed_words))


def _mean_of_best(
  score: Callable[[str, str], float], targets: Targets, predictions: Predictions
) -> float:
  """Returns the mean over examples of score(answer, prediction) for the best answer, in percent."""
  _check(targets, predictions)
  return 100.0 * statistics.fmean(
    max(score(answer, prediction) for answer in answers)
    for answers, prediction in zip(targets, predictions, strict=True)
  )


def _classes(targets: Targets, predictions: Predictions) -> tuple[list[str], list[str]]:
  """Returns the one answer of each example, and the predictions, without spaces around them."""
  _check(targets, predictions)
  for index, answers in enumerate(targets):
    if len(answers) > 1:
      raise errors.UserError(
        f'example {index} has {len(answers)} answers, {list(answers)!r}; this metric takes one'
      )
  return [answers[0].strip() for answers in targets], [text.strip() for text in predictions]


def _are_constant(*columns: Sequence[object]) -> bool:
  return any(len(set(column)) == 1 for column in columns)


def _number(text: str) -> float | None:
  try:
    number = float(text)
  except ValueError:
    return None
  return number if abs(number) < _LARGEST_NUMBER else None  # nor is NaN below it


def _check(targets: Targets, predictions: Predictions) -> None:
  if len(targets) != len(predictions):
    raise errors.UserError(
      f'{len(targets)} targets for {len(predictions)} predictions; give one of each an example'
    )
  if not targets:
    raise errors.UserError('0 examples to score; give at least one')
  for index, answers in enumerate(targets):
    if isinstance(answers, str):
      raise errors.UserError(
        f'the answers of example {index} are the text {answers!r}; give a list of texts'
      )
    if not answers:
      raise errors.UserError(f'example {index} has the answers {answers!r}; give at least one')
