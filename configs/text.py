"""Any preset on your own text files, as bytes: one file a document, plain or compressed.

    python -m lex_fire.train --config=configs/text.py:size=tiny,encoding=fire --workdir=runs/books \
      --config.data.train_files='books/train/*.txt.gz' \
      --config.data.validation_files='books/validation/*.txt.gz'

Arguments: size (a preset of lex_fire.presets, as published), encoding, mesh (of presets.MESHES:
any, chip, host, 8-gpus, v5e-256, v5p-512 or two-slices-v5e-256).
"""

from ml_collections import config_dict

from lex_fire import arguments, presets


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the config of a preset on local text files."""
  args = arguments.parse(arg, size='tiny', encoding='fire', mesh='any')
  mesh = presets.mesh(args['mesh'])
  values = presets.make(args['size'], args['encoding'], data={'task': 'text'}, mesh=mesh)
  return config_dict.ConfigDict(values)
