"""Every attention implementation under every encoding, mask and layout, against the oracle."""

import functools
import inspect
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from lex_fire import encodings, errors, kernels
from lex_fire.encodings import base, piecewise
from lex_fire.kernels import chunked, decay, mosaic_tpu, mosaic_tpu_bias, mosaic_tpu_size, plan
from lex_fire.kernels import mask as mask_lib

BLOCK = 16
# The registry's implementations, with tiles small enough that a short row has several; kernels of
# another platform are interpreted.
OPTIONS = {'block': BLOCK, 'interpret': True}
IMPLEMENTATIONS = {
  name: functools.partial(
    function,
    **{
      key: value for key, value in OPTIONS.items() if key in inspect.signature(function).parameters
    },
  )
  for name, function in kernels.IMPLEMENTATIONS.items()
  if name not in ('mosaic_gpu', 'splash', 'cudnn')  # which have mosaic_gpu_test, library_test
}
MASKS = {
  'causal': {},
  'blockwise': {'block': 8},
  'window': {'window': 11},
  'bidirectional': {'causal': False},
}
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 8
LENGTH = 50  # three tiles and a ragged fourth

# One batch holds every layout: what a row is named after is what fails in it.
LAYOUTS = {
  'plain': (range(LENGTH), np.zeros(LENGTH)),
  'packed': ((*range(20), *range(17), *range(13)), np.repeat([1, 2, 3], [20, 17, 13])),
  'far': (range(32_768, 32_768 + LENGTH), np.zeros(LENGTH)),
  # Past FIRE's threshold, at which there is no one derivative, and past the last bucket of T5.
  'sparse': (range(9, 9 + 21 * LENGTH, 21), np.zeros(LENGTH)),
}
POSITION_BL = np.array([list(row) for row, _ in LAYOUTS.values()], np.int32)
SEGMENT_BL = np.array([row for _, row in LAYOUTS.values()], np.int32)


def seen_by_a_kernel(encoding):
  """What tells one encoding from another once tokens are embedded, comparable."""
  bias = encoding.bias
  if isinstance(bias, functools.partial):
    bias = (bias.func, tuple(sorted(bias.keywords.items())))
  return encoding.rotate is not None, encoding.log_decay, bias


def distinct_cases():
  """{'nope+sinusoidal+learned': ('nope', {}), ...}: all of ENCODINGS, and FIRE with two layers."""
  groups = {}
  for name in encodings.ENCODINGS:
    groups.setdefault(seen_by_a_kernel(encodings.get(name)), []).append(name)
  cases = {'+'.join(names): (names[0], {}) for names in groups.values()}
  return cases | {'fire 2 layers': ('fire', {'hidden_layers': 2})}


CASES = distinct_cases()
every_case = pytest.mark.parametrize('case', CASES)
every_implementation = pytest.mark.parametrize('implementation', IMPLEMENTATIONS)


def is_able(implementation, case):
  encoding = encodings.get(CASES[case][0])
  query = jax.ShapeDtypeStruct((1, LENGTH, NUM_HEADS, HEAD_DIM), jnp.float32)
  if implementation not in kernels.PLATFORM:
    return True
  return mosaic_tpu_size.why_not(encoding, query, query) is None


CELLS = [
  (implementation, mask, case)
  for implementation in IMPLEMENTATIONS
  for mask in MASKS
  for case in CASES
  if is_able(implementation, case)
]
TILED = sorted(set(IMPLEMENTATIONS) - {'reference'})
every_implementation_here = pytest.mark.parametrize(
  'implementation', [name for name in IMPLEMENTATIONS if name not in kernels.PLATFORM]
)
every_pair = pytest.mark.parametrize(
  ('implementation', 'case'),
  [
    (i, c)
    for i in IMPLEMENTATIONS
    for c in CASES
    if i not in kernels.PLATFORM or CASES[c] == ('fire', {})
  ],
)


def make(case, num_heads=NUM_HEADS, head_dim=HEAD_DIM, **more):
  name, options = CASES[case]
  encoding = encodings.get(name, **options, **more)
  params = encoding.init(
    jax.random.key(2), num_heads=num_heads, head_dim=head_dim, d_model=num_heads * head_dim
  )
  return encoding, params


def inputs(batch, num_queries, num_keys, seed=0, num_kv_heads=NUM_KV_HEADS):
  """Returns query_BQHC, key_BKGC, value_BKGC."""
  rng = np.random.default_rng(seed)
  shapes = (num_queries, NUM_HEADS), (num_keys, num_kv_heads), (num_keys, num_kv_heads)
  return [rng.normal(size=(batch, *shape, HEAD_DIM)).astype(np.float32) for shape in shapes]


def attend(
  implementation,
  encoding,
  params,
  arrays,
  query_position_BQ,
  key_position_BK=None,
  query_segment_BQ=None,
  key_segment_BK=None,
  mask=None,
):
  """Rotates, then attends; keys are where the queries are unless told."""
  query_BQHC, key_BKGC, value_BKGC = arrays
  if key_position_BK is None:
    key_position_BK, key_segment_BK = query_position_BQ, query_segment_BQ
  if encoding.rotate is not None:
    query_BQHC = encoding.rotate(params, query_BQHC, query_position_BQ)
    key_BKGC = encoding.rotate(params, key_BKGC, key_position_BK)
  return IMPLEMENTATIONS[implementation](
    query_BQHC,
    key_BKGC,
    value_BKGC,
    encoding=encoding._replace(rotate=None),  # which is done: no kernel rotates
    params=params,
    query_position_BQ=query_position_BQ,
    key_position_BK=key_position_BK,
    query_segment_BQ=query_segment_BQ,
    key_segment_BK=key_segment_BK,
    mask=kernels.Mask(**(mask or {})),
  )


def out_and_gradients(implementation, encoding, params, arrays, *where, **how):
  """Returns (out_BQHC, gradients of params and arrays) of a fixed random functional, jitted."""
  probe_BQHC = probe(arrays)

  def functional(params, arrays, where):
    out_BQHC = attend(implementation, encoding, params, arrays, *where, **how)
    return (out_BQHC.astype(jnp.float32) * probe_BQHC).sum(), out_BQHC

  gradient = jax.jit(jax.grad(functional, argnums=(0, 1), has_aux=True))
  gradients, out_BQHC = gradient(params, arrays, where)
  return out_BQHC, gradients


@functools.cache
def matrix_entry(implementation, case, mask):
  encoding, params = make(case)
  arrays = inputs(len(LAYOUTS), LENGTH, LENGTH)
  where = POSITION_BL, None, SEGMENT_BL
  return out_and_gradients(implementation, encoding, params, arrays, *where, mask=MASKS[mask])


def probe(arrays):
  """Returns the fixed random functional of `out_and_gradients`."""
  return np.random.default_rng(9).normal(size=arrays[0].shape).astype(np.float32)


def pairs(case, arrays, *where):
  """Returns the oracle's pairs of query, key and value at positions of each."""
  name, options = CASES[case]
  return oracles.pairs(name, make(case)[1], arrays, *where, **options)


@functools.cache
def matrix_pairs(case):
  together_BLL = SEGMENT_BL[:, :, None] == SEGMENT_BL[:, None]
  arrays = inputs(len(LAYOUTS), LENGTH, LENGTH)
  return pairs(case, arrays, POSITION_BL, POSITION_BL, together_BLL)


# The matrix


@pytest.mark.parametrize(('implementation', 'mask', 'case'), CELLS)
def test_attention_equals_the_oracle(implementation, mask, case):
  out_BQHC, _ = matrix_entry(implementation, case, mask)

  visible_BQK = oracles.visible_pairs(
    POSITION_BL, POSITION_BL, SEGMENT_BL, SEGMENT_BL, **MASKS[mask]
  )
  value_BKGC = inputs(len(LAYOUTS), LENGTH, LENGTH)[2]
  logits_BHQK = matrix_pairs(case).logits_BHQK
  expected_BQHC = oracles.attention(logits_BHQK, visible_BQK, value_BKGC)
  error_B = np.abs(out_BQHC - expected_BQHC).max(axis=(1, 2, 3))
  largest = max(4.0, logits_BHQK.max())  # up to 4 is what the tolerance is for; Sandwich has 34
  for layout, error in zip(LAYOUTS, error_B, strict=True):
    assert error < oracles.TOLERANCE['float32'] * largest / 4, layout


@pytest.mark.parametrize(('implementation', 'mask', 'case'), CELLS)
def test_gradients_equal_the_oracles(implementation, mask, case):
  _, found = matrix_entry(implementation, case, mask)

  visible_BQK = oracles.visible_pairs(
    POSITION_BL, POSITION_BL, SEGMENT_BL, SEGMENT_BL, **MASKS[mask]
  )
  arrays = inputs(len(LAYOUTS), LENGTH, LENGTH)
  oracles.assert_gradients(found, matrix_pairs(case), visible_BQK, arrays, probe(arrays))


@every_case
@pytest.mark.parametrize('mask', ['causal', 'bidirectional'])
def test_gradients_of_the_oracle_are_its_central_differences(mask, case):
  name, options = CASES[case]
  names, arrays = ('query', 'key', 'value'), [np.float64(x) for x in inputs(1, 7, 7, seed=4)]
  position_BL = np.int32([[0, 300, 511, 700, 1000, 0, 2]])
  segment_BL = np.int32([[0, 0, 0, 0, 0, 1, 1]])
  visible_BQK = oracles.visible_pairs(
    position_BL, position_BL, segment_BL, segment_BL, **MASKS[mask]
  )
  logits_BHQK, form_BQKCX, slopes = pairs(case, arrays, position_BL, position_BL, visible_BQK)

  found = oracles.gradients(logits_BHQK, visible_BQK, *arrays, probe(arrays), form_BQKCX)

  def total(tree):
    where = position_BL, position_BL, visible_BQK
    of_tree = oracles.logits(name, tree, tree['query'], tree['key'], *where, **options)
    out_BQHC = oracles.attention(of_tree + tree['more'], visible_BQK, tree['value'])
    return (out_BQHC * probe(arrays)).sum()

  tree = {leaf: np.float64(value) for leaf, value in make(case)[1].items()}
  tree |= dict(zip(names, arrays, strict=True)) | {'more': np.zeros_like(logits_BHQK)}
  rng = np.random.default_rng(5)
  of_leaves = dict(zip((*names, 'more'), found, strict=True))
  along = {
    leaf: (direction := rng.normal(size=gradient.shape), (gradient * direction).sum())
    for leaf, gradient in of_leaves.items()
  } | {
    leaf: (direction, (slope_BHQK * found.logits_BHQK).sum())
    for leaf, (direction, slope_BHQK) in slopes.items()
  }
  for leaf, (direction, slope) in along.items():
    only = {other: np.zeros_like(value) for other, value in tree.items()} | {leaf: direction}
    assert slope == pytest.approx(oracles.slope(total, tree, only), rel=1e-6, abs=1e-7), leaf


# Layouts that the matrix does not hold


@every_implementation
@pytest.mark.parametrize(('length', 'num_kv_heads'), [(48, 4), (37, 1), (9, 2)])
def test_rows_without_segments_equal_the_oracle(length, num_kv_heads, implementation):
  """48 fills its tiles, 37 does not, 9 is shorter than one; a leading 1 shares the positions."""
  encoding, params = make('fire 2 layers')
  arrays = inputs(2, length, length, num_kv_heads=num_kv_heads)
  position_1L = np.arange(length, dtype=np.int32)[None]
  position_BL = np.repeat(position_1L, 2, axis=0)

  out_BQHC, gradients = out_and_gradients(implementation, encoding, params, arrays, position_1L)

  visible_BQK = oracles.visible_pairs(position_BL, position_BL)
  of_pairs = pairs('fire 2 layers', arrays, position_BL, position_BL, visible_BQK)
  expected_BQHC = oracles.attention(of_pairs.logits_BHQK, visible_BQK, arrays[2])
  np.testing.assert_allclose(out_BQHC, expected_BQHC, atol=oracles.TOLERANCE['float32'])
  oracles.assert_gradients(gradients, of_pairs, visible_BQK, arrays, probe(arrays))


@pytest.mark.parametrize('sum_rows', [1, mosaic_tpu_size.SUBLANES])
def test_sums_of_a_table_in_one_row_or_in_a_register_equal_the_oracle(sum_rows, monkeypatch):
  """The TPU kernel has a row for each where tables are too large for more."""
  bytes_of_a_row = mosaic_tpu_size._sum_bytes(NUM_HEADS, 33)
  monkeypatch.setattr(mosaic_tpu_size, 'SUM_BYTES', 2 * sum_rows * bytes_of_a_row)
  encoding, params = make('fire+fire_s')
  arrays = inputs(2, 20, 20)
  position_BL = np.repeat(9 + 21 * np.arange(20, dtype=np.int32)[None], 2, axis=0)

  _, found = out_and_gradients('mosaic_tpu', encoding, params, arrays, position_BL)

  query, key, _ = (jax.ShapeDtypeStruct(x_BLHC.shape, x_BLHC.dtype) for x_BLHC in arrays)
  segments = mosaic_tpu_size.num_segments(encoding)
  assert mosaic_tpu_size.blocks(query, key, BLOCK, segments).sum_rows == sum_rows
  visible_BQK = oracles.visible_pairs(position_BL, position_BL)
  of_pairs = pairs('fire+fire_s', arrays, position_BL, position_BL, visible_BQK)
  oracles.assert_gradients(found, of_pairs, visible_BQK, arrays, probe(arrays))


# (encoding, options, positions of a row): T5's with more lines than a register has lanes, of which
# a few tiles reach some on both sides of a register's end.
MANY_LINES = {
  'fire 2 layers': ('fire', {'hidden_layers': 2}, range(700, 748)),
  'fire 2 layers, sparse': ('fire', {'hidden_layers': 2}, range(9, 1000, 21)),
  't5': ('t5', {'num_buckets': 400, 'max_distance': 500}, [*range(16), *range(128, 176)]),
}


@pytest.mark.parametrize('most_of_few', [1, mosaic_tpu_bias.MOST_OF_FEW, 2**15])
@pytest.mark.parametrize('case', MANY_LINES)
def test_lines_that_are_looked_up_and_lines_gone_through_equal_the_reference(
  case, most_of_few, monkeypatch
):
  """In the TPU kernel, which does either, by how many breakpoints a part of a tile has."""
  name, options, row = MANY_LINES[case]
  monkeypatch.setattr(mosaic_tpu_bias, 'MOST_OF_FEW', most_of_few)
  encoding = encodings.get(name, **options)
  params = encoding.init(
    jax.random.key(5), num_heads=NUM_HEADS, head_dim=HEAD_DIM, d_model=NUM_HEADS * HEAD_DIM
  )
  arrays = inputs(1, len(row), len(row))
  position_BL = np.int32([row])

  found = out_and_gradients('mosaic_tpu', encoding, params, arrays, position_BL)

  expected = out_and_gradients('reference', encoding, params, arrays, position_BL)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)


@pytest.mark.parametrize('case', ['fire', 't5', 'kerple_log'])
def test_tiles_of_whole_registers_equal_the_reference(case, monkeypatch):
  """In the TPU kernel, whose numbers of distances are turned within registers.

  FIRE's threshold is in the second of three blocks of queries, and its last is ragged.
  """
  lanes, length = mosaic_tpu_size.LANES, 300
  monkeypatch.setitem(
    IMPLEMENTATIONS,
    'mosaic_tpu',
    functools.partial(kernels.IMPLEMENTATIONS['mosaic_tpu'], block=lanes, interpret=True),
  )
  encoding = encodings.get(case, **({'threshold': 200.0} if case == 'fire' else {}))
  params = encoding.init(
    jax.random.key(5), num_heads=NUM_HEADS, head_dim=HEAD_DIM, d_model=NUM_HEADS * HEAD_DIM
  )
  arrays = inputs(1, length, length)
  position_BL = np.arange(length, dtype=np.int32)[None]

  found = out_and_gradients('mosaic_tpu', encoding, params, arrays, position_BL)

  expected = out_and_gradients('reference', encoding, params, arrays, position_BL)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=3e-5), found, expected)


def test_distances_that_no_pair_has_are_of_positions_that_there_are():
  """A band is laid out in whole registers; what it has too many is given no gradient."""
  encoding, params = make('kerple_log')

  def coordinate(numbers, i, j):
    is_one = (i >= 0) & (j >= 0)
    return jnp.where(is_one, encoding.coordinate(numbers, i, j), jnp.nan)

  poisoned = encoding._replace(coordinate=coordinate)
  position_BL = np.arange(40, dtype=np.int32)[None]

  found = out_and_gradients('mosaic_tpu', poisoned, params, inputs(1, 40, 40), position_BL)

  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize('length', [300, 512])  # of fewer registers of distances than 8, and of 8
@pytest.mark.parametrize('case', ['fire', 't5', 'kerple_log', 'sandwich', 'alibi'])
def test_the_tpu_kernel_is_made_for_a_tpu_without_one(case, length):
  """What the interpreter takes Mosaic may not; what is left for the compiler other tests try."""
  encoding = encodings.get(case)
  params = encoding.init(
    jax.random.key(5), num_heads=NUM_HEADS, head_dim=HEAD_DIM, d_model=NUM_HEADS * HEAD_DIM
  )
  position_1L = np.arange(length, dtype=np.int32)[None]

  def functional(params, arrays):
    return kernels.IMPLEMENTATIONS['mosaic_tpu'](
      *arrays,
      encoding=encoding,
      params=params,
      query_position_BQ=position_1L,
      key_position_BK=position_1L,
      query_segment_BQ=None,
      key_segment_BK=None,
      mask=kernels.Mask(),
    )[0].sum()

  gradients = jax.jit(jax.grad(functional, argnums=(0, 1)))
  traced = gradients.trace(params, inputs(1, length, length))

  assert 'tpu_custom_call' in traced.lower(lowering_platforms=('tpu',)).as_text()


IN_ORDER_CASES = [case for case in CASES if encodings.get(CASES[case][0]).table is not None]


IN_ORDER_CELLS = [
  (case, mask, most)
  for case in IN_ORDER_CASES
  for mask in ('causal', 'bidirectional')
  for most in ((0, 6, 32) if mosaic_tpu_size.has_band(make(case)[0]) else (0,))
]


@pytest.mark.parametrize(('case', 'mask', 'most_of_band'), IN_ORDER_CELLS)
def test_tiles_whose_positions_are_in_order_equal_the_oracle(case, mask, most_of_band, monkeypatch):
  """In which the TPU kernel computes what depends on the distance alone once a distance.

  A band has none, some or all of their blocks. Each head is a block of its own, which no layout of
  the matrix has, keys are in parts, and rows begin at positions of their own.
  """
  monkeypatch.setattr(mosaic_tpu_size, 'CHANNELS_TOGETHER', mosaic_tpu_size.LANES)
  monkeypatch.setattr(mosaic_tpu_size, 'CHANNELS_OF_BAND', mosaic_tpu_size.LANES)
  monkeypatch.setattr(mosaic_tpu_size, 'MOST_OF_BAND', most_of_band)
  encoding, params = make(case)
  arrays = inputs(2, 64, 64, num_kv_heads=NUM_HEADS)
  starts_B1 = np.int32([[490], [3]])  # on both sides of FIRE's threshold, and before it
  position_BL = starts_B1 + np.arange(64, dtype=np.int32)

  out_BQHC, gradients = out_and_gradients(
    'mosaic_tpu', encoding, params, arrays, position_BL, mask=MASKS[mask]
  )

  visible_BQK = oracles.visible_pairs(position_BL, position_BL, **MASKS[mask])
  of_pairs = pairs(case, arrays, position_BL, position_BL, visible_BQK)
  expected_BQHC = oracles.attention(of_pairs.logits_BHQK, visible_BQK, arrays[2])
  largest = max(4.0, of_pairs.logits_BHQK.max())
  tolerance = oracles.TOLERANCE['float32'] * largest / 4
  np.testing.assert_allclose(out_BQHC, expected_BQHC, atol=tolerance)
  oracles.assert_gradients(gradients, of_pairs, visible_BQK, arrays, probe(arrays))


# So that far tiles are one line; the threshold is among the positions of their queries.
FEW_BREAKPOINTS = {'width': 4, 'threshold': 88.0}


def of_far_tiles(name, options, dtype):
  """Returns what `out_and_gradients` takes, of a row of six tiles of queries by three of keys."""
  encoding, length = encodings.get(name, **options), 3 * 2 * BLOCK
  size = {'num_heads': NUM_HEADS, 'head_dim': HEAD_DIM, 'd_model': NUM_HEADS * HEAD_DIM}
  arrays = [x_BLHC.astype(dtype) for x_BLHC in inputs(1, length, length)]
  position_BL = 9 + np.arange(length, dtype=np.int32)[None]
  return encoding, encoding.init(jax.random.key(4), **size), arrays, position_BL


def planned_far(encoding, params, arrays, position_BL, mask):
  """Returns which tiles are far."""
  blocks, mask = (BLOCK, 2 * BLOCK), kernels.Mask(**mask)
  of_query, of_keys = (arrays[0], position_BL, None), (*arrays[1:], position_BL, None)
  queries, keys = plan.cut(mask, *blocks, None, of_query, of_keys)
  table, part = encoding.table(params, NUM_HEADS), (8, 8)
  of_bias = table, encoding.coordinate, part, None, None, True
  return plan.make(mask, *blocks, queries, keys, *of_bias).far_IJ > 0


@pytest.mark.parametrize(
  ('name', 'options', 'mask', 'has_room'),
  [
    ('fire', FEW_BREAKPOINTS, 'causal', True),
    ('fire', FEW_BREAKPOINTS, 'causal', False),
    ('fire', FEW_BREAKPOINTS, 'bidirectional', True),
    ('kerple_log', {}, 'causal', True),
    ('kerple_power', {}, 'causal', True),
    ('alibi', {}, 'causal', True),
    ('alibi', {}, 'causal', False),
  ],
)
def test_far_tiles_equal_the_oracle(name, options, mask, has_room):
  """In the TPU kernel, on chips whose products have room for the bias, and on others."""
  encoding, params, arrays, position_BL = of_far_tiles(name, options, np.float32)
  assert planned_far(encoding, params, arrays, position_BL, MASKS[mask]).any()
  encoding = encoding._replace(smooth=has_room)

  out_BQHC, gradients = out_and_gradients(
    'mosaic_tpu', encoding, params, arrays, position_BL, mask=MASKS[mask]
  )

  visible_BQK = oracles.visible_pairs(position_BL, position_BL, **MASKS[mask])
  of_pairs = oracles.pairs(name, params, arrays, position_BL, position_BL, visible_BQK, **options)
  expected_BQHC = oracles.attention(of_pairs.logits_BHQK, visible_BQK, arrays[2])
  largest = max(4.0, np.abs(of_pairs.logits_BHQK[:, :, visible_BQK[0]]).max())
  tolerance = oracles.TOLERANCE['float32'] * largest / 4
  np.testing.assert_allclose(out_BQHC, expected_BQHC, atol=tolerance)
  oracles.assert_gradients(gradients, of_pairs, visible_BQK, arrays, probe(arrays))


def test_far_tiles_in_bfloat16_are_as_near_to_float32_as_those_that_the_bias_is_added_to():
  encoding, params, arrays, position_BL = of_far_tiles('fire', FEW_BREAKPOINTS, jnp.bfloat16)
  wide = [x_BLHC.astype(jnp.float32) for x_BLHC in arrays]

  found = out_and_gradients('mosaic_tpu', encoding, params, arrays, position_BL)

  added = encoding._replace(smooth=False)
  expected = out_and_gradients('reference', encoding, params, wide, position_BL)
  others = out_and_gradients('mosaic_tpu', added, params, arrays, position_BL)
  of_each = zip(*map(jax.tree.leaves, (found, others, expected)), strict=True)
  errors_of_both = []
  for one, other, right in of_each:
    largest = np.abs(right).max()
    errors_of_both.append([np.abs(np.float32(x) - right).max() for x in (one, other)])
    assert errors_of_both[-1][0] < errors_of_both[-1][1] + 0.01 * max(largest, 1.0)
  assert any(one != other for one, other in errors_of_both)  # as there are such tiles


@pytest.mark.parametrize('name', ['alibi', 'kerple_log'])
def test_the_bias_of_far_tiles_is_right_to_two_numbers_of_bfloat16(name):
  """Of queries that are 0 and see far keys alone, by the normaliser of their softmax."""
  encoding, params, (query_BQHC, *others), position_BL = of_far_tiles(name, {}, jnp.bfloat16)
  where = dict.fromkeys(('query_position_BQ', 'key_position_BK'), position_BL)
  is_first_1L, is_last_1L = position_BL < 9 + 2 * BLOCK, position_BL >= 9 + 4 * BLOCK
  where |= {'query_segment_BQ': np.int32(is_last_1L), 'key_segment_BK': np.int32(is_first_1L)}

  _, log_norm_BHQ = mosaic_tpu.attention.__wrapped__(
    *map(jnp.asarray, (0 * query_BQHC, *others)),
    **where,
    encoding=encoding,
    params=params,
    mask=kernels.Mask(),
    block=BLOCK,
    interpret=True,
  )

  bias_BHQK = np.float64(encoding.bias(params, position_BL, position_BL, NUM_HEADS))
  bias_HQK = bias_BHQK[0][:, is_last_1L[0]][..., is_first_1L[0]]
  found_HQ = log_norm_BHQ[0][:, is_last_1L[0]]
  error_HQ = np.abs(found_HQ - np.log(np.exp(bias_HQK).sum(axis=2)))
  assert error_HQ.max() < 2**-16 * np.abs(bias_HQK).max()


@pytest.mark.parametrize('case', ['fire+fire_s', 'kerple_log'])
def test_rows_of_other_documents_share_a_band_and_tiles_in_order(case):
  """Tiles that only one row sees; FIRE of one row is past its threshold there."""
  encoding, params = make(case)
  arrays = inputs(2, 64, 64)
  position_BL = np.int32([[*range(480, 544)], [*range(32), *range(7, 39)]])
  segment_BL = np.repeat(np.int32([[0, 0], [0, 1]]), 32, axis=1)
  where = {'query_segment_BQ': segment_BL, 'key_segment_BK': segment_BL}

  found = out_and_gradients('mosaic_tpu', encoding, params, arrays, position_BL, **where)

  expected = out_and_gradients('reference', encoding, params, arrays, position_BL, **where)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)


@pytest.mark.parametrize(('head_blocks', 'batch'), [(1, 3), (1, 4), (2, 3)])
def test_a_band_serves_the_rows_that_a_core_takes_in_turn(head_blocks, batch, monkeypatch):
  """One of an odd batch and one block of heads, half of an even one, or all of it."""
  channels = NUM_HEADS // head_blocks * mosaic_tpu_size.LANES
  monkeypatch.setattr(mosaic_tpu_size, 'CHANNELS_OF_BAND', channels)
  encoding, params = make('fire+fire_s')
  arrays = inputs(batch, 40, 40)
  position_BL = np.arange(40, dtype=np.int32)[None]

  found = out_and_gradients('mosaic_tpu', encoding, params, arrays, position_BL)

  expected = out_and_gradients('reference', encoding, params, arrays, position_BL)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)


@every_case
@every_implementation_here
def test_a_few_late_queries_over_many_keys_equal_the_rows_of_the_whole(implementation, case):
  encoding, params = make(case)
  query_BQHC, key_BKGC, value_BKGC = arrays = inputs(1, LENGTH, LENGTH)
  position_BL = np.arange(LENGTH, dtype=np.int32)[None]

  whole_BQHC = attend('reference', encoding, params, arrays, position_BL)
  late_BQHC = attend(
    implementation,
    encoding,
    params,
    (query_BQHC[:, 43:], key_BKGC, value_BKGC),
    position_BL[:, 43:],
    position_BL,
  )

  np.testing.assert_allclose(late_BQHC, whole_BQHC[:, 43:], atol=oracles.TOLERANCE['float32'])


@every_case
@every_implementation_here
def test_outputs_of_a_prefix_do_not_change_when_the_sequence_grows(implementation, case):
  encoding, params = make(case)
  arrays = inputs(1, LENGTH, LENGTH)
  position_BL = np.arange(LENGTH, dtype=np.int32)[None]

  whole_BQHC = attend(implementation, encoding, params, arrays, position_BL)
  prefix_BQHC = attend(
    implementation, encoding, params, [x[:, :33] for x in arrays], position_BL[:, :33]
  )

  np.testing.assert_allclose(prefix_BQHC, whole_BQHC[:, :33], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize('implementation', [i for i in IMPLEMENTATIONS if i in kernels.PLATFORM])
def test_a_kernel_of_another_platform_has_the_late_rows_of_the_whole(implementation):
  """With gradients, of other numbers of queries than of keys, neither a whole number of tiles."""
  encoding, params = make('fire 2 layers')
  query_BQHC, key_BKGC, value_BKGC = inputs(1, LENGTH, LENGTH)
  position_BL = np.arange(LENGTH, dtype=np.int32)[None]
  arrays, where = (query_BQHC[:, 31:], key_BKGC, value_BKGC), (position_BL[:, 31:], position_BL)

  out_BQHC, gradients = out_and_gradients(implementation, encoding, params, arrays, *where)

  visible_BQK = oracles.visible_pairs(*where)
  of_pairs = pairs('fire 2 layers', arrays, *where, visible_BQK)
  expected_BQHC = oracles.attention(of_pairs.logits_BHQK, visible_BQK, value_BKGC)
  np.testing.assert_allclose(out_BQHC, expected_BQHC, atol=oracles.TOLERANCE['float32'])
  oracles.assert_gradients(gradients, of_pairs, visible_BQK, arrays, probe(arrays))


@every_pair
def test_a_query_that_sees_nothing_gives_zeros_and_has_no_gradient(implementation, case):
  encoding, params = make(case)
  arrays = inputs(1, LENGTH, LENGTH)
  position_BL = np.arange(LENGTH, dtype=np.int32)[None]
  query_segment_BL = np.where(np.arange(LENGTH) < 20, 3, 0)[None].astype(np.int32)
  key_segment_BL = np.zeros((1, LENGTH), np.int32)

  out_BQHC, (of_params, (d_query, d_key, d_value)) = out_and_gradients(
    implementation,
    encoding,
    params,
    arrays,
    position_BL,
    position_BL,
    query_segment_BL,
    key_segment_BL,
  )

  assert not np.any(out_BQHC[:, :20]) and np.all(np.any(out_BQHC[:, 20:], axis=(2, 3)))
  assert not np.any(d_query[:, :20]) and np.any(d_query[:, 20:])
  for leaf in jax.tree.leaves((of_params, d_query, d_key, d_value)):
    assert np.isfinite(leaf).all()


@pytest.mark.parametrize('implementation', TILED)
def test_xpos_with_keys_on_either_side_on_one_or_on_none_equals_the_oracle(implementation):
  """Of two rows that share positions; queries are before all keys, among them, after, and alone."""
  encoding, params = make('xpos')
  arrays = inputs(2, 40, 30)
  query_position_1L = np.int32([[*range(10), *range(20, 30), *range(60, 70), *range(20, 30)]])
  key_position_1L = np.arange(20, 50, dtype=np.int32)[None]
  query_segment_1L = np.repeat(np.int32([0, 1]), [30, 10])[None]
  where = query_position_1L, key_position_1L, query_segment_1L, np.zeros((1, 30), np.int32)

  out_BQHC, gradients = out_and_gradients(
    implementation, encoding, params, arrays, *where, mask=MASKS['bidirectional']
  )

  both = [np.repeat(row_1L, 2, axis=0) for row_1L in where]
  visible_BQK = oracles.visible_pairs(*both, **MASKS['bidirectional'])
  of_pairs = pairs('xpos', arrays, *both[:2], visible_BQK)
  expected_BQHC = oracles.attention(of_pairs.logits_BHQK, visible_BQK, arrays[2])
  assert not np.any(out_BQHC[:, 30:])
  np.testing.assert_allclose(out_BQHC, expected_BQHC, atol=oracles.TOLERANCE['float32'])
  oracles.assert_gradients(gradients, of_pairs, visible_BQK, arrays, probe(arrays))


@every_pair
def test_bfloat16_stays_bfloat16_and_near_the_oracle(implementation, case):
  encoding, params = make(case)
  arrays = [x.astype(jnp.bfloat16) for x in inputs(len(LAYOUTS), LENGTH, LENGTH)]

  out_BQHC, (of_params, of_arrays) = out_and_gradients(
    implementation, encoding, params, arrays, POSITION_BL, None, SEGMENT_BL
  )

  assert {leaf.dtype for leaf in (out_BQHC, *of_arrays)} == {np.dtype(jnp.bfloat16)}
  assert {leaf.dtype for leaf in jax.tree.leaves(of_params)} <= {np.dtype(np.float32)}
  exact, _ = matrix_entry('reference', case, 'causal')
  # Inputs rounded to 8 bits: logits and values are each off by some 2^-8 of their size.
  difference = np.abs(np.float32(out_BQHC) - exact)
  assert difference.max() < 2 * oracles.TOLERANCE['bfloat16']
  assert difference.mean() < oracles.TOLERANCE['bfloat16'] / 8


@every_implementation
def test_other_positions_and_segments_do_not_recompile(implementation):
  encoding, params = make('fire 2 layers')
  arrays = inputs(len(LAYOUTS), LENGTH, LENGTH)
  traces = []

  @jax.jit
  def counted(position_BL, segment_BL):
    traces.append(implementation)
    return attend(implementation, encoding, params, arrays, position_BL, None, segment_BL)

  counted(POSITION_BL, SEGMENT_BL)
  counted(POSITION_BL[::-1] + 1000, SEGMENT_BL[::-1])

  assert len(traces) == 1


# xPos at great distances, where a common origin would overflow


# The first position past 100,000 whose decay has another origin than that of the position before.
BORDER = 100_000 + int(
  np.flatnonzero(
    np.diff(
      decay.middle_of_stretch(
        np.arange(100_000, 140_000)[None], encodings.get('xpos').log_decay(HEAD_DIM)
      )[0]
    )
  )[0]
  + 1
)
LONG_ROWS = {
  'three tiles far apart': (
    (*range(16), *range(400_000, 400_016), *range(999_990, 1_000_006)),
    [0] * 48,
  ),
  'tiles a few decays apart': (
    (*range(16), *range(900, 916), *range(3000, 3016)),
    [0] * 48,
  ),
  'a long segment ends and another starts within a tile': (
    (*range(99_976, 100_000), *range(24)),
    [0] * 24 + [1] * 24,
  ),
  'a long segment after a short one within a tile': (
    (*range(8), *range(700_000, 700_040)),
    [0] * 8 + [1] * 40,
  ),
  'a tile lies on the border of two stretches': (range(BORDER - 24, BORDER + 24), [0] * 48),
}


@pytest.mark.parametrize('row', LONG_ROWS)
@pytest.mark.parametrize(
  ('implementation', 'mask'),
  [(i, m) for i in TILED for m in ('causal', 'bidirectional')],
)
def test_xpos_equals_the_oracle_at_a_million_positions(implementation, mask, row):
  encoding, params = make('xpos')
  arrays = inputs(1, 48, 48)
  position_BL, segment_BL = (np.array([part], np.int32) for part in LONG_ROWS[row])

  out_BQHC, gradients = out_and_gradients(
    implementation, encoding, params, arrays, position_BL, None, segment_BL, mask=MASKS[mask]
  )

  visible_BQK = oracles.visible_pairs(
    position_BL, position_BL, segment_BL, segment_BL, **MASKS[mask]
  )

  of_pairs = pairs('xpos', arrays, position_BL, position_BL, visible_BQK)
  expected_BQHC = oracles.attention(of_pairs.logits_BHQK, visible_BQK, arrays[2])
  np.testing.assert_allclose(out_BQHC, expected_BQHC, atol=1e-4)
  oracles.assert_gradients(gradients, of_pairs, visible_BQK, arrays, probe(arrays))


# Masks


DRAWN = """\
causal        blockwise     window = 3
1 . . . .     1 . . . .     1 . . . .
1 1 . . .     1 1 . . .     1 1 . . .
1 1 1 . .     1 1 1 . .     1 1 1 . .
1 1 1 1 .     1 1 1 1 .     . 1 1 1 .
1 1 1 1 1     . . 1 1 1     . . 1 1 1
"""


def test_masks_are_as_drawn_in_their_docstring():
  position_BL = np.arange(5, dtype=np.int32)[None]
  masks = kernels.Mask(), kernels.Mask(block=2), kernels.Mask(window=3)

  assert DRAWN in re.sub(r'(?m)^ +', '', inspect.getdoc(kernels.Mask) + '\n')
  for column, mask in enumerate(masks):
    drawn = [re.split(' {5}', line)[column].split() for line in DRAWN.splitlines()[1:]]
    found = np.where(mask.visible(position_BL, position_BL)[0], '1', '.')
    assert found.tolist() == drawn, mask
  assert kernels.Mask(causal=False).visible(position_BL, position_BL).all()


def test_masks_combine():
  position_BL = np.arange(40, dtype=np.int32)[None]

  visible_BQK = kernels.Mask(block=8, window=11).visible(position_BL, position_BL)

  expected_BQK = oracles.visible_pairs(position_BL, position_BL, block=8, window=11)
  np.testing.assert_array_equal(visible_BQK, expected_BQK)


def blocks(x_BL):
  """[B, L] as [L / BLOCK, B, BLOCK], the form of a tiled row."""
  return jnp.moveaxis(x_BL.reshape(len(x_BL), -1, BLOCK), 1, 0)


def visits(mask, position_BL, segment_BL):
  segment_IBL = None if segment_BL is None else blocks(segment_BL)
  position_IBL = blocks(position_BL)
  queries = chunked.Queries(None, position_IBL, segment_IBL)
  keys = chunked.Keys(None, None, position_IBL, segment_IBL)
  return np.array(chunked.tiles_to_visit(kernels.Mask(**mask), queries, keys))


def test_tiles_above_the_diagonal_are_never_visited():
  position_BL = np.arange(96, dtype=np.int32)[None]

  np.testing.assert_array_equal(visits({}, position_BL, None), np.tri(6, dtype=bool))
  band = np.tri(6, dtype=bool) & ~np.tri(6, k=-2, dtype=bool)
  np.testing.assert_array_equal(visits({'window': BLOCK + 1}, position_BL, None), band)
  np.testing.assert_array_equal(visits({'block': BLOCK}, position_BL, None), band)
  assert visits({'causal': False}, position_BL, None).all()


def test_tiles_of_other_segments_are_never_visited():
  position_BL = np.tile(np.arange(32, dtype=np.int32), 3)[None]
  segment_BL = np.repeat(np.int32([4, 5, 9]), 32)[None]

  expected = np.kron(np.eye(3, dtype=bool), np.tri(2, dtype=bool))
  np.testing.assert_array_equal(visits({}, position_BL, segment_BL), expected)


@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('mask', MASKS)
def test_a_tile_with_a_visible_pair_is_always_visited(mask, seed):
  """For any positions and segments, sorted or not."""
  rng = np.random.default_rng(seed)
  segment_BL = np.sort(rng.integers(0, 6, (1, 80)).astype(np.int32), axis=1)
  position_BL = rng.integers(0, [30, 1000][seed % 2], (1, 80)).astype(np.int32)
  if seed % 3:
    position_BL = np.sort(position_BL, axis=1)

  for segments in (segment_BL, None):
    visible_BQK = oracles.visible_pairs(position_BL, position_BL, segments, segments, **MASKS[mask])
    needed_IJ = visible_BQK.reshape(1, 5, BLOCK, 5, BLOCK).any(axis=(0, 2, 4))
    assert not (needed_IJ & ~visits(MASKS[mask], position_BL, segments)).any()


def test_hidden_tiles_cost_nothing_forward_or_backward():
  """An encoding that counts its calls: 6 of 9 tiles each way under the causal mask."""
  calls = []

  def counting_bias(params, query_position_BQ, key_position_BK, num_heads):
    jax.debug.callback(lambda: calls.append(1))
    return jnp.zeros((1, num_heads, query_position_BQ.shape[1], key_position_BK.shape[1]))

  encoding = base.Encoding(name='counting', init=base.no_parameters, bias=counting_bias)
  position_BL = np.arange(3 * BLOCK, dtype=np.int32)[None]

  out_and_gradients('chunked', encoding, {}, inputs(1, 48, 48), position_BL)
  jax.effects_barrier()

  assert len(calls) == 6 + 6


# Memory


@pytest.mark.parametrize('implementation', [name for name in TILED if name not in kernels.PLATFORM])
def test_memory_grows_linearly_with_length(implementation):
  """Forward and backward under FIRE; a dense pass takes 16 times as much at 4 times the length."""
  encoding, params = make('fire 2 layers')

  def temporary_bytes(length):
    def total(params, arrays, position_BL):
      query_BQHC, key_BKGC, value_BKGC = arrays
      return kernels.attention(
        query_BQHC,
        key_BKGC,
        value_BKGC,
        encoding=encoding,
        params=params,
        query_position_BQ=position_BL,
        key_position_BK=position_BL,
        implementation=implementation,
      ).sum()

    shapes = [
      jax.ShapeDtypeStruct((1, length, heads, HEAD_DIM), jnp.float32)
      for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
    ]
    position_BL = jax.ShapeDtypeStruct((1, length), jnp.int32)
    lowered = jax.jit(jax.grad(total, argnums=(0, 1))).lower(params, shapes, position_BL)
    return lowered.compile().memory_analysis().temp_size_in_bytes

  short, long = temporary_bytes(2048), temporary_bytes(8192)

  assert long <= 4.2 * short
  assert long < 4 * NUM_HEADS * 8192**2 / 4, 'no quarter of one dense [H, Q, K] array'


# Choice and errors


def attend_by_name(
  implementation='auto', num_heads=4, num_kv_heads=2, length=8, name='nope', **options
):
  encoding = encodings.get(name, **options)
  position_BL = np.arange(length, dtype=np.int32)[None]
  key_BKGC = np.ones((1, length, num_kv_heads, HEAD_DIM), np.float32)
  return kernels.attention(
    np.ones((1, length, num_heads, HEAD_DIM), np.float32),
    key_BKGC,
    key_BKGC,
    encoding=encoding,
    params={},
    query_position_BQ=position_BL,
    key_position_BK=position_BL,
    implementation=implementation,
  )


HERE = [name for name in kernels.IMPLEMENTATIONS if name not in kernels.PLATFORM]


@pytest.mark.parametrize('implementation', ['auto', *HERE])
def test_every_implementation_is_reached_by_name(implementation):
  np.testing.assert_allclose(attend_by_name(implementation), 1.0, rtol=1e-6)


@pytest.mark.parametrize(('implementation', 'platform'), kernels.PLATFORM.items())
def test_a_kernel_of_another_platform_is_refused(implementation, platform):
  message = f"implementation='{implementation}' is for {platform}, but this is cpu; use 'auto' or"

  with pytest.raises(errors.UserError, match=message):
    attend_by_name(implementation)


def chosen(
  platform,
  num_queries,
  num_keys,
  name='fire',
  implementation='auto',
  heads=(4, 2),
  head_dim=64,
  dtype=jnp.bfloat16,
  causal=True,
  rows=1,
  **options,
):
  query, key = (
    jax.ShapeDtypeStruct((1, length, count, head_dim), dtype)
    for length, count in zip((num_queries, num_keys), heads, strict=True)
  )
  with jax.default_device(platform):
    encoding = encodings.get(name, **options)
    mask = kernels.Mask(causal=causal)
    return kernels.choose(implementation, encoding, mask, query, key, rows=rows)


@pytest.mark.parametrize('platform', kernels.MAX_DENSE_LOGITS)
def test_auto_is_dense_up_to_the_limit_of_its_platform(platform):
  limit = kernels.MAX_DENSE_LOGITS[platform]

  choice = chosen(platform, 1, limit)

  assert choice.implementation == 'reference'
  assert choice.reason.startswith(f'1 x {limit} logits are at most {limit} on {platform}')
  assert chosen(platform, 1, limit + 1).implementation == 'chunked'


@pytest.mark.parametrize('platform', kernels.MAX_DENSE_LOGITS)
def test_auto_counts_rows_whose_biases_are_of_their_own_positions(platform):
  side = math.isqrt(kernels.MAX_DENSE_LOGITS[platform])
  of_two_rows = functools.partial(chosen, platform, side, side, hidden_layers=3, rows=2)

  assert chosen(platform, side, side, hidden_layers=3).implementation == 'reference'
  choice = of_two_rows()
  assert choice.implementation == 'chunked'
  assert choice.reason.startswith(f'2 x {side} x {side} logits are over {side**2} on {platform}')
  # A bias of distances costs no more than a logit, and a step of generation has no tile to share.
  for name in ('alibi', 'learned'):
    assert chosen(platform, side, side, name=name, rows=2).implementation != 'chunked'
  assert chosen(platform, 1, side**2, rows=2).implementation == 'reference'


@pytest.mark.parametrize('most', [1, 7, 128])
def test_tiles_are_as_few_as_can_be_and_filled_but_for_eight_tokens_each_at_most(most):
  for length in range(1, 600):
    size = chunked._even(length, most)
    count = -(-length // size)

    assert size <= min(length, most) and count == -(-length // most)
    assert 0 <= count * size - length < 8 * count
    assert count == 1 or size in (most, *range(0, most, 8))


@pytest.mark.parametrize(
  ('rows', 'devices', 'name'), [(1, 1, 'reference'), (4, 1, 'chunked'), (4, 4, 'reference')]
)
def test_attention_takes_what_is_chosen_for_the_rows_of_a_device(rows, devices, name, taken):
  encoding = encodings.get('fire')
  params = encoding.init(jax.random.key(0), num_heads=1, head_dim=2, d_model=2)
  x_BLHC, position_BL = jnp.zeros((4, 128, 1, 2)), jnp.zeros((rows, 128), jnp.int32)
  attend = functools.partial(kernels.attention, encoding=encoding, row_devices=devices)
  positions = {'query_position_BQ': position_BL, 'key_position_BK': position_BL}

  jax.eval_shape(attend, x_BLHC, x_BLHC, x_BLHC, params=params, **positions)

  assert taken == [name]


def test_auto_takes_the_kernel_of_a_platform_where_it_can_and_else_says_why_not():
  assert chosen('tpu', 128, 128).implementation == 'mosaic_tpu'
  assert chosen('tpu', 4096, 4096, name='xpos', causal=False).implementation == 'mosaic_tpu'
  for choice, reason in (
    (chosen('tpu', 8, 2**20), 'tiles of 128 queries at least, not of 8'),
    (chosen('tpu', 4096, 4096, hidden_layers=3), "a table of the bias, which 'fire' has not"),
    (chosen('tpu', 4096, 4096, dtype=jnp.float16), 'bfloat16 and float32, not float16'),
    (chosen('tpu', 2**20, 2**20), 'of scalar memory, and has 983,040'),
    (chosen('tpu', 4096, 4096, hidden_layers=2, width=127), 'for the sums of a table'),
  ):
    assert choice.implementation == 'chunked' and reason in choice.reason
  assert chosen('cpu', 128, 128, implementation='chunked') == ('chunked', 'as asked')


DECAYED_ALIBI = encodings.get('alibi')._replace(log_decay=encodings.get('xpos').log_decay)


@pytest.mark.parametrize(
  ('encoding', 'message'),
  [
    (DECAYED_ALIBI, "a decay or a bias, but 'alibi' has both; use implem"),
    (
      encodings.get('fire', hidden_layers=3),
      "a table of the bias, which 'fire' has not; use implem",
    ),
  ],
)
def test_the_tpu_kernel_refuses_what_it_cannot_do(encoding, message):
  params = encoding.init(jax.random.key(0), num_heads=4, head_dim=HEAD_DIM, d_model=32)
  position_BL = np.arange(LENGTH, dtype=np.int32)[None]

  with pytest.raises(errors.UserError, match=message):
    attend('mosaic_tpu', encoding, params, inputs(1, LENGTH, LENGTH), position_BL)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (
      {'implementation': 'flash'},
      "implementation='flash'; known: auto, chunked, cudnn, mosaic_gpu, mosaic_tpu, ",
    ),
    ({'num_kv_heads': 3}, 'num_kv_heads=3 must divide num_heads=4'),
    (
      {'name': 'xpos', 'scale_base': 1.0, 'length': 80, 'implementation': 'reference'},
      'decay of -1.3 nats a token is too fast for one tile of 80 queries in float32 (at most 63); '
      "use implementation='chunked'",
    ),
  ],
)
def test_mistakes_are_answered_with_their_value(options, message):
  with pytest.raises(errors.UserError, match=re.escape(message)):
    attend_by_name(**options)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'block': 0}, 'block=0'),
    ({'window': -3}, 'window=-3'),
    ({'window': 5, 'causal': False}, 'window=5'),
    ({'block': 4, 'causal': False}, 'block=4'),
  ],
)
def test_masks_refuse_what_they_cannot_mean(fields, message):
  with pytest.raises(errors.UserError, match=message):
    kernels.Mask(**fields)


def test_masks_are_asked_for_by_name():
  parsed = {
    name: mask_lib.parse(name, 256)
    for name in ('causal', 'full', 'blockwise', 'blockwise:32', 'window:128')
  }

  assert parsed == {
    'causal': kernels.Mask(),
    'full': kernels.Mask(causal=False),
    'blockwise': kernels.Mask(block=128),  # half the training length: Sun et al. 2022, section 3
    'blockwise:32': kernels.Mask(block=32),
    'window:128': kernels.Mask(window=128),
  }


@pytest.mark.parametrize(
  ('name', 'train_length', 'message'),
  [
    ('blokwise', 256, "unknown mask 'blokwise'; known: causal, full, blockwise, blockwise:N, win"),
    ('causal:8', 256, "unknown mask 'causal:8'; known"),
    ('', 256, "unknown mask ''; known"),
    ('window', 256, "mask 'window' needs a whole number of tokens above 0"),
    ('window:', 256, "mask 'window:' needs a whole number"),
    ('window:0', 256, "mask 'window:0' needs a whole number"),
    ('window:-3', 256, "mask 'window:-3' needs a whole number"),
    ('window:2.5', 256, "mask 'window:2.5' needs a whole number"),
    ('blockwise:half', 256, "mask 'blockwise:half' needs a whole number"),
    ('window:2147483648', 256, "mask 'window:2147483648' needs a whole number"),
    ('blockwise', 33, 'takes half the training length, but train_length=33 is not even'),
    ('blockwise', 1, 'train_length=1 is not even'),
    ('blockwise', 0, 'train_length=0 is not even and above 0'),
  ],
)
def test_a_name_that_means_no_mask_is_refused(name, train_length, message):
  with pytest.raises(errors.UserError, match=re.escape(message)):
    mask_lib.parse(name, train_length)


def test_a_decay_over_more_positions_than_float32_can_hold_is_nan_and_not_wrong():
  encoding = encodings.get('xpos')
  position_BL = jnp.array([[0, 1, 100_000, 100_001]])
  x_BLHC = jnp.ones((1, 4, 1, 8))

  out_BLHC = kernels.attention(
    x_BLHC,
    x_BLHC,
    x_BLHC,
    encoding=encoding,
    params={},
    query_position_BQ=position_BL,
    key_position_BK=position_BL,
    implementation='reference',
  )

  assert np.isnan(out_BLHC[0, :2]).all()
  assert np.isfinite(out_BLHC[0, 2:]).all()


@every_case
def test_token_by_token_over_cached_keys_equals_the_parallel_pass(case):
  encoding, params = make(case)
  keys = jax.random.split(jax.random.key(1), 3)
  query_BLHC = jax.random.normal(keys[0], (1, 12, 4, 8))
  key_BLGC, value_BLGC = (jax.random.normal(key, (1, 12, 2, 8)) for key in keys[1:])
  position_BL = 700 + jnp.arange(12)[None]  # past FIRE's threshold
  if encoding.rotate is not None:
    query_BLHC = encoding.rotate(params, query_BLHC, position_BL)
    key_BLGC = encoding.rotate(params, key_BLGC, position_BL)  # what a cache would hold

  # Keys to come are there, as slots of a cache that hold nothing yet: the mask hides them.
  @jax.jit
  def attend(query_BQHC, query_position_BQ):
    return kernels.attention(
      query_BQHC,
      key_BLGC,
      value_BLGC,
      encoding=encoding,
      params=params,
      query_position_BQ=query_position_BQ,
      key_position_BK=position_BL,
    )

  steps = [attend(query_BLHC[:, i : i + 1], position_BL[:, i : i + 1]) for i in range(12)]
  whole = attend(query_BLHC, position_BL)

  np.testing.assert_allclose(jnp.concatenate(steps, axis=1), whole, atol=1e-5)


def test_an_encoding_given_its_table_still_says_how_large_one_is():
  """As kernels ask that have a device's own heads: what table they are given, they use."""
  encoding = encodings.get('fire')
  params = encoding.init(jax.random.key(0), num_heads=4, head_dim=64, d_model=256)
  table = encoding.table(params, 4)
  query = jax.ShapeDtypeStruct((1, 512, 4, 64), jnp.bfloat16)

  given = piecewise.tabulated(encoding)

  assert given.table(table, 4) is table
  assert mosaic_tpu_size.why_not(given, query, query) is None
