"""Transformers that are trained on short sequences and used on long ones.

    import lex_fire
    fire = lex_fire.encodings.get('fire', hidden_layers=2)

`encodings` and `kernels` are pure functions; `model` is a Flax decoder that takes any of them;
`config` and `presets` say what a run is; `train`, `evaluate`, `analyze` and `generate` are the
commands, as functions; `analysis` measures what attention makes of distance, `sampling` says how
text is drawn.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from lex_fire import (
    analysis,
    analyze,
    config,
    encodings,
    evaluate,
    generate,
    kernels,
    model,
    presets,
    sampling,
    train,
    zoo,
  )

__all__ = [
  'analysis',
  'analyze',
  'config',
  'encodings',
  'evaluate',
  'generate',
  'kernels',
  'model',
  'presets',
  'sampling',
  'train',
  'zoo',
]


def __getattr__(name: str):
  """Imports a room when it is first used: preparing data, say, needs no JAX."""
  if name not in __all__:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return importlib.import_module(f'{__name__}.{name}')
