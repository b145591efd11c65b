"""The documents whose losses are measured: those of a run's own Task, or of another that is named.

They are tokens of the run's vocabulary, cut into windows by one of the `protocols`.
"""

import functools
from typing import TYPE_CHECKING, Any

from lex_fire import asking, comparison, errors
from lex_fire import config as config_lib
from lex_fire.data import protocols, reading, spec, tasks
from lex_fire.data import text as text_lib

if TYPE_CHECKING:
  import seqio

MIN_DOCUMENTS = 16  # that share the budget, if the longest length lets them: few would be no sample


def get_task(config: config_lib.Config) -> 'seqio.Task':
  """Returns the Task of documents that config.evaluate asks for, of no split's files but its own.

  Raises:
    errors.UserError: if it is unknown, asks questions, lacks files or has other tokens than the
      run.
  """
  what = _spec(config)
  if tasks.asks_questions(what.name):
    raise asking.no_losses(what.name)
  task = tasks.get_task(what)
  vocabulary = text_lib.codec(config.data.spec()).vocabulary
  comparison.check_vocabulary_size(config, vocabulary)
  if reading.vocabulary_of(task) != vocabulary:
    raise errors.UserError(
      f'task {what.name!r} has vocabulary {reading.vocabulary_of(task).name!r}, and the run '
      f'{vocabulary.name!r}; use documents in tokens of that'
    )
  return task


def _spec(config: config_lib.Config) -> spec.Spec:
  """Returns what names the Task."""
  request = config.evaluate
  directory = request.tfds_directory or config.data.tfds_directory
  if not request.documents:
    if request.files:
      known = ' or '.join(spec.FILE_TASKS)
      raise errors.UserError(
        f'files={request.files!r} are of documents={known}, which is missing; name it too'
      )
    if config.data.task in spec.FILE_TASKS and request.split not in spec.SPLITS_OF_FILES:
      raise errors.UserError(
        f'the run has files of {" and ".join(spec.SPLITS_OF_FILES)}, not of split='
        f'{request.split!r}; name some by --documents={config.data.task} --files=GLOB'
      )
    return config.data.spec(request.split)._replace(tfds_directory=directory)
  if request.documents in spec.FILE_TASKS and not request.files:
    raise errors.UserError(
      f"documents={request.documents!r} needs a glob of files, not files=''; as in "
      "--files='books/*.txt'"
    )
  files = {request.split: request.files} if request.files else None
  return spec.Spec(request.documents, config.data.vocabulary, files, directory)


def about(config: config_lib.Config) -> dict[str, Any]:
  """Returns what a report says of the documents and of how they are scored."""
  what, request = _spec(config), config.evaluate
  return {
    'task': what.name,
    'split': request.split,
    'files': (what.files or {}).get(request.split),
    'tokenizer': reading.vocabulary_of(get_task(config)).name,
    'protocol': request.protocol,
    'stride': request.stride or None,
  }


def windows(config: config_lib.Config) -> dict[int, protocols.EvaluationWindows]:
  """Returns the windows of each length that config.evaluate asks for, the shortest first.

  Raises:
    errors.UserError: as get_task does; if the model is bidirectional and there is a stride; or if
      the documents do not allow the lengths, the stride or the budget.
  """
  request = config.evaluate
  if request.stride and not config.model.causal:
    raise errors.UserError(
      f'stride={request.stride} says how many tokens stand before a target, and a bidirectional '
      'model (model.causal=False) sees those after it too; use stride=0'
    )
  lengths = tuple(sorted(request.lengths))
  return _windows(
    get_task(config), request.split, request.protocol, lengths, request.max_tokens, request.stride
  )


@functools.lru_cache(maxsize=4)
def _windows(task, split, protocol, lengths, max_tokens, stride):
  """Cuts the documents of a Task once for all runs that are compared on them."""
  longest = lengths[-1]
  # A first window of a document, and with a stride as many targets more as it has tokens before
  # the last of it: were there only first windows, no stride would change what they score.
  share = longest + (longest - (stride or longest))
  return protocols.get(protocol)(
    (document.tokens_L for document in reading.documents(task, split)),
    lengths,
    eos_id=reading.vocabulary_of(task).eos_id,
    max_tokens=max_tokens,
    tokens_per_document=max(share, max_tokens // MIN_DOCUMENTS),
    stride=stride,
  )
