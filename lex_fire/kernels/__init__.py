"""Attention by several implementations of one contract, chosen by name."""

from collections.abc import Callable

import jax

from lex_fire import errors
from lex_fire.encodings import base
from lex_fire.kernels import chunked, reference
from lex_fire.kernels.mask import Mask

IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
  'reference': reference.attention,
  'chunked': chunked.attention,
}

# Up to this many dense logits a head and row, 'auto' does not cut them in tiles: on CPU tiles that
# fit the cache win early, an accelerator prefers few large products.
MAX_DENSE_LOGITS = {'cpu': 128 * 128, 'gpu': 2048 * 2048, 'tpu': 2048 * 2048}


def choose(num_queries: int, num_keys: int, platform: str) -> str:
  """Returns what implementation='auto' means here: 'reference' or 'chunked'."""
  return 'reference' if num_queries * num_keys <= MAX_DENSE_LOGITS[platform] else 'chunked'


def attention(
  query_BQHC: jax.Array,
  key_BKGC: jax.Array,
  value_BKGC: jax.Array,
  *,
  encoding: base.Encoding,
  params: base.Params,
  query_position_BQ: jax.Array,
  key_position_BK: jax.Array,
  query_segment_BQ: jax.Array | None = None,
  key_segment_BK: jax.Array | None = None,
  mask: Mask = Mask(),
  implementation: str = 'auto',
) -> jax.Array:
  """Softmax attention under a position encoding: out_i = sum_j softmax_j(logits_ij) value_j.

  Args:
    query_BQHC: queries, already rotated by `encoding.rotate`.
    key_BKGC: keys, likewise; head h of the queries reads head h // (H / G) of the keys.
    value_BKGC: values.
    encoding: says the decay and the bias of the logits.
    params: the encoding's.
    query_position_BQ: int32 positions within the segment; a leading 1 broadcasts.
    key_position_BK: likewise.
    query_segment_BQ: int32 >= 0; a query sees only keys of its own segment. None: all is one
      segment.
    key_segment_BK: likewise.
    mask: which keys a query may see, by position.
    implementation: a key of IMPLEMENTATIONS, or 'auto': dense when small, else tiled.

  Returns:
    out_BQHC in the value's dtype. Logits, bias and softmax are float32.

  Raises:
    errors.UserError: for an unknown implementation, or heads that do not divide.
  """
  if query_BQHC.shape[2] % key_BKGC.shape[2]:
    raise errors.UserError(
      f'num_kv_heads={key_BKGC.shape[2]} must divide num_heads={query_BQHC.shape[2]}'
    )
  if implementation == 'auto':
    implementation = choose(query_BQHC.shape[1], key_BKGC.shape[1], jax.default_backend())
  if implementation not in IMPLEMENTATIONS:
    raise errors.UserError(
      f'unknown {implementation=}; known: auto, {", ".join(sorted(IMPLEMENTATIONS))}'
    )
  return IMPLEMENTATIONS[implementation](
    query_BQHC,
    key_BKGC,
    value_BKGC,
    encoding=encoding,
    params=params,
    query_position_BQ=query_position_BQ,
    key_position_BK=key_position_BK,
    query_segment_BQ=query_segment_BQ,
    key_segment_BK=key_segment_BK,
    mask=mask,
  )
