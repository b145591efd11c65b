"""Attention by a platform's kernels, with flash attention's gradient: on a device, or on a ring.

The backward pass makes weights anew from the logarithm of the softmax's normaliser (Dao et al.
2022, arXiv:2205.14135). On a ring of devices that hold rows in parts (see `ring`) the forward
kernel goes on from what was found over the blocks of keys before. Those of the backward pass take
the normaliser over all keys, and need not know that there are others than those that they are
given.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from lex_fire.kernels import residuals, ring

Found = tuple[jax.Array, jax.Array]  # an output, and log_norm_BHQ: +inf where a query sees no key


class Kernels(Protocol):
  """Kernels of an attention, for any keys of those that its queries may see.

  Tables, queries and keys are as they have prepared them; keys are a tuple of these, the values,
  and more.
  """

  def make_plan(self, *, table: Any, queries: Any, keys: Any) -> Any:
    """Returns what each tile has to do."""
    ...

  def nothing(self, queries: Any) -> Found:
    """Returns what is found over no keys, in float32."""
    ...

  def forward(self, table: Any, queries: Any, keys: Any, plan: Any, so_far: Any = None) -> Found:
    """Returns the softmax's output and the logarithm of its normaliser.

    Args:
      table: of the bias, or None.
      queries: as prepared.
      keys: likewise.
      plan: of these.
      so_far: what this returned for other keys, with an output in float32: then that of all keys is
        returned, in float32. None: there are no others, and it is in the values' dtype.
    """
    ...

  def softmax(self, found: Found, d_found: Found) -> Any:
    """Returns what `gradients` takes of the forward pass over all keys, and of its gradient."""
    ...

  def gradients(
    self, table: Any, queries: Any, keys: Any, plan: Any, softmax: Any, dtype: Any = None
  ) -> tuple[Any, Any, Any]:
    """Returns those of table, queries and keys that these keys have a part in.

    Those of queries and keys are in a dtype; None: their own.
    """
    ...


def on_device(kernels: Kernels) -> Callable[..., Found]:
  """Makes (table, queries, keys) -> what is found, by one device that has all keys."""

  def forward(table, queries, keys):
    plan = kernels.make_plan(table=table, queries=queries, keys=keys)
    found = residuals.named(*kernels.forward(table, queries, keys, plan))
    return found, (table, queries, keys, plan, found)

  def backward(saved, d_found):
    table, queries, keys, plan, found = saved
    return kernels.gradients(table, queries, keys, plan, kernels.softmax(found, d_found))

  return _differentiated(forward, backward)


def on_ring(kernels: Kernels, *, axis: str) -> Callable[..., Found]:
  """Makes the same, by devices of a mesh axis which have a part of the keys each."""

  def forward(table, queries, keys):
    def add(so_far, held):
      plan = kernels.make_plan(table=table, queries=queries, keys=held)
      return kernels.forward(table, queries, held, plan, so_far)

    out, log_norm_BHQ = ring.over_keys(add, kernels.nothing(queries), keys, axis)
    found = residuals.named(out.astype(keys[1].dtype), log_norm_BHQ)
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

  return _differentiated(forward, backward)


def _differentiated(forward, backward):
  @jax.custom_vjp
  def attend(table, queries, keys):
    return forward(table, queries, keys)[0]

  attend.defvjp(forward, backward)
  return attend


def _as_given(gradients, arrays):
  """Returns gradients, of some of a tuple of arrays, in the dtypes of these."""
  pairs = zip(gradients, arrays, strict=True)
  return type(arrays)(*(None if d_x is None else d_x.astype(x.dtype) for d_x, x in pairs))
