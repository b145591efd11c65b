"""Tests `../lex_fire/scores.py`: against examples worked by hand, published ones, and oracles."""

import collections
import functools
import math
import random
import re
import subprocess
import sys

import pytest

from lex_fire import errors, scores

OF_TEXTS = (scores.rouge, scores.f1, scores.exact_match, scores.accuracy)
OF_CLASSES = (scores.matthews, scores.pearson_spearman, scores.macro_f1, scores.f1_of_class('2'))
OF_CLASSES += (scores.exact_match_of_groups('abba'),)
every_metric = pytest.mark.parametrize(
  'metric', [*OF_TEXTS, *OF_CLASSES], ids=lambda metric: metric.__qualname__.split('.')[0]
)

# A phrase and a number for each example: words for ROUGE-2, numbers for the correlations.
PHRASES = ['red fox', 'blue whale sings', 'green ant', 'red fox']
NUMBERS = ['1', '2', '3.5', '2']


def right_answers(metric):
  return PHRASES if metric in OF_TEXTS else NUMBERS


def singly(answers):
  return [[answer] for answer in answers]


def approx(values):
  """A tolerance of rounding in float64, not of another definition."""
  return pytest.approx(values, abs=1e-9)


# Every metric


@every_metric
def test_right_predictions_score_100_and_empty_ones_0(metric):
  answers = right_answers(metric)

  right = metric(singly(answers), answers)
  empty = metric(singly(answers), [''] * len(answers))

  assert right == approx(dict.fromkeys(right, 100.0))
  assert empty == dict.fromkeys(right, 0.0)
  assert {type(value) for value in (right | empty).values()} == {float}


@every_metric
def test_the_order_of_examples_does_not_matter(metric):
  pairs = list(zip(singly(right_answers(metric)), ['2', 'blue fox', '3.5', '1'], strict=True))

  forwards = metric(*zip(*pairs, strict=True))
  backwards = metric(*zip(*pairs[::-1], strict=True))

  assert backwards == approx(forwards)


@every_metric
def test_spaces_around_texts_do_not_matter(metric):
  answers = right_answers(metric)

  padded = metric([[f' {answer}\n'] for answer in answers], [f'\t{answer} ' for answer in answers])

  assert padded == metric(singly(answers), answers)


@every_metric
def test_as_many_targets_as_predictions_are_needed(metric):
  with pytest.raises(errors.UserError, match='^2 targets for 1 predictions; give one of each'):
    metric([['1'], ['2']], ['1'])


@every_metric
def test_an_example_is_needed(metric):
  with pytest.raises(errors.UserError, match='^0 examples to score; give at least one'):
    metric([], [])


@every_metric
def test_an_answer_is_needed(metric):
  with pytest.raises(errors.UserError, match=r'^example 1 has the answers \[\]; give at least one'):
    metric([['1'], []], ['1', '2'])


@every_metric
def test_a_text_in_the_place_of_a_list_of_answers_is_refused(metric):
  with pytest.raises(
    errors.UserError, match="answers of example 1 are the text 'two'; give a list"
  ):
    metric([['1'], 'two'], ['1', '2'])


def test_seqio_takes_every_metric_as_one_of_predictions():
  seqio = pytest.importorskip('seqio')

  task = seqio.Task(
    'scored',
    source=seqio.FunctionDataSource(lambda split, shuffle_files: None, splits=['train']),
    preprocessors=[],
    output_features={'targets': seqio.Feature(seqio.ByteVocabulary())},
    metric_fns=[*OF_TEXTS, *OF_CLASSES],
  )

  assert task.predict_metric_fns == [*OF_TEXTS, *OF_CLASSES]


def test_importing_the_metrics_imports_none_of_their_packages():
  heavy = "{'rouge_score', 'nltk', 'scipy', 'sklearn', 'seqio', 'tensorflow'}"
  code = f'import sys; from lex_fire import scores; print({heavy} & set(sys.modules))'

  output = subprocess.check_output([sys.executable, '-c', code], text=True)

  assert output == 'set()\n'


# ROUGE


def test_rouge_is_as_worked_by_hand():
  # Words in common: the, cat, sat, mat. 4 of 6 right ones, 4 of 5 predicted: F = 2 * 4 / 11.
  # Pairs: (the cat), (cat sat). 2 of 5, 2 of 4: F = 2 * 2 / 9.
  # Subsequence: the cat sat mat. 4 of 6, 4 of 5: F = 8 / 11.
  values = scores.rouge([['The cat sat on the mat.']], ['the cat sat, mat down'])

  assert values == approx(
    {
      'rouge1': 800 / 11,
      'rouge2': 400 / 9,
      'rougeL': 800 / 11,
      'rouge_geometric_mean': (800 / 11 * 400 / 9 * 800 / 11) ** (1 / 3),
    }
  )


def test_rouge_l_takes_words_in_order():
  # Words in common: 3 of 3 and of 3. In order: only one, as 'c b a' is 'a b c' backwards: 1 of 3.
  values = scores.rouge([['a b c']], ['c b a'])

  assert values == approx(
    {'rouge1': 100.0, 'rouge2': 0.0, 'rougeL': 100 / 3, 'rouge_geometric_mean': 0.0}
  )


def test_rouge_counts_a_word_no_more_often_than_the_answer_has_it():
  # Two of the four are in the answer: 2 of 3 and 2 of 4, F = 2 * 2 / 7.
  assert scores.rouge([['go go now']], ['go go go go'])['rouge1'] == approx(400 / 7)


def test_rouge_compares_words_unstemmed():
  """As the evaluator of SCROLLS is set; Porter's stemmer would make one word of these two."""
  assert scores.rouge([['running']], ['runs'])['rouge1'] == 0.0


def test_rouge_knows_no_lines_and_no_punctuation():
  text = 'One fox. Two dogs!\nThree ants?'

  values = scores.rouge([[text]], ['one\n\nfox two-dogs three (ants)'])

  assert values == approx(dict.fromkeys(values, 100.0))


def test_rouge_of_a_text_without_words_is_0():
  assert scores.rouge([['— 狐 —']], ['— 狐 —'])['rouge1'] == 0.0


def test_each_rouge_takes_the_answer_that_is_best_for_it():
  # To 'a b c': 'c b a' has all words (ROUGE-1: 1), no pair; 'a b x y z' has two of the words
  # (2 / 5, 2 / 3: F = 4 / 8), one pair (1 / 4, 1 / 2: F = 2 / 6), and a b in order (F = 4 / 8).
  values = scores.rouge([['c b a', 'a b x y z']], ['a b c'])

  means = {'rouge1': 100.0, 'rouge2': 100 / 3, 'rougeL': 50.0}
  assert values == approx({**means, 'rouge_geometric_mean': (100 * 100 / 3 * 50) ** (1 / 3)})


def test_the_geometric_mean_is_of_the_means_over_the_corpus():
  # The second shares one of two words: F = 1 / 2, 0, 1 / 2. Means: 75, 50, 75. The mean of each
  # example's own geometric mean would be (100 + 0) / 2 = 50.
  values = scores.rouge([['red fox'], ['red fox']], ['red fox', 'red ant'])

  assert values == approx(
    {
      'rouge1': 75.0,
      'rouge2': 50.0,
      'rougeL': 75.0,
      'rouge_geometric_mean': (75 * 50 * 75) ** (1 / 3),
    }
  )


@functools.cache
def subsequence(first, second):
  """The length of the longest common subsequence of two tuples, by its recursion."""
  if not first or not second:
    return 0
  if first[-1] == second[-1]:
    return 1 + subsequence(first[:-1], second[:-1])
  return max(subsequence(first[:-1], second), subsequence(first, second[:-1]))


def rouge_oracle(answer, prediction):
  """The three F measures of Lin 2004, 'ROUGE: A package for automatic evaluation of summaries'."""

  def f_measure(common, size, predicted_size):
    if common == 0:
      return 0.0
    recall, precision = common / size, common / predicted_size
    return 2 * precision * recall / (precision + recall)

  def overlap(size):
    grams = [
      collections.Counter(words[start : start + size] for start in range(len(words) - size + 1))
      for words in (right, predicted)
    ]
    common = sum(min(count, grams[1][gram]) for gram, count in grams[0].items())
    return f_measure(common, sum(grams[0].values()), sum(grams[1].values()))

  right, predicted = (tuple(re.findall('[a-z0-9]+', t.lower())) for t in (answer, prediction))
  longest = f_measure(subsequence(right, predicted), len(right), len(predicted))
  return {'rouge1': overlap(1), 'rouge2': overlap(2), 'rougeL': longest}


def random_text(source, longest):
  """Words of a small vocabulary, so that many repeat, with marks and capitals between them."""
  words = source.choices(['fox', 'Fox', 'the', 'A', 'ran', '7', '-', 'ran.'], k=longest)
  return source.choice([' ', '\n', ', ']).join(words[: source.randrange(longest + 1)])


@pytest.mark.parametrize('seed', range(4))
def test_rouge_equals_its_definition_on_random_texts(seed):
  source = random.Random(seed)
  targets = [[random_text(source, 9) for _ in range(1 + n % 3)] for n in range(100)]
  predictions = [random_text(source, 9) for _ in targets]

  values = scores.rouge(targets, predictions)

  means = {}
  for name in ('rouge1', 'rouge2', 'rougeL'):
    best = [
      max(rouge_oracle(answer, prediction)[name] for answer in answers)
      for answers, prediction in zip(targets, predictions, strict=True)
    ]
    means[name] = 100 * sum(best) / len(best)
  assert 5 < means['rouge2'] < means['rougeL'] < means['rouge1'] < 95
  geometric_mean = math.exp(sum(map(math.log, means.values())) / 3)
  assert values == approx({**means, 'rouge_geometric_mean': geometric_mean})


# SCROLLS

# The example in the documentation of the benchmark's metrics (tau/scrolls, metrics/scrolls.py),
# with the values that it states to four places.
SCROLLS_PREDICTIONS = ['exact match example', 'hello there', 'general kenobi']
SCROLLS_TARGETS = [['exact match example'], ['hello', 'hi there'], ['commander kenobi']]


def test_the_metrics_equal_what_scrolls_states_of_its_example():
  metrics = (scores.rouge, scores.f1, scores.exact_match)

  values = [metric(SCROLLS_TARGETS, SCROLLS_PREDICTIONS) for metric in metrics]

  rouge = {'rouge1': 72.2222, 'rouge2': 33.3333, 'rougeL': 72.2222, 'rouge_geometric_mean': 55.8136}
  stated = [rouge, {'f1': 72.2222}, {'exact_match': 33.3333}]
  assert values == [pytest.approx(value, abs=5e-5) for value in stated]


# SQuAD's metrics


@pytest.mark.parametrize(
  ('text', 'normalized'),
  [
    ('The  Denver\tBroncos!', 'denver broncos'),
    ('an Apple, a day', 'apple day'),
    ("don't", 'dont'),  # marks go before articles do, and leave no space
    ('a.m.', 'am'),
    ('A.', ''),
    ('theatre analysis', 'theatre analysis'),  # articles are whole words
    ('the-end', 'theend'),
    ('1,000.5', '10005'),
    ('café – 東京', 'café – 東京'),  # an en dash is not in ASCII
  ],
)
def test_texts_are_normalized_as_in_squad(text, normalized):
  assert scores.normalize(text) == normalized


def test_f1_is_as_worked_by_hand():
  # Without articles and marks 'quick brown fox' and 'brown fox jumps high': 2 of 3, 2 of 4.
  # F = 2 * 2 / 7. The second example has nothing in common.
  values = scores.f1([['The quick, brown fox'], ['ant']], ['a brown fox jumps high.', 'bee'])

  assert values == approx({'f1': 100 * (4 / 7 + 0) / 2})


def test_f1_counts_words_with_repetition_and_in_any_order():
  # go twice and now: 2 + 1 of 3, 3 of 5. F = 2 * 3 / 8.
  assert scores.f1([['go now go']], ['now go go go stop']) == approx({'f1': 75.0})


def test_the_best_answer_counts():
  # fox: 1 of 1, 1 of 2, F = 2 / 3; red ant: 1 of 2, 1 of 2, F = 1 / 2.
  assert scores.f1([['red ant', 'fox']], ['red fox']) == approx({'f1': 200 / 3})
  assert scores.exact_match([['red ant', 'red fox']], ['Red fox.']) == {'exact_match': 100.0}
  assert scores.accuracy([['red ant', 'red fox']], ['red fox']) == {'accuracy': 100.0}


def test_a_text_of_articles_alone_matches_itself_and_has_no_f1():
  """As in the evaluator of SQuAD 1.1, whose F1 is 0 where no word is common."""
  assert scores.exact_match([['The']], ['a']) == {'exact_match': 100.0}
  assert scores.f1([['The']], ['the']) == {'f1': 0.0}


@pytest.mark.parametrize('metric', OF_TEXTS, ids=lambda metric: metric.__name__)
@pytest.mark.parametrize('seed', range(3))
def test_one_more_answer_never_lowers_a_score(metric, seed):
  source = random.Random(seed)
  few = [[random_text(source, 3)] for _ in range(60)]
  more = [[*answers, random_text(source, 3)] for answers in few]
  predictions = [random_text(source, 3) for _ in few]

  before, after = metric(few, predictions), metric(more, predictions)

  assert all(before[name] <= after[name] for name in before)
  assert any(before[name] < after[name] for name in before)


# Accuracy


def test_accuracy_tells_apart_what_exact_match_takes_for_equal():
  targets = singly(['1.5', '-3', 'a b', 'Yes'])
  predictions = ['15', '3', 'b', 'yes']

  assert scores.exact_match(targets, predictions) == {'exact_match': 100.0}
  assert scores.accuracy(targets, predictions) == {'accuracy': 0.0}


def test_accuracy_is_the_share_of_right_texts():
  assert scores.accuracy(singly(['12 34', '5', '6']), ['12 34', '5', '12 34']) == approx(
    {'accuracy': 200 / 3}
  )


# Metrics of classes


def pairs(**counts):
  """Targets and predictions of which, say, cat_dog=2 are of the class cat and called a dog."""
  names = [name.split('_') for name, count in counts.items() for _ in range(count)]
  return [[answer] for answer, _ in names], [prediction for _, prediction in names]


def test_matthews_follows_its_formula():
  """(TP TN - FP FN) / sqrt((TP + FP)(TP + FN)(TN + FP)(TN + FN)): Matthews 1975."""
  values = scores.matthews(*pairs(cat_cat=6, cat_dog=2, dog_cat=1, dog_dog=3))

  expected = (6 * 3 - 1 * 2) / math.sqrt((6 + 1) * (6 + 2) * (3 + 1) * (3 + 2))  # 0.478
  assert values == approx({'matthews': 100 * expected})


def test_matthews_of_answers_swapped_is_minus_100():
  assert scores.matthews(*pairs(cat_dog=2, dog_cat=3)) == approx({'matthews': -100.0})


def test_a_prediction_of_no_class_costs_matthews():
  right = scores.matthews(*pairs(cat_cat=3, dog_dog=3))
  wild = scores.matthews(*pairs(cat_cat=3, dog_dog=2, dog_zebra=1))

  assert wild['matthews'] < right['matthews']


def test_f1_of_a_class_is_as_worked_by_hand():
  # Precision 4 of 5, recall 4 of 6: F = 2 * 4 / 11. One that is no class is one of the two missed.
  values = scores.f1_of_class('cat')(
    *pairs(cat_cat=4, cat_dog=1, cat_zebra=1, dog_cat=1, dog_dog=2, dog_zebra=3)
  )

  assert values == approx({'f1_of_class': 800 / 11})


def test_f1_of_a_class_that_no_target_has_is_0():
  assert scores.f1_of_class('ant')(*pairs(cat_ant=1, dog_dog=1)) == {'f1_of_class': 0.0}
  assert scores.f1_of_class('ant')(*pairs(cat_cat=1, dog_dog=1)) == {'f1_of_class': 0.0}


def test_a_group_is_right_if_all_of_it_is():
  # The questions a and c have all their options right, b has one wrong: 2 of 3. The groups need
  # not be side by side.
  metric = scores.exact_match_of_groups('abcab')

  values = metric(*pairs(cat_cat=2, dog_dog=2, cat_dog=1))

  assert values == approx({'exact_match_of_groups': 200 / 3})


@pytest.mark.parametrize('seed', range(3))
def test_groups_are_right_as_each_of_them_is_alone(seed):
  source = random.Random(seed)
  groups = source.choices('abcdefgh', k=20)
  answers = source.choices(['True', 'False'], k=20)
  guesses = [source.choice([answer] * 4 + ['none']) for answer in answers]

  values = scores.exact_match_of_groups(groups)(singly(answers), guesses)

  alone = [
    all(
      answer == guess
      for of, answer, guess in zip(groups, answers, guesses, strict=True)
      if of == name
    )
    for name in set(groups)
  ]
  assert values == approx({'exact_match_of_groups': 100 * sum(alone) / len(alone)})


def test_as_many_groups_as_predictions_are_needed():
  with pytest.raises(errors.UserError, match='^3 groups for 2 predictions; give one of each'):
    scores.exact_match_of_groups('aab')([['1'], ['2']], ['1', '2'])


def test_macro_f1_is_the_mean_over_the_classes_of_targets():
  # cat: precision 2 of 3, recall 2 of 3, F = 2 / 3. dog: 1 of 2, 1 of 1, F = 2 / 3.
  # ant: never predicted, F = 0. zebra is no class. The mean is (2 / 3 + 2 / 3 + 0) / 3.
  values = scores.macro_f1(*pairs(cat_cat=2, cat_dog=1, dog_dog=1, ant_cat=1, ant_zebra=2))

  assert values == approx({'macro_f1': 400 / 9})


# Correlations


def test_correlations_are_as_worked_by_hand():
  # Deviations from the means 1 and 2: (-1, 0, 1) and (-2, -1, 3). Pearson's is their product,
  # 2 + 0 + 3, over sqrt(1 + 0 + 1) sqrt(4 + 1 + 9). The ranks are the same.
  values = scores.pearson_spearman(singly(['0', '1', '2']), ['0', '1.0', '5'])

  assert values == approx({'pearson': 100 * 5 / math.sqrt(2 * 14), 'spearman': 100.0})


def test_equal_numbers_share_their_rank():
  # Ranks 1, 2, 3, 4 and 1, 2.5, 2.5, 4; deviations (-1.5, -.5, .5, 1.5) and (-1.5, 0, 0, 1.5):
  # 4.5 / sqrt(5 * 4.5).
  values = scores.pearson_spearman(singly(['0', '1', '2', '3']), ['1', '2', '2', '9'])

  assert values['spearman'] == approx(100 * 4.5 / math.sqrt(5 * 4.5))


@pytest.mark.parametrize('text', ['', 'two', 'nan', '-inf', '1e999', '1e300', '1 2'])
def test_a_prediction_that_is_no_number_counts_as_0(text):
  targets = singly(['0', '1', '2', '3'])

  assert scores.pearson_spearman(targets, [text, '3', text, '4']) == scores.pearson_spearman(
    targets, ['0', '3', '0', '4']
  )


def test_numbers_that_hardly_differ_correlate_without_a_warning():
  values = scores.pearson_spearman(singly(['0', '1', '2']), ['3', '3', '3.0000000000000004'])

  assert all(0 < value <= 100 for value in values.values())


@pytest.mark.parametrize('text', ['two', 'nan', '1e300'])
def test_a_target_that_is_no_number_is_refused(text):
  with pytest.raises(errors.UserError, match=f"^target 1 is '{text}', not a number"):
    scores.pearson_spearman([['1'], [text]], ['1', '2'])


@pytest.mark.parametrize('metric', [scores.matthews, scores.pearson_spearman])
@pytest.mark.parametrize(
  ('answers', 'predictions'),
  [(['1', '2'], ['2', '2']), (['1', '1'], ['1', '2']), (['1', '1'], ['1', '1']), (['1'], ['1'])],
)
def test_a_correlation_with_a_constant_is_0(metric, answers, predictions):
  values = metric(singly(answers), predictions)

  assert values == dict.fromkeys(values, 0.0)


@pytest.mark.parametrize('metric', OF_CLASSES)
def test_several_answers_are_refused_where_one_class_is_right(metric):
  with pytest.raises(errors.UserError, match=r"^example 1 has 2 answers, \['2', '3'\]"):
    metric([['1'], ['2', '3']], ['1', '2'])
