"""Cross entropy over the tokens that count."""

import jax
import jax.numpy as jnp


def token_losses(logits_BLV: jax.Array, targets_BL: jax.Array) -> jax.Array:
  """Returns loss_BL, float32: -log softmax(logits)[target], nats a token."""
  chosen_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits_BLV, axis=-1) - chosen_BL
