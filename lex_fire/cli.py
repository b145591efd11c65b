"""How a command starts and ends: flags, one sentence for a user's mistake, and an exit status."""

import os
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence

import jax
from absl import app, flags, logging

from lex_fire import config as config_lib
from lex_fire import errors, hosts
from lex_fire.data import lazy


def fail(message: object) -> None:
  """Ends the command with one line on stderr and status 2."""
  print(f'{hosts.name()}error: {" ".join(str(message).split())}', file=sys.stderr)
  hosts.leave(2)


def _leave_unread() -> None:
  """Ends the command as a shell has it when nobody reads its output any more: status 141."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end
  hosts.leave(141)


def run(main: Callable[[], None], interrupted: str = 'interrupted') -> None:
  """Runs a command: status 0 when it is done, 2 for a mistake of the user's, 130 when interrupted.

  141, as a shell has it, when nobody reads its output any more. Any other exception is a defect and
  keeps its traceback.

  Args:
    main: the command.
    interrupted: the line on stderr that says what an interrupt leaves behind.
  """

  _define_module_import()

  def parse(argv):
    try:
      return flags.FLAGS(argv)
    except BrokenPipeError:  # by --help
      _leave_unread()
    except (AttributeError, KeyError) as error:  # what a ConfigDict raises for a field it lacks
      fail(_unknown_field(argv) or error)
    except (flags.Error, errors.UserError, OSError) as error:
      fail(_last_line(error))
    except Exception as error:  # a config file is Python, and may raise anything
      fail(f'cannot read --config: {type(error).__name__}: {_last_line(error)}; see configs/')

  def guarded(argv):
    if argv[1:]:
      fail(f'unknown argument {argv[1]!r}; flags start with --, see --help')
    try:
      lazy.import_modules(flags.FLAGS.module_import)
      main()
      hosts.part()
    except errors.UserError as error:
      fail(error)
    except KeyboardInterrupt:
      print(interrupted, file=sys.stderr)
      hosts.leave(130)
    except BrokenPipeError:
      _leave_unread()
    except Exception as error:
      if _is_of_memory(error):
        fail(
          f'out of memory: {_lines(error)[0]}; ask for less: a smaller '
          'data.batch_size (or train.accumulation), shorter lengths, a smaller model; `train '
          '--dry_run` and `compile` say what fits'
        )
      if sentence := errors.of_path(error) or errors.of_network(error):
        fail(sentence)
      if not hosts.have_met():
        raise
      lost = hosts.lost(error) if isinstance(error, jax.errors.JaxRuntimeError) else None
      if lost:
        print(f'{hosts.name()}error: {lost}', file=sys.stderr)
      else:
        traceback.print_exc()
      hosts.leave(1)

  # Libraries' notes on how they save and compile are not for our users; what goes wrong they raise.
  logging.set_verbosity(logging.FATAL)
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  app.run(guarded, flags_parser=parse)


def _is_of_memory(error: Exception) -> bool:
  """Whether a device or this machine had too little memory."""
  exhausted = isinstance(error, jax.errors.JaxRuntimeError) and 'RESOURCE_EXHAUSTED' in str(error)
  return exhausted or isinstance(error, MemoryError)


def _define_module_import() -> None:
  """Declares a flag of every command, by the name that seqio's own commands give it."""
  flags.DEFINE_multi_string('module_import', [], 'a module that registers seqio Tasks of your own')
  show_in_help('module_import')


def show_in_help(*names: str) -> None:
  """Has --help show flags that are declared by another module than the command's own."""
  for name in names:
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])


def _lines(error: Exception) -> list[str]:
  """Returns what an error says, or its kind: Python's own MemoryError says nothing."""
  return str(error).strip().splitlines() or [type(error).__name__]


# What Python says of a wrong number and a missing file, and what a user is told.
_SAID = {
  r'invalid literal for int\(\) with base 10: ': 'must be a whole number, not ',
  r'could not convert string to float: ': 'must be a number, not ',
  r"\[Errno 2\] No such file or directory: ('.*')": r'there is no file \1; see configs/',
}


def _last_line(error: Exception) -> str:
  """Returns what went wrong: the last line, as an error in a config file comes with its trace."""
  last = _lines(error)[-1].strip()
  last = last.removeprefix('lex_fire.errors.UserError: ')
  for python, said in _SAID.items():
    last = re.sub(python, said, last)
  return f'cannot read --config: {last}' if isinstance(error, OSError) else last


def _unknown_field(argv: Sequence[str]) -> str | None:
  """Returns what is wrong with the first flag --config.A.B that names no field of the config."""
  given = [argument.lstrip('-').partition('=') for argument in argv if argument.startswith('-')]
  file = next((value for name, _, value in given if name == 'config'), '')
  if not file:
    return None
  path, colon, arg = file.partition(':')
  try:
    fields = runpy.run_path(path)['get_config'](*([arg] if colon else [])).to_dict()
  except Exception:  # then it is the file that is wrong
    return None
  for name, _, _ in given:
    known = {'config': fields}
    for part in name.split('.') if name.startswith('config.') else ():
      if not isinstance(known, dict) or part not in known:
        there = ', '.join(known) if isinstance(known, dict) else 'nothing'
        return f'unknown config key {name.removeprefix("config.")!r}; known for {part!r}: {there}'
      known = known[part]
  return None


def define_config() -> None:
  """Declares --config=FILE.py:ARGUMENTS, whose fields are flags too, and --workdir."""
  from ml_collections import config_flags

  text = 'a file of configs/: FILE.py or FILE.py:NAME=VALUE,NAME=VALUE'
  config_flags.DEFINE_config_file('config', None, text)
  flags.DEFINE_string('workdir', None, 'where a run keeps its config, checkpoints and metrics')


def whole_numbers(name: str) -> tuple[int, ...] | None:
  """Returns the numbers of the list flag `name`, or None if it is not given.

  Raises:
    errors.UserError: if they are not whole.
  """
  texts: list[str] | None = flags.FLAGS[name].value
  if texts is None:
    return None
  try:
    return tuple(int(text) for text in texts)
  except ValueError as error:
    raise errors.UserError(
      f'--{name}={",".join(texts)} must be whole numbers, like 256,512,4096'
    ) from error


def config() -> config_lib.Config:
  """Returns the config that the flags describe.

  Raises:
    errors.UserError: if --config is missing or no readable file, or as config.Config.from_dict
      does.
  """
  if flags.FLAGS.config is None:
    raise errors.UserError('--config is missing, for example --config=configs/quickstart.py')
  try:
    values = flags.FLAGS.config.to_dict()
  except OSError as error:
    raise errors.UserError(_last_line(error)) from error
  return config_lib.Config.from_dict(values)
