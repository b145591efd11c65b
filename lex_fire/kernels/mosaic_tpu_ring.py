"""Attention over rows that devices hold in parts, by the kernels for TPU: see `ring`.

The forward kernel goes on from what it found over the blocks of keys before: the output so far, and
the logarithm of its softmax's normaliser. Those of the backward pass take the normaliser over all
keys, and need not know that there are others than those that they are given.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lex_fire.kernels import mosaic_tpu, residuals, ring


def attention(
  query_BQHC: jax.Array, key_BKGC: jax.Array, value_BKGC: jax.Array, *, axis: str, **rest: Any
) -> jax.Array:
  """Returns this device's out_BQHC, as `ring.attention` does.

  Raises:
    errors.UserError: if a part does not divide in two chunks, or as `mosaic_tpu.attention` does.
  """
  ring.check_parts(query_BQHC, key_BKGC, axis)
  make_flash = functools.partial(_flash, axis=axis)
  return mosaic_tpu.attention(
    query_BQHC, key_BKGC, value_BKGC, pieces=ring.CHUNKS, make_flash=make_flash, **rest
  )


def _flash(kernels: mosaic_tpu.Kernels, *, axis: str) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """Makes what `mosaic_tpu.flash` does, with the keys of all devices."""

  def forward(table, queries, keys):
    def add(so_far, held):
      plan = kernels.make_plan(table=table, queries=queries, keys=held)
      return kernels.forward(table, queries, held, plan, so_far)

    shape = queries.query_BHQC.shape
    none = jnp.zeros(shape, jnp.float32), jnp.full(shape[:3], jnp.inf)
    out_BHQC, log_norm_BHQ = ring.over_keys(add, none, keys, axis)
    found = residuals.named(out_BHQC.astype(keys.value_BGKC.dtype), log_norm_BHQ)
    return found, (table, queries, keys, found)

  def backward(saved, d_found):
    table, queries, keys, found = saved
    softmax = kernels.softmax(found, d_found)

    def of_keys(held):
      plan = kernels.make_plan(table=table, queries=queries, keys=held)
      *own, of_held = kernels.gradients(table, queries, held, plan, softmax, jnp.float32)
      return tuple(own), of_held

    (d_table, d_queries), d_keys = ring.gradients(of_keys, keys, axis)
    return d_table, _as_given(d_queries, queries), _as_given(d_keys, keys)

  @jax.custom_vjp
  def attend(table, queries, keys):
    return forward(table, queries, keys)[0]

  attend.defvjp(forward, backward)
  return attend


def _as_given(gradients, arrays):
  """Returns gradients, of some of a tuple of arrays, in the dtypes of these."""
  pairs = zip(gradients, arrays, strict=True)
  return type(arrays)(*(None if d_x is None else d_x.astype(x.dtype) for d_x, x in pairs))
