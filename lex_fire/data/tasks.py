"""A dataset is a seqio Task, made and registered on demand.

`TASKS` has a function for each name. A Task that the user has put into seqio.TaskRegistry goes the
same way by its name there. `reading` reads the examples and documents of a Task.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lex_fire import errors
from lex_fire.data import (
  algorithm_tasks,
  glue,
  language,
  lazy,
  needle_tasks,
  questions,
  reading,
  scrolls,
)
from lex_fire.data.spec import Spec

if TYPE_CHECKING:
  import seqio

TASKS: dict[str, Callable[[Spec], seqio.Task]] = {
  **language.TASKS,
  **scrolls.TASKS,
  **glue.TASKS,
  **algorithm_tasks.TASKS,
  **needle_tasks.TASKS,
}
# Those of them that ask questions, and what these have in common.
QUESTIONS: dict[str, Callable[[Spec], questions.Question]] = {
  **scrolls.QUESTIONS,
  **glue.QUESTIONS,
  **algorithm_tasks.QUESTIONS,
  **needle_tasks.QUESTIONS,
}


def asks_questions(name: str) -> bool:
  """Returns whether there is a Task of this name, with options or without, and it has inputs."""
  spec = Spec(name)
  if spec.base in TASKS:
    return spec.base in QUESTIONS
  registry = lazy.seqio().TaskRegistry
  return name in registry.names() and reading.is_of_questions(registry.get(name))


def question(spec: Spec, split: str = '') -> questions.Question:
  """Returns what the questions of a Task have in common.

  Args:
    spec: of a Task that asks questions.
    split: to be asked; '': the one that the Task says.

  Raises:
    errors.UserError: as the function in QUESTIONS or questions.of_registered does.
  """
  if spec.base in QUESTIONS:
    return QUESTIONS[spec.base](spec)
  return questions.of_registered(get_task(spec), split or 'validation')


def get_task(spec: Spec) -> seqio.Task:
  """Returns the Task of a specification, made and registered on the first call.

  Raises:
    errors.UserError: if the name is unknown, or as the function in TASKS does.
  """
  if spec.base in TASKS:
    return TASKS[spec.base](spec)
  seqio = lazy.seqio()
  registered = seqio.TaskRegistry.names()
  if spec.name not in registered:
    raise errors.UserError(
      f'unknown task {spec.name!r}; known: {", ".join(TASKS)}; name the module that '
      'registers any other by --module_import'
    )
  spec.refuse_files()
  return seqio.TaskRegistry.get(spec.name)
