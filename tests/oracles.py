"""Position encodings and attention in float64 numpy, straight from the papers, to compare with.

Nothing here imports the library or jax. An oracle speaks of one query at position i and one key at
position j, in Python's exact integers; only heads and channels are arrays, named by their shape
(see `lex_fire.encodings.base`). `logits` and `attention` loop over rows, queries and keys.

    ORACLES[name].embed(params, n, d_model, **options) -> vector_D added to the token at n
    ORACLES[name].score(query_HC, key_HC, i, j, **options) -> score_H, the rotated dot product
    ORACLES[name].bias(params, i, j, num_heads, **options) -> bias_H

`options` are those of the library's factory, so that one table of variants drives both.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# Largest error against an oracle, absolute for logits, outputs and gradients of order 1.
TOLERANCE = {
  'float32': 1e-5,  # some 50 roundings of 2^-24 at a value of up to 4
  'bfloat16': 3e-2,  # inputs and outputs of up to 4 are rounded to 8 bits: 4 * 2^-8, twice
  'difference': 2e-4,  # a float32 gradient, summed over all pairs, against a central difference
}


class Oracle(NamedTuple):
  """An encoding by its paper; None where it does nothing."""

  embed: Callable[..., np.ndarray] | None = None
  score: Callable[..., np.ndarray] | None = None
  bias: Callable[..., np.ndarray] | None = None


# Absolute positions, added to the tokens


def sinusoidal_embed(params, n, d_model, base_period=10_000.0):
  """Vaswani et al. 2017, section 3.5: PE(n, 2m) = sin(n / 10000^(2m/D)), and 2m + 1 cos."""
  vector = []
  for channel in range(d_model):
    angle = n / base_period ** (2 * (channel // 2) / d_model)
    vector.append(np.cos(angle) if channel % 2 else np.sin(angle))
  return np.array(vector)


def learned_embed(params, n, d_model, max_length=2048):
  """BERT's table; a position past it has no vector."""
  return params['table_ZD'][n] if n < max_length else np.full(d_model, np.nan)


# The rotary family: pairs of channels as complex numbers, where only i - j enters


def complex_pairs(vector_HC, pairing):
  """Channels 2m and 2m + 1 (interleaved, the papers) or m and m + C/2 (halves) as one number."""
  half = vector_HC.shape[-1] // 2
  if pairing == 'interleaved':
    return vector_HC[..., 0::2] + 1j * vector_HC[..., 1::2]
  return vector_HC[..., :half] + 1j * vector_HC[..., half:]


def rope_score(query_HC, key_HC, i, j, base_period=10_000.0, pairing='halves'):
  """Su et al. 2021, equation 16: Re sum_m q_m conj(k_m) e^(I (i - j) theta_m)."""
  query_HR, key_HR = complex_pairs(query_HC, pairing), complex_pairs(key_HC, pairing)
  theta_R = base_period ** (-2 * np.arange(query_HR.shape[-1]) / query_HC.shape[-1])
  return (query_HR * key_HR.conj() * np.exp(1j * (i - j) * theta_R)).sum(axis=-1).real


def xpos_score(
  query_HC,
  key_HC,
  i,
  j,
  base_period=10_000.0,
  gamma=0.4,
  scale_base=512.0,
  pairing='interleaved',
):
  """Sun et al. 2022, section 2: RoPE's sum with each term times zeta_m^((i - j)/B).

  For keys after the query, which the paper leaves open, zeta_m^(|i - j|/B).
  """
  query_HR, key_HR = complex_pairs(query_HC, pairing), complex_pairs(key_HC, pairing)
  m_R, width = np.arange(query_HR.shape[-1]), query_HC.shape[-1]
  theta_R = base_period ** (-2 * m_R / width)
  zeta_R = (2 * m_R / width + gamma) / (1 + gamma)
  decay_R = np.exp(np.log(zeta_R) * abs(i - j) / scale_base)
  return (query_HR * key_HR.conj() * decay_R * np.exp(1j * (i - j) * theta_R)).sum(axis=-1).real


# Additive biases


def alibi_slopes(num_heads):
  """Press et al. 2022, section 3: a geometric sequence whose start is its ratio, 2^(-8/H)."""

  def of_power_of_two(n):
    start = 2.0 ** (-8 / n)
    return [start**head for head in range(1, n + 1)]

  if num_heads & (num_heads - 1) == 0:
    return of_power_of_two(num_heads)
  below = 1 << (num_heads.bit_length() - 1)
  return of_power_of_two(below) + of_power_of_two(2 * below)[0::2][: num_heads - below]


def alibi_bias(params, i, j, num_heads):
  """Minus slope times distance, on both sides."""
  return np.array([-slope * abs(i - j) for slope in alibi_slopes(num_heads)])


def t5_bucket(distance, num_buckets=32, max_distance=128):
  """Raffel et al. 2020, the published `_relative_position_bucket`, causal."""
  n = max(distance, 0)
  max_exact = num_buckets // 2
  if n < max_exact:
    return n
  large = np.log(n / max_exact) / np.log(max_distance / max_exact) * (num_buckets - max_exact)
  return min(max_exact + int(large), num_buckets - 1)


def t5_bias(params, i, j, num_heads, num_buckets=32, max_distance=128):
  """One learned number a bucket and a head."""
  return params['bias_ZH'][t5_bucket(i - j, num_buckets, max_distance)]


def fire_input(params, i, j, threshold=512.0, **_):
  """Li et al. 2023, section 3: psi(|i - j|) / psi(max(L, i, j)), psi(x) = log(c x + 1)."""
  c = abs(params['c'])
  length = abs(params['length_multiplier']) * threshold
  return np.log(c * abs(i - j) + 1) / (np.log(c * max(length, i, j) + 1) + 1e-6)


def fire_hidden(params, x, hidden_layers=1, **_):
  """The hidden layers of f before their ReLU: a list, first layer first."""
  before = [x * params['w_in_W'] + params['b_in_W']]
  if hidden_layers == 2:
    before.append(np.maximum(before[0], 0) @ params['w_hidden_WX'] + params['b_hidden_X'])
  return before


def fire_bias(params, i, j, num_heads, **options):
  """f(x) for the x of `fire_input`: a ReLU network from one number to one a head."""
  hidden = fire_hidden(params, fire_input(params, i, j, **options), **options)
  return np.maximum(hidden[-1], 0) @ params['w_out_WH'] + params['b_out_H']


ORACLES = {
  'nope': Oracle(),
  'sinusoidal': Oracle(embed=sinusoidal_embed),
  'learned': Oracle(embed=learned_embed),
  'rope': Oracle(score=rope_score),
  'xpos': Oracle(score=xpos_score),
  'alibi': Oracle(bias=alibi_bias),
  't5': Oracle(bias=t5_bias),
  'fire': Oracle(bias=fire_bias),
  'fire_s': Oracle(bias=fire_bias),
}


# What the encodings enter


def embedded(name, params, x_BLD, position_BL, **options):
  """Tokens plus the encoding's vectors at their positions."""
  oracle, out_BLD = ORACLES[name], np.array(x_BLD, np.float64)
  if oracle.embed is None:
    return out_BLD
  for b, positions in enumerate(np.broadcast_to(position_BL, out_BLD.shape[:2])):
    for row, n in enumerate(positions):
      out_BLD[b, row] += oracle.embed(params, int(n), out_BLD.shape[2], **options)
  return out_BLD


def logits(
  name, params, query_BQHC, key_BKGC, query_position_BQ, key_position_BK, only_BQK=None, **options
):
  """logits_BHQK of unrotated queries and keys: score / sqrt(C) + bias, before any mask.

  Query head h reads key head h // (H / G). Pairs outside `only_BQK` are left at 0, uncomputed.
  """
  oracle = ORACLES[name]
  query_BQHC, key_BKGC = np.asarray(query_BQHC, np.float64), np.asarray(key_BKGC, np.float64)
  (batch, num_queries, num_heads, width), num_keys = query_BQHC.shape, key_BKGC.shape[1]
  group = num_heads // key_BKGC.shape[2]
  key_BKHC = np.stack([key_BKGC[:, :, h // group] for h in range(num_heads)], axis=2)
  out_BHQK = np.zeros((batch, num_heads, num_queries, num_keys))
  for b in range(batch):
    for q in range(num_queries):
      for k in range(num_keys):
        if only_BQK is not None and not only_BQK[b, q, k]:
          continue
        query_HC, key_HC = query_BQHC[b, q], key_BKHC[b, k]
        i, j = int(query_position_BQ[b, q]), int(key_position_BK[b, k])
        if oracle.score is None:
          out_BHQK[b, :, q, k] = (query_HC * key_HC).sum(axis=-1) / np.sqrt(width)
        else:
          out_BHQK[b, :, q, k] = oracle.score(query_HC, key_HC, i, j, **options) / np.sqrt(width)
        if oracle.bias is not None:
          out_BHQK[b, :, q, k] += oracle.bias(params, i, j, num_heads, **options)
  return out_BHQK


def visible(i, j, causal=True, block=None, window=None):
  """Whether a query at i may see a key at j, as `Mask` says it in words."""
  if causal and j > i:
    return False
  if block is not None and i // block not in (j // block, j // block + 1):
    return False
  return window is None or i - j < window


def visible_pairs(
  query_position_BQ, key_position_BK, query_segment_BQ=None, key_segment_BK=None, **mask
):
  """visible_BQK of a mask's fields within one segment."""
  batch = len(query_position_BQ)
  out_BQK = np.zeros((batch, query_position_BQ.shape[1], key_position_BK.shape[1]), bool)
  for b, q, k in np.ndindex(out_BQK.shape):
    together = query_segment_BQ is None or query_segment_BQ[b, q] == key_segment_BK[b, k]
    i, j = int(query_position_BQ[b, q]), int(key_position_BK[b, k])
    out_BQK[b, q, k] = together and visible(i, j, **mask)
  return out_BQK


def attention(logits_BHQK, visible_BQK, value_BKGC):
  """out_BQHC: for each row, head and query the softmax over its visible keys; zeros without one."""
  batch, num_heads, num_queries, _ = logits_BHQK.shape
  group = num_heads // value_BKGC.shape[2]
  out_BQHC = np.zeros((batch, num_queries, num_heads, value_BKGC.shape[3]))
  for b in range(batch):
    for h in range(num_heads):
      for q in range(num_queries):
        seen_K = visible_BQK[b, q]
        if seen_K.any():
          weight_K = np.exp(logits_BHQK[b, h, q, seen_K] - logits_BHQK[b, h, q, seen_K].max())
          out_BQHC[b, q, h] = weight_K / weight_K.sum() @ value_BKGC[b, seen_K, h // group]
  return out_BQHC


def slope(function, tree, direction, step=1e-6):
  """Central difference of function(tree) along `direction`, both {name: array} in float64."""

  def moved(sign):
    return {name: tree[name] + sign * step * direction[name] for name in tree}

  return (function(moved(1.0)) - function(moved(-1.0))) / (2 * step)
