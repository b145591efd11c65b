"""Rotations by position, exact at a million tokens: what the rotary family and sinusoids share.

In float32 the product n theta is off by n 2^-24, some 0.06 radians at a million tokens. Here the
angle is kept in turns as a 48-bit fixed-point fraction: n times it, modulo one turn, is integer
arithmetic that wraps by itself, so at 2^20 tokens the angle is as exact as at 2^4 (below 1e-6
radians), and it is defined at every int32 position (3e-5 radians at the last).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lex_fire import errors
from lex_fire.encodings import base

MOST_PERIOD, MOST_SCALE = 1e30, 1e9  # far past any use, and their powers are still finite
PAIRINGS = {'halves': -2, 'interleaved': -1}  # axis of the pair once channels are split in two axes


def turns_per_token(width: int, base_period: float) -> np.ndarray:
  """Returns turn_R, float64, for the pairs of `width` channels.

  theta_m = base_period^(-2m / width) in turns, that is theta_m / 2 pi; an odd width has half a pair
  more.

  Raises:
    errors.UserError: if base_period is not above 0, or past MOST_PERIOD.
  """
  if not 0 < base_period <= MOST_PERIOD:
    raise errors.UserError(f'rotations need a {base_period=} above 0, of at most {MOST_PERIOD:g}')
  return base_period ** (-2.0 * np.arange((width + 1) // 2) / width) / (2 * np.pi)


def fixed_point(turn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the upper 32 and the lower 16 bits of float64 turns modulo 1, as uint32."""
  fixed = np.round((turn % 1.0) * 2.0**48).astype(np.uint64)
  return (fixed >> np.uint64(16)).astype(np.uint32), (fixed & np.uint64(0xFFFF)).astype(np.uint32)


def cos_sin(position_BL: jax.Array, turn_R: np.ndarray) -> tuple[jax.Array, jax.Array]:
  """Returns cos_BLR and sin_BLR of 2 pi n turn_m for int32 positions n >= 0, in float32.

  Positions may have other axes than BL.
  """
  shape = (1,) * position_BL.ndim + turn_R.shape
  return fixed_cos_sin(
    position_BL, *(jnp.uint32(part.reshape(shape)) for part in fixed_point(turn_R))
  )


def fixed_cos_sin(
  position_BL: jax.Array, high_B1R: jax.Array, low_B1R: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns what `cos_sin` does, for turns in `fixed_point` that a row may have for itself."""
  n_BL1 = position_BL[..., None].astype(jnp.uint32)
  # n fixed / 2^16 modulo 2^32; n is split so that the products with `low` cannot overflow.
  carry_BLR = (n_BL1 >> 16) * low_B1R + (((n_BL1 & 0xFFFF) * low_B1R) >> 16)
  phase_BLR = n_BL1 * high_B1R + carry_BLR
  signed_BLR = jax.lax.bitcast_convert_type(phase_BLR, jnp.int32)  # [-1/2, 1/2) turn
  angle_BLR = signed_BLR.astype(jnp.float32) * np.float32(2 * np.pi / 2.0**32)
  return jnp.cos(angle_BLR), jnp.sin(angle_BLR)


def turn_pairs(
  x_BLHC: jax.Array, cos_BLR: jax.Array, sin_BLR: jax.Array, pairing: str
) -> jax.Array:
  """Turns channel pair m of every head by the angle whose cosine and sine are given.

  Args:
    x_BLHC: queries or keys, any floating dtype.
    cos_BLR: float32; a leading 1 broadcasts.
    sin_BLR: likewise.
    pairing: 'halves' pairs channel m with m + C/2 (Llama), 'interleaved' 2m with 2m + 1 (GPT-J,
      xPos).

  Returns:
    x_BLHC in its own dtype; the arithmetic is float32 and rounds once.
  """
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


def encoding(
  name: str,
  angles: Callable[[jax.Array, int], tuple[jax.Array, jax.Array]],
  pairing: str,
  least_width: int = 2,
) -> base.Encoding:
  """Makes the encoding that turns queries and keys by angles that only positions decide.

  Args:
    name: as registered.
    angles: (position_BL, head_dim) -> (cos_BLR, sin_BLR), float32; if both are times a number, so
      is what is turned.
    pairing: a key of PAIRINGS.
    least_width: of a head whose pairs have angles [channels].

  Raises:
    errors.UserError: for an unknown pairing, and by `init` for a head width that does not pair up.
  """
  if pairing not in PAIRINGS:
    raise errors.UserError(f'unknown {pairing=}; known: {", ".join(PAIRINGS)}')

  def init(rng: jax.Array, *, num_heads: int, head_dim: int, d_model: int) -> base.Params:
    if head_dim % 2 or head_dim < least_width:
      raise errors.UserError(
        f'a rotary encoding needs an even {head_dim=}, for {name!r} of at least {least_width}'
      )
    return base.no_parameters(rng, num_heads=num_heads, head_dim=head_dim, d_model=d_model)

  def rotate(params: base.Params, x_BLHC: jax.Array, position_BL: jax.Array) -> jax.Array:
    del params
    cos_BLR, sin_BLR = angles(position_BL, x_BLHC.shape[-1])
    return turn_pairs(x_BLHC, cos_BLR, sin_BLR, pairing)

  return base.Encoding(name=name, init=init, rotate=rotate)


def check_extension(scale: float = 1.0, train_length: int = 1) -> None:
  """Refuses to stretch positions by less than 1, or from a training length that is none.

  Raises:
    errors.UserError: for a scale below 1 or past MOST_SCALE, or a train_length below 1.
  """
  if not 1 <= scale <= MOST_SCALE:
    raise errors.UserError(f'positions are stretched by 1 to {MOST_SCALE:g}, not by {scale=}')
  if train_length < 1:
    raise errors.UserError(f'positions are stretched from {train_length=} of at least 1')


def spread_pairs(rate_R: np.ndarray, pairing: str) -> np.ndarray:
  """Returns rate_C: the value of each pair at both of its channels, in the order of turning."""
  return np.tile(rate_R, 2) if pairing == 'halves' else np.repeat(rate_R, 2)
