"""What does a bias cost a TPU's attention kernel, in bytes and memory? (Asked without a TPU.)

    make test-tpu  # makes .venv-tpu
    JAX_PLATFORMS=cpu .venv-tpu/bin/python -m experiments.attention_tpu.run

Compiles attention, forward and backward, for one chip of each kind, and reads what the compiled
programs say of themselves. Writes attention_tpu.json beside this file and prints the table.
"""

import importlib.util
import json
import math
import os
import pathlib
import re
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from lex_fire import cli, encodings, errors, kernels

HERE = pathlib.Path(__file__).parent
CHIPS = {'v5e': 'v5e:2x2', 'v5p': 'v5p:2x2x1', 'v6e': 'v6e:2x2'}
LENGTHS = {
  'v5e': [2048, 8192, 32_768, 65_536, 131_072],
  'v5p': [2048, 131_072],
  'v6e': [2048, 131_072],
}
CASES = {
  'nope': ('nope', {}),
  'alibi': ('alibi', {}),
  'kerple_log': ('kerple_log', {}),
  'kerple_power': ('kerple_power', {}),
  't5': ('t5', {}),
  'sandwich': ('sandwich', {}),
  'fire': ('fire', {}),
  'fire 2 layers': ('fire', {'hidden_layers': 2}),
  'xpos': ('xpos', {}),
}
SHAPE = {'num_heads': 8, 'num_kv_heads': 2, 'head_dim': 128}

# It compiles only: there is no TPU whose data it could ask for.
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')


def devices(chip: str):
  """Returns the devices of a small topology of a kind of chip."""
  return topologies.get_topology_desc(platform='tpu', topology_name=CHIPS[chip]).devices


def traced(
  name: str,
  length: int,
  *,
  num_heads: int = SHAPE['num_heads'],
  num_kv_heads: int = SHAPE['num_kv_heads'],
  head_dim: int = SHAPE['head_dim'],
  batch: int = 1,
  dtype=jnp.bfloat16,
  packed: bool = False,
  mask: dict | None = None,
  sharding=None,
  **options,
):
  """Returns attention, forward and backward, traced for TPU."""
  encoding = encodings.get(name, **options)

  def abstract(shape, kind):
    return jax.ShapeDtypeStruct(shape, kind, sharding=sharding)

  params = jax.eval_shape(
    lambda: encoding.init(
      jax.random.key(0), num_heads=num_heads, head_dim=head_dim, d_model=num_heads * head_dim
    )
  )
  heads = (num_heads, num_kv_heads, num_kv_heads)
  position_1L = abstract((1, length), jnp.int32)

  def total(params, query_BQHC, key_BKGC, value_BKGC, position_1L, segment_1L):
    out_BQHC = kernels.attention(
      query_BQHC,
      key_BKGC,
      value_BKGC,
      encoding=encoding,
      params=params,
      query_position_BQ=position_1L,
      key_position_BK=position_1L,
      query_segment_BQ=segment_1L,
      key_segment_BK=segment_1L,
      mask=kernels.Mask(**(mask or {})),
    )
    return out_BQHC.astype(jnp.float32).sum()

  # By which kernels are chosen, and its matrix unit.
  with jax.default_device('tpu' if sharding is None else next(iter(sharding.device_set))):
    return jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)), out_shardings=sharding).trace(
      jax.tree.map(lambda leaf: abstract(leaf.shape, leaf.dtype), params),
      *(abstract((batch, length, count, head_dim), dtype) for count in heads),
      position_1L,
      position_1L if packed else None,
    )


def compiled(chip: str, name: str, length: int, **options):
  """Returns `traced`, compiled for one chip."""
  one_chip = SingleDeviceSharding(devices(chip)[0])
  return traced(name, length, sharding=one_chip, **options).lower().compile()


WIDTHS = {'bf16': 2, 'f32': 4, 's32': 4}


def _bytes_of(shapes):
  """Returns the bytes of all arrays in a text such as '(bf16[1,8]{1,0}, f32[])'."""
  return sum(
    WIDTHS[kind] * math.prod(int(size) for size in sizes.split(',') if size)
    for kind, sizes in re.findall(r'(bf16|f32|s32)\[([0-9,]*)\]', shapes)
  )


def kernel_bytes(program) -> int:
  """Returns the bytes of all arrays that kernels of a compiled program read and write.

  Not the compiler's own count, in which copies that it makes ahead of time count twice. A block is
  read again for each row or column of tiles, whose number no bias changes.
  """
  entry = program.as_text().partition('\nENTRY')[2]
  lines = re.findall(r'%(\S+) = (.*?) [a-z-]+\((.*?)\)(.*)', entry)
  shapes = {name: shape for name, shape, _, _ in lines}
  return sum(
    _bytes_of(shape) + sum(_bytes_of(shapes[name]) for name in re.findall(r'%([\w.-]+)', operands))
    for _, shape, operands, rest in lines
    if 'custom_call_target="tpu_custom_call"' in rest
  )


def measure(chip: str, case: str, length: int) -> dict:
  """Returns what a compiled program says of itself."""
  name, options = CASES[case]
  start = time.monotonic()
  program = compiled(chip, name, length, **options)
  memory = program.memory_analysis()
  return {
    'chip': chip,
    'case': case,
    'length': length,
    'kernel_bytes': kernel_bytes(program),
    'temporary_bytes': memory.temp_size_in_bytes,
    'compile_seconds': round(time.monotonic() - start, 1),
  }


def table(results: dict) -> str:
  """Returns a line for each chip and encoding: by length, kernel bytes over NoPE's, temporaries."""
  rows = {(r['chip'], r['case'], r['length']): r for r in results['programs']}
  lengths = LENGTHS['v5e']

  def line(chip, case, number):
    """Returns a number at each length, blank where it was not compiled."""
    found = (rows.get((chip, case, length)) for length in lengths)
    base = (rows.get((chip, 'nope', length)) for length in lengths)
    return ''.join(f'{number(r, b):>9}' if r else ' ' * 9 for r, b in zip(found, base, strict=True))

  def ratio(row, base):
    return f'{row["kernel_bytes"] / base["kernel_bytes"]:.4f}'

  def megabytes(row, _):
    return f'{row["temporary_bytes"] / 2**20:.0f}'

  heads = ''.join(f'{length:>9}' for length in lengths)
  lines = [f'{"":18}{"bytes over nope at":<36}  temporaries, MB, at', f'{"":18}{heads}  {heads}']
  for chip in LENGTHS:
    for case in CASES:
      numbers = line(chip, case, ratio), line(chip, case, megabytes)
      lines.append(f'{chip:4}{case:14}{"  ".join(numbers)}'.rstrip())
  return '\n'.join(lines)


def main() -> None:
  """The experiment."""
  if importlib.util.find_spec('libtpu') is None:
    raise errors.UserError(
      'this Python has no compiler for TPU; `make test-tpu` makes .venv-tpu, whose Python has'
    )
  programs, todo = [], [(c, e, n) for c in CHIPS for e in CASES for n in LENGTHS[c]]
  start = time.monotonic()
  for done, one in enumerate(todo):
    programs.append(measure(*one))
    left = (time.monotonic() - start) / (done + 1) * (len(todo) - done - 1)
    print(f'{done + 1} of {len(todo)}, ETA {left / 60:.0f} min: {programs[-1]}', flush=True)
  results = {
    'shape': SHAPE,
    'jax': jax.__version__,
    'programs': programs,
  }
  (HERE / 'attention_tpu.json').write_text(json.dumps(results, indent=1) + '\n')
  print(table(results))


if __name__ == '__main__':
  cli.run(main)
