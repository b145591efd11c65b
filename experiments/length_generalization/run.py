"""Every encoding at one size: what does each keep up to 32 times past the training length?

    python -m experiments.length_generalization.run [--data_dir=DIR] [--seeds=0,1,2]

A sweep (experiments/sweep.py) of all encodings. Those that stretch RoPE take its place after
training, stretched to the longest length.
"""

import functools
import pathlib

from experiments import sweep
from lex_fire import cli, encodings, presets

HERE = pathlib.Path(__file__).parent


def variants(scale: sweep.Scale) -> sweep.Variants:
  """Returns every encoding."""
  train_length, longest = scale.lengths[0], scale.lengths[-1]
  stretch = f'scale={longest // train_length}'
  of_rope = {
    'rope_pi': f'rope_pi:{stretch}',
    'ntk': f'ntk:{stretch}',
    'dynamic_ntk': f'dynamic_ntk:train_length={train_length}',
    'yarn': f'yarn:{stretch},train_length={train_length}',
  }
  return {
    name: sweep.Variant(name, presets.reaching(name, longest), of_rope if name == 'rope' else {})
    for name in encodings.ENCODINGS
    if name not in of_rope
  }


if __name__ == '__main__':
  sweep.define_flags(HERE.name)
  cli.run(functools.partial(sweep.main, HERE, variants), 'interrupted; the same command goes on')
