"""How long does FIRE make a tile of a TPU's attention kernel, by the compiler's own schedule?

And how long is one without a bias beside that of JAX's own kernel, splash attention?

    make test-tpu  # makes .venv-tpu
    JAX_PLATFORMS=cpu .venv-tpu/bin/python -m experiments.attention_tpu.schedule

A TPU's core issues one bundle of instructions a cycle, in the order in which the compiler has put
them. It can be asked to write its bundles down; counted by loop, and each loop as often as the plan
says that it runs, they are the cycles of attention, but for what waits for memory. Writes
schedule.json beside this file and prints the table.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import SingleDeviceSharding

from experiments.attention_tpu import run
from lex_fire import encodings, zoo
from lex_fire.kernels import (
  Mask,
  mosaic_tpu_band,
  mosaic_tpu_bias,
  mosaic_tpu_call,
  mosaic_tpu_far,
  mosaic_tpu_heads,
  mosaic_tpu_size,
  mosaic_tpu_x,
  plan,
)
from lex_fire.kernels.mosaic_tpu_size import LANES

HERE = pathlib.Path(__file__).parent
LENGTHS = [2048, 8192, 32_768, 131_072]
# As the compiler names what jax.grad makes of attention: forward, and backward for queries, keys.
KERNELS = {'forward': 'jvp__.2', 'queries': 'transpose_jvp___.2', 'keys': 'transpose_jvp___.3'}
CASES = ['fire', 'fire 2 layers', 'nope']  # as in run.CASES
# The same of JAX's kernel.
SPLASH = {
  'forward': 'splash_mqa_fwd_residuals.1',
  'queries': 'splash_mqa_dq_no_residuals.1',
  'keys': 'splash_mqa_dkv_no_residuals.1',
}
BATCH = 8  # sequences: with one, its heads would be two blocks, for chips of two cores
LONG = 1000  # bundles of a loop over heads at least
SHORT = 100  # and more than these of what is done once a tile


class Loop(NamedTuple):
  """A loop of a schedule.

  Attributes:
    stretches: bundles between its branches that are in no loop within it, in order; None where such
      a loop stands.
    inner: the loops within it.
  """

  stretches: list[int | None]
  inner: list['Loop']

  @property
  def own(self) -> int:
    """Bundles that are in no loop within it."""
    return sum(count or 0 for count in self.stretches)


LINE = re.compile(r'\s*(?:0x[0-9a-f]+|\d+)\s+(LB|LH|LE|PB|PF|CT)?\s*:\s*((?:> ?)*)\{')


# What a bundle computes of floating numbers, a register of REGISTER each: no comparison, no choice.
ARITHMETIC = re.compile(r'\bv(?:add|sub|mul|max|min|pow2|log2|rcp|rsqrt)[\w.]*\.(?:f32|bf16)\b')
REGISTER = 8 * 128
# Products of a head in a tile, of queries by keys by channels.
PRODUCTS = {'forward': 2, 'queries': 3, 'keys': 4}
# And of how many of them the columns of a far tile's bias are a part.
FAR_PRODUCTS = {'forward': 1, 'queries': 2, 'keys': 1}


def arithmetic(bundle: str) -> int:
  """Returns how many registers a bundle computes."""
  return len(ARITHMETIC.findall(bundle))


def parse(listing: str, weigh: Callable[[str], int] = lambda bundle: 1) -> Loop:
  """Returns the outermost loop, over the steps of the grid, of a listing of final bundles.

  Args:
    listing: of a kernel.
    weigh: what is counted of a bundle; itself by default.
  """
  stack, branches = [Loop([0], [])], False
  for line in listing.splitlines():
    if not (found := LINE.match(line)):
      continue
    tag, depth = found[1], found[2].count('>')
    # Bundles after a branch that are issued before it is taken have no depth of their own.
    depth = depth or len(stack) - 1
    del stack[depth + 1 :]
    if tag == 'LB':
      del stack[depth:]
      stack[-1].stretches.append(None)
      stack[-1].inner.append(Loop([0], []))
      stack.append(stack[-1].inner[-1])
    elif tag == 'PF' or branches or stack[-1].stretches[-1] is None:
      stack[-1].stretches.append(0)
    branches = 'sbr.rel' in line
    stack[-1].stretches[-1] += weigh(line)
  return stack[0].inner[0]


class Lines(NamedTuple):
  """What pieces of a bias take, of a head in a tile, or what a sequence asks of it.

  Attributes:
    few: a part of few breakpoints.
    rest: a breakpoint of it, beyond those that are gone through together.
    many: a part of many.
    add_part: either, whose gradient of the table is added up.
    add: a breakpoint of it.
  """

  few: float = 0
  rest: float = 0
  many: float = 0
  add_part: float = 0
  add: float = 0


class Work(NamedTuple):
  """The bundles of each kind of work of a kernel, or how often a sequence has it done.

  Attributes:
    tile: what is done once in a tile whose positions are in order, where its bias is made for it.
    tile_in_band: likewise, where it is that of the band.
    tile_far: likewise, where its products have it.
    list_part: likewise, for a part of a tile under pieces.
    find_part: likewise, for a part of many breakpoints, to find the segments of all heads.
    find: likewise, for a breakpoint of such a part.
    find_in_band: once for a breakpoint of a band that has many.
    line: a head in a tile under one line, or without a bias, of those that are visited together.
    pieces: a head in a tile under several lines, but for what follows.
    in_band: a head in a tile of the band.
    far: a head in a far tile, if products have its bias.
    band: a head's band, but for what follows.
    of_pairs: what else pieces of a head take in a tile.
    of_band: likewise, in a band, which is one part.
  """

  tile: float
  tile_in_band: float = 0
  tile_far: float = 0
  list_part: float = 0
  find_part: float = 0
  find: float = 0
  find_in_band: float = 0
  line: float = 0
  pieces: float = 0
  in_band: float = 0
  far: float = 0
  band: float = 0
  of_pairs: Lines = Lines()
  of_band: Lines = Lines()


OF_TILE = 7  # kinds of work that are done once for all heads


def work(values: list) -> Work:
  """Returns what JSON made a list of."""
  return Work(*values[:-2], *(Lines(*lines) for lines in values[-2:]))


def cost(grid: Loop, has_bias: bool, of: Loop | None = None) -> Work:
  """Returns what a kernel's loops take.

  Args:
    grid: of `parse`, by whose bundles loops are told apart.
    has_bias: whether the kernel has one.
    of: of `parse`, with other counts; None: bundles.

  Raises:
    ValueError: if the kernel has other loops than those that are known here.
  """
  of = of or grid
  heads = [number for number, loop in enumerate(grid.inner) if loop.own > LONG]
  known = (3, 4) if has_bias else (1,)
  if len(heads) not in known:
    raise ValueError(f'{len(heads)} loops over heads, not {" or ".join(map(str, known))}')
  places = [_position(grid, number) for number in heads]
  long = [at for at, count in enumerate(grid.stretches) if (count or 0) > SHORT]

  def between(start, end):
    return [at for at in long if start < at < end]

  def of_head(number):
    return of.inner[number].own / mosaic_tpu_heads.HEADS_TOGETHER

  before, has_far = between(-1, places[0]), len(heads) == 4
  in_all = before[-2 if has_far else -1]
  once = of.stretches[in_all]
  if not has_bias:
    line = of_head(heads[0])
    works = dict.fromkeys(('line', 'pieces', 'in_band', 'far'), line)
    return Work(tile=once, tile_in_band=once, tile_far=once, **works)
  first, tile_far, far = heads[0], 0, 0
  if has_far:
    of_far = [in_all, before[-1], *between(places[0], places[1])]
    tile_far, far = sum(of.stretches[at] for at in of_far), of_head(first)
  (in_band, line), at_pieces = map(of_head, heads[-3:-1]), heads[-1]
  between_made = between(places[-3], places[-2])
  after = between(places[-1], len(grid.stretches))
  pieces, fill = of.inner[at_pieces], of.inner[first - 1]
  has_gradient = len(pieces.inner) > 2
  # What is done once by pairs comes twice, for positions in order and for any others.
  in_order, _ = between_made
  by_pairs = [in_all, in_order, *after[: 1 if has_gradient else 0]]
  list_part, find = of.inner[at_pieces - 2 : at_pieces]
  finish = of.inner[at_pieces + 2] if has_gradient else Loop([], [])
  return Work(
    tile=sum(of.stretches[at] for at in by_pairs),
    tile_in_band=once,
    tile_far=tile_far,
    list_part=list_part.own,
    find_part=find.own,
    find=find.inner[0].own,
    find_in_band=of.inner[first - 2].inner[0].own,
    line=line,
    pieces=pieces.own,
    in_band=in_band,
    far=far,
    band=fill.own + finish.own,
    of_pairs=_lines(pieces.inner),
    of_band=_lines([*fill.inner, *finish.inner]),
  )


def _lines(loops):
  """Returns what pieces take in the loops of a head."""
  few, many, *gradient = loops
  return Lines(
    few=few.own,
    rest=few.inner[0].own,
    many=many.own + many.inner[0].own,
    add_part=sum(part.own for part in gradient),
    add=sum(part.inner[0].own for part in gradient),
  )


def _position(grid, number):
  """Returns where in the stretches of a grid one of its loops stands."""
  return [at for at, count in enumerate(grid.stretches) if count is None][number]


def splash_cost(grid: Loop) -> int:
  """Returns the bundles that JAX's kernel takes for a head in a tile, but for all that it adds."""
  return max(count or 0 for count in grid.stretches)


def compile_splash(chip: str, length: int) -> None:
  """Compiles JAX's kernel with its gradients, in tiles as large as ours and two steps a tile."""
  heads, groups, channels = run.SHAPE['num_heads'], run.SHAPE['num_kv_heads'], run.SHAPE['head_dim']
  tile = blocks(length)
  sizes = splash_attention.BlockSizes(
    **{f'block_q{name}': tile.queries for name in ('', '_dkv', '_dq')},
    **{f'block_kv{name}': tile.keys for name in ('', '_dkv', '_dq')},
    **{f'block_kv{name}_compute': tile.keys // 2 for name in ('', '_dkv')},
  )
  mask = splash_attention.CausalMask((length, length))
  of_group = splash_attention.MultiHeadMask([mask] * (heads // groups))

  def total(*arrays):
    attend = splash_attention.make_splash_mqa_single_device(of_group, block_sizes=sizes)
    return jax.vmap(jax.vmap(attend))(*arrays).astype('float32').sum()

  one_chip = SingleDeviceSharding(run.devices(chip)[0])

  def abstract(*shape):
    return jax.ShapeDtypeStruct((BATCH, groups, *shape, length, channels), 'bfloat16')

  with jax.default_device('tpu'):
    gradients = jax.jit(jax.grad(total, (0, 1, 2)), in_shardings=one_chip, out_shardings=one_chip)
    gradients.trace(abstract(heads // groups), abstract(), abstract()).lower().compile()


def dump(chip: str, case: str, kernels: dict[str, str]) -> dict[str, str]:
  """Returns the listing of each kernel, from a process whose compiler writes them down."""
  with tempfile.TemporaryDirectory() as folder:
    flags = f'--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true'
    command = [
      sys.executable,
      '-m',
      'experiments.attention_tpu.schedule',
      f'--compile={chip} {case}',
    ]
    subprocess.run(command, check=True, env=os.environ | {'LIBTPU_INIT_ARGS': flags})
    files = {path.name: path for path in pathlib.Path(folder).iterdir()}

    def listing(name):
      pattern = re.compile(rf'\d+-{re.escape(name)}-\d+-final_bundles\.txt')
      (path,) = (path for file, path in files.items() if pattern.fullmatch(file))
      return path.read_text()

    return {kernel: listing(name) for kernel, name in kernels.items()}


def shapes(length: int) -> tuple:
  """Returns query_BQHC and key_BKGC of the sequences, as shapes."""
  return tuple(
    jax.ShapeDtypeStruct((BATCH, length, run.SHAPE[heads], run.SHAPE['head_dim']), 'bfloat16')
    for heads in ('num_heads', 'num_kv_heads')
  )


def blocks(length: int, case: str = 'fire') -> mosaic_tpu_size.Blocks:
  """Returns what a tile has of each."""
  name, options = run.CASES[case]
  encoding = encodings.get(name, **options)
  segments, band = mosaic_tpu_size.num_segments(encoding), mosaic_tpu_size.has_band(encoding)
  return mosaic_tpu_size.blocks(*shapes(length), mosaic_tpu_size.BLOCK, segments, band=band)


def reach(case: str, encoding: encodings.Encoding, params: dict, length: int, far: bool) -> Work:
  """Returns what a sequence in order asks of a head under FIRE, one of CASES.

  `far` says whether products have the bias of far tiles.
  """
  table = encoding.table(params, run.SHAPE['num_heads'])
  tile = blocks(length, case)
  position_1L = np.arange(length, dtype=np.int32)[None]
  x_1L1C = np.zeros((1, length, 1, 1), np.float32)
  sides = (x_1L1C, position_1L, None), (x_1L1C, x_1L1C, position_1L, None)
  masked = Mask(), tile.queries, tile.keys
  cut = plan.cut(*masked, None, *sides)
  part = (mosaic_tpu_x.width(tile.queries, tile.keys),) * 2
  band = mosaic_tpu_band.fitting(tile, length, Mask().causal)
  told = encoding.factors[1], band, far
  made = plan.make(*masked, *cut, table, encoding.coordinate, part, *told)
  spans_IJ = np.array(made.high_IJ - made.low_IJ)
  in_band, is_far = np.array(made.band_IJ) > 0, np.array(made.far_IJ) > 0
  line, pieces = (where & ~in_band & ~is_far for where in (spans_IJ == 1, spans_IJ > 1))
  within = np.array(made.part_high_IJY - made.part_low_IJY - 1)[pieces]
  of_pairs = within[within > 0]
  of_band = np.maximum(np.array([made.band_high - made.band_low - 1]), 0)
  many, many_of_band = (x[x >= mosaic_tpu_bias.MOST_OF_FEW] for x in (of_pairs, of_band))
  head_blocks = run.SHAPE['num_heads'] // tile.heads
  bands = in_band.any() / mosaic_tpu_call.rows_together(BATCH, head_blocks, band)
  # Of the length that is compiled, and what it takes is by the block.
  bands *= band.count / mosaic_tpu_band.fitting(tile, LENGTHS[0], Mask().causal).count
  counts = Work(
    tile=line.sum() + pieces.sum(),
    tile_in_band=in_band.sum(),
    tile_far=is_far.sum(),
    list_part=within.size,
    find_part=many.size,
    find=many.sum(),
    find_in_band=many_of_band.sum() * bands,
    line=line.sum(),
    pieces=pieces.sum(),
    in_band=in_band.sum(),
    far=is_far.sum(),
    band=bands,
    of_pairs=_reach_of_parts(of_pairs),
    of_band=Lines(*(count * bands for count in _reach_of_parts(of_band))),
  )
  return jax.tree.map(float, counts)


def _reach_of_parts(breakpoints: np.ndarray) -> Lines:
  """Returns what parts of so many breakpoints each ask of a head."""
  is_many = breakpoints >= mosaic_tpu_bias.MOST_OF_FEW
  rest = np.maximum(breakpoints[~is_many] - (mosaic_tpu_bias.TOGETHER - 1), 0)
  return Lines(
    few=(~is_many).sum(),
    rest=rest.sum(),
    many=is_many.sum(),
    add_part=breakpoints.size,
    add=breakpoints.sum(),
  )


def cycles(cost: Work, reach: Work, heads: int) -> float:
  """Returns the cycles of a kernel, of all heads of a tile and all tiles of a sequence."""
  each = [one * count for one, count in zip(*map(jax.tree.leaves, (cost, reach)), strict=True)]
  return sum(each[:OF_TILE]) + heads * sum(each[OF_TILE:])


class Layers(NamedTuple):
  """Layers of FIRE, of one of CASES."""

  case: str
  encoding: encodings.Encoding
  params: list[dict]


def layers() -> dict[str, Layers]:
  """Returns layers as they start, of a model that was trained, and of the one that ships."""
  one, reaching = encodings.get('fire'), encodings.get('fire', threshold=16_384.0)
  sizes = {'num_heads': run.SHAPE['num_heads'], 'head_dim': run.SHAPE['head_dim'], 'd_model': 1024}
  at_first = [one.init(jax.random.key(seed), **sizes) for seed in range(8)]
  trained = zoo.read(HERE / 'trained.npz')
  model, shipped = zoo.load('fire-tiny')
  names = (f'block_{layer}' for layer in range(model.config.num_layers))
  of_shipped = [shipped[name]['attention']['encoding'] for name in names]
  return {
    'as it starts': Layers('fire', one, at_first),
    'trained': Layers('fire', reaching, list(trained.values())),
    'two layers': Layers('fire 2 layers', model.encoding, of_shipped),
  }


def table(results: dict) -> str:
  """Returns FIRE's cycles and FLOPs over NoPE's, a line for each chip, kernel and model."""
  tile = blocks(LENGTHS[0])
  if any(blocks(LENGTHS[0], case)[:4] != tile[:4] for case in CASES):
    raise ValueError('tiles under FIRE are not alike')
  if tile.heads % mosaic_tpu_heads.HEADS_TOGETHER:
    raise ValueError(f'{tile.heads} heads of a tile are not visited together, as `cost` has it')
  of_channel = 2 * tile.queries * tile.keys

  def of_bundles(costs, case, kernel, one):
    return cycles(work(costs[case][kernel]), one, tile.heads)

  def flops(costs, case, kernel, one):
    computed = cycles(work(costs['arithmetic'][case][kernel]), one, tile.heads)
    tiles = one.tile + one.tile_in_band + one.tile_far
    channels = tiles * PRODUCTS[kernel] * run.SHAPE['head_dim']
    if case != 'nope' and work(costs[case][kernel]).far:
      channels += one.tile_far * FAR_PRODUCTS[kernel] * mosaic_tpu_far.columns(LANES)
    return computed * REGISTER + tile.heads * of_channel * channels

  heads = ''.join(f'{length:>9}' for length in LENGTHS)
  cycle_lines, flop_lines = [f'{"":28}{heads}'], [f'{"":28}{heads}']
  for name, (fire, encoding, of_layers) in layers().items():
    by_room = {
      far: [
        [reach(fire, encoding, params, length, far) for params in of_layers] for length in LENGTHS
      ]
      for far in (False, True)
    }
    for chip, costs in results['chips'].items():
      reached = by_room[any(work(costs[fire][kernel]).far for kernel in KERNELS)]
      where, whole = f'{name:14}{chip:4}', ('all', list(KERNELS))
      for label, kernels in (*((kernel, [kernel]) for kernel in KERNELS), whole):
        columns = ratios(of_bundles, costs, fire, kernels, reached)
        cycle_lines.append(f'{where}{label:10}{columns}')
      columns = ratios(flops, costs, fire, whole[1], reached)
      flop_lines.append(f'{where}{whole[0]:10}{columns}')
  return '\n'.join([*cycle_lines, '', *flop_lines, '', *beside_splash(results, tile.heads)])


def ratios(
  count: Callable[..., float],
  costs: dict,
  fire: str,
  kernels: list[str],
  reached: list[list[Work]],
) -> str:
  """Returns the columns of a line: what is counted of kernels together under FIRE, over NoPE's."""

  def total(case, of_length):
    return sum(count(costs, case, kernel, one) for kernel in kernels for one in of_length)

  return ''.join(f'{total(fire, one) / total("nope", one):>9.2f}' for one in reached)


def beside_splash(results: dict, heads: int) -> list[str]:
  """Returns the lines of a table: bundles of a head in a tile without a bias, ours and JAX's."""
  lines = [f'{"":18}{"ours":>9}{"splash":>9}{"ratio":>9}']
  for chip, costs in results['chips'].items():
    for kernel in KERNELS:
      cost = work(costs['nope'][kernel])
      ours, other = cost.line + cost.tile / heads, costs['splash'][kernel]
      lines.append(f'{chip:4}{kernel:14}{ours:>9.0f}{other:>9}{ours / other:>9.2f}')
  return lines


def main() -> None:
  """The experiment."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--chips', default='v5e,v6e,v5p')
  parser.add_argument('--compile', help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.compile:  # what `dump` asks of another process
    chip, case = options.compile.split(' ', 1)
    if case == 'splash':
      compile_splash(chip, LENGTHS[0])
    else:
      name, options = run.CASES[case]
      run.compiled(chip, name, LENGTHS[0], batch=BATCH, **options)
    return
  results = {'shape': run.SHAPE | {'batch': BATCH}, 'jax': jax.__version__, 'chips': {}}
  for chip in options.chips.split(','):
    computed = {}
    costs = results['chips'][chip] = {'arithmetic': computed}
    for case in CASES:
      listings = dump(chip, case, KERNELS)
      grids = {name: parse(text) for name, text in listings.items()}
      costs[case] = {name: cost(grid, case != 'nope') for name, grid in grids.items()}
      computed[case] = {
        name: cost(grid, case != 'nope', parse(listings[name], arithmetic))
        for name, grid in grids.items()
      }
      print(chip, case, costs[case], computed[case], flush=True)
    listings = dump(chip, 'splash', SPLASH)
    costs['splash'] = {name: splash_cost(parse(text)) for name, text in listings.items()}
    print(chip, 'splash', costs['splash'], flush=True)
  (HERE / 'schedule.json').write_text(json.dumps(results, indent=1) + '\n')
  print(table(results), flush=True)


if __name__ == '__main__':
  main()
