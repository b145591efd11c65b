"""Trains one model in several variants with several seeds, and evaluates each at all lengths.

    python -m experiments.QUESTION.run --runs=runs/QUESTION
    python -m experiments.QUESTION.run --runs=runs/QUESTION --data_dir=DIR

for a question that is a sweep: on the built-in corpus, or on the books of
DIR/books/{train,validation}. What is done is kept: a run goes on from its last checkpoint, and one
whose lines are in QUESTION/CORPUS_SCALE.jsonl is not repeated. In the end, and by
`experiments.sweep_results` alone, these lines become tables and a plot. Several commands with other
--seeds may run at a time.
"""

import contextlib
import dataclasses
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from configs import quickstart
from experiments import sweep_results
from lex_fire import (
  checkpoint,
  cli,
  command,
  documents,
  errors,
  evaluate,
  metrics,
  presets,
  storage,
  train,
)
from lex_fire import config as config_lib
from lex_fire.data import stream


class Scale(NamedTuple):
  """A model and how it is trained and evaluated.

  Attributes:
    sections: changes to the preset tiny.
    lengths: evaluated, the first that of training [tokens].
    max_tokens: scored at each length.
  """

  sections: dict[str, dict[str, Any]]
  lengths: tuple[int, ...]
  max_tokens: int


_QUICKSTART = quickstart.get_config().to_dict()
SCALES = {
  # The quickstart's model and recipe (experiments/quickstart), at twice its length.
  'laptop': Scale(
    {
      **{section: _QUICKSTART[section] for section in ('model', 'optimizer', 'train')},
      'data': {'length': 512, 'batch_size': 4},
    },
    lengths=(512, 1024, 2048, 4096, 8192, 16384),
    max_tokens=65_536,
  ),
  # For one accelerator: 25M parameters, at lengths that a laptop cannot train on.
  'gpu': Scale(
    {
      'model': {
        **{'num_layers': 8, 'd_model': 512, 'num_heads': 8, 'num_kv_heads': 8, 'head_dim': 64},
        **{'activation': 'swiglu', 'd_ff': 1376, 'norm': 'rmsnorm', 'dtype': 'bfloat16'},
      },
      'data': {'length': 2048, 'batch_size': 32},
      'optimizer': {'learning_rate': 1e-3, 'warmup_steps': 200, 'encoding_rate': 10.0},
      'train': {'steps': 3000, 'log_every': 50, 'checkpoint_every': 500},
    },
    lengths=(2048, 4096, 8192, 16384, 32768),
    max_tokens=524_288,
  ),
}
MASKS = ('causal', 'blockwise')


class Corpus(NamedTuple):
  """What runs are trained and evaluated on.

  Attributes:
    name: of the files of results.
    files: fields of the section `data` that say where it is.
    protocols: keys of protocols.PROTOCOLS.
  """

  name: str
  files: dict[str, Any]
  protocols: tuple[str, ...]


class Variant(NamedTuple):
  """A run of a sweep.

  Attributes:
    encoding: a key of encodings.ENCODINGS.
    options: of it.
    after: {name: text}: encodings that take its place after training, each a variant by its name.
    optimizer: fields of that section in which it differs from the scale.
  """

  encoding: str
  options: Mapping[str, Any] = {}
  after: Mapping[str, str] = {}
  optimizer: Mapping[str, Any] = {}

  @property
  def texts(self) -> tuple[str, ...]:
    """What is evaluated of the run: its own encoding, and those that take its place."""
    return (config_lib.AS_TRAINED, *self.after.values())


Variants = dict[str, Variant]  # by name


def corpus(data_dir: str) -> Corpus:
  """Returns the built-in corpus or, if there is a directory, the books in it.

  Raises:
    errors.UserError: if the directory has no books.
  """
  if not data_dir:
    return Corpus('stdlib', {}, ('same_tokens', 'windows'))
  books = pathlib.Path(data_dir) / 'books'
  globs = {f'{split}_files': str(books / split / '*.gz') for split in ('train', 'validation')}
  for glob in globs.values():
    path = pathlib.Path(glob)
    if not any(path.parent.glob(path.name)):
      raise errors.UserError(f'--data_dir={data_dir!r} has no {glob!r}; give a directory that does')
  # Every book is longer than the longest window, so that `windows` would score the same tokens.
  return Corpus('books', {'task': 'text', **globs}, ('same_tokens',))


def config(scale: Scale, of: Corpus, variant: Variant, seed: int) -> config_lib.Config:
  """Returns the config of a run, with a seed of parameters and of the data's order."""
  sections = scale.sections | {
    'encoding': dict(variant.options),
    'data': scale.sections['data'] | of.files,
    'optimizer': {**scale.sections['optimizer'], **variant.optimizer},
    'train': scale.sections['train'] | {'seed': seed},
    'evaluate': {'lengths': scale.lengths, 'max_tokens': scale.max_tokens, 'masks': MASKS},
  }
  return config_lib.Config.from_dict(presets.make('tiny', variant.encoding, **sections))


def measure(
  scale: Scale, of: Corpus, name: str, variant: Variant, seed: int, workdir: pathlib.Path
) -> Iterator[sweep_results.Line]:
  """Trains a run, or goes on with it, and yields what is kept of each of its evaluations."""
  run = config(scale, of, variant, seed)
  train_to_the_end(run, workdir)
  for protocol in of.protocols:
    request = dataclasses.replace(run.evaluate, protocol=protocol, encodings=variant.texts)
    asked = dataclasses.replace(run, evaluate=request)
    progress = command.Progress(len(MASKS) * len(variant.texts), documents.windows(asked))
    for report in evaluate.evaluate(workdir, request, progress):
      lengths = [{field: row[field] for field in sweep_results.FIELDS} for row in report['lengths']]
      yield line(name, variant, seed, protocol, report, lengths)


def line(
  name: str,
  variant: Variant,
  seed: int,
  protocol: str,
  report: Mapping[str, Any],
  lengths: list[dict[str, Any]],
) -> sweep_results.Line:
  """Returns what is kept of a report, of a run or of what takes its encoding's place.

  Args:
    name: of the run's variant.
    variant: the run's.
    seed: of the run.
    protocol: by which it was evaluated.
    report: says under which encoding and mask.
    lengths: what was measured at each length.
  """
  names = dict(zip(variant.texts, (name, *variant.after), strict=True))
  return {
    'variant': names[report['encoding_override'] or config_lib.AS_TRAINED],
    'seed': seed,
    'protocol': protocol,
    'mask': report['mask'],
    'train_length': report['train_length'],
    'lengths': lengths,
  }


def left(
  variants: Variants,
  seeds: Sequence[int],
  protocols: Sequence[str],
  masks: Sequence[str],
  lines: Sequence[sweep_results.Line],
) -> list[tuple[str, int]]:
  """Returns the runs, (name, seed), whose lines are not all there, seed by seed."""
  found = {(line['variant'], line['seed'], line['protocol'], line['mask']) for line in lines}
  return [
    (name, seed)
    for seed, name in itertools.product(seeds, variants)
    if not found.issuperset(
      itertools.product([name, *variants[name].after], [seed], protocols, masks)
    )
  ]


def run(
  scale: Scale,
  of: Corpus,
  variants: Variants,
  seeds: Sequence[int],
  path: pathlib.Path,
  runs: pathlib.Path,
) -> str:
  """Trains and evaluates what is not done, and writes and returns the tables of all that is.

  Args:
    scale: of the models.
    of: what they are trained and evaluated on.
    variants: by name.
    seeds: of each.
    path: of the lines, to which those of a run are added when it is done.
    runs: where the runs are kept.
  """
  lines = sweep_results.read(path) if path.exists() else []
  todo = left(variants, seeds, of.protocols, MASKS, lines)

  def measured(name: str, seed: int) -> Iterator[sweep_results.Line]:
    return measure(scale, of, name, variants[name], seed, runs / f'{name}-{seed}')

  return complete(todo, measured, path)


def train_to_the_end(config: config_lib.Config, workdir: pathlib.Path) -> None:
  """Trains a run, or goes on with it; one that SIGTERM ended is not taken for one that is done.

  Raises:
    KeyboardInterrupt: if SIGTERM came.
  """
  train.train(config, workdir)
  with contextlib.closing(checkpoint.Checkpoints(workdir, read_only=True)) as checkpoints:
    if checkpoints.latest() != config.train.steps:
      raise KeyboardInterrupt


def complete(
  todo: Sequence[tuple[str, int]],
  measure: Callable[[str, int], Iterator[sweep_results.Line]],
  path: pathlib.Path,
) -> str:
  """Measures runs, adds the lines of each to a file, and writes and returns its tables.

  Args:
    todo: the runs, (name, seed), in order.
    measure: name, seed -> the lines of a run.
    path: of all lines.

  Raises:
    errors.UserError: if they cannot be written.
  """
  start = time.monotonic()
  for done, (name, seed) in enumerate(todo):
    each = (time.monotonic() - start) / max(done, 1)
    eta = f', ETA {metrics.clock(each * (len(todo) - done))}' if done else ''
    print(f'run {done + 1} of {len(todo)}: {name}, seed {seed}{eta}', flush=True)
    measured = list(measure(name, seed))
    with stream.writing(path.parent), path.open('a') as file:
      # At once: a kill leaves all lines of a run, or none.
      file.write(''.join(json.dumps(line) + '\n' for line in measured))
  with stream.writing(path.parent):
    return sweep_results.write(path)


def seeds_of_flags() -> tuple[int, ...]:
  """Returns the numbers of --seeds.

  Raises:
    errors.UserError: if there are none, or they are not whole.
  """
  seeds = cli.whole_numbers('seeds')
  if not seeds or min(seeds) < 0:
    raise errors.UserError(
      f'--seeds={",".join(map(str, seeds or ()))} must be one or more whole numbers of at least 0'
    )
  return seeds


def define_flags(question: str) -> None:
  """Declares the flags of a sweep's command."""
  flags.DEFINE_string('runs', f'runs/{question}', 'where the runs are kept')
  flags.DEFINE_string('data_dir', '', 'a directory with books/train and books/validation')
  flags.DEFINE_enum('scale', 'laptop', list(SCALES), 'the model and the lengths')
  flags.DEFINE_list('seeds', ['0', '1', '2'], 'one or more, whole numbers')
  cli.show_in_help('runs', 'data_dir', 'scale', 'seeds')


def main(directory: pathlib.Path, make_variants: Callable[[Scale], Variants]) -> None:
  """The command of a question.

  Args:
    directory: of the question, into which its results are written.
    make_variants: returns the variants that it compares at a scale.
  """
  of, scale = corpus(flags.FLAGS.data_dir), SCALES[flags.FLAGS.scale]
  name, seeds = f'{of.name}_{flags.FLAGS.scale}', seeds_of_flags()
  runs = storage.local(flags.FLAGS.runs, '--runs') / name
  print(run(scale, of, make_variants(scale), seeds, directory / f'{name}.jsonl', runs))
