"""How a trained model does at lengths far past training: a table, a plot, CSV and JSON.

    python -m lex_fire.evaluate --workdir=DIR[,DIR...] --lengths=256,512,4096 \\
      --mask=causal,blockwise --encoding=as_trained --encoding=yarn:scale=16

Everything is read from the workdirs: config, checkpoint and, by the config, the Task's documents;
or --documents names others. With --tasks=passkey,scrolls_qmsum it asks questions instead.
"""

import csv
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import jax
import numpy as np
from absl import flags

from lex_fire import (
  attention,
  benchmark_command,
  checkpoint,
  cli,
  command,
  comparison,
  documents,
  hosts,
  kernels,
  model,
  plot,
  reporting,
  sharding,
  storage,
)
from lex_fire import config as config_lib
from lex_fire import report as report_lib
from lex_fire.data import draws, masking, positions, protocols, reading
from lex_fire.kernels import ring

TOKENS_PER_BATCH = 32_768  # a device, of whole rows: at least one


def evaluate(
  workdir: str | pathlib.Path,
  request: config_lib.EvaluateConfig | None = None,
  progress: Callable[[str, int, int], None] = lambda case, length, tokens: None,
  run: str | None = None,
) -> list[report_lib.Report]:
  """Evaluates a checkpoint of a run.

  A bidirectional model is scored on the tokens that are masked, the same ones at every length, and
  a run of randomized positions has them here too, one draw a batch, as its training had.

  Args:
    workdir: of the run.
    request: what to evaluate; by default what the run's config says.
    progress: is called with a case, a length and the tokens read for it since the last call.
    run: what reports call the run; by default the name of its workdir.

  Returns:
    A report for each encoding and mask, of JSON values: documents, protocol, stride, checkpoint
    step, encoding, mask, tokenizer and so on; by length the tokens scored, nats per token, its
    standard error, perplexity and bits per byte (None if not every token is scored); and the loss
    by position in the longest windows.

  Raises:
    errors.UserError: if the workdir has no run or no checkpoint, or as `comparison.cases` and
      `documents.windows` do.
  """
  workdir = storage.path(workdir)
  config = checkpoint.read_config(workdir)
  config = dataclasses.replace(config, evaluate=request or config.evaluate)
  found, common = comparison.cases(config), of_config(config)
  task, windows = documents.get_task(config), _windows(config)
  mesh = sharding.make_mesh(sequence=config.evaluate.sequence)
  reports = []
  with jax.set_mesh(mesh):
    checkpoint_step, params = comparison.restore(config, workdir, mesh)
    for case in found:
      report = {
        'run': run or comparison.names([workdir])[0],
        'checkpoint_step': checkpoint_step,
        **comparison.of_case(config, case),
        **common,
        'implementations': implementations(config, case.transformer, windows),
      }
      told = functools.partial(progress, f'{report_lib.series(report)} {case.mask_name}')
      losses = {
        length: _losses(config, case.transformer, params, cut, functools.partial(told, length))
        for length, cut in windows.items()
      }
      reports.append(report | _numbers(losses, task if config.model.causal else None))
  return reports


def implementations(
  config: config_lib.Config, transformer: model.Transformer, lengths: Iterable[int]
) -> dict[str, dict[str, str]]:
  """Returns by what attention is computed at each length, and why, as reports have it."""
  counted = is_counted(config, sharding.ways('L'))
  return {
    str(length): attention.choice(transformer, length, counted=counted)._asdict()
    for length in lengths
  }


def say_attention(reports: Sequence[report_lib.Report], lengths: Iterable[int]) -> None:
  """Prints the same of all reports."""
  for length in lengths:
    choices = (kernels.Choice(**report['implementations'][str(length)]) for report in reports)
    reporting.say(attention.line(choices, f' at {length}'))


def of_config(config: config_lib.Config) -> report_lib.Report:
  """Returns what a report says of a run and of how it is evaluated."""
  return {
    'objective': 'next_token' if config.model.causal else 'masked',
    'mask_rate': None if config.model.causal else config.data.mask_rate,
    'position_range': config.data.position_range or None,
    'train_length': config.data.length,
    'train_task': config.data.task,
    **documents.about(config),
  }


def _numbers(losses, task):
  """Returns the numbers of a report; a Task if the losses are of all its text."""
  rows = []
  for of_length in losses.values():
    text_bytes = task and _text_bytes(task, of_length)
    rows.append(report_lib.of_length(of_length, text_bytes))
  return {
    'documents': rows[-1]['documents'],
    'lengths': rows,
    'change': report_lib.change(losses),
    'positions': report_lib.by_position(losses[max(losses)]),
  }


def _text_bytes(task, losses):
  """Counts the bytes of the text that losses are of: that of each document, by itself."""
  firsts = np.flatnonzero(np.diff(losses.document_L)) + 1
  return sum(reading.text_bytes(task, tokens_L) for tokens_L in np.split(losses.targets_L, firsts))


def _windows(config) -> dict[int, protocols.EvaluationWindows]:
  """Returns the windows of each length as the model reads them."""
  windows = documents.windows(config)
  if config.model.causal:
    return windows
  size = reading.vocabulary_of(documents.get_task(config)).size
  rate = config.data.mask_rate
  return {
    length: masking.corrupt_windows(cut, rate=rate, vocabulary_size=size)
    for length, cut in windows.items()
  }


def step(
  transformer: model.Transformer,
  params: Any,
  inputs_BL: jax.Array,
  targets_BL: jax.Array,
  position_BL: jax.Array | None,
) -> jax.Array:
  """Returns loss_BL [nats] of windows; jitted on the mesh of `jax.set_mesh`, all that is computed.

  Args:
    transformer: a case's.
    params: the run's.
    inputs_BL: int32.
    targets_BL: likewise.
    position_BL: likewise; a leading 1 broadcasts. None: 0 .. L - 1.
  """
  inputs_BL = sharding.constrain(inputs_BL, 'BL')
  # Flax returns a pair only if asked by `mutable`.
  return cast(
    jax.Array, transformer.apply({'params': params}, inputs_BL, position_BL, None, targets_BL)
  )


def is_counted(config: config_lib.Config, shared: int) -> bool:
  """Returns whether `step` is given no positions: they count, and no window is cut in parts.

  Args:
    config: of the run.
    shared: how many devices share the tokens of a window.
  """
  return not config.data.position_range and shared == 1


def rows_at_once(length: int, count: int, devices: int) -> int:
  """Returns how many of `count` windows are computed at once.

  Args:
    length: of the part of a window that a device has [tokens].
    count: of windows.
    devices: that share the windows, and not the tokens of one.
  """
  return devices * max(1, min(TOKENS_PER_BATCH // length, -(-count // devices)))


def _losses(config, transformer, params, windows, progress):
  """Returns the Losses of windows of one length."""
  # All of them on all hosts, each of which counts them.
  whole = jax.sharding.PartitionSpec()
  losses = jax.jit(functools.partial(step, transformer), out_shardings=whole)
  count, length = windows.inputs_WL.shape
  shared = sharding.ways('L')
  rows = rows_at_once(length // shared, count, sharding.ways('B'))
  order_L = ring.zigzag(length, shared, 'a window')
  counted = is_counted(config, shared)
  parts = []
  for start in range(0, count, rows):
    position_1L = None
    if not counted:
      position_1L = _position(length, config.data.position_range, start // rows)[:, order_L]
    # The last batch is filled up with its last window again, which is then dropped.
    index_B = np.minimum(start + np.arange(rows), count - 1)
    loss_BL = losses(
      params,
      windows.inputs_WL[index_B][:, order_L],
      windows.targets_WL[index_B][:, order_L],
      position_1L,
    )
    loss_BL = np.asarray(loss_BL)[:, np.argsort(order_L)]
    scored_BL = windows.scored_WL[start : start + rows]
    parts.append(loss_BL[: len(scored_BL)][scored_BL])
    progress(scored_BL.size)
  index_L, position_L = np.nonzero(windows.scored_WL)
  return report_lib.Losses(
    length,
    np.concatenate(parts),
    windows.targets_WL[windows.scored_WL],
    position_L,
    windows.document_W[index_L],
    windows.too_short,
  )


def _position(length, position_range, ordinal):
  """Returns position_1L of a batch, counted from 0 or, if there is a range, drawn from it."""
  if not position_range:
    return np.arange(length, dtype=np.int32)[None]
  return positions.sample(length, position_range, seed=draws.JUDGE, ordinal=ordinal)[None]


def write(
  reports: Sequence[report_lib.Report], directory: pathlib.Path, name: str
) -> list[pathlib.Path]:
  """Writes NAME.json, NAME.csv and NAME.png into a directory, each whole or not at all.

  Returns:
    The paths.
  """

  def write_json(path):
    path.write_text(json.dumps({'runs': reports}, indent=2) + '\n')

  def write_csv(path):
    with path.open('w', newline='') as file:
      rows = report_lib.rows(reports)
      writer = csv.DictWriter(file, fieldnames=list(rows[0]))
      writer.writeheader()
      writer.writerows(rows)

  writers = {'json': write_json, 'csv': write_csv, 'png': functools.partial(plot.lengths, reports)}
  return command.write_files(
    directory, {f'{name}.{suffix}': write_file for suffix, write_file in writers.items()}
  )


def main() -> None:
  """The command."""
  hosts.join()
  if flags.FLAGS.tasks is not None:
    benchmark_command.main()
    return
  benchmark_command.refuse_flags()
  what = command.asked()
  progress = command.Progress(what.num_cases, documents.windows(what.configs[0]))
  reports = []
  for workdir, run in zip(what.workdirs, what.runs, strict=True):
    reports += evaluate(workdir, what.request, progress, run)
  reporting.say(report_lib.checkpoints(reports))
  say_attention(reports, what.request.lengths)
  reporting.say(f'\n{report_lib.heading(reports[0])}')
  reporting.say(report_lib.table(reports))
  paths = write(reports, what.directory, what.name)  # last, as a disk may be full by now
  reporting.say(f'written: {", ".join(map(str, paths))}')


if __name__ == '__main__':
  command.define_flags()
  benchmark_command.define_flags()
  hosts.define_flags()
  for module in (command, benchmark_command, hosts):
    flags.adopt_module_key_flags(module)  # so that --help shows them
  cli.run(main, 'interrupted; with --tasks the same command goes on after the answers so far')
