"""Every encoding at one size: what does each keep up to 32 times past the training length?

    python -m experiments.length_generalization.run [--data_dir=DIR] [--seeds=0,1,2]

A sweep (experiments/sweep.py) of all encodings. Those that stretch RoPE take its place after
training, stretched to the longest length.
"""

import functools
import pathlib
from collections.abc import Sequence

from experiments import sweep, sweep_published, sweep_results
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


def summary(lines: Sequence[sweep_results.Line]) -> str:
  """Returns what README's table tells of each encoding, the best at the longest length first.

  Mean and standard deviation over seeds, of differences too: of the same seed.
  """
  causal, blocks = (
    {row.variant: row for row in sweep_results.rows(lines, 'same_tokens', mask)}
    for mask in sweep.MASKS
  )
  first, *_, last = sorted(causal['fire'].values)
  heads = [f'at {first:,}', 'change', 'in blocks', "over FIRE's"]
  table = [f'{"":12}' + ''.join(f'{head:>18}' for head in heads)]
  for name, row in causal.items():
    cells = [
      row.text(first),
      _difference(row.values[last], row.values[first]),
      _difference(blocks[name].values[last], blocks[name].values[first]),
      _difference(row.values[last], causal['fire'].values[last]),
    ]
    table.append(f'{name:<12}' + ''.join(f'{cell:>18}' for cell in cells))
  return '\n'.join(table)


def _difference(values: Sequence[float], of: Sequence[float]) -> str:
  """Returns mean and deviation of what values are more than others, seed by seed."""
  found = [value - other for value, other in zip(values, of, strict=True)]
  return sweep_published.over_seeds(found, '+')


if __name__ == '__main__':
  sweep.define_flags(HERE.name)
  cli.run(functools.partial(sweep.main, HERE, variants), 'interrupted; the same command goes on')
