"""How a trained model does at lengths far past training: a table, a plot, CSV and JSON.

    python -m lex_fire.evaluate --workdir=DIR[,DIR...] --lengths=256,512,4096 --protocol=same_tokens

Everything is read from the workdirs: config, checkpoint and, by the config, the Task's documents.
"""

import csv
import dataclasses
import functools
import json
import math
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from lex_fire import checkpoint, cli, errors, loss, metrics, model, plot, sharding, train
from lex_fire import config as config_lib
from lex_fire.data import protocols, tasks

SPLIT = 'validation'
MIN_DOCUMENTS = 16  # that share the budget, if the longest length lets them: few would be no sample
TOKENS_PER_BATCH = 32_768  # a device, of whole rows: at least one
LOGITS_PER_BATCH = 2**29  # likewise: 2 GiB of float32


def evaluate(
  workdir: str | pathlib.Path,
  request: config_lib.EvaluateConfig | None = None,
  progress: Callable[[int, int], None] = lambda length, tokens: None,
) -> dict[str, Any]:
  """Evaluates the newest checkpoint of a run.

  Args:
    workdir: of the run.
    request: what to evaluate; by default what the run's config says.
    progress: is called with a length and the tokens scored of it since the last call.

  Returns:
    The report, of JSON values: protocol, checkpoint step, encoding, mask, tokenizer and so on; by
    length the tokens scored, nats per token, its standard error, perplexity and bits per byte; and
    the loss by position in the longest windows.

  Raises:
    errors.UserError: if the workdir has no run or no checkpoint, a length is past the encoding, or
      the documents do not allow the lengths or the budget.
  """
  workdir = pathlib.Path(workdir)
  config = checkpoint.read_config(workdir)
  request = request or config.evaluate
  transformer = train.make_model(config)
  for length in request.lengths:
    model.check_length(transformer.encoding, length)
  files = {SPLIT: config.data.files[SPLIT]} if config.data.files else None
  task = tasks.get_task(config.data.task, files)
  windows = _windows(task, request)
  mesh = sharding.make_mesh()
  with jax.set_mesh(mesh):
    step, params = _restore(config, workdir, mesh)
    losses = {
      length: _losses(transformer, params, windows[length], functools.partial(progress, length))
      for length in sorted(request.lengths)
    }
  longest = max(request.lengths)
  return {
    'run': workdir.name,
    'checkpoint_step': step,
    'encoding': config.to_dict()['encoding'],
    'mask': 'causal',
    'train_length': config.data.length,
    'task': config.data.task,
    'split': SPLIT,
    'tokenizer': tasks.vocabulary_of(task).name,
    'protocol': request.protocol,
    'documents': len(np.unique(windows[longest].document_W)),
    'lengths': [
      _summary(length, losses[length], windows[length], task) for length in sorted(request.lengths)
    ],
    'change': _change(losses, windows),
    'positions': _by_position(losses[longest]),
  }


@functools.lru_cache(maxsize=4)
def _windows(task, request):
  """Cuts the documents of a Task once for all runs that are compared on them."""
  return protocols.get(request.protocol)(
    tasks.documents(task, SPLIT),
    request.lengths,
    eos_id=tasks.vocabulary_of(task).eos_id,
    max_tokens=request.max_tokens,
    tokens_per_document=max(*request.lengths, request.max_tokens // MIN_DOCUMENTS),
  )


def _restore(config, workdir, mesh):
  abstract = jax.eval_shape(functools.partial(train.init, config))['params']
  abstract = jax.tree.map(
    lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout),
    abstract,
    sharding.of_tree(abstract, mesh),
  )
  return checkpoint.restore_params(workdir, abstract)


def _losses(transformer, params, windows, progress):
  """Returns loss_WL [nats], every token of the windows scored once."""

  @jax.jit
  def losses(params, inputs_BL, targets_BL):
    inputs_BL = sharding.constrain(inputs_BL, 'BL')
    return loss.token_losses(transformer.apply({'params': params}, inputs_BL), targets_BL)

  count, length = windows.inputs_WL.shape
  devices = jax.device_count()
  budget = min(TOKENS_PER_BATCH, LOGITS_PER_BATCH // transformer.config.vocab_size)
  rows = devices * max(1, min(budget // length, -(-count // devices)))
  parts = []
  for start in range(0, count, rows):
    # The last batch is filled up with its last window again, which is then dropped.
    index_B = np.minimum(start + np.arange(rows), count - 1)
    loss_BL = losses(params, windows.inputs_WL[index_B], windows.targets_WL[index_B])
    parts.append(np.asarray(loss_BL)[: count - start])
    progress(parts[-1].size)
  return np.concatenate(parts)


def _mean_by_document(loss_WL, document_W) -> tuple[float, float | None]:
  """Returns the mean over tokens and its standard error, which takes documents as independent.

  Tokens of a document are not. The mean is a ratio of two sums over documents, losses and tokens;
  its variance is that of the sums of loss - mean. None: there is but one document.
  """
  _, index_W = np.unique(document_W, return_inverse=True)
  mean = float(loss_WL.mean(dtype=np.float64))
  excess_Z = np.bincount(index_W, weights=(loss_WL.astype(np.float64) - mean).sum(axis=1))
  count = len(excess_Z)
  if count < 2:
    return mean, None
  return mean, math.sqrt(count / (count - 1) * (excess_Z**2).sum()) / loss_WL.size


def _summary(length, loss_WL, windows, task):
  """Returns the numbers of one length."""
  mean, error = _mean_by_document(loss_WL, windows.document_W)
  text_bytes = tasks.text_bytes(task, windows.targets_WL.ravel())
  return {
    'length': length,
    'tokens': loss_WL.size,
    'nats_per_token': mean,
    'standard_error': error,
    'perplexity': math.exp(mean),
    'bits_per_byte': mean * loss_WL.size / text_bytes / math.log(2),
  }


def _change(losses, windows):
  """Returns the change from the shortest to the longest length.

  Its standard error is that of the differences token by token, so it exists only if both scored the
  same tokens: what makes one document harder than another cancels.
  """
  first, last = min(losses), max(losses)
  change = float(losses[last].mean(dtype=np.float64) - losses[first].mean(dtype=np.float64))
  error = None
  if np.array_equal(windows[first].targets_WL.ravel(), windows[last].targets_WL.ravel()):
    difference_WL = losses[last] - losses[first].reshape(losses[last].shape)
    error = _mean_by_document(difference_WL, windows[last].document_W)[1]
  return {'from': first, 'to': last, 'nats_per_token': change, 'standard_error': error}


def _by_position(loss_WL):
  """Returns the mean loss in buckets of positions that double: [0, 16), [16, 32), [32, 64) ..."""
  length = loss_WL.shape[1]
  edges = [0, *(2**power for power in range(4, 64) if 2**power < length), length]
  return [
    {'from': low, 'to': high, 'nats_per_token': float(loss_WL[:, low:high].mean(dtype=np.float64))}
    for low, high in zip(edges[:-1], edges[1:], strict=True)
  ]


def table(reports: Sequence[dict[str, Any]]) -> str:
  """Returns the losses as text: a row a run, a column a length, the change from first to last."""
  lengths = [row['length'] for row in reports[0]['lengths']]
  width = max(len('run'), *(len(report['run']) for report in reports))
  lines = [f'{"run":<{width}}' + ''.join(f'{length:>9}' for length in lengths) + '   change']
  for report in reports:
    cells = ''.join(f'{row["nats_per_token"]:>9.3f}' for row in report['lengths'])
    change, error = report['change']['nats_per_token'], report['change']['standard_error']
    spread = '' if error is None else f' +-{error:.3f}'
    lines.append(f'{report["run"]:<{width}}{cells}{change:>+9.3f}{spread}')
  return '\n'.join(lines)


def write(
  reports: Sequence[dict[str, Any]], directory: pathlib.Path, name: str
) -> list[pathlib.Path]:
  """Writes NAME.json, NAME.csv and NAME.png into a directory, each whole or not at all.

  Returns:
    The paths.
  """

  def write_json(path):
    path.write_text(json.dumps({'runs': reports}, indent=2) + '\n')

  def write_csv(path):
    with path.open('w', newline='') as file:
      rows = [{'run': report['run'], **row} for report in reports for row in report['lengths']]
      writer = csv.DictWriter(file, fieldnames=list(rows[0]))
      writer.writeheader()
      writer.writerows(rows)

  writers = {'json': write_json, 'csv': write_csv, 'png': functools.partial(plot.lengths, reports)}
  paths = []
  for suffix, write_file in writers.items():
    path = directory / f'{name}.{suffix}'
    temporary = directory / f'.{name}.partial.{suffix}'
    write_file(temporary)
    os.replace(temporary, path)
    paths.append(path)
  return paths


class Progress:
  """Prints, as windows are scored, the run, the length, tokens/s and the time left."""

  def __init__(self, runs: Sequence[str], request: config_lib.EvaluateConfig):
    """Expects the request's budget of tokens at each length for each run."""
    self._total = len(runs) * len(request.lengths) * request.max_tokens
    self._done, self._start = 0, time.monotonic()
    self._shown = self._start

  def __call__(self, run: str, length: int, tokens: int) -> None:
    """Takes note of `tokens` more."""
    self._done += tokens
    now = time.monotonic()
    if now - self._shown > 2.0:
      rate = self._done / (now - self._start)
      left = max(self._total - self._done, 0) / rate
      train.say(f'{run} at {length}: {rate:,.0f} tokens/s, ETA {metrics.clock(left)}')
      self._shown = now


def _request(config: config_lib.Config) -> config_lib.EvaluateConfig:
  """Returns the request of the flags, completed by the first run's config."""
  given = {}
  if flags.FLAGS.lengths is not None:
    try:
      given['lengths'] = tuple(int(length) for length in flags.FLAGS.lengths)
    except ValueError as error:
      raise errors.UserError(
        f'--lengths={",".join(flags.FLAGS.lengths)} must be whole numbers, like 256,512,4096'
      ) from error
  for name in ('protocol', 'max_tokens'):
    if getattr(flags.FLAGS, name) is not None:
      given[name] = getattr(flags.FLAGS, name)
  return dataclasses.replace(config.evaluate, **given)


def _configs(workdirs: Sequence[pathlib.Path]) -> list[config_lib.Config]:
  """Reads the runs' configs, which must be of one Task: losses on other tokens do not compare."""
  configs = [checkpoint.read_config(workdir) for workdir in workdirs]
  for workdir, config in zip(workdirs, configs, strict=True):
    for field in ('task', 'validation_files'):
      first, other = (getattr(c.data, field) for c in (configs[0], config))
      if first != other:
        raise errors.UserError(
          f'{str(workdir)!r} has data.{field}={other!r}, not {first!r} as {str(workdirs[0])!r}; '
          'evaluate it alone'
        )
  return configs


def _output_directory(workdirs: Sequence[pathlib.Path]) -> pathlib.Path:
  """Makes the directory of the flags, before hours are spent on what could not be written there."""
  default = os.path.join(os.path.commonpath([path.absolute() for path in workdirs]), 'evaluations')
  directory = pathlib.Path(flags.FLAGS.output or os.path.relpath(default))
  try:
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
      return directory
  except OSError as error:
    raise errors.UserError(
      f'cannot write into {str(directory)!r}: {error.strerror}; give another --output'
    ) from error


def main() -> None:
  """The command."""
  workdirs = [pathlib.Path(workdir) for workdir in flags.FLAGS.workdir or ()]
  if not workdirs:
    raise errors.UserError('--workdir is missing: the run or runs (DIR,DIR) to evaluate')
  if len({workdir.resolve() for workdir in workdirs}) < len(workdirs):
    raise errors.UserError(f'--workdir={",".join(map(str, workdirs))} names a run twice')
  request = _request(_configs(workdirs)[0])
  directory = _output_directory(workdirs)
  progress = Progress([workdir.name for workdir in workdirs], request)
  reports = [
    evaluate(workdir, request, functools.partial(progress, workdir.name)) for workdir in workdirs
  ]
  compared = [workdir.name for workdir in workdirs] if len(workdirs) > 1 else []
  paths = write(reports, directory, flags.FLAGS.name or '_'.join([*compared, request.protocol]))
  tokens, documents = reports[0]['lengths'][-1]['tokens'], reports[0]['documents']
  print(
    f'\nnats per token by length ({request.protocol}, {tokens:,} tokens of {documents} documents)'
  )
  print(table(reports))
  print(f'written: {", ".join(map(str, paths))}')


def define_flags() -> None:
  """Declares the command's flags."""
  flags.DEFINE_list('workdir', None, 'the run or runs to evaluate, DIR or DIR,DIR')
  flags.DEFINE_list('lengths', None, "of the windows, in tokens (default: the run's config)")
  known = ', '.join(protocols.PROTOCOLS)
  flags.DEFINE_string('protocol', None, f"one of {known} (default: the run's config)")
  flags.DEFINE_integer('max_tokens', None, "scored at each length (default: the run's config)")
  flags.DEFINE_string('output', None, 'a directory (default: evaluations/ where the runs are)')
  flags.DEFINE_string('name', None, 'of the files there (default: runs compared, protocol)')


if __name__ == '__main__':
  define_flags()
  cli.run(main)
