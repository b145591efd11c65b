"""What do FIRE's kernel and training take on one NVIDIA GPU? All of it, within minutes.

    python -m experiments.attention_speed.gpu [--seconds=480] [--torch_python=PYTHON] [--out=DIR]

Measures the figures of `gpu_plan` in its order, the most important first, until the time is over:
is the kernel right on this chip; FIRE over the same kernel without a bias, and that over what
libraries have; PyTorch; other encodings; training. Each goes into gpu.json as it is done: the same
command goes on from there, and at last tries again what failed. What hangs, or leaves the GPU's
context broken, is given up. With --seconds=0 nothing is measured: it makes table and plot again.

Needs jax, flax, optax and orbax; other libraries are measured where they can be imported.
"""

import argparse
import collections
import functools
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

from experiments.attention_speed import alone, apart, gpu_plan, gpu_results, programs, writing
from lex_fire import errors

HERE = pathlib.Path(__file__).parent
HANGS = 2  # of an implementation, after which it is not tried again


def measure(
  figures: list[gpu_plan.Figure], found: dict[str, Any], seconds: float, save: Callable[[], None]
) -> None:
  """Measures what `found` lacks, within the time; what failed before comes last.

  Args:
    figures: in order.
    found: 'figures' by name and the names 'not_reached', which this fills.
    seconds: that it may take.
    save: is called after each figure.
  """
  done, start, expected = found['figures'], time.monotonic(), 0.0
  todo = [figure for figure in figures if 'reason' in done.get(figure.name, {'reason': ''})]
  todo.sort(key=lambda figure: figure.name in done)
  hangs, worker = collections.Counter(), apart.Worker()
  found['not_reached'] = [figure.name for figure in todo]
  for index, figure in enumerate(todo):
    spent = time.monotonic() - start
    left, pace = seconds - spent, spent / expected if expected else 1.0
    if figure.expected > left:
      continue
    ahead = pace * sum(later.expected for later in todo[index:])
    print(
      f'{index + 1} of {len(todo)}: {figure.name}; {spent:.0f} s of {seconds:.0f} are over, '
      f'ETA {min(ahead, left):.0f} s',
      flush=True,
    )
    row = attempt(worker, figure, left, hangs)
    if row is None:
      break
    expected += figure.expected
    took = time.monotonic() - start - spent
    done[figure.name] = {'stage': figure.stage, 'took': round(took, 1), **row}
    found['not_reached'].remove(figure.name)
    save()
  worker.end()


def attempt(
  worker: apart.Worker, figure: gpu_plan.Figure, left: float, hangs: collections.Counter
) -> dict[str, Any] | None:
  """Returns what was found, or why nothing was; None if the time that is left was over first."""
  if hangs[figure.of] >= HANGS:
    return {'reason': f'not tried, as {figure.of} had no end {HANGS} times'}
  try:
    return worker.call(figure.stage, figure.measure, min(figure.limit, left))
  except (RuntimeError, TimeoutError) as error:
    hangs[figure.of] += isinstance(error, TimeoutError)
    print(f'  failed: {error}', flush=True)
    over = isinstance(error, TimeoutError) and left < figure.limit
    return None if over else {'reason': str(error)}


def opened(path: pathlib.Path) -> dict[str, Any]:
  """Returns what was found before, and on what; nothing yet if there is no file."""
  if path.exists():
    return json.loads(path.read_text())
  return {'machine': None, 'figures': {}, 'not_reached': []}


def check_machine(found: dict[str, Any], here: dict[str, Any], path: pathlib.Path) -> None:
  """Raises errors.UserError if what was found before is not of this machine."""
  for name in ('platform', 'device', 'jax'):
    before = (found['machine'] or here)[name]
    if before != here[name]:
      raise errors.UserError(
        f'{path} is of {name}={before!r}, not {here[name]!r} as here; give another --out'
      )


def options() -> argparse.Namespace:
  """Reads the command line."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--seconds', type=float, default=480.0, help='that all may take')
  parser.add_argument('--torch_python', default=sys.executable, help='one that can import torch')
  parser.add_argument('--out', type=pathlib.Path, default=HERE, help='where results go')
  return parser.parse_args()


def main(sizes: gpu_plan.Sizes = gpu_plan.H200, platform: str = 'gpu') -> None:
  """The experiment."""
  asked, start = options(), time.monotonic()
  # PyTorch's process needs some of the memory too.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  path = asked.out / f'{platform}.json'
  found = opened(path)
  if asked.seconds:
    machine = apart.in_own_process(alone.machine)
    if machine['platform'] != platform:
      raise errors.UserError(
        f'this is for platform={platform!r}, but JAX finds {machine["platform"]!r}; without a GPU, '
        '--seconds=0 makes the table again'
      )
    check_machine(found, machine, path)
    found['machine'] = found['machine'] or {**machine, 'torch': None}
    heads = {'batch': 1, 'heads': programs.HEADS, 'head_dim': programs.HEAD_DIM}
    found |= {'attention': heads, 'implementations': [sizes.kernel]}
    print(', '.join(f'{name} {value}' for name, value in machine.items()), flush=True)
    save = functools.partial(writing.write_json, found, path)
    left = asked.seconds - (time.monotonic() - start)
    measure(list(gpu_plan.plan(sizes, asked.torch_python)), found, left, save)
    for row in found['figures'].values():
      found['machine']['torch'] = row['torch'] if 'torch' in row else found['machine']['torch']
  if found['machine'] is None:
    raise errors.UserError(f'{path} is not there; measure first, with --seconds above 0')
  writing.write(found, asked.out, gpu_results)
  print(gpu_results.table(found))


if __name__ == '__main__':
  try:
    main()
  except errors.UserError as error:
    sys.exit(f'error: {error}')
