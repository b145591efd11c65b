"""How fast should what an encoding learns be learned, and does the order depend on it?

    python -m experiments.encoding_rate.run [--data_dir=DIR] [--seeds=0,1,2]

A sweep (experiments/sweep.py) of the encodings that learn a bias, at rates other than that of the
recipe (`optimizer.encoding_rate`), whose runs are those of length_generalization and of
fire_ablations.
"""

import functools
import pathlib

from experiments import sweep
from lex_fire import cli, presets

HERE = pathlib.Path(__file__).parent
RATES = (1.0, 30.0, 100.0)  # beside the recipe's
# What learns: the encoding, its options, and where it was trained at the recipe's rate.
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


if __name__ == '__main__':
  sweep.define_flags(HERE.name)
  cli.run(functools.partial(sweep.main, HERE, variants), 'interrupted; the same command goes on')
