"""What a model answers: questions as prompts, cut to a length, and its answers to them, kept.

Answers are appended to a file of JSON lines as they come, so that an evaluation that is killed goes
on where it stopped. A prompt is EOS, the inputs and the separator, as in training
(`data.batches.Questions`); the model continues it with its likeliest tokens up to EOS.
"""

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lex_fire import errors, generate, hosts, model, sampling, sharding
from lex_fire.data import examples, files, reading
from lex_fire.data import text as text_lib

TOKENS_PER_BATCH = 32_768  # a device, prompts and answers together; at least one row
_LEAST_KEPT = 32  # tokens of inputs: with less there is no question


class Prompt(NamedTuple):
  """A question in tokens.

  Attributes:
    id: of the question.
    references: its right answers; () where they are withheld.
    facts: what scores are broken down by.
    tokens_L: what the model reads, int32.
    cut: tokens of the inputs that had no room.
  """

  id: str
  references: tuple[str, ...]
  facts: Mapping[str, Any]
  tokens_L: np.ndarray
  cut: int


Answered = list[tuple[Prompt, str]]  # a batch of prompts, each with its answer


def prompts(
  questions: Iterable[examples.Example], codec: text_lib.Codec, length: int | None, answer: int
) -> list[Prompt]:
  """Returns questions as prompts, the longest first.

  Args:
    questions: any; their inputs are not kept beyond the length.
    codec: of the model's vocabulary.
    length: of prompt and answer together [tokens]; None: nothing is cut.
    answer: the most tokens of an answer, its EOS among them.

  Raises:
    errors.UserError: if the length leaves no room for a question.
  """
  separator_L = codec.encode(reading.SEPARATOR)
  taken = len(separator_L) + answer
  room = None if length is None else length - taken
  if room is not None and room < _LEAST_KEPT:
    raise errors.UserError(
      f'{length=} leaves {max(room, 0)} tokens for a question beside an answer of up to {answer}; '
      f'use at least {taken + _LEAST_KEPT}'
    )

  def prompt(example):
    inputs_L = codec.encode(example.inputs)
    kept_L = inputs_L[:room]
    tokens_L = np.concatenate([[codec.eos_id], kept_L, separator_L]).astype(np.int32)
    cut = len(inputs_L) - len(kept_L)
    return Prompt(example.id, example.references, example.facts, tokens_L, cut)

  # Prompts of about one length share a batch; the longest come first, so that if memory is short
  # that is known at once.
  return sorted(map(prompt, questions), key=lambda made: -len(made.tokens_L))


def answers(
  transformer: model.Transformer,
  params: Any,
  asked: Sequence[Prompt],
  codec: text_lib.Codec,
  max_tokens: int,
) -> Iterator[Answered]:
  """Yields the prompts with their answers, batch by batch.

  The devices of the mesh of `jax.set_mesh`, if any, share the rows of each batch.

  Args:
    transformer: a causal model.
    params: its parameters, on that mesh.
    asked: in the order to answer in.
    codec: of the model's vocabulary.
    max_tokens: of an answer.

  Raises:
    errors.UserError: as generate.generate does.
  """
  start = 0
  while start < len(asked):
    rows = rows_at_once(len(asked[start].tokens_L) + max_tokens, len(asked))
    batch = asked[start : start + rows]
    # A last batch is filled up with its last prompt again, so that it needs no program of its own.
    filling = [batch[-1]] * (rows - len(batch))
    made = generate.generate(
      transformer,
      params,
      [prompt.tokens_L for prompt in (*batch, *filling)],
      max_tokens=max_tokens,
      sampling=sampling.GREEDY,
      eos_id=codec.eos_id,
    )
    texts = (_text(codec, tokens_L) for tokens_L in made)
    yield list(zip(batch, texts, strict=False))
    start += len(batch)


def rows_at_once(length: int, count: int) -> int:
  """Returns how many rows all devices of the mesh of `jax.set_mesh` answer together.

  On each a power of two, as each number of rows is a program, unless there are fewer.

  Args:
    length: of the longest row, prompt and answer [tokens].
    count: of prompts.
  """
  ways = sharding.ways('B')
  most = 1 << max(0, (TOKENS_PER_BATCH // length).bit_length() - 1)
  return ways * min(most, -(-count // ways))


def _text(codec: text_lib.Codec, tokens_L: np.ndarray) -> str:
  decoder = codec.decoder()
  kept = [int(token) for token in tokens_L if token != codec.eos_id]
  return (decoder.feed(kept) + decoder.close()).strip()


class Kept:
  """A file of the answers to the questions of one evaluation.

  Its first line says of which model they are, each other line is a question with its answer. A line
  counts only for a question of the same tokens, so it is none if the text has changed since, or the
  vocabulary. Of several hosts the first reads and writes it, and the others go by what it finds.

  Attributes:
    path: of the file.
    found: {id: the line of a question that is answered already}.
  """

  def __init__(self, path: pathlib.Path, identity: dict[str, Any], asked: Sequence[Prompt]):
    """Opens the file, without what is not of this evaluation, or begins it anew.

    Args:
      path: of the file; its directory is made if it is not there.
      identity: JSON values that say which model answers, and how.
      asked: the questions.

    Raises:
      errors.UserError: if it cannot be written.
    """
    self.path = path
    prompts = {prompt.id: prompt for prompt in asked}
    found = {}
    if jax.process_index() == 0:
      with _writing(path):
        found = _begin(path, identity, prompts)
    self.found = json.loads(hosts.of_first(json.dumps(found)))

  def add(self, answered: Answered) -> None:
    """Appends answers, so that they outlive this process.

    Raises:
      errors.UserError: if they cannot be written.
    """
    lines = [_line(prompt, prediction) for prompt, prediction in answered]
    if jax.process_index() == 0:
      with _writing(self.path), self.path.open('a') as file:
        file.writelines(json.dumps(line) + '\n' for line in lines)
    self.found |= {line['id']: line for line in lines}


def _begin(path, identity, prompts) -> dict[str, dict[str, Any]]:
  """Leaves in a file but the answers to prompts by id, or begins it; returns their lines by id."""
  first, *lines = _whole_lines(path) or [None]
  kept = lines if first == json.loads(json.dumps(identity)) else []
  found = {
    line['id']: _line(prompts[line['id']], line['prediction'])
    for line in kept
    if isinstance(line, dict) and {'id', 'prompt', 'prediction'} <= line.keys()
    if line['id'] in prompts and line['prompt'] == _digest(prompts[line['id']])
  }
  content = ''.join(json.dumps(line) + '\n' for line in (identity, *found.values()))
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write_whole(path, lambda temporary: temporary.write_text(content))
  return found


def digest(asked: Sequence[Prompt]) -> str:
  """Returns what tells questions from others, or the same in another order."""
  parts = [(prompt.id, prompt.references, _digest(prompt)) for prompt in asked]
  return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _line(prompt: Prompt, prediction: str) -> dict[str, Any]:
  return {
    'id': prompt.id,
    'prediction': prediction,
    'references': list(prompt.references),
    'facts': dict(prompt.facts),
    'prompt': _digest(prompt),
    'prompt_tokens': len(prompt.tokens_L),
    'cut_tokens': prompt.cut,
  }


def _digest(prompt: Prompt) -> str:
  return hashlib.sha256(prompt.tokens_L.tobytes()).hexdigest()[:16]


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise errors.UserError(
      f'cannot write answers in {str(path)!r}: {error.strerror}; '
      'make room, or give another --output'
    ) from error


def _whole_lines(path: pathlib.Path) -> list[Any]:
  """Reads lines up to the first that a kill has broken off; none, if there is no file."""
  if not path.exists():
    return []
  lines = []
  for line in path.read_text(errors='replace').splitlines():
    try:
      lines.append(json.loads(line))
    except ValueError:
      break
  return lines


def read(path: pathlib.Path) -> dict[str, str]:
  """Returns {id: answer} of a file of answers."""
  return {line['id']: line['prediction'] for line in _whole_lines(path)[1:]}


def answer_all(
  asked: Sequence[Prompt],
  kept: Kept,
  answer: Callable[[Sequence[Prompt]], Iterator[Answered]],
  progress: Callable[[Sequence[Prompt], bool], None],
) -> list[dict[str, Any]]:
  """Answers the questions that are not answered yet; returns the lines of all, in their order.

  Args:
    asked: all questions.
    kept: the answers so far.
    answer: prompts -> batches of them with their answers.
    progress: is called with questions, and whether they are answered now or were before.
  """
  progress([prompt for prompt in asked if prompt.id in kept.found], False)
  for answered in answer([prompt for prompt in asked if prompt.id not in kept.found]):
    kept.add(answered)
    progress([prompt for prompt, _ in answered], True)
  return [kept.found[prompt.id] for prompt in asked]
