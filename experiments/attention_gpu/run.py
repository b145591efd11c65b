"""What does a bias cost a GPU's attention kernel, by the instructions of it? (Asked without a GPU.)

    make test-cuda  # makes .venv-cuda
    JAX_PLATFORMS=cpu .venv-cuda/bin/python -m experiments.attention_gpu.run

Compiles the kernels for an H200, reads what the assembler has made of each, and counts how often a
causal row in order has each part of it done. Needs nvdisasm, which is part of CUDA's toolkit and of
the package triton, on the PATH. Writes attention_gpu.json beside this file and prints the tables.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from experiments.attention_gpu import sass
from experiments.attention_gpu.sass import Cost, Work
from experiments.attention_tpu import run, schedule
from lex_fire import cli, encodings, errors, kernels, topologies
from lex_fire.kernels import (
  mosaic_gpu,
  mosaic_gpu_backward,
  mosaic_gpu_far,
  mosaic_gpu_plan,
  mosaic_gpu_tile,
)

HERE = pathlib.Path(__file__).parent
SHAPE, LENGTHS = run.SHAPE, schedule.LENGTHS
# Those whose tiles have no products of their own for x or a decay.
CASES = {case: run.CASES[case] for case in run.CASES if case not in ('sandwich', 'xpos')}
# As compilers name them.
KERNELS = {'forward': '_forward_kernel', 'queries': '_query_kernel', 'keys': '_key_kernel'}
DEGREES = {'forward': mosaic_gpu_far.FORWARD, 'queries': mosaic_gpu_far.QUERIES, 'keys': None}
PART = 8192  # queries whose tiles are counted at once
SPECIAL = 8  # cycles that a warp's instruction of the special unit takes: four lanes a cycle


def compile_attention(name: str, **options) -> None:
  """Compiles attention with its gradients for one H200."""
  encoding = encodings.get(name, **options)
  topology = topologies.find('cuda:h200x1')
  one = jax.sharding.SingleDeviceSharding(topology.devices[0])
  heads, groups, channels = SHAPE.values()

  def struct(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=one)

  def total(params, arrays, position_BL):
    out_BQHC = mosaic_gpu.attention(
      *arrays,
      encoding=encoding,
      params=params,
      query_position_BQ=position_BL,
      key_position_BK=position_BL,
      query_segment_BQ=None,
      key_segment_BK=None,
      mask=kernels.Mask(),
    )
    return out_BQHC.astype(jnp.float32).sum()

  size = {'num_heads': heads, 'head_dim': channels, 'd_model': heads * channels}
  params = jax.eval_shape(lambda: encoding.init(jax.random.key(0), **size))
  params = jax.tree.map(lambda leaf: struct(leaf.shape, leaf.dtype), params)
  length = LENGTHS[0]
  arrays = [struct((1, length, n, channels), jnp.bfloat16) for n in (heads, groups, groups)]
  with jax.default_device(topology.devices[0]):
    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))
    lowered = gradients.lower(params, arrays, struct((1, length), jnp.int32))
    lowered.compile(dict(topology.options))


def listings(name: str, **options) -> dict[str, str]:
  """Returns the listing of each kernel."""
  nvdisasm = shutil.which('nvdisasm')
  if nvdisasm is None:
    raise errors.UserError(
      'nvdisasm is not on the PATH; it is in CUDA and in the package triton, under backends/nvidia'
    )
  with tempfile.TemporaryDirectory() as folder:
    dump = {'MOSAIC_GPU_DUMP_TO': folder, 'MOSAIC_GPU_DUMP_PTX': '1'}
    os.environ.update(dump)
    try:
      compile_attention(name, **options)
    finally:
      for variable in dump:
        del os.environ[variable]
    ptxas = pathlib.Path(os.environ['MOSAIC_GPU_CUDA_ROOT']) / 'bin' / 'ptxas'
    found = {}
    for kernel, called in KERNELS.items():
      (ptx,) = (
        p for p in pathlib.Path(folder).iterdir() if re.fullmatch(rf'{called}_\d+\.ptx', p.name)
      )
      cubin = ptx.with_suffix('.cubin')
      subprocess.run([ptxas, '-arch=sm_90a', '-O3', ptx, '-o', cubin], check=True)
      listed = subprocess.run([nvdisasm, '-c', cubin], check=True, capture_output=True, text=True)
      found[kernel] = listed.stdout
    return found


def columns(kernel: str) -> int:
  """Returns those of a kernel's tile, without waves, of bfloat16."""
  sizes = mosaic_gpu.SIZES if kernel == 'forward' else mosaic_gpu_backward.SIZES
  return sizes[SHAPE['head_dim'], False].columns


def reach(kernel: str, encoding: encodings.Encoding, params: dict | None, length: int) -> Work:
  """Returns how often a head has each kind of work done, of a causal row in order.

  Args:
    kernel: of KERNELS.
    encoding: of the bias.
    params: its; None: there is no bias.
    length: of the row [tokens].
  """
  position_1L, mask = np.arange(length, dtype=np.int32)[None], kernels.Mask()
  query_BNQ = mosaic_gpu_plan.query_numbers(mask, position_1L, None, 0)
  key_BNK = mosaic_gpu_plan.key_numbers(position_1L, None, 0)
  table = None if params is None else encoding.table(params, SHAPE['num_heads'])
  rows, keys_in_rows = mosaic_gpu_tile.ROWS, kernel == 'keys'
  how = {
    'blocks': (columns(kernel), rows) if keys_in_rows else (rows, columns(kernel)),
    'degree': DEGREES[kernel] if encoding.smooth else None,
    'keys_in_rows': keys_in_rows,
  }

  def codes(query_BNQ):
    code_V = np.array(
      mosaic_gpu_plan.codes(query_BNQ, key_BNK, table, encoding.coordinate, **how)
    ).ravel()
    return code_V[code_V & mosaic_gpu_tile.VISIT != 0]

  # In parts: of two layers at 131,072 tokens comparisons would be an array of 36 GiB.
  parts = (slice(first, first + PART) for first in range(0, length, PART))
  code_V = np.concatenate([codes(query_BNQ[:, :, part]) for part in parts])
  is_far_V = code_V & mosaic_gpu_tile.FAR != 0
  is_after_V = (code_V & mosaic_gpu_tile.AFTER != 0) & ~is_far_V
  first_V, end_V = mosaic_gpu_tile.span(code_V)
  return Work(
    near=np.sum(~is_far_V & ~is_after_V),
    after=np.sum(is_after_V),
    far=np.sum(is_far_V),
    mask=np.sum(code_V & mosaic_gpu_tile.WHOLE == 0),
    further_line=np.sum(end_V - first_V - 1),
    other_line=np.sum(first_V[1:] != end_V[:-1] - 1),
  )


def total(cost: Work, reach: Work) -> Cost:
  """Returns what a head takes of a quarter of an SM, if it has a kind of work done so often."""
  return sum((Cost(*each) * float(times) for each, times in zip(cost, reach, strict=True)), Cost())


def cycles(cost: Cost) -> tuple[float, float]:
  """Returns the cycles if products and all else are made at once, and if one waits on the other."""
  others = max(cost.issued, SPECIAL * cost.special)
  return max(cost.products, others), cost.products + others


def of_a_tile(results: dict) -> list[str]:
  """Returns the lines of a table: what each kernel takes for a tile, near, after its keys, or far.

  And by how many instructions more for a further line of the table, and for another first one.
  """
  heads = 'products', 'near', 'special', 'after', 'special', 'far', 'special', 'further', 'other'
  lines = [f'{"":22}' + ''.join(f'{head:>9}' for head in heads)]
  for name, costs in results['costs'].items():
    for kernel, values in costs.items():
      cost = Work(*(Cost(*each) for each in values))
      numbers = [cost.near.products]
      for way, is_other in (
        (cost.near, True),
        (cost.after, cost.after != cost.near),
        (cost.far, cost.far.issued),
      ):
        numbers += [way.issued, SPECIAL * way.special] if is_other else [None] * 2
      numbers += [part.issued or None for part in (cost.further_line, cost.other_line)]
      cells = (f'{"" if number is None else round(number):>9}' for number in numbers)
      lines.append(f'{name:14}{kernel:8}{"".join(cells)}'.rstrip())
  return lines


def of_rows(results: dict) -> list[str]:
  """Returns the lines of a table: FIRE's cycles over NoPE's of a causal row in order."""
  lines = [f'{"":22}{"all at once":36}products, then the rest']
  lines.append(f'{"":22}' + ''.join(f'{length:>9}' for length in LENGTHS) * 2)

  def cycles_of(case, encoding, of_layers):
    found = {}
    for kernel, cost in results['costs'][case].items():
      reached = (
        np.mean([reach(kernel, encoding, params, length) for params in of_layers], axis=0)
        for length in LENGTHS
      )
      found[kernel] = np.array([cycles(total(Work(*cost), Work(*one))) for one in reached])
    return found

  bare = cycles_of('nope', encodings.get('nope'), [None])
  for name, (case, encoding, layers) in schedule.layers().items():
    with_bias = cycles_of(case, encoding, layers)
    found = {kernel: (with_bias[kernel], bare[kernel]) for kernel in KERNELS}
    found['all'] = tuple(map(sum, zip(*found.values(), strict=True)))
    for kernel, (with_bias, without) in found.items():
      ratios = (f'{ratio:>9.2f}' for ratio in (with_bias / without).T.ravel())
      lines.append(f'{name:14}{kernel:8}{"".join(ratios)}')
  return lines


def table(results: dict) -> str:
  """Returns both."""
  return '\n'.join([*of_a_tile(results), '', *of_rows(results)])


def main() -> None:
  """The experiment."""
  results = {'shape': SHAPE, 'jax': jax.__version__, 'costs': {}}
  for case, (name, options) in CASES.items():
    costs = results['costs'][case] = {
      kernel: sass.work(sass.parse(listing))
      for kernel, listing in listings(name, **options).items()
    }
    print(case, costs, flush=True)
  (HERE / 'attention_gpu.json').write_text(json.dumps(results, indent=1) + '\n')
  print(table(results))


if __name__ == '__main__':
  cli.run(main)
