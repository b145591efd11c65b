"""How a command starts and ends: flags, one sentence for a user's mistake, and an exit status."""

import os
import sys
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import config_flags

from lex_fire import config as config_lib
from lex_fire import errors


def fail(message: object) -> None:
  """Ends the command with one line on stderr and status 2."""
  print(f'error: {" ".join(str(message).split())}', file=sys.stderr)
  sys.exit(2)


def run(main: Callable[[], None]) -> None:
  """Runs a command: status 0 when it is done, 2 for a mistake of the user's, 130 when interrupted.

  Any other exception is a defect and keeps its traceback.
  """

  def parse(argv):
    try:
      return flags.FLAGS(argv)
    except (flags.Error, errors.UserError) as error:
      fail(_last_line(error))

  def guarded(argv):
    if argv[1:]:
      fail(f'unknown argument {argv[1]!r}; flags start with --, see --help')
    try:
      main()
    except errors.UserError as error:
      fail(error)
    except KeyboardInterrupt:
      print('interrupted; the same command goes on from the last checkpoint', file=sys.stderr)
      sys.exit(130)

  # Libraries' notes on how they save and compile are not for our users.
  logging.set_verbosity(logging.ERROR)
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  app.run(guarded, flags_parser=parse)


def _last_line(error: Exception) -> str:
  """Returns what went wrong; of an error in a config file, which comes with its trace, the last line."""
  return str(error).strip().splitlines()[-1].removeprefix('lex_fire.errors.UserError: ')


def define_config() -> None:
  """Declares --config=FILE.py:ARGUMENTS, whose fields are flags too, and --workdir."""
  config_flags.DEFINE_config_file(
    'config', None, 'a file of configs/, FILE.py or FILE.py:NAME=VALUE'
  )
  flags.DEFINE_string('workdir', None, 'where a run keeps its config, checkpoints and metrics')


def config() -> config_lib.Config:
  """Returns the config that the flags describe.

  Raises:
    errors.UserError: if --config is missing, or as config.Config.from_dict does.
  """
  values = flags.FLAGS.config
  if values is None:
    raise errors.UserError('--config is missing, for example --config=configs/quickstart.py')
  return config_lib.Config.from_dict(values.to_dict())
