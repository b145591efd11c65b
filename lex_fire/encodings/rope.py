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
    errors.UserError: for an unknown pairing, and by `init` for an odd head width.
  """
  rotary.check(0, pairing)
  rotary.turns_per_token(2, base_period)  # refuses a bad period now, not at the first call

  def init(rng: jax.Array, *, num_heads: int, head_dim: int, d_model: int) -> base.Params:
    rotary.check(head_dim, pairing)
    return base.no_parameters(rng, num_heads=num_heads, head_dim=head_dim, d_model=d_model)

  def rotate(params: base.Params, x_BLHC: jax.Array, position_BL: jax.Array) -> jax.Array:
    del params
    turn_R = rotary.turns_per_token(x_BLHC.shape[-1], base_period)
    return rotary.rotate(x_BLHC, position_BL, turn_R, pairing)

  return base.Encoding(name='rope', init=init, rotate=rotate)
