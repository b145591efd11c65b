"""What of FIRE matters: its logarithm, its threshold, the width, depth and sharing of its network?

    python -m experiments.fire_ablations.run [--data_dir=DIR] [--seeds=0,1,2]

A sweep (experiments/sweep.py) of FIRE's options, each changed by itself.
"""

import functools
import pathlib

from experiments import sweep
from lex_fire import cli

HERE = pathlib.Path(__file__).parent


def variants(scale: sweep.Scale) -> sweep.Variants:
  """Returns FIRE, whose threshold starts at the longest length, and it with one change each."""
  reaching = {'threshold': float(scale.lengths[-1])}
  changes = {
    'as it is': {},
    'square root': {'psi': 'sqrt'},
    'no logarithm': {'psi': 'identity'},
    'threshold 512': {'threshold': 512.0},
    'no threshold': {'threshold': 0.0},
    'width 8': {'width': 8},
    'width 64': {'width': 64},
    'two hidden layers': {'hidden_layers': 2},
  }
  made = {name: sweep.Variant('fire', reaching | change) for name, change in changes.items()}
  return made | {'shared by all layers': sweep.Variant('fire_s', reaching)}


if __name__ == '__main__':
  sweep.define_flags(HERE.name)
  cli.run(functools.partial(sweep.main, HERE, variants), 'interrupted; the same command goes on')
