"""The quickstart: a byte-level decoder on the Python standard library's text, on any laptop.

    python -m lex_fire.train --config=configs/quickstart.py:encoding=fire \
      --workdir=runs/quickstart/fire

What to expect, how long it takes, and why this recipe: experiments/quickstart/README.md.

Arguments: encoding (any of lex_fire.encodings.ENCODINGS).
"""

from ml_collections import config_dict

from lex_fire import arguments, presets

LENGTHS = (256, 512, 1024, 2048, 4096)  # evaluated [tokens]


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the config of the quickstart."""
  encoding = arguments.parse(arg, encoding='fire')['encoding']
  return config_dict.ConfigDict(
    presets.laptop(
      encoding,
      LENGTHS,
      optimizer={'learning_rate': 4e-3, 'warmup_steps': 40},
      train={'steps': 400, 'checkpoint_every': 200},
    )
  )
