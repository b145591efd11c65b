"""What attention makes of distance: curves of an encoding, and what a trained model's heads do.

`expectation` and `bias` are the curves of an encoding, from parameters alone; `measure` runs a
model over windows of text. All speak of s[n], the score (the logit, before the softmax) of a key n
tokens before its query, and `resolution` is LeX's measure of it: how well do scores tell near from
far (Sun et al. 2022, arXiv:2212.10554, section 3.1)?
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lex_fire import config as config_lib
from lex_fire import encodings, errors, kernels, model, sharding
from lex_fire.encodings import base
from lex_fire.kernels import mask as mask_lib
from lex_fire.kernels import tile

TOKENS_PER_BATCH = 8192  # a device, of whole rows: at least one
LOGITS_PER_CHUNK = 2**22  # a device: 16 MiB of float32, a few of which are alive at once


def resolution(score: np.ndarray) -> np.ndarray:
  """Returns the attention resolution R(s) of scores by distance (section 3.1, equation 3).

      R(s) = sum_{n=0}^{N-1} p_n (p_n - p_{n+1}),   p_n = e^s[n] / sum_{n=0}^N e^s[n]

  The paper's sum ends at N and so reads s[N+1], which does not exist; here it ends at N - 1.

      R(s) = (p_0^2 - p_N^2 + sum_{n=0}^{N-1} (p_n - p_{n+1})^2) / 2

  so R is at most 1, where all weight is on n = 0, and at least -1/8; equal scores have 0. A
  constant added to s changes nothing, a factor does. (Values of up to 1.08 in the paper's table 3
  are none that this equation can have. Hundredths of it would be of the size that encodings alone
  have for the paper's heads, but its text names no unit.)

  >>> resolution(np.array([[0.0, 0.0, 0.0], [0.0, -1.0, -2.0]])).round(3).tolist()
  [0.0, 0.318]

  Args:
    score: [..., N + 1] at the distances 0 .. N in tokens [nats].

  Returns:
    R, float64, of the leading shape.
  """
  score = np.asarray(score, np.float64)
  weight = np.exp(score - score.max(axis=-1, keepdims=True))
  weight /= weight.sum(axis=-1, keepdims=True)
  return (weight[..., :-1] * (weight[..., :-1] - weight[..., 1:])).sum(axis=-1)


def expectation(
  encoding: encodings.Encoding,
  params: base.Params,
  distance_K: np.ndarray,
  *,
  width: int,
  query_position: int,
) -> np.ndarray:
  """Returns g[n], the expected attention of a rotation or embedding by distance alone.

      g[n] = sum_m cos(n theta_m) zeta_m^n          (section 3.2, equation 8)

  For a rotation it is half of the dot product of two heads whose channels all are 1, rotated n
  tokens apart and decayed: what remains if queries and keys do not know of positions. For
  embeddings it is the dot product of two of them, n tokens apart.

  Args:
    encoding: that rotates or is embedded.
    params: its own.
    distance_K: int [tokens], each from 0 to query_position.
    width: channels of a head if it rotates, of the model if it is embedded.
    query_position: of the query [tokens].

  Returns:
    expectation_K, float64; for RoPE, xPos and sinusoids width / 2 at the distance 0.

  Raises:
    errors.UserError: if the encoding does neither, or a position is not in its range.
  """
  row_1L = _positions(encoding, query_position, np.append(distance_K, 0))
  if encoding.rotate is not None:
    ones_BLHC = jnp.ones((1, row_1L.shape[1], 1, width), jnp.float32)
    turned_LC = np.asarray(encoding.rotate(params, ones_BLHC, row_1L), np.float64)[0, :, 0]
    product_KC = turned_LC[:-1] * turned_LC[-1:]
    if encoding.log_decay is not None:
      product_KC *= np.exp(distance_K[:, None] * encoding.log_decay(width)[None])
    return product_KC.sum(axis=1) / 2
  if encoding.embed is not None:
    embedded_LD = np.asarray(encoding.embed(params, row_1L, width), np.float64)[0]
    return embedded_LD[:-1] @ embedded_LD[-1]
  raise errors.UserError(
    f'encoding {encoding.name!r} neither rotates nor is embedded, so it has no expectation curve'
  )


def bias(
  encoding: encodings.Encoding,
  params: base.Params,
  distance_K: np.ndarray,
  *,
  num_heads: int,
  query_position: int,
) -> np.ndarray:
  """Returns bias_HK, float64: what an encoding adds to the logits of one query, by distance [nats].

  Args:
    encoding: that has a bias.
    params: its own.
    distance_K: int [tokens], each from 0 to query_position.
    num_heads: of the model.
    query_position: of the query [tokens]; it matters only if the encoding is not shift invariant.

  Raises:
    errors.UserError: if the encoding has none, or a position is not in its range.
  """
  key_position_1K = _positions(encoding, query_position, distance_K)
  if encoding.bias is None:
    raise errors.UserError(f'encoding {encoding.name!r} adds no bias to the logits')
  query_position_11 = jnp.full((1, 1), query_position, jnp.int32)
  bias_BHQK = encoding.bias(params, query_position_11, key_position_1K, num_heads)
  return np.asarray(bias_BHQK, np.float64)[0, :, 0]


def scores(
  encoding: encodings.Encoding,
  params: base.Params,
  distance_K: np.ndarray,
  *,
  config: config_lib.ModelConfig,
  query_position: int,
) -> np.ndarray:
  """Returns score_HK, float64: s[n] of heads to which all tokens are alike, but for a constant.

  Queries and keys are ones in every channel, so that a rotation gives 2 g[n] / sqrt(C) for heads of
  C channels, and a bias is added to it [nats]. Embeddings are taken to reach the head at the same
  scale: their dot products times 2 sqrt(C) / D, which for sinusoids is sqrt(C) at the distance 0.

  Args:
    encoding: any.
    params: its own.
    distance_K: int [tokens], each from 0 to query_position.
    config: the model's shape.
    query_position: of the query [tokens].

  Raises:
    errors.UserError: if a position is not in the encoding's range.
  """
  score_HK = np.zeros((config.num_heads, len(distance_K)))
  if encoding.rotate is not None or encoding.embed is not None:
    width = config.head_dim if encoding.rotate is not None else config.d_model
    expectation_K = expectation(
      encoding, params, distance_K, width=width, query_position=query_position
    )
    score_HK += (expectation_K * 2 * config.head_dim**0.5 / width)[None]
  if encoding.bias is not None:
    score_HK += bias(
      encoding, params, distance_K, num_heads=config.num_heads, query_position=query_position
    )
  return score_HK


def _positions(encoding, query_position, distance_K):
  """Returns position_1K of keys at distances from a query."""
  model.check_length(encoding, query_position + 1)
  if query_position < 0 or distance_K.min() < 0 or distance_K.max() > query_position:
    raise errors.UserError(
      f'distances {distance_K.min()} to {distance_K.max()} are not all from 0 to '
      f'{query_position=}; give a later query or shorter distances'
    )
  return jnp.asarray(query_position - distance_K, jnp.int32)[None]


class Statistics(NamedTuple):
  """What the heads of a model do with distance, over all windows; N layers, H heads.

  Attributes:
    score_NHK: s[n] at each distance n = 0, 1 .. that the mask shows: the mean logit of all such
      pairs (section 4.3, equation 11) [nats].
    entropy_NH: of the attention weights of a query, the mean over queries [nats].
    distance_NH: between a query and the keys that it attends to, weighted by attention, the mean
      over queries [tokens].
  """

  score_NHK: np.ndarray
  entropy_NH: np.ndarray
  distance_NH: np.ndarray

  @property
  def resolution_NH(self) -> np.ndarray:
    """R(s) of each head's own scores.

    The paper computes it "in every layer" and does not say what becomes of heads. A softmax is
    taken by each head for itself, so each has its own.
    """
    return resolution(self.score_NHK)

  @property
  def resolution_of_mean_N(self) -> np.ndarray:
    """R(s) of the scores that are the mean of a layer's heads: the other reading of the paper."""
    return resolution(self.score_NHK.mean(axis=1))


class _Sums(NamedTuple):
  """Sums over queries, float32; `pairs_K` counts those that each distance has."""

  score_NHK: Any
  entropy_NH: Any
  distance_NH: Any
  pairs_NK: Any


def measure(
  transformer: model.Transformer,
  params: Any,
  tokens_WL: np.ndarray,
  progress: Callable[[int], None] = lambda tokens: None,
) -> Statistics:
  """Measures the attention of a causal model on windows of text, under its own mask.

  The queries and keys are those of a forward pass under that mask; their logits are computed again
  in chunks of rows, so that no [L, L] array exists.

  Args:
    transformer: the model.
    params: its parameters.
    tokens_WL: the windows' int32 inputs.
    progress: is called with the number of tokens done since the last call.

  Raises:
    errors.UserError: if the model is not causal, or a window is past its encoding.
  """
  if not transformer.config.causal:
    raise errors.UserError(
      'model.causal=False: attention resolution is of causal models; analyze one of those'
    )
  count, length = tokens_WL.shape
  devices = jax.device_count()
  rows = devices * max(1, min(TOKENS_PER_BATCH // length, -(-count // devices)))
  parts = []
  for start in range(0, count, rows):
    # The last batch is filled up with its last window again, whose weight is 0.
    index_B = start + np.arange(rows)
    tokens_BL = tokens_WL[np.minimum(index_B, count - 1)]
    part = _sums(transformer, params, tokens_BL, (index_B < count).astype(np.float32))
    parts.append(jax.tree.map(lambda array: np.asarray(array, np.float64), part))
    progress(int((index_B < count).sum()) * length)
  total = jax.tree.map(lambda *arrays: sum(arrays), *parts)
  pairs_K = total.pairs_NK[0]
  seen_K = pairs_K > 0
  return Statistics(
    total.score_NHK[..., seen_K] / pairs_K[seen_K][None, None],
    total.entropy_NH / (count * length),
    total.distance_NH / (count * length),
  )


def by_layer(config: config_lib.ModelConfig, tree: Any) -> Any:
  """Returns the variables of a model's blocks as those of one, with a leading N."""
  if config.scan_layers:
    return tree['blocks']
  blocks = [tree[f'block_{layer}'] for layer in range(config.num_layers)]
  return jax.tree.map(lambda *arrays: jnp.stack(arrays), *blocks)


def encoding_params(transformer: model.Transformer, params: Any) -> base.Params:
  """Returns the encoding's parameters in a model, with a leading N; {} when nothing is learned."""
  encoding, config = transformer.encoding, transformer.config
  if not encoding.learned:
    return {}
  if encoding.shared:
    return jax.tree.map(
      lambda array: jnp.broadcast_to(array, (config.num_layers, *array.shape)), params['encoding']
    )
  return by_layer(config, params)['attention']['encoding']


@functools.partial(jax.jit, static_argnums=0)
def _sums(transformer, params, tokens_BL, weight_B):
  """Returns the _Sums of a batch whose rows count by their weight."""
  tokens_BL = sharding.constrain(tokens_BL, 'BL')
  _, variables = transformer.apply({'params': params}, tokens_BL, mutable=['intermediates'])
  sown = by_layer(transformer.config, variables['intermediates'])['attention']
  (query_NBLHC,), (key_NBLGC,) = sown['query_BLHC'], sown['key_BLGC']
  layers = (query_NBLHC, key_NBLGC, encoding_params(transformer, params))
  return jax.lax.map(functools.partial(_layer_sums, transformer, weight_B), layers)


def _layer_sums(transformer, weight_B, layer):
  """Returns the _Sums of one layer, without the N."""
  query_BLHC, key_BLGC, params = layer
  encoding, mask = transformer.encoding, transformer.mask or kernels.Mask()
  batch, length, num_heads, _ = query_BLHC.shape
  position_1L = jnp.arange(length, dtype=jnp.int32)[None]
  query_BLHC, key_BLGC = tile.prepare(
    query_BLHC,
    key_BLGC,
    encoding=encoding,
    query_position_BQ=position_1L,
    key_position_BK=position_1L,
    causal=True,
  )
  key_BGLC = jnp.swapaxes(key_BLGC, 1, 2)
  logits_per_query = -(-batch // jax.device_count()) * num_heads * length
  rows = min(max(LOGITS_PER_CHUNK // logits_per_query, 1), length)

  def chunk(first):
    # The last chunk begins where it fits; rows that the one before it had do not count again.
    start = jnp.minimum(first, length - rows)
    position_1Q = start + jnp.arange(rows, dtype=jnp.int32)[None]
    query_BQHC = jax.lax.dynamic_slice_in_dim(query_BLHC, start, rows, axis=1)
    logits_BHQK = tile.logits(
      jnp.swapaxes(query_BQHC, 1, 2),
      key_BGLC,
      encoding=encoding,
      params=params,
      query_position_BQ=position_1Q,
      key_position_BK=position_1L,
      query_segment_BQ=None,
      key_segment_BK=None,
      causal=True,
    )
    weight_BQ = weight_B[:, None] * (position_1Q >= first)
    return _chunk_sums(logits_BHQK, position_1Q, position_1L, mask, weight_BQ)

  sums = jax.lax.map(chunk, jnp.arange(0, length, rows, dtype=jnp.int32))
  return jax.tree.map(lambda array: array.sum(axis=0), sums)


def _chunk_sums(logits_BHQK, query_position_1Q, key_position_1K, mask, weight_BQ):
  """Returns the _Sums of a chunk's queries, without the N; keys are those at 0, 1, 2 .."""
  visible_1QK = mask.visible(query_position_1Q, key_position_1K)
  log_weight_BHQK = jax.nn.log_softmax(
    jnp.where(visible_1QK[:, None], logits_BHQK, mask_lib.HIDDEN_LOGIT), axis=-1
  )
  attention_BHQK = jnp.exp(log_weight_BHQK)
  distance_1QK = base.distance(query_position_1Q, key_position_1K)
  # In column n from here on: the key n tokens before the query, whose index is i - n.
  key_1QK = jnp.maximum(distance_1QK, 0)
  seen_1QK = (distance_1QK >= 0) & jnp.take_along_axis(visible_1QK, key_1QK, axis=2)
  seen_BQK = jnp.broadcast_to(seen_1QK, (weight_BQ.shape[0], *seen_1QK.shape[1:]))
  score_BHQK = jnp.take_along_axis(logits_BHQK, key_1QK[:, None], axis=3)
  score_BHQK = jnp.where(seen_1QK[:, None], score_BHQK, 0.0)
  entropy_BHQ = -(attention_BHQK * log_weight_BHQK).sum(axis=-1)
  attended_BHQ = (attention_BHQK * distance_1QK[:, None]).sum(axis=-1)
  highest = jax.lax.Precision.HIGHEST
  return _Sums(
    jnp.einsum('BQ,BHQK->HK', weight_BQ, score_BHQK, precision=highest),
    jnp.einsum('BQ,BHQ->H', weight_BQ, entropy_BHQ, precision=highest),
    jnp.einsum('BQ,BHQ->H', weight_BQ, attended_BHQ, precision=highest),
    jnp.einsum('BQ,BQK->K', weight_BQ, seen_BQK.astype(jnp.float32), precision=highest),
  )
