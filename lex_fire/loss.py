"""Cross entropy over the tokens that count."""

import math

import jax
import jax.numpy as jnp

from lex_fire import sharding

LOGITS_AT_ONCE = 2**26  # of a device, at most: 256 MiB of float32


def logits(x_BLD: jax.Array, output_VD: jax.Array) -> jax.Array:
  """Returns logits_BLV, float32, of a model's last activations."""
  output_VD = output_VD.astype(x_BLD.dtype)
  logits_BLV = jnp.einsum('BLD,VD->BLV', x_BLD, output_VD, preferred_element_type=jnp.float32)
  return sharding.constrain(logits_BLV, 'BLV')


def token_losses(logits_BLV: jax.Array, targets_BL: jax.Array) -> jax.Array:
  """Returns loss_BL, float32: -log softmax(logits)[target], nats a token."""
  # A sum, which devices that share the vocabulary add up; of an index all would fetch all logits.
  is_target_BLV = jnp.arange(logits_BLV.shape[-1])[None, None] == targets_BL[..., None]
  chosen_BL = jnp.where(is_target_BLV, logits_BLV, 0.0).sum(axis=-1)
  return jax.nn.logsumexp(logits_BLV, axis=-1) - chosen_BL


def chunked_losses(x_BLD: jax.Array, output_VD: jax.Array, targets_BL: jax.Array) -> jax.Array:
  """Returns loss_BL as `token_losses` does, of logits that are never there all at once.

  With a large vocabulary they would be by far the largest array of a step. Chunks of LOGITS_AT_ONCE
  follow one another, and each makes its logits anew in the backward pass, at a third more of the
  cost of the output alone. What is smaller than that is one chunk, and keeps them.

  Args:
    x_BLD: a model's last activations.
    output_VD: what gives them logits; its gradient is summed over the chunks in its own dtype.
    targets_BL: int32.
  """

  def losses(part):
    return token_losses(logits(part[0], output_VD), part[1])

  rows, length = targets_BL.shape
  chunks = _chunks(rows, length, output_VD.shape[0])
  if chunks == 1:
    return losses((x_BLD, targets_BL))

  # Token l is of chunk l % chunks: so each has tokens of all devices that share a sequence.
  def split(array):
    rows, length, *rest = array.shape
    return jnp.moveaxis(array.reshape(rows, length // chunks, chunks, *rest), 2, 0)

  parts = jax.lax.map(jax.checkpoint(losses), (split(x_BLD), split(targets_BL)))
  return jnp.moveaxis(parts, 0, 2).reshape(targets_BL.shape)


def _chunks(rows: int, length: int, vocabulary: int) -> int:
  """Returns how many chunks of equal length keep to LOGITS_AT_ONCE, if tokens are that many."""
  shared = math.prod(sharding.ways(letter) for letter in 'BLV')
  of_device = rows * length * vocabulary // shared
  least = math.gcd(length, sharding.ways('L'))  # a chunk has a token of each part of a sequence
  return next(
    n
    for n in range(1, length + 1)
    if length % (n * least) == 0 and (of_device <= n * LOGITS_AT_ONCE or n * least == length)
  )
