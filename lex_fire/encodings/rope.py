"""RoPE: queries and keys turned by angles proportional to position.

Su et al. 2021, arXiv:2104.09864.
"""

import jax

from lex_fire.encodings import base, rotary


def rope(base_period: float = 10_000.0, pairing: str = 'halves') -> base.Encoding:
  """RoPE: pair m of a query or key at position n turns by n theta_m, theta_m = base_period^(-2m/C).

  Departure: angles are fixed-point (see `rotary`), exact where float32 would drift with n.

  Args:
    base_period: the b of theta_m = b^(-2m/C).
    pairing: 'halves' (Llama) or 'interleaved' (GPT-J, the paper).

  Raises:
    errors.UserError: for a bad period, an unknown pairing, and by `init` for an odd head width.
  """
  rotary.turns_per_token(2, base_period)  # refuses a bad period now, not at the first call

  def angles(position_BL: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
    return rotary.cos_sin(position_BL, rotary.turns_per_token(head_dim, base_period))

  return rotary.encoding('rope', angles, pairing)
