"""Tests `../lex_fire/analysis.py`: every number against loops over pairs of positions."""

import dataclasses
import functools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from lex_fire import analysis, encodings, errors, kernels, model
from lex_fire import config as config_lib

C = config_lib.ModelConfig(
  num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=16, vocab_size=31
)
DISTANCES = np.array([0, 1, 2, 7, 100, 511, 600])
QUERY = 600
LENGTH = 11
WEIGHTS = ('query_DHC', 'key_DGC', 'value_DGC', 'out_HCD')

ROTATED = [name for name in encodings.ENCODINGS if encodings.get(name).rotate is not None]
EMBEDDED = [name for name in encodings.ENCODINGS if encodings.get(name).embed is not None]
BIASED = [name for name in encodings.ENCODINGS if encodings.get(name).bias is not None]


def make(name):
  """Returns an encoding, its parameters, and these for an oracle."""
  encoding = encodings.get(name)
  sizes = {'num_heads': C.num_heads, 'head_dim': C.head_dim, 'd_model': C.d_model}
  params = encoding.init(jax.random.key(1), **sizes)
  return encoding, params, {key: np.float64(value) for key, value in params.items()}


def resolution_by_hand(scores):
  """Equation 3 as a loop, without any care for overflow."""
  total = sum(math.exp(score) for score in scores)
  pairs = zip(scores[:-1], scores[1:], strict=True)
  return sum(math.exp(s) * (math.exp(s) - math.exp(after)) for s, after in pairs) / total**2


def test_resolution_is_equation_3():
  rng = np.random.default_rng(0)
  score_NHK = rng.normal(size=(2, 3, 9))

  resolution_NH = analysis.resolution(score_NHK)

  for layer, head in np.ndindex(2, 3):
    expected = resolution_by_hand(score_NHK[layer, head].tolist())
    assert resolution_NH[layer, head] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
  ('scores', 'expected'),
  [
    ([3.0], 0.0),
    ([5.0] * 7, 0.0),
    ([0.0, -1000.0, -1000.0], 1.0),
    ([-1000.0, -1000.0, 0.0], 0.0),
    ([0.0, math.log(3.0)], -1 / 8),  # the least that two can have
  ],
)
def test_resolution_of_scores_whose_weights_are_known(scores, expected):
  assert analysis.resolution(np.array(scores)) == pytest.approx(expected, abs=1e-12)


def test_resolution_ignores_a_constant_however_large():
  score_K = np.random.default_rng(1).normal(size=20)

  moved = analysis.resolution(np.stack([score_K + 1e4, score_K - 1e4]))

  np.testing.assert_allclose(moved, analysis.resolution(score_K), rtol=1e-9)


def test_resolution_has_the_bounds_that_its_docstring_says():
  """So the paper's own 1.08 is in another unit."""
  rng = np.random.default_rng(2)
  score_ZK = rng.normal(size=(2000, 6)) * rng.uniform(0, 30, size=(2000, 1))

  resolution_Z = analysis.resolution(score_ZK)

  assert -1 / 8 <= resolution_Z.min() < 0
  assert 0.99 < resolution_Z.max() <= 1


def test_resolution_of_alibi_is_a_geometric_series():
  """Weights (1 - r) r^n, r = e^-slope, give (1 - r)^2 / (1 + r) at any length that has them all."""
  encoding, params, _ = make('alibi')
  bias_HK = analysis.bias(encoding, params, np.arange(9000), num_heads=4, query_position=8999)

  ratio_H = np.exp(-np.array(oracles.alibi_slopes(4)))
  np.testing.assert_allclose(
    analysis.resolution(bias_HK), (1 - ratio_H) ** 2 / (1 + ratio_H), rtol=1e-5
  )


@pytest.mark.parametrize('name', ['rope', 'xpos', 'sinusoidal'])
def test_expectation_is_equation_8(name):
  encoding, params, _ = make(name)

  expectation_K = analysis.expectation(encoding, params, DISTANCES, width=64, query_position=QUERY)

  for distance, value in zip(DISTANCES.tolist(), expectation_K, strict=True):
    expected = 0.0
    for m in range(32):
      zeta = (m / 32 + 0.4) / 1.4 if name == 'xpos' else 1.0
      expected += math.cos(distance * 10_000 ** (-m / 32)) * zeta ** (distance / 512)
    assert value == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize('name', ROTATED)
def test_expectation_is_half_of_what_ones_score(name):
  encoding, params, _ = make(name)
  expectation_K = analysis.expectation(encoding, params, DISTANCES, width=8, query_position=QUERY)

  oracle, ones_HC = oracles.ORACLES[name], np.ones((1, 8))
  row = {'length': QUERY + 1} if oracle.knows_length else {}
  for distance, value in zip(DISTANCES.tolist(), expectation_K, strict=True):
    (score,) = oracle.score(ones_HC, ones_HC, QUERY, QUERY - distance, **row)
    assert value == pytest.approx(score / 2, abs=1e-5)


@pytest.mark.parametrize('name', EMBEDDED)
def test_expectation_is_the_dot_product_of_embeddings(name):
  encoding, params, oracle_params = make(name)
  expectation_K = analysis.expectation(encoding, params, DISTANCES, width=16, query_position=QUERY)

  vectors = [
    oracles.ORACLES[name].embed(oracle_params, n, 16) for n in (QUERY, *(QUERY - DISTANCES))
  ]
  np.testing.assert_allclose(expectation_K, np.stack(vectors[1:]) @ vectors[0], atol=1e-5)


@pytest.mark.parametrize('name', BIASED)
def test_bias_is_that_of_the_oracle(name):
  encoding, params, oracle_params = make(name)

  bias_HK = analysis.bias(encoding, params, DISTANCES, num_heads=4, query_position=QUERY)

  oracle = oracles.ORACLES[name].bias
  expected = [oracle(oracle_params, QUERY, QUERY - distance, 4) for distance in DISTANCES.tolist()]
  np.testing.assert_allclose(bias_HK, np.stack(expected, axis=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', encodings.ENCODINGS)
def test_scores_are_the_logits_of_heads_of_ones(name):
  """For embeddings of sinusoids: their dot products, scaled as a rotation would give them."""
  encoding, params, oracle_params = make(name)

  score_HK = analysis.scores(encoding, params, DISTANCES, config=C, query_position=QUERY)

  if name in EMBEDDED:
    expectation_K = analysis.expectation(
      encoding, params, DISTANCES, width=C.d_model, query_position=QUERY
    )
    expected_HK = np.tile(expectation_K * C.head_dim**0.5 / (C.d_model / 2), (C.num_heads, 1))
  else:
    position_BK = (QUERY - DISTANCES)[None]
    ones_BKHC = np.ones((1, len(DISTANCES), C.num_heads, C.head_dim))
    where = np.array([[QUERY]]), position_BK
    heads = ones_BKHC[:, :1], ones_BKHC
    expected_HK = oracles.logits(name, oracle_params, *heads, *where)[0, :, 0]
  np.testing.assert_allclose(
    score_HK - score_HK[:, :1], expected_HK - expected_HK[:, :1], rtol=1e-5, atol=1e-5
  )


def by_hand(name, transformer, params, tokens_WL):
  """Returns the Statistics of a model by loops in float64, from what its attentions are given.

  Its own output shows that what is looped over is what it attends with.
  """
  c, mask = transformer.config, transformer.mask
  run = functools.partial(
    transformer.apply,
    mutable=['intermediates'],
    capture_intermediates=lambda module, _: module.name in ('attention_norm', 'attention'),
  )
  _, variables = jax.jit(run)({'params': params}, tokens_WL)
  count, length = tokens_WL.shape
  position_BL = np.tile(np.arange(length), (count, 1))
  visible_BQK = oracles.visible_pairs(position_BL, position_BL, **dataclasses.asdict(mask))
  seen = {}  # (layer, head): lists of (distance, logit), entropies and attended distances
  for layer in range(c.num_layers):
    block, layer_params = (
      jax.tree.map(operator.itemgetter(layer), tree['blocks'])
      if c.scan_layers
      else tree[f'block_{layer}']
      for tree in (variables['intermediates'], params)
    )
    weights = {key: np.float64(layer_params['attention'][key]) for key in WEIGHTS}
    encoded = params if transformer.encoding.shared else layer_params['attention']
    encoded = {key: np.float64(x) for key, x in encoded.get('encoding', {}).items()}
    x_BLD = np.float64(block['attention_norm']['__call__'][0])
    query_BLHC, key_BLGC, value_BLGC = (
      np.einsum('BLD,DHC->BLHC', x_BLD, weights[key]) for key in WEIGHTS[:3]
    )
    logits_BHQK = oracles.logits(
      name, encoded, query_BLHC, key_BLGC, position_BL, position_BL, visible_BQK
    )
    out_BQHC = oracles.attention(logits_BHQK, visible_BQK, value_BLGC)
    out_BLD = np.einsum('BLHC,HCD->BLD', out_BQHC, weights['out_HCD'])
    np.testing.assert_allclose(block['attention']['__call__'][0], out_BLD, atol=1e-5)
    for b, h, i in np.ndindex(count, c.num_heads, length):
      pairs, entropies, distances = seen.setdefault((layer, h), ([], [], []))
      keys = [j for j in range(length) if visible_BQK[b, i, j]]
      total = sum(math.exp(logits_BHQK[b, h, i, j]) for j in keys)
      weight = {j: math.exp(logits_BHQK[b, h, i, j]) / total for j in keys}
      pairs += [(i - j, logits_BHQK[b, h, i, j]) for j in keys]
      entropies.append(-sum(w * math.log(w) for w in weight.values()))
      distances.append(sum(w * (i - j) for j, w in weight.items()))
  heads = [[seen[layer, h] for h in range(c.num_heads)] for layer in range(c.num_layers)]
  far = max(distance for distance, _ in heads[0][0][0])
  return analysis.Statistics(
    np.array([[_mean_by_distance(pairs, far) for pairs, _, _ in row] for row in heads]),
    np.array([[np.mean(entropies) for _, entropies, _ in row] for row in heads]),
    np.array([[np.mean(distances) for _, _, distances in row] for row in heads]),
  )


def _mean_by_distance(pairs, far):
  return [np.mean([logit for d, logit in pairs if d == distance]) for distance in range(far + 1)]


def made(name, mask, **changes):
  """Returns a model whose heads are far from uniform, its parameters, and windows of tokens."""
  c = dataclasses.replace(C, **changes)
  transformer = model.Transformer(c, encodings.get(name), mask)
  params = jax.jit(transformer.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']
  params = jax.tree_util.tree_map_with_path(
    lambda path, x: 2 * x if path[-1].key in ('query_DHC', 'key_DGC') else x, params
  )
  tokens_WL = np.random.default_rng(0).integers(0, 31, (2, LENGTH)).astype(np.int32)
  return transformer, params, tokens_WL


MODELS = {
  'bias': ('fire', kernels.Mask(), {}),
  'bias of all layers, as a scan': ('fire_s', kernels.Mask(), {'scan_layers': True}),
  'bias of each layer, as a scan, blockwise': (
    'fire',
    kernels.Mask(block=3),
    {'scan_layers': True, 'remat': 'block'},
  ),
  'decay, in blocks': ('xpos', kernels.Mask(block=4), {}),
  'rotation by the row, in a window': ('dynamic_ntk', kernels.Mask(window=5), {}),
  'embedding': ('sinusoidal', kernels.Mask(), {}),
}


@pytest.mark.parametrize('case', MODELS)
def test_what_a_model_attends_to_is_what_loops_find(case, monkeypatch):
  name, mask, changes = MODELS[case]
  transformer, params, tokens_WL = made(name, mask, **changes)
  # Windows of 11 in chunks of 4 queries, the last of which overlaps the one before.
  monkeypatch.setattr(analysis, 'LOGITS_PER_CHUNK', 4 * C.num_heads * LENGTH)
  told = []

  found = analysis.measure(transformer, params, tokens_WL, told.append)

  expected = by_hand(name, transformer, params, tokens_WL)
  assert sum(told) == tokens_WL.size
  for field in analysis.Statistics._fields:
    values, by_loops = getattr(found, field), getattr(expected, field)
    np.testing.assert_allclose(values, by_loops, rtol=1e-4, atol=1e-5, err_msg=field)
  by_layer = [[resolution_by_hand(row.tolist()) for row in rows] for rows in expected.score_NHK]
  np.testing.assert_allclose(found.resolution_NH, by_layer, atol=1e-5)
  means = [resolution_by_hand(rows.mean(axis=0).tolist()) for rows in expected.score_NHK]
  np.testing.assert_allclose(found.resolution_of_mean_N, means, atol=1e-5)


def test_a_mask_that_hides_nothing_changes_nothing():
  transformer, params, tokens_WL = made('alibi', kernels.Mask())
  half = -(-LENGTH // 2)

  causal = analysis.measure(transformer, params, tokens_WL)
  blockwise = analysis.measure(transformer.clone(mask=kernels.Mask(block=half)), params, tokens_WL)

  for field, of_causal, of_blockwise in zip(causal._fields, causal, blockwise, strict=True):
    np.testing.assert_array_equal(of_causal, of_blockwise, err_msg=field)


def test_batches_and_devices_change_nothing(monkeypatch):
  transformer, params, tokens_WL = made('rope', kernels.Mask())
  whole = analysis.measure(transformer, params, np.tile(tokens_WL, (10, 1)))

  monkeypatch.setattr(analysis, 'TOKENS_PER_BATCH', 1)  # a row a device: three batches
  parts = analysis.measure(transformer, params, np.tile(tokens_WL, (10, 1)))

  for field, of_whole, of_parts in zip(whole._fields, whole, parts, strict=True):
    np.testing.assert_allclose(of_whole, of_parts, rtol=1e-5, atol=1e-6, err_msg=field)


def test_a_model_that_is_not_causal_is_refused():
  transformer, params, tokens_WL = made('alibi', None, causal=False)

  with pytest.raises(errors.UserError, match='model.causal=False: attention resolution'):
    analysis.measure(transformer, params, tokens_WL)


@pytest.mark.parametrize(('name', 'curve'), [('alibi', 'expectation'), ('rope', 'bias')])
def test_an_encoding_without_a_curve_is_refused(name, curve):
  encoding, params, _ = make(name)
  sizes = {'expectation': {'width': 8}, 'bias': {'num_heads': 4}}[curve]

  with pytest.raises(errors.UserError, match=f'encoding {name!r} (neither rotates|adds no bias)'):
    getattr(analysis, curve)(encoding, params, DISTANCES, query_position=QUERY, **sizes)


@pytest.mark.parametrize(
  ('query_position', 'distances', 'message'),
  [
    (-1, [0], 'distances 0 to 0 .* query_position=-1'),
    (5, [0, 6], 'distances 0 to 6 .* query_position=5'),
    (5, [-1, 2], 'distances -1 to 2 .* query_position=5'),
  ],
)
def test_positions_before_the_first_are_refused(query_position, distances, message):
  encoding, params, _ = make('alibi')

  with pytest.raises(errors.UserError, match=message):
    analysis.bias(encoding, params, np.array(distances), num_heads=4, query_position=query_position)


def test_positions_past_a_table_are_refused():
  encoding, params, _ = make('learned')

  with pytest.raises(errors.UserError, match='length=3001 is past the 2048 positions'):
    analysis.expectation(encoding, params, DISTANCES, width=16, query_position=3000)
