"""A command that compares runs: what its flags ask, how far it is, and the files it writes.

It first finds out all that is asked of it, then works for minutes or hours, then writes.
"""

import contextlib
import dataclasses
import operator
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from absl import flags

from lex_fire import (
  benchmark,
  checkpoint,
  cli,
  comparison,
  errors,
  kernels,
  metrics,
  reporting,
  storage,
)
from lex_fire import config as config_lib
from lex_fire.data import protocols
from lex_fire.data import spec as spec_lib

_ROOM = 1 << 20  # bytes; results take less
# Flags of one value that are fields of config.EvaluateConfig by their names.
_FIELDS = (
  *('protocol', 'stride', 'max_tokens', 'attention', 'sequence'),
  *('documents', 'split', 'files', 'tfds_directory', 'checkpoint'),
)

_MOST = 140  # characters of a name, beside which there are those of a task and of an ending
# Fields of which files tell where they are not those of the run's config, by what names.
_NAMED = {'lengths': 'lengths', 'max_tokens': 'tokens', 'attention': 'attention'}


class Progress:
  """Prints, as windows are read, the case, the length, tokens/s and the time left."""

  def __init__(self, num_cases: int, windows: Mapping[int, protocols.EvaluationWindows]):
    """Expects the windows of each length to be read for so many cases, of all runs."""
    self._total = num_cases * sum(cut.inputs_WL.size for cut in windows.values())
    self._done, self._start = 0, time.monotonic()
    self._shown = self._start

  def __call__(self, case: str, length: int, tokens: int) -> None:
    """Takes note of `tokens` more."""
    self._done += tokens
    now = time.monotonic()
    if now - self._shown > 2.0:
      rate = self._done / (now - self._start)
      left = max(self._total - self._done, 0) / rate
      reporting.say(f'{case} at {length}: {rate:,.0f} tokens/s, ETA {metrics.clock(left)}')
      self._shown = now


def _request(config: config_lib.Config) -> config_lib.EvaluateConfig:
  """Returns the request of the flags, completed by the first run's config."""
  values = {
    'lengths': cli.whole_numbers('lengths'),
    'masks': flags.FLAGS['mask'].value,
    'encodings': flags.FLAGS['encoding'].value,
    **{name: flags.FLAGS[name].value for name in _FIELDS},
  }
  given = {field: value for field, value in values.items() if value is not None}
  return dataclasses.replace(
    config.evaluate,
    **{field: tuple(value) if isinstance(value, list) else value for field, value in given.items()},
  )


def same_tokens(request: config_lib.EvaluateConfig) -> tuple[str, ...]:
  """Returns in which fields runs must be alike for their losses to be of the same tokens."""
  own = ('data.task', f'data.{request.split}_files')
  if request.documents:
    own = ()
  elif request.split not in spec_lib.SPLITS_OF_FILES:
    own = own[:1]
  return (*own, 'data.vocabulary', 'model.causal')


def _check_alike(workdirs, configs, fields) -> None:
  """Refuses runs whose configs differ in some fields, in which they must agree to be compared."""
  for workdir, config in zip(workdirs, configs, strict=True):
    for field in [*fields, *([] if config.model.causal else ['data.mask_rate'])]:
      first, other = (operator.attrgetter(field)(c) for c in (configs[0], config))
      if first != other:
        raise errors.UserError(
          f'{str(workdir)!r} has {field}={other!r}, not {first!r} as {str(workdirs[0])!r}; '
          'evaluate it alone'
        )


def _file_name(runs: Sequence[str], request: config_lib.EvaluateConfig, about: str) -> str:
  """Names files after runs and what is not as trained."""
  parts = list(runs)
  if request.checkpoint != config_lib.LATEST:
    parts.append(f'checkpoint-{request.checkpoint}')
  for texts in (request.encodings, request.masks):
    parts += texts if set(texts) != {config_lib.AS_TRAINED} else ()
  parts = [re.sub(r'[^\w.]+', '-', part).strip('-') for part in parts]
  return _short([*parts, about])


def _short(parts):
  return benchmark.file_name('_'.join(parts), _MOST)


def _how(request: config_lib.EvaluateConfig) -> str:
  """Says which tokens are scored, and how, so that other numbers do not replace these in files."""
  documents = [request.documents] if request.documents else []
  documents += [] if request.split == config_lib.EvaluateConfig.split else [request.split]
  documents += [request.files] if request.files else []
  parts = [benchmark.file_name(' '.join(documents))] if documents else []
  parts += [request.protocol, *([f'stride-{request.stride}'] if request.stride else [])]
  return '_'.join(parts)


def _otherwise(request: config_lib.EvaluateConfig, own: config_lib.EvaluateConfig) -> list[str]:
  """Returns what of _NAMED is not as the (first) run's config has it, as parts of a file's name."""
  return [
    named(name, value)
    for field, name in _NAMED.items()
    if (value := getattr(request, field)) != getattr(own, field)
  ]


def named(name: str, value: Any) -> str:
  """Returns a part of a file's name that tells a value, or a sequence of them."""
  values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
  return benchmark.file_name('-'.join(map(str, [name, *values])), 50)


def output_directory(directory: pathlib.Path, name: str) -> pathlib.Path:
  """Makes a directory, before hours are spent on what could not be written there.

  Raises:
    errors.UserError: if files of that name cannot be written into it.
  """
  path = directory / f'.{name}.tried'
  if jax.process_index():
    return directory  # the first process writes
  with _writing(name, directory):
    directory.mkdir(parents=True, exist_ok=True)
    storage.write(path, ' ' * _ROOM)
    path.unlink()
  return directory


@contextlib.contextmanager
def _writing(name: str, directory: pathlib.Path) -> Iterator[None]:
  """Makes a user's mistake of what cannot be written."""
  try:
    yield
  except OSError as error:
    raise errors.UserError(
      f'cannot write {name!r} into {str(directory)!r}: {error.strerror or error}; '
      'give another --output or --name'
    ) from error


class Asked(NamedTuple):
  """What the flags ask for, checked.

  Attributes:
    workdirs: of the runs.
    runs: their names.
    configs: of the runs, with the request in `evaluate`.
    request: the same for all.
    num_cases: of all runs together.
    directory: of the files, which can be written.
    name: of the files.
    common_name: that name, but for what of _NAMED is not as the first run's config has it: of what
      files of other lengths share.
  """

  workdirs: list[pathlib.Path]
  runs: list[str]
  configs: list[config_lib.Config]
  request: config_lib.EvaluateConfig
  num_cases: int
  directory: pathlib.Path
  name: str
  common_name: str


def asked(
  prefix: str = '',
  about: str | None = None,
  alike: Sequence[str] | None = None,
  more: Sequence[str] = (),
) -> Asked:
  """Reads the flags, and the configs of the runs, and refuses what cannot be done.

  Args:
    prefix: of the files' name, unless the flags give it.
    about: which ends that name; by default what `_how` says.
    alike: fields in which the runs' configs must agree; by default those of `same_tokens`.
    more: parts of that name, after all others.

  Raises:
    errors.UserError: for a mistake in the flags.
  """
  workdirs = [storage.path(workdir) for workdir in flags.FLAGS.workdir or ()]
  if not workdirs:
    raise errors.UserError('--workdir is missing: the run or runs (DIR,DIR) to evaluate')
  if len({workdir.resolve() for workdir in workdirs}) < len(workdirs):
    raise errors.UserError(f'--workdir={",".join(map(str, workdirs))} names a run twice')
  configs = [checkpoint.read_config(workdir) for workdir in workdirs]
  own = configs[0].evaluate
  request = _request(configs[0])
  _check_alike(workdirs, configs, same_tokens(request) if alike is None else alike)
  configs = [dataclasses.replace(config, evaluate=request) for config in configs]
  num_cases = sum(len(comparison.cases(config)) for config in configs)
  runs = comparison.names(workdirs)
  about = about or _how(request)
  of_runs = runs
  if len(runs) == 1:  # of which other ones may have the same last name
    of_runs = [str(workdirs[0])] if flags.FLAGS.output else []
  common_name = flags.FLAGS.name or prefix + _file_name(of_runs, request, about)
  name = flags.FLAGS.name or _short([common_name, *_otherwise(request, own), *more])
  directory = storage.path(flags.FLAGS.output or _default_directory(workdirs))
  output_directory(directory, name)
  return Asked(workdirs, runs, configs, request, num_cases, directory, name, common_name)


def _default_directory(workdirs: Sequence[pathlib.Path]) -> str:
  """Returns `evaluations` in the directory that has all runs, as seen from here."""
  directory = os.fspath(storage.common(workdirs) / 'evaluations')
  return directory if storage.is_bucket(directory) else os.path.relpath(directory)


def write_files(
  directory: pathlib.Path, writers: Mapping[str, Callable[[pathlib.Path], None]]
) -> list[pathlib.Path]:
  """Writes files into a directory, each whole or not at all, by the first process.

  Args:
    directory: where.
    writers: {file name: writes the file of a path}.

  Returns:
    The paths.

  Raises:
    errors.UserError: if one cannot be written.
  """
  paths = []
  for name, write_file in writers.items():
    paths.append(directory / name)
    if jax.process_index() == 0:
      with _writing(name, directory), tempfile.TemporaryDirectory() as own:
        made = pathlib.Path(own) / name
        write_file(made)
        storage.write(paths[-1], made.read_bytes())
  return paths


def define_flags() -> None:
  """Declares the flags that `asked` reads."""
  # Lists are not repeated as --encoding is: none is dropped without a word.
  flags.DEFINE_list(
    'workdir', None, 'the run or runs to evaluate, DIR or DIR,DIR', allow_overwrite=False
  )
  flags.DEFINE_string(
    'checkpoint',
    None,
    "of each run: latest, best (of the lowest validation loss) or a step (default: the run's "
    'config)',
  )
  flags.DEFINE_list(
    'lengths', None, "of the windows, in tokens (default: the run's config)", allow_overwrite=False
  )
  flags.DEFINE_list(
    'mask',
    None,
    'one or more to compare: as_trained, causal, blockwise (blocks of half the training length), '
    "blockwise:N, window:N, or full for a bidirectional model (default: the run's config)",
    allow_overwrite=False,
  )
  flags.DEFINE_multi_string(
    'encoding',
    None,
    'in the place of the one trained with, NAME or NAME:OPTION=VALUE,OPTION=VALUE; repeat the flag '
    'to compare several, as_trained among them; options that are not given stay as trained where '
    'both have them (base_period and pairing of a rotation), and train_length is that of the run '
    "(default: the run's config); of analyze without --workdir: those to draw, NAME,NAME",
  )
  known = ', '.join(('auto', *kernels.IMPLEMENTATIONS))
  flags.DEFINE_string('attention', None, f"one of {known} (default: the run's config)")
  known = ', '.join(protocols.PROTOCOLS)
  flags.DEFINE_string('protocol', None, f"one of {known} (default: the run's config)")
  flags.DEFINE_integer(
    'stride',
    None,
    'by how many tokens a window moves on: it scores its last that many, the first of a document '
    'all (not of analyze); divides every length; 0: windows end to end (default: the '
    "run's config)",
  )
  flags.DEFINE_integer('max_tokens', None, "scored at each length (default: the run's config)")
  flags.DEFINE_integer(
    'sequence',
    None,
    'devices that share the tokens of each window, for lengths that one cannot hold; twice as many '
    "divide every length (not of analyze; default: the run's config)",
  )
  flags.DEFINE_string(
    'output',
    None,
    'a directory (default: evaluations/ in the workdir, or of several runs in the deepest '
    'directory that has all)',
  )
  flags.DEFINE_string('name', None, 'of the files there (default: what is compared, and how)')
  flags.DEFINE_string(
    'documents',
    None,
    'a task of documents that takes the place of the one trained on: stdlib, text, jsonl, c4, '
    "pg19, or a registered seqio Task (default: the run's own)",
  )
  flags.DEFINE_string(
    'split', None, 'of the documents or tasks (default: test of algorithms, else validation)'
  )
  flags.DEFINE_string(
    'files', None, "a glob of that split's files, for documents=text and jsonl and around needles"
  )
  flags.DEFINE_string('tfds_directory', None, "of TensorFlow Datasets (default: the run's config)")
