"""seqio and TensorFlow, imported when they are needed and without what they write on the way.

They cost seconds and 800 MB, so nothing imports them before a Task is asked for.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

from lex_fire import errors


@functools.cache
def seqio() -> types.ModuleType:
  """Imports seqio and keeps TensorFlow off the GPUs, whose memory it would take from JAX."""
  # What its C++ code says of an error stands in the exception too.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  with quiet_stderr():
    import seqio as module
    import tensorflow as tf

    # RuntimeError: TensorFlow is at work on a GPU already, as in a notebook whose owner wants that.
    with contextlib.suppress(RuntimeError):
      tf.config.set_visible_devices([], 'GPU')
  return module


def import_modules(names: Iterable[str]) -> None:
  """Imports modules that register seqio Tasks of the user's.

  Args:
    names: of modules, as in `import NAME`.

  Raises:
    errors.UserError: if one cannot be imported.
  """
  for name in names:
    if not name or name.startswith('.'):
      raise errors.UserError(f'--module_import={name!r} must be the whole name of a module')
    seqio()  # first, and in its way
    try:
      importlib.import_module(name)
    except ImportError as error:
      raise errors.UserError(
        f'cannot import module {name!r}: {error}; start where it is, or say where by PYTHONPATH'
      ) from error


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
  """Drops what C++ code writes to stderr: TensorFlow's start-up notes obey no log level."""
  sys.stderr.flush()
  saved = os.dup(2)
  with open(os.devnull, 'wb') as nowhere:
    os.dup2(nowhere.fileno(), 2)
  try:
    yield
  finally:
    sys.stderr.flush()
    os.dup2(saved, 2)
    os.close(saved)


def _place(source: Any) -> str:
  """Says which dataset of TFDS a seqio source reads, and where; '': it is of another kind."""
  dataset = getattr(source, 'tfds_dataset', None)
  if dataset is None:
    return ''
  where = 'its own directory' if dataset.data_dir is None else repr(dataset.data_dir)
  return f'{dataset.name!r} in {where}'


@contextlib.contextmanager
def source_errors(source: Any) -> Iterator[None]:
  """Makes users' mistakes of what TensorFlow and TFDS raise for them, reading a seqio source."""
  import tensorflow as tf
  from tensorflow_datasets.core import registered

  try:
    yield
  except tf.errors.OpError as error:
    place = _place(source)
    if place and isinstance(error, tf.errors.DataLossError | tf.errors.NotFoundError):
      raise errors.UserError(
        f'the files of {place} are damaged or not all there: {error.message.splitlines()[0]}; copy '
        'or make them again'
      ) from error
    # Of a UserError raised in a corpus TensorFlow keeps nothing but the text.
    _, found, message = error.message.partition('UserError: ')
    if not found:
      raise
    raise errors.UserError(message.splitlines()[0]) from error
  except (registered.DatasetNotFoundError, AssertionError, FileNotFoundError, KeyError) as error:
    place = _place(source)
    if not place:
      raise
    raise errors.UserError(
      f'TFDS has no {place}; make it there first (SCROLLS by lex_fire.data.build_scrolls, others '
      'by `tfds build`), or say with data.tfds_directory (--tfds_directory) where it is'
    ) from error
