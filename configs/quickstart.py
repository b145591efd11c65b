"""The quickstart: a byte-level decoder on the Python standard library's text, on any laptop.

    python -m lex_fire.train --config=configs/quickstart.py:encoding=fire --workdir=runs/quickstart/fire

Arguments: encoding (any of lex_fire.encodings.ENCODINGS).
"""

from ml_collections import config_dict

from lex_fire import config, presets


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the config of the quickstart."""
  encoding = config.parse_arg(arg, encoding='fire')['encoding']
  options = {'threshold': 64.0} if encoding.startswith('fire') else {}
  return config_dict.ConfigDict(presets.make('tiny', encoding, encoding=options))
