"""NTK-aware RoPE: a larger base, so that the slowest pair is interpolated and the fastest is not.

bloc97 2023, as Peng et al. 2023 state it (YaRN, arXiv:2309.00071, section 3.1); the dynamic form is
emozilla's (section 3.3 there).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from lex_fire.encodings import base, rotary

LEVELS_PER_DOUBLING = 8  # of the dynamic scale: each is 2^(1/8), some 9%, above the one before
LEAST_WIDTH = 4  # [channels]; a head of one pair has no slower one, and an exponent C / 0


def turns_per_token(head_dim: int, base_period: float, scale: float) -> np.ndarray:
  """Returns turn_R, float64: RoPE's with the base b s^(C / (C - 2)), so that the last is 1/s."""
  return rotary.turns_per_token(head_dim, base_period * scale ** (head_dim / (head_dim - 2)))


def ntk(
  scale: float = 4.0, base_period: float = 10_000.0, pairing: str = 'halves'
) -> base.Encoding:
  """NTK-aware RoPE: theta_m = (b s^(C / (C - 2)))^(-2m/C).

  Args:
    scale: the s of an evaluation at s times the training length, >= 1. The default takes the 2048
      tokens that FIRE's authors train on to the 8192 that they evaluate (arXiv:2310.04418, section
      4).
    base_period: b.
    pairing: 'halves' (Llama) or 'interleaved' (GPT-J).

  Raises:
    errors.UserError: for a bad scale or period, an unknown pairing, and by `init` for a head width
      that is odd or below 4.
  """
  rotary.check_extension(scale)
  rotary.turns_per_token(2, base_period)  # refuses a bad period now, not at the first call

  def angles(position_BL: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
    return rotary.cos_sin(position_BL, turns_per_token(head_dim, base_period, scale))

  return rotary.encoding('ntk', angles, pairing, LEAST_WIDTH)


def longest(train_length: int) -> np.ndarray:
  """Returns length_Z [tokens]: the longest row of every level of the dynamic scale but the last.

  At level z, s = 2^(z/8) serves up to the whole part of train_length 2^(z/8) tokens. Whole numbers
  throughout: three square roots are the eighth. The last level begins where int32 positions end.
  """
  lengths: list[int] = []
  while True:
    power = train_length**LEVELS_PER_DOUBLING << len(lengths)
    length = math.isqrt(math.isqrt(math.isqrt(power)))
    if length > np.iinfo(np.int32).max:
      return np.array(lengths, np.int32)
    lengths.append(length)


def dynamic_ntk(
  train_length: int = 2048, base_period: float = 10_000.0, pairing: str = 'halves'
) -> base.Encoding:
  """Dynamic NTK: NTK-aware RoPE whose s follows the row, s = max(1, length / train_length).

  The length is the row's greatest position + 1, so that rows within the training length are RoPE's
  and longer ones turn slower, from their first token on: as a row grows, the logits of its prefix
  change, and a cache must hold keys as they were before rotation. In a packed row the longest
  document decides.

  Departure: s is rounded up to a power of 2^(1/8), which is at most 9.1% more. For each power the
  angles are exact at any position, which with a theta computed in float32 they would not be.

  Args:
    train_length: rows up to here are not scaled [tokens]; FIRE's authors train on 2048.
    base_period: the b of `ntk`.
    pairing: 'halves' (Llama) or 'interleaved' (GPT-J).

  Raises:
    errors.UserError: for a train_length below 1, a bad period, an unknown pairing, and by `init`
      for a head width that is odd or below 4.
  """
  rotary.check_extension(train_length=train_length)
  rotary.turns_per_token(2, base_period)  # refuses a bad period now, not at the first call
  length_Z = longest(train_length)
  scale_Z = 2.0 ** (np.arange(len(length_Z) + 1) / LEVELS_PER_DOUBLING)

  def angles(position_BL: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
    turn_ZR = np.stack([turns_per_token(head_dim, base_period, scale) for scale in scale_Z])
    last_B1 = position_BL.max(axis=1, keepdims=True)
    # last >= length is last + 1 > length, where last + 1 might not be an int32.
    level_B = (last_B1 >= length_Z[None]).sum(axis=1)
    high_ZR, low_ZR = (jnp.uint32(bits_ZR) for bits_ZR in rotary.fixed_point(turn_ZR))
    return rotary.fixed_cos_sin(position_BL, high_ZR[level_B][:, None], low_ZR[level_B][:, None])

  encoding = rotary.encoding('dynamic_ntk', angles, pairing, LEAST_WIDTH)
  return encoding._replace(shift_invariant=False, prefix_stable=False)
