"""Do FIRE's two hidden layers, and its lead over ALiBi, outlast another seed of the shipped recipe?

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
_RECIPE = zoo_config.get_config().to_dict()
SCALE = sweep.Scale(
  {section: _RECIPE[section] for section in ('model', 'data', 'optimizer', 'train')},
  zoo_config.LENGTHS,
  _RECIPE['evaluate']['max_tokens'],
)


def variants() -> sweep.Variants:
  """Returns FIRE as it ships, with arrays that learn faster, and by default; and the next best."""
  reaching = presets.reaching('fire', max(zoo_config.LENGTHS))
  return {
    'two hidden layers': sweep.Variant('fire', reaching | zoo_config.BETTER['fire']),
    'two, rate 30': sweep.Variant(
      'fire', reaching | zoo_config.BETTER['fire'], optimizer={'encoding_rate': 30.0}
    ),
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
