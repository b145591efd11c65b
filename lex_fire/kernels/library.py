"""Attention without a bias or a decay, by kernels that others keep: splash attention, and cuDNN's.

Both mask by the place of a token in its row, not by its position, and are told the mask when a
program is traced. So they serve rows that are known then to be one segment at positions 0, 1, 2 and
so on: those that are given without positions and segments. What they lack, the other
implementations have.
"""

import functools
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
LEAST_QUERIES = 256  # of a tile, but in shorter rows
# It looks at each tile of a mask that hides any on the host, and for three kernels: at those of
# 32,768 tokens for seconds, of 131,072 for minutes.
SPLASH_TILES = 2048
CUDNN_CAPABILITY = 8.0  # of NVIDIA's GPUs, at least, for flash attention


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
  tile = _tile(length)
  if tile[0] < min(length, LEAST_QUERIES):
    return f'splash would cut rows of {length} tokens in tiles of {tile[0]}'
  tiles = math.prod(length // tokens for tokens in tile)
  if mask.causal and tiles > SPLASH_TILES:
    return f'splash plans its tiles on the host, up to {SPLASH_TILES}, not {tiles}'
  return None


def why_not_cudnn(
  encoding: base.Encoding, mask: mask_lib.Mask, query: Any, key: Any, counted: bool
) -> str | None:
  """Returns why cuDNN's flash attention cannot serve, or None; arguments as of why_not_splash."""
  reason = _why_not('cudnn', encoding, mask, query, key, counted) or why_no_cudnn_here()
  if reason:
    return reason
  query, key = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key))
  try:  # JAX knows what this version of the library takes
    jax.eval_shape(functools.partial(_by_jax, mask, 'cudnn'), query, key, key)
  except (NotImplementedError, RuntimeError, ValueError) as error:
    return f'cudnn: {str(error).rstrip(".")}'
  return None


def why_no_cudnn_here() -> str | None:
  """Returns why programs of this host cannot have cuDNN's flash attention, or None.

  A host without a GPU may compile for a topology of them, but then the library cannot be asked.
  """
  if jax.default_backend() != 'gpu':
    return 'cudnn cannot be compiled for without a GPU'
  capability = getattr(jax.local_devices()[0], 'compute_capability', None)
  try:
    is_able = float(capability or 'none') >= CUDNN_CAPABILITY
  except ValueError:  # as of AMD's
    is_able = False
  if is_able:
    return None
  return f'cudnn needs compute capability {CUDNN_CAPABILITY} or above, and not {capability}'


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
  return _by_jax(mask, kernel, query_BQHC, key_BKGC, value_BKGC)


def _by_jax(mask, kernel, query_BQHC, key_BKGC, value_BKGC):
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
    raise errors.UserError(
      f"{reason}; ask for 'auto' (model.attention, or evaluate.attention), which has others too"
    )


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
