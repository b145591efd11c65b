"""What attention makes of distance in trained runs, or by encodings alone: a table, plots and JSON.

    python -m lex_fire.analyze --workdir=DIR[,DIR...] --lengths=256,512,1024 --mask=causal,blockwise
    python -m lex_fire.analyze --encoding=sinusoidal,rope,xpos,alibi,t5,kerple_log --output=DIR

Of runs: attention resolution, entropy and mean attended distance by length and mask, on the text
that `evaluate` would score, and the curves of their encodings with what they have learned. Without
a run: the curves of encodings as training begins.
"""

import dataclasses
import functools
import json
import operator
import pathlib
import re
from collections.abc import Callable, Sequence

import jax
import numpy as np
from absl import flags

from lex_fire import (
  analysis,
  analysis_plots,
  checkpoint,
  cli,
  command,
  comparison,
  documents,
  encodings,
  errors,
  evaluate,
  presets,
  sharding,
  storage,
)
from lex_fire import config as config_lib
from lex_fire import report as report_lib
from lex_fire.encodings import base

POINTS = 96  # of a curve over distances, spread over their logarithm; near ones are all there
# What a row of a report has as a mean, as a table says it.
METRICS = {
  'resolution': "attention resolution of each head's scores, mean over heads and layers",
  'resolution_of_mean': 'attention resolution of the mean scores of heads, mean over layers',
  'entropy': 'entropy of attention [nats], mean over queries, heads and layers',
  'distance': 'attended distance [tokens], mean over queries, heads and layers',
}

Report = report_lib.Report


def analyze(
  workdir: str | pathlib.Path,
  request: config_lib.EvaluateConfig | None = None,
  query_positions: Sequence[int] | None = None,
  progress: Callable[[str, int, int], None] = lambda case, length, tokens: None,
  run: str | None = None,
) -> tuple[list[Report], list[Report]]:
  """Analyzes a checkpoint of a run.

  Args:
    workdir: of the run.
    request: lengths, masks, encodings, protocol and budget; by default what the run's config says.
    query_positions: at which biases are taken [tokens]; by default the last of each length.
    progress: is called with a case, a length and the tokens read for it since the last call.
    run: what reports call the run; by default the name of its workdir.

  Returns:
    The `curves` of each encoding, and a report for each encoding and mask, of JSON values: by
    length METRICS, those of heads by layer and head too, and the mean scores by distance.

  Raises:
    errors.UserError: as `evaluate.evaluate` and `curves` do, or if the run is not causal or has
      randomized positions.
  """
  workdir = storage.path(workdir)
  config = checkpoint.read_config(workdir)
  config = dataclasses.replace(config, evaluate=request or config.evaluate)
  _check(workdir, config)
  found, lengths = comparison.cases(config), config.evaluate.lengths
  windows = documents.windows(config)
  mesh = sharding.make_mesh()
  drawn, reports = {}, []
  with jax.set_mesh(mesh):
    step, params = comparison.restore(config, workdir, mesh)
    for case in found:
      report = {
        'run': run or comparison.names([workdir])[0],
        'checkpoint_step': step,
        **comparison.of_case(config, case),
        **evaluate.of_config(config),
        'implementations': evaluate.implementations(config, case.transformer, lengths),
      }
      series = report_lib.series(report)
      if series not in drawn:
        layers = _layers(case.transformer, params)
        what = {'name': series, 'encoding': report['encoding'], 'checkpoint_step': step}
        drawn[series] = what | curves(
          case.transformer.encoding, config.model, layers, lengths, query_positions
        )
      rows = {}
      # The longest first, whose tokens take longest: the time left is not promised too early.
      for length in sorted(lengths, reverse=True):
        told = functools.partial(progress, f'{series} {case.mask_name}', length)
        tokens_WL = windows[length].inputs_WL
        statistics = analysis.measure(case.transformer, params, tokens_WL, told)
        rows[length] = _row(windows[length], statistics)
      reports.append(report | {'lengths': [rows[length] for length in sorted(rows)]})
  return list(drawn.values()), reports


def _check(workdir, config):
  """Refuses a run in whose attention distances are not those of tokens behind the query."""
  if not config.model.causal or config.data.position_range:
    raise errors.UserError(
      f'{str(workdir)!r} has model.causal={config.model.causal} and '
      f'data.position_range={config.data.position_range}; analyze causal models whose positions '
      'are counted, not drawn'
    )
  if config.evaluate.stride:
    raise errors.UserError(
      f'stride={config.evaluate.stride} is of losses, and attention is measured at all tokens of a '
      'window; use stride=0'
    )
  if config.evaluate.sequence > 1:
    raise errors.UserError(
      f'sequence={config.evaluate.sequence} is of losses, and attention is measured on whole '
      'windows; use sequence=1'
    )


def _layers(transformer, params):
  """Returns the encoding's parameters of each layer, or of one for all."""
  encoding = transformer.encoding
  layers = transformer.config.num_layers if encoding.learned and not encoding.shared else 1
  learned = analysis.encoding_params(transformer, params)
  return [jax.tree.map(operator.itemgetter(layer), learned) for layer in range(layers)]


def of_encoding(
  text: str,
  size: str = 'lex_medium',
  lengths: Sequence[int] | None = None,
  query_positions: Sequence[int] | None = None,
) -> Report:
  """Returns the `curves` of an encoding from no run, with parameters as training would begin.

  Args:
    text: NAME or NAME:OPTION=VALUE,OPTION=VALUE; an option train_length is that of the preset.
    size: a key of presets.PRESETS, for the heads and widths.
    lengths: [tokens]; by default those that the preset evaluates.
    query_positions: as for `analyze`.

  Raises:
    errors.UserError: for an unknown encoding, option or size, an encoding that has no curve, or as
      `curves` does.
  """
  config = config_lib.Config.from_dict(presets.make(size, 'nope'))
  encoding_config = config.encoding.replaced_by(text, config.data.length)
  encoding, c = encoding_config.make(), config.model
  if (encoding.rotate, encoding.embed, encoding.bias) == (None, None, None):
    raise errors.UserError(
      f'encoding {text!r} neither rotates nor embeds nor adds a bias, so it has no curve; leave it '
      'out, or analyze a run of it'
    )
  params = encoding.init(
    jax.random.key(0), num_heads=c.num_heads, head_dim=c.head_dim, d_model=c.d_model
  )
  request = config.evaluate
  if lengths is not None:
    request = dataclasses.replace(request, lengths=tuple(lengths))
  return {
    'name': text,
    'encoding': {'name': encoding_config.name, **dict(encoding_config.options)},
    'checkpoint_step': None,
    **curves(encoding, c, [params], request.lengths, query_positions),
  }


def curves(
  encoding: encodings.Encoding,
  config: config_lib.ModelConfig,
  layers: Sequence[base.Params],
  lengths: Sequence[int],
  query_positions: Sequence[int] | None = None,
) -> Report:
  """Returns what an encoding makes of distance by itself, in JSON values.

  Args:
    encoding: any.
    config: the model's shape.
    layers: the encoding's parameters in each layer; one, if they are those of all.
    lengths: [tokens].
    query_positions: at which biases are taken [tokens]; by default the last of each length. One is
      enough for an encoding that is shift invariant, and the last is taken.

  Returns:
    `expectation`, g[n] for all n below the longest length (see analysis.expectation), or None;
    `biases`, by query position, layer, head and distance, or None; and by length the `resolution`
    of analysis.scores for the last query, mean over layers and heads.

  Raises:
    errors.UserError: if the encoding has no such positions.
  """
  positions = sorted(set(query_positions or (length - 1 for length in lengths)))
  if positions[0] < 0:
    raise errors.UserError(f'query position {positions[0]} must be at least 0')
  longest = max(lengths)
  expectation = biases = None
  if encoding.rotate is not None or encoding.embed is not None:
    width = config.head_dim if encoding.rotate is not None else config.d_model
    expectation_K = analysis.expectation(
      encoding, layers[0], np.arange(longest), width=width, query_position=longest - 1
    )
    expectation = {'width': width, 'by_distance': _numbers(expectation_K)}
  if encoding.bias is not None:
    positions = positions[-1:] if encoding.shift_invariant else positions
    biases = [_biases(encoding, config, layers, position) for position in positions]
  return {
    'learned': encoding.learned,
    'expectation': expectation,
    'biases': biases,
    'resolution': [
      {'length': length, 'resolution': _resolution(encoding, config, layers, length)}
      for length in sorted(lengths)
    ],
  }


def _biases(encoding, config, layers, query_position):
  """Returns the biases of one query."""
  distance_K = _spread(query_position + 1)
  bias_NHK = np.stack(
    [
      analysis.bias(
        encoding, params, distance_K, num_heads=config.num_heads, query_position=query_position
      )
      for params in layers
    ]
  )
  return {
    'query_position': query_position,
    'distance': distance_K.tolist(),
    'by_layer_and_head': _numbers(bias_NHK),
  }


def _resolution(encoding, config, layers, length):
  """Returns the resolution of an encoding's own scores, mean over layers and heads."""
  distance_K = np.arange(length)
  return float(
    np.mean(
      [
        analysis.resolution(
          analysis.scores(encoding, params, distance_K, config=config, query_position=length - 1)
        )
        for params in layers
      ]
    )
  )


def _row(windows, statistics):
  """Returns the numbers of one length."""
  count = statistics.score_NHK.shape[2]
  edges = _spread(count)
  ends = np.append(edges[1:], count)
  score_NK = np.add.reduceat(statistics.score_NHK.mean(axis=1), edges, axis=1)
  by_head = {
    'resolution': statistics.resolution_NH,
    'entropy': statistics.entropy_NH,
    'distance': statistics.distance_NH,
  }
  by_layer = {'resolution_of_mean': statistics.resolution_of_mean_N}
  return {
    'length': windows.inputs_WL.shape[1],
    'tokens': windows.inputs_WL.size,
    'documents': len(np.unique(windows.document_W)),
    **{name: float((by_head | by_layer)[name].mean()) for name in METRICS},
    **{f'{name}_by_layer_and_head': _numbers(array) for name, array in by_head.items()},
    **{f'{name}_by_layer': _numbers(array) for name, array in by_layer.items()},
    'scores': {
      'from': edges.tolist(),
      'to': ends.tolist(),
      'mean_by_layer': _numbers(score_NK / (ends - edges)[None]),
    },
  }


def _spread(count: int) -> np.ndarray:
  """Returns the distances 0, 1, 2 .. count - 1, thinned out by their logarithm."""
  return np.unique(np.geomspace(1, count, POINTS).round().astype(int)) - 1


def _numbers(array: np.ndarray) -> list:
  """Returns nested lists of numbers, rounded to the six digits that float32 has."""
  return np.vectorize(lambda value: float(f'{value:.6g}'), otypes=[float])(array).tolist()


def table(reports: Sequence[Report], metric: str = 'resolution') -> str:
  """Returns a metric as text: a row a report, a column a length."""
  lengths = [row['length'] for row in reports[0]['lengths']]
  names = report_lib.labels(reports)
  width = max(len('run'), *map(len, names))
  lines = [f'{"run":<{width}}' + ''.join(f'{length:>11}' for length in lengths)]
  for name, report in zip(names, reports, strict=True):
    lines.append(f'{name:<{width}}' + _cells(row[metric] for row in report['lengths']))
  return '\n'.join(lines)


def table_of_encodings(drawn: Sequence[Report]) -> str:
  """Returns the resolution of encodings as text: a row an encoding, a column a length."""
  lengths = [row['length'] for row in drawn[0]['resolution']]
  width = max(len('encoding'), *(len(of_one['name']) for of_one in drawn))
  lines = [f'{"encoding":<{width}}' + ''.join(f'{length:>11}' for length in lengths)]
  for of_one in drawn:
    values = (row['resolution'] for row in of_one['resolution'])
    lines.append(f'{of_one["name"]:<{width}}' + _cells(values))
  return '\n'.join(lines)


def _cells(values):
  return ''.join(f'{value:>11.4g}' for value in values)


def write(
  drawn: Sequence[Report], reports: Sequence[Report], directory: pathlib.Path, name: str
) -> list[pathlib.Path]:
  """Writes NAME.json and a plot of all that there is, each whole or not at all.

  NAME_heads.png: METRICS by length; NAME_scores.png: the scores by distance at the longest length;
  NAME_expectation.png: g[n]; NAME_biases.png: the biases of encodings from no run, and
  NAME_biases_RUN.png those that a run has learned.

  Returns:
    The paths.
  """

  def write_json(path):
    path.write_text(json.dumps({'encodings': drawn, 'runs': reports}, indent=2) + '\n')

  writers = {f'{name}.json': write_json}
  if reports:
    writers[f'{name}_heads.png'] = functools.partial(analysis_plots.heads, reports)
    writers[f'{name}_scores.png'] = functools.partial(analysis_plots.scores, reports)
  expected = [of_one for of_one in drawn if of_one['expectation']]
  if expected:
    writers[f'{name}_expectation.png'] = functools.partial(analysis_plots.expectation, expected)
  biased = [of_one for of_one in drawn if of_one['biases']]
  if biased and not reports:
    writers[f'{name}_biases.png'] = functools.partial(analysis_plots.biases, biased)
  for of_one in biased if reports else ():
    file_name = re.sub(r'[^\w.]+', '-', f'{name}_biases_{of_one["name"]}.png')
    writers[file_name] = functools.partial(analysis_plots.biases, [of_one])
  return command.write_files(directory, writers)


def _texts(values: Sequence[str]) -> list[str]:
  """Cuts NAME,NAME:OPTION=VALUE,OPTION=VALUE,NAME at the commas that a name follows."""
  return [text for value in values for text in re.split(r',(?![^,:]*=)', value)]


def _of_encodings():
  """Draws the encodings of the flags, from no run."""
  if flags.FLAGS.output is None:
    raise errors.UserError('--output is missing: the directory to write the curves into')
  name = flags.FLAGS.name or 'analysis'
  directory = command.output_directory(storage.path(flags.FLAGS.output), name)
  query_positions = cli.whole_numbers('query_positions')
  lengths = cli.whole_numbers('lengths')
  drawn = [
    of_encoding(text, flags.FLAGS.size, lengths, query_positions)
    for text in _texts(flags.FLAGS.encoding)
  ]
  paths = write(drawn, [], directory, name)
  print('\nattention resolution of encodings by themselves, by length')
  print(table_of_encodings(drawn))
  print(f'written: {", ".join(map(str, paths))}')


def _of_runs():
  """Analyzes the runs of the flags."""
  query_positions = cli.whole_numbers('query_positions')
  more = [command.named('positions', query_positions)] if query_positions else []
  asked = command.asked('analysis_', more=more)
  progress = command.Progress(asked.num_cases, documents.windows(asked.configs[0]))
  drawn, reports = [], []
  for workdir, run in zip(asked.workdirs, asked.runs, strict=True):
    more_drawn, more_reports = analyze(workdir, asked.request, query_positions, progress, run)
    drawn += more_drawn
    reports += more_reports
  print(report_lib.checkpoints(reports))
  evaluate.say_attention(reports, asked.request.lengths)
  last = reports[0]['lengths'][-1]
  print(f'\nover {last["tokens"]:,} tokens of {last["documents"]} documents')
  for metric, title in METRICS.items():
    print(f'\n{title}')
    print(table(reports, metric))
  paths = write(drawn, reports, asked.directory, asked.name)  # last, as a disk may be full by now
  print(f'written: {", ".join(map(str, paths))}')


def main() -> None:
  """The command."""
  if flags.FLAGS.workdir:
    _of_runs()
  elif flags.FLAGS.encoding:
    _of_encodings()
  else:
    raise errors.UserError(
      '--workdir is missing: the run or runs (DIR,DIR) to analyze; or give --encoding=NAME,NAME '
      'and --output=DIR for the curves of encodings from no run'
    )


def define_flags() -> None:
  """Declares the command's flags: those of `evaluate`, and what curves take."""
  command.define_flags()
  flags.DEFINE_list(
    'query_positions',
    None,
    'at which the biases of an encoding are taken, in tokens (default: the last of each length)',
  )
  known = ', '.join(presets.PRESETS)
  flags.DEFINE_string(
    'size', 'lex_medium', f'the preset whose heads encodings from no run have, one of {known}'
  )


if __name__ == '__main__':
  define_flags()
  flags.adopt_module_key_flags(command)  # so that --help shows them
  cli.run(main)
