"""What `experiments/attention_gpu` reads in a listing of a GPU's instructions."""

import json

import pytest

from experiments.attention_gpu import run, sass
from experiments.attention_gpu.sass import Cost, Work


def listing(*parts):
  """Returns a listing, of labels ('L_x_1:') and of instructions, each as often as its number."""
  lines, address = ['//--- .text', '\t.section .text._kernel'], 0
  for part in parts:
    if isinstance(part, str):
      lines.append(f'.{part}')
      continue
    text, count = part
    for _ in range(count):
      lines.append(f'        /*{address:04x}*/                   {text} ;')
      address += 16
  return '\n'.join(lines)


# The loop over tiles of a kernel, made small: whether to visit it; by pairs, near or after keys, a
# loop over further lines, a product, the mask, weights, the gradient of a line, which may go to
# memory, a loop over those of further lines, and a product; or all of it of far keys, of one line;
# the end; then waiting for a copy, which jumps back to it.
KERNEL = [
  ('MOV R1, R2', 9),
  'L_x_1:',
  ('@!P1 BRA `(.L_x_20)', 1),
  'L_x_2:',
  ('MOV R1, R2', 3),
  ('BRA.U !UP1, `(.L_x_9)', 1),
  ('@P2 BRA `(.L_x_12)', 1),
  ('@P2 BRA `(.L_x_3)', 1),
  ('I2FP.F32.S32 R1, R2', 40),
  ('MUFU.LG2 R1, R2', 40),
  ('BRA `(.L_x_4)', 1),
  'L_x_3:',
  ('FFMA R1, R2, R3, R4', 33),
  ('MUFU.LG2 R1, R2', 40),
  ('I2FP.F32.S32 R1, R2', 2),
  'L_x_4:',
  ('@!P3 BRA `(.L_x_6)', 1),
  'L_x_5:',
  ('FSETP.GT.AND P1, PT, R1, R2, PT', 33),
  ('@P1 BRA `(.L_x_5)', 1),
  'L_x_6:',
  ('HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24', 8),
  ('@P4 BRA `(.L_x_7)', 1),
  ('ISETP.GE.AND P1, PT, R1, R2, PT', 64),
  'L_x_7:',
  ('@P1 MUFU.EX2 R1, R2', 32),
  ('SHFL.BFLY PT, R1, R2', 4),
  ('@P6 BRA `(.L_x_11)', 1),
  ('BAR.SYNC 0x1', 5),
  ('FADD R1, R2, R3', 7),
  'L_x_11:',
  ('@P1 BRA `(.L_x_15)', 1),
  'L_x_8:',
  ('FSETP.GT.AND P1, PT, R1, R2, PT', 32),
  ('SHFL.BFLY PT, R1, R2', 4),
  ('BAR.SYNC 0x1', 5),
  ('@P1 BRA `(.L_x_8)', 1),
  'L_x_15:',
  ('HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR4], R24', 4),
  ('BRA `(.L_x_9)', 1),
  'L_x_12:',
  ('I2FP.F32.S32 R1, R2', 6),
  ('MUFU.LG2 R1, R2', 6),
  ('HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24', 8),
  ('@P4 BRA `(.L_x_13)', 1),
  ('ISETP.GE.AND P1, PT, R1, R2, PT', 64),
  'L_x_13:',
  ('@P1 MUFU.EX2 R1, R2', 32),
  ('SHFL.BFLY PT, R1, R2', 4),
  ('HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR4], R24', 4),
  'L_x_9:',
  ('SYNCS.ARRIVE R1', 2),
  ('@P1 BRA `(.L_x_1)', 1),
  ('EXIT', 1),
  'L_x_20:',
  ('NANOSLEEP', 3),
  ('BRA `(.L_x_2)', 1),
]
PRODUCTS = 8 * 64 + 4 * 32


def test_instructions_are_counted_by_what_they_are_done_for():
  found = sass.work(sass.parse(listing(*KERNEL)))

  ends, by_pairs = 1 + 4 + 1 + 3, 1 + 1 + 9 + 32 + 5 + 1 + 5
  assert found == Work(
    near=Cost(ends + by_pairs + 81, special=40 + 32, products=PRODUCTS),
    after=Cost(ends + by_pairs + 75, special=40 + 32, products=PRODUCTS),
    far=Cost(ends + 12 + 9 + 40, special=6 + 32, products=PRODUCTS),
    mask=Cost(64),
    further_line=Cost(34 + 42),
    other_line=Cost(12),
  )


def test_a_tile_without_a_bias_is_one_thing_wherever_its_keys_are():
  (first, *_) = (n for n, part in enumerate(KERNEL) if part[0].startswith('HGMMA'))
  (last,) = (n for n, part in enumerate(KERNEL) if part == 'L_x_9:')
  of_tile = [('@P4 BRA `(.L_x_7)', 1), ('ISETP.GE.AND P1, PT, R1, R2, PT', 64), 'L_x_7:']
  kernel = [*KERNEL[:6], KERNEL[first], *of_tile, ('FADD R1, R2, R3', 9), *KERNEL[last:]]

  found = sass.work(sass.parse(listing(*kernel)))

  cost = Cost(1 + 4 + 9 + 9 + 3, products=8 * 64)
  assert found == Work(near=cost, after=cost, mask=Cost(64))


def test_a_kernel_of_other_loops_is_refused():
  again = [('SHFL.BFLY PT, R1, R2', 4), ('@P1 BRA `(.L_x_30)', 1)]
  kernel = [*KERNEL[:-7], 'L_x_30:', *again, *KERNEL[-7:]]

  with pytest.raises(ValueError, match='1 loops over lines of a bias, 2 of a gradient'):
    sass.work(sass.parse(listing(*kernel)))


def test_the_tables_are_those_that_were_counted(monkeypatch):
  """Their columns of the shortest sequence, whose plans are made at once."""
  counted = json.loads((run.HERE / 'attention_gpu.json').read_text())
  readme = (run.HERE / 'README.md').read_text()

  for line in run.of_a_tile(counted):
    assert f'\n    {line}\n' in readme
  monkeypatch.setattr(run, 'LENGTHS', run.LENGTHS[:1])
  _, _, *rows = run.of_rows(counted)
  assert rows
  for row in rows:
    case, cells = row[:22], row[22:].split()
    (line,) = (
      line
      for line in readme.splitlines()
      if line.startswith(f'    {case}') and 'x' not in line[26:]
    )
    columns = line[26:].split()
    assert [columns[0], columns[len(columns) // 2]] == cells
