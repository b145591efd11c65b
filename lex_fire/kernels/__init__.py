"""Attention by several implementations of one contract, chosen by name."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lex_fire import errors
from lex_fire.encodings import base, piecewise
from lex_fire.kernels import (
  chunked,
  flash,
  library,
  mosaic_tpu,
  mosaic_tpu_size,
  reference,
  ring,
)
from lex_fire.kernels.mask import Mask


def _mosaic_gpu(*arrays: jax.Array, **options: Any) -> jax.Array:
  from lex_fire.kernels import mosaic_gpu  # whose backend is slow to import

  return mosaic_gpu.attention(*arrays, **options)


IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
  'reference': reference.attention,
  'chunked': chunked.attention,
  'mosaic_tpu': mosaic_tpu.attention,
  'mosaic_gpu': _mosaic_gpu,
  **{kernel.name: kernel.attention for kernel in library.KERNELS.values()},
}

# Of rows that devices hold in parts, by what one device does with a block of keys.
RINGS: dict[str, Callable[..., jax.Array]] = {
  name: functools.partial(ring.attention, attend, in_ring)
  for name, attend, in_ring in (
    ('ring', functools.partial(chunked.attention, pieces=ring.CHUNKS), ring.of_tiles),
    ('mosaic_tpu_ring', functools.partial(mosaic_tpu.attention, pieces=ring.CHUNKS), flash.on_ring),
    ('mosaic_gpu_ring', _mosaic_gpu, flash.on_ring),
  )
}
# By what whole rows go by.
_RING_OF = {'chunked': 'ring', 'mosaic_tpu': 'mosaic_tpu_ring', 'mosaic_gpu': 'mosaic_gpu_ring'}

# Kernels of one platform. The compiler cannot divide them over devices, as it does the others.
_OF_LIBRARIES = {kernel.name: platform for platform, kernel in library.KERNELS.items()}
PLATFORM = {'mosaic_tpu': 'tpu', 'mosaic_gpu': 'gpu', **_OF_LIBRARIES}

# Up to this many dense logits a head and row (or of all rows, see `_of_size`), 'auto' does not cut
# them in tiles: on CPU tiles that fit the cache win early, an accelerator prefers few large
# products.
MAX_DENSE_LOGITS = {'cpu': 128 * 128, 'gpu': 2048 * 2048, 'tpu': 2048 * 2048}
_FEW_QUERIES = 16  # of a row, fewer than which tiles are no faster than the bias of each logit


class Choice(NamedTuple):
  """An implementation, and why it was chosen, as the end of a sentence."""

  implementation: str
  reason: str


def platform() -> str:
  """Returns for which platform is compiled: that of `jax.default_device`, if set, else the host's.

  So a program for TPU compiles where there is none, under the device of a topology.
  """
  # A device, a platform's name, or None.
  device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
  return getattr(device, 'platform', device) or jax.default_backend()


def choose(
  implementation: str,
  encoding: base.Encoding,
  mask: Mask,
  query: Any,
  key: Any,
  sequence_axis: str | None = None,
  counted: bool = False,
  rows: int = 1,
) -> Choice:
  """Returns by what implementation attention is computed here, and why.

  'mosaic_gpu' is never chosen, only asked for, until it has run on a GPU: it has been compiled for
  one, and interpreted. What others keep, they have run.

  Args:
    implementation: a key of IMPLEMENTATIONS, which is taken, or its ring; or 'auto'.
    encoding: says the decay and the bias of the logits.
    mask: which keys a query may see.
    query: an array query_BQHC, or its shape and dtype.
    key: likewise key_BKGC.
    sequence_axis: the mesh axis over which rows are cut in parts, if they are. Then it is a key of
      RINGS that is chosen, or the reference if asked for.
    counted: whether attention is given no positions and no segments, as `library` wants it.
    rows: how many have positions of their own on a device; 1: all share theirs.

  Raises:
    errors.UserError: for an unknown implementation, one that is for another platform, or one that
      needs whole rows where they are cut in parts.
  """
  here = platform()
  if implementation in PLATFORM and PLATFORM[implementation] != here:
    raise errors.UserError(
      f'{implementation=} is for {PLATFORM[implementation]}, but this is {here}; '
      "use 'auto' or 'chunked'"
    )
  if implementation not in ('auto', *IMPLEMENTATIONS):
    raise errors.UserError(
      f'unknown {implementation=}; known: auto, {", ".join(sorted(IMPLEMENTATIONS))}'
    )
  # The compiler divides the reference, as dense products; of tiles it would fetch all to each.
  if sequence_axis is not None and implementation in _RING_OF:
    return Choice(_RING_OF[implementation], f'as asked, {_cut_by(sequence_axis)}')
  if sequence_axis is not None and implementation not in ('auto', 'reference'):
    raise errors.UserError(
      f'{implementation=} needs whole rows, but mesh axis {sequence_axis!r} cuts them in parts; '
      "use 'auto'"
    )
  if implementation in IMPLEMENTATIONS:
    return Choice(implementation, 'as asked')
  if sequence_axis is not None:
    return _of_parts(here, encoding, query, key, sequence_axis)
  num_queries, num_keys, reason = query.shape[1], key.shape[1], None
  if here in library.KERNELS:
    kept = library.KERNELS[here]
    reason = kept.why_not(encoding, mask, query, key, counted)
    if reason is None:
      return Choice(kept.name, f'{kept.whose}, where there is no bias and no decay')
  if here == 'tpu':
    reason = _why_not_on_tpu(encoding, query, key)
    if reason is None:
      return Choice('mosaic_tpu', 'a kernel for TPU that computes bias and decay in its tiles')
  return _of_size(here, encoding, (rows, num_queries, num_keys), f' ({reason})' if reason else '')


def _why_not_on_tpu(encoding: base.Encoding, query: Any, key: Any, pieces: int = 1) -> str | None:
  least = mosaic_tpu_size.LANES
  if query.shape[1] < least:
    return f'mosaic_tpu has tiles of {least} queries at least, not of {query.shape[1]}'
  return mosaic_tpu_size.why_not(encoding, query, key, pieces)


def _cut_by(axis: str) -> str:
  return f'as mesh axis {axis!r} cuts rows in parts'


def _of_parts(here: str, encoding: base.Encoding, query: Any, key: Any, axis: str) -> Choice:
  """Chooses for rows of which a mesh axis gives each device a part."""
  why = _cut_by(axis)
  if here != 'tpu':
    return Choice('ring', why)
  devices = jax.sharding.get_abstract_mesh().shape.get(axis, 1)
  own = (
    jax.ShapeDtypeStruct((x.shape[0], x.shape[1] // devices, *x.shape[2:]), x.dtype)
    for x in (query, key)
  )
  reason = _why_not_on_tpu(encoding, *own, pieces=ring.CHUNKS)
  if reason is None:
    return Choice('mosaic_tpu_ring', f'{why}, with a kernel for TPU for what meets on a device')
  return Choice('ring', f'{why} ({reason})')


def _of_size(
  here: str, encoding: base.Encoding, sizes: tuple[int, int, int], reason: str
) -> Choice:
  """Chooses by how many logits there are, of sizes (rows, queries, keys)."""
  # A bias that depends on more than the distance costs more time and memory than the logit that it
  # is added to, and rows with positions of their own need one each.
  of_distance = encoding.bias is None or encoding.shift_invariant
  together = not of_distance and sizes[1] >= _FEW_QUERIES and sizes[0] > 1
  counted = sizes if together else sizes[1:]
  what, most = f'{" x ".join(map(str, counted))} logits', MAX_DENSE_LOGITS[here]
  if math.prod(counted) <= most:
    return Choice('reference', f'{what} are at most {most} on {here}{reason}')
  return Choice('chunked', f'{what} are over {most} on {here}{reason}')


def positions(x_BLHC: jax.Array, position_BL: jax.Array | None) -> jax.Array:
  """Returns the positions of the tokens of x: those given or, if None, 0 .. L - 1 for all rows."""
  if position_BL is None:
    # Behind a barrier, or XLA computes what follows as it compiles: for seconds at 131,072 tokens.
    return jax.lax.optimization_barrier(jnp.arange(x_BLHC.shape[1], dtype=jnp.int32)[None])
  return position_BL


def attention(
  query_BQHC: jax.Array,
  key_BKGC: jax.Array,
  value_BKGC: jax.Array,
  *,
  encoding: base.Encoding,
  params: base.Params,
  query_position_BQ: jax.Array | None = None,
  key_position_BK: jax.Array | None = None,
  query_segment_BQ: jax.Array | None = None,
  key_segment_BK: jax.Array | None = None,
  mask: Mask = Mask(),
  implementation: str = 'auto',
  split: Callable[..., jax.Array] | None = None,
  sequence_axis: str | None = None,
  row_devices: int = 1,
) -> jax.Array:
  """Softmax attention under a position encoding: out_i = sum_j softmax_j(logits_ij) value_j.

  >>> import jax.numpy as jnp
  >>> from lex_fire import encodings
  >>> value_BKGC, position_BL = jnp.arange(4.0).reshape(1, 4, 1, 1), jnp.arange(4)[None]
  >>> zero_BKGC = jnp.zeros_like(value_BKGC)  # scores are equal: each sees a mean of two values
  >>> nope = {'encoding': encodings.get('nope'), 'params': {}, 'mask': Mask(window=2)}
  >>> positions = {'query_position_BQ': position_BL, 'key_position_BK': position_BL}
  >>> attention(zero_BKGC, zero_BKGC, value_BKGC, **nope, **positions).ravel().tolist()
  [0.0, 0.5, 1.5, 2.5]

  Args:
    query_BQHC: queries, already rotated by `encoding.rotate`.
    key_BKGC: keys, likewise; head h of the queries reads head h // (H / G) of the keys.
    value_BKGC: values.
    encoding: says the decay and the bias of the logits.
    params: the encoding's.
    query_position_BQ: int32 positions within the segment; a leading 1 broadcasts. None: 0, 1, 2 and
      so on, and known to be.
    key_position_BK: likewise.
    query_segment_BQ: int32 >= 0; a query sees only keys of its own segment. None: all is one
      segment.
    key_segment_BK: likewise.
    mask: which keys a query may see, by position.
    implementation: a key of IMPLEMENTATIONS, or 'auto': see `choose`.
    split: (function, table, arrays by name) -> out_BQHC: runs a kernel that the compiler cannot
      divide on each device's own rows, heads and tokens. None: all is on one device.
    sequence_axis: the mesh axis over which rows are cut in parts, if they are; needs `split`. Parts
      may have any of a row's tokens, as their positions say: see `ring`.
    row_devices: how many devices share the rows.

  Returns:
    out_BQHC in the value's dtype. Logits, bias and softmax are float32.

  Raises:
    errors.UserError: as `choose` does, or if heads do not divide; if rows are cut in parts, as
      `ring.attention` does.
  """
  num_heads, num_kv_heads = query_BQHC.shape[2], key_BKGC.shape[2]
  if num_heads % num_kv_heads:
    raise errors.UserError(f'{num_kv_heads=} must divide {num_heads=}')
  counted = library.is_counted(query_position_BQ, key_position_BK, query_segment_BQ, key_segment_BK)
  given = (position for position in (query_position_BQ, key_position_BK) if position is not None)
  own = max(map(len, given), default=1)
  name = choose(
    *(implementation, encoding, mask, query_BQHC, key_BKGC, sequence_axis, counted),
    rows=max(1, own // row_devices),
  ).implementation
  if name not in _OF_LIBRARIES:
    query_position_BQ = positions(query_BQHC, query_position_BQ)
    if counted and query_BQHC.shape[1] == key_BKGC.shape[1]:
      key_position_BK = query_position_BQ  # what follows from either is computed once
    key_position_BK = positions(key_BKGC, key_position_BK)

  arrays = {
    'query_BQHC': query_BQHC,
    'key_BKGC': key_BKGC,
    'value_BKGC': value_BKGC,
    'query_position_BQ': query_position_BQ,
    'key_position_BK': key_position_BK,
    'query_segment_BQ': query_segment_BQ,
    'key_segment_BK': key_segment_BK,
  }
  if name in RINGS:
    attend = functools.partial(RINGS[name], mask=mask, axis=sequence_axis)
  else:
    attend = functools.partial(IMPLEMENTATIONS[name], mask=mask)
  if name not in (*RINGS, *PLATFORM) or split is None:
    return attend(**arrays, params=params, encoding=encoding)
  return _on_each_device(split, attend, arrays, encoding, params)


def _on_each_device(split, attend, arrays, encoding, params):
  num_heads = arrays['query_BQHC'].shape[2]
  if encoding.table is None:
    # As leaves, which have no names by which they would be divided.
    leaves, tree = jax.tree.flatten(params if encoding.bias is not None else {})

    def attend_own(leaves, **own):
      if encoding.bias is not None and own['query_BQHC'].shape[2] != num_heads:
        raise errors.UserError(
          f'encoding {encoding.name!r} has a bias and, with these options, no table, without which '
          'devices cannot share its heads here; use options with a table, or mesh.tensor=1'
        )
      return attend(**own, params=tree.unflatten(leaves), encoding=encoding)

    return split(attend_own, leaves, arrays)
  # Of all heads, for a device does not know which of them are its own.
  table = encoding.table(params, num_heads)
  given = piecewise.tabulated(encoding)
  return split(lambda table, **own: attend(**own, params=table, encoding=given), table, arrays)
