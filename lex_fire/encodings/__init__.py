"""Position encodings: the registry.

Adding one is a file, a line here and an oracle in the tests.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from lex_fire import errors
from lex_fire.encodings import (
  alibi,
  checks,
  fire,
  kerple,
  learned,
  nope,
  ntk,
  rope,
  rope_pi,
  sandwich,
  sinusoidal,
  t5,
  xpos,
  yarn,
)
from lex_fire.encodings.base import Encoding

ENCODINGS: dict[str, Callable[..., Encoding]] = {
  'nope': nope.nope,
  'sinusoidal': sinusoidal.sinusoidal,
  'learned': learned.learned,
  'rope': rope.rope,
  'rope_pi': rope_pi.rope_pi,
  'ntk': ntk.ntk,
  'dynamic_ntk': ntk.dynamic_ntk,
  'yarn': yarn.yarn,
  'xpos': xpos.xpos,
  'alibi': alibi.alibi,
  'kerple_log': kerple.kerple_log,
  'kerple_power': kerple.kerple_power,
  'sandwich': sandwich.sandwich,
  't5': t5.t5,
  'fire': fire.fire,
  'fire_s': functools.partial(fire.fire, shared=True),
}


def get(name: str, /, **changes: Any) -> Encoding:
  """Makes the encoding registered as `name`.

  >>> get('fire', hidden_layers=2).learned
  True
  >>> options('rope')
  {'base_period': 10000.0, 'pairing': 'halves'}

  Args:
    name: a key of ENCODINGS.
    **changes: options of its factory, e.g. `get('fire', hidden_layers=2)`; see `options`.

  Returns:
    The encoding.

  Raises:
    errors.UserError: for an unknown name, an option that the factory does not take, or a value
      of another type or out of its range; or as `checks.check` does for what the factory makes.
  """
  known = options(name)
  for option in changes:
    if option not in known:
      raise errors.UserError(
        f'encoding {name!r} has no option {option!r}; it takes: {", ".join(known) or "none"}'
      )
  for option, value in changes.items():
    default = known[option]
    if type(value) is not type(default) and not (type(default) is float and type(value) is int):
      raise errors.UserError(
        f'encoding option {option}={value!r} of {name!r} must be of type {type(default).__name__}'
      )
  return _make(ENCODINGS[name], **changes)


@functools.lru_cache(maxsize=256)
def _make(factory: Callable[..., Encoding], /, **changes: Any) -> Encoding:
  """Makes an encoding once: equal encodings are one value, for which nothing compiles twice.

  By its factory, not by its name: who registers another under the same name gets that.
  """
  encoding = factory(**changes)
  checks.check(encoding)
  return encoding


def options(name: str) -> dict[str, Any]:
  """Returns the options of the encoding registered as `name`, with their defaults.

  Raises:
    errors.UserError: for an unknown name, or an option without a default.
  """
  if name not in ENCODINGS:
    raise errors.UserError(f'unknown encoding {name!r}; known: {", ".join(sorted(ENCODINGS))}')
  factory = ENCODINGS[name]
  parameters = inspect.signature(factory).parameters.values()
  fixed = factory.keywords if isinstance(factory, functools.partial) else {}
  for parameter in parameters:
    if parameter.default is parameter.empty:
      raise errors.UserError(
        f'option {str(parameter)!r} of encoding {name!r} has no default; let its factory name each '
        'option, with a default'
      )
  return {p.name: p.default for p in parameters if p.name not in fixed}
