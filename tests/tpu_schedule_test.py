"""What `experiments/attention_tpu/schedule.py` reads in a listing of a TPU's bundles."""

import json

import pytest

from experiments.attention_tpu import bundles, schedule


def listing(*stretches):
  """Returns a listing: a legend, then so many bundles of each (tag, depth, how many).

  A fourth says that the last of them branches.
  """
  lines, address = ['= control target key start', 'LB: loop body', ''], 0
  for tag, depth, count, *branches in stretches:
    for number in range(count):
      place, is_last = '> ' * depth, number == count - 1
      does = 'sbr.rel (%p1) target = $region1' if branches and is_last else '%s1 = smov 0'
      lines.append(f'  0x{address:x} {tag if number == 0 else ""}   : {place}{{ {does} }}')
      address += 1
  return '\n'.join(lines)


# A kernel under FIRE, made small: the segments of a band and its heads, with a loop over the rest
# of few breakpoints, and over rows of lines; what is done once, and the heads of a tile in the
# band; what is done once by pairs, in order and not, heads under one line, the list of parts, the
# segments of those of many breakpoints, and heads under pieces: parts of few, of many, and what
# adds up a gradient with a loop over breakpoints; what is done with it, in order and not; and the
# same of the band.
KERNEL = [
  ('', 0, 5),
  ('LB', 1, 30),
  ('LB', 2, 10),  # segments
  ('LB', 3, 11),
  ('PF', 1, 2),
  ('LB', 2, 3),  # a band
  ('LB', 3, 30),
  ('LB', 4, 17),
  ('', 3, 4),
  ('LB', 3, 6),
  ('LB', 4, 25),
  ('', 2, 700),
  ('PF', 1, 1200),  # of a row
  ('PF', 1, 400),
  ('LB', 2, 2800),  # in the band
  ('PF', 1, 1500),
  ('PF', 1, 2700),
  ('LB', 2, 2600),  # one line
  ('LB', 2, 17),  # list
  ('LB', 2, 20),  # segments
  ('LB', 3, 45),
  ('', 2, 5),
  ('LB', 2, 500),  # pieces
  ('LB', 3, 100),
  ('LB', 4, 47),
  ('', 3, 4),
  ('LB', 3, 6),
  ('LB', 4, 250),
  ('', 2, 2500),
  ('LB', 3, 35),
  ('LB', 4, 66),
  ('PF', 1, 8),
  ('PF', 1, 900),
  ('PF', 1, 4000),
  ('LB', 2, 10),  # segments
  ('LB', 3, 11),
  ('LB', 2, 780),  # a band's gradient
  ('LB', 3, 20),
  ('LB', 4, 22),
  ('PF', 1, 130),
  ('LB', 2, 590),  # of a row
  ('PF', 1, 130),
  ('', 0, 2),
]


def test_bundles_are_counted_by_loop():
  grid = bundles.parse(listing(*KERNEL))

  *_, segments, pieces, _, _, _ = grid.inner
  assert [loop.own for loop in grid.inner] == [10, 703, 2800, 2600, 17, 25, 3000, 10, 780, 590]
  assert segments.inner[0].own == 45
  assert [parts.own for parts in pieces.inner] == [104, 6, 35]
  assert [parts.inner[0].own for parts in pieces.inner] == [47, 250, 66]
  assert [count for count in grid.stretches if count] == [
    *(30, 2, 1200, 400, 1500, 2700, 8, 900, 4000, 130, 130 + 2)
  ]


def test_bundles_after_a_branch_belong_to_its_loop():
  """Those that a branch still issues stand at no depth."""
  grid = bundles.parse(listing(('LB', 1, 3), ('LB', 2, 7), ('', 0, 4), ('', 1, 2), ('', 0, 1)))

  assert grid.inner[0].own == 11
  assert grid.own == 6


def test_the_cost_of_a_tile_is_what_is_done_once_and_what_each_head_takes():
  found = bundles.cost(bundles.parse(listing(*KERNEL)), has_bias=True)

  assert found == bundles.Work(
    tile=400 + 1500 + 900,
    tile_in_band=400,
    list_part=17,
    find_part=25,
    find=45,
    find_in_band=11,
    line=1300,
    pieces=3000,
    in_band=1400,
    band=703 + 780,
    of_pairs=bundles.Lines(few=104, rest=47, many=256, add_part=35, add=66),
    of_band=bundles.Lines(few=34, rest=17, many=31, add_part=20, add=22),
  )
  assert bundles.work(json.loads(json.dumps(found))) == found
  reach = bundles.Work(
    tile=5,
    tile_in_band=4,
    list_part=8,
    find_part=2,
    find=23,
    find_in_band=19,
    line=3,
    pieces=2,
    in_band=4,
    band=0.5,
    of_pairs=bundles.Lines(few=4, rest=7, many=2, add_part=6, add=38),
    of_band=bundles.Lines(few=1, rest=2, many=3, add_part=4, add=24),
  )
  once = 5 * 2800 + 4 * 400 + 8 * 17 + 2 * 25 + 23 * 45 + 19 * 11
  of_pairs = 4 * 104 + 7 * 47 + 2 * 256 + 6 * 35 + 38 * 66
  of_band = 1 * 34 + 2 * 17 + 3 * 31 + 4 * 20 + 24 * 22
  of_head = 3 * 1300 + 2 * 3000 + 4 * 1400 + 0.5 * 1483 + of_pairs + of_band
  assert bundles.cycles(found, reach, heads=8) == once + 8 * of_head


def test_the_cost_of_a_far_tile_is_apart_from_what_all_tiles_take():
  at = KERNEL.index(('PF', 1, 400))
  in_all, far = ('PF', 1, 400, 'branches'), [('', 1, 161), ('LB', 2, 2200), ('PF', 1, 300)]

  found = bundles.cost(bundles.parse(listing(*KERNEL[:at], in_all, *far, *KERNEL[at + 1 :])), True)

  without = bundles.cost(bundles.parse(listing(*KERNEL)), has_bias=True)
  assert found == without._replace(tile_far=400 + 161 + 300, far=1100)


def test_a_band_of_many_blocks_is_not_taken_for_heads():
  """Laid out and divided, it is as long as heads are."""
  longer = {('LB', 2, 3): ('LB', 2, 1503), ('LB', 2, 780): ('LB', 2, 1780)}

  found = bundles.cost(bundles.parse(listing(*(longer.get(part, part) for part in KERNEL))), True)

  short = bundles.cost(bundles.parse(listing(*KERNEL)), has_bias=True)
  assert found == short._replace(band=short.band + 1500 + 1000)


def test_a_kernel_of_other_loops_is_refused():
  with pytest.raises(ValueError, match='3 loops over heads, not 1'):
    bundles.cost(bundles.parse(listing(*KERNEL)), has_bias=False)


def test_of_splash_the_longest_stretch_counts():
  grid = bundles.parse(listing(('', 0, 2), ('LB', 1, 30), ('PF', 1, 1680), ('PF', 1, 248)))

  assert bundles.splash_cost(grid) == 1680


def test_the_tables_are_those_that_were_counted(monkeypatch):
  """Their columns of short sequences, whose plans are made at once."""
  counted = json.loads((schedule.HERE / 'schedule.json').read_text())
  monkeypatch.setattr(schedule, 'LENGTHS', [2048, 8192])

  readme = (schedule.HERE / 'README.md').read_text()

  for line in schedule.table(counted).splitlines():
    assert f'\n    {line}'.rstrip(' ') in readme
