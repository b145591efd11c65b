"""Random numbers by address: each is a pure function of a seed and of what it is drawn for.

A generator with a state would have to be saved, shared out among hosts and wound on at a resume.
Here the number of token 7 of draw 12 is reached at once, on any host. The generator is SplitMix64
(Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators", OOPSLA): output n of
seed s is mix(s + (n + 1) gamma) modulo 2^64.
"""

from __future__ import annotations

import numpy as np

JUDGE = 2**32  # the seed of validation and evaluation, the same for all runs; training's are below
# The first index of an address: what the number decides. So no two decisions share one.
CHOICE, CHANGE, TOKEN, POSITION, PART, WINDOW = range(6)
_GAMMA = 0x9E3779B97F4A7C15  # the odd number nearest to 2^64 over the golden ratio


def uniform(seed: int, *address: int | np.ndarray) -> np.ndarray:
  """Returns a number in [0, 1) for each address, float64 of at least one dimension.

  The output of the seed at the first index seeds the generator whose output is taken at the next.

  Args:
    seed: 0 to 2**64 - 1.
    *address: indices >= 0, whole numbers or integer arrays, which broadcast; the varying ones last
      cost least.
  """
  state = np.array([seed], np.uint64)
  for index in address:
    # At least one dimension, for arrays wrap around silently and scalars warn.
    count = np.atleast_1d(index).astype(np.uint64) + np.uint64(1)
    state = _mix(state + count * np.uint64(_GAMMA))
  return (state >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))
