"""xPos: RoPE whose pairs also decay with distance, the encoding of LeX.

Sun et al. 2022, arXiv:2212.10554, section 2.
"""

import math

import numpy as np

from lex_fire import errors
from lex_fire.encodings import base, rope, rotary


def log_decay(num_pairs: int, gamma: float, scale_base: float) -> np.ndarray:
  """Returns log_decay_R [nats per token].

  log(zeta_m) / B,   zeta_m = (2m/C + gamma) / (1 + gamma)
  """
  return np.log((np.arange(num_pairs) / num_pairs + gamma) / (1 + gamma)) / scale_base


def xpos(
  base_period: float = 10_000.0,
  gamma: float = 0.4,
  scale_base: float = 512.0,
  pairing: str = 'interleaved',
) -> base.Encoding:
  """xPos: pair m of (q_i, k_j) turns by (i - j) theta_m and shrinks by zeta_m^((i - j) / B).

  The paper multiplies q by zeta^(i/B) and k by zeta^(-j/B), which leaves float32 near position
  35,000. Only i - j matters: the rate is handed to the attention kernel, which subtracts an origin
  near each tile (departure in arithmetic, not in value).

  Args:
    base_period: the b of theta_m = b^(-2m/C).
    gamma: the paper's gamma, > 0; the slowest pair has zeta near 1, the fastest
      gamma / (1 + gamma).
    scale_base: the paper's B [tokens], > 0.
    pairing: 'interleaved' (the paper) or 'halves'.

  Raises:
    errors.UserError: for gamma or scale_base <= 0, or an unknown pairing.
  """
  if not (0 < gamma < math.inf and 0 < scale_base < math.inf):
    raise errors.UserError(f'xpos needs {gamma=} and {scale_base=} above 0 and finite')

  def decay(head_dim: int) -> np.ndarray:
    return rotary.spread_pairs(log_decay(head_dim // 2, gamma, scale_base), pairing)

  return rope.rope(base_period, pairing)._replace(name='xpos', log_decay=decay)
