"""The models that ship with the package: the quickstart's, on windows twice as long, for longer.

    python -m lex_fire.train --config=configs/zoo.py:encoding=fire --workdir=runs/shipped/fire

Expect what their cards say (lex_fire/weights/NAME.md). experiments/shipped/README.md has how the
recipe was found.

Arguments: encoding (any of lex_fire.encodings.ENCODINGS; four ship).
"""

from ml_collections import config_dict

from lex_fire import arguments, presets

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)  # evaluated [tokens]
# By encoding, what was found to be better than its defaults, and than the laptop's recipe.
BETTER = {'fire': {'encoding': {'hidden_layers': 2}, 'optimizer': {'encoding_rate': 30.0}}}


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the config of a model that ships."""
  encoding = arguments.parse(arg, encoding='fire')['encoding']
  better = BETTER.get(encoding, {})
  return config_dict.ConfigDict(
    presets.laptop(
      encoding,
      LENGTHS,
      encoding=better.get('encoding', {}),
      optimizer={'learning_rate': 2e-3, 'warmup_steps': 100} | better.get('optimizer', {}),
      train={'steps': 1500, 'checkpoint_every': 500},
    )
  )
