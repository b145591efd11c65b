"""How the next token is drawn from a model's logits."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from lex_fire import errors


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Temperature, top-k and top-p, in this order.

  Logits are divided by the temperature, the `top_k` likeliest tokens are kept, and of these the
  smallest set of likeliest ones whose probability, among the kept, reaches `top_p` (the nucleus of
  Holtzman et al. 2020, arXiv:1904.09751, section 3.1). Of equal logits the lower id comes first.

  Attributes:
    temperature: >= 0; 0 takes the likeliest token.
    top_k: >= 1, or None for no such limit [tokens].
    top_p: above 0 and at most 1, which is no limit.
  """

  temperature: float = 1.0
  top_k: int | None = None
  top_p: float = 1.0

  def __post_init__(self):
    if not 0 <= self.temperature < math.inf:
      raise errors.UserError(
        f'temperature={self.temperature} must be 0 (the likeliest token) or above, and finite'
      )
    if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
      raise errors.UserError(
        f'top_k={self.top_k} must be a whole number of at least 1; leave it out for no limit'
      )
    if not 0 < self.top_p <= 1:
      raise errors.UserError(f'top_p={self.top_p} must be above 0 and at most 1, which is no limit')


GREEDY = Sampling(temperature=0.0)


def log_weights(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
  """Returns log_weights_BV, float32, whose softmax tokens are drawn from; -inf if they cannot be.

  Args:
    logits_BV: float32.
    sampling: of a temperature above 0.
  """
  # A temperature that float32 would round to 0 becomes the least that it does not.
  temperature = max(sampling.temperature, float(jnp.finfo(jnp.float32).tiny))
  scaled_BV = (logits_BV - logits_BV.max(axis=1, keepdims=True)) / temperature
  if sampling.top_k is None and sampling.top_p == 1:
    return scaled_BV
  rows, vocab_size = logits_BV.shape
  kept_BZ, token_BZ = jax.lax.top_k(scaled_BV, min(sampling.top_k or vocab_size, vocab_size))
  if sampling.top_p < 1:
    probability_BZ = jax.nn.softmax(kept_BZ, axis=1)
    of_likelier_BZ = jnp.cumsum(probability_BZ, axis=1) - probability_BZ
    kept_BZ = jnp.where(of_likelier_BZ < sampling.top_p, kept_BZ, -jnp.inf)
  row_B1 = jnp.arange(rows)[:, None]
  return jnp.full_like(scaled_BV, -jnp.inf).at[row_B1, token_BZ].set(kept_BZ)


def sample(
  logits_BV: jax.Array, sampling: Sampling, seed: jax.Array, position_B: jax.Array
) -> jax.Array:
  """Draws the next token of each row, by random numbers of (seed, row, position) alone.

  Each token has a number of its own, so a limit that keeps the token which would be drawn without
  it changes nothing.

  Args:
    logits_BV: float32.
    sampling: how.
    seed: uint32 scalar.
    position_B: int32, of the tokens to be drawn.

  Returns:
    token_B, int32.
  """
  if sampling.temperature == 0:
    return jnp.argmax(logits_BV, axis=1).astype(jnp.int32)

  def noise(row, position):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), position)
    # mode 'low' has 2^23 values, the greatest 16.6: what is less likely than e^-21 would not come.
    return jax.random.gumbel(key, logits_BV.shape[1:], mode='high')

  noise_BV = jax.vmap(noise)(jnp.arange(logits_BV.shape[0]), position_B)
  return jnp.argmax(log_weights(logits_BV, sampling) + noise_BV, axis=1).astype(jnp.int32)
