"""How fast should what an encoding learns be learned, and does the order depend on it?

    python -m experiments.encoding_rate.run [--data_dir=DIR] [--seeds=0,1,2] [--rate=30 ...]

A sweep (experiments/sweep.py) of the encodings that learn a bias, at rates other than that of the
recipe (`optimizer.encoding_rate`), whose runs are those of length_generalization and of
fire_ablations.
"""

import functools
import itertools
import pathlib
from collections.abc import Sequence

from absl import flags

from experiments import sweep, sweep_published, sweep_results
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


def variants(scale: sweep.Scale, rates: Sequence[float] = RATES) -> sweep.Variants:
  """Returns what learns, at each of some rates."""
  return {
    named(learns, rate): sweep.Variant(
      encoding,
      presets.reaching(encoding, scale.lengths[-1]) | options,
      optimizer={'encoding_rate': rate},
    )
    for rate in rates
    for learns, (encoding, options, _) in LEARN.items()
  }


def losses(rates: Sequence[float]) -> dict[tuple[str, float], dict[int, sweep_results.Line]]:
  """Returns what was measured on books, causal, by (what learns, rate), of seeds that all have."""
  of_recipe = sweep.SCALES['laptop'].sections['optimizer']['encoding_rate']
  found = {}
  for (learns, (*_, sweep_at_recipe)), rate in itertools.product(LEARN.items(), rates):
    at_recipe = rate == of_recipe
    where, name = (sweep_at_recipe, learns) if at_recipe else (HERE.name, named(learns, rate))
    lines = sweep_results.read(HERE.parent / where / 'books_laptop.jsonl')
    of_all = [line for line in lines if (line['variant'], line['mask']) == (name, 'causal')]
    found[learns, rate] = {line['seed']: line for line in of_all}
  seeds = set.intersection(*(set(of_seeds) for of_seeds in found.values()))
  return {key: {seed: of[seed] for seed in sorted(seeds)} for key, of in found.items()}


def summary(rates: Sequence[float]) -> str:
  """Returns a table of losses at the first and the longest length, by what learns and rate.

  Mean and deviation over the seeds that have all of these rates.
  """
  found = losses(rates)
  lines = [f'{"":19}{"at":>7}' + ''.join(f'{f"rate {rate:g}":>17}' for rate in rates)]
  for learns, at in itertools.product(LEARN, (0, -1)):
    ends = {
      rate: [line['lengths'][at]['nats_per_token'] for line in found[learns, rate].values()]
      for rate in rates
    }
    length = next(iter(found[learns, rates[0]].values()))['lengths'][at]['length']
    cells = ''.join(f'{sweep_published.over_seeds(ends[rate]):>17}' for rate in rates)
    lines.append(f'{learns if at == 0 else "":19}{length:>7}{cells}')
  return '\n'.join(lines)


def main() -> None:
  """The command."""
  rates = [float(rate) for rate in flags.FLAGS.rate]
  sweep.main(HERE, functools.partial(variants, rates=rates))


if __name__ == '__main__':
  sweep.define_flags(HERE.name)
  known = [f'{rate:g}' for rate in RATES]
  flags.DEFINE_multi_enum('rate', known, known, 'of which; may be given several times')
  cli.show_in_help('rate')
  cli.run(main, 'interrupted; the same command goes on')
