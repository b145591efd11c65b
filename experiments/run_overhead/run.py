"""What does a run cost besides its steps: its data, its logs, its checkpoints?

    python -m experiments.run_overhead.run

In turn, the quickstart's model takes steps in a bare loop, of batches that lie on the device
already, and in `train.train`. Then the quickstart's own run says what its time went to. Writes
run_overhead.json beside this file, and prints it; better on a machine that does nothing else.
"""

import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax

from configs import quickstart
from lex_fire import cli, errors, feed, train
from lex_fire import config as config_lib

HERE = pathlib.Path(__file__).parent
ROUNDS, STEPS = 7, 40
CONFIG = config_lib.Config.from_dict(quickstart.get_config().to_dict())
TOKENS = CONFIG.data.batch_size * CONFIG.data.length


def bare_loop(config: config_lib.Config):
  """Returns a function that takes STEPS steps and returns the seconds of one."""
  program, data = train.Program(config, train.sharding.make_mesh()), feed.Data(config)
  batches = [program.put(data.train_batch(step)) for step in range(STEPS)]
  state, values = program.step(program.init(), batches[0])  # compiles
  kept = [state]

  def run() -> float:
    state = kept.pop()
    jax.block_until_ready(state)
    start = time.perf_counter()
    for batch in batches:
      state, _ = program.step(state, batch)
    jax.block_until_ready(state)
    kept.append(state)
    return (time.perf_counter() - start) / STEPS

  return run


def metrics_of(config: config_lib.Config) -> list[dict[str, float]]:
  """Trains in a directory of its own, and returns what is logged of steps after the first."""
  with tempfile.TemporaryDirectory() as workdir:
    train.train(config, workdir)
    rows = map(json.loads, (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines())
    return [row for row in rows if 'loss' in row]


def seconds_a_step(rows: list[dict[str, float]]) -> float:
  """Returns the time of a step with its data and logs, but without validation and checkpoints."""
  return TOKENS / statistics.harmonic_mean([row['tokens_per_second'] for row in rows])


def breakdown() -> str:
  """Trains the quickstart's model by its command, and returns its last line: where time went."""
  with tempfile.TemporaryDirectory() as workdir:
    command = [sys.executable, '-m', 'lex_fire.train', '--config=configs/quickstart.py']
    with subprocess.Popen(
      [*command, f'--workdir={workdir}'], stdout=subprocess.PIPE, text=True
    ) as process:
      assert process.stdout is not None
      for line in process.stdout:
        print(line, end='', flush=True)
    if process.returncode:
      raise errors.UserError(f'the quickstart has ended with status {process.returncode}')
  return line.strip()


def main() -> None:
  """The experiment."""
  short = dataclasses.replace(CONFIG.train, steps=STEPS + 20, checkpoint_every=STEPS + 20)
  config = dataclasses.replace(
    CONFIG,
    train=short,
    optimizer=dataclasses.replace(CONFIG.optimizer, warmup_steps=STEPS),
  )
  take_steps, ratios = bare_loop(config), []
  for done in range(ROUNDS):
    bare = take_steps()
    ratios.append(seconds_a_step(metrics_of(config)[1:]) / ((bare + take_steps()) / 2))
    print(f'round {done + 1} of {ROUNDS}: {ratios[-1]:.3f} of the bare loop', flush=True)
  found = {
    'over_bare_loop': {'median': statistics.median(ratios), 'rounds': ratios},
    'quickstart': breakdown(),
    'jax': jax.__version__,
  }
  text = json.dumps(found, indent=2)
  (HERE / 'run_overhead.json').write_text(f'{text}\n')
  print(text)


if __name__ == '__main__':
  cli.run(main)
