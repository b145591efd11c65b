"""Tests `../lex_fire/data/protocols.py`, and masked tokens of its windows."""

import numpy as np
import pytest

from lex_fire import errors
from lex_fire.data import masking, protocols

EOS = 1
SIZE = 259  # ids of tokens; that of the mask
every_protocol = pytest.mark.parametrize('protocol', sorted(protocols.PROTOCOLS))

DOCUMENTS = [
  np.array([20, 21, 1]),
  np.array([30, 31, 32, 33, 34, 35, 36, 37, 1]),
  np.array([40, 41, 42, 43, 1]),
]


def cut(protocol, lengths, documents=DOCUMENTS, max_tokens=100, tokens_per_document=100, stride=0):
  return protocols.get(protocol)(
    documents,
    lengths,
    eos_id=EOS,
    max_tokens=max_tokens,
    tokens_per_document=tokens_per_document,
    stride=stride,
  )


def as_lists(windows):
  """Returns windows of which every target is scored."""
  assert windows.scored_WL.shape == windows.targets_WL.shape
  assert windows.scored_WL.all()
  arrays = (windows.inputs_WL, windows.targets_WL, windows.document_W, windows.offset_W)
  return [array.tolist() for array in arrays]


def random_documents(seed, longest=90, count=20):
  rng = np.random.default_rng(seed)
  return [np.append(rng.integers(3, SIZE, rng.integers(1, longest)), EOS) for _ in range(count)]


def test_documents_without_a_window_are_counted_at_each_length():
  assert [found.too_short for found in cut('windows', [2, 4, 8]).values()] == [0, 1, 2]
  of_same_tokens = cut('same_tokens', [2, 4, 8])
  assert [of_same_tokens[length].too_short for length in (2, 4, 8)] == [2, 2, 2]


def test_windows_take_every_document_that_has_one():
  result = cut('windows', [2, 4])

  assert as_lists(result[4]) == [
    [[1, 30, 31, 32], [33, 34, 35, 36], [1, 40, 41, 42]],
    [[30, 31, 32, 33], [34, 35, 36, 37], [40, 41, 42, 43]],
    [1, 1, 2],
    [0, 4, 0],
  ]
  assert as_lists(result[2]) == [
    [[1, 20], [1, 30], [31, 32], [33, 34], [35, 36], [1, 40], [41, 42]],
    [[20, 21], [30, 31], [32, 33], [34, 35], [36, 37], [40, 41], [42, 43]],
    [0, 1, 1, 1, 1, 2, 2],
    [0, 0, 2, 4, 6, 0, 2],
  ]


def test_same_tokens_cut_the_windows_of_the_longest_again():
  result = cut('same_tokens', [2, 4])

  assert as_lists(result[4]) == as_lists(cut('windows', [4])[4])
  assert as_lists(result[2]) == [
    [[1, 30], [31, 32], [33, 34], [35, 36], [1, 40], [41, 42]],
    [[30, 31], [32, 33], [34, 35], [36, 37], [40, 41], [42, 43]],
    [1, 1, 1, 1, 2, 2],
    [0, 2, 4, 6, 0, 2],
  ]


@pytest.mark.parametrize('seed', range(3))
def test_same_tokens_score_the_same_tokens_of_the_same_documents_at_each_length(seed):
  documents = random_documents(seed)

  result = cut('same_tokens', [4, 8, 32], documents, max_tokens=500, tokens_per_document=64)

  def scored(length):
    windows = result[length]
    owner = np.repeat(windows.document_W, length)
    return sorted(zip(owner.tolist(), windows.targets_WL.ravel().tolist(), strict=True))

  assert scored(4) == scored(8) == scored(32)


@every_protocol
def test_a_target_has_for_input_the_token_before_it_in_its_document(protocol):
  for length, windows in cut(protocol, [1, 2, 4]).items():
    for document in np.unique(windows.document_W):
      mine = windows.document_W == document
      targets = windows.targets_WL[mine].ravel()
      assert targets.tolist() == DOCUMENTS[document][: len(targets)].tolist()
      assert windows.inputs_WL[mine].ravel().tolist() == [EOS, *targets[:-1]]
    for targets_L, document, offset in zip(
      windows.targets_WL, windows.document_W, windows.offset_W, strict=True
    ):
      assert targets_L.tolist() == DOCUMENTS[document][offset : offset + length].tolist()
    assert windows.targets_WL.shape[1] == length
    assert [str(array.dtype) for array in windows[:5]] == [*['int32'] * 2, 'bool', *['int32'] * 2]


@every_protocol
def test_the_budget_is_spent_in_order_and_reads_no_further(protocol):
  def documents():
    yield from DOCUMENTS[:2]
    raise AssertionError('read past the budget')

  result = cut(protocol, [4], documents(), max_tokens=7)

  assert as_lists(result[4]) == [[[1, 30, 31, 32]], [[30, 31, 32, 33]], [1], [0]]


@every_protocol
def test_the_budget_of_a_document_spreads_the_whole_budget(protocol):
  result = cut(protocol, [4], tokens_per_document=7)

  assert result[4].document_W.tolist() == [1, 2]


@every_protocol
def test_documents_that_are_all_too_short_are_refused(protocol):
  with pytest.raises(errors.UserError, match='window of length 16: the longest has 9 tokens'):
    cut(protocol, [8, 16])


@pytest.mark.parametrize('budget', ['max_tokens', 'tokens_per_document'])
@every_protocol
def test_a_budget_of_less_than_a_window_is_refused(protocol, budget):
  with pytest.raises(errors.UserError, match=f'{budget}=7 is less than a window of length=8'):
    cut(protocol, [4, 8], **{budget: 7})


def test_same_tokens_refuse_a_length_that_does_not_divide_the_longest():
  with pytest.raises(errors.UserError, match='length=3 does not divide the longest, 4'):
    cut('same_tokens', [2, 3, 4])


def test_an_unknown_protocol_is_refused_with_the_known():
  with pytest.raises(errors.UserError, match="'sliding'; known: windows, same_tokens"):
    protocols.get('sliding')


# Strides


def scored_by_hand(tokens, length, stride):
  """Yields (context, target) of a document's scored tokens, by the definition, one by one."""
  known = [EOS, *tokens[:-1]]  # known[i] is read when tokens[i] is predicted
  start = 0
  while start + length <= len(tokens):
    first = 0 if start == 0 else start + length - stride
    for index in range(first, start + length):
      yield known[start : index + 1], tokens[index]
    start += stride


def scored(windows):
  """Returns {document: [(context, target) ...]} of the scored tokens, in the order of windows."""
  found = {}
  for inputs_L, targets_L, scored_L, document in zip(
    windows.inputs_WL, windows.targets_WL, windows.scored_WL, windows.document_W, strict=True
  ):
    of_document = found.setdefault(int(document), [])
    for index in np.flatnonzero(scored_L):
      of_document.append((inputs_L[: index + 1].tolist(), int(targets_L[index])))
  return found


def test_a_window_moves_on_by_its_stride_and_scores_that_many_of_its_last_targets():
  (windows,) = cut('windows', [4], stride=2).values()

  assert windows.inputs_WL.tolist() == [
    *([1, 30, 31, 32], [31, 32, 33, 34], [33, 34, 35, 36]),
    [1, 40, 41, 42],
  ]
  assert windows.targets_WL.tolist() == [
    *([30, 31, 32, 33], [32, 33, 34, 35], [34, 35, 36, 37]),
    [40, 41, 42, 43],
  ]
  assert windows.scored_WL.astype(int).tolist() == [
    *([1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]),
    [1, 1, 1, 1],
  ]
  assert windows.document_W.tolist() == [1, 1, 1, 2]
  assert windows.offset_W.tolist() == [0, 2, 4, 0]


@every_protocol
@pytest.mark.parametrize('stride', [1, 2, 4, 8])
def test_every_token_is_scored_once_after_the_tokens_that_the_stride_gives_it(protocol, stride):
  documents = random_documents(seed=stride)
  lengths = [8, 16, 32]

  result = cut(protocol, lengths, documents, max_tokens=10_000, stride=stride)

  for length, windows in result.items():
    expected = {}
    for index, tokens_L in enumerate(documents):
      if len(tokens_L) >= (length if protocol == 'windows' else 32):
        tokens = tokens_L[: len(tokens_L) // stride * stride].tolist()
        expected[index] = list(scored_by_hand(tokens, length, stride))
        assert [target for _, target in expected[index]] == tokens  # each once, in order
        contexts = [len(context) for context, _ in expected[index]]
        assert contexts[:length] == list(range(1, length + 1))
        assert set(contexts[length:]) <= set(range(length - stride + 1, length + 1))
    assert scored(windows) == expected


@pytest.mark.parametrize('stride', [1, 2, 8])
def test_every_length_scores_the_same_tokens_whatever_the_stride_and_the_budget(stride):
  lengths = [8, 24, 32]  # of which one does not divide the longest, as it need not

  result = cut(
    'same_tokens', lengths, random_documents(5), 300, tokens_per_document=50, stride=stride
  )

  targets = {
    length: {document: [target for _, target in pairs] for document, pairs in scored(cut).items()}
    for length, cut in result.items()
  }
  assert targets[8] == targets[24] == targets[32]
  total = sum(map(len, targets[32].values()))
  assert 300 - 32 < total <= 300
  assert max(map(len, targets[32].values())) == 50 // stride * stride


@every_protocol
def test_a_stride_of_the_length_is_none(protocol):
  documents = random_documents(7)

  for own, end_to_end in zip(
    cut(protocol, [16], documents, stride=16)[16], cut(protocol, [16], documents)[16], strict=True
  ):
    np.testing.assert_array_equal(own, end_to_end)


@every_protocol
@pytest.mark.parametrize('stride, length', [(3, 4), (16, 4), (8, 4)])
def test_a_stride_that_does_not_divide_a_length_is_refused(protocol, stride, length):
  with pytest.raises(errors.UserError, match=f'stride={stride} does not divide length={length}'):
    cut(protocol, [4, 8], stride=stride)


@every_protocol
def test_a_negative_stride_is_refused(protocol):
  with pytest.raises(errors.UserError, match='stride=-2 must be at least 1, or 0 for windows'):
    cut(protocol, [4, 8], stride=-2)


# Masked tokens of evaluation windows


@pytest.fixture(scope='module')
def long_documents():
  return random_documents(0, longest=3000, count=40)


def masked(windows, rate=0.15):
  """Returns what stands in the place of each scored token: {(document, index): input}."""
  out = masking.corrupt_windows(windows, rate=rate, vocabulary_size=SIZE)
  scored_WL = out.scored_WL
  assert (out.inputs_WL[~scored_WL] == windows.targets_WL[~scored_WL]).all()
  assert out.inputs_WL.dtype == np.int32 and scored_WL.dtype == bool
  for field in ('targets_WL', 'document_W', 'offset_W'):
    assert getattr(out, field) is getattr(windows, field)
  index_WL = windows.offset_W[:, None] + np.arange(windows.targets_WL.shape[1])[None]
  document_WL = np.broadcast_to(windows.document_W[:, None], index_WL.shape)
  keys = zip(document_WL[scored_WL].tolist(), index_WL[scored_WL].tolist(), strict=True)
  return dict(zip(keys, out.inputs_WL[scored_WL].tolist(), strict=True))


@every_protocol
def test_a_token_of_a_document_is_masked_alike_at_every_length(protocol, long_documents):
  budget = {'max_tokens': 20_000, 'tokens_per_document': 1024}
  cut_again = cut(protocol, [8, 64, 512], long_documents, **budget)

  of_length = {length: masked(windows) for length, windows in cut_again.items()}

  longest = of_length[512]
  for length, inputs in of_length.items():
    assert len(inputs) == pytest.approx(0.15 * cut_again[length].targets_WL.size, rel=0.1)
    for key in set(inputs) & set(longest):
      assert inputs[key] == longest[key]
    if protocol == 'same_tokens':
      assert inputs == longest
  share = np.mean([token == SIZE for token in longest.values()])
  assert share == pytest.approx(0.8, abs=0.04)


def test_an_evaluation_in_which_no_token_is_masked_is_refused(long_documents):
  windows = cut('windows', [8], long_documents, max_tokens=8)[8]

  with pytest.raises(errors.UserError, match='mask rate=1e-09 chooses none of 8 tokens'):
    masking.corrupt_windows(windows, rate=1e-9, vocabulary_size=SIZE)


def test_a_token_that_a_window_does_not_score_is_not_asked_for(long_documents):
  windows = cut('windows', [16], long_documents, stride=4)[16]

  out = masking.corrupt_windows(windows, rate=0.5, vocabulary_size=SIZE)

  assert not (out.scored_WL & ~windows.scored_WL).any()
  assert out.scored_WL.sum() == pytest.approx(windows.scored_WL.sum() / 2, rel=0.1)
