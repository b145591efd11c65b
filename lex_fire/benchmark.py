"""Evaluates checkpoints on Tasks of questions.

Every case of every run, at every length, answers the same questions; scores are the Task's metrics,
over all questions and by what the Task breaks them down by, such as the depth of a needle.
"""

import dataclasses
import functools
import hashlib
import itertools
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lex_fire import (
  answers,
  asking,
  checkpoint,
  comparison,
  errors,
  generate,
  hosts,
  model,
  sharding,
)
from lex_fire import config as config_lib
from lex_fire import report as report_lib
from lex_fire.data import spec, tasks, vocabularies
from lex_fire.data import text as text_lib

Report = dict[str, Any]
Progress = Callable[[str, Sequence[answers.Prompt], bool], None]


class Plan(NamedTuple):
  """What is asked of a run, checked.

  Attributes:
    workdir: of the run.
    name: what reports call it.
    config: of the run, with the request in `evaluate`.
    codec: of its vocabulary.
    cases: of its model.
    questions: for each of them.
  """

  workdir: pathlib.Path
  name: str
  config: config_lib.Config
  codec: text_lib.Codec
  cases: list[comparison.Case]
  questions: list[asking.Questions]


def plan(
  workdirs: Sequence[pathlib.Path],
  asked: asking.Asked,
  request: config_lib.EvaluateConfig,
  names: Sequence[str] | None = None,
) -> list[Plan]:
  """Reads the questions for runs, and refuses what they cannot answer, before any is asked.

  Args:
    workdirs: of the runs.
    asked: the Tasks; a name without options is, if all runs were trained on that Task, theirs.
    request: lengths, masks and encodings, the same for all.
    names: what reports call the runs; by default the last parts of their workdirs.

  Raises:
    errors.UserError: as comparison.cases and asking.read do, if a model is bidirectional, knows but
      positions that are drawn or lacks ids of its vocabulary, or an encoding positions.
  """
  made: list[Plan] = []
  read: dict[Any, list[asking.Questions]] = {}  # runs that read alike share their questions
  for workdir, name in zip(workdirs, names or comparison.names(workdirs), strict=True):
    config = dataclasses.replace(checkpoint.read_config(workdir), evaluate=request)
    codec = text_lib.codec(config.data.spec())
    _check(config, codec, asked)
    made.append(Plan(workdir, name, config, codec, comparison.cases(config), []))
  asked = asking.resolved(asked, [of_run.config.data.task for of_run in made])
  for index, of_run in enumerate(made):
    data = of_run.config.data
    key = (of_run.codec.vocabulary, data.vocabulary, data.tfds_directory)
    if key not in read:
      read[key] = asking.read(asked, of_run.config, of_run.codec)
    made[index] = of_run._replace(questions=read[key])
    # The last token of an answer is not read.
    longest = max(len(q.prompts[0].tokens_L) + q.max_tokens - 1 for q in read[key])
    for case in of_run.cases:
      model.check_length(case.transformer.encoding, longest)
  return made


def _check(config: config_lib.Config, codec: text_lib.Codec, asked: asking.Asked) -> None:
  """Refuses a model that cannot answer what is asked."""
  if not config.model.causal:
    raise errors.UserError('a bidirectional model (model.causal=False) writes no answers')
  if config.data.position_range:
    raise errors.UserError(
      f'a run of data.position_range={config.data.position_range} knows positions drawn from there,'
      ' and an answer has those that follow; evaluate another run'
    )
  comparison.check_vocabulary_size(config, codec.vocabulary)
  ours = [name for name in asked.tasks if spec.Spec(name).base in tasks.TASKS]
  if ours and codec.vocabulary != vocabularies.facts_of(config.data.vocabulary):
    raise errors.UserError(
      f'registered task {config.data.task!r} has vocabulary {codec.vocabulary.name!r}, and '
      f'questions of {ours[0]!r} have data.vocabulary={config.data.vocabulary!r}; ask another run'
    )


def run(
  of_run: Plan,
  directory: pathlib.Path,
  progress: Progress = lambda case, prompts, are_new: None,
) -> list[Report]:
  """Asks a checkpoint of a run, on all devices of all hosts.

  Args:
    of_run: what is asked.
    directory: where the first host keeps answers, a file for each Task, length and case.
    progress: is called with a case, questions, and whether they are answered now or were before.

  Returns:
    A report for each case, of JSON values: what `comparison.of_case` says, on how many devices it
    was asked (by answers from before it may have been others), and in 'tasks' for each Task and
    length the questions, what was cut of them, how many answers differ, their scores [percent], and
    the scores by facts; a Task whose answers are withheld has none.

  Raises:
    errors.UserError: if there is no checkpoint, or answers cannot be written.
  """
  config, mesh = of_run.config, sharding.make_mesh()
  step, params = comparison.restore(config, of_run.workdir, mesh)
  reports = []
  for case in of_run.cases:
    report = {
      'run': of_run.name,
      'checkpoint_step': step,
      **comparison.of_case(config, case),
      'train_length': config.data.length,
      'train_task': config.data.task,
      'tokenizer': of_run.codec.vocabulary.name,
      'devices': mesh.size,
    }
    ask = functools.partial(_ask, of_run, case, report, params, directory, progress)
    with jax.set_mesh(mesh):
      reports.append({**report, 'tasks': list(map(ask, of_run.questions))})
  return reports


def check_same(plans: Sequence[Plan]) -> None:
  """Refuses to ask on hosts of which some would ask other questions, or of other runs.

  Raises:
    errors.UserError: if this one would.
  """
  values = {}
  for of_run in plans:
    config, name = checkpoint.flat(of_run.config), of_run.name
    values |= {f'{field} of {name}': value for field, value in config.items()}
    values |= {
      f'the hash of {_named(found)} for {name}': answers.digest(found.prompts)
      for found in of_run.questions
    }
  hosts.check_same('an evaluation', values)


def _ask(of_run, case, report, params, directory, progress, asked) -> Report:
  """Returns what a report says of a Task at a length."""
  about = f'{report_lib.series(report)} {case.mask_name} {_named(asked)}'
  request = of_run.config.evaluate
  if request.checkpoint != config_lib.LATEST:
    about += f' checkpoint {request.checkpoint}'
  # So that answers among other text, or by other attention, do not begin the file of these anew.
  how = '' if request.attention == config_lib.AS_TRAINED else f'attention {request.attention}'
  text = ' '.join(filter(None, [about, how, asked.split, asked.files]))
  path = directory / f'{file_name(text)}.jsonl'
  kept = answers.Kept(path, _identity(of_run, case, report, _digest(params), asked), asked.prompts)
  answer = functools.partial(
    answers.answers, case.transformer, params, codec=of_run.codec, max_tokens=asked.max_tokens
  )
  tell = functools.partial(progress, about)
  lines = answers.answer_all(asked.prompts, kept, answer, tell)
  longest = len(asked.prompts[0].tokens_L) + asked.max_tokens
  at_once = answers.rows_at_once(longest, len(asked.prompts))
  return {
    'task': asked.task,
    'split': asked.split,
    'files': asked.files or None,
    'length': asked.length,
    # Of the longest question.
    'implementations': [x._asdict() for x in generate.choices(case.transformer, longest, at_once)],
    'questions': len(lines),
    'questions_cut': sum(line['cut_tokens'] > 0 for line in lines),
    'tokens_cut': sum(line['cut_tokens'] for line in lines),
    # One for all questions is a score of the Task's commonest answer, and not of any reading.
    'distinct_answers': len({line['prediction'] for line in lines}),
    'scores': _scores(asked.common, lines),
    'by': _by_facts(asked.common, lines),
    'predictions': path.name,
  }


def _named(asked: asking.Questions) -> str:
  return named(asked.task, asked.length)


def named(task: str, length: int | None) -> str:
  """Returns what a Task's questions at a length, if they have one, are called."""
  return task if length is None else f'{task} at {length}'


def file_name(text: str, most: int = 100) -> str:
  """Returns a text as a part of a file's name; of a long one the end becomes a hash.

  A glob has a hash too, as others differ from it by what no name may have.
  """
  short = re.sub(r'[^\w.=,-]+', '-', text)
  if len(short) <= most and not set(text) & set('*?['):
    return short
  return f'{short[: most - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}'


def _identity(of_run, case, report, parameters, asked) -> Report:
  """Returns all that answers follow from but the questions themselves."""
  config = of_run.config.to_dict()
  del config['evaluate']
  return {
    'task': asked.task,
    'split': asked.split,
    'length': asked.length,
    'max_tokens': asked.max_tokens,
    'checkpoint_step': report['checkpoint_step'],
    'parameters': parameters,
    'tokenizer': report['tokenizer'],
    **comparison.of_case(of_run.config, case),
    'config': config,
  }


def _digest(params: Any) -> str:
  """Returns what tells parameters from those of another run of the same config."""
  sums = jax.tree.map(lambda x: float(jnp.sum(jnp.abs(x), dtype=jnp.float32)), params)
  return hashlib.sha256(repr(jax.tree.leaves(sums)).encode()).hexdigest()[:16]


def _scores(common, lines) -> dict[str, float] | None:
  """Returns all metrics of the answers; None if what is right is withheld."""
  if not all(line['references'] for line in lines):
    return None
  targets, predictions = zip(*((x['references'], x['prediction']) for x in lines), strict=True)
  judges = common.judges([line['id'] for line in lines])
  made = (metric(targets, predictions) for metric in judges)
  return {key: float(value) for scores in made for key, value in scores.items()}


def _by_facts(common, lines) -> list[Report]:
  """Returns the metrics of the answers that agree in their facts."""
  if not common.facts:
    return []

  def facts(line):
    return tuple(round(line['facts'][name], 6) for name in common.facts)

  groups = itertools.groupby(sorted(lines, key=facts), key=facts)
  return [
    {
      'facts': dict(zip(common.facts, values, strict=True)),
      'questions': len(group),
      'scores': _scores(common, group),
    }
    for values, group in ((values, list(members)) for values, members in groups)
  ]
