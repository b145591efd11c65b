"""Finetuning by encoding, ROUGE by length: who writes summaries of meetings, and at what length?

    python -m experiments.qmsum.run --data_dir=DIR [--seeds=0,1,2] [--runs=runs/qmsum]

DIR has books/{train,validation}/*.gz and scrolls/qmsum/{train,validation,test}.jsonl.xz. Of these a
vocabulary, a dataset and, for each encoding and seed, a model of books are made, which is finetuned
on QMSum (Zhong et al. 2021, in SCROLLS' format) and asked for summaries. What is done is kept, as
in experiments/sweep.py: a run goes on from its last checkpoint or answer, and one whose lines are
in laptop.jsonl beside this file is not repeated. In the end, and by `experiments.sweep_results`
alone, these lines become a table and a plot.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from absl import flags

from experiments import sweep, sweep_results
from lex_fire import (
  asking,
  benchmark,
  benchmark_command,
  cli,
  comparison,
  errors,
  feed,
  finetuning,
  presets,
  sharding,
  storage,
  train,
)
from lex_fire import config as config_lib
from lex_fire.data import build_scrolls, examples, spec, stream, train_vocabulary

HERE = pathlib.Path(__file__).parent
TASK = 'scrolls_qmsum'
ENCODINGS = ('fire', 'rope', 'xpos', 'alibi', 'kerple_log', 't5', 'nope')
SCORES = ('rouge1', 'rouge2', 'rougeL', sweep_results.ROUGE.field)
COUNTS = ('length', 'questions', 'questions_cut', 'tokens_cut', sweep_results.DISTINCT.field)
_MAX_CHARACTERS = 50_000_000  # that a vocabulary is made of: all books


class Recipe(NamedTuple):
  """How a run comes from books to answers.

  Attributes:
    books: changes to the preset tiny for the first model; its vocab_size is the vocabulary's.
    qmsum: changes to the config of finetuning, with its length.
    lengths: of questions with their answers [tokens].
    questions: asked at each length.
  """

  books: dict[str, dict[str, Any]]
  qmsum: dict[str, dict[str, Any]]
  lengths: tuple[int, ...]
  questions: int


LAPTOP = Recipe(
  books={
    'model': {'vocab_size': 8000},
    'data': {'length': 256, 'batch_size': 8},
    'optimizer': {'learning_rate': 4e-3, 'encoding_rate': 10.0},
    'train': {'steps': 300, 'checkpoint_every': 100, 'validation_windows': 32},
  },
  qmsum={
    'data': {'length': 2048, 'batch_size': 2},
    'optimizer': {'learning_rate': 1e-3, 'warmup_steps': 20},
    'train': {'steps': 100, 'checkpoint_every': 50, 'validation_windows': 32},
  },
  lengths=(1024, 2048, 4096),
  questions=100,
)


class Data(NamedTuple):
  """What runs are trained on, and questions are of.

  Attributes:
    books: fields of the section `data` for the first model.
    qmsum: likewise for finetuning, beside those that it takes from the first model.
  """

  books: dict[str, str]
  qmsum: dict[str, str]


def globs(data_dir: str) -> tuple[dict[str, str], dict[str, str]]:
  """Returns the globs of the books and of QMSum, each {split: glob}.

  Raises:
    errors.UserError: if one matches no file.
  """
  directory = pathlib.Path(data_dir)
  books = {split: directory / 'books' / split / '*.gz' for split in spec.SPLITS_OF_FILES}
  qmsum = {split: directory / 'scrolls/qmsum' / f'{split}.jsonl.xz' for split in examples.SPLITS}
  missing = [
    str(path) for path in (*books.values(), *qmsum.values()) if not any(path.parent.glob(path.name))
  ]
  if missing:
    raise errors.UserError(
      f'--data_dir={data_dir!r} has no {", no ".join(missing)}; give a directory that does'
    )
  return {split: str(path) for split, path in books.items()}, {
    split: str(path) for split, path in qmsum.items()
  }


def prepare(recipe: Recipe, data_dir: str, runs: pathlib.Path) -> Data:
  """Makes the vocabulary and the dataset in `runs` if they are not there.

  Raises:
    errors.UserError: if `runs` cannot be made, or as globs, train_vocabulary.train and
      build_scrolls.build do.
  """
  books, qmsum = globs(data_dir)
  with stream.writing(runs):
    runs.mkdir(parents=True, exist_ok=True)
  vocabulary, datasets = runs / 'books.model', runs / 'tfds'
  if not vocabulary.exists():
    what, size = spec.Spec('text', files=books), recipe.books['model']['vocab_size']
    print(train_vocabulary.train(what, 'train', size, vocabulary, _MAX_CHARACTERS), flush=True)
  build_scrolls.build('qmsum', datasets, qmsum)
  own = {'vocabulary': str(vocabulary), 'directory': str(runs / 'prepared')}
  files = {f'{split}_files': glob for split, glob in books.items()}
  return Data({'task': 'text', **own, **files}, {'tfds_directory': str(datasets)})


def make_variants(recipe: Recipe) -> sweep.Variants:
  """Returns the encodings; what stretches RoPE takes its place after finetuning."""
  train_length, longest = recipe.qmsum['data']['length'], max(recipe.lengths)
  stretch = f'scale={longest // train_length}'
  of_rope = {
    'rope_pi': f'rope_pi:{stretch}',
    'ntk': f'ntk:{stretch}',
    'yarn': f'yarn:{stretch},train_length={train_length}',
  }
  return {
    name: sweep.Variant(name, presets.reaching(name, longest), of_rope if name == 'rope' else {})
    for name in ENCODINGS
  }


def first_config(
  recipe: Recipe, data: Data, variant: sweep.Variant, seed: int
) -> config_lib.Config:
  """Returns the config of a first model, with a seed of parameters and of the order of books."""
  sections = recipe.books | {
    'encoding': dict(variant.options),
    'data': recipe.books['data'] | data.books,
    'train': recipe.books['train'] | {'seed': seed},
  }
  return config_lib.Config.from_dict(presets.make('tiny', variant.encoding, **sections))


def finetuning_config(
  recipe: Recipe, data: Data, first: pathlib.Path, seed: int
) -> config_lib.Config:
  """Returns the config of finetuning the model in the workdir `first`."""
  asked = {'length': str(recipe.qmsum['data']['length']), 'checkpoint': str(first)}
  values = finetuning.make({**finetuning.ARGUMENTS, **asked}, TASK)
  for section, changes in recipe.qmsum.items():
    values[section] |= changes
  values['data'] |= data.qmsum
  values['train']['seed'] = seed
  return config_lib.Config.from_dict(values)


def answer_losses(
  recipe: Recipe, config: config_lib.Config, encodings: Sequence[str], workdir: pathlib.Path
) -> dict[str, dict[int, float]]:
  """Returns how likely a run finds the right answers to the first questions, before it is asked.

  Written answers tell models apart only once they differ from question to question.

  Args:
    recipe: says how many questions, and of what lengths.
    config: of the run.
    encodings: that take the place of its own, as `EncodingConfig.replaced_by` reads them.
    workdir: of the run.

  Returns:
    {encoding: {length: loss}} [nats per token of an answer].
  """
  mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
  _, params = comparison.restore(config, workdir, mesh)
  found: dict[str, dict[int, float]] = {}
  for text, length in itertools.product(encodings, recipe.lengths):
    at_length = dataclasses.replace(
      config,
      encoding=config.encoding.replaced_by(text, config.data.length),
      data=dataclasses.replace(config.data, length=length),
      train=dataclasses.replace(config.train, validation_windows=recipe.questions),
    )
    program = train.Program(at_length, mesh)
    loss = train.validate(program, params, feed.Data(at_length))
    print(f'{workdir}: {text} at {length}: {loss:.4f} nats per token of the answers', flush=True)
    found.setdefault(text, {})[length] = loss
  return found


def measure(
  recipe: Recipe, data: Data, name: str, variant: sweep.Variant, seed: int, runs: pathlib.Path
) -> Iterator[sweep_results.Line]:
  """Trains and finetunes a run, or goes on with it, and yields a line of each of its encodings."""
  run = f'{name}-{seed}'
  first, workdir = runs / 'first' / run, runs / 'finetuned' / run
  sweep.train_to_the_end(first_config(recipe, data, variant, seed), first)
  config = finetuning_config(recipe, data, first, seed)
  sweep.train_to_the_end(config, workdir)
  request = dataclasses.replace(config.evaluate, lengths=recipe.lengths, encodings=variant.texts)
  losses = answer_losses(recipe, config, variant.texts, workdir)
  (plan,) = benchmark.plan([workdir], asking.Asked((TASK,), max_examples=recipe.questions), request)
  expected = [prompt for of_length in plan.questions for prompt in of_length.prompts]
  progress = benchmark_command.Progress(expected * len(plan.cases))
  for report in benchmark.run(plan, runs / 'answers' / run, progress):
    of_length = losses[report['encoding_override'] or config_lib.AS_TRAINED]
    lengths = [
      {
        **{field: entry[field] for field in COUNTS},
        **{score: entry['scores'][score] for score in SCORES},
        sweep_results.ANSWER_LOSS.field: of_length[entry['length']],
      }
      for entry in report['tasks']
    ]
    yield sweep.line(name, variant, seed, TASK, report, lengths)


def run(
  recipe: Recipe,
  data_dir: str,
  variants: sweep.Variants,
  seeds: Sequence[int],
  path: pathlib.Path,
  runs: pathlib.Path,
) -> str:
  """Trains, finetunes and asks what is not done; writes and returns the table of all that is.

  Args:
    recipe: of the runs.
    data_dir: with books and QMSum.
    variants: by name.
    seeds: of each.
    path: of the lines, to which those of a run are added when it is done.
    runs: where vocabulary, dataset, runs and answers are kept.
  """
  data = prepare(recipe, data_dir, runs)
  lines = sweep_results.read(path) if path.exists() else []
  todo = sweep.left(variants, seeds, (TASK,), ('causal',), lines)

  def measured(name: str, seed: int) -> Iterator[sweep_results.Line]:
    return measure(recipe, data, name, variants[name], seed, runs)

  return sweep.complete(todo, measured, path)


def main() -> None:
  """The command."""
  seeds, runs = sweep.seeds_of_flags(), storage.local(flags.FLAGS.runs, '--runs')
  path = HERE / 'laptop.jsonl'
  print(run(LAPTOP, flags.FLAGS.data_dir, make_variants(LAPTOP), seeds, path, runs))


if __name__ == '__main__':
  flags.DEFINE_string('data_dir', '', 'a directory with books and scrolls/qmsum')
  flags.DEFINE_string('runs', 'runs/qmsum', 'where all that is made is kept')
  flags.DEFINE_list('seeds', ['0', '1', '2'], 'one or more, whole numbers')
  cli.run(main, 'interrupted; the same command goes on')
