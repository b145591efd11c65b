"""Keys far before their queries in the kernel for NVIDIA GPUs: which are, and what x is there."""

import functools
import types

import jax
import jax.numpy as jnp
import mosaic_gpu_test
import numpy as np
import pytest
from mosaic_gpu_test import _a_kernel_compiles_once  # noqa: F401  (a fixture, found by its name)

from lex_fire import kernels
from lex_fire.encodings import fire
from lex_fire.kernels import mosaic_gpu, mosaic_gpu_far, mosaic_gpu_plan, mosaic_gpu_tile

# Parameters that here move no weight: what all of a query's logits have in common, and FIRE's
# threshold, which all queries are past.
STILL = {'fire': {'b_out_H', 'length_multiplier'}, 'kerple_log': set()}


def record_plans(monkeypatch):
  """Returns a list to which each plan is added, once it is known."""
  plans, make_plan = [], mosaic_gpu.Kernels.make_plan

  def made(self, **of):
    plan = make_plan(self, **of)
    jax.debug.callback(plans.append, plan)
    return plan

  monkeypatch.setattr(mosaic_gpu.Kernels, 'make_plan', made)
  return plans


@pytest.mark.parametrize(
  ('name', 'options', 'mask', 'may_be_far'),
  [
    ('fire', {}, {}, True),
    ('fire', {}, {'window': 70}, True),
    ('fire', {}, {'causal': False}, False),  # whose x has the key's own threshold in it
    ('fire', {'psi': 'identity'}, {}, False),  # which takes no long
    ('kerple_log', {}, {'causal': False}, True),
    ('alibi', {}, {}, False),
    ('t5', {}, {}, False),
    ('sandwich', {}, {}, False),
    ('nope', {}, {}, False),
  ],
)
def test_x_is_interpolated_where_it_is_smooth_and_takes_long(name, options, mask, may_be_far):
  encoding, params = mosaic_gpu_test.make(name, options)
  arrays, found = mosaic_gpu_test.inputs(1, 64), []

  def make_flash(of_kernels):
    found.append(of_kernels.setup.far)
    return lambda table, queries, keys: of_kernels.nothing(queries)

  where = (jnp.int32(mosaic_gpu_test.PLAIN[0]),) * 2, (None, None), kernels.Mask(**mask)
  how = {'interpret': True, 'make_flash': make_flash}
  mosaic_gpu_test.attend(mosaic_gpu.attention, encoding, params, arrays, *where, **how)

  assert found == [may_be_far]


def test_the_oracles_meet_tiles_whose_queries_are_after_their_keys():
  arrays, plans = mosaic_gpu_test.inputs(1, 64), []
  where = mosaic_gpu_test.where(mosaic_gpu_test.LATER, 'causal')

  def make_flash(of_kernels):
    def found(table, queries, keys):
      plans.append(of_kernels.make_plan(table=table, queries=queries, keys=keys))
      return of_kernels.nothing(queries)

    return found

  how = {'interpret': True, 'make_flash': make_flash}
  mosaic_gpu_test.attend(
    mosaic_gpu.attention, *mosaic_gpu_test.make('alibi', {}), arrays, *where, **how
  )

  seen = mosaic_gpu_tile.VISIT | mosaic_gpu_tile.AFTER
  (plan,) = plans
  assert [np.any(tiles.code_BIJ & seen == seen) for tiles in plan] == [True] * 3


@pytest.mark.parametrize('degree', [None, *mosaic_gpu_far.LEAST_DISTANCE])
def test_codes_say_how_far_queries_are_after_keys(degree):
  keys_in_rows = degree is None
  encoding, params = mosaic_gpu_test.make('fire', {})
  far, block = mosaic_gpu_far.LEAST_DISTANCE[degree or 2] * 64, np.arange(64)
  starts = 0, 64, 128 + far - 1, 2 * 64 + 63 + far, *range(3 * far, 5 * far, 64), 2**31 - 64
  position_1L = np.concatenate([start + block for start in starts])[None]
  position_1L[0, 65] += 1  # so that these are not consecutive
  numbers = (
    mosaic_gpu_plan.query_numbers(kernels.Mask(), position_1L, None, 0),
    mosaic_gpu_plan.key_numbers(position_1L, None, 0),
  )
  given = *numbers, encoding.table(params, mosaic_gpu_test.NUM_HEADS), encoding.coordinate, (64, 64)

  code_IJ = mosaic_gpu_plan.codes(*given, degree=degree, keys_in_rows=keys_in_rows)[0]

  assert not np.any(mosaic_gpu_plan.codes(*given)[0] & mosaic_gpu_tile.FAR)
  code_IJ = code_IJ.T if keys_in_rows else code_IJ
  position_IB = np.int64(position_1L.reshape(-1, 64))
  apart_IJ = position_IB.min(axis=1)[:, None] - position_IB.max(axis=1)[None]
  spread_I = np.ptp(position_IB, axis=1)
  is_after_IJ = apart_IJ >= (spread_I[:, None] if keys_in_rows else spread_I[None])
  np.testing.assert_array_equal(code_IJ & mosaic_gpu_tile.AFTER != 0, is_after_IJ)
  follow_I = (np.diff(position_IB) == 1).all(axis=1)
  first_IJ, end_IJ = mosaic_gpu_tile.span(code_IJ)
  is_far_IJ = (apart_IJ >= far) & follow_I[None] & (end_IJ == first_IJ + 1)
  np.testing.assert_array_equal(code_IJ & mosaic_gpu_tile.FAR != 0, is_far_IJ & (not keys_in_rows))
  assert np.any(is_far_IJ) and np.any(apart_IJ == far)
  assert np.any((apart_IJ >= far) & follow_I[None] & (end_IJ > first_IJ + 1))


@pytest.mark.parametrize(
  ('name', 'small', 'options', 'mask'),
  [
    ('fire', {'c': 1e-4}, {}, {}),
    ('fire', {}, {'psi': 'sqrt'}, {}),
    ('kerple_log', {'r2_H': 1e-2}, {}, {'causal': False}),
  ],
)
def test_far_tiles_give_what_those_pair_by_pair_do_and_these_by_integers(
  monkeypatch, name, small, options, mask
):
  """Of queries that see far keys alone, whose weights else would be next to nothing.

  Some twice as far as others, and what a distance is multiplied by small: else all keys would be
  alike in the gradients, and these next to nothing.
  """
  encoding, params = mosaic_gpu_test.make(name, options)
  params = {key: jnp.full_like(x, small[key]) if key in small else x for key, x in params.items()}
  rng, heads = np.random.default_rng(0), (mosaic_gpu_test.NUM_HEADS, 1, 1)
  arrays = [
    rng.normal(size=(1, length, n, 64)).astype(np.float32)
    for length, n in zip((64, 256, 256), heads, strict=True)
  ]
  positions = (np.r_[9000:9064], np.r_[0:128, 4500:4628])
  positions = [jnp.asarray(x, jnp.int32)[None] for x in positions]
  where = positions, (None, None), kernels.Mask(**mask)
  plans = record_plans(monkeypatch)

  def found(smooth):
    same = encoding._replace(smooth=smooth, name=str(len(plans)))  # compiled for itself
    result = mosaic_gpu_test.interpreted(same, params, arrays, *where)
    jax.effects_barrier()
    return result

  far, after = found(smooth=True), found(smooth=False)
  bits = mosaic_gpu_tile.FAR, mosaic_gpu_tile.AFTER
  monkeypatch.setattr(mosaic_gpu_tile, 'AFTER', 0)
  near_BQHC, (expected, of_others) = found(smooth=False)

  for found_BQHC, (of_params, of_arrays) in (far, after):
    mosaic_gpu_test.assert_agree((found_BQHC, of_arrays), (near_BQHC, of_others), 1e-5)
    # Sums over all pairs, most of which cancel.
    mosaic_gpu_test.assert_agree(of_params, expected, 1e-3)
  # Else there would be nothing to compare.
  assert {key for key, x in expected.items() if np.abs(x).max() < 0.1} == STILL[name]
  said = [[np.any(tiles.code_BIJ & bit) for bit in bits] for plan in plans for tiles in plan]
  assert said == [[True, True]] * 2 + [[False, True]] * 4 + [[False, False]] * 3


@pytest.mark.parametrize('degree', mosaic_gpu_far.LEAST_DISTANCE)
def test_a_polynomial_of_rows_gives_what_its_x_of_each_pair_does(degree):
  """With coefficients that all matter, unlike those of an x that is smooth."""
  rng, (rows, columns) = np.random.default_rng(degree), (3, 64)
  offset_K = np.arange(columns, dtype=np.float32) - columns // 2
  scales = [float(columns) ** -n for n in range(degree + 1)]
  x_NQ, slope_NQ = ([scale * rng.normal(size=rows) for scale in scales] for _ in range(2))
  line_HZX, d_logits_QK = rng.normal(size=(1, 1, 3)), rng.normal(size=(rows, columns))
  setup = types.SimpleNamespace(factor=None)
  in_float32 = [[jnp.float32(x) for x in of_rows] for of_rows in (x_NQ, slope_NQ)]
  polynomial = mosaic_gpu_far.Polynomial(in_float32[0], in_float32[1:], jnp.asarray(offset_K))

  positions = mosaic_gpu_tile.Positions(None, None, 0, ())
  bias_QK = polynomial.bias(setup, jnp.float32(line_HZX), 0, 0, positions)
  value_Q, of_x_Q, (of_slope_Q,) = polynomial.sums(jnp.float32(d_logits_QK))

  powers_NK = np.float64(offset_K) ** np.arange(degree + 1)[:, None]
  x_QK, slope_QK = (np.einsum('nq,nk->qk', x, powers_NK) for x in (x_NQ, slope_NQ))
  _, slope, height = line_HZX[0, 0]
  np.testing.assert_allclose(bias_QK, height + slope * x_QK, atol=1e-6)
  of_pairs = d_logits_QK, d_logits_QK * x_QK, d_logits_QK * slope_QK
  for found, pairs in zip((value_Q, of_x_Q, of_slope_Q), of_pairs, strict=True):
    np.testing.assert_allclose(found, pairs.sum(axis=1), atol=1e-4)


@pytest.mark.parametrize('degree', mosaic_gpu_far.LEAST_DISTANCE)
@pytest.mark.parametrize('columns', [32, 64, 128])
@pytest.mark.parametrize(
  'function',
  [
    *(functools.partial(lambda c, d: np.log1p(c * d), c) for c in (1e-3, 0.1, 1.0, 100.0)),
    *(functools.partial(lambda p, d: d**p, p) for p in (0.01, 0.3, 0.5, 1.0, 1.5, 2.0)),
    functools.partial(lambda p, d: d**p, fire.MAX_EXPONENT),
  ],
)
def test_x_of_far_keys_is_a_polynomial_but_for_what_float32_rounds(function, columns, degree):
  """In float64, so that it is the polynomial that is measured; of great powers that is all."""
  least = mosaic_gpu_far.LEAST_DISTANCE[degree] * columns
  distance_K = np.float64(least + np.arange(columns)[::-1])
  nodes = [function(distance_K[node]) for node in mosaic_gpu_far.nodes(degree, columns)]
  offset_K = np.arange(columns) - columns // 2

  coefficients = mosaic_gpu_far.polynomial(nodes, columns)
  found_K = sum(x * np.float64(offset_K) ** n for n, x in enumerate(coefficients))

  assert len(coefficients) == degree + 1
  exact_K = function(distance_K)
  tolerance = 5e-7 if fire.MAX_EXPONENT in function.args else np.finfo(np.float32).eps
  np.testing.assert_allclose(found_K, exact_K, rtol=tolerance, atol=0)
