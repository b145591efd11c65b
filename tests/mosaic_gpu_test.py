"""The kernel for NVIDIA GPUs, interpreted, against the oracle."""

import functools
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tensor_memory
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu.interpret import params as interpreter

from lex_fire import encodings, errors, kernels
from lex_fire.kernels import (
  chunked,
  decay,
  mosaic_gpu,
  mosaic_gpu_elementwise,
  mosaic_gpu_plan,
  mosaic_gpu_tensor_memory,
  mosaic_gpu_tile,
)

NUM_HEADS, NUM_KV_HEADS, LENGTH = 2, 1, 140  # two blocks of 128, the second ragged
PLAIN = np.arange(LENGTH, dtype=np.int32)[None], None
# Far apart, so that x crosses many breakpoints; but not at FIRE's threshold, where the oracle has
# no derivative.
SPARSE = 9 + 16 * PLAIN[0], None
PACKED = tuple(np.int32([row]) for row in (np.r_[0:90, 0:50], np.repeat([1, 2], [90, 50])))
SCATTERED = 9 + 16 * PACKED[0], PACKED[1]  # both
LAYOUTS = (SCATTERED, PACKED)
# Queries after all keys of a tile by as much as its columns are apart, in each of the kernels.
LATER = np.int32([np.r_[5:133, 300 : 300 + LENGTH - 128]]), None
# Over four stretches of xPos' decay: tiles in which pairs are in one, or as many apart, or differ.
STRETCH = decay.stretch_of(encodings.get('xpos').log_decay(64))
FAR = (
  np.int32([np.r_[100:140, STRETCH - 20 : STRETCH + 60, 3 * STRETCH - 8 : 3 * STRETCH + 12]]),
  None,
)
# Keys far before their queries: as many as a tile of the forward pass has, or of the backward ones,
# which are so in both.
FAR_KEYS, FAR_BLOCKS = (
  (np.int32([np.r_[0:near, 9000 : 9000 + LENGTH - near]]), None) for near in (128, 64)
)
ROWS = (np.r_[SPARSE[0], PACKED[0]], np.r_[np.ones_like(PACKED[1]), PACKED[1]])
MASKS = {
  'causal': {},
  'bidirectional': {'causal': False},
  'window': {'window': 70},
  'blockwise': {'block': 48},
}
WIDTHS = (64, 'two parts'), (128, 'two parts'), (256, 'wide bfloat16')
# Where the defaults are another encoding, or have but one bucket, at this length.
OPTIONS = {
  'fire_s': {'psi': 'power', 'exponent': 0.3},
  't5': {'num_buckets': 8, 'max_distance': 60, 'bidirectional': True},
}


def served():
  """{case: (name, options)}: all encodings that it serves, but those done before a kernel runs."""
  for name in encodings.ENCODINGS:
    encoding = encodings.get(name, **OPTIONS.get(name, {}))
    is_here = encoding.bias is not None or encoding.log_decay is not None or name == 'nope'
    if is_here and mosaic_gpu.why_not(encoding, 64, jnp.bfloat16) is None:
      yield name, (name, OPTIONS.get(name, {}))
  yield 'fire of two layers', ('fire', {'hidden_layers': 2, 'width': 8, 'threshold': 31.5})


CASES = dict(served())
TABLES = [case for case in CASES if case not in ('nope', 'sandwich', 'xpos')]
# Layouts and widths of heads take turns, but for xPos, whose oracle takes the square of channels.
CELLS = [
  (
    case,
    mask,
    LAYOUTS[(number + turn // 2) % 2],
    WIDTHS[0 if case == 'xpos' else (number // 2 + turn) % 3],
  )
  for number, case in enumerate(CASES)
  for turn, mask in enumerate(MASKS)
]
CELLS.append(('fire', 'causal', ROWS, WIDTHS[0]))
CELLS.append(('fire', 'causal', SPARSE, (256, 'two parts')))
CELLS.append(('sandwich', 'causal', ROWS, WIDTHS[0]))
CELLS.append(('sandwich', 'window', SPARSE, (256, 'two parts')))
CELLS.append(('xpos', 'causal', FAR, WIDTHS[0]))
CELLS.append(('xpos', 'bidirectional', FAR, WIDTHS[0]))
CELLS.extend((case, 'causal', LATER, WIDTHS[0]) for case in TABLES)
CELLS.append(('fire', 'bidirectional', LATER, WIDTHS[1]))
CELLS.append(('fire', 'causal', FAR_KEYS, WIDTHS[0]))
CELLS.append(('fire', 'causal', FAR_BLOCKS, WIDTHS[0]))
CELLS.append(('fire of two layers', 'causal', FAR_BLOCKS, WIDTHS[2]))
ELEMENTWISE = {
  'fire': {},
  'fire_s': {'psi': 'identity', 'threshold': 0.0},
  't5': {},
  'kerple_log': {},
  'kerple_power': {},
  'alibi': {},
}


@pytest.fixture(autouse=True)
def _a_kernel_compiles_once(monkeypatch):
  """The interpreter would compile it for each block of the grid and each warpgroup."""
  programs, lock = {}, threading.Lock()

  def run(jaxpr, consts, *args):
    with lock:
      if id(jaxpr) not in programs:
        evaluate = jax.jit(functools.partial(jax.core.eval_jaxpr, jaxpr))
        programs[id(jaxpr)] = evaluate.lower(consts, *args).compile(), jaxpr
    programs[id(jaxpr)][0](consts, *args)

  monkeypatch.setattr(thread_map, '_run_jaxpr', run)


@pytest.fixture
def on_blackwell(monkeypatch):
  """`interpreted`, with tensor memory."""
  instructions = tensor_memory.stand_in(monkeypatch)
  yield functools.partial(interpreted, capability=mosaic_gpu_tensor_memory.BLACKWELL)
  assert 'loaded' in instructions.order


def make(name, options, channels=64):
  encoding = encodings.get(name, **options)
  size = {'num_heads': NUM_HEADS, 'head_dim': channels, 'd_model': NUM_HEADS * channels}
  return encoding, encoding.init(jax.random.key(2), **size)


def inputs(batch, channels, seed=0):
  """Returns query_BQHC, key_BKGC, value_BKGC."""
  rng = np.random.default_rng(seed)
  heads = NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS
  return [rng.normal(size=(batch, LENGTH, n, channels)).astype(np.float32) for n in heads]


def probe(arrays):
  """Returns the fixed random functional of `out_and_gradients`."""
  return np.random.default_rng(9).normal(size=arrays[0].shape).astype(np.float32)


def attend(attention, encoding, params, arrays, positions, segments, mask, **more):
  """Returns out_BQHC; positions and segments are of queries and of keys."""
  return attention(
    *arrays,
    encoding=encoding,
    params=params,
    query_position_BQ=positions[0],
    key_position_BK=positions[1],
    query_segment_BQ=segments[0],
    key_segment_BK=segments[1],
    mask=mask,
    **more,
  )


def out_and_gradients(
  attention, encoding, params, arrays, positions, segments, mask, scale=1.0, **more
):
  """Returns (out_BQHC, gradients of params and arrays) of a fixed random functional.

  Positions and segments are of queries and of keys.
  """
  probe_BQHC = scale * probe(arrays)

  def functional(params, arrays):
    if encoding.rotate is not None:
      rotated = map(encoding.rotate, [params] * 2, arrays[:2], positions)
      arrays = [*rotated, arrays[2]]
    out_BQHC = attend(attention, encoding, params, arrays, positions, segments, mask, **more)
    return (out_BQHC.astype(jnp.float32) * probe_BQHC).sum(), out_BQHC

  gradients, out_BQHC = jax.jit(jax.grad(functional, argnums=(0, 1), has_aux=True))(params, arrays)
  return out_BQHC, gradients


interpreted = functools.partial(
  out_and_gradients, mosaic_gpu.attention, interpret=interpreter.InterpretGPUParams()
)


def assert_agree(found, expected, tolerance):
  """Within a tolerance of each array's largest entry, or of 1: sums of zero mean leave noise."""
  for (path, one), other in zip(
    jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
  ):
    one, other = np.float32(one), np.float32(other)
    bound = tolerance * max(1.0, np.abs(other).max(initial=0))
    np.testing.assert_allclose(one, other, rtol=0, atol=bound, err_msg=jax.tree_util.keystr(path))


def assert_equal_the_oracle(found, case, mask, layout, arrays, dtype='two parts'):
  (out_BQHC, gradients), (name, options) = found, CASES[case]
  position_BL, segment_BL = layout
  params = make(name, options)[1]
  arrays = [np.float64(x) for x in arrays]
  visible_BQK = oracles.visible_pairs(
    position_BL, position_BL, segment_BL, segment_BL, **MASKS[mask]
  )
  of_pairs = oracles.pairs(name, params, arrays, position_BL, position_BL, visible_BQK, **options)
  expected_BQHC = oracles.attention(of_pairs.logits_BHQK, visible_BQK, arrays[2])
  np.testing.assert_allclose(np.float64(out_BQHC), expected_BQHC, atol=oracles.TOLERANCE[dtype])
  oracles.assert_gradients(gradients, of_pairs, visible_BQK, arrays, probe(arrays), dtype)


def where(layout, mask):
  """Returns what `interpreted` takes: positions and segments of queries and keys, and the mask."""
  positions, segments = ((None if x is None else jnp.asarray(x),) * 2 for x in layout)
  return positions, segments, kernels.Mask(**MASKS[mask])


@pytest.mark.parametrize(('case', 'mask', 'layout', 'width'), CELLS)
def test_outputs_and_gradients_equal_the_oracles(case, mask, layout, width):
  encoding, params = make(*CASES[case])
  channels, dtype = width
  arrays = inputs(len(layout[0]), channels)
  if dtype == 'wide bfloat16':
    arrays = [jnp.bfloat16(x) for x in arrays]

  found = interpreted(encoding, params, arrays, *where(layout, mask))

  assert_equal_the_oracle(found, case, mask, layout, arrays, dtype)


@pytest.mark.parametrize(
  ('case', 'layout', 'width'),
  [
    ('nope', ROWS, (128, 'two parts')),
    ('fire', SPARSE, (64, 'two parts')),
    ('fire', PACKED, (256, 'wide bfloat16')),
    ('fire', SPARSE, (256, 'two parts')),
    ('sandwich', SPARSE, (64, 'two parts')),
    ('xpos', FAR, (64, 'two parts')),
  ],
)
def test_products_in_tensor_memory_equal_the_oracles_too(on_blackwell, case, layout, width):
  channels, dtype = width
  arrays = inputs(len(layout[0]), channels)
  if dtype == 'wide bfloat16':
    arrays = [jnp.bfloat16(x) for x in arrays]

  found = on_blackwell(*make(*CASES[case]), arrays, *where(layout, 'causal'))

  assert_equal_the_oracle(found, case, 'causal', layout, arrays, dtype)


@pytest.mark.parametrize(
  ('capability', 'name', 'dtype', 'reason'),
  [
    ('8', 'fire', jnp.bfloat16, 'is for compute capabilities 9 and 10, not 8'),
    ('12', 'nope', jnp.bfloat16, 'not 12'),
    ('gfx942', 'nope', jnp.bfloat16, 'not gfx942'),
    ('10', 'sandwich', jnp.float32, "no room.* 'sandwich' beside heads of 256 .*float32"),
  ],
)
def test_a_gpu_that_it_is_not_for_is_told(capability, name, dtype, reason):
  encoding = make(name, {})[0]

  assert mosaic_gpu.why_not(encoding, 256, dtype, '9') is None
  assert re.search(reason, mosaic_gpu.why_not(encoding, 256, dtype, capability))


@pytest.mark.parametrize('channels', [64, 128, 256])
@pytest.mark.parametrize('case', CASES)
def test_blackwell_lacks_room_for_nothing_else(case, channels):
  encoding = make(*CASES[case], channels)[0]
  for dtype in (jnp.bfloat16, jnp.float32):
    refused = mosaic_gpu.why_not(encoding, channels, dtype, '10') is not None
    assert refused == ((case, channels, dtype) == ('sandwich', 256, jnp.float32))


def test_a_gpu_that_is_here_says_its_capability_and_the_interpreter_asks_for_none(monkeypatch):
  monkeypatch.setattr(mosaic_gpu_tensor_memory, 'capability', lambda: '8')
  encoding, params = make('nope', {})

  def traced(attention):
    jax.eval_shape(
      lambda arrays: attention(encoding, params, arrays, *where(PLAIN, 'causal')), inputs(1, 64)
    )

  with pytest.raises(errors.UserError, match='not 8'):
    traced(functools.partial(out_and_gradients, mosaic_gpu.attention))
  traced(interpreted)


@pytest.mark.parametrize('channels', [128, 256])
def test_decayed_heads_of_many_channels_equal_those_of_tiles_in_xla(channels):
  """Whose oracle takes the square of the channels."""
  encoding, params = make('xpos', {}, channels)
  given = encoding, params, inputs(1, channels), *where(FAR, 'causal')

  found = interpreted(*given)

  assert_agree(found, out_and_gradients(chunked.attention, *given), 1e-4)


def test_decayed_heads_of_many_channels_do_so_in_tensor_memory(on_blackwell):
  encoding, params = make('xpos', {}, 128)
  given = encoding, params, inputs(1, 128), *where(FAR, 'causal')

  assert_agree(on_blackwell(*given), out_and_gradients(chunked.attention, *given), 1e-4)


def test_gradients_under_a_decay_are_finite_if_those_of_what_follows_are_large():
  encoding, params = make('xpos', {})
  position_BL = np.int32([np.r_[STRETCH : STRETCH + 70, 3 * STRETCH : 3 * STRETCH + 70]])
  given = encoding, params, inputs(1, 64), *where((position_BL, None), 'causal')
  large = functools.partial(out_and_gradients, scale=1e5)

  found = large(
    functools.partial(mosaic_gpu.attention, interpret=interpreter.InterpretGPUParams()), *given
  )

  assert_agree(found, large(chunked.attention, *given), 1e-4)


@pytest.mark.parametrize('name', ['nope', 'fire', 'xpos'])
def test_it_is_differentiated_from_outside_of_a_jitted_function_and_of_a_scan(name):
  encoding, params = make(name, {})

  def layer(params, arrays):
    return attend(mosaic_gpu.attention, encoding, params, arrays, *where(PLAIN, 'causal'))

  def layers(params, arrays):
    _, out_NBQHC = jax.lax.scan(lambda *_: (None, jax.jit(layer)(params, arrays)), None, length=2)
    return out_NBQHC.astype(jnp.float32).sum()

  arrays = [jnp.bfloat16(x) for x in inputs(1, 64)]
  traced = jax.jit(jax.grad(layers, argnums=(0, 1))).trace(params, arrays)
  assert 'mosaic_gpu' in traced.lower(lowering_platforms=('cuda',)).as_text()


def test_bfloat16_stays_bfloat16_and_near_the_oracle():
  encoding, params = make('fire', {})
  arrays = [jnp.bfloat16(x) for x in inputs(1, 64)]

  found = interpreted(encoding, params, arrays, *where(SPARSE, 'causal'))

  out_BQHC, (_, of_arrays) = found
  assert {leaf.dtype for leaf in (out_BQHC, *of_arrays)} == {np.dtype(jnp.bfloat16)}
  assert_equal_the_oracle(found, 'fire', 'causal', SPARSE, arrays, 'bfloat16')


def test_a_query_that_sees_nothing_gives_zeros_and_has_no_gradient():
  encoding, params = make('kerple_log', {})
  position_BL = jnp.int32(PLAIN[0])
  query_segment_BL = jnp.int32(np.where(np.arange(LENGTH) < 70, 3, 0)[None])
  segments = query_segment_BL, jnp.zeros_like(query_segment_BL)
  where = (position_BL,) * 2, segments, kernels.Mask()

  out_BQHC, gradients = interpreted(encoding, params, inputs(1, 64), *where)

  d_query_BQHC = gradients[1][0]
  assert not np.any(out_BQHC[:, :70]) and np.all(np.any(out_BQHC[:, 70:], axis=(2, 3)))
  assert not np.any(d_query_BQHC[:, :70]) and np.any(d_query_BQHC[:, 70:])
  for leaf in jax.tree.leaves(gradients):
    assert np.isfinite(leaf).all()


@pytest.mark.parametrize('mask', [{}, {'causal': False}, {'window': 40}, {'block': 32}], ids=str)
def test_a_tiles_code_says_what_its_pairs_are(mask):
  encoding, params = make('fire', {})
  mask = kernels.Mask(**mask)
  position_BL, segment_BL = (np.int32(np.repeat(row, [3] * LENGTH, axis=1)) for row in PACKED)
  length = position_BL.shape[1]
  padding = -length % 64
  query_BNQ = mosaic_gpu_plan.query_numbers(mask, position_BL, segment_BL, padding)
  key_BNK = mosaic_gpu_plan.key_numbers(position_BL, segment_BL, padding)
  table = encoding.table(params, NUM_HEADS)

  code_IJ = mosaic_gpu_plan.codes(query_BNQ, key_BNK, table, encoding.coordinate, (64, 64))[0]

  same_LL = segment_BL[0][:, None] == segment_BL[0][None]
  visible_LL = np.asarray(mask.visible(position_BL, position_BL))[0] & same_LL
  visible_LL = np.pad(visible_LL, [(0, padding)] * 2)
  visible_IJ = visible_LL.reshape(len(code_IJ), 64, -1, 64).transpose(0, 2, 1, 3)
  visit_IJ = (code_IJ & mosaic_gpu_tile.VISIT) != 0
  whole_IJ = (code_IJ & mosaic_gpu_tile.WHOLE) != 0
  np.testing.assert_array_equal(whole_IJ, visible_IJ.all(axis=(2, 3)))
  assert not np.any(visible_IJ.any(axis=(2, 3)) & ~visit_IJ)
  position_L = np.pad(position_BL[0], (0, padding), mode='edge')
  numbers = jax.tree.map(lambda number_1: number_1[0], table.coordinate)
  x_LL = encoding.coordinate(numbers, position_L[:, None], position_L[None])
  segment_LL = np.searchsorted(table.lower_Z, x_LL) - 1
  segment_IJ = segment_LL.reshape(visible_IJ.shape[0], 64, -1, 64)
  first_IJ, end_IJ = mosaic_gpu_tile.span(code_IJ)
  assert np.all((first_IJ <= segment_IJ.min(axis=(1, 3)))[visit_IJ])
  assert np.all((segment_IJ.max(axis=(1, 3)) < end_IJ)[visit_IJ])
  # No more than that where positions rise by one in all of a block, as they do before the last two.
  rising_IJ = visit_IJ & (np.maximum(*np.indices(visit_IJ.shape)) < 4)
  np.testing.assert_array_equal(first_IJ[rising_IJ], segment_IJ.min(axis=(1, 3))[rising_IJ])
  np.testing.assert_array_equal(end_IJ[rising_IJ], segment_IJ.max(axis=(1, 3))[rising_IJ] + 1)


@pytest.mark.parametrize('query_axis', [0, 1])
@pytest.mark.parametrize('after', [False, True])
@pytest.mark.parametrize('name', ELEMENTWISE)
def test_x_from_vectors_is_x_of_a_tile_and_so_is_its_derivative(name, after, query_axis):
  encoding, params = make(name, ELEMENTWISE[name])
  table = encoding.table(params, NUM_HEADS)
  numbers = jax.tree.map(lambda number_H: number_H[0], table.coordinate)
  i_Q, j_K = jnp.int32([0, 3, 512, 700]), jnp.int32([0, 1, 3, 100, 512, 600])
  apart = None
  if after:
    i_Q += 1201
    apart = jnp.float32(i_Q - 100), jnp.float32(j_K - 100)
  shape = (4, 6) if query_axis == 0 else (6, 4)
  place = mosaic_gpu_elementwise.Place(i_Q, j_K, shape, query_axis, apart)

  unit = mosaic_gpu_elementwise.unit(encoding.coordinate, numbers)
  x, _ = mosaic_gpu_elementwise.value_and_slopes(encoding.coordinate, numbers, (), place)
  x *= unit
  read = mosaic_gpu_elementwise.reads(encoding.coordinate, table.coordinate)
  same, slopes = mosaic_gpu_elementwise.value_and_slopes(encoding.coordinate, numbers, read, place)

  def whole(numbers):
    x_QK = encoding.coordinate(numbers, i_Q[:, None], j_K[None])
    return jnp.broadcast_to(x_QK if query_axis == 0 else x_QK.T, shape)

  np.testing.assert_allclose(x, whole(numbers), rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(unit * same, x)
  assert read == tuple(range(len(jax.tree.leaves(numbers))))
  takes_long = mosaic_gpu_elementwise.takes_long(encoding.coordinate, table.coordinate)
  assert takes_long == (name not in ('alibi', 't5'))
  if slopes:
    assert_agree(slopes, jax.tree.leaves(jax.jacfwd(whole)(numbers)), 1e-5)


# What it cannot serve


@pytest.mark.parametrize(
  ('name', 'options', 'channels', 'dtype', 'reason'),
  [
    ('fire', {}, 96, jnp.bfloat16, 'heads of 64, 128 or 256 channels, not 96'),
    ('fire', {}, 64, jnp.float16, 'takes bfloat16 and float32, not float16'),
    ('sandwich', {'num_terms': 65}, 64, jnp.bfloat16, "but 'sandwich' has 130"),
    ('fire', {'hidden_layers': 3}, 64, jnp.bfloat16, "needs a table of the bias, which 'fire'"),
    ('fire', {'hidden_layers': 2, 'width': 40}, 64, jnp.bfloat16, "'fire' has 1681"),
  ],
)
def test_what_it_cannot_serve_it_refuses(name, options, channels, dtype, reason):
  encoding, params = make(name, options, channels)
  arrays = [jnp.asarray(x, dtype) for x in inputs(1, channels)]
  position_BL = jnp.int32(PLAIN[0])

  assert reason in mosaic_gpu.why_not(encoding, channels, dtype)
  with pytest.raises(errors.UserError, match=f"{reason}.*; use implementation='chunked'"):
    mosaic_gpu.attention(
      *arrays,
      encoding=encoding,
      params=params,
      query_position_BQ=position_BL,
      key_position_BK=position_BL,
      query_segment_BQ=None,
      key_segment_BK=None,
      mask=kernels.Mask(),
    )


def test_a_decay_beside_a_bias_it_refuses():
  encoding = encodings.get('alibi')._replace(log_decay=encodings.get('xpos').log_decay)

  assert "a decay or a bias, but 'alibi' has both" in mosaic_gpu.why_not(encoding, 64, jnp.bfloat16)
