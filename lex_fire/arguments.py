"""The argument of a config file, what follows the colon of `--config=FILE:NAME=VALUE,...`."""

from lex_fire import errors


def parse(arg: str, **defaults: str) -> dict[str, str]:
  """Parses the argument of a config file: 'size=base,encoding=rope' -> {'size': 'base', ...}.

  Args:
    arg: what follows the colon of `--config=FILE:ARG`.
    **defaults: the arguments there are, with their defaults.

  Raises:
    errors.UserError: for an argument that is not among them, or not NAME=VALUE.
  """
  values = dict(defaults)
  for part in filter(None, arg.split(',')):
    name, equals, value = part.partition('=')
    if name not in defaults or not equals:
      raise errors.UserError(
        f'unknown config argument {part!r}; known: {", ".join(f"{name}=" for name in defaults)}'
      )
    values[name] = value
  return values


def whole(name: str, text: str) -> int:
  """Reads an argument of a config file that must be a whole number above 0.

  Raises:
    errors.UserError: if it is none.
  """
  if not text.isdecimal() or int(text) < 1:
    raise errors.UserError(f'config argument {name}={text} must be a whole number above 0')
  return int(text)
