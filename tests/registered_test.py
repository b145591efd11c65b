"""Tests of the seqio Tasks that users register: they are asked by name, and imported by a flag."""

import re

import pytest
import tiny

from lex_fire import asking, benchmark, errors
from lex_fire import config as config_lib
from lex_fire.data import lazy, prepare, questions, reading, tasks
from lex_fire.data.spec import Spec

seqio = pytest.importorskip('seqio')

# What a user writes: a letter is asked, and the next one is the answer, in capitals or not.
MODULE = """
import seqio
import tensorflow as tf

def dataset(split, shuffle_files=False, seed=None):
  letters = {'train': 'abcd', 'validation': 'wxy', 'test': 'jk'}[split]
  answers = ['' if split == 'test' else chr(ord(x) + 1) * 3 for x in letters]
  return tf.data.Dataset.from_tensor_slices({'inputs': list(letters), 'targets': answers})

def fraction(targets, predictions):
  same = [target == prediction for target, prediction in zip(targets, predictions, strict=True)]
  return {'share': seqio.metrics.Scalar(100 * sum(same) / len(same)), 'asked': len(same)}

def add(name, **changes):
  feature = seqio.Feature(seqio.ByteVocabulary())  # which ends in EOS unless it is told
  fields = dict(
    source=seqio.FunctionDataSource(dataset, splits=['train', 'validation', 'test']),
    preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    output_features={'inputs': feature, 'targets': feature},
    metric_fns=[fraction],
    postprocess_fn=lambda text, **unused: text.upper(),
  )
  seqio.TaskRegistry.add(name, **fields | changes)
"""


@pytest.fixture
def add():
  """Registers a Task, and removes it after the test."""
  names, module = [], {}
  exec(MODULE, module)

  def register(name, **changes):
    names.append(name)
    module['add'](name, **changes)
    return seqio.TaskRegistry.get(name)

  yield register
  for name in names:
    seqio.TaskRegistry.remove(name)


def test_a_registered_task_is_asked_if_it_has_inputs(add):
  add('next_letter')
  add('letters', output_features={'targets': seqio.Feature(seqio.ByteVocabulary())})

  assert asking.names('copy,next_letter') == ('copy', 'next_letter')
  assert not tasks.asks_questions('letters')
  with pytest.raises(errors.UserError, match="--tasks='letters' asks no questions; .*module_impor"):
    asking.names('letters')
  with pytest.raises(errors.UserError, match="unknown task 'other'; .* by --module_import"):
    tasks.get_task(Spec('other'))


def test_its_metrics_judge_what_its_own_function_has_made_of_texts(add):
  add('next_letter')

  found = tasks.question(Spec('next_letter'))

  (metric,) = found.metrics
  assert metric([('xxx',), ('yyy',)], ['XXx', 'no']) == {'share': 50.0, 'asked': 2.0}
  assert (found.answer_bytes, found.facts, found.split) == (3, (), 'validation')


def test_examples_are_numbered_and_their_texts_may_be_those_of_tokens(add):
  kept = add('next_letter')
  texts = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
  bare = add(
    'bare',
    preprocessors=[
      *texts,
      lambda dataset: dataset.map(lambda x: {key: x[key] for key in ('inputs', 'targets')}),
    ],
  )

  expected = [(str(n), x, (y * 3,), {}) for n, (x, y) in enumerate(['wx', 'xy', 'yz'])]
  assert list(questions.examples(kept, 'validation')) == expected
  assert list(questions.examples(bare, 'validation')) == expected


def test_only_numbers_and_texts_are_facts(add):
  def with_more(dataset):
    return dataset.map(lambda x: {**x, 'count': 7, 'several': [1, 2]})

  texts = [with_more, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]

  found = list(questions.examples(add('more', preprocessors=texts), 'validation'))

  assert [example.facts for example in found] == [{'count': 7}] * 3


def test_one_that_is_added_with_its_question_keeps_it(add):
  question = questions.Question((), 5, split='test')
  source = add('next_letter').source

  task = questions.add('kept', Spec('kept'), question, lambda: source, lambda x: {**x, 'id': 'a'})

  try:
    assert tasks.question(Spec(task.name)) is question
  finally:
    seqio.TaskRegistry.remove(task.name)


def test_the_end_of_inputs_does_not_stand_before_the_answer(add):
  letters = seqio.Feature(seqio.ByteVocabulary(), add_eos=False)
  targets = seqio.Feature(seqio.ByteVocabulary())

  with_end = reading.documents(add('next_letter'), 'train')
  without = reading.documents(
    add('without_end', output_features={'inputs': letters, 'targets': targets}), 'train'
  )

  for first, second in zip(with_end, without, strict=True):
    assert first.tokens_L.tolist() == second.tokens_L.tolist()
    assert first.ends == second.ends


@pytest.mark.parametrize(
  'split, changes, message',
  [
    ('', {'metric_fns': []}, "'next_letter' has no metric of targets and predictions; give it"),
    ('test', {}, "split 'test' of registered task 'next_letter' has no right answer; use another"),
    ('dev', {}, "task 'next_letter' has no split 'dev'; it has: train, validation, test"),
  ],
)
def test_what_cannot_be_judged_is_refused(split, changes, message, add):
  add('next_letter', **changes)

  with pytest.raises(errors.UserError, match=message):
    tasks.question(Spec('next_letter'), split)


def test_the_vocabulary_of_a_registered_task_need_not_be_the_run_s(add, fire_run, tmp_path):
  texts = (f'{number} times 7 is {number * 7}, wxyz.' for number in range(300))
  path = tiny.write_vocabulary(tmp_path / 'own.model', texts)
  pieces = seqio.Feature(seqio.SentencePieceVocabulary(path))
  add('next_letter', output_features={'inputs': pieces, 'targets': pieces})
  model = {'vocab_size': pieces.vocabulary.vocab_size}
  other = tiny.as_if(fire_run[0], tmp_path / 'o', data={'task': 'next_letter'}, model=model)
  request = config_lib.EvaluateConfig((64,))

  plans = benchmark.plan([fire_run[0], other], asking.Asked(('next_letter',)), request)

  for plan in plans:
    (found,) = plan.questions
    for prompt in found.prompts:
      text = plan.codec.decoder().feed(prompt.tokens_L[1:].tolist())
      assert re.fullmatch(r'[wxy]\s*Answer:\s*', text)
  with pytest.raises(errors.UserError, match="questions of 'copy' have data.vocabulary='bytes'"):
    benchmark.plan([other], asking.Asked(('next_letter', 'copy')), request)


def test_a_command_imports_the_module_of_a_task(tmp_path, monkeypatch):
  (tmp_path / 'my_tasks.py').write_text(f"{MODULE}\nadd('next_letter')\n")
  monkeypatch.syspath_prepend(tmp_path)

  status, _, err = tiny.run_command(
    'lex_fire.train', '--config=configs/quickstart.py', '--config.data.task=next_letter',
    f'--workdir={tmp_path / "run"}', f'--config.data.directory={tmp_path}',
    '--config.model.vocab_size=3', '--module_import=my_tasks',
  )  # fmt: skip

  assert status == 2  # but it has found and read the Task
  assert "model.vocab_size=3 is less than the 259 ids of task 'next_letter'" in err


@pytest.mark.parametrize('name', ['', '.tasks'])
def test_what_is_no_name_of_a_module_is_refused(name):
  with pytest.raises(errors.UserError, match=f"--module_import='{name}' must be the whole name of"):
    lazy.import_modules([name])


def test_a_module_that_cannot_be_imported_is_refused(tmp_path, capsys):
  message = "error: cannot import module 'none_such': No module named 'none_such'; start where it"

  status, _, err = tiny.run_command('lex_fire.train', '--module_import=none_such')
  flags = ['--task=x', '--split=train', f'--directory={tmp_path}', '--module_import=none_such']

  assert status == 2 and err.startswith(message) and err.count('\n') == 1
  assert prepare.main(flags) == 2
  assert capsys.readouterr().err.startswith(message)
