"""Pretraining on C4, as FIRE's models were: T5's 32,000 pieces, 2048 tokens (Li et al. 2023, 4.1).

    python -m lex_fire.train --config=configs/c4.py:size=base,encoding=fire --workdir=DIR \
      --config.data.tfds_directory=TFDS_DIR --config.data.directory=STREAMS_DIR

C4 must have been made in TFDS_DIR (tensorflow.org/datasets/catalog/c4); its stream of tokens is
prepared when a run first needs it, or before by `python -m lex_fire.data.prepare --task=c4
--vocabulary=t5 --split=train --tfds_directory=TFDS_DIR --directory=STREAMS_DIR`, and that of
`--split=validation` likewise.

Published: Li et al. 2023, sections 1 and 4.1, 125M parameters: 314,572,800,000 tokens, on unknown
hardware; FIRE loses least at every length, and leads the best baseline by 2.28 of perplexity, at a
size and a length that are not known here. Li et al. 2023, sections 1 and 4.1, 350M parameters:
314,572,800,000 tokens, on unknown hardware; FIRE loses least at every length.

`python -m lex_fire.evaluate --workdir=DIR` judges at the paper's lengths, 512 to 8192. A
training step of `size=base` with FIRE takes 2.82 of 15.75 GiB of each of 16 chips of TPU v5e, by
the compiler's account, in groups of four that share one copy of the parameters:
--config.mesh.fsdp=4 (experiments/compile_table).

Arguments: size (a preset of lex_fire.presets), encoding, vocabulary (t5, bytes, or the path of a
SentencePiece model), mesh (of presets.MESHES: any, chip, host, 8-gpus, v5e-256, v5p-512 or
two-slices-v5e-256). `python -m lex_fire.compile` says whether a size fits a mesh.
"""

from ml_collections import config_dict

from lex_fire import arguments, presets


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the config of a preset on C4."""
  args = arguments.parse(arg, size='base', encoding='fire', vocabulary='t5', mesh='any')
  data = {'task': 'c4', 'vocabulary': args['vocabulary']}
  mesh = presets.mesh(args['mesh'])
  values = presets.make(args['size'], args['encoding'], data=data, mesh=mesh)
  return config_dict.ConfigDict(values)
