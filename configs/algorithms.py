"""A decoder that learns an algorithm on short questions and is tested on ones eight times as long.

    python -m lex_fire.train --config=configs/algorithms.py:task=addition,encoding=fire \
      --workdir=runs/addition/fire
    python -m lex_fire.evaluate --workdir=runs/addition/fire --tasks=addition

Arguments: task (a key of lex_fire.data.algorithms.ALGORITHMS), length (of the longest question in
training, in symbols), hints (true: each symbol follows a marker of its place), randomized (true:
positions are drawn from as many as eight rows of training have, which `evaluate --tasks` has no
answers for; experiments/arithmetic asks such runs), encoding, size; lengths and zeros, options of
the task that make long sums easier to learn (lex_fire/data/algorithms.py).
"""

from ml_collections import config_dict

from lex_fire import arguments, errors, presets
from lex_fire.data import algorithm_tasks, algorithms, examples, reading, spec, vocabularies


def _row(task: str, length: int, ring: str) -> int:
  """Returns the tokens, here characters, of the longest question in training and its answer."""
  inputs, answer = algorithms.ALGORITHMS[task](examples.generator('a row'), length, ring)
  return len(inputs) + len(reading.SEPARATOR) + len(answer) + 1  # and EOS


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the config of an algorithm."""
  args = arguments.parse(
    arg,
    **{'task': 'addition', 'length': '20', 'hints': 'false', 'lengths': '', 'zeros': ''},
    **{'randomized': 'false', 'encoding': 'fire', 'size': 'tiny'},
  )
  given = (name for name in ('length', 'hints', 'lengths', 'zeros') if args[name])
  task = f'{args["task"]}:{",".join(f"{name}={args[name]}" for name in given)}'
  if args['task'] not in algorithms.ALGORITHMS:
    known = ', '.join(algorithms.ALGORITHMS)
    raise errors.UserError(f'unknown task={args["task"]!r}; known: {known}')
  asked = algorithm_tasks.options(spec.Spec(task))
  ring = algorithm_tasks.ring(spec.Spec(task), asked)
  vocabulary = vocabularies.BYTES if ring.isascii() else vocabularies.LATIN
  algorithm_tasks.question(spec.Spec(task, vocabulary.name))  # refuses what is wrong
  length = _row(args['task'], asked['length'], ring)
  longest = round(length * max(algorithms.MULTIPLES))
  if args['randomized'] not in ('true', 'false'):
    raise errors.UserError(f'randomized={args["randomized"]!r} must be true or false')
  position_range = longest if args['randomized'] == 'true' else 0
  return config_dict.ConfigDict(
    presets.make(
      args['size'],
      args['encoding'],
      encoding=presets.reaching(args['encoding'], longest),
      model={
        **{'activation': 'swiglu', 'd_ff': 344, 'norm': 'rmsnorm'},
        'vocab_size': vocabulary.size,
      },
      data={
        **{'task': task, 'vocabulary': vocabulary.name, 'length': length, 'batch_size': 64},
        'position_range': position_range,
      },
      optimizer={'learning_rate': 2e-3, 'warmup_steps': 100, 'encoding_rate': 10.0},
      train={'steps': 3000, 'log_every': 50, 'checkpoint_every': 500},
      evaluate={'lengths': (length,)},
    )
  )
