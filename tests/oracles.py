"""Position encodings and attention in float64 numpy, straight from the papers, to compare with.

Nothing here imports the library or jax. An oracle speaks of one query at position i and one key at
position j, in Python's exact integers; only heads and channels are arrays, named by their shape
(see `lex_fire.encodings.base`). `logits` and `attention` loop over rows, queries and keys; so does
`gradients`, which is derived by hand and checked against central differences of these two.

    ORACLES[name].embed(params, n, d_model, **options) -> vector_D added to the token at n
    ORACLES[name].score(query_HC, key_HC, i, j, **options) -> score_H, the rotated dot product;
      also given the row's `length`, its greatest position + 1, where `knows_length`
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
  'two parts': 6e-5,  # float32 as two numbers of bfloat16: likewise to 17 bits
  # Of a gradient's largest entry, or of 1. Sandwich's logits, up to 34, round 8 times as much.
  'float32 gradient': 1e-5,
  'bfloat16 gradient': 1e-2,  # a product of three that are rounded, 3 * 2^-8
  'wide bfloat16': 3e-2,  # of 256 channels
  'wide bfloat16 gradient': 1e-2,
  'wide bfloat16 sum': 6e-4,  # gradients of logits are larger, and so fewer pairs outweigh the rest
  'two parts gradient': 1e-4,  # 3 * 2^-17, of products over 256 channels: of 4 and more
  # Of a gradient that sums over all pairs: of the sum of their sizes, or of 1. For the most they
  # cancel, and their roundings average out.
  'float32 sum': 1e-6,
  'bfloat16 sum': 3e-4,
  'two parts sum': 3e-6,  # of a pair 2^-17, which is 8e-6
}


class Oracle(NamedTuple):
  """An encoding by its paper; None where it does nothing."""

  embed: Callable[..., np.ndarray] | None = None
  score: Callable[..., np.ndarray] | None = None
  bias: Callable[..., np.ndarray] | None = None
  knows_length: bool = False


# Absolute positions, added to the tokens


def sinusoidal_embed(params, n, d_model, base_period=10_000.0):
  """Vaswani et al. 2017, section 3.5: PE(n, 2m) = sin(n / 10000^(2m/D)), and 2m + 1 cos."""
  vector = []
  for channel in range(d_model):
    angle = n / base_period ** (2 * (channel // 2) / d_model)
    vector.append(np.cos(angle) if channel % 2 else np.sin(angle))
  return np.array(vector)


def learned_embed(params, n, d_model, max_length=2048, clamp=False):
  """BERT's table; a position past it has no vector, or if clamped the last one."""
  if n >= max_length and not clamp:
    return np.full(d_model, np.nan)
  return params['table_ZD'][n if n < max_length else max_length - 1]


# The rotary family: pairs of channels as complex numbers, where only i - j enters


def complex_pairs(vector_HC, pairing):
  """Channels 2m and 2m + 1 (interleaved, the papers) or m and m + C/2 (halves) as one number."""
  half = vector_HC.shape[-1] // 2
  if pairing == 'interleaved':
    return vector_HC[..., 0::2] + 1j * vector_HC[..., 1::2]
  return vector_HC[..., :half] + 1j * vector_HC[..., half:]


def rope_theta(width, base_period):
  """theta_m = b^(-2m/C) [radians per token]."""
  return np.array([base_period ** (-2 * m / width) for m in range(width // 2)])


def turned_score(query_HC, key_HC, distance, theta_R, pairing):
  """Su et al. 2021, equation 16: Re sum_m q_m conj(k_m) e^(I (i - j) theta_m)."""
  query_HR, key_HR = complex_pairs(query_HC, pairing), complex_pairs(key_HC, pairing)
  return (query_HR * key_HR.conj() * np.exp(1j * distance * theta_R)).sum(axis=-1).real


def rope_score(query_HC, key_HC, i, j, base_period=10_000.0, pairing='halves'):
  """Su et al. 2021."""
  theta_R = rope_theta(query_HC.shape[-1], base_period)
  return turned_score(query_HC, key_HC, i - j, theta_R, pairing)


def rope_pi_score(query_HC, key_HC, i, j, scale=4.0, base_period=10_000.0, pairing='halves'):
  """Chen et al. 2023, equation 4: RoPE at the positions n L / L'."""
  theta_R = rope_theta(query_HC.shape[-1], base_period)
  return turned_score(query_HC, key_HC, i / scale - j / scale, theta_R, pairing)


def ntk_score(query_HC, key_HC, i, j, scale=4.0, base_period=10_000.0, pairing='halves'):
  """Peng et al. 2023, section 3.1: RoPE with the base b s^(C / (C - 2))."""
  width = query_HC.shape[-1]
  theta_R = rope_theta(width, base_period * scale ** (width / (width - 2)))
  return turned_score(query_HC, key_HC, i - j, theta_R, pairing)


def dynamic_ntk_score(
  query_HC, key_HC, i, j, length, train_length=2048, base_period=10_000.0, pairing='halves'
):
  """Peng et al. 2023, section 3.3: `ntk_score` with s = max(1, length / L).

  Rounded up to s = 2^(level / 8), found by comparing the eighth powers, which are whole.
  """
  level = 0
  while length**8 > train_length**8 * 2**level:
    level += 1
  return ntk_score(query_HC, key_HC, i, j, 2 ** (level / 8), base_period, pairing)


def yarn_ramp(theta, train_length, beta_fast, beta_slow):
  """Peng et al. 2023, section 3.2: gamma(r), r = L / lambda, lambda = 2 pi / theta_m."""
  ratio = train_length / (2 * np.pi / theta)
  if ratio < beta_slow:
    return 0.0
  if ratio > beta_fast:
    return 1.0
  return (ratio - beta_slow) / (beta_fast - beta_slow)


def yarn_code_ramp(m, width, base_period, train_length, beta_fast, beta_slow):
  """The published program's weight of theta_m against theta_m / s, by the index of the pair.

  jquesnelle/yarn, scaled_rope/LlamaYaRNScaledRotaryEmbedding.py: from 1 at the pair that turns
  beta_fast times in L tokens, rounded down, to 0 at the one that turns beta_slow times, rounded up.
  """

  def index(turns):
    # L theta_m / 2 pi = turns, solved for m
    return -width / 2 * np.log(2 * np.pi * turns / train_length) / np.log(base_period)

  first = max(int(np.floor(index(beta_fast))), 0)
  last = min(int(np.ceil(index(beta_slow))), width - 1)
  if first == last:
    last += 0.001
  return 1.0 - min(max((m - first) / (last - first), 0.0), 1.0)


def yarn_score(
  query_HC,
  key_HC,
  i,
  j,
  scale=4.0,
  train_length=2048,
  beta_fast=32.0,
  beta_slow=1.0,
  ramp='paper',
  base_period=10_000.0,
  pairing='halves',
):
  """Peng et al. 2023, section 3.4: h(theta_m) of section 3.2 at whole positions, over t in logits.

  Frequencies are divided or positions are, not both.
  """
  width, theta_R = query_HC.shape[-1], []
  for m, theta in enumerate(rope_theta(width, base_period)):
    if ramp == 'paper':
      gamma = yarn_ramp(theta, train_length, beta_fast, beta_slow)
    else:
      gamma = yarn_code_ramp(m, width, base_period, train_length, beta_fast, beta_slow)
    theta_R.append((1 - gamma) * theta / scale + gamma * theta)
  temperature = 1 / (0.1 * np.log(scale) + 1) ** 2
  return turned_score(query_HC, key_HC, i - j, np.array(theta_R), pairing) / temperature


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


def kerple_log_bias(params, i, j, num_heads):
  """Chi et al. 2022: -r1 log(1 + r2 |i - j|)."""
  return -params['r1_H'] * np.log(1 + params['r2_H'] * abs(i - j))


def kerple_power_bias(params, i, j, num_heads):
  """Chi et al. 2022: -r1 |i - j|^r2."""
  return -params['r1_H'] * float(abs(i - j)) ** params['r2_H']


def sandwich_bias(params, i, j, num_heads, num_terms=64, d_bar=128, compression=8.0):
  """Chi et al. 2023: the sum of cosines, divided by 8 n / H in the n-th of H heads."""
  total = sum(np.cos((i - j) / 10_000 ** (2 * k / d_bar)) for k in range(1, num_terms + 1))
  return np.array([total / (compression * n / num_heads) for n in range(1, num_heads + 1)])


def t5_bucket(distance, num_buckets=32, max_distance=128, bidirectional=False):
  """Raffel et al. 2020, the published `_relative_position_bucket`, where keys after count up."""
  relative_position = -distance
  first = 0
  if bidirectional:
    num_buckets //= 2
    if relative_position > 0:
      first = num_buckets
    n = abs(relative_position)
  else:
    n = max(-relative_position, 0)
  max_exact = num_buckets // 2
  if n < max_exact:
    return first + n
  large = np.log(n / max_exact) / np.log(max_distance / max_exact) * (num_buckets - max_exact)
  return first + min(max_exact + int(large), num_buckets - 1)


def t5_bias(params, i, j, num_heads, **options):
  """One learned number a bucket and a head."""
  return params['bias_ZH'][t5_bucket(i - j, **options)]


def fire_psi(params, x, psi, exponent):
  """Li et al. 2023, section 3: psi(x) = log(c x + 1); the ablations'; the theorem's power."""
  if psi == 'log':
    return np.log(abs(params['c']) * x + 1)
  return {'sqrt': np.sqrt(x), 'identity': x, 'power': float(x) ** exponent}[psi]


def fire_input(params, i, j, psi='log', threshold=512.0, exponent=1.0, **_):
  """Li et al. 2023, section 3: psi(|i - j|) / psi(max(L, i, j)); without a threshold L is 0."""
  length = abs(params['length_multiplier']) * threshold if threshold else 0
  norm = fire_psi(params, max(length, i, j), psi, exponent) + 1e-6
  return fire_psi(params, abs(i - j), psi, exponent) / norm


def fire_hidden(params, x, hidden_layers=1, **_):
  """The hidden layers of f before their ReLU: a list, first layer first."""
  before = [x * params['w_in_W'] + params['b_in_W']]
  for n in range(hidden_layers - 1):
    last = np.maximum(before[-1], 0)
    before.append(last @ params['w_hidden_NWX'][n] + params['b_hidden_NX'][n])
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
  'rope_pi': Oracle(score=rope_pi_score),
  'ntk': Oracle(score=ntk_score),
  'dynamic_ntk': Oracle(score=dynamic_ntk_score, knows_length=True),
  'yarn': Oracle(score=yarn_score),
  'xpos': Oracle(score=xpos_score),
  'alibi': Oracle(bias=alibi_bias),
  'kerple_log': Oracle(bias=kerple_log_bias),
  'kerple_power': Oracle(bias=kerple_power_bias),
  'sandwich': Oracle(bias=sandwich_bias),
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


def biases(name, params, num_heads, query_position_BQ, key_position_BK, only_BQK=None, **options):
  """bias_BHQK; 0 without one, and for pairs outside `only_BQK`."""
  oracle = ORACLES[name]
  shape = (len(query_position_BQ), query_position_BQ.shape[1], key_position_BK.shape[1])
  out_BQKH, known = np.zeros((*shape, num_heads)), {}
  for b, q, k in np.argwhere(np.ones(shape, bool) if only_BQK is None else only_BQK):
    i, j = int(query_position_BQ[b, q]), int(key_position_BK[b, k])
    if oracle.bias is not None and (i, j) not in known:
      known[i, j] = oracle.bias(params, i, j, num_heads, **options)
    out_BQKH[b, q, k] = known.get((i, j), 0.0)
  return np.moveaxis(out_BQKH, 3, 1)


def forms(name, channels, query_position_BQ, key_position_BK, only_BQK=None, **options):
  """form_BQKCX, of which a score is sum_cx query_c form_cx key_x; None if that is a dot product.

  Every score is linear in the query and in the key, so that those of unit vectors are all of it.
  Pairs outside `only_BQK` are left at 0.
  """
  oracle, unit_CC = ORACLES[name], np.eye(channels)
  if oracle.score is None:
    return None
  shape = (len(query_position_BQ), query_position_BQ.shape[1], key_position_BK.shape[1])
  out_BQKCX = np.zeros((*shape, channels, channels))
  for b, q, k in np.argwhere(np.ones(shape, bool) if only_BQK is None else only_BQK):
    length = int(max(*query_position_BQ[b], *key_position_BK[b])) + 1
    row = {'length': length} if oracle.knows_length else {}
    where = int(query_position_BQ[b, q]), int(key_position_BK[b, k])
    out_BQKCX[b, q, k] = oracle.score(unit_CC[:, None], unit_CC[None], *where, **row, **options)
  return out_BQKCX


def logits(
  name, params, query_BQHC, key_BKGC, query_position_BQ, key_position_BK, only_BQK=None, **options
):
  """logits_BHQK of unrotated queries and keys: score / sqrt(C) + bias, before any mask.

  Query head h reads key head h // (H / G). Pairs outside `only_BQK` are left at 0, uncomputed.
  """
  oracle = ORACLES[name]
  query_BQHC, key_BKGC = np.asarray(query_BQHC, np.float64), np.asarray(key_BKGC, np.float64)
  (batch, num_queries, num_heads, width), num_keys = query_BQHC.shape, key_BKGC.shape[1]
  key_BKHC = of_heads(key_BKGC, num_heads)
  positions = query_position_BQ, key_position_BK
  out_BHQK = biases(name, params, num_heads, *positions, only_BQK, **options)
  for b in range(batch):
    length = int(max(*query_position_BQ[b], *key_position_BK[b])) + 1
    row = {'length': length} if oracle.knows_length else {}
    for q in range(num_queries):
      for k in range(num_keys):
        if only_BQK is not None and not only_BQK[b, q, k]:
          continue
        query_HC, key_HC = query_BQHC[b, q], key_BKHC[b, k]
        i, j = int(query_position_BQ[b, q]), int(key_position_BK[b, k])
        if oracle.score is None:
          out_BHQK[b, :, q, k] += (query_HC * key_HC).sum(axis=-1) / np.sqrt(width)
        else:
          score_H = oracle.score(query_HC, key_HC, i, j, **row, **options)
          out_BHQK[b, :, q, k] += score_H / np.sqrt(width)
  return out_BHQK


def of_heads(x_BKGC, num_heads):
  """x_BKHC: what each head of the queries reads."""
  group = num_heads // x_BKGC.shape[2]
  return np.stack([np.float64(x_BKGC[:, :, h // group]) for h in range(num_heads)], axis=2)


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


def softmax(logit_K):
  """weight_K, which add up to 1."""
  weight_K = np.exp(logit_K - logit_K.max())
  return weight_K / weight_K.sum()


def attention(logits_BHQK, visible_BQK, value_BKGC):
  """out_BQHC: for each row, head and query the softmax over its visible keys; zeros without one."""
  batch, num_heads, num_queries, _ = logits_BHQK.shape
  value_BKHC = of_heads(value_BKGC, num_heads)
  out_BQHC = np.zeros((batch, num_queries, num_heads, value_BKGC.shape[3]))
  for b, h, q in np.ndindex(batch, num_heads, num_queries):
    seen_K = visible_BQK[b, q]
    if seen_K.any():
      out_BQHC[b, q, h] = softmax(logits_BHQK[b, h, q, seen_K]) @ value_BKHC[b, seen_K, h]
  return out_BQHC


# Gradients


class Gradients(NamedTuple):
  """Those of sum(out * d_out), by what attention takes and by its logits."""

  query_BQHC: np.ndarray
  key_BKGC: np.ndarray
  value_BKGC: np.ndarray
  logits_BHQK: np.ndarray


def gradients(
  logits_BHQK, visible_BQK, query_BQHC, key_BKGC, value_BKGC, d_out_BQHC, form_BQKCX=None
):
  """Gradients of sum(out * d_out) for the out_BQHC of `attention` and the logits of `logits`.

  Of one query with weights p = softmax(s) over the keys that it sees, out = sum_k p_k value_k:

      d value_k = p_k d_out,   d p_k = d_out . value_k,
      d s_k = sum_l d p_l (dp_l / ds_k) = p_k (d p_k - sum_l p_l d p_l),

  since dp_l / ds_k = p_l ([k = l] - p_k). A key that is hidden has p = 0 and no gradient. By the
  `forms`, s = query^T form key / sqrt(C) + bias, and so

      d query = sum_k d s_k form_k key_k / sqrt(C),   d key = sum_q d s_q query_q form_q / sqrt(C),

  the latter, as d value, summed over the heads that read the key. d s is the gradient of the bias.
  """
  query_BQHC = np.float64(query_BQHC)
  num_heads, width = query_BQHC.shape[2:]
  key_BKHC, value_BKHC = of_heads(key_BKGC, num_heads), of_heads(value_BKGC, num_heads)
  d_logits_BHQK, d_value_BKHC = np.zeros_like(logits_BHQK), np.zeros_like(value_BKHC)
  for b, h, q in np.ndindex(d_logits_BHQK.shape[:3]):
    seen_K = visible_BQK[b, q]
    if seen_K.any():
      weight_K = softmax(logits_BHQK[b, h, q, seen_K])
      d_weight_K = value_BKHC[b, seen_K, h] @ d_out_BQHC[b, q, h]
      d_logits_BHQK[b, h, q, seen_K] = weight_K * (d_weight_K - weight_K @ d_weight_K)
      d_value_BKHC[b, seen_K, h] += np.outer(weight_K, d_out_BQHC[b, q, h])
  if form_BQKCX is None:
    d_query_BQHC = np.einsum('BHQK,BKHC->BQHC', d_logits_BHQK, key_BKHC)
    d_key_BKHC = np.einsum('BHQK,BQHC->BKHC', d_logits_BHQK, query_BQHC)
  else:
    d_query_BQHC = np.einsum('BHQK,BQKCX,BKHX->BQHC', d_logits_BHQK, form_BQKCX, key_BKHC)
    d_key_BKHC = np.einsum('BHQK,BQHC,BQKCX->BKHX', d_logits_BHQK, query_BQHC, form_BQKCX)

  def of_groups(x_BKHC):
    return x_BKHC.reshape(*key_BKGC.shape[:3], -1, width).sum(axis=3)

  return Gradients(
    d_query_BQHC / np.sqrt(width),
    of_groups(d_key_BKHC) / np.sqrt(width),
    of_groups(d_value_BKHC),
    d_logits_BHQK,
  )


def slope(function, tree, direction, step=1e-6):
  """Central difference of function(tree) along `direction`, both {name: array} in float64."""

  def moved(sign):
    return {name: tree[name] + sign * step * direction[name] for name in tree}

  return (function(moved(1.0)) - function(moved(-1.0))) / (2 * step)


class Pairs(NamedTuple):
  """What each pair of a query and a key has, whatever mask shows it.

  Attributes:
    logits_BHQK: see `logits`.
    form_BQKCX: see `forms`.
    slopes: {leaf: (direction, slope_BHQK)}, how the bias changes along a random direction of each
      parameter, a central difference. By it the gradient of sum(out * d_out) along that direction
      is the sum of slope times the gradient of the logits.
  """

  logits_BHQK: np.ndarray
  form_BQKCX: np.ndarray | None
  slopes: dict[str, tuple[np.ndarray, np.ndarray]]


def pairs(name, params, arrays, query_position_BQ, key_position_BK, only_BQK=None, **options):
  """Returns the Pairs of (query, key, value); those outside `only_BQK` are left at 0."""
  query_BQHC, key_BKGC, _ = arrays
  params = {leaf: np.float64(value) for leaf, value in params.items()}
  where = query_position_BQ, key_position_BK, only_BQK
  rng, slopes = np.random.default_rng(5), {}
  for leaf in params if ORACLES[name].bias else ():
    direction = {other: np.zeros_like(value) for other, value in params.items()}
    direction[leaf] = rng.normal(size=params[leaf].shape)

    def bias_BHQK(tree):
      return biases(name, tree, query_BQHC.shape[2], *where, **options)

    # A step so short that hardly a pair has a unit of a network change sides on the way.
    slopes[leaf] = direction[leaf], slope(bias_BHQK, params, direction, step=1e-8)
  return Pairs(
    logits(name, params, query_BQHC, key_BKGC, *where, **options),
    forms(name, query_BQHC.shape[3], *where, **options),
    slopes,
  )


def assert_gradients(found, of_pairs, visible_BQK, arrays, d_out_BQHC, dtype='float32'):
  """Holds gradients of params, and of (query, key, value), as `jax.grad` has them, to the oracle.

  Args:
    found: these two.
    of_pairs: from `pairs`.
    visible_BQK: which of the pairs are seen.
    arrays: query, key and value.
    d_out_BQHC: of the functional sum(out * d_out).
    dtype: of the arrays; TOLERANCE says how near.
  """
  of_params, of_arrays = found
  expected = gradients(of_pairs.logits_BHQK, visible_BQK, *arrays, d_out_BQHC, of_pairs.form_BQKCX)
  for name, one, other in zip(expected._fields, of_arrays, expected, strict=False):
    bound = TOLERANCE[f'{dtype} gradient'] * max(1.0, np.abs(other).max())
    np.testing.assert_allclose(np.float64(one), other, rtol=0, atol=bound, err_msg=name)
  for leaf, (direction, slope_BHQK) in of_pairs.slopes.items():
    terms_BHQK = slope_BHQK * expected.logits_BHQK
    error = (np.float64(of_params[leaf]) * direction).sum() - terms_BHQK.sum()
    relative = abs(error) / max(1.0, np.abs(terms_BHQK).sum())
    assert relative < TOLERANCE[f'{dtype} sum'], f'{leaf}: {relative:.2g}'
