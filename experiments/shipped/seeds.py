"""Do what FIRE ships with, and its lead over ALiBi, outlast another seed of the shipped recipe?

    python -m experiments.shipped.seeds [--seeds=0,1,2]

A sweep (experiments/sweep.py) of the recipe of configs/zoo.py; writes seeds.{jsonl,txt,png} beside
this file.
"""

import pathlib

from absl import flags

from configs import zoo as zoo_config
from experiments import sweep
from lex_fire import cli, presets, storage

HERE = pathlib.Path(__file__).parent
_BETTER = zoo_config.BETTER['fire']
_RECIPE = zoo_config.get_config('encoding=alibi').to_dict()  # before what is better for FIRE
SCALE = sweep.Scale(
  {section: _RECIPE[section] for section in ('model', 'data', 'optimizer', 'train')},
  zoo_config.LENGTHS,
  _RECIPE['evaluate']['max_tokens'],
)


def variants() -> sweep.Variants:
  """Returns FIRE as it ships, without each and both of what was found; and the next best."""
  reaching = presets.reaching('fire', max(zoo_config.LENGTHS))
  two = reaching | _BETTER['encoding']
  return {
    'two, rate 30': sweep.Variant('fire', two, optimizer=_BETTER['optimizer']),
    'two hidden layers': sweep.Variant('fire', two),
    'one, rate 30': sweep.Variant('fire', reaching, optimizer=_BETTER['optimizer']),
    'one hidden layer': sweep.Variant('fire', reaching),
    'alibi': sweep.Variant('alibi'),
  }


def main() -> None:
  """The command."""
  of = sweep.corpus('')._replace(protocols=('same_tokens',))
  runs = storage.local(flags.FLAGS.runs, '--runs')
  print(sweep.run(SCALE, of, variants(), sweep.seeds_of_flags(), HERE / 'seeds.jsonl', runs))


if __name__ == '__main__':
  flags.DEFINE_string('runs', 'runs/shipped_seeds', 'where the runs are kept')
  flags.DEFINE_list('seeds', ['0', '1', '2'], 'one or more, whole numbers')
  cli.run(main, 'interrupted; the same command goes on')
