"""The two protocols by which documents become the windows of a length evaluation.

A window's inputs are the tokens before its targets; before the first token of a document stands
EOS, as in training. Windows lie end to end from the beginning of a document; the rest is dropped.
- 'windows': each length takes every document that has a window of it, so short lengths score
  documents that long ones do not (Li et al. 2023, "Functional Interpolation for Relative
  Positions", arXiv:2310.04418).
- 'same_tokens': every length scores the same tokens, those in windows of the longest, so only the
  context differs (Sun et al. 2022, "A Length-Extrapolatable Transformer", arXiv:2212.10554).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from lex_fire import errors


class EvaluationWindows(NamedTuple):
  """Windows of one length.

  Attributes:
    inputs_WL: int32 tokens.
    targets_WL: int32 tokens, each the one after its input; all are to be scored.
    document_W: int32 index of the document that a window is from, for errors by document.
    offset_W: int32 index in its document of a window's first target.
  """

  inputs_WL: np.ndarray
  targets_WL: np.ndarray
  document_W: np.ndarray
  offset_W: np.ndarray


def windows(
  documents: Iterable[np.ndarray],
  lengths: Sequence[int],
  *,
  eos_id: int,
  max_tokens: int,
  tokens_per_document: int,
) -> dict[int, EvaluationWindows]:
  """Cuts, at each length, the documents that have at least one window of it.

  Args:
    documents: tokens_L that end in EOS; read once, in order, no further than the budget goes.
    lengths: of the windows, in tokens.
    eos_id: the token before each document.
    max_tokens: the budget, the most tokens to score at each length.
    tokens_per_document: the most to score of one document, to spread the budget over documents.

  Returns:
    {length: its windows}.

  Raises:
    errors.UserError: if no document is as long as a length, or max_tokens or tokens_per_document
      is less than one window.
  """
  _check_budgets(max(lengths), max_tokens=max_tokens, tokens_per_document=tokens_per_document)
  pieces = {length: [] for length in lengths}
  left = {length: max_tokens // length * length for length in lengths}
  longest_document = 0
  for index, tokens_L in enumerate(documents):
    longest_document = max(longest_document, len(tokens_L))
    for length in lengths:
      take = min(len(tokens_L), tokens_per_document, left[length]) // length * length
      if take:
        pieces[length].append((index, tokens_L[:take]))
        left[length] -= take
    if not any(left.values()):
      break
  if not pieces[max(lengths)]:
    raise errors.UserError(
      f'no document has a window of length {max(lengths)}: the longest has {longest_document}'
      ' tokens; use shorter lengths or longer documents'
    )
  return {length: _join(pieces[length], length, eos_id) for length in lengths}


def same_tokens(
  documents: Iterable[np.ndarray],
  lengths: Sequence[int],
  *,
  eos_id: int,
  max_tokens: int,
  tokens_per_document: int,
) -> dict[int, EvaluationWindows]:
  """Cuts windows of the longest length, and those again at each length; otherwise as `windows`.

  Raises:
    errors.UserError: if a length does not divide the longest, or as `windows` does.
  """
  longest = max(lengths)
  for length in lengths:
    if longest % length:
      raise errors.UserError(
        f'{length=} does not divide the longest, {longest}; use lengths that do'
      )
  inputs_WL, targets_WL, document_W, offset_W = windows(
    documents,
    [longest],
    eos_id=eos_id,
    max_tokens=max_tokens,
    tokens_per_document=tokens_per_document,
  )[longest]
  return {
    length: EvaluationWindows(
      inputs_WL.reshape(-1, length),
      targets_WL.reshape(-1, length),
      np.repeat(document_W, longest // length),
      (offset_W[:, None] + np.arange(0, longest, length, dtype=np.int32)[None]).ravel(),
    )
    for length in lengths
  }


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


def _join(pieces: Sequence[tuple[int, np.ndarray]], length: int, eos_id: int) -> EvaluationWindows:
  """Joins beginnings of documents, of a whole number of windows each, and their indices."""
  indices, beginnings = zip(*pieces, strict=True)
  inputs = [np.concatenate([[eos_id], tokens_L[:-1]]) for tokens_L in beginnings]
  counts = [len(tokens_L) // length for tokens_L in beginnings]
  return EvaluationWindows(
    np.concatenate(inputs).astype(np.int32).reshape(-1, length),
    np.concatenate(beginnings).astype(np.int32).reshape(-1, length),
    np.repeat(np.array(indices, np.int32), counts),
    np.concatenate([np.arange(count, dtype=np.int32) * length for count in counts]),
  )
