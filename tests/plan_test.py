"""What tiles are told to do before a kernel runs, against every pair that they hold."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from lex_fire import encodings, kernels
from lex_fire.kernels import plan

QUERY_BLOCK, KEY_BLOCK = 8, 16
MASKS = {
  'causal': {},
  'blockwise': {'block': 12},
  'window': {'window': 9},
  'bidirectional': {'causal': False},
}
TABLES = {
  'fire': ('fire', {}),
  'fire 2 layers': ('fire', {'hidden_layers': 2}),
  'fire identity, no threshold': ('fire', {'psi': 'identity', 'threshold': 0.0}),
  't5': ('t5', {}),
  't5 bidirectional': ('t5', {'bidirectional': True}),
}


def positions(seed, length=50):
  """Rows in order, from anywhere, packed, and in no order at all."""
  rng = np.random.default_rng(seed)
  start = int(rng.integers(0, 5000))
  return np.stack(
    [
      np.arange(start, start + length),
      np.concatenate([np.arange(20), np.arange(length - 20)]),
      rng.integers(0, [60, 3000][seed % 2], length),
    ]
  ).astype(np.int32)


def planned(
  mask,
  position_BL,
  segment_BL=None,
  table=None,
  coordinate=None,
  rate=None,
  stretch=None,
  part=None,
  band=None,
  far=False,
):
  x_BL1C = jnp.zeros((*position_BL.shape, 1, 8))
  queries, keys = plan.cut(
    kernels.Mask(**mask),
    QUERY_BLOCK,
    KEY_BLOCK,
    stretch,
    (x_BL1C, position_BL, segment_BL),
    (x_BL1C, x_BL1C, position_BL, segment_BL),
  )
  blocks = QUERY_BLOCK, KEY_BLOCK
  of_bias = table, coordinate, part or blocks, rate, band, far
  made = plan.make(kernels.Mask(**mask), *blocks, queries, keys, *of_bias)
  return jax.tree.map(np.array, made)


def with_segments(case, seed, mask, position_BL, documents_BL=None, **options):
  """Returns the plan of rows under a table, and the segment of each pair, _BQK."""
  name, of_encoding = TABLES[case]
  encoding = encodings.get(name, **of_encoding)
  params = encoding.init(jax.random.key(seed), num_heads=2, head_dim=8, d_model=16)
  table = encoding.table(params, 2)
  made = planned(mask, position_BL, documents_BL, table, encoding.coordinate, **options)
  numbers = jax.tree.map(lambda number_1: number_1[0], table.coordinate)
  x_BQK = encoding.coordinate(numbers, position_BL[:, :, None], position_BL[:, None])
  return made, np.searchsorted(table.lower_Z, x_BQK) - 1


def tiles(number_BQK):
  """Yields ((I, J), the numbers of a tile) of every tile."""
  for i in range(-(-number_BQK.shape[1] // QUERY_BLOCK)):
    for j in range(-(-number_BQK.shape[2] // KEY_BLOCK)):
      rows = slice(i * QUERY_BLOCK, (i + 1) * QUERY_BLOCK)
      yield (i, j), number_BQK[:, rows, j * KEY_BLOCK : (j + 1) * KEY_BLOCK]


def parts(number_BQK, made, part):
  """Yields ((I, J), the numbers of a part, its span in a plan) of every part that has some."""
  down, across = QUERY_BLOCK // part[0], KEY_BLOCK // part[1]
  for at, tile_BQK in tiles(number_BQK):
    for n, (column, row) in enumerate(itertools.product(range(across), range(down))):
      own = tile_BQK[:, row * part[0] :][:, : part[0], column * part[1] :][..., : part[1]]
      if own.size:
        yield at, own, (made.part_low_IJY[at][n], made.part_high_IJY[at][n])


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('mask', MASKS)
def test_a_tile_with_a_visible_pair_is_never_hidden(mask, seed):
  position_BL = positions(seed)
  segment_BL = np.sort(np.random.default_rng(seed).integers(0, 3, position_BL.shape), axis=1)

  for segments in (None, np.int32(segment_BL)):
    made = planned(MASKS[mask], position_BL, segments)
    visible_BQK = oracles.visible_pairs(position_BL, position_BL, segments, segments, **MASKS[mask])
    for at, visible in tiles(visible_BQK):
      assert made.high_IJ[at] > 0 or not visible.any(), at


def test_a_row_in_order_visits_no_tile_without_a_visible_pair():
  position_BL = np.arange(64, dtype=np.int32)[None]

  for mask in MASKS.values():
    visible_BQK = np.broadcast_to(
      oracles.visible_pairs(position_BL, position_BL, **mask), (1, 64, 64)
    )
    made = planned(mask, position_BL)
    for at, visible in tiles(visible_BQK):
      assert (made.high_IJ[at] > 0) == visible.any(), at


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('mask', MASKS)
@pytest.mark.parametrize('case', TABLES)
def test_a_part_has_the_segment_of_every_visible_pair_and_a_tile_those_of_its_parts(
  case, mask, seed
):
  part, position_BL = (QUERY_BLOCK // 2, KEY_BLOCK // 4), positions(seed)
  visible_BQK = oracles.visible_pairs(position_BL, position_BL, **MASKS[mask])

  made, segment_BQK = with_segments(case, seed, MASKS[mask], position_BL, part=part)

  for at, own, found in parts(np.where(visible_BQK, segment_BQK, -1), made, part):
    if (own >= 0).any():
      assert found[0] <= own[own >= 0].min() and own.max() < found[1], at
  visited = made.high_IJ > 0
  assert (made.part_low_IJY < made.part_high_IJY)[visited].all()
  assert (made.low_IJ == made.part_low_IJY.min(axis=2))[visited].all()
  assert (made.high_IJ == made.part_high_IJY.max(axis=2))[visited].all()


def test_a_tile_is_in_order_if_its_positions_rise_by_one_in_every_row():
  rows = np.stack([np.arange(48), np.arange(90, 138)]).astype(np.int32)
  packed = rows.copy()
  packed[1, 30:] -= 30  # within the fourth block of queries, and the second of keys

  for position_BL, out_of_order in ((rows, ()), (packed, (3, 1)), (rows[:, ::-1], None)):
    found = planned({'causal': False}, position_BL).in_order_IJ
    expected = np.ones((6, 3))
    if out_of_order is None:
      expected[:] = 0
    elif out_of_order:
      expected[out_of_order[0]] = expected[:, out_of_order[1]] = 0
    np.testing.assert_array_equal(found, expected)


BAND = {True: plan.Band(0, 6), False: plan.Band(-6, 12)}
WIDE = 4  # of its blocks
by_distance = pytest.mark.parametrize('causal', [True, False])


def expected_codes(position_BL, causal, end):
  """Returns band_IJ of rows in order, of an encoding whose rate is one before an end."""
  band, expected = BAND[causal], []
  both = np.broadcast_arrays(position_BL[:, :, None], position_BL[:, None])
  for (_, i_BQK), (_, j_BQK) in zip(*map(tiles, both), strict=True):
    apart_BQK = i_BQK - j_BQK
    blocks_BQK = apart_BQK[:, ::WIDE, ::WIDE] // WIDE  # of their first pairs
    later = i_BQK.max() if causal else max(i_BQK.max(), j_BQK.max())
    is_in_band = (
      later < end
      and (apart_BQK == apart_BQK[0]).all()
      and not apart_BQK[0, 0, 0] % WIDE
      and blocks_BQK.max() < band.first + band.count
      and (blocks_BQK.min() >= band.first or causal)
      and (apart_BQK.max() >= 0 or not causal)
    )
    expected.append(blocks_BQK.max() - band.first + 1 if is_in_band else 0)
  return expected


def in_band(causal, position_BL, table=None, rate=None, segment_BL=None):
  options = {'rate': rate, 'band': BAND[causal], 'part': (WIDE, WIDE)}
  return planned({'causal': causal}, position_BL, segment_BL, table, **options).band_IJ


@by_distance
def test_a_tile_is_in_the_band_if_its_later_positions_have_the_rate_of_the_first(causal):
  """Of FIRE before its threshold, which is within a block; of two heads, before both."""
  encoding = encodings.get('fire', threshold=29.0)
  params = encoding.init(jax.random.key(0), num_heads=2, head_dim=8, d_model=16)
  table, (_, rate) = encoding.table(params, 2)._replace(lower_Z=None), encoding.factors
  of_two_heads = table._replace(
    coordinate=jax.tree.map(lambda number_1: number_1 * jnp.array([1.0, 0.9]), table.coordinate)
  )
  row_1L = np.arange(48, dtype=np.int32)[None]

  for given, end in ((table, 29), (of_two_heads, 26.1), (None, np.inf)):
    found = in_band(causal, row_1L, given, rate if given else None)
    expected = expected_codes(row_1L, causal, end)
    assert 0 < np.count_nonzero(expected) < len(expected)
    np.testing.assert_array_equal(found, np.reshape(expected, found.shape))
  last_1L = np.int32(2**31 - 48) + row_1L  # after which there is none
  assert not in_band(causal, last_1L, table, rate).any()


@by_distance
def test_a_tile_is_in_the_band_if_it_lies_on_its_blocks_in_every_row(causal):
  """Of two documents, the second begins on a block or between two, in one row or in both."""
  rows = [np.arange(48), *(np.r_[np.arange(32), start : start + 16] for start in (36, 38))]

  for chosen in ([0], [1], [2], [1, 1], [2, 2], [0, 1], [0, 2]):
    position_BL = np.stack([rows[number] for number in chosen]).astype(np.int32)
    found = in_band(causal, position_BL)
    expected = expected_codes(position_BL, causal, np.inf)
    np.testing.assert_array_equal(found, np.reshape(expected, found.shape))
  assert not in_band(causal, rows[0][None, ::-1].astype(np.int32)).any()


@by_distance
def test_a_row_that_sees_none_of_a_tile_may_have_any_positions_there(causal):
  """Of two rows of documents; where only one sees a tile, it is as if alone."""
  starts = [0], [*range(0, 32, 4), 32]
  rows = [
    [number - max(start for start in of_row if start <= number) for number in range(64)]
    for of_row in starts
  ]
  documents_BL = np.int32([np.searchsorted(of_row, range(64), 'right') for of_row in starts])
  position_BL = np.int32(rows)
  alone, other = (
    in_band(causal, position_BL[row : row + 1], segment_BL=documents_BL[row : row + 1])
    for row in range(2)
  )
  sees_IJ = planned({'causal': causal}, position_BL[1:], documents_BL[1:]).high_IJ > 0

  found = in_band(causal, position_BL, segment_BL=documents_BL)

  assert (alone[~sees_IJ] > 0).any() and (alone[sees_IJ & (other == 0)] > 0).any()
  np.testing.assert_array_equal(found, np.where(sees_IJ & (other == 0), 0, alone))


def test_a_band_has_the_span_of_its_tiles():
  encoding = encodings.get('t5')
  params = encoding.init(jax.random.key(0), num_heads=2, head_dim=8, d_model=16)
  row_1L, x_of = (
    np.arange(48, dtype=np.int32)[None],
    (encoding.table(params, 2), encoding.coordinate),
  )

  made = planned({}, row_1L, None, *x_of, band=BAND[True], part=(WIDE, WIDE))
  without = planned({}, row_1L, None, *x_of, part=(WIDE, WIDE))

  there = made.band_IJ > 0
  assert (made.band_low, made.band_high) == (made.low_IJ[there].min(), made.high_IJ[there].max())
  assert made.band_high > made.band_low + 1
  assert without.band_high == without.band_IJ.max() == 0


@by_distance
@pytest.mark.parametrize('case', [None, 'fire'])
def test_a_tile_is_far_if_it_is_one_line_in_order_and_its_keys_are_a_tile_away(causal, case):
  """Of a row and of two, whose second is of two documents; a far tile is in no band."""
  row_1L = np.arange(96, dtype=np.int32)[None]
  packed_1L, documents_1L = row_1L % 56, row_1L // 56
  options = {'far': True, 'band': BAND[causal], 'part': (WIDE, WIDE)}
  for position_BL, documents_BL in (
    (row_1L, None),
    (np.concatenate([row_1L, packed_1L]), np.concatenate([0 * row_1L, documents_1L])),
  ):
    if case is None:
      made = planned({'causal': causal}, position_BL, documents_BL, **options)
    else:
      given = case, 3, {'causal': causal}, position_BL, documents_BL
      made, _ = with_segments(*given, **options)
    both = np.broadcast_arrays(position_BL[:, :, None], position_BL[:, None])
    of_tiles = zip(*map(tiles, both), strict=True)
    for (at, i_BQK), (_, j_BQK) in of_tiles:
      apart_BQK = i_BQK - j_BQK
      is_far = (
        made.high_IJ[at] - made.low_IJ[at] == 1
        and made.in_order_IJ[at]
        and apart_BQK.min() >= KEY_BLOCK
      )
      assert made.far_IJ[at] == is_far, at
    assert 0 < made.far_IJ.sum() < made.far_IJ.size
    assert not (made.far_IJ * made.band_IJ).any()


@pytest.mark.parametrize('case', TABLES)
def test_a_part_has_no_segment_that_a_row_in_order_does_not_reach(case):
  """Nor what only a hidden pair reaches."""
  position_BL = np.arange(700, 764, dtype=np.int32)[None]
  visible_BQK = oracles.visible_pairs(position_BL, position_BL)
  part = QUERY_BLOCK // 4, KEY_BLOCK // 4

  made, segment_BQK = with_segments(case, 3, {}, position_BL, part=part)

  for at, own, found in parts(np.where(visible_BQK, segment_BQK, -1), made, part):
    if (own >= 0).any():
      assert found == (own[own >= 0].min(), own.max() + 1), at


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('mask', MASKS)
@pytest.mark.parametrize('case', TABLES)
def test_a_part_that_is_hidden_has_a_segment_of_its_tile(case, mask, packed):
  position_BL = np.arange(700, 764, dtype=np.int32)[None]
  part = QUERY_BLOCK // 4, KEY_BLOCK // 4
  documents_BL = np.arange(64, dtype=np.int32)[None] // (20 if packed else 64)  # 20: whole parts
  visible_BQK = oracles.visible_pairs(
    position_BL, position_BL, documents_BL, documents_BL, **MASKS[mask]
  )

  made, segment_BQK = with_segments(case, 3, MASKS[mask], position_BL, documents_BL, part=part)

  hidden = [
    (found, made.low_IJ[at])
    for at, own, found in parts(np.where(visible_BQK, segment_BQK, -1), made, part)
    if made.high_IJ[at] and (own < 0).all()
  ]
  assert all(found == (low, low + 1) for found, low in hidden)
  assert bool(hidden) == (packed or mask != 'bidirectional')


def test_a_span_has_every_number_of_stretches_that_a_query_is_after_a_key():
  for seed in range(4):
    position_BL = positions(seed)
    made = planned({}, position_BL, stretch=7)

    apart_BQK = position_BL[:, :, None] // 7 - position_BL[:, None] // 7
    visible_BQK = oracles.visible_pairs(position_BL, position_BL)
    for at, (apart, visible) in zip(
      (at for at, _ in tiles(apart_BQK)),
      zip((x for _, x in tiles(apart_BQK)), (x for _, x in tiles(visible_BQK)), strict=True),
      strict=True,
    ):
      if visible.any():
        assert made.low_IJ[at] <= apart[visible].min(), at
        assert apart[visible].max() < made.high_IJ[at], at


def test_a_span_of_stretches_ends_where_nothing_is_left_of_a_key():
  position_BL = np.array([[0] * KEY_BLOCK + [2**30] * KEY_BLOCK], np.int32)

  made = planned({}, position_BL, stretch=7)

  assert made.high_IJ.max() == made.low_IJ.max() + 1 == 2**15 - 1
  assert made.high_IJ[-1, 0] == 2**15 - 1


@pytest.mark.parametrize('mask', MASKS)
def test_a_block_is_fetched_only_for_a_tile_that_is_visited(mask):
  """A row holds the block of the tile that it visits, and changes blocks for no other tile."""
  made = planned(MASKS[mask], positions(0)[:1])

  for visited_IJ, hold_IJ in (
    (made.high_IJ > 0, made.key_IJ),
    ((made.high_IJ > 0).T, made.query_IJ.T),
  ):
    for visited_J, hold_J in zip(visited_IJ, hold_IJ, strict=True):
      columns = np.flatnonzero(visited_J)
      np.testing.assert_array_equal(hold_J[columns], columns)
      assert set(hold_J) == set(columns) or not len(columns)
      assert (np.diff(hold_J) >= 0).all()
