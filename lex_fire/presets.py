"""Runs as published, as data: what a preset says replaces the defaults of `config`.

`base` and `large` are FIRE's (Li et al. 2023, arXiv:2310.04418, section 4 and appendix),
`lex_medium` is LeX's (Sun et al. 2022, arXiv:2212.10554, section 4.1); `published` has what came of
them. What is not theirs is ours: warmups, weight decays, clipping and what the defaults of `config`
say of the model; FIRE's betas; LeX's width of the MLP, pieces (T5's) and cosine, where its learning
rate falls by a polynomial.
"""

from collections.abc import Sequence
from typing import Any

from lex_fire import config, encodings, errors

_PAPER = {
  'vocab_size': 32_128,  # T5's 32,000 pieces and 100 sentinels, rounded up
  'scan_layers': True,
  'remat': 'block',
  'dtype': 'bfloat16',
}
_350M = {'num_layers': 24, 'd_model': 1024, 'num_heads': 16, 'num_kv_heads': 16, 'head_dim': 64}
_FIRE_RUN = {
  'data': {'length': 2048, 'batch_size': 256},
  'train': {'steps': 600_000, 'checkpoint_every': 5000, 'log_every': 100},
  'evaluate': {'lengths': (512, 1024, 2048, 4096, 8192), 'protocol': 'windows'},
}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
  # 0.8M parameters, for a laptop: the defaults of `config`.
  'tiny': {},
  # Published as 125M parameters; 110M with the vocabulary above.
  'base': {
    'model': {
      'num_layers': 12,
      'd_model': 768,
      'num_heads': 12,
      'num_kv_heads': 12,
      'head_dim': 64,
      'd_ff': 3072,
      **_PAPER,
    },
    'optimizer': {'learning_rate': 6e-4, 'warmup_steps': 10_000},
    **_FIRE_RUN,
  },
  # Published as 350M parameters; 335M with the vocabulary above.
  'large': {
    'model': {**_350M, 'd_ff': 4096, **_PAPER},
    'optimizer': {'learning_rate': 3e-4, 'warmup_steps': 10_000},
    **_FIRE_RUN,
  },
  'lex_medium': {
    'model': {**_350M, 'd_ff': 4096, **_PAPER},
    'data': {'length': 1024, 'batch_size': 512},
    'optimizer': {'learning_rate': 3e-4, 'beta2': 0.98, 'epsilon': 1e-6, 'warmup_steps': 375},
    'train': {'steps': 50_000, 'checkpoint_every': 1000, 'log_every': 100},
    'evaluate': {'lengths': (256, 512, 1024, 2048, 4096), 'protocol': 'same_tokens'},
  },
}


# How devices share a run, for batches of 256 and more. Names with a number are Cloud TPU's: v5e-256
# has 256 chips, v5p-512 has 512 cores, two a chip (docs.cloud.google.com/tpu/docs/v5e and v5p).
MESHES: dict[str, dict[str, int]] = {
  'any': {},  # each of all devices there are has all parameters: the default of `config`
  'chip': {'replica': 1},
  'host': {'replica': 1, 'fsdp': 8},
  '8-gpus': {'replica': 1, 'fsdp': 8},
  'v5e-256': {'replica': 16, 'fsdp': 16},
  'v5p-512': {'replica': 32, 'fsdp': 8},
  # 512 chips, more than rows: two share the heads of each. `replica` goes over the slices.
  'two-slices-v5e-256': {'replica': 32, 'fsdp': 8, 'tensor': 2},
}


def mesh(name: str) -> dict[str, int]:
  """Returns the section `mesh` of a config.

  Args:
    name: a key of MESHES.

  Raises:
    errors.UserError: for another.
  """
  if name not in MESHES:
    raise errors.UserError(f'unknown preset mesh={name!r}; known: {", ".join(MESHES)}')
  return dict(MESHES[name])


def make(size: str, encoding_name: str, **sections: dict[str, Any]) -> dict[str, Any]:
  """Returns the config of a preset as nested dicts, for `config.Config.from_dict` or a ConfigDict.

  >>> values = make('base', 'fire', data={'length': 512})
  >>> values['model']['num_layers'], values['data']['length'], values['encoding']['threshold']
  (12, 512, 512.0)

  Args:
    size: a key of PRESETS.
    encoding_name: a key of encodings.ENCODINGS; all its options appear with their defaults.
    **sections: changes to the preset: `data={'length': 512}`, `encoding={'threshold': 64.0}`.

  Raises:
    errors.UserError: for an unknown size, encoding, section, field or value.
  """
  if size not in PRESETS:
    raise errors.UserError(f'unknown preset size={size!r}; known: {", ".join(PRESETS)}')
  values = config.Config().to_dict()
  values['encoding'] = {'name': encoding_name, **encodings.options(encoding_name)}
  for changes in (PRESETS[size], sections):
    for section, fields in changes.items():
      values.setdefault(section, {}).update(fields)
  # YaRN and dynamic NTK are told the length of training, which is the data's unless they are told.
  if 'train_length' in values['encoding'] and 'train_length' not in sections.get('encoding', {}):
    values['encoding']['train_length'] = values['data']['length']
  return config.Config.from_dict(values).to_dict()


def reaching(encoding_name: str, longest: int) -> dict[str, Any]:
  """Returns the options with which a short run reaches lengths that it does not train on.

  FIRE compresses distances for queries past its threshold; a run of minutes cannot learn to undo
  that, so its threshold is the longest length. A learned table has no positions past its own.

  Args:
    encoding_name: a key of encodings.ENCODINGS.
    longest: to be evaluated [tokens].
  """
  threshold = {'threshold': float(longest)}
  options = {'fire': threshold, 'fire_s': threshold, 'learned': {'max_length': longest}}
  return dict(options.get(encoding_name, {}))


def laptop(
  encoding_name: str, lengths: Sequence[int], **sections: dict[str, Any]
) -> dict[str, Any]:
  """Returns the config of a language model that a laptop trains in minutes, as nested dicts.

  Args:
    encoding_name: a key of encodings.ENCODINGS.
    lengths: to evaluate, the least of them that of training [tokens].
    **sections: changes, as for `make`.

  Raises:
    errors.UserError: as `make` does.
  """
  common: dict[str, dict[str, Any]] = {
    'encoding': reaching(encoding_name, max(lengths)),
    'model': {'activation': 'swiglu', 'd_ff': 344, 'norm': 'rmsnorm'},
    'data': {'length': min(lengths), 'batch_size': 8},
    'optimizer': {'encoding_rate': 10.0},
    'train': {'log_every': 20},
    'evaluate': {'lengths': tuple(lengths), 'max_tokens': 65_536},
  }
  changed = {section: fields | sections.pop(section, {}) for section, fields in common.items()}
  return make('tiny', encoding_name, **changed, **sections)
