"""Pretraining on the Pile's form, as LeX's models were: 1024 tokens a row (Sun et al. 2022, 4.1).

    python -m lex_fire.train --config=configs/pile.py:encoding=xpos --workdir=runs/pile/xpos \
      --config.data.train_files='PILE/train/*.jsonl.zst' \
      --config.data.validation_files='PILE/val.jsonl.zst'
    python -m lex_fire.evaluate --workdir=runs/pile/xpos --documents=jsonl --files='ARXIV/*.jsonl'

Published: Sun et al. 2022, section 4.1: 26,214,400,000 tokens, on 16 V100; xPos in blocks is the
only one whose perplexity falls up to 4096. Perplexity on arXiv, the first 4096 tokens of
documents mostly longer than 6,000 (tables 2 and 5):

                             256       512      1024      2048      4096
    xpos blockwise         34.30     27.55     23.31     21.60     20.73
    alibi causal           37.66     29.92     24.99     23.14     24.26
    alibi blockwise        37.66     29.92     24.99     24.60     25.37
    rope blockwise         38.09     30.38     25.52     25.57     25.65
    xpos causal            34.30     27.55     23.31     22.56     28.43
    rope causal            38.09     30.38     25.52     73.60    294.45
    sinusoidal unclear     46.34     36.39     29.94    132.63   1283.79

Expect the order, not the levels: those are of another vocabulary, which the paper does not name.
The corpus was nine parts of the Pile, arXiv none of them. Books3, one of the nine, is handed out no
more (huggingface.co/datasets/the_pile_books3), so there is no Task of it: `jsonl` reads the Pile's
form, a document a line in field text, compressed or not, of whatever you have. The paper's first
version tells neither steps (the tokens above are 50,000 of 512 rows), warmup, weight decay, dropout
nor width of the MLP; its learning rate falls by a polynomial, ours on a cosine.

Arguments: size (a preset of lex_fire.presets), encoding, vocabulary (t5, bytes, or the path of a
SentencePiece model), mesh (of presets.MESHES: any, chip, host, 8-gpus, v5e-256, v5p-512 or
two-slices-v5e-256).
"""

from ml_collections import config_dict

from lex_fire import arguments, presets


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the config of a preset on JSON lines, judged without and with LeX's blocks."""
  args = arguments.parse(arg, size='lex_medium', encoding='xpos', vocabulary='t5', mesh='any')
  values = presets.make(
    args['size'],
    args['encoding'],
    data={'task': 'jsonl', 'vocabulary': args['vocabulary']},
    mesh=presets.mesh(args['mesh']),
    evaluate={'masks': ('causal', 'blockwise')},
  )
  return config_dict.ConfigDict(values)
