"""Tests `../experiments/qmsum/run.py`, and how what it measures is shown."""

import gzip
import json
import math
import statistics

import pytest
import tiny
import tiny_scrolls

from experiments import sweep, sweep_published, sweep_results
from experiments.qmsum import run as qmsum
from lex_fire import answers, errors, train

pytest.importorskip('seqio')

# Questions are longer than what is trained on here: they leave room for an answer of QMSum's.
TINY = qmsum.Recipe(
  books={
    'model': {**tiny.MODEL, 'vocab_size': 290},
    'data': {'length': 32, 'batch_size': 8},
    'optimizer': {'warmup_steps': 1},
    'train': {'steps': 2, 'checkpoint_every': 2, 'validation_windows': 8},
  },
  qmsum={
    'data': {'length': 64, 'batch_size': 8},
    'optimizer': {'warmup_steps': 1},
    'train': {'steps': 2, 'checkpoint_every': 2, 'validation_windows': 8},
  },
  lengths=(512, 640),
  questions=2,
)
TURNED = {'turned': sweep.Variant('rope', {'pairing': 'halves'}, after={'ntk': 'ntk:scale=2'})}


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  """A directory with two books and three meetings, of which one is asked about three times."""
  directory = tmp_path_factory.mktemp('data')
  for split, numbers in {'train': range(600), 'validation': range(600, 900)}.items():
    (directory / 'books' / split).mkdir(parents=True)
    text = ''.join(f'{number} times 7 is {number * 7}.\n' for number in numbers)
    (directory / 'books' / split / 'book.txt.gz').write_bytes(gzip.compress(text.encode()))
  folder = directory / 'scrolls' / 'qmsum'
  folder.mkdir(parents=True)
  for split, count in {'train': 8, 'validation': 3, 'test': 1}.items():
    output = None if split == 'test' else 'the cat sat'
    rows = [
      tiny_scrolls.row(f'{split}-{number}', 0, output, text=f'Who sat, {number}?\n\nA: The cat.')
      for number in range(count)
    ]
    tiny_scrolls.write(folder / f'{split}.jsonl.xz', rows)
  return directory


def line(variant, seed, scores, **fields):
  lengths = [
    {'length': length, 'questions': 100, **dict.fromkeys(qmsum.SCORES, 0.0), **{score: value}}
    for score in (sweep_results.ROUGE.field,)
    for length, value in scores.items()
  ]
  common = {'protocol': qmsum.TASK, 'mask': 'causal', 'train_length': 2048, **fields}
  return {'variant': variant, 'seed': seed, **common, 'lengths': lengths}


# What is measured


def test_every_run_has_a_config_of_its_own_that_reaches_all_lengths():
  variants = qmsum.make_variants(qmsum.LAPTOP)
  data = qmsum.Data({'task': 'text'}, {})

  configs = {
    (name, seed): qmsum.first_config(qmsum.LAPTOP, data, variant, seed)
    for name, variant in variants.items()
    for seed in (0, 1)
  }

  assert [config.encoding.name for config in configs.values()] == [
    name for name in qmsum.ENCODINGS for _ in (0, 1)
  ]
  assert len(set(configs.values())) == 2 * len(variants)
  for config in configs.values():
    assert (config.encoding.make().max_length or math.inf) >= max(qmsum.LAPTOP.lengths)
  rope = configs['rope', 0].encoding
  stretched = [dict(rope.replaced_by(x, 2048).options) for x in variants['rope'].after.values()]
  assert list(variants['rope'].after) == ['rope_pi', 'ntk', 'yarn']
  assert [options['scale'] for options in stretched] == [2.0] * 3
  assert stretched[-1]['train_length'] == 2048


def test_what_a_directory_lacks_is_named(data_dir, tmp_path):
  with pytest.raises(
    errors.UserError, match=rf"--data_dir='{tmp_path}' has no .*books/train/\*.gz"
  ):
    qmsum.globs(str(tmp_path))
  (tmp_path / 'books').symlink_to(data_dir / 'books')
  (tmp_path / 'scrolls' / 'qmsum').mkdir(parents=True)
  for split in ('train', 'validation'):
    (tmp_path / 'scrolls' / 'qmsum' / f'{split}.jsonl.xz').touch()

  with pytest.raises(errors.UserError) as raised:
    qmsum.globs(str(tmp_path))

  assert str(raised.value) == (
    f"--data_dir='{tmp_path}' has no {tmp_path}/scrolls/qmsum/test.jsonl.xz; give a directory that "
    'does'
  )


def test_a_run_goes_from_books_to_scores_and_nothing_that_is_done_is_repeated(
  data_dir, tmp_path, monkeypatch, capsys
):
  trained, asked, train_as_ever = [], [], train.train

  def train_and_tell(config, workdir):
    trained.append((config.data.task, config.train.start_from, workdir.parent.name))
    return train_as_ever(config, workdir)

  def answer_all(transformer, params, prompts, codec, max_tokens):
    asked.extend(transformer.encoding.name for _ in prompts)
    yield [(prompt, 'the cat') for prompt in prompts]

  monkeypatch.setattr(train, 'train', train_and_tell)
  monkeypatch.setattr(answers, 'answers', answer_all)
  path, runs = tmp_path / 'measured.jsonl', tmp_path / 'runs'

  def run(*seeds):
    return qmsum.run(TINY, str(data_dir), TURNED, seeds, path, runs)

  text = run(0)
  first = str(runs / 'first' / 'turned-0')
  assert trained == [('text', '', 'first'), (qmsum.TASK, first, 'finetuned')]
  assert asked == [name for name in ('rope', 'ntk') for _ in TINY.lengths for _ in range(2)]
  lines = sweep_results.read(path)
  assert [(found['variant'], found['seed']) for found in lines] == [('turned', 0), ('ntk', 0)]
  # 'the cat' of 'the cat sat': all of the words are right, and of the words that are right two
  # thirds are there; so it is with pairs of words, but a half.
  one, two = 100 * 2 / (1 + 3 / 2), 100 * 2 / (1 + 2)
  expected = [one, two, one, statistics.geometric_mean([one, two, one])]
  for at, length in zip(lines[1]['lengths'], TINY.lengths, strict=True):
    assert (at['length'], at['questions']) == (length, 2)
    assert [at[score] for score in qmsum.SCORES] == pytest.approx(expected)
    assert at['distinct_answers'] == 1  # 'the cat' to both
    assert 4 < at['nats_per_answer_token'] < 7  # hardly trained: about log(290)
  losses = [[at['nats_per_answer_token'] for at in found['lengths']] for found in lines]
  assert losses[0] != losses[1]  # of other angles
  assert path.with_suffix('.txt').read_text() == text == sweep_results.tables(lines)
  for name in ('measured.png', 'measured_nats_per_answer_token.png'):
    assert (tmp_path / name).stat().st_size > 10_000
  assert len(list(tmp_path.glob('*.png'))) == 2

  trained.clear(), asked.clear()
  assert run(0) == text and not trained  # by its lines
  path.unlink()
  capsys.readouterr()
  assert run(0) == text and not asked  # by its checkpoints and answers
  assert capsys.readouterr().out.count('done already, 2 steps') == len(trained) == 2


def test_a_training_that_ended_early_is_not_asked(tmp_path, monkeypatch):
  """As at SIGTERM, when it saves its state and returns."""
  monkeypatch.setattr(train, 'train', lambda config, workdir: None)
  data = qmsum.Data({'task': 'text'}, {})

  with pytest.raises(KeyboardInterrupt):
    next(qmsum.measure(TINY, data, 'turned', TURNED['turned'], 0, tmp_path))


# What is shown


def test_a_table_of_scores_has_means_and_deviations_the_highest_at_the_longest_first(tmp_path):
  found = {'late': [{32: 4.0, 64: 3.0}, {32: 5.0, 64: 4.0}], 'early': [{32: 2.0, 64: 5.0}] * 2}
  lines = [line(name, seed, at) for name, ats in found.items() for seed, at in enumerate(ats)]
  path = tmp_path / 'measured.jsonl'
  path.write_text(''.join(json.dumps(each) + '\n' for each in lines))

  text = sweep_results.write(path)

  # Of two seeds that differ by 1, the sample standard deviation is the root of 1/2.
  assert (
    text
    == path.with_suffix('.txt').read_text()
    == (
      '`scrolls_qmsum`, causal: geometric mean of ROUGE-1, 2 and L of 100 questions, in percent; '
      'mean and standard deviation over seeds\n'
      '\n'
      '    variant  seeds              32              64\n'
      '    early        2     2.00 +-0.00     5.00 +-0.00\n'
      '    late         2     4.50 +-0.71     3.50 +-0.71\n'
    )
  )
  assert path.with_suffix('.png').exists()


def test_a_table_of_scores_has_no_ranking_of_losses_beside_it():
  lines = [line(name, 0, {64: at}) for at, name in enumerate(('fire', 'rope', 'alibi'))]

  assert sweep_published.rankings(['fire', 'rope', 'alibi'], 'causal')
  assert 'Best first here' not in sweep_results.tables(lines)
