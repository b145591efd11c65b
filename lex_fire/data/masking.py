"""Masked-language modelling: a bidirectional model restores tokens that its inputs hide.

BERT's recipe (Devlin et al. 2018, arXiv:1810.04805, section 3.1): 15% of a row's tokens are chosen;
of these 80% become the mask, 10% a random token and 10% stay, and the loss is theirs alone.
Departures: EOS, an ordinary token here, may be chosen; and masks are drawn anew in each epoch (as
in Liu et al. 2019, arXiv:1907.11692, section 4.1).

Inputs are the targets, corrupted: position by position the same token, not the one before it. The
mask's id is the size of the vocabulary, one past its last, so that it is no token of any text. The
model so needs one id more than the vocabulary has.
"""

from __future__ import annotations

import numpy as np

from lex_fire import errors
from lex_fire.data import batches, draws, protocols

_MASKED, _RANDOM = 0.8, 0.1  # of the chosen; the rest stay


def corrupt(
  batch: batches.Batch, draw_B: np.ndarray, *, seed: int, rate: float, vocabulary_size: int
) -> batches.Batch:
  """Returns the batch with corrupted targets for inputs and the loss of chosen tokens alone.

  As many tokens are chosen in every row: the nearest whole number to `rate` of it, at least one.

  Args:
    batch: of next-token prediction; a row is changed as its draw says, on whatever host it is.
    draw_B: number >= 0 of each row, counted over all batches: equal draws, equal masks.
    seed: of the masks, as for draws.uniform.
    rate: of the tokens to choose, between 0 and 1.
    vocabulary_size: ids of tokens, and the id of the mask.
  """
  targets_BL = batch['targets_BL']
  address = (draw_B[:, None], np.arange(targets_BL.shape[1])[None])
  count = max(1, round(rate * targets_BL.shape[1]))
  order_BL = draws.uniform(seed, draws.CHOICE, *address)
  chosen_BL = order_BL <= np.partition(order_BL, count - 1, axis=1)[:, count - 1 : count]
  return {
    **batch,
    'inputs_BL': _corrupted(targets_BL, chosen_BL, seed, address, vocabulary_size),
    'loss_weights_BL': batch['loss_weights_BL'] * chosen_BL,
  }


def corrupt_windows(
  windows: protocols.EvaluationWindows, *, rate: float, vocabulary_size: int
) -> protocols.EvaluationWindows:
  """Returns windows for a bidirectional model, which score but those of their targets it restores.

  A token is chosen, and changed, by its document and its index there: at every length of a window,
  and for every model, the same tokens are asked for. Each is chosen by itself, so that their number
  is about `rate` of all, and may be 0 in a short window.

  Args:
    windows: of one length; their targets, corrupted, become their inputs.
    rate: of the tokens to choose, between 0 and 1.
    vocabulary_size: as for corrupt.

  Raises:
    errors.UserError: if no token is chosen at all.
  """
  index_WL = windows.offset_W[:, None] + np.arange(windows.targets_WL.shape[1])[None]
  address = (windows.document_W[:, None], index_WL)
  chosen_WL = draws.uniform(draws.JUDGE, draws.CHOICE, *address) < rate
  scored_WL = windows.scored_WL & chosen_WL
  if not scored_WL.any():
    raise errors.UserError(
      f'a mask {rate=} chooses none of {windows.scored_WL.sum()} tokens; raise it or evaluate more '
      'tokens'
    )
  inputs_WL = _corrupted(windows.targets_WL, chosen_WL, draws.JUDGE, address, vocabulary_size)
  return windows._replace(inputs_WL=inputs_WL, scored_WL=scored_WL)


def _corrupted(tokens_BL, chosen_BL, seed, address, vocabulary_size):
  """Returns the tokens with the chosen ones masked, replaced or kept, by lot, as int32."""
  change_BL = draws.uniform(seed, draws.CHANGE, *address)
  random_BL = (draws.uniform(seed, draws.TOKEN, *address) * vocabulary_size).astype(np.int32)
  changed_BL = np.where(change_BL < _MASKED + _RANDOM, random_BL, tokens_BL)
  changed_BL = np.where(change_BL < _MASKED, np.int32(vocabulary_size), changed_BL)
  return np.where(chosen_BL, changed_BL, tokens_BL)
