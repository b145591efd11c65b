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

from experiments.attention_tpu import bundles, run
from experiments.attention_tpu.bundles import Lines, Work
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
COMPILED = 8192  # of them: a row that has far tiles
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
# Products of a head in a tile, of queries by keys by channels.
PRODUCTS = {'forward': 2, 'queries': 3, 'keys': 4}
# And of how many of them the columns of a far tile's bias are a part.
FAR_PRODUCTS = {'forward': 1, 'queries': 2, 'keys': 1}


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
  bands *= band.count / mosaic_tpu_band.fitting(tile, COMPILED, Mask().causal).count
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
    raise ValueError(
      f'{tile.heads} heads of a tile are not visited together, as `bundles.cost` has it'
    )
  of_channel = 2 * tile.queries * tile.keys

  def of_bundles(costs, case, kernel, one):
    return bundles.cycles(bundles.work(costs[case][kernel]), one, tile.heads)

  def flops(costs, case, kernel, one):
    computed = bundles.cycles(bundles.work(costs['arithmetic'][case][kernel]), one, tile.heads)
    tiles = one.tile + one.tile_in_band + one.tile_far
    channels = tiles * PRODUCTS[kernel] * run.SHAPE['head_dim']
    if case != 'nope' and bundles.work(costs[case][kernel]).far:
      channels += one.tile_far * FAR_PRODUCTS[kernel] * mosaic_tpu_far.columns(LANES)
    return computed * bundles.REGISTER + tile.heads * of_channel * channels

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
      reached = by_room[any(bundles.work(costs[fire][kernel]).far for kernel in KERNELS)]
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
      cost = bundles.work(costs['nope'][kernel])
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
      run.compiled(chip, name, COMPILED, batch=BATCH, **options)
    return
  results = {'shape': run.SHAPE | {'batch': BATCH}, 'jax': jax.__version__, 'chips': {}}
  for chip in options.chips.split(','):
    computed = {}
    costs = results['chips'][chip] = {'arithmetic': computed}
    for case in CASES:
      listings = dump(chip, case, KERNELS)
      grids = {name: bundles.parse(text) for name, text in listings.items()}
      costs[case] = {name: bundles.cost(grid, case != 'nope') for name, grid in grids.items()}
      computed[case] = {
        name: bundles.cost(grid, case != 'nope', bundles.parse(listings[name], bundles.arithmetic))
        for name, grid in grids.items()
      }
      print(chip, case, costs[case], computed[case], flush=True)
    listings = dump(chip, 'splash', SPLASH)
    costs['splash'] = {
      name: bundles.splash_cost(bundles.parse(text)) for name, text in listings.items()
    }
    print(chip, 'splash', costs['splash'], flush=True)
  (HERE / 'schedule.json').write_text(json.dumps(results, indent=1) + '\n')
  print(table(results))


if __name__ == '__main__':
  main()
