"""Rotations by position, exact at a million tokens: what RoPE, xPos and sinusoids share.

In float32 the product n theta is off by n 2^-24, some 0.06 radians at a million tokens. Here the
angle is kept in turns as a 48-bit fixed-point fraction: n times it, modulo one turn, is integer
arithmetic that wraps by itself, so at 2^20 tokens the angle is as exact as at 2^4 (below 1e-6
radians), and it is defined at every int32 position (3e-5 radians at the last).
"""

import jax
import jax.numpy as jnp
import numpy as np

from lex_fire import errors

PAIRINGS = {'halves': -2, 'interleaved': -1}  # axis of the pair once channels are split in two axes


def turns_per_token(width: int, base_period: float) -> np.ndarray:
  """Returns turn_R, float64, for the pairs of `width` channels.

  theta_m = base_period^(-2m / width) in turns, that is theta_m / 2 pi; an odd width has half a pair
  more.

  Raises:
    errors.UserError: if base_period is not above 0.
  """
  if not base_period > 0:
    raise errors.UserError(f'rotations need a {base_period=} above 0')
  return base_period ** (-2.0 * np.arange((width + 1) // 2) / width) / (2 * np.pi)


def cos_sin(position_BL: jax.Array, turn_R: np.ndarray) -> tuple[jax.Array, jax.Array]:
  """Returns cos_BLR and sin_BLR of 2 pi n turn_m for int32 positions n >= 0, in float32."""
  fixed_R = np.round((turn_R % 1.0) * 2.0**48).astype(np.uint64)
  high_R = jnp.uint32((fixed_R >> np.uint64(16)).astype(np.uint32))
  low_R = jnp.uint32((fixed_R & np.uint64(0xFFFF)).astype(np.uint32))
  n_BL1 = position_BL[..., None].astype(jnp.uint32)
  # n fixed / 2^16 modulo 2^32; n is split so that the products with `low` cannot overflow.
  carry_BLR = (n_BL1 >> 16) * low_R[None, None] + (((n_BL1 & 0xFFFF) * low_R[None, None]) >> 16)
  phase_BLR = n_BL1 * high_R[None, None] + carry_BLR
  signed_BLR = jax.lax.bitcast_convert_type(phase_BLR, jnp.int32)  # [-1/2, 1/2) turn
  angle_BLR = signed_BLR.astype(jnp.float32) * np.float32(2 * np.pi / 2.0**32)
  return jnp.cos(angle_BLR), jnp.sin(angle_BLR)


def check(head_dim: int, pairing: str) -> None:
  """Raises errors.UserError unless channels pair up and the pairing is known."""
  if head_dim % 2:
    raise errors.UserError(f'a rotary encoding needs an even {head_dim=}')
  if pairing not in PAIRINGS:
    raise errors.UserError(f'unknown {pairing=}; known: {", ".join(PAIRINGS)}')


def rotate(
  x_BLHC: jax.Array, position_BL: jax.Array, turn_R: np.ndarray, pairing: str
) -> jax.Array:
  """Rotates channel pair m of every head by 2 pi n turn_m.

  Args:
    x_BLHC: queries or keys, any floating dtype.
    position_BL: int32 positions; a leading 1 broadcasts.
    turn_R: float64, turns per token of each pair.
    pairing: 'halves' pairs channel m with m + C/2 (Llama), 'interleaved' 2m with 2m + 1 (GPT-J,
      xPos).

  Returns:
    x_BLHC in its own dtype; the arithmetic is float32 and rounds once.
  """
  cos_BLR, sin_BLR = cos_sin(position_BL, turn_R)
  cos_BL1R, sin_BL1R = cos_BLR[:, :, None], sin_BLR[:, :, None]
  axis = PAIRINGS[pairing]
  split = (2, -1) if axis == -2 else (-1, 2)
  first, second = jnp.unstack(
    x_BLHC.astype(jnp.float32).reshape(*x_BLHC.shape[:-1], *split), axis=axis
  )
  pair = jnp.stack(
    [first * cos_BL1R - second * sin_BL1R, second * cos_BL1R + first * sin_BL1R], axis=axis
  )
  return pair.reshape(x_BLHC.shape).astype(x_BLHC.dtype)


def spread_pairs(rate_R: np.ndarray, pairing: str) -> np.ndarray:
  """Returns rate_C: the value of each pair at both of its channels, in the order `rotate` uses."""
  return np.tile(rate_R, 2) if pairing == 'halves' else np.repeat(rate_R, 2)
