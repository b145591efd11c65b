"""What attention costs under each encoding, forward and backward, over that without any.

    python -m experiments.zoo.costs

Times the programs of experiments/attention_speed, at one length and under all encodings. Writes
costs.json beside this file, and prints it. A ratio is the median over rounds, in each of which
every encoding has its turn; better on a machine that does nothing else.
"""

import json
import operator
import pathlib
import statistics

from experiments.attention_speed import programs
from lex_fire import cli, encodings

HERE = pathlib.Path(__file__).parent
CASE = programs.Case(length=2048, backward=True, dtype='float32')
ROUNDS = 30


def measure() -> dict[str, float]:
  """Returns the time of attention forward and backward under each encoding, NoPE's being 1."""
  made = {name: programs.make('auto', name, CASE) for name in encodings.ENCODINGS}
  seconds = {name: [] for name in made}
  for done in range(ROUNDS):
    for name, program in made.items():
      seconds[name].append(program())
    print(f'round {done + 1} of {ROUNDS}', flush=True)
  return {
    name: statistics.median(map(operator.truediv, values, seconds['nope']))
    for name, values in seconds.items()
  }


def main() -> None:
  """The command."""
  ratios = measure()
  text = json.dumps({name: round(ratio, 4) for name, ratio in ratios.items()}, indent=2)
  (HERE / 'costs.json').write_text(f'{text}\n')
  print(text)


if __name__ == '__main__':
  cli.run(main)
