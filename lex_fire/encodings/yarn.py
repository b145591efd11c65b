"""YaRN: slow pairs interpolated, fast pairs not, a ramp between them, and sharper attention.

Peng et al. 2023, arXiv:2309.00071v2, sections 3.2 ("NTK-by-parts" interpolation) and 3.4 (YaRN).
"""

import math

import jax
import numpy as np

from lex_fire import errors
from lex_fire.encodings import base, rotary


def _paper_ramp(
  head_dim: int, base_period: float, train_length: int, beta_fast: float, beta_slow: float
) -> np.ndarray:
  """Returns gamma_R, linear in r_m = L / lambda_m, the turns of pair m in the training length."""
  r_R = train_length * rotary.turns_per_token(head_dim, base_period)
  return np.clip((r_R - beta_slow) / (beta_fast - beta_slow), 0, 1)


def _code_ramp(
  head_dim: int, base_period: float, train_length: int, beta_fast: float, beta_slow: float
) -> np.ndarray:
  """Returns gamma_R, linear in m from below the m with r_m = beta_fast to above that of beta_slow.

  Raises:
    errors.UserError: where that range of pairs would end before it starts, at any head width.
  """
  shortest, longest = 2 * math.pi * beta_slow, 2 * math.pi * beta_fast * base_period**2
  if not (base_period > 1 and shortest <= train_length < longest):
    raise errors.UserError(
      f"yarn with ramp='code' needs {base_period=} above 1, and {train_length=} from 2 pi "
      f'beta_slow ({shortest:.3g}) to below 2 pi beta_fast base_period^2 ({longest:.3g}); '
      "ramp='paper' does not"
    )

  def pair(turns: float) -> float:
    """The m, whole or not, of which so many turns fill the training length."""
    return head_dim * math.log(train_length / (2 * math.pi * turns)) / (2 * math.log(base_period))

  first = max(math.floor(pair(beta_fast)), 0)
  last = min(math.ceil(pair(beta_slow)), head_dim - 1)
  # Where both are one pair, the code makes a step after it.
  return 1 - np.clip((np.arange(head_dim // 2) - first) / max(last - first, 0.001), 0, 1)


RAMPS = {'paper': _paper_ramp, 'code': _code_ramp}


def yarn(
  scale: float = 4.0,
  train_length: int = 2048,
  beta_fast: float = 32.0,
  beta_slow: float = 1.0,
  ramp: str = 'paper',
  base_period: float = 10_000.0,
  pairing: str = 'halves',
) -> base.Encoding:
  """YaRN: pair m turns by n ((1 - gamma_m) / s + gamma_m) theta_m; logits grow by (0.1 ln s + 1)^2.

      gamma_m = clip((r_m - alpha) / (beta - alpha), 0, 1),   r_m = L theta_m / 2 pi

  Pairs that turn more than beta = `beta_fast` times in the training length L are left alone, those
  that turn less than alpha = `beta_slow` times are interpolated. Queries and keys each grow by
  0.1 ln s + 1, the paper's sqrt(1/t).

  The authors' program is not their formula: gamma is linear in m there, between pairs rounded
  outwards, and theta_m up to 1.8 times the paper's (by the defaults, for heads of 64). Published
  checkpoints were trained with the program: `ramp='code'` is for them (jquesnelle/yarn,
  scaled_rope/LlamaYaRNScaledRotaryEmbedding.py; huggingface/transformers,
  src/transformers/modeling_rope_utils.py).

  Args:
    scale: s, evaluation length over training length, >= 1. The default takes the 2048 tokens that
      FIRE's authors train on to the 8192 that they evaluate (arXiv:2310.04418, section 4).
    train_length: L [tokens].
    beta_fast: the paper's beta [turns]; 32 suits Llama, it says.
    beta_slow: the paper's alpha [turns], above 0 and below `beta_fast`; 1 suits Llama.
    ramp: 'paper' or 'code'.
    base_period: the b of theta_m = b^(-2m/C).
    pairing: 'halves' (Llama) or 'interleaved' (GPT-J).

  Raises:
    errors.UserError: for an option outside its range, an unknown ramp or pairing, and by `init` for
      an odd head width.
  """
  rotary.check_extension(scale, train_length)
  if not 0 < beta_slow < beta_fast < math.inf:
    raise errors.UserError(f'yarn needs {beta_slow=} above 0 and below a finite {beta_fast=}')
  if ramp not in RAMPS:
    raise errors.UserError(f'unknown {ramp=}; known: {", ".join(RAMPS)}')
  growth = np.float32(0.1 * math.log(scale) + 1)

  def turns_per_token(head_dim: int) -> np.ndarray:
    gamma_R = RAMPS[ramp](head_dim, base_period, train_length, beta_fast, beta_slow)
    return ((1 - gamma_R) / scale + gamma_R) * rotary.turns_per_token(head_dim, base_period)

  def angles(position_BL: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
    cos_BLR, sin_BLR = rotary.cos_sin(position_BL, turns_per_token(head_dim))
    return growth * cos_BLR, growth * sin_BLR

  turns_per_token(2)  # refuses a bad period now, not at the first call
  return rotary.encoding('yarn', angles, pairing)
