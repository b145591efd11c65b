"""Tests of `lex_fire/data/vocabularies.py` and `train_vocabulary.py`."""

import io
import os
import re

import numpy as np
import pytest
import tiny

from lex_fire import errors
from lex_fire.data import files, prepare, reading, stream, tasks, train_vocabulary, vocabularies
from lex_fire.data.spec import Spec

seqio = pytest.importorskip('seqio')

TEXTS = [f'Line {number} of café:\n\n\tthe cat sat on mat {number * 7}.  ' for number in range(60)]


@pytest.fixture
def what(tmp_path):
  """Files of text to train on."""
  (tmp_path / 'text').mkdir()
  for number, text in enumerate(TEXTS):
    (tmp_path / f'text/{number}.txt').write_text(text)
  return Spec('text', files={'train': f'{tmp_path}/text/*.txt'})


@pytest.fixture(scope='session')
def model(tmp_path_factory):
  """The path of a tiny model."""
  return tiny.write_vocabulary(tmp_path_factory.mktemp('vocabulary') / 'tiny.model', TEXTS)


def train(what, output, size=300, max_characters=10**6):
  return train_vocabulary.train(what, 'train', size, output, max_characters)


# Vocabularies


def test_bytes_are_known_without_a_model():
  assert vocabularies.facts_of('bytes') == vocabularies.BYTES
  assert vocabularies.facts(vocabularies.load('bytes')) == vocabularies.BYTES


def test_a_character_of_latin_is_a_token_in_python_and_in_tensorflow():
  import tensorflow as tf

  latin, text = vocabularies.load('latin'), 'Año 1 ÿ łɏ\n'
  ids = [3 + ord(character) for character in text]

  assert vocabularies.facts(latin) == vocabularies.facts_of('latin') == vocabularies.LATIN
  assert vocabularies.LATIN != vocabularies.BYTES and latin != vocabularies.load('bytes')
  assert latin.vocab_size == vocabularies.LATIN.size
  assert latin.encode(text) == latin.encode_tf(tf.constant(text)).numpy().tolist() == ids
  ended = [*ids, latin.eos_id, *ids]
  assert latin.decode(ended) == latin.decode_tf(tf.constant(ended)).numpy().decode() == text


def test_another_character_is_unknown_to_latin_and_shown_as_nothing():
  import tensorflow as tf

  latin = vocabularies.load('latin')

  unknown = latin.encode('1€2')
  assert unknown == latin.encode_tf(tf.constant('1€2')).numpy().tolist()
  assert unknown[1] == latin.unk_id
  assert latin.decode(unknown) == '12'


@pytest.mark.parametrize('task', ['text', 'addition:length=18,hints=true,count=40'])
def test_a_task_is_prepared_in_latin(task, what, tmp_path):
  spec = what._replace(name=task, vocabulary='latin') if task == 'text' else Spec(task, 'latin')

  found = stream.read(prepare.prepare(spec, 'train', tmp_path / 'prepared'))

  vocabulary = vocabularies.load('latin')
  documents = list(reading.documents(tasks.get_task(spec), 'train'))
  assert found.manifest['vocabulary']['name'] == 'latin'
  tokens_L = np.concatenate(found.parts)
  assert tokens_L.tolist() == np.concatenate([made.tokens_L for made in documents]).tolist()
  assert vocabulary.unk_id not in tokens_L
  decoded = vocabulary.decode(documents[0].tokens_L.tolist())
  assert 'café' in decoded if task == 'text' else decoded.count('+') == 1


def test_the_facts_of_a_model_are_its_content_and_not_its_place(model, tmp_path):
  with open(model, 'rb') as file:
    (tmp_path / 'copy.model').write_bytes(file.read())

  facts = vocabularies.facts_of(model)

  assert facts == vocabularies.facts_of(str(tmp_path / 'copy.model'))
  assert re.fullmatch('sentencepiece-[0-9a-f]{16}', facts.name)
  assert (facts.size, facts.eos_id) == (290, 1)


def test_models_of_one_size_have_different_facts(model, what, tmp_path):
  train(what, tmp_path / 'other.model', size=290, max_characters=500)

  other = vocabularies.facts_of(str(tmp_path / 'other.model'))

  assert other.size == vocabularies.facts_of(model).size
  assert other != vocabularies.facts_of(model)


def test_a_path_without_a_model_is_refused_with_the_known(tmp_path):
  message = f"in vocabulary '{tmp_path}/none': .*; use bytes, latin, t5 or the path"
  with pytest.raises(errors.UserError, match=message):
    vocabularies.load(f'{tmp_path}/none')


def test_a_file_that_is_no_model_is_refused(tmp_path):
  (tmp_path / 'no.model').write_text('no model')

  with pytest.raises(errors.UserError, match=f"no SentencePiece model in .*'{tmp_path}/no.model'"):
    vocabularies.load(f'{tmp_path}/no.model')


def test_a_model_without_eos_is_refused(tmp_path):
  sentencepiece = pytest.importorskip('sentencepiece')
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(['a b c'] * 9),
    model_writer=model,
    vocab_size=9,
    hard_vocab_limit=False,
    minloglevel=2,
    eos_id=-1,
  )
  (tmp_path / 'endless.model').write_bytes(model.getvalue())

  with pytest.raises(errors.UserError, match=f"vocabulary '{tmp_path}/endless.model' has no EOS"):
    vocabularies.load(f'{tmp_path}/endless.model')


# Training one


def test_a_trained_model_has_the_special_ids_of_t5_and_the_size_asked_for(what, tmp_path):
  done = train(what, tmp_path / 'a.model', size=310)

  vocabulary = vocabularies.load(str(tmp_path / 'a.model'))
  pieces = vocabulary.tokenizer
  special = (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id, pieces.bos_id())
  assert special == (0, 1, 2, -1)
  assert vocabulary.vocab_size == 310
  characters = sum(len(text) - text.count('\n') for text in TEXTS)
  assert done == f'310 pieces of {characters:,} characters in 60 texts'
  assert any(len(pieces.id_to_piece(index)) > 2 for index in range(259, 310))


@pytest.mark.parametrize(
  'text',
  [
    *TEXTS[:2],
    '',
    ' ',
    '  two  spaces ',
    '\n\n\tdef f():\n    return 1\n',
    '\r\n',
    'Ω≈ç√ 你好 🙂 ﬁ ①',
  ],
)
def test_tokens_of_a_trained_model_decode_to_the_text(model, text):
  vocabulary = vocabularies.load(model)

  tokens = vocabulary.encode(text)

  assert vocabulary.decode(tokens) == text
  assert vocabulary.unk_id not in tokens


def test_long_lines_are_trained_on_too(tmp_path):
  (tmp_path / 'a.txt').write_text(' '.join(TEXTS).replace('\n', ' '))
  what = Spec('text', files={'train': f'{tmp_path}/a.txt'})

  done = train(what, tmp_path / 'a.model')

  assert done.endswith(f'{len(" ".join(TEXTS)):,} characters in 1 texts')
  assert vocabularies.facts_of(str(tmp_path / 'a.model')).size == 300


def test_no_text_is_read_after_the_characters_asked_for(what, tmp_path):
  done = train(what, tmp_path / 'a.model', size=290, max_characters=500)

  count = re.search(r'of (\d+) characters', done)[1]
  assert 500 <= int(count) < 500 + max(map(len, TEXTS))


def test_a_task_is_prepared_with_a_trained_model(what, model, tmp_path):
  spec = what._replace(vocabulary=model)

  path = prepare.prepare(spec, 'train', tmp_path / 'streams')

  (tokens_L,), _, manifest = stream.read(path)
  decoded = vocabularies.load(model).tokenizer.decode(
    [[int(x) for x in part[:-1]] for part in _split(tokens_L.tolist())]
  )
  assert sorted(decoded) == sorted(TEXTS)
  assert manifest['text_bytes'] == sum(len(text.encode()) for text in TEXTS)
  assert manifest['vocabulary']['name'] == vocabularies.facts_of(model).name
  bytes_path = prepare.prepare(what, 'train', tmp_path / 'streams')
  assert bytes_path != path
  assert tasks.get_task(spec) is not tasks.get_task(what)


def _split(tokens):
  """Cuts after each EOS."""
  ends = [index + 1 for index, token in enumerate(tokens) if token == 1]
  return [tokens[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def test_an_output_that_is_there_is_refused_and_left(what, tmp_path):
  (tmp_path / 'a.model').write_text('mine')

  with pytest.raises(errors.UserError, match=f"'{tmp_path}/a.model' is there already"):
    train(what, tmp_path / 'a.model')
  assert (tmp_path / 'a.model').read_text() == 'mine'


def test_a_directory_that_is_not_there_is_refused_before_the_work(what, tmp_path, monkeypatch):
  monkeypatch.delattr(train_vocabulary, '_model')

  message = f"cannot write '{tmp_path}/none/a.model': No such file or directory"
  with pytest.raises(errors.UserError, match=message):
    train(what, tmp_path / 'none/a.model')


@pytest.mark.parametrize(
  ('size', 'message'),
  [
    (5000, r'size=5000 is too large for the text, which has pieces for \d+; use at most that'),
    (265, r'size=265 is too small for the bytes and the characters of the text; use at least \d+'),
    (-1, r'SentencePiece can train no model of size=-1: '),
  ],
)
def test_a_size_that_does_not_suit_the_text_is_refused(what, tmp_path, size, message):
  with pytest.raises(errors.UserError, match=message) as refusal:
    train(what, tmp_path / 'a.model', size=size)

  assert not (tmp_path / 'a.model').exists()
  if named := re.search(r'(?:pieces for|at least) (\d+)', str(refusal.value)):
    train(what, tmp_path / 'a.model', size=int(named[1]))


def test_a_mistake_in_a_file_is_said_by_its_name(what, tmp_path):
  (tmp_path / 'text/0.txt').write_bytes(b'\xff')

  with pytest.raises(errors.UserError, match="0.txt' is not UTF-8 at byte 0"):
    train(what, tmp_path / 'a.model')
  assert not (tmp_path / 'a.model').exists()


def test_a_model_is_written_whole_or_not_at_all(what, tmp_path, monkeypatch):
  def fail(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(files.os, 'fsync', fail)
  before = sorted(os.listdir(tmp_path))

  with pytest.raises(KeyboardInterrupt):
    train(what, tmp_path / 'a.model')

  assert sorted(os.listdir(tmp_path)) == before


@pytest.fixture
def command(what, tmp_path, monkeypatch):
  """Runs the command in this process, whose interrupts it leaves alone."""
  monkeypatch.setattr(train_vocabulary.signal, 'signal', lambda *_: None)
  arguments = ['--task=text', f'--train_files={what.files["train"]}', '--split=train']

  def run(*more):
    return train_vocabulary.main([*arguments, f'--output={tmp_path}/a.model', *more])

  return run


def test_the_command_prints_the_path(command, tmp_path, capsys):
  assert command('--size=290') == 0
  out, err = capsys.readouterr()
  assert out == f'{tmp_path}/a.model\n'
  assert re.search(r'^290 pieces of [0-9,]+ characters in 60 texts$', err, re.MULTILINE)


def test_the_command_reports_a_mistake_in_one_sentence(command, capsys):
  assert command('--size=50_000') == 2
  assert re.fullmatch('error: size=50000 is too large .*\n', capsys.readouterr().err)
