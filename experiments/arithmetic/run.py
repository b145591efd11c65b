"""Addition learned on short numbers: which encodings add long ones, at counted or drawn positions?

    python -m experiments.arithmetic.run [--scale=laptop] [--seeds=0,1,2] [--runs=runs/arithmetic]

Each encoding learns sums with index hints (lex_fire/data/algorithms.py), once at positions that
count from 0 and once at randomized ones (Ruoss et al. 2023, arXiv:2305.16843; with FIRE in Zhou et
al. 2024, arXiv:2402.09371), and is asked for sums of up to eight times as many digits. What is done
is kept, as in experiments/sweep.py: a run goes on from its last checkpoint, and one whose line is
in SCALE.jsonl beside this file is not repeated.
"""

import functools
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from configs import algorithms as algorithms_config
from experiments import sweep, sweep_results
from lex_fire import checkpoint, cli, errors, model, storage, train
from lex_fire import config as config_lib
from lex_fire.data import algorithms, draws, positions, reading
from lex_fire.data import text as text_lib

HERE = pathlib.Path(__file__).parent
ROWS = 10  # that share positions, where they are drawn
ENCODINGS = ('fire', 'rope', 'alibi', 'kerple_log', 't5', 'nope')


class Scale(NamedTuple):
  """A model and how it is trained and asked.

  Attributes:
    digits: of the longest numbers in training.
    sections: changes to the config of configs/algorithms.py.
    questions: of each length.
    task: more options of the task.
  """

  digits: int
  sections: dict[str, dict[str, Any]]
  questions: int
  task: str = ''


_TINY = {
  **{'num_layers': 3, 'd_model': 64, 'num_heads': 4, 'num_kv_heads': 4, 'head_dim': 16},
  **{'d_ff': 172},
}
# The rule is found suddenly, at a step in which chance has a part: so the rate stays high.
_HIGH_RATE = {'learning_rate': 2e-3, 'final_fraction': 0.5}
# Of a sum's digit that of one number tells nothing while the other's may be any. Half of the second
# number's are 0, then, so that a model learns to find digits by their markers first; and short sums
# come more often, as many to a row as have room.
_EASY_ONES = ',lengths=log_uniform,zeros=0.5,count=200000'
SCALES = {
  # 0.2M parameters, minutes on a core.
  'laptop': Scale(
    4,
    {
      'model': _TINY,
      'data': {'batch_size': 32},
      'optimizer': _HIGH_RATE,
      'train': {'steps': 6000, 'checkpoint_every': 1000},
    },
    questions=100,
  ),
  'twenty': Scale(
    20,
    {
      'model': _TINY,
      'data': {'batch_size': 16, 'isolate_documents': True},
      'optimizer': _HIGH_RATE,
      'train': {'steps': 3000, 'checkpoint_every': 500},
    },
    questions=100,
    task=_EASY_ONES,
  ),
  # 4.8M parameters, for one accelerator.
  'gpu': Scale(
    20,
    {
      'model': {
        **{'num_layers': 6, 'd_model': 256, 'num_heads': 8, 'num_kv_heads': 8, 'head_dim': 32},
        **{'d_ff': 688, 'dtype': 'bfloat16'},
      },
      'data': {'batch_size': 512, 'isolate_documents': True},
      'optimizer': {'learning_rate': 1e-3, 'warmup_steps': 300},
      'train': {'steps': 10_000, 'checkpoint_every': 1000},
    },
    questions=200,
    task=_EASY_ONES,
  ),
}


class Variant(NamedTuple):
  """A run of the sweep.

  Attributes:
    encoding: a key of encodings.ENCODINGS.
    randomized: whether its positions are drawn.
  """

  encoding: str
  randomized: bool


VARIANTS = {
  f'{encoding}, randomized' if randomized else encoding: Variant(encoding, randomized)
  for encoding, randomized in itertools.product(ENCODINGS, (False, True))
}


def config(scale: Scale, variant: Variant, seed: int) -> config_lib.Config:
  """Returns the config of a run, with a seed of parameters and of the questions' order."""
  values = algorithms_config.get_config(
    f'task=addition,length={scale.digits},hints=true,encoding={variant.encoding},'
    f'randomized={str(variant.randomized).lower()}'
  ).to_dict()
  values['data']['task'] += scale.task
  for section, changes in scale.sections.items():
    values[section] |= changes
  values['train']['seed'] = seed
  return config_lib.Config.from_dict(values)


class Rows(NamedTuple):
  """Questions of one length with their answers.

  Attributes:
    tokens_WL: EOS, the question, the separator, the answer and EOS, of L + 1 tokens.
    answer: index of the answer's first token.
  """

  tokens_WL: np.ndarray
  answer: int


def rows(scale: Scale, codec: text_lib.Codec) -> dict[int, Rows]:
  """Returns the questions of split test by their digits."""
  count = scale.questions * len(algorithms.MULTIPLES)
  found: dict[int, list[np.ndarray]] = {}
  starts: dict[int, int] = {}
  for example in algorithms.examples(
    'addition', 'test', length=scale.digits, count=count, seed=0, hints=True
  ):
    asked_L = codec.encode(example.inputs + reading.SEPARATOR)
    row_L = [[codec.eos_id], asked_L, codec.encode(example.references[0]), [codec.eos_id]]
    digits = int(example.facts['length'])
    found.setdefault(digits, []).append(np.concatenate(row_L).astype(np.int32))
    starts[digits] = 1 + len(asked_L)
  return {digits: Rows(np.stack(found[digits]), starts[digits]) for digits in sorted(found)}


def position(data: config_lib.DataConfig, length: int, ordinal: int) -> np.ndarray:
  """Returns position_1L of a batch: counted or, if the run draws them, drawn as its training does.

  A question that training might have had is the beginning of a row of training's length; a longer
  one is a row of its own.
  """
  if not data.position_range:
    return np.arange(length, dtype=np.int32)[None]
  row = max(length, data.length)
  drawn_L = positions.sample(row, data.position_range, seed=draws.JUDGE, ordinal=ordinal)
  return drawn_L[None, :length]


@functools.partial(jax.jit, static_argnums=0)
def _likeliest(transformer, params, inputs_BL, position_1L):
  """Returns the likeliest token after each."""
  return transformer.apply({'params': params}, inputs_BL, position_1L).argmax(axis=-1)


def right(
  transformer: model.Transformer, params: Any, asked: Rows, data: config_lib.DataConfig
) -> np.ndarray:
  """Returns right_W: whether each answer, EOS included, is what the model would write.

  Greedy text is the answer if and only if every token of it is the likeliest after those before,
  which one pass over question and answer tells of all at once, at positions drawn or not. ROWS
  questions share a draw, as those of a batch do in training.
  """
  count, length = asked.tokens_WL.shape[0], asked.tokens_WL.shape[1] - 1
  found = []
  for start in range(0, count, ROWS):
    index_B = np.minimum(start + np.arange(ROWS), count - 1)  # the last again fills up
    tokens_BL = asked.tokens_WL[index_B]
    position_1L = position(data, length, start // ROWS)
    likeliest_BL = _likeliest(transformer, params, tokens_BL[:, :-1], position_1L)
    same_BL = np.asarray(likeliest_BL)[:, asked.answer - 1 :] == tokens_BL[:, asked.answer :]
    found.append(same_BL.all(axis=1))
  return np.concatenate(found)[:count]


def measure(scale: Scale, name: str, seed: int, runs: pathlib.Path) -> Iterator[sweep_results.Line]:
  """Trains a run, or goes on with it, and yields its line."""
  run, workdir = config(scale, VARIANTS[name], seed), runs / f'{name.replace(", ", "_")}-{seed}'
  sweep.train_to_the_end(run, workdir)
  abstract = jax.eval_shape(functools.partial(train.init, run))['params']
  _, params = checkpoint.restore_params(workdir, abstract)
  lengths = []
  for digits, asked in rows(scale, text_lib.codec(run.data.spec())).items():
    right_W = right(train.make_model(run), params, asked, run.data)
    score = {'questions': len(right_W), 'accuracy': 100 * float(right_W.mean())}
    lengths.append({'length': digits, **score})
  yield {
    'variant': name,
    'seed': seed,
    'protocol': run.data.task,
    'mask': 'causal',
    'train_length': scale.digits,
    'lengths': lengths,
  }


def run(scale: Scale, seeds: Sequence[int], path: pathlib.Path, runs: pathlib.Path) -> str:
  """Trains and asks what is not done; writes and returns the table of all that is.

  Args:
    scale: of the models.
    seeds: of each variant.
    path: of the lines, to which that of a run is added when it is done.
    runs: where the runs are kept.

  Raises:
    errors.UserError: if there are lines of another task, as before a recipe changed.
  """
  lines = sweep_results.read(path) if path.exists() else []
  asked = config(scale, next(iter(VARIANTS.values())), 0).data.task
  if others := {line['protocol'] for line in lines} - {asked}:
    raise errors.UserError(
      f'{str(path)!r} has lines of {", ".join(sorted(others))}, but this scale asks {asked}; move '
      'it and its runs away'
    )
  found = {(line['variant'], line['seed']) for line in lines}
  todo = [
    (name, seed) for seed, name in itertools.product(seeds, VARIANTS) if (name, seed) not in found
  ]
  return sweep.complete(todo, lambda name, seed: measure(scale, name, seed, runs), path)


def main() -> None:
  """The command."""
  name, seeds = flags.FLAGS.scale, sweep.seeds_of_flags()
  runs = storage.local(flags.FLAGS.runs, '--runs') / name
  print(run(SCALES[name], seeds, HERE / f'{name}.jsonl', runs))


if __name__ == '__main__':
  flags.DEFINE_enum('scale', 'laptop', list(SCALES), 'the model and the numbers')
  flags.DEFINE_string('runs', 'runs/arithmetic', 'where the runs are kept')
  flags.DEFINE_list('seeds', ['0', '1', '2'], 'one or more, whole numbers')
  cli.run(main, 'interrupted; the same command goes on')
