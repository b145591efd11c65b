"""Tests `../lex_fire/documents.py`, and the losses of other documents and under a stride."""

import csv
import dataclasses
import gzip
import json
import math

import jax
import numpy as np
import pytest
import tiny

from lex_fire import checkpoint, comparison, documents, errors, evaluate, plot
from lex_fire import command as command_lib
from lex_fire import config as config_lib
from lex_fire import report as report_lib
from lex_fire.data import reading, spec, tasks, vocabularies

TEXTS = ('Ünö and twö, ' * 5, 'once upon a time ' * 9, 'short')  # two have a window of 32
EOS = 1


@pytest.fixture(scope='module')
def workdir(fire_run):
  return fire_run[0]


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """Returns the glob of a few documents, one of them compressed."""
  directory = tmp_path_factory.mktemp('documents')
  for number, text in enumerate(TEXTS[:2]):
    (directory / f'{number}.txt').write_text(text)
  (directory / '2.txt.gz').write_bytes(gzip.compress(TEXTS[2].encode()))
  return str(directory / '*.txt*')


@pytest.fixture
def register():
  """Registers a seqio Task of given features, which reads nothing, and removes it after a test."""
  seqio = pytest.importorskip('seqio')
  names = []

  def add(name, **vocabulary_of):
    seqio.TaskRegistry.add(
      name,
      source=seqio.FunctionDataSource(lambda split, shuffle_files: None, splits=['validation']),
      preprocessors=[],
      output_features={
        feature: seqio.Feature(vocabulary) for feature, vocabulary in vocabulary_of.items()
      },
    )
    names.append(name)

  yield add
  for name in names:
    seqio.TaskRegistry.remove(name)


def request(lengths=(32,), protocol='windows', max_tokens=2048, **fields):
  return config_lib.EvaluateConfig(lengths, protocol, max_tokens, **fields)


def asked_of(workdir, **fields):
  """Returns the config of a run with a request."""
  return dataclasses.replace(checkpoint.read_config(workdir), evaluate=request(**fields))


def tokens_of(text):
  return [byte + 3 for byte in text.encode()] + [EOS]


def model_of(workdir):
  """Returns a function of inputs_BL and targets_BL: the losses of a run's model, in float64."""
  config = checkpoint.read_config(workdir)
  (case,) = comparison.cases(config)
  _, params = comparison.restore(config, workdir, evaluate.sharding.make_mesh())
  apply = jax.jit(case.transformer.apply)

  def losses(inputs_BL, targets_BL):
    position_1L = np.arange(inputs_BL.shape[1])[None]
    logits_BLV = np.float64(apply({'params': params}, np.int32(inputs_BL), position_1L))
    target_BL1 = np.take_along_axis(logits_BLV, targets_BL[..., None], axis=2)
    return np.log(np.exp(logits_BLV).sum(axis=2)) - target_BL1[..., 0]

  return losses


# Other documents


def test_the_losses_of_other_documents_are_those_of_their_bytes(workdir, files):
  losses, expected = model_of(workdir), []
  for text in TEXTS[:2]:
    tokens = tokens_of(text)
    scored = len(tokens) // 32 * 32
    inputs_BL = np.reshape([EOS, *tokens[: scored - 1]], (-1, 32))
    expected += losses(inputs_BL, np.reshape(tokens[:scored], (-1, 32))).ravel().tolist()

  (found,) = evaluate.evaluate(workdir, request(documents='text', files=files))

  (row,) = found['lengths']
  assert (row['tokens'], row['documents']) == (len(expected), 2)
  assert row['nats_per_token'] == pytest.approx(np.mean(expected), abs=1e-5)
  assert {name: found[name] for name in ('task', 'split', 'files', 'train_task')} == {
    **{'task': 'text', 'split': 'validation', 'files': files, 'train_task': 'text'}
  }
  assert (found['protocol'], found['stride'], found['tokenizer']) == ('windows', None, 'bytes')


def test_bits_per_byte_are_over_the_bytes_of_scored_tokens_alone(workdir, tmp_path):
  (tmp_path / 'a.txt').write_text('é' * 16 + 'dropped')  # 32 bytes, 7 and EOS
  (tmp_path / 'b.txt').write_text('x' * 31)  # and EOS, which is scored and is no text
  asked = request(documents='text', files=f'{tmp_path}/*.txt', stride=32)

  (found,) = evaluate.evaluate(workdir, asked)

  (row,) = found['lengths']
  assert row['tokens'] == 64
  bits = row['nats_per_token'] * 64 / math.log(2)
  assert row['bits_per_byte'] == pytest.approx(bits / (32 + 31), rel=1e-6)


def test_another_split_of_the_runs_own_task_is_scored(workdir, corpus):
  train = asked_of(workdir, split='train')

  assert documents.about(train)['files'] == corpus['train_files']
  first_L = documents.windows(train)[32].targets_WL[0]
  assert bytes((first_L - 3).astype(np.uint8)).split(b' ')[1:3] == [b'times', b'7']
  message = "files of train and validation, not of split='test'; .* --documents=text --files=GLOB"
  with pytest.raises(errors.UserError, match=message):
    documents.windows(asked_of(workdir, split='test'))


def test_datasets_are_where_the_request_says_or_else_the_run(corpus, monkeypatch):
  directories = []
  monkeypatch.setattr(
    documents.tasks, 'get_task', lambda spec: directories.append(spec.tfds_directory) or 1 / 0
  )
  run = tiny.config(corpus, data={'tfds_directory': 'of/run'})

  for asked in ({}, {'tfds_directory': 'asked/for'}, {'documents': 'pg19'}):
    with pytest.raises(ZeroDivisionError):
      documents.get_task(dataclasses.replace(run, evaluate=request(**asked)))

  assert directories == ['of/run', 'asked/for', 'of/run']


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'documents': 'passkey'}, "'passkey' asks questions, .*--tasks=passkey`, or losses of"),
    ({'documents': 'text'}, "documents='text' needs a glob of files, not files=''; as in --files="),
    ({'documents': 'jsonl'}, "documents='jsonl' needs a glob of files"),
    ({'files': 'x/*'}, "files='x/\\*' are of documents=text or jsonl, which is missing; name"),
    ({'documents': 'text', 'files': '/no/*'}, "no file of split 'validation' matches '/no/\\*'"),
    ({'documents': 'pg19', 'files': 'x/*'}, "task 'pg19' takes no files"),
    ({'documents': 'books'}, "unknown task 'books'; known: stdlib, "),
    ({'documents': 'stdlib', 'split': 'test'}, "has no split 'test'; it has: train, validation"),
    ({'documents': 'stdlib', 'stride': 12}, 'stride=12 does not divide length=32; use one that'),
    ({'documents': 'stdlib', 'stride': 64}, 'stride=64 does not divide length=32'),
  ],
  ids=str,
)
def test_documents_that_there_are_not_are_refused(workdir, fields, message):
  with pytest.raises(errors.UserError, match=message):
    documents.windows(asked_of(workdir, **fields))


def test_a_registered_task_is_refused_if_it_asks_questions_or_has_other_tokens(
  workdir, register, tmp_path_factory
):
  seqio = pytest.importorskip('seqio')
  texts = [f'the cat sat on mat {number * 7} of café' for number in range(60)]
  model = tiny.write_vocabulary(tmp_path_factory.mktemp('pieces') / 'pieces.model', texts)
  register('asks', inputs=seqio.ByteVocabulary(), targets=seqio.ByteVocabulary())
  register('pieces', targets=vocabularies.load(model))
  register('bytes', targets=seqio.ByteVocabulary())

  assert documents.get_task(asked_of(workdir, documents='bytes')).name == 'bytes'
  with pytest.raises(errors.UserError, match="task 'asks' asks questions, .*--tasks=asks`"):
    documents.get_task(asked_of(workdir, documents='asks'))
  message = "task 'pieces' has vocabulary 'sentencepiece-.*', and the run 'bytes'"
  with pytest.raises(errors.UserError, match=message):
    documents.get_task(asked_of(workdir, documents='pieces'))


def test_a_vocabulary_of_more_ids_than_the_run_has_is_refused(corpus):
  run = tiny.config(corpus, model={'vocab_size': 200})

  with pytest.raises(errors.UserError, match="'bytes' has 259 ids, more than model.vocab_size=200"):
    documents.windows(run)


# Strides


@pytest.mark.parametrize('protocol', ['windows', 'same_tokens'])
def test_a_stride_of_the_length_gives_the_numbers_of_none(workdir, protocol):
  (without,) = evaluate.evaluate(workdir, request((32,), protocol))
  (with_it,) = evaluate.evaluate(workdir, request((32,), protocol, stride=32))

  assert with_it == without | {'stride': 32}


def test_at_stride_one_each_token_is_predicted_from_exactly_its_last_inputs(workdir, files):
  losses, length, expected = model_of(workdir), 5, []
  for text in TEXTS[:2]:
    tokens = tokens_of(text)[: 64 * 2 - 1]  # of the longest, 64: what its stride leaves of 2 x 64
    known = [EOS, *tokens]
    short = [known[: end + 1] for end in range(length - 1)]
    for context, target in zip(short, tokens, strict=False):
      # a context of its own length, and what follows it cannot matter
      expected.append(losses(np.array([context]), np.array([[*context[1:], target]]))[0, -1])
    contexts_BL = np.array([known[end - length : end] for end in range(length, len(known))])
    targets_BL = np.concatenate([contexts_BL[:, 1:], np.array(tokens)[length - 1 :, None]], axis=1)
    expected += losses(contexts_BL, targets_BL)[:, -1].tolist()

  asked = request((length, 64), 'same_tokens', 300, documents='text', files=files, stride=1)
  (found,) = evaluate.evaluate(workdir, asked)

  row = found['lengths'][0]
  assert row['tokens'] == found['lengths'][1]['tokens'] == len(expected)
  assert row['nats_per_token'] == pytest.approx(np.mean(expected), abs=1e-5)


def test_losses_by_position_and_change_are_those_of_scored_tokens(workdir):
  asked = request((16, 64), 'same_tokens', 1000, stride=8)
  config = dataclasses.replace(checkpoint.read_config(workdir), evaluate=asked)
  losses, by_length, by_position = model_of(workdir), {}, {}
  for length, cut in documents.windows(config).items():
    by_length[length], by_position = {}, {}
    for row_L, document, offset in zip(
      losses(cut.inputs_WL, cut.targets_WL), cut.document_W, cut.offset_W, strict=True
    ):
      for position in range(0 if offset == 0 else length - 8, length):
        by_length[length].setdefault(int(document), []).append(row_L[position])
        by_position.setdefault(position, []).append(row_L[position])

  (found,) = evaluate.evaluate(workdir, asked)

  for row in found['lengths']:
    of_length = by_length[row['length']]
    assert row['tokens'] == sum(map(len, of_length.values()))
    expected = np.concatenate(list(of_length.values())).mean()
    assert row['nats_per_token'] == pytest.approx(expected, abs=1e-5)
  for bucket in found['positions']:
    mine = [by_position[position] for position in range(bucket['from'], bucket['to'])]
    assert bucket['nats_per_token'] == pytest.approx(np.concatenate(mine).mean(), abs=1e-5)
  # paired differences, token by token
  assert by_length[16].keys() == by_length[64].keys()
  differences = [np.subtract(by_length[64][key], by_length[16][key]) for key in by_length[16]]
  mean = np.concatenate(differences).mean()
  assert found['change']['nats_per_token'] == pytest.approx(mean, abs=1e-5)
  excess = [(of_one - mean).sum() for of_one in differences]
  count, tokens = len(excess), sum(map(len, differences))
  expected = math.sqrt(count / (count - 1) * sum(x**2 for x in excess)) / tokens
  assert found['change']['standard_error'] == pytest.approx(expected, abs=1e-6)


def test_a_stride_gives_a_document_more_than_its_first_window(workdir):
  # of 1600 tokens a sixteenth is 100, less than the longest and what a stride adds to it
  (without,) = documents.windows(asked_of(workdir, lengths=(128,), max_tokens=1600)).values()
  (with_it,) = documents.windows(
    asked_of(workdir, lengths=(128,), max_tokens=1600, stride=32)
  ).values()

  assert np.bincount(without.document_W).tolist() == [1, 1, 1]
  assert np.bincount(with_it.document_W).tolist() == [128 // 32] * 3


def test_progress_is_told_of_every_token_read_also_of_those_read_again(workdir):
  told = []
  asked = request((32,), max_tokens=96, stride=8)

  evaluate.evaluate(workdir, asked, lambda *what: told.append(what), 'run')

  # 56 tokens of the first document and 40 of the next, in 4 windows and 2
  assert told == [('run causal', 32, 32 * 6)]


def test_a_stride_of_a_bidirectional_model_is_refused(corpus):
  run = tiny.config(corpus, 'rope', model={'causal': False, 'vocab_size': 260})

  with pytest.raises(errors.UserError, match='stride=8 .* bidirectional .* those after it'):
    documents.windows(dataclasses.replace(run, evaluate=request(stride=8)))


# What is shown, and the command


def test_runs_of_other_tasks_are_compared_on_documents_that_are_named(
  evaluate_command, workdir, files, tmp_path, capsys
):
  other = tiny.as_if(workdir, tmp_path / 'other', data={'task': 'stdlib'})
  arguments = {'lengths': '16,32', 'max_tokens': '512', 'stride': '8', 'protocol': 'windows'}

  with pytest.raises(errors.UserError, match="has data.task='stdlib', not 'text' as"):
    evaluate_command(workdir, other, **arguments)
  out = evaluate_command(workdir, other, documents='text', files=files, **arguments)

  (path,) = out.glob('*.json')
  assert path.name.startswith('fire_other_text-')
  assert '_windows_stride-8_' in path.name
  reports = json.loads(path.read_text())['runs']
  assert [(one['run'], one['task'], one['train_task'], one['stride']) for one in reports] == [
    *(('fire', 'text', 'text', 8), ('other', 'text', 'stdlib', 8))
  ]
  with path.with_suffix('.csv').open() as file:
    rows = list(csv.DictReader(file))
  columns = ('task', 'split', 'files', 'protocol', 'stride')
  assert {tuple(row[name] for name in columns) for row in rows} == {
    ('text', 'validation', files, 'windows', '8')
  }
  heading = report_lib.heading(reports[0])
  assert '(windows, stride 8, ' in heading and heading.endswith(f', validation of text {files}')
  assert f'\n{heading}\n{report_lib.table(reports)}\n' in capsys.readouterr().out


def test_runs_must_be_alike_in_what_decides_the_tokens():
  alike = command_lib.same_tokens

  assert alike(request()) == (
    *('data.task', 'data.validation_files', 'data.vocabulary', 'model.causal'),
  )
  assert alike(request(split='train'))[1] == 'data.train_files'
  assert alike(request(split='test')) == ('data.task', 'data.vocabulary', 'model.causal')
  assert alike(request(documents='pg19')) == ('data.vocabulary', 'model.causal')


def test_a_plot_names_the_protocol_the_stride_and_the_documents(
  workdir, files, tmp_path, monkeypatch
):
  figures = []
  monkeypatch.setattr(
    'matplotlib.figure.Figure.savefig', lambda figure, path, **_: figures.append(figure)
  )
  asked = request(documents='text', files=files, stride=16)

  plot.lengths(evaluate.evaluate(workdir, asked), tmp_path / 'plot.png')

  (figure,) = figures
  assert figure.axes[0].get_title() == 'Loss by window length (windows, stride 16)'
  assert figure.get_suptitle() == f'validation of text {files}'


def test_reports_of_before_there_were_strides_and_files_are_still_shown():
  old = {'protocol': 'windows', 'task': 'stdlib', 'split': 'validation'}

  assert report_lib.how(old) == 'windows'
  assert report_lib.documents(old) == 'validation of stdlib'


# What the report says


def test_documents_that_have_no_window_are_told(workdir, files):
  (found,) = evaluate.evaluate(workdir, request((32, 64), documents='text', files=files))

  lengths = [len(tokens_of(text)) for text in TEXTS]
  assert [row['documents_too_short'] for row in found['lengths']] == [
    sum(length < asked for length in lengths) for asked in (32, 64)
  ]
  short = found['lengths'][-1]['documents_too_short']
  assert short and f'; {short} more are shorter than 64), ' in report_lib.heading(found)


def test_the_text_of_each_document_is_counted_by_itself(tmp_path):
  """SentencePiece writes a space before a word, which the first word of a document has not."""
  texts = ['some words here', 'and other words', 'more of words']
  words = [name for name in dir(str) if name.isalpha()]
  text = [*texts, ' '.join(words), ' '.join(words[::-1])]
  pieces = tiny.write_vocabulary(tmp_path / 'pieces.model', text)
  path = tmp_path / 'text.jsonl'
  path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
  task = tasks.get_task(spec.Spec('jsonl', pieces, {'train': str(path)}))
  tokens = [document.tokens_L for document in reading.documents(task, 'train')]
  document_L = np.repeat(np.arange(3), [len(tokens_L) for tokens_L in tokens])
  tokens_L = np.concatenate(tokens)
  losses = report_lib.Losses(8, np.ones(len(tokens_L)), tokens_L, tokens_L, document_L, 0)

  assert evaluate._text_bytes(task, losses) == sum(map(len, texts))


def test_a_vocabulary_that_has_changed_since_is_refused(workdir, tmp_path):
  copy = tiny.as_if(workdir, tmp_path / 'run')
  data = json.loads((copy / 'data.json').read_text())
  assert data['vocabulary'] == 'bytes'
  (copy / 'data.json').write_text(json.dumps({**data, 'vocabulary': 'sentencepiece-123'}))

  message = "vocabulary of the run in '.*/run' is 'bytes' now and was 'sentencepiece-123' when"
  with pytest.raises(errors.UserError, match=message):
    evaluate.evaluate(copy, request())
