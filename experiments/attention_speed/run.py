"""What does a position encoding cost in attention, in time and in memory, and what do others take?

    python -m experiments.attention_speed.run [--torch_python=PYTHON]

One sequence, 12 heads of 64, causal, under each encoding with each implementation that runs here,
and JAX's and PyTorch's own attention beside them: in each round every program has its turn, so that
what slows the machine slows all. Before that, passes alone in a process show their memory. Needs
jax; other libraries are measured where they can be imported.

Writes the results to cpu.json and cpu.png (tpu), and the table that it prints into README.md. For
GPUs there is `gpu.py` beside it.
"""

import argparse
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence

import jax

from experiments.attention_speed import alone, apart, programs, results, writing
from lex_fire import encodings, errors, kernels

HERE = pathlib.Path(__file__).parent
# To attention sinusoids and learned positions are nope's, what stretches a rotation is rope's, and
# FIRE-S is fire's.
ALIKE = ('sinusoidal', 'learned', 'rope_pi', 'ntk', 'dynamic_ntk', 'yarn', 'fire_s')
ENCODINGS = (
  *(name for name in encodings.ENCODINGS if name not in ALIKE),
  'fire:hidden_layers=2',
)
PEERS = ('jax.nn', 'tokamax', 'torch.sdpa', 'torch.flex')
OF_PEERS = ('nope', 'fire')
MOST_DENSE = 2048  # [tokens]; beyond, all logits and FIRE's hidden layer take gigabytes
ROUNDS = (3, 30)  # at least, at most
DEFAULTS = {  # by platform
  'cpu': {
    'lengths': [2048, 4096, 8192],
    'alone': [2048, 4096, 8192, 16384, 32768],
    'dtype': 'float32',
    'seconds': 90.0,
  },
  'tpu': {
    'lengths': [2048, 8192, 32768, 131072],
    'alone': [8192, 32768, 131072],
    'dtype': 'bfloat16',
    'seconds': 15.0,
  },
}


def options() -> argparse.Namespace:
  """Reads the command line; None: what the platform has in DEFAULTS."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--lengths', type=int, nargs='+', help='tokens, as in 2048 4096')
  parser.add_argument(
    '--alone', type=int, nargs='*', help='lengths in a process each; all encodings at the last'
  )
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), help='of queries, keys, values')
  parser.add_argument('--seconds', type=float, help='for the rounds of a length, about')
  parser.add_argument(
    '--encodings', nargs='+', default=ENCODINGS, help='as in nope fire fire:hidden_layers=2'
  )
  parser.add_argument('--torch_python', default=sys.executable, help='one that can import torch')
  parser.add_argument('--out', type=pathlib.Path, default=HERE, help='where results go')
  return parser.parse_args()


def measure_alone(
  encodings: Sequence[str], lengths: Sequence[int], dtype: str
) -> tuple[list, list]:
  """Returns rows of time and memory, of all encodings at the last length, and of what failed."""
  rows, absent = [], []
  cases = [
    (encoding, programs.Case(length, True, dtype))
    for length in lengths
    for encoding in (encodings if length == lengths[-1] else OF_PEERS)
  ]
  work, done, start = sum(case.length**2 for _, case in cases), 0, time.perf_counter()
  for encoding, case in cases:
    left = f', {(time.perf_counter() - start) * (work / done - 1):.0f} s left' if done else ''
    print(f'alone: {encoding} at {case.length}{left}', flush=True)
    done += case.length**2
    try:
      rows.append(apart.in_own_process(alone.measure, 'auto', encoding, case))
    except Exception as error:  # what has no memory for it dies in many ways
      absent.append(absence('auto', encoding, case, error))
  return rows, absent


def absence(implementation: str, encoding: str, case: programs.Case, error: Exception) -> dict:
  """Returns the row of a program that cannot run here, and says so."""
  row = {'implementation': implementation, 'encoding': encoding, **case._asdict()}
  print(f'  not here: {implementation} {encoding}: {apart.reason(error)}', flush=True)
  return {**row, 'reason': apart.reason(error)}


def is_dense(implementation: str, encoding: str) -> bool:
  """Returns whether a program holds an array of all logits or biases."""
  if implementation in PEERS and encoding == 'fire':
    return implementation != 'torch.flex'
  if implementation == 'tokamax':  # its kernels are for accelerators
    return jax.default_backend() == 'cpu'
  return implementation in (results.DENSE, 'jax.nn')


def wanted(encodings: Sequence[str], length: int) -> list[tuple[str, str]]:
  """Returns the (implementation, encoding) pairs to time at a length."""
  few = [encoding for encoding in OF_PEERS if encoding in encodings]
  pairs = [
    (implementation, encoding)
    for implementation in (*kernels.IMPLEMENTATIONS, *PEERS)
    for encoding in (few if implementation in (results.DENSE, *PEERS) else encodings)
  ]
  return [pair for pair in pairs if length <= MOST_DENSE or not is_dense(*pair)]


def compiled(
  pairs: list[tuple[str, str]],
  case: programs.Case,
  torch: Callable[..., programs.Program],
) -> tuple[dict[tuple[str, str], programs.Program], list[dict]]:
  """Returns the programs of a case, and a row for each that cannot run here."""
  made, absent, broken = {}, [], set()
  for implementation, encoding in pairs:
    if implementation in broken:
      continue
    make = torch if implementation.startswith('torch.') else programs.make
    try:
      made[implementation, encoding] = make(implementation, encoding, case)
    except Exception as error:  # a library says in many kinds of exceptions what it cannot do
      absent.append(absence(implementation, encoding, case, error))
      if encoding == 'nope':  # then no other either
        broken.add(implementation)
  return made, absent


def say(line: str) -> None:
  """Prints a line of progress at once."""
  print(line, flush=True)


def take_turns(
  made: dict[tuple[str, str], programs.Program],
  budget: float,
  say: Callable[[str], None] = say,
) -> list[dict]:
  """Returns the seconds of each program in each round, as many rounds as the budget allows."""
  seconds = {pair: [] for pair in made}
  start, done, rounds = time.perf_counter(), 0, ROUNDS[1]
  while done < rounds:
    for pair, program in made.items():
      seconds[pair].append(program())
    done += 1
    a_round = (time.perf_counter() - start) / done
    rounds = min(max(int(budget / a_round), ROUNDS[0]), ROUNDS[1])
    say(f'  round {done} of {rounds}, {max(rounds - done, 0) * a_round:.0f} s left')
  return [
    {'implementation': implementation, 'encoding': encoding, 'seconds': values}
    for (implementation, encoding), values in seconds.items()
  ]


def measure_in_turn(
  asked: argparse.Namespace, torch: Callable[..., programs.Program]
) -> tuple[list, list]:
  """Returns rows of times, and a row for each program that cannot run here."""
  times, absent = [], []
  cases = [
    programs.Case(length, backward, asked.dtype)
    for backward in results.PASSES
    for length in asked.lengths
  ]
  for number, case in enumerate(cases, 1):
    passes = results.PASSES[case.backward]
    print(f'part {number} of {len(cases)}: {case.length} tokens, {passes}; compiling', flush=True)
    pairs = wanted(asked.encodings, case.length)
    made, missing = compiled(pairs, case, torch)
    times += [{**case._asdict(), **row} for row in take_turns(made, asked.seconds)]
    absent += missing
  return times, absent


def main() -> None:
  """The experiment."""
  asked = options()
  for encoding in asked.encodings:
    programs.encoding_of(encoding)  # raises early
  # PyTorch's process needs some of an accelerator's memory too.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  # No process sees a TPU that another has: this one's turn comes last.
  machine = apart.in_own_process(alone.machine)
  if machine['platform'] not in DEFAULTS:
    raise errors.UserError(
      f'this is for {" and ".join(DEFAULTS)}, but JAX finds platform={machine["platform"]!r}; '
      'for NVIDIA there is python -m experiments.attention_speed.gpu'
    )
  for name, default in DEFAULTS[machine['platform']].items():
    if getattr(asked, name) is None:
      setattr(asked, name, default)
  print(', '.join(f'{name} {value}' for name, value in machine.items()), flush=True)
  rows_alone, absent_alone = measure_alone(asked.encodings, asked.alone, asked.dtype)
  torch = programs.start_torch(asked.torch_python, machine['threads'])
  machine['torch'] = torch.about
  times, absent = measure_in_turn(asked, torch.make)
  torch.close()
  found = {
    'machine': machine,
    'attention': {
      'batch': 1,
      'heads': programs.HEADS,
      'head_dim': programs.HEAD_DIM,
      'dtype': asked.dtype,
    },
    'implementations': list(kernels.IMPLEMENTATIONS),
    'times': times,
    'alone': rows_alone,
    'absent': absent_alone + absent,
  }
  writing.write(found, asked.out, results)
  print(results.table(found))


if __name__ == '__main__':
  try:
    main()
  except errors.UserError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
