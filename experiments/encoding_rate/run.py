"""How fast should what an encoding learns be learned, and does the order depend on it?

    python -m experiments.encoding_rate.run [--data_dir=DIR] [--seeds=0,1,2]

A sweep (experiments/sweep.py) of the encodings that learn a bias, at rates other than that of the
recipe (`optimizer.encoding_rate`), whose runs are those of length_generalization and of
fire_ablations.
"""

import functools
import itertools
import pathlib

from experiments import sweep, sweep_results
from lex_fire import cli, presets

HERE = pathlib.Path(__file__).parent
RATES = (1.0, 30.0, 100.0)  # beside the recipe's
# What learns: the encoding, its options, and the sweep in which it had the recipe's rate.
LEARN = {
  'fire': ('fire', {}, 'length_generalization'),
  'two hidden layers': ('fire', {'hidden_layers': 2}, 'fire_ablations'),
  'kerple_power': ('kerple_power', {}, 'length_generalization'),
  'kerple_log': ('kerple_log', {}, 'length_generalization'),
  't5': ('t5', {}, 'length_generalization'),
}


def named(learns: str, rate: float) -> str:
  """Returns the name of a variant."""
  return f'{learns}, rate {rate:g}'


def variants(scale: sweep.Scale) -> sweep.Variants:
  """Returns what learns, at every rate but the recipe's."""
  return {
    named(learns, rate): sweep.Variant(
      encoding,
      presets.reaching(encoding, scale.lengths[-1]) | options,
      optimizer={'encoding_rate': rate},
    )
    for rate in RATES
    for learns, (encoding, options, _) in LEARN.items()
  }


def rows() -> dict[tuple[str, float], sweep_results.Row]:
  """Returns what was measured on books, causal, by (what learns, rate), of seeds that all have."""
  of_recipe = sweep.SCALES['laptop'].sections['optimizer']['encoding_rate']
  lines = {(HERE.name, named(*key)): key for key in itertools.product(LEARN, RATES)}
  lines |= {(where, learns): (learns, of_recipe) for learns, (*_, where) in LEARN.items()}
  own = sweep_results.whole(sweep_results.read(HERE / 'books_laptop.jsonl'))
  seeds = {line['seed'] for line in own}
  found = {}
  for where in (HERE.name, 'length_generalization', 'fire_ablations'):
    read = sweep_results.read(HERE.parent / where / 'books_laptop.jsonl')
    of_seeds = [line for line in read if line['seed'] in seeds]
    for row in sweep_results.rows(of_seeds, 'same_tokens', 'causal'):
      if key := lines.get((where, row.variant)):
        found[key] = row
  return found


def summary() -> str:
  """Returns a table of the loss at the longest length, a row for what learns, by rate."""
  found = rows()
  rates = sorted({rate for _, rate in found})
  longest = max(next(iter(found.values())).values)
  lines = [f'{"":20}' + ''.join(f'{f"rate {rate:g}":>17}' for rate in rates)]
  for learns in LEARN:
    cells = ''.join(f'{found[learns, rate].text(longest):>17}' for rate in rates)
    lines.append(f'{learns:20}{cells}')
  return '\n'.join(lines)


if __name__ == '__main__':
  sweep.define_flags(HERE.name)
  cli.run(functools.partial(sweep.main, HERE, variants), 'interrupted; the same command goes on')
