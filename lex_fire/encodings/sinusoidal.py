"""Sinusoidal positions, added to token embeddings.

Vaswani et al. 2017, arXiv:1706.03762, section 3.5.
"""

import functools

import jax
import jax.numpy as jnp

from lex_fire.encodings import base, rotary


def _embed(
  params: base.Params, position_BL: jax.Array, d_model: int, *, base_period: float
) -> jax.Array:
  del params
  turn_R = rotary.turns_per_token(d_model, base_period)
  cos_BLR, sin_BLR = rotary.cos_sin(position_BL, turn_R)
  pair_BLRP = jnp.stack([sin_BLR, cos_BLR], axis=-1)
  return pair_BLRP.reshape(*position_BL.shape, -1)[..., :d_model]


def sinusoidal(base_period: float = 10_000.0) -> base.Encoding:
  """Sinusoidal positions of angles n theta_m, theta_m = base_period^(-2m/D).

      e(n)_2m = sin(n theta_m),   e(n)_2m+1 = cos(n theta_m)

  Not shift invariant: the embedding meets the weights before any difference of positions is taken.
  """
  return base.Encoding(
    name='sinusoidal',
    init=base.no_parameters,
    embed=functools.partial(_embed, base_period=base_period),
    shared=True,
    shift_invariant=False,
  )
