"""The two protocols by which documents become the windows of a length evaluation.

A window's inputs are the tokens before its targets; before the first token of a document stands
EOS, as in training. The first window stands at the beginning of a document, and each later one a
stride of S targets further on, of which it scores its last S: each token is so scored once, and all
but those of first windows of length L with at least L - S tokens before them. Without a stride
windows lie end to end, which is a stride of L. What is left of a document is dropped.
- 'windows': each length takes every document that has a window of it, so short lengths score
  documents that long ones do not (Li et al. 2023, "Functional Interpolation for Relative
  Positions", arXiv:2310.04418).
- 'same_tokens': every length scores the same tokens, those that the longest does, so only the
  context differs (Sun et al. 2022, "A Length-Extrapolatable Transformer", arXiv:2212.10554).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lex_fire import errors


class EvaluationWindows(NamedTuple):
  """Windows of one length.

  Attributes:
    inputs_WL: int32 tokens.
    targets_WL: int32 tokens, each the one after its input.
    scored_WL: bool, whether a target is to be scored.
    document_W: int32 index of the document that a window is from, for errors by document.
    offset_W: int32 index in its document of a window's first target.
    too_short: how many of the documents that were read have no window of this length.
  """

  inputs_WL: np.ndarray
  targets_WL: np.ndarray
  scored_WL: np.ndarray
  document_W: np.ndarray
  offset_W: np.ndarray
  too_short: int


def windows(
  documents: Iterable[np.ndarray],
  lengths: Sequence[int],
  *,
  eos_id: int,
  max_tokens: int,
  tokens_per_document: int,
  stride: int = 0,
) -> dict[int, EvaluationWindows]:
  """Cuts, at each length, the documents that have at least one window of it.

  Args:
    documents: tokens_L that end in EOS; read once, in order, no further than the budget goes.
    lengths: of the windows, in tokens.
    eos_id: the token before each document.
    max_tokens: the budget, the most tokens to score at each length.
    tokens_per_document: the most to score of one document, to spread the budget over documents.
    stride: by which windows move on, in tokens; 0: each by its own length.

  Returns:
    {length: its windows}.

  Raises:
    errors.UserError: if the stride does not divide a length, no document is as long as a length, or
      max_tokens or tokens_per_document is less than one window.
  """
  _check_stride(lengths, stride)
  budgets = {'max_tokens': max_tokens, 'tokens_per_document': tokens_per_document}
  strides = {length: stride or length for length in lengths}
  beginnings = _beginnings(documents, strides, **budgets)
  return {length: _cut(beginnings[length], length, strides[length], eos_id) for length in lengths}


def same_tokens(
  documents: Iterable[np.ndarray],
  lengths: Sequence[int],
  *,
  eos_id: int,
  max_tokens: int,
  tokens_per_document: int,
  stride: int = 0,
) -> dict[int, EvaluationWindows]:
  """Cuts windows of the longest length, and their tokens at each length; otherwise as `windows`.

  The tokens are whole strides from the beginning of a document, the first of them in the first
  window. So any length that the stride divides scores them all, each once.

  Raises:
    errors.UserError: without a stride, if a length does not divide the longest; or as `windows`
      does.
  """
  longest = max(lengths)
  for length in lengths:
    if not stride and longest % length:
      raise errors.UserError(
        f'{length=} does not divide the longest, {longest}; use lengths that do'
      )
  _check_stride(lengths, stride)
  budgets = {'max_tokens': max_tokens, 'tokens_per_document': tokens_per_document}
  beginnings = _beginnings(documents, {longest: stride or longest}, **budgets)[longest]
  return {length: _cut(beginnings, length, stride or length, eos_id) for length in lengths}


Protocol = Callable[..., dict[int, EvaluationWindows]]
PROTOCOLS: dict[str, Protocol] = {'windows': windows, 'same_tokens': same_tokens}


def get(name: str) -> Protocol:
  """Returns a protocol by its name.

  Raises:
    errors.UserError: if the name is unknown.
  """
  if name not in PROTOCOLS:
    raise errors.UserError(f'unknown protocol {name!r}; known: {", ".join(PROTOCOLS)}')
  return PROTOCOLS[name]


def _check_budgets(length: int, **budgets: int) -> None:
  for name, budget in budgets.items():
    if budget < length:
      raise errors.UserError(f'{name}={budget} is less than a window of {length=}; raise it')


def _check_stride(lengths: Sequence[int], stride: int) -> None:
  if stride < 0:
    raise errors.UserError(f'{stride=} must be at least 1, or 0 for windows end to end')
  for length in lengths if stride else ():
    if length % stride:
      raise errors.UserError(
        f'{stride=} does not divide {length=}; use one that divides all lengths, and none is longer'
      )


class Beginnings:
  """Beginnings of documents that are scored at one length.

  Attributes:
    of_documents: the index of each, and its tokens.
    too_short: how many documents have none.
  """

  def __init__(self):
    """Begins with none."""
    self.of_documents: list[tuple[int, np.ndarray]] = []
    self.too_short = 0


def _beginnings(
  documents: Iterable[np.ndarray],
  strides: Mapping[int, int],
  *,
  max_tokens: int,
  tokens_per_document: int,
) -> dict[int, Beginnings]:
  """Returns what of documents is scored at each length: as much as the budgets let.

  It is a whole number of strides, and at least a window.
  """
  longest = max(strides)
  _check_budgets(longest, max_tokens=max_tokens, tokens_per_document=tokens_per_document)
  found = {length: Beginnings() for length in strides}
  left = dict.fromkeys(strides, max_tokens)
  longest_document = 0
  for index, tokens_L in enumerate(documents):
    longest_document = max(longest_document, len(tokens_L))
    for length, stride in strides.items():
      take = min(len(tokens_L), tokens_per_document, left[length]) // stride * stride
      found[length].too_short += len(tokens_L) < length
      if take >= length:
        found[length].of_documents.append((index, tokens_L[:take]))
        left[length] -= take
    if all(left[length] < length for length in strides):
      break
  if not found[longest].of_documents:
    raise errors.UserError(
      f'no document has a window of length {longest}: the longest has {longest_document} tokens;'
      ' use shorter lengths or longer documents'
    )
  return found


def _cut(beginnings: Beginnings, length: int, stride: int, eos_id: int) -> EvaluationWindows:
  """Cuts windows of beginnings of documents, which are whole strides and at least a window."""
  indices, tokens = zip(*beginnings.of_documents, strict=True)

  def cut(tokens_L):
    return np.lib.stride_tricks.sliding_window_view(tokens_L, length)[::stride]

  inputs = [cut(np.append(np.int32(eos_id), tokens_L[:-1])) for tokens_L in tokens]
  offsets = [np.arange(len(of_one), dtype=np.int32) * stride for of_one in inputs]
  offset_W = np.concatenate(offsets)
  is_last_L = np.arange(length) >= length - stride
  return EvaluationWindows(
    inputs_WL=np.concatenate(inputs).astype(np.int32),
    targets_WL=np.concatenate([cut(tokens_L) for tokens_L in tokens]).astype(np.int32),
    scored_WL=(offset_W == 0)[:, None] | is_last_L[None],
    document_W=np.repeat(np.array(indices, np.int32), [len(of_one) for of_one in inputs]),
    offset_W=offset_W,
    too_short=beginnings.too_short,
  )
