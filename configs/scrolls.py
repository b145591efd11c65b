"""Finetunes a model on a task of SCROLLS, at a length beyond that of its pretraining.

    python -m lex_fire.train --config=configs/scrolls.py:task=qmsum,checkpoint=runs/c4/fire \
      --workdir=runs/qmsum/fire --config.data.tfds_directory=TFDS_DIR
    python -m lex_fire.evaluate --workdir=runs/qmsum/fire --tasks=scrolls_qmsum --lengths=8192

TFDS_DIR is made by `python -m lex_fire.data.build_scrolls` of the benchmark's own files. A row is
a question, cut to the length, and its answer, which alone is learned. The length is that of Li et
al. 2023 (section 4.3); learning rate, batch and steps are our own. The batch is a million tokens:
where it does not fit, as on a few devices, --config.train.accumulation=N computes the same step in
N parts, one after another; N times the number of devices must divide 128.

Published: Li et al. 2023, sections 1 and 4.3: an unknown number of tokens, on unknown hardware;
FIRE has the best mean score over SCROLLS, by over 1 point, in both sizes.

By `python -m lex_fire.compile --config=configs/scrolls.py:size=base --topology=v5e:4x4
--config.mesh.fsdp=4` a step at 8192 takes 4.97 of 15.75 GiB of each of 16 chips of TPU v5e, of
`size=large` 9.65 (at ba915c2), without `accumulation`; 2000 steps of it see 2,097,152,000 tokens.

Arguments: task (of SCROLLS), length, checkpoint (the workdir of a run: its model, encoding and
vocabulary are taken, and its newest parameters to start from); or, to learn from nothing, size (a
preset), encoding and vocabulary; and mesh (of presets.MESHES), as a pod's that trained a checkpoint
is not taken: replica x fsdp must divide the rows that are computed at once.
"""

from ml_collections import config_dict

from lex_fire import arguments, errors, finetuning
from lex_fire.data import scrolls


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the config of finetuning on a task of SCROLLS."""
  args = arguments.parse(arg, task='qmsum', length='8192', **finetuning.ARGUMENTS)
  if args['task'] not in scrolls.CONFIGS:
    known = ', '.join(scrolls.CONFIGS)
    raise errors.UserError(f'unknown task={args["task"]!r} of SCROLLS; known: {known}')
  return config_dict.ConfigDict(finetuning.make(args, f'{scrolls.PREFIX}{args["task"]}'))
