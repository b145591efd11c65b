"""The one exception for a mistake in what a user gave, and what a file system says of one."""

import errno

# What a file system says of a path that a user gave, wherever it is opened.
_OF_PATHS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP}


# Modules whose errors are what a bucket's client raises.
_OF_BUCKETS = ('aiohttp.', 'gcsfs.', 'google.auth.', 'google.api_core.', 'google.cloud.')


class UserError(ValueError):
  """A mistake in the user's input.

  Its message is one sentence: what was wrong, the value, the allowed, the remedy.

  Commands print the message alone and exit with status 2 (`lex_fire.cli`); in a notebook it is an
  ordinary ValueError. Anything else that is raised is a defect of lex_fire and keeps its traceback.
  """


def of_path(error: Exception) -> str | None:
  """Returns what is wrong with a user's path and what to do; None for an error of another kind."""
  if not isinstance(error, OSError) or error.errno not in _OF_PATHS or error.filename is None:
    return None
  return f'{error.strerror}: {str(error.filename)!r}; give another path, or the right to use it'


def of_network(error: Exception) -> str | None:
  """Returns what is wrong with the way to a bucket, of its client's errors; None for another."""
  if not f'{type(error).__module__}.'.startswith(_OF_BUCKETS):
    return None
  return f'cannot reach the bucket: {error}; see that there is a network, and that you may use it'
