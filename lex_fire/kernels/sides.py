"""Attention to keys before and after a query under a decay, by kernels whose decay is causal.

A decay that shrinks with |i - j| on both sides is, for keys after the query, the causal one with
all positions negated (`decay`). So a kernel runs twice: for keys up to the query, and for those
after it. Each pair is in one of them, and a side's output counts by its share of the softmax's
normaliser, through which the gradient finds its way back. So are softmaxes of other keys joined,
that a query meets one after another.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lex_fire.encodings import base
from lex_fire.kernels import mask as mask_lib


class _Earlier(mask_lib.Mask):
  """Only keys with j < i."""

  def last(self, position: jax.Array) -> jax.Array:
    return position - 1


def joined(kernel: Callable[..., tuple[jax.Array, jax.Array]]) -> Callable[..., jax.Array]:
  """Makes attention like `reference.attention` of a kernel that knows a decay's causal side alone.

  Args:
    kernel: takes the same, and returns out_BQHC and log_norm_BHQ, the logarithm of the softmax's
      normaliser, +inf where a query sees no key; both have gradients.
  """

  @functools.wraps(kernel)
  def attention(
    query_BQHC: jax.Array,
    key_BKGC: jax.Array,
    value_BKGC: jax.Array,
    *,
    encoding: base.Encoding,
    mask: mask_lib.Mask,
    query_position_BQ: jax.Array,
    key_position_BK: jax.Array,
    **rest: Any,
  ) -> jax.Array:
    positions = {'query_position_BQ': query_position_BQ, 'key_position_BK': key_position_BK}
    side = functools.partial(kernel, query_BQHC, key_BKGC, value_BKGC, encoding=encoding, **rest)
    if encoding.log_decay is None or mask.causal:
      return side(mask=mask, **positions)[0]
    negated = {name: -position_BL for name, position_BL in positions.items()}
    return together(side(mask=mask_lib.Mask(), **positions), side(mask=_Earlier(), **negated))[0]

  return attention


def together(*sides: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
  """Returns what one softmax over the keys of all sides gives, of what each side's gave.

  An output out_BQHC, 0 if none has any keys, and log_norm_BHQ, +inf then.
  """
  outs, log_norms = zip(*sides, strict=True)
  log_norm_YBHQ = jnp.stack(log_norms)
  seen_YBHQ = log_norm_YBHQ < jnp.inf
  log_norm_YBHQ = jnp.where(seen_YBHQ, log_norm_YBHQ, mask_lib.HIDDEN_LOGIT)
  share_YBQH = jnp.swapaxes(jax.nn.softmax(log_norm_YBHQ, axis=0), 2, 3)
  pairs = zip(share_YBQH, outs, strict=True)
  out_BQHC = sum(share_BQH[..., None] * out_BQHC for share_BQH, out_BQHC in pairs)
  log_norm_BHQ = jnp.where(seen_YBHQ.any(axis=0), jax.nn.logsumexp(log_norm_YBHQ, axis=0), jnp.inf)
  return jnp.asarray(out_BQHC, outs[0].dtype), log_norm_BHQ
