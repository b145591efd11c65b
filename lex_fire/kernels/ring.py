"""Attention over sequences that devices hold in parts: keys and values go round in a ring.

Each device keeps its own queries, and their running softmax, while the blocks of keys and values,
with their positions and segments, pass from device to device until each has been everywhere (Liu
et al. 2023, arXiv:2310.01889). A device holds two blocks at a time, its own and one on its way, so
that memory a device is linear in length / devices. What is done with a block are the tiles of
`chunked`, or a platform's kernels (`flash`): a tile is told the positions of its tokens and asks
for no more, so every encoding and every mask is what it is on one device, wherever a token lies.

The backward pass sends the blocks round once more, and after each the sums of its gradients.

Under a causal mask the device with the first tokens would have next to nothing to do, and the one
with the last a tile for every pair. So of 2 n equal chunks of a row device d of n has chunks d and
2 n - 1 - d, as `zigzag` says (and Llama 3 was trained, Dubey et al. 2024, arXiv:2407.21783, section
3.3.2): then all have the same number of tiles in every step of the ring.
"""

# Not strict, as its neighbours are: custom_vjp and scan carry no types.
# pyright: basic

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lex_fire import errors
from lex_fire.encodings import base
from lex_fire.kernels import chunked, residuals
from lex_fire.kernels import mask as mask_lib

CHUNKS = 2  # that a device has of a row


def zigzag(length: int, devices: int, name: str) -> np.ndarray:
  """Returns index_L: which token of a row lies at each place, when devices hold equal parts of it.

  One device has them in order.

  Args:
    length: of a row [tokens].
    devices: that share it.
    name: of the row, for the error.

  Raises:
    errors.UserError: if the row does not divide in two chunks a device.
  """
  check_length(length, devices, name)
  if devices == 1:
    return np.arange(length)
  index_JL = np.arange(length).reshape(CHUNKS * devices, -1)
  first, last = index_JL[:devices], index_JL[: devices - 1 : -1]
  return np.concatenate([first, last], axis=1).ravel()


def check_length(length: int, devices: int, name: str) -> None:
  """Refuses rows that do not divide in two chunks a device, if devices share them.

  Raises:
    errors.UserError: if these do not.
  """
  if devices > 1 and length % (CHUNKS * devices):
    raise errors.UserError(
      f'{name} has L={length}, which the {CHUNKS * devices} chunks of mesh axis '
      f'sequence={devices}, {CHUNKS} a device, do not divide; use a multiple or a smaller mesh'
    )


def attention(
  attend: Callable[..., jax.Array],
  in_ring: Callable[..., Any],
  query_BQHC: jax.Array,
  key_BKGC: jax.Array,
  value_BKGC: jax.Array,
  *,
  axis: str,
  **rest,
) -> jax.Array:
  """Returns this device's out_BQHC, to be called under `jax.shard_map`.

  Args:
    attend: attention on one device, that takes a `make_flash`.
    in_ring: `of_tiles`, or what makes the same of a platform's kernels: `flash.on_ring`.
    query_BQHC: this device's part of each row, as are all arrays but params. Under a decay each of
      its two chunks must be in the text's order, of which a tile can span but so much.
    key_BKGC: likewise.
    value_BKGC: likewise.
    axis: the mesh axis over which rows are cut in parts.
    **rest: as `attend` has it.

  Raises:
    errors.UserError: if a part does not divide in two chunks, or as `attend` does.
  """
  devices = jax.lax.axis_size(axis)
  for array in (query_BQHC, key_BKGC):
    check_length(array.shape[1] * devices, devices, 'attention')
  make_flash = functools.partial(in_ring, axis=axis)
  return attend(query_BQHC, key_BKGC, value_BKGC, make_flash=make_flash, **rest)


def of_tiles(encoding: base.Encoding, mask: mask_lib.Mask, *, axis: str) -> Callable[..., Any]:
  """Makes what `chunked.flash` does, with the keys of all devices."""

  def forward(params, queries, keys):
    def add(carry, held):
      return chunked.add_keys(encoding, mask, params, queries, held, carry)

    carry = over_keys(add, chunked.softmax_start(queries), keys, axis)
    out_IBHQC, log_norm_IBHQ = chunked.softmax_end(carry)
    out_IBHQC = out_IBHQC.astype(keys.value_JBGKC.dtype)
    out_IBHQC, log_norm_IBHQ = residuals.named(out_IBHQC, log_norm_IBHQ)
    return out_IBHQC, (params, queries, keys, out_IBHQC, log_norm_IBHQ)

  def backward(saved, d_out_IBHQC):
    params, queries, keys, out_IBHQC, log_norm_IBHQ = saved
    of_out = (d_out_IBHQC, chunked.delta(d_out_IBHQC, out_IBHQC), log_norm_IBHQ)

    def of_keys(held):
      d_params, d_query, *of_held = chunked.gradients(encoding, mask, params, queries, held, of_out)
      return (d_params, d_query), of_held

    own, of_held = gradients(of_keys, keys, axis)
    return chunked.cotangents((*own, *of_held), queries, keys)

  @jax.custom_vjp
  def attend(params, queries, keys):
    return forward(params, queries, keys)[0]

  attend.defvjp(forward, backward)
  return attend


def over_keys(add, start, keys, axis: str):
  """Returns a sum that begins with `start`, to which each device's keys are added.

  Args:
    add: (sum, keys) -> the sum with these keys, too.
    start: the sum of no keys.
    keys: this device's, a pytree.
    axis: the mesh axis of the ring.
  """

  def step(_, state):
    so_far, held = state
    # Both read what is held, and neither waits for the other.
    return add(so_far, held), _passed_on(held, axis)

  return jax.lax.fori_loop(0, jax.lax.axis_size(axis), step, (start, keys))[0]


def gradients(of_keys, keys, axis: str):
  """Returns gradients of what this device has for itself, and of its keys, summed over devices.

  Args:
    of_keys: keys -> both of them, of this device's queries with some device's keys, float32.
    keys: this device's, a pytree.
    axis: the mesh axis of the ring.
  """

  def step(_, state):
    """Adds to the sums of the block held, which the device before sends while these are made."""
    own, of_last, held = state
    of_own, of_held = of_keys(held)
    own = jax.tree.map(jnp.add, own, of_own)
    of_held = jax.tree.map(jnp.add, _passed_on(of_last, axis), of_held)
    return own, of_held, _passed_on(held, axis)

  start = jax.tree.map(lambda sum: jnp.zeros(sum.shape, sum.dtype), jax.eval_shape(of_keys, keys))
  own, of_last, _ = jax.lax.fori_loop(0, jax.lax.axis_size(axis), step, (*start, keys))
  # A block is home after as many hops as there are devices; its sums are one behind.
  return own, _passed_on(of_last, axis)


def _passed_on(tree, axis):
  devices = jax.lax.axis_size(axis)
  round_trip = [(device, (device + 1) % devices) for device in range(devices)]
  return jax.tree.map(lambda array: jax.lax.ppermute(array, axis, round_trip), tree)
