"""Tests of `../lex_fire/answers.py`: prompts, what a model answers, and what is kept of it."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny

from lex_fire import answers, errors, generate, sampling, sharding, train
from lex_fire.data import batches, reading
from lex_fire.data import text as text_lib
from lex_fire.data.examples import Example
from lex_fire.data.spec import Spec

BYTES = text_lib.codec(Spec('stdlib'))
SEPARATOR = len(reading.SEPARATOR)


def example(name, inputs, *references, **facts):
  return Example(name, inputs, references, facts)


# How long a question is

TEXT = 'What? ' + 'so it goes on, ' * 8
ANSWER = 'As it began.'


@pytest.mark.parametrize('length', [60, 90, 300])
def test_a_prompt_is_the_row_of_training_up_to_the_answer(length):
  inputs_L, separator_L, answer_L = map(BYTES.encode, (TEXT, reading.SEPARATOR, ANSWER))
  tokens_L = np.concatenate([inputs_L, separator_L, answer_L, [BYTES.eos_id]])
  ends = np.cumsum([len(inputs_L), len(separator_L), len(answer_L) + 1])[None]
  rows = batches.Questions([tokens_L], [ends], length, eos_id=BYTES.eos_id, isolate_documents=False)
  batch = rows.batch(np.array([0]))

  (made,) = answers.prompts([example('a', TEXT, ANSWER)], BYTES, length, len(answer_L) + 1)

  is_answer_L = batch['loss_weights_BL'][0] > 0
  first = int(is_answer_L.argmax())  # the target at the prompt's last token
  assert made.tokens_L.tolist() == batch['inputs_BL'][0, : first + 1].tolist()
  assert batch['targets_BL'][0][is_answer_L].tolist() == [*answer_L, BYTES.eos_id]
  assert (made.cut, int(made.cut > 0)) == (rows.cut_tokens, rows.num_cut)
  assert made.cut == max(0, 1 + len(tokens_L) - (length + 1))


def test_prompts_keep_the_beginning_of_inputs_and_the_longest_comes_first():
  questions = [example(str(size), 'x' * size + 'end', size=size) for size in (40, 90, 50)]

  made = answers.prompts(questions, BYTES, length=40 + SEPARATOR + 8, answer=8)

  assert [prompt.id for prompt in made] == ['40', '90', '50']  # all are cut to one length
  assert [prompt.cut for prompt in made] == [3, 53, 13]
  expected = [BYTES.eos_id, *BYTES.encode('x' * 40 + reading.SEPARATOR)]
  assert [prompt.tokens_L.tolist() for prompt in made] == [expected] * 3
  whole = answers.prompts(questions, BYTES, None, 8)
  assert [(prompt.id, prompt.cut) for prompt in whole] == [('90', 0), ('50', 0), ('40', 0)]
  assert [prompt.facts for prompt in whole] == [{'size': 90}, {'size': 50}, {'size': 40}]


@pytest.mark.parametrize('length, room', [(50, 20), (12, 0)])
def test_a_length_without_room_for_a_question_is_refused_with_numbers(length, room):
  message = f'length={length} leaves {room} tokens .* up to 20; use at least {SEPARATOR + 20 + 32}'

  with pytest.raises(errors.UserError, match=message):
    answers.prompts([], BYTES, length, 20)


# What a model answers


@pytest.fixture(scope='module')
def model():
  """A model of random parameters: large ones, lest it see but the end that all prompts share.

  Tied ones would repeat the last token.
  """
  config = tiny.config({}, model={'tied_embeddings': False})
  params = jax.tree.map(lambda array: 4 * array, train.init(config)['params'])
  return train.make_model(config), params


QUESTIONS = [
  example(str(n), f'{n * 37} times 7 is {"and so on " * (n % 4)}', str(n)) for n in range(7)
]
MOST = 8


@pytest.fixture(scope='module')
def by_one(model):
  """Prompts with what follows each alone, as tokens, without an end."""
  made = answers.prompts(QUESTIONS, BYTES, None, MOST)
  options = {'max_tokens': MOST, 'sampling': sampling.GREEDY}
  return [(p, generate.generate(*model, [p.tokens_L], **options)[0]) for p in made]


def text(tokens):
  """Returns the text of bytes + 3, or of less, which are no bytes."""
  return bytes(t - 3 if t >= 3 else 0xFF for t in map(int, tokens)).decode(errors='replace').strip()


def ending_at(token):
  """The codec of bytes, if a text ended with some byte."""
  return BYTES._replace(vocabulary=dataclasses.replace(BYTES.vocabulary, eos_id=int(token)))


# Batches of 4 rows, the last with one to fill up, on one device and on two; of 1; and one of all.
@pytest.mark.parametrize(
  'budget, devices, sizes',
  [(4 * 75, 1, [4, 3]), (2 * 75, 2, [4, 3]), (1, 1, [1] * 7), (10**6, 1, [7]), (10**6, 8, [7])],
)
def test_answers_are_those_to_each_prompt_alone_whatever_the_batch_and_the_devices(
  budget, devices, sizes, model, by_one, monkeypatch
):
  monkeypatch.setattr(answers, 'TOKENS_PER_BATCH', budget)
  made = [prompt for prompt, _ in by_one]
  transformer, params = model
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])

  with jax.set_mesh(mesh):
    params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    found = list(answers.answers(transformer, params, made, BYTES, MOST))

  assert [len(batch) for batch in found] == sizes
  expected = [(prompt.id, text(tokens_L)) for prompt, tokens_L in by_one]
  assert [(prompt.id, made) for batch in found for prompt, made in batch] == expected
  assert len({made for _, made in expected}) > 3  # many random bytes are no text


def test_an_answer_ends_before_its_eos(model, by_one):
  tokens = [token for _, tokens_L in by_one for token in tokens_L]
  codec = ending_at(max(set(tokens), key=tokens.count))
  made = [prompt for prompt, _ in by_one]

  (found,) = answers.answers(*model, made, codec, MOST)

  ended = [[*map(int, tokens_L), codec.eos_id] for _, tokens_L in by_one]
  expected = [text(row[: row.index(codec.eos_id)]) for row in ended]
  assert [made for _, made in found] == expected
  assert min(map(len, expected)) < max(map(len, expected))


def test_the_rows_of_a_batch_are_a_power_of_two_within_the_budget():
  for length in (1, 100, 1000, 3000, 32_768, 10**6):
    rows = answers.rows_at_once(length, 10**9)
    assert rows in 2 ** np.arange(16)
    assert rows == 1 or rows * length <= answers.TOKENS_PER_BATCH < 2 * rows * length


# What is kept

IDENTITY = {'checkpoint_step': 12, 'mask': 'causal', 'task': 'copy', 'length': 32, 'tuple': (1, 2)}
FEW = answers.prompts([example(n, f'{n}?', n.upper(), depth=0.5) for n in 'abcd'], BYTES, None, 4)


class Model:
  """Answers two at a time, and counts what it is asked."""

  def __init__(self):
    self.asked = []

  def __call__(self, prompts):
    for start in range(0, len(prompts), 2):
      batch = prompts[start : start + 2]
      self.asked += [prompt.id for prompt in batch]
      yield [(prompt, f'{prompt.id} \u2028 is "Ü"') for prompt in batch]


def answer(path, asked=FEW, **changes):
  """Answers all questions; returns the lines, the ids that the model is asked, and progress."""
  model, told = Model(), []
  kept = answers.Kept(path, IDENTITY | changes, asked)
  lines = answers.answer_all(
    asked, kept, model, lambda prompts, are_new: told.append(([p.id for p in prompts], are_new))
  )
  return lines, model.asked, told


def content(path):
  return sorted(path.read_text().splitlines())


def test_all_answers_are_kept_and_returned_in_order(tmp_path):
  lines, asked, told = answer(tmp_path / 'new' / 'a.jsonl')

  assert asked == ['a', 'b', 'c', 'd']
  assert told == [([], False), (['a', 'b'], True), (['c', 'd'], True)]
  assert [line['id'] for line in lines] == asked
  assert lines[0] | {'prompt': ''} == {
    'id': 'a',
    'prediction': 'a \u2028 is "Ü"',
    'references': ['A'],
    'facts': {'depth': 0.5},
    'prompt': '',
    'prompt_tokens': len(FEW[0].tokens_L),
    'cut_tokens': 0,
  }
  first, *rest = map(json.loads, (tmp_path / 'new' / 'a.jsonl').read_text().splitlines())
  assert (first, rest) == (IDENTITY | {'tuple': [1, 2]}, lines)
  assert answers.read(tmp_path / 'new' / 'a.jsonl') == {p.id: f'{p.id} \u2028 is "Ü"' for p in FEW}


def test_after_a_kill_at_any_byte_the_file_becomes_the_same_and_nothing_is_asked_twice(tmp_path):
  path = tmp_path / 'a.jsonl'
  expected, _, _ = answer(path)
  whole, lines = path.read_bytes(), content(path)
  ends = np.cumsum([len(line) + 1 for line in whole.splitlines()])

  for size in {*range(0, len(whole), 23), *ends, *(ends - 1), *(ends - 2)}:
    path.write_bytes(whole[:size])
    found, asked, told = answer(path)

    there = max(0, np.count_nonzero(ends - 1 <= size) - 1)  # an end of line may be missing
    assert asked == ['a', 'b', 'c', 'd'][there:]
    assert told[0] == (['a', 'b', 'c', 'd'][:there], False)
    assert (found, content(path)) == (expected, lines)


@pytest.mark.parametrize(
  'changes', [{'checkpoint_step': 16}, {'mask': 'window:8'}, {'task': 'sort'}, {'length': 64}]
)
def test_answers_of_another_evaluation_are_begun_anew(changes, tmp_path):
  answer(tmp_path / 'a.jsonl')

  _, asked, _ = answer(tmp_path / 'a.jsonl', **changes)

  assert asked == ['a', 'b', 'c', 'd']
  assert len(content(tmp_path / 'a.jsonl')) == 5


def test_a_question_whose_text_has_changed_is_asked_again_and_one_that_is_gone_is_dropped(tmp_path):
  answer(tmp_path / 'a.jsonl')
  changed = [example('b', 'b?', 'other', 'two'), example('c', 'C?', 'C')]

  lines, asked, _ = answer(tmp_path / 'a.jsonl', answers.prompts(changed, BYTES, None, 4))

  assert asked == ['c']
  assert lines[0]['references'] == ['other', 'two']  # what is right is not what was kept
  assert [json.loads(x)['id'] for x in content(tmp_path / 'a.jsonl')[1:]] == ['b', 'c']


def test_what_cannot_be_written_is_refused_in_a_sentence(tmp_path):
  (tmp_path / 'file').write_text('')

  with pytest.raises(errors.UserError, match="cannot write .*file/a.jsonl': File exists"):
    answers.Kept(tmp_path / 'file' / 'a.jsonl', IDENTITY, FEW)
  kept = answers.Kept(tmp_path / 'a.jsonl', IDENTITY, FEW)
  kept.path.unlink()
  kept.path.mkdir()
  with pytest.raises(errors.UserError, match="cannot write answers in '.*a.jsonl': Is a directory"):
    kept.add([(FEW[0], 'x')])
