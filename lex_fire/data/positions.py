"""Randomized positions: short rows take positions from a range as long as the rows of tests.

Ruoss et al. 2023, arXiv:2305.16843, section 3: a row of L tokens takes L positions of a longer
range, drawn without replacement and sorted. So the order of tokens stays, and no position of the
range is left untrained. As in their experiments one sample serves all rows of a batch; they also
then share their relative biases. Tests draw positions as training does.

Departures: they also draw the length of each batch, which is fixed here; and for relative biases
they draw the distances, where here every encoding sees the drawn positions, and distances are their
differences. Zhou et al. 2024 (arXiv:2402.09371) pair FIRE with randomized positions.
"""

from __future__ import annotations

import numpy as np

from lex_fire.data import batches, draws


def sample(length: int, position_range: int, *, seed: int, ordinal: int) -> np.ndarray:
  """Returns position_L, int32: `length` different positions below `position_range`, sorted.

  Args:
    length: how many [tokens].
    position_range: at least as many [tokens].
    seed: as for draws.uniform.
    ordinal: the batch, counted from 0.
  """
  order_Z = draws.uniform(seed, draws.POSITION, ordinal, np.arange(position_range))
  return np.sort(np.argpartition(order_Z, length - 1)[:length]).astype(np.int32)


def randomize(
  batch: batches.Batch, position_range: int, *, seed: int, ordinal: int
) -> batches.Batch:
  """Returns the batch with position p of each segment moved to the p-th position of one sample.

  Args:
    batch: whose positions lie below its length.
    position_range: as for sample.
    seed: the same on all hosts.
    ordinal: the batch, counted from 0.
  """
  length = batch['inputs_BL'].shape[1]
  position_L = sample(length, position_range, seed=seed, ordinal=ordinal)
  counted_BL = batch['position_BL']
  position_BL = position_L[None] if counted_BL is None else position_L[counted_BL]
  return {**batch, 'position_BL': position_BL}
