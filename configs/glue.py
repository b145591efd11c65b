"""Finetunes a model on a task of GLUE or SuperGLUE: does it still read short texts?

    python -m lex_fire.train --config=configs/glue.py:task=glue_sst2,checkpoint=runs/c4/fire \
      --workdir=runs/sst2/fire --config.data.tfds_directory=TFDS_DIR
    python -m lex_fire.evaluate --workdir=runs/sst2/fire --tasks=glue_sst2 --lengths=512

TFDS_DIR is where TFDS has made glue/sst2 (`tfds build glue/sst2 --data_dir=TFDS_DIR`, which loads
it from the web). Length and batch are those of T5's finetuning (Raffel et al. 2020, section 3.1.2);
learning rate and steps are our own: 256,000 rows, under one pass over MNLI and a thousand over CB,
for which --config.train.steps may be less.

Published: Li et al. 2023, and a review of it: an unknown number of tokens, on unknown hardware; on
short texts FIRE is not better than RoPE, as the reviewer reads its scores.

By `python -m lex_fire.compile --config=configs/glue.py:size=base --topology=v5e:4x4
--config.mesh.fsdp=4` a step at 512 takes 0.97 of 15.75 GiB of each of 16 chips of TPU v5e (at
ba915c2); 2000 steps of it see 131,072,000 tokens.

Arguments: task (a name for `evaluate --tasks`: glue_sst2, super_glue_boolq ...), length, checkpoint
(the workdir of a run: its model, encoding and vocabulary are taken, and its newest parameters to
start from); or, to learn from nothing, size (a preset), encoding and vocabulary; and mesh (of
presets.MESHES), as a pod's that trained a checkpoint is not taken.
"""

from ml_collections import config_dict

from lex_fire import arguments, errors, finetuning
from lex_fire.data import glue


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the config of finetuning on a task of GLUE or SuperGLUE."""
  args = arguments.parse(arg, task='glue_sst2', length='512', **finetuning.ARGUMENTS)
  if args['task'] not in glue.TASKS:
    known = ', '.join(glue.TASKS)
    raise errors.UserError(f'unknown task={args["task"]!r} of GLUE and SuperGLUE; known: {known}')
  return config_dict.ConfigDict(finetuning.make(args, args['task']))
