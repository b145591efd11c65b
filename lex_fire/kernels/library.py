"""Attention without a bias or a decay, by kernels that others keep: splash attention, and cuDNN's.

Both mask by the place of a token in its row, not by its position, and are told the mask when a
program is traced. So they serve rows that are known then to be one segment at positions 0, 1, 2 and
so on: those that are given without positions and segments. What they lack, the other
implementations have.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

from lex_fire import errors
from lex_fire.encodings import base
from lex_fire.kernels import mask as mask_lib
from lex_fire.kernels import residuals

# Of splash attention: queries and keys of a tile, at most, and what both are multiples of.
SPLASH_QUERIES, SPLASH_KEYS, LANES = 512, 1024, 128
# It looks at each tile of the mask on the host, a millisecond for each of three kernels: of 32,768
# tokens for seconds, of 131,072 for minutes.
SPLASH_TILES = 2048
# Of cuDNN on any GPU that it has flash attention for; Hopper has 256 channels besides.
CUDNN_CHANNELS, CUDNN_STEP = 128, 8


def is_counted(*where: Any) -> bool:
  """Returns whether positions count from 0 in rows of one segment: whether none of them is given.

  Args:
    *where: positions and segments, of queries and of keys.
  """
  return all(numbers is None for numbers in where)


def why_not_splash(
  encoding: base.Encoding, mask: mask_lib.Mask, query: Any, key: Any, counted: bool
) -> str | None:
  """Returns why JAX's splash attention cannot serve, or None if it can.

  Args:
    encoding: says the decay and the bias of the logits.
    mask: which keys a query may see.
    query: an array query_BQHC, or its shape and dtype.
    key: likewise key_BKGC.
    counted: as `is_counted` says.
  """
  reason = _why_not('splash', encoding, mask, query, key, counted)
  length = query.shape[1]
  if reason:
    return reason
  if query.dtype != jnp.bfloat16:
    return f'splash takes bfloat16, not {query.dtype}'
  if length % LANES:
    return f'splash takes rows of a multiple of {LANES} tokens, not of {length}'
  tiles = math.prod(length // tile for tile in _tile(length))
  if tiles > SPLASH_TILES:
    return f'splash plans its tiles on the host, up to {SPLASH_TILES}, not {tiles}'
  return None


def why_not_cudnn(
  encoding: base.Encoding, mask: mask_lib.Mask, query: Any, key: Any, counted: bool
) -> str | None:
  """Returns why cuDNN's flash attention cannot serve, or None; arguments as of why_not_splash."""
  reason = _why_not('cudnn', encoding, mask, query, key, counted)
  channels = query.shape[3]
  if reason:
    return reason
  if not has_gpu():
    return 'cudnn cannot be compiled for without a GPU'
  if query.dtype not in (jnp.bfloat16, jnp.float16):
    return f'cudnn takes bfloat16 and float16, not {query.dtype}'
  if channels % CUDNN_STEP or channels > CUDNN_CHANNELS:
    return (
      f'cudnn takes heads of a multiple of {CUDNN_STEP} channels up to {CUDNN_CHANNELS}, '
      f'not of {channels}'
    )
  return None


def has_gpu() -> bool:
  """Returns whether this host has one: for a topology, kernels are chosen where there is none."""
  return jax.default_backend() == 'gpu'


def _why_not(name, encoding, mask, query, key, counted):
  """Returns what neither can do."""
  has = [what for what in ('bias', 'log_decay') if getattr(encoding, what) is not None]
  if has:
    return f'{name} knows no {has[0]}, which {encoding.name!r} has'
  num_queries, num_keys = query.shape[1], key.shape[1]
  if num_queries != num_keys:
    return f'{name} takes as many keys as queries, not {num_keys} for {num_queries}'
  if not counted:
    return f'{name} needs rows of one segment whose positions are known to count from 0'
  if mask.block is not None:
    return f'{name} has no blockwise mask'
  return None


def splash(
  query_BQHC: jax.Array,
  key_BKGC: jax.Array,
  value_BKGC: jax.Array,
  *,
  encoding: base.Encoding,
  params: base.Params,
  query_position_BQ: jax.Array | None,
  key_position_BK: jax.Array | None,
  query_segment_BQ: jax.Array | None,
  key_segment_BK: jax.Array | None,
  mask: mask_lib.Mask,
  interpret: bool = False,
) -> jax.Array:
  """Returns out_BQHC like `reference.attention`, of rows without positions and segments.

  Raises:
    errors.UserError: as why_not_splash says.
  """
  del params
  where = query_position_BQ, key_position_BK, query_segment_BQ, key_segment_BK
  _check(why_not_splash(encoding, mask, query_BQHC, key_BKGC, is_counted(*where)))
  attend: Any = _splash(mask, query_BQHC.shape[1], query_BQHC.shape[2], interpret)
  query_BHQC, key_BGKC, value_BGKC = (
    jnp.swapaxes(x_BLHC, 1, 2) for x_BLHC in (query_BQHC, key_BKGC, value_BKGC)
  )
  query_BHQC *= query_BHQC.shape[3] ** -0.5
  return jnp.swapaxes(jax.vmap(attend)(query_BHQC, key_BGKC, value_BGKC), 1, 2)


def _splash(mask, length, num_heads, interpret):
  """Returns the kernel of rows of a length."""
  queries, keys = _tile(length)
  sizes = splash_attention.BlockSizes(
    *(queries, keys, keys),  # forward; each step takes a tile's keys whole
    *(queries, keys, keys),  # backward, of keys and values
    *(queries, keys),  # backward, of queries
  )
  shape = length, length
  if mask.window is not None:
    of_head = splash_attention.LocalMask(shape, (mask.window - 1, 0), 0)
  elif mask.causal:
    of_head = splash_attention.CausalMask(shape)
  else:
    of_head = splash_attention.FullMask(shape)
  return splash_attention.make_splash_mha_single_device(
    splash_attention.MultiHeadMask([of_head] * num_heads),
    block_sizes=sizes,
    residual_checkpoint_name=residuals.NAME,
    interpret=interpret,
  )


def _tile(length):
  """Returns the queries and the keys of a tile: the most multiples of LANES that divide a row."""
  return tuple(
    max(n for n in range(LANES, most + 1, LANES) if length % n == 0)
    for most in (SPLASH_QUERIES, SPLASH_KEYS)
  )


def cudnn(
  query_BQHC: jax.Array,
  key_BKGC: jax.Array,
  value_BKGC: jax.Array,
  *,
  encoding: base.Encoding,
  params: base.Params,
  query_position_BQ: jax.Array | None,
  key_position_BK: jax.Array | None,
  query_segment_BQ: jax.Array | None,
  key_segment_BK: jax.Array | None,
  mask: mask_lib.Mask,
  kernel: Literal['cudnn', 'xla'] = 'cudnn',
) -> jax.Array:
  """Returns out_BQHC likewise, by `jax.nn.dot_product_attention`, whose implementation is `kernel`.

  Its backward pass needs all of the forward pass again where activations are computed again, for
  what it keeps has no name of `residuals`.

  Raises:
    errors.UserError: as why_not_cudnn says.
  """
  del params
  where = query_position_BQ, key_position_BK, query_segment_BQ, key_segment_BK
  _check(why_not_cudnn(encoding, mask, query_BQHC, key_BKGC, is_counted(*where)))
  return jax.nn.dot_product_attention(
    query_BQHC,
    key_BKGC,
    value_BKGC,
    is_causal=mask.causal,
    local_window_size=None if mask.window is None else (mask.window - 1, 0),
    implementation=kernel,
  )


def _check(reason):
  if reason:
    raise errors.UserError(f"{reason}; use implementation='auto'")


class Kernel(NamedTuple):
  """What is chosen on a platform, where it serves.

  Attributes:
    name: an implementation's.
    whose: it is, for a report.
    attention: as `kernels.IMPLEMENTATIONS` has it.
    why_not: returns why it cannot serve, or None.
  """

  name: str
  whose: str
  attention: Callable[..., jax.Array]
  why_not: Callable[..., str | None]


KERNELS = {
  'tpu': Kernel('splash', "JAX's splash attention", splash, why_not_splash),
  'gpu': Kernel('cudnn', "cuDNN's flash attention", cudnn, why_not_cudnn),
}
