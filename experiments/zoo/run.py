"""The whole zoo under one recipe: what each encoding adds, and what it keeps past training.

    python -m experiments.zoo.run --runs=runs/zoo

Trains the quickstart's model with every encoding that a model is trained with, and evaluates all of
them at up to 16 times the training length. A run that is there is not trained again, so the command
can be interrupted. Writes zoo.{json,csv,png} and summary.json beside this file.
"""

import dataclasses
import functools
import json
import math
import pathlib

import jax
from absl import flags

from configs import quickstart
from experiments import sweep
from lex_fire import (
  cli,
  command,
  documents,
  encodings,
  evaluate,
  storage,
  train,
)
from lex_fire import config as config_lib
from lex_fire import report as report_lib

HERE = pathlib.Path(__file__).parent
LENGTHS = (256, 512, 1024, 2048, 4096)
# Encodings that take the place of RoPE in a model trained with it: 16 times as long as training.
OF_ROPE = {
  'rope_pi': 'rope_pi:scale=16',
  'ntk': 'ntk:scale=16',
  'dynamic_ntk': 'dynamic_ntk:train_length=256',
  'yarn': 'yarn:scale=16,train_length=256',
}


def config(name: str) -> config_lib.Config:
  """Returns the quickstart's config with an encoding."""
  return config_lib.Config.from_dict(quickstart.get_config(f'encoding={name}').to_dict())


def reports_of(name: str, runs: pathlib.Path) -> list[dict]:
  """Returns the reports of a trained run: under its own encoding and, for RoPE, those after it."""
  workdir = runs / name
  sweep.train_to_the_end(config(name), workdir)
  texts = ('as_trained', *OF_ROPE.values()) if name == 'rope' else ('as_trained',)
  request = dataclasses.replace(config(name).evaluate, lengths=LENGTHS, encodings=texts)
  asked = dataclasses.replace(config(name), evaluate=request)
  progress = command.Progress(len(texts), documents.windows(asked))
  return evaluate.evaluate(workdir, request, progress)


def parameters_added(name: str) -> int:
  """Returns how many parameters the encoding adds to the quickstart's model."""
  run = config(name)
  params = jax.eval_shape(functools.partial(train.init, run))['params']
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return sum(math.prod(leaf.shape) for path, leaf in leaves if 'encoding' in str(path))


def summary(reports: list[dict]) -> dict[str, dict]:
  """Returns the numbers of README's table for each encoding, in the registry's order."""
  of_name = {report['encoding']['name']: report for report in reports}
  return {
    name: {
      'parameters_added': parameters_added(name),
      'shortest': of_name[name]['lengths'][0]['nats_per_token'],
      'longest': of_name[name]['lengths'][-1]['nats_per_token'],
      'change': of_name[name]['change']['nats_per_token'],
      'standard_error': of_name[name]['change']['standard_error'],
    }
    for name in encodings.ENCODINGS
  }


def main() -> None:
  """The command."""
  runs = storage.local(flags.FLAGS.runs, '--runs')
  names = [name for name in encodings.ENCODINGS if name not in OF_ROPE]
  reports = [report for name in names for report in reports_of(name, runs)]
  evaluate.write(reports, HERE, 'zoo')
  numbers = {'lengths': [LENGTHS[0], LENGTHS[-1]], 'encodings': summary(reports)}
  (HERE / 'summary.json').write_text(json.dumps(numbers, indent=2) + '\n')
  print(report_lib.table(reports))


if __name__ == '__main__':
  flags.DEFINE_string('runs', 'runs/zoo', 'where the runs are kept')
  cli.run(main)
