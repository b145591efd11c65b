"""Trains the models that ship, evaluates them at up to 32 times their length, writes their cards.

    python -m experiments.shipped.run --runs=runs/shipped [--encoding=fire --encoding=xpos ...]

A run that is there is not trained again, so that the command can be interrupted; of those that are
not asked for, weights and results stay. Writes lex_fire/weights/NAME.{npz,json,md}, and
shipped.{json,csv,png} beside this file.
"""

import dataclasses
import functools
import json
import pathlib

import jax
from absl import flags

from configs import zoo as zoo_config
from experiments import sweep
from experiments.shipped import cards
from lex_fire import checkpoint, cli, command, documents, evaluate, storage, train, zoo
from lex_fire import config as config_lib
from lex_fire import report as report_lib

HERE = pathlib.Path(__file__).parent
ENCODINGS = ('fire', 'xpos', 'alibi', 'rope')


def config(encoding: str) -> config_lib.Config:
  """Returns the config of a model that ships."""
  return config_lib.Config.from_dict(zoo_config.get_config(f'encoding={encoding}').to_dict())


def reports_of(encoding: str, runs: pathlib.Path) -> list[report_lib.Report]:
  """Trains a model, or goes on with it, and returns the report of its evaluation in each mask."""
  run, workdir = config(encoding), runs / encoding
  sweep.train_to_the_end(run, workdir)
  request = dataclasses.replace(run.evaluate, masks=cards.MASKS)
  asked = dataclasses.replace(run, evaluate=request)
  progress = command.Progress(len(cards.MASKS), documents.windows(asked))
  return evaluate.evaluate(workdir, request, progress)


def ship(encoding: str, runs: pathlib.Path) -> None:
  """Writes the weights of a run's last checkpoint, and its config."""
  run = config(encoding)
  abstract = jax.eval_shape(functools.partial(train.init, run))['params']
  _, params = checkpoint.restore_params(runs / encoding, abstract)
  zoo.write(zoo.WEIGHTS / f'{encoding}-tiny.npz', params)
  path = zoo.WEIGHTS / f'{encoding}-tiny.json'
  path.write_text(json.dumps(run.to_dict(), indent=2) + '\n')


def main() -> None:
  """The command."""
  runs, asked = storage.local(flags.FLAGS.runs, '--runs'), flags.FLAGS.encoding
  there = json.loads((HERE / 'shipped.json').read_text())['runs']
  reports = []
  for encoding in ENCODINGS:
    kept = [report for report in there if report['run'] == encoding]
    reports += reports_of(encoding, runs) if encoding in asked else kept
  evaluate.write(reports, HERE, 'shipped')
  for encoding in asked:
    ship(encoding, runs)
  cards.write()
  print(report_lib.table(reports))


if __name__ == '__main__':
  flags.DEFINE_string('runs', 'runs/shipped', 'where the runs are kept')
  flags.DEFINE_multi_enum('encoding', ENCODINGS, ENCODINGS, 'to train, evaluate and ship')
  cli.run(main)
