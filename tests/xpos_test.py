"""xPos at a million positions: value and gradient against float64, with a cache and without.

The paper's factors, zeta^(n / B) of a query and zeta^(-n / B) of a key, leave float32 near 35,000.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from lex_fire import encodings, kernels

XPOS = encodings.get('xpos')
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 8
LENGTH = 40
ROWS = {
  'a million': range(999_980, 1_000_020),
  'all that float32 spans': (972_000, 985_000, 995_000, 999_000, *range(999_984, 1_000_020)),
  'everything': (0, 1, 5000, 400_000, 983_000, 999_000, *range(999_986, 1_000_020)),
}


def whole(implementation, query_BLHC, key_BLGC, value_BLGC, position_BL):
  """All queries at once."""
  return kernels.attention(
    XPOS.rotate({}, query_BLHC, position_BL),
    XPOS.rotate({}, key_BLGC, position_BL),
    value_BLGC,
    encoding=XPOS,
    params={},
    query_position_BQ=position_BL,
    key_position_BK=position_BL,
    implementation=implementation,
  )


def cached(implementation, query_BLHC, key_BLGC, value_BLGC, position_BL):
  """One query at a time, over keys that were rotated once, when they were new."""

  def step(cache, token):
    slot, query_B1HC, key_B1GC, value_B1GC, position_B1 = token
    rotated_B1GC = XPOS.rotate({}, key_B1GC, position_B1)
    new = rotated_B1GC, value_B1GC, position_B1, jnp.ones_like(position_B1)
    cache = jax.tree.map(lambda old, x: old.at[:, slot].set(x[:, 0]), cache, new)
    key_BKGC, value_BKGC, position_BK, filled_BK = cache
    out_B1HC = kernels.attention(
      XPOS.rotate({}, query_B1HC, position_B1),
      key_BKGC,
      value_BKGC,
      encoding=XPOS,
      params={},
      query_position_BQ=position_B1,
      key_position_BK=position_BK,
      query_segment_BQ=jnp.ones_like(position_B1),
      key_segment_BK=filled_BK,
      implementation=implementation,
    )
    return cache, out_B1HC[:, 0]

  arrays = query_BLHC, key_BLGC, value_BLGC, position_BL
  empty = jax.tree.map(jnp.zeros_like, (key_BLGC, value_BLGC, position_BL, position_BL))
  tokens = [jnp.moveaxis(x, 1, 0)[:, :, None] for x in arrays]
  _, out_LBHC = jax.lax.scan(step, empty, (jnp.arange(LENGTH), *tokens))
  return jnp.moveaxis(out_LBHC, 0, 1)


# One query alone may be any distance from its keys; many at once share the range of a float32.
WAYS = {'whole': (whole, list(ROWS)[:2]), 'cached': (cached, list(ROWS))}
every_way = pytest.mark.parametrize('way', WAYS)
every_implementation = pytest.mark.parametrize(
  'implementation', [name for name in kernels.IMPLEMENTATIONS if name not in kernels.PLATFORM]
)


def inputs(way):
  """Returns the three arrays by name, with a row for each that a way takes, a probe, positions."""
  rng, rows = np.random.default_rng(0), WAYS[way][1]
  heads = {'query_BLHC': NUM_HEADS, 'key_BLGC': NUM_KV_HEADS, 'value_BLGC': NUM_KV_HEADS}
  arrays = {
    name: rng.normal(size=(len(rows), LENGTH, count, HEAD_DIM)).astype(np.float32)
    for name, count in heads.items()
  }
  probe_BLHC = rng.normal(size=arrays['query_BLHC'].shape).astype(np.float32)
  return arrays, probe_BLHC, np.array([list(ROWS[row]) for row in rows], np.int32)


@functools.cache
def computed(way, implementation, dtype):
  """Returns (out_BLHC, gradients of query, key and value) of the probed sum of outputs."""
  arrays, probe_BLHC, position_BL = inputs(way)

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def gradient(arrays):
    out_BLHC = WAYS[way][0](implementation, **arrays, position_BL=position_BL)
    return (out_BLHC.astype(jnp.float32) * probe_BLHC).sum(), out_BLHC

  gradients, out_BLHC = gradient({name: jnp.asarray(x, dtype) for name, x in arrays.items()})
  return out_BLHC, gradients


def expected_out(tree, position_BL):
  """out_BLHC in float64."""
  visible_BQK = oracles.visible_pairs(position_BL, position_BL)
  logits_BHQK = oracles.logits(
    'xpos', {}, tree['query_BLHC'], tree['key_BLGC'], position_BL, position_BL, visible_BQK
  )
  return oracles.attention(logits_BHQK, visible_BQK, tree['value_BLGC'])


@functools.cache
def expected_slopes(way):
  """Returns [(direction, the probed sum's slope along it)]: each array by itself, twice."""
  arrays, probe_BLHC, position_BL = inputs(way)
  exact = {name: np.float64(array) for name, array in arrays.items()}
  rng, slopes = np.random.default_rng(1), []
  for name in [*exact, *exact]:
    direction = {other: np.zeros_like(x) for other, x in exact.items()}
    direction[name] = rng.normal(size=exact[name].shape) / LENGTH
    slopes.append(
      (
        direction,
        oracles.slope(
          lambda tree: (expected_out(tree, position_BL) * probe_BLHC).sum(), exact, direction
        ),
      )
    )
  return slopes


@every_way
@every_implementation
def test_values_at_a_million_positions_are_the_oracles(implementation, way):
  arrays, _, position_BL = inputs(way)

  out_BLHC, _ = computed(way, implementation, 'float32')

  error_B = np.abs(out_BLHC - expected_out(arrays, position_BL)).max(axis=(1, 2, 3))
  for row, error in zip(WAYS[way][1], error_B, strict=True):
    assert error < oracles.TOLERANCE['float32'], row


@every_way
@every_implementation
def test_gradients_at_a_million_positions_are_the_oracles(implementation, way):
  _, gradients = computed(way, implementation, 'float32')

  for direction, expected in expected_slopes(way):
    found = sum((np.float64(gradients[name]) * direction[name]).sum() for name in gradients)
    assert abs(found - expected) < 1e-4 * max(1, abs(expected))


@every_implementation
def test_a_million_positions_on_value_and_gradient_are_those_of_the_first(implementation):
  """Each entry of them, as only distances matter: 999,980 is the first position of its row."""
  arrays, probe_BLHC, position_BL = inputs('whole')
  first = {name: x[:1] for name, x in arrays.items()}

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def gradient(arrays, position_1L):
    out_1LHC = whole(implementation, **arrays, position_BL=position_1L)
    return (out_1LHC * probe_BLHC[:1]).sum(), out_1LHC

  near = gradient(first, position_BL[:1] - 999_980)
  far = gradient(first, position_BL[:1])

  for one, other in zip(jax.tree.leaves(far), jax.tree.leaves(near), strict=True):
    np.testing.assert_allclose(one, other, rtol=0, atol=oracles.TOLERANCE['float32'])


@every_way
@every_implementation
def test_bfloat16_at_a_million_positions_is_finite_and_near_float32(implementation, way):
  out_BLHC, gradients = computed(way, implementation, 'bfloat16')
  exact_BLHC, exact_gradients = computed(way, implementation, 'float32')

  found = {'out': out_BLHC, **gradients}
  for name, exact in {'out': exact_BLHC, **exact_gradients}.items():
    assert found[name].dtype == jnp.bfloat16
    difference = np.abs(np.float32(found[name]) - exact)  # NaN is not below any bound
    # Inputs are rounded to 8 bits, which the softmax sees as logits off by some 2^-8 of their size.
    assert difference.max() < 2 * oracles.TOLERANCE['bfloat16'] * max(1, np.abs(exact).max()), name
    assert difference.mean() < oracles.TOLERANCE['bfloat16'] / 4, name
