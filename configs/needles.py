"""A decoder that learns to find what is hidden in text, to be tested in longer text.

    python -m lex_fire.train --config=configs/needles.py:task=passkey,encoding=fire \
      --workdir=runs/passkey/fire
    python -m lex_fire.evaluate --workdir=runs/passkey/fire --tasks=passkey --lengths=512,1024,2048

On two cores that would take hours: experiments/needles/README.md has what came of a fifth as many
tokens in 13 to 40 minutes.

The text is the standard library's own source; --config.data.train_files and validation_files name
other. Arguments: task (a key of lex_fire.data.needles.NEEDLES), length (of a row [tokens]),
encoding, size (a preset), checkpoint ('' or the workdir of a run of the same model to start from).
"""

from ml_collections import config_dict

from lex_fire import arguments, presets

TIMES = 16  # the length of training: the longest that is to be evaluated


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the config of a needle."""
  args = arguments.parse(
    arg, task='passkey', length='512', encoding='fire', size='tiny', checkpoint=''
  )
  length = arguments.whole('length', args['length'])
  return config_dict.ConfigDict(
    presets.make(
      args['size'],
      args['encoding'],
      encoding=presets.reaching(args['encoding'], TIMES * length),
      model={'activation': 'swiglu', 'd_ff': 344, 'norm': 'rmsnorm'},
      data={'task': f'{args["task"]}:length={length}', 'length': length, 'batch_size': 32},
      optimizer={'learning_rate': 2e-3, 'warmup_steps': 100, 'encoding_rate': 10.0},
      train={
        'steps': 2000,
        'log_every': 50,
        'checkpoint_every': 500,
        'start_from': args['checkpoint'],
      },
      evaluate={'lengths': (length, 2 * length, 4 * length)},
    )
  )
