"""RoPE-PI: RoPE at positions interpolated into the range of training.

Chen et al. 2023, arXiv:2306.15595, section 2.3 (and kaiokendev 2023, whom it names as concurrent).
"""

import jax

from lex_fire.encodings import base, rotary


def rope_pi(
  scale: float = 4.0, base_period: float = 10_000.0, pairing: str = 'halves'
) -> base.Encoding:
  """RoPE-PI: pair m of a query or key at position n turns by n theta_m / s.

  The paper divides positions by s = L' / L, for evaluation at L' of a model trained at L. Departure
  in arithmetic: theta is divided instead, so that positions stay whole and angles exact.

  Args:
    scale: the paper's s, >= 1. The default takes the 2048 tokens that FIRE's authors train on to
      the 8192 that they evaluate (arXiv:2310.04418, section 4).
    base_period: the b of theta_m = b^(-2m/C).
    pairing: 'halves' (Llama) or 'interleaved' (GPT-J).

  Raises:
    errors.UserError: for a bad scale or period, an unknown pairing, and by `init` for an odd head
      width.
  """
  rotary.check_extension(scale)
  rotary.turns_per_token(2, base_period)  # refuses a bad period now, not at the first call

  def angles(position_BL: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
    return rotary.cos_sin(position_BL, rotary.turns_per_token(head_dim, base_period) / scale)

  return rotary.encoding('rope_pi', angles, pairing)
