"""Tests of `lex_fire/data/batches.py` over streams of several parts, and of questions.

What holds for a stream of one part is in `data_test.py`.
"""

import numpy as np
import pytest

from lex_fire import errors
from lex_fire.data import batches, stream

EOS = 1


def windows_of(parts, length):
  arrays = [np.array(part, np.uint16) for part in parts]
  return batches.Windows(arrays, length, eos_id=EOS, isolate_documents=False)


# Windows of several parts


@pytest.mark.parametrize('length', [1, 2, 3, 5])
def test_windows_lie_within_parts_and_each_rest_is_left_out(length):
  parts = [range(10, 17), [], range(20, 22), range(30, 41), [50]]
  expected = [
    list(part[start : start + length + 1])
    for part in parts
    for start in range(0, len(part) - length, length)
  ]

  windows = windows_of(parts, length)
  batch = windows.batch(np.arange(windows.num_windows))

  assert windows.num_windows == len(expected)
  assert batch['inputs_BL'].tolist() == [row[:-1] for row in expected]
  assert batch['targets_BL'].tolist() == [row[1:] for row in expected]


def test_windows_of_parts_are_read_in_any_order():
  windows = windows_of([range(10, 17), range(20, 27)], 3)

  batch = windows.batch(np.array([3, 0, 2, 2]))

  assert batch['inputs_BL'][:, 0].tolist() == [23, 10, 20, 20]


def test_parts_that_are_all_too_short_are_refused():
  with pytest.raises(errors.UserError, match='stream of 7 tokens has no window of length=4'):
    windows_of([range(4), range(3)], 4)


# Questions: (inputs, separator, answer) in lists, over two parts and an empty one

SEPARATOR = [3, 3]
QUESTIONS = [
  [([10, 11, 12, 13, 14], [20, 21]), ([15], [22])],
  [],
  [([], [23, 24, 25]), ([16, 17, 18], [26]), (list(range(30, 60)), [27, 28])],
]
LENGTHS = [7, 8, 10, 50]


def oracle(length):
  """Rows of length + 1 tokens, whether each is a target that counts, and what was cut."""
  rows, counts, cut = [], [], []
  for inputs, answer in sum(QUESTIONS, []):
    rest = [*SEPARATOR, *answer, EOS]
    kept = inputs
    while 1 + len(kept) + len(rest) > length + 1:
      kept = kept[:-1]
    row = [EOS, *kept, *rest]
    is_answer = [False] * (len(row) - len(answer) - 1) + [True] * (len(answer) + 1)
    padding = length + 1 - len(row)
    rows.append(row + [0] * padding)
    counts.append(is_answer + [False] * padding)
    cut.append(len(inputs) - len(kept))
  return rows, counts, cut


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """The questions as a stream on disk."""
  work = tmp_path_factory.mktemp('questions') / 'work'
  work.mkdir()
  counts = []
  for part, members in enumerate(QUESTIONS):
    documents = [
      stream.Document(
        np.array([*inputs, *SEPARATOR, *answer, EOS]),
        len(answer),
        (len(inputs), len(inputs) + len(SEPARATOR)),
      )
      for inputs, answer in members
    ]
    counts.append(stream.write_part(work, part, 259, documents))
  stream.finish(work, work.with_name('s'), {}, counts)
  return stream.read(work.with_name('s'))


def questions(prepared, length, isolate_documents=False):
  return batches.Questions(
    prepared.parts, prepared.ends, length, eos_id=EOS, isolate_documents=isolate_documents
  )


@pytest.mark.parametrize('length', LENGTHS)
def test_rows_are_eos_inputs_cut_at_their_end_separator_and_answer(prepared, length):
  rows, _, _ = oracle(length)

  batch = questions(prepared, length).batch(np.arange(5))

  assert batch['inputs_BL'].tolist() == [row[:-1] for row in rows]
  assert batch['targets_BL'].tolist() == [row[1:] for row in rows]
  assert batch['position_BL'] is None and batch['segment_ids_BL'] is None
  assert {batch[name].dtype for name in ('inputs_BL', 'targets_BL')} == {np.dtype(np.int32)}


@pytest.mark.parametrize('length', LENGTHS)
def test_the_answer_alone_counts_its_eos_too(prepared, length):
  _, counts, _ = oracle(length)

  batch = questions(prepared, length).batch(np.arange(5))

  assert batch['loss_weights_BL'].tolist() == [[float(x) for x in row[1:]] for row in counts]
  assert batch['loss_weights_BL'].dtype == np.float32


@pytest.mark.parametrize('length', LENGTHS)
def test_what_is_cut_is_counted(prepared, length):
  _, _, cut = oracle(length)

  found = questions(prepared, length)

  assert found.num_windows == 5
  assert found.cut_tokens == sum(cut)
  assert found.num_cut == sum(count > 0 for count in cut)


def test_questions_are_read_in_any_order(prepared):
  rows, _, _ = oracle(10)

  batch = questions(prepared, 10).batch(np.array([4, 0, 3, 3]))

  assert batch['inputs_BL'].tolist() == [rows[index][:-1] for index in (4, 0, 3, 3)]


NAMES = ('inputs_BL', 'targets_BL', 'loss_weights_BL')


@pytest.mark.parametrize('length', LENGTHS)
def test_rows_of_many_questions_have_each_as_a_segment(prepared, length):
  alone = questions(prepared, length).batch(np.arange(5))
  sizes = [int(weights_L.nonzero()[0].max()) + 1 for weights_L in alone['loss_weights_BL']]
  expected = [
    tuple(tuple(alone[name][row, :size]) for name in NAMES) for row, size in enumerate(sizes)
  ]

  found = questions(prepared, length, isolate_documents=True)
  batch = found.batch(np.arange(found.num_windows))

  assert found.num_questions == 5
  segments = []
  for row, weights_L in enumerate(batch['loss_weights_BL']):
    is_question = [segment for segment in np.unique(batch['segment_ids_BL'][row][weights_L > 0])]
    for segment in is_question:
      of_segment_L = batch['segment_ids_BL'][row] == segment
      assert batch['position_BL'][row, of_segment_L].tolist() == list(range(of_segment_L.sum()))
      segments.append(tuple(tuple(batch[name][row, of_segment_L]) for name in NAMES))
  assert sorted(segments) == sorted(expected)


def test_an_eos_among_the_inputs_begins_no_segment():
  tokens_L, ends = np.int32([10, EOS, 12, 13, 14, EOS]), np.array([[3, 4, 6]])

  found = batches.Questions([tokens_L], [ends], 8, eos_id=EOS, isolate_documents=True)

  assert found.batch(np.array([0]))['segment_ids_BL'].tolist() == [[1, 1, 1, 1, 1, 1, 2, 2]]


def packed(sizes, length):
  """Returns rows of questions of so many tokens, the EOS of the answer included."""
  end_W = np.cumsum(sizes)
  ends = np.stack([end_W - 3, end_W - 2, end_W], axis=1)
  tokens_L = np.full(end_W[-1], EOS + 1, np.int32)
  tokens_L[end_W - 1] = EOS
  return batches.Questions([tokens_L], [ends], length, eos_id=EOS, isolate_documents=True)


def test_the_first_rows_of_many_questions_are_of_all_lengths():
  """Validation judges by them."""
  length, sizes = 50, np.random.default_rng(0).integers(3, 50, size=400)
  found = packed(sizes, length)

  batch = found.batch(np.arange(40))
  is_answer_BL = batch['loss_weights_BL'] > 0
  longest = np.where(is_answer_BL, batch['position_BL'], 0).max(axis=1) + 1

  assert np.mean(longest) < 0.8 * length


def test_no_two_rows_of_many_questions_would_fit_in_one():
  length, sizes = 50, np.random.default_rng(0).integers(3, 50, size=400)
  found = packed(sizes, length)

  is_answer_BL = found.batch(np.arange(found.num_windows))['loss_weights_BL'] > 0
  used = np.where(is_answer_BL, np.arange(1, length + 1)[None], 0).max(axis=1)
  assert np.sort(used)[:2].sum() > length
  assert sizes.sum() > 0.9 * length * found.num_windows


def test_answers_without_room_are_refused_with_the_length_they_need(prepared):
  message = '1 of 5 answers have no room in length=5: the longest takes 6 tokens'
  with pytest.raises(errors.UserError, match=message):
    questions(prepared, 5)
  with pytest.raises(errors.UserError, match='3 of 5 answers have no room in length=4'):
    questions(prepared, 4)
  assert questions(prepared, 6).num_windows == 5


def test_questions_are_drawn_and_padded_as_windows_are(prepared):
  rows, counts, _ = oracle(8)
  found = questions(prepared, 8)

  sampler = batches.TrainSampler(found, 5, seed=0, process_index=0, process_count=1)
  in_order = list(batches.batches_in_order(found, 3, 9, process_index=0, process_count=1))

  assert sorted(sampler.batch(0)['inputs_BL'].tolist()) == sorted(row[:-1] for row in rows)
  weights = np.concatenate([batch['loss_weights_BL'] for batch in in_order])
  assert weights.tolist() == [[float(x) for x in row[1:]] for row in counts] + [[0.0] * 8]
