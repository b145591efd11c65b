"""Tests `../lex_fire/benchmark.py`, its questions, plots and command, and files to hand in."""

import csv
import json
import re

import jax
import numpy as np
import pytest
import tiny

from lex_fire import (
  answers,
  asking,
  benchmark,
  benchmark_command,
  benchmark_plots,
  checkpoint,
  comparison,
  errors,
  evaluate,
  submission,
  train,
)
from lex_fire import config as config_lib
from lex_fire.data import algorithms, scrolls, spec, train_vocabulary, vocabularies
from lex_fire.data import text as text_lib

COPY = 'copy:length=2,held_out=10'
NO_FILES = {'train_files': '', 'validation_files': ''}


@pytest.fixture(scope='module')
def workdir(corpus, tmp_path_factory):
  """A run that has taken two steps on questions."""
  out = tmp_path_factory.mktemp('runs') / 'fire'
  config = tiny.config(
    corpus,
    data=NO_FILES | {'task': 'copy:length=2,count=64,held_out=10'},
    optimizer={'warmup_steps': 1},
    train={'steps': 2, 'checkpoint_every': 2},
  )
  train.train(config, out)
  return out


def right(prompt):
  return prompt.references[0]


@pytest.fixture
def model(monkeypatch):
  """Puts a function of prompts in the place of all models; counts what they are asked."""
  asked = []

  def put(answer):
    def answer_all(transformer, params, prompts, codec, max_tokens):
      asked.extend(prompt.id for prompt in prompts)
      yield [(prompt, answer(prompt)) for prompt in prompts]

    monkeypatch.setattr(answers, 'answers', answer_all)
    return asked

  return put


def request(*lengths, **fields):
  return config_lib.EvaluateConfig(lengths, **fields)


def run(workdir, directory, tasks=(COPY,), asked_at=(32,), **fields):
  """Returns the reports of a run."""
  asked = asking.Asked(tuple(tasks), **fields)
  (plan,) = benchmark.plan([workdir], asked, request(*asked_at))
  return benchmark.run(plan, directory)


# Names


@pytest.mark.parametrize(
  'text, expected',
  [
    ('copy', ['copy']),
    ('copy,scrolls_qmsum,', ['copy', 'scrolls_qmsum']),
    ('copy:length=3,hints=true,sort', ['copy:length=3,hints=true', 'sort']),
    ('passkey:seed=1,passkey:seed=2', ['passkey:seed=1', 'passkey:seed=2']),
  ],
)
def test_names_stand_between_commas_and_so_do_their_options(text, expected):
  assert list(asking.names(text)) == expected


@pytest.mark.parametrize(
  'text, message',
  [
    ('copy,stdlib', "--tasks='stdlib' asks no questions; known: scrolls_qmsum, .*documents=stdlib"),
    ('length=3,copy', "--tasks='length=3' asks no questions"),
    ('copy,sort,copy', "--tasks='copy,sort,copy' must name one or more tasks, each once"),
    ('', "--tasks='' must name one or more tasks"),
  ],
)
def test_wrong_names_are_refused(text, message):
  with pytest.raises(errors.UserError, match=message):
    asking.names(text)


# Reports


def test_right_answers_score_100_and_wrong_ones_0(workdir, model, tmp_path):
  model(right)
  (all_right,) = run(workdir, tmp_path / 'right', [COPY, 'parity:length=2,held_out=5'])
  model(lambda prompt: right(prompt) if int(prompt.id.rpartition('_')[2]) % 5 < 2 else 'no')
  (some,) = run(workdir, tmp_path / 'some')

  assert [entry['scores'] for entry in all_right['tasks']] == [{'accuracy': 100.0}] * 2
  (entry,) = some['tasks']
  assert entry['scores'] == {'accuracy': 40.0}
  # Of the lengths 1, 2, 4, 10 and 16 the first two are right: they take turns.
  by = [(g['facts'], g['questions'], g['scores']['accuracy']) for g in entry['by']]
  lengths = [int(multiple * 2) for multiple in algorithms.MULTIPLES]
  assert by == [({'length': n}, 2, 100.0 if n < 4 else 0.0) for n in lengths]


def test_answers_of_another_checkpoint_are_kept_beside_those_of_the_latest(
  workdir, model, tmp_path
):
  model(right)
  latest, best = (
    benchmark.plan([workdir], asking.Asked((COPY,)), request(32, checkpoint=name))
    for name in ('latest', 'best')
  )

  reports = [*benchmark.run(*latest, tmp_path), *benchmark.run(*best, tmp_path)]

  names = [report['tasks'][0]['predictions'] for report in reports]
  assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
  assert names[0] != names[1] and 'checkpoint-best' in names[1]


def test_a_report_says_what_was_asked_and_of_whom(workdir, model, tmp_path):
  model(right)

  (report,) = run(workdir, tmp_path)

  (entry,) = report.pop('tasks')
  asked = algorithms.examples('copy', 'test', length=2, count=10, seed=0)
  different = {example.references for example in asked}  # two questions are the same
  assert json.loads(json.dumps(report)) == report
  assert {key: report[key] for key in ('run', 'checkpoint_step', 'train_length', 'tokenizer')} == {
    'run': 'fire',
    'checkpoint_step': 2,
    'train_length': 32,
    'tokenizer': 'bytes',
  }
  assert (report['encoding']['name'], report['mask']) == ('fire', 'causal')
  assert report['train_task'] == 'copy:length=2,count=64,held_out=10'
  assert {key: entry[key] for key in entry if key not in ('scores', 'by')} == {
    'task': COPY,
    'split': 'test',
    'files': None,
    'length': None,
    'implementations': [
      {'implementation': 'reference', 'reason': f'{size} x 64 logits are at most 16384 on cpu'}
      for size in ('2 x 64', '1')  # of a chunk of two prompts, and of a step
    ],
    'questions': 10,
    'questions_cut': 0,
    'tokens_cut': 0,
    'distinct_answers': len(different),
    'predictions': 'fire-causal-copy-length=2,held_out=10-test.jsonl',
  }


def test_the_newest_checkpoint_is_asked_and_asked_once(workdir, tmp_path, monkeypatch):
  (first,) = run(workdir, tmp_path)
  config = checkpoint.read_config(workdir)
  step, params = comparison.restore(
    config, workdir, train.sharding.make_mesh(devices=jax.devices()[:1])
  )
  (case,) = comparison.cases(config)
  codec = text_lib.codec(config.data.spec())
  made = list(algorithms.examples('copy', 'test', length=2, count=10, seed=0))
  asked = answers.prompts(made, codec, None, 17)
  (expected,) = answers.answers(case.transformer, params, asked, codec, 17)
  monkeypatch.setattr(answers, 'answers', lambda *_, **__: iter(()))  # answers nothing

  (again,) = run(workdir, tmp_path)

  assert first == again
  assert first['checkpoint_step'] == step == 2
  kept = answers.read(tmp_path / first['tasks'][0]['predictions'])
  assert kept == {prompt.id: text for prompt, text in expected}


def test_an_evaluation_that_was_killed_asks_only_what_is_left(workdir, model, tmp_path):
  asked = model(right)
  (whole,) = run(workdir, tmp_path)
  path = tmp_path / whole['tasks'][0]['predictions']
  lines = path.read_text().splitlines(keepends=True)
  path.write_text(''.join(lines[:4]) + lines[4][:30])

  (resumed,) = run(workdir, tmp_path)

  assert resumed == whole
  assert len(asked) == 10 + 7 and set(asked[10:]) == set(asked[3:10])
  assert sorted(path.read_text().splitlines(keepends=True)) == sorted(lines)


def test_fewer_questions_may_be_asked(workdir, model, tmp_path):
  asked = model(right)

  (report,) = run(workdir, tmp_path, max_examples=3)

  assert report['tasks'][0]['questions'] == 3
  assert sorted(asked) == ['copy_test_0', 'copy_test_1', 'copy_test_2']


def test_needles_are_made_for_each_length_and_nothing_of_them_is_cut(
  workdir, corpus, model, tmp_path
):
  model(right)

  name = 'passkey:depths=2,held_out=4'
  files = corpus['validation_files']
  (report,) = run(workdir, tmp_path, [name], (200, 400), files=files, split='validation')

  assert [entry['length'] for entry in report['tasks']] == [200, 400]
  for entry in report['tasks']:
    assert entry['tokens_cut'] == 0
    assert [group['facts'] for group in entry['by']] == [
      {'length': entry['length'], 'depth': depth} for depth in (0.0, 1.0)
    ]
    lines = (tmp_path / entry['predictions']).read_text().splitlines()[1:]
    sizes = [json.loads(line)['prompt_tokens'] + 5 for line in lines]  # with a key of 5 digits
    assert entry['length'] - 100 < min(sizes) <= max(sizes) <= entry['length']


# SCROLLS


def test_inputs_are_cut_to_the_length_and_the_answers_of_a_question_are_all_right(
  workdir, scrolls_directory, model, tmp_path
):
  model(lambda prompt: prompt.references[-1])

  directory = str(scrolls_directory)
  found = run(workdir, tmp_path, ['scrolls_qmsum'], (1243, 1400), tfds_directory=directory)

  (report,) = found
  # Of one word there is no pair.
  assert [e['scores']['rouge1'] for e in report['tasks']] == pytest.approx([100, 100])
  assert [e['scores']['rouge_geometric_mean'] for e in report['tasks']] == [0, 0]
  assert [e['questions'] for e in report['tasks']] == [2, 2]
  assert [(e['questions_cut'], e['by']) for e in report['tasks']] == [(0, []), (0, [])]


def test_withheld_answers_have_no_scores_and_are_handed_in(
  workdir, scrolls_directory, model, tmp_path
):
  model(lambda prompt: f'Of {prompt.id}.')
  found = run(
    workdir,
    tmp_path / 'kept',
    ['scrolls_qmsum', COPY],
    (1300, 1400),
    split='test',
    tfds_directory=str(scrolls_directory),
  )
  handed = submission.write(found, tmp_path / 'kept', tmp_path / 'handed')

  assert [entry['scores'] is None for entry in found[0]['tasks']] == [True, True, False]
  assert not benchmark_plots.can_draw(found, 'scrolls_qmsum')
  assert 'withheld' in benchmark_plots.table(found)
  assert [file.path.relative_to(tmp_path / 'handed').parts for file in handed] == [
    (f'fire-at-{length}', scrolls.FILE) for length in (1300, 1400)
  ]
  for file in handed:
    assert file.note.startswith('SCROLLS takes all tasks in one file: scrolls_qmsum, scrolls_qas')
    with file.path.open(newline='') as lines:
      assert list(csv.reader(lines)) == [
        ['Task', 'ID', 'Prediction'],
        ['qmsum', 't', 'Of t.'],
        ['qmsum', 'u', 'Of u.'],
      ]
  assert submission.write(run(workdir, tmp_path), tmp_path, tmp_path / 'none') == []


# What is refused, before any question is asked


@pytest.mark.parametrize(
  'section, fields, message',
  [
    ('model', {'causal': False, 'vocab_size': 260}, r'a bidirectional model \(model.causal=False'),
    ('data', {'position_range': 500}, 'data.position_range=500 knows positions drawn from there'),
    ('model', {'vocab_size': 200}, "'bytes' has 259 ids, more than model.vocab_size=200"),
  ],
)
def test_a_run_that_cannot_answer_is_refused(section, fields, message, workdir, tmp_path):
  other = tiny.as_if(workdir, tmp_path / 'other', **{section: fields})

  with pytest.raises(errors.UserError, match=message):
    run(other, tmp_path)


def test_questions_longer_than_an_encodings_positions_are_refused(workdir, tmp_path):
  other = tiny.as_if(workdir, tmp_path / 'learned')
  values = json.loads((other / 'config.json').read_text())
  values['encoding'] = {'name': 'learned', 'max_length': 32}
  (other / 'config.json').write_text(json.dumps(values))

  # 16 letters, '=', the separator, EOS before and the answer with its EOS
  with pytest.raises(errors.UserError, match='length=44 is past the 32 positions'):
    run(other, tmp_path)


@pytest.mark.parametrize(
  'tasks, lengths, fields, message',
  [
    (
      [COPY, 'scrolls_qmsum'],
      (2000, 600),
      {},
      "task 'scrolls_qmsum': length=600 leaves 0 tokens .* up to 1201; use at least 1243",
    ),
    (
      ['scrolls_qmsum'],
      (1300,),
      {'tfds_directory': '/nowhere'},
      "TFDS has no 'scrolls/qmsum:1.0.0",
    ),
    ([COPY], (32,), {'split': 'dev'}, "no split 'dev'; it has: train, validation, test"),
    ([COPY], (32,), {'files': '*.txt'}, r"files='\*.txt' are the text around needles, which tasks"),
    (['passkey'], (300,), {'files': '/nowhere/*'}, "matches '/nowhere/.*'"),
    (['passkey:length=300'], (300,), {}, "'passkey:length=300' are made for each of --lengths"),
    (
      ['passkey'],
      (60,),
      {},
      "'passkey:length=60', .* take 16 tokens: .* has 44 tokens",
    ),
  ],
)
def test_what_cannot_be_asked_is_refused(tasks, lengths, fields, message, workdir, tmp_path, model):
  asked = model(right)

  with pytest.raises(errors.UserError, match=message):
    run(workdir, tmp_path / 'new', tasks, lengths, **fields)

  assert not asked and not (tmp_path / 'new').exists()


def test_hosts_must_ask_the_same_of_the_same_checkpoint(workdir, tmp_path, monkeypatch):
  def plans(**fields):
    return benchmark.plan([workdir], asking.Asked((COPY,), **fields), request(32))

  texts, same = [], plans()
  monkeypatch.setattr(benchmark.hosts, 'of_first', lambda text: texts.append(text) or texts[0])
  benchmark.check_same(same)

  benchmark.check_same(same)
  message = f'has an evaluation unlike process 0: the hash of {COPY} for fire is [0-9a-f]+,'
  with pytest.raises(errors.UserError, match=message):
    benchmark.check_same(plans(max_examples=9))
  monkeypatch.setattr(benchmark.hosts, 'of_first', lambda text: '{"latest": 3}')
  message = 'has a checkpoint unlike process 0: latest is 2, there 3'
  with pytest.raises(errors.UserError, match=message):
    benchmark.run(*same, tmp_path)


def test_a_task_without_a_question_is_refused(workdir, tmp_path, monkeypatch):
  monkeypatch.setattr(asking.questions, 'examples', lambda task, split: iter(()))

  with pytest.raises(errors.UserError, match="split 'test' of task 'copy:.*' has no question"):
    run(workdir, tmp_path)


def test_a_registered_task_of_another_vocabulary_is_refused(workdir, tmp_path, monkeypatch):
  other = vocabularies.Vocabulary('sentencepiece-01', size=200, eos_id=1)
  codec = text_lib.codec(checkpoint.read_config(workdir).data.spec())._replace(vocabulary=other)
  monkeypatch.setattr(text_lib, 'codec', lambda what: codec)

  message = "vocabulary 'sentencepiece-01', and questions of 'copy:.*' have data.vocabulary='bytes'"
  with pytest.raises(errors.UserError, match=message):
    run(workdir, tmp_path)


def test_in_pieces_answers_of_prose_take_fewer_tokens_and_letters_one_each(
  workdir, scrolls_directory, tmp_path
):
  path = tmp_path / 'tiny.model'
  written = spec.Spec('text', files={'train': __file__})
  train_vocabulary.train(written, 'train', 400, path, max_characters=10**6)
  other = tiny.as_if(
    workdir, tmp_path / 'other', data={'vocabulary': str(path)}, model={'vocab_size': 400}
  )
  asked = asking.Asked(('scrolls_qmsum', COPY), tfds_directory=str(scrolls_directory))

  (plan,) = benchmark.plan([other], asked, request(500))

  assert [found.max_tokens for found in plan.questions] == [1200 // 3 + 16, 16 + 1]
  assert all(len(p.tokens_L) + 416 <= 500 for p in plan.questions[0].prompts)


def test_losses_of_a_run_on_questions_are_refused_for_its_scores(workdir):
  with pytest.raises(errors.UserError, match=r'use `.* --tasks=copy:length=2,count=64.*`'):
    evaluate.evaluate(workdir)
  assert asking.own_name('passkey:length=256,depths=3') == 'passkey:depths=3'
  assert asking.own_name('passkey:length=256') == asking.own_name('passkey') == 'passkey'


# What is shown, and the command


def test_runs_and_masks_stand_in_one_table_and_pictures(
  evaluate_command, workdir, corpus, model, tmp_path, capsys
):
  model(lambda prompt: right(prompt) if prompt.facts.get('depth', 1) == 1 else 'no')
  other = tiny.as_if(workdir, tmp_path / 'other')

  arguments = {'mask': 'causal,window:8', 'lengths': '200,400', 'name': 'all'}
  needle = 'passkey:held_out=2,depths=2'
  evaluate_command(
    workdir, other, tasks=f'{COPY},{needle}', files=corpus['validation_files'],
    split='validation', **arguments,
  )  # fmt: skip

  asked, whose, *told, head, first, second, third = capsys.readouterr().out.splitlines()[:9]
  rows = first, second, third
  assert asked == '56 answers are asked for, on 8 cpu'
  assert whose == 'checkpoint: step 2 of fire, step 2 of other'
  assert head.split() == 'fire causal fire window:8 other causal other window:8'.split()
  assert [row.split() for row in rows] == [
    [COPY, '[accuracy,', '%]', *['100.00'] * 4],
    *([needle, 'at', length, '[accuracy,', '%]', *['50.00'] * 4] for length in ('200', '400')),
  ]
  for line, task in zip(told, (COPY, f'{needle} at 200', f'{needle} at 400'), strict=True):
    assert line.startswith(f'attention of {task}: ')
    assert re.search(r'reference, 1 x \d+ logits are at most 16384 on cpu', line)  # a step
  assert 'chunked, 64 x 448 logits are over 16384 on cpu' in told[2]  # a prompt, with no window
  found = {path.name for path in (tmp_path / 'out').iterdir()}
  pictures = ('all_copy-length=2,held_out=10.png', 'all_passkey-held_out=2,depths=2.png')
  assert found == {'all', 'all.json', *pictures}
  for picture in pictures:
    assert (tmp_path / 'out' / picture).read_bytes().startswith(b'\x89PNG')
  runs = json.loads((tmp_path / 'out' / 'all.json').read_text())['runs']
  assert [(report['run'], report['mask']) for report in runs] == [
    (name, mask) for name in ('fire', 'other') for mask in ('causal', 'window:8')
  ]
  assert len(list((tmp_path / 'out' / 'all').iterdir())) == 4 * 3


def test_the_command_says_where_answers_to_hand_in_are(
  evaluate_command, workdir, scrolls_directory, model, tmp_path, capsys
):
  model(lambda prompt: 'So.')
  arguments = {'split': 'test', 'lengths': '1300', 'tfds_directory': scrolls_directory}

  evaluate_command(workdir, tasks='scrolls_qmsum', **arguments)

  out = capsys.readouterr().out
  (kept,) = (tmp_path / 'out').glob('*-fire_scrolls_qmsum-test')
  path = kept / 'submission' / 'fire-at-1300' / scrolls.FILE
  assert f'to hand in: {path}\n' in out and path.exists()
  assert 'SCROLLS takes all tasks in one file: scrolls_qmsum, scrolls_qasper' in out

  evaluate_command(workdir, tasks='scrolls_qmsum', max_examples=1, **arguments)
  assert 'to hand in' not in capsys.readouterr().out
  found = (path.name.partition('-fire_')[2] for path in (tmp_path / 'out').glob('*.json'))
  assert set(found) == {f'scrolls_qmsum-test{x}_lengths-1300.json' for x in ('', '-first-1')}


def test_files_are_named_by_what_is_asked_but_never_too_long(
  evaluate_command, workdir, model, tmp_path, monkeypatch
):
  model(right)
  monkeypatch.setattr(benchmark_plots, 'draw', lambda reports, task, path: path.write_text(task))
  options = 'length=2,held_out=5,count=10,hints=false'
  many = ','.join(f'copy:{options},seed={seed}' for seed in range(3))

  evaluate_command(workdir, tasks=many, max_examples=2)

  assert len(list((tmp_path / 'out').glob('*.png'))) == 3
  assert max(len(path.name) for path in (tmp_path / 'out').rglob('*')) < 200
  assert benchmark.file_name('copy:seed=-1') != benchmark.file_name('copy:seed=1')


@pytest.mark.parametrize(
  'arguments, message',
  [
    ({'tasks': 'copy', 'max_tokens': 5}, '--max_tokens=5 is of losses, not of --tasks'),
    ({'tasks': 'copy', 'protocol': 'windows'}, '--protocol=windows is of losses'),
    ({'tasks': 'copy', 'stride': 4}, '--stride=4 is of losses'),
    ({'tasks': 'copy', 'sequence': 2}, '--sequence=2 is of losses'),
    ({'tasks': 'copy', 'documents': 'stdlib'}, '--documents=stdlib is of losses'),
    ({'max_examples': 3}, '--max_examples=3 is of --tasks, which are missing'),
  ],
)
def test_flags_of_the_other_kind_of_evaluation_are_refused(
  arguments, message, evaluate_command, workdir
):
  with pytest.raises(errors.UserError, match=message):
    evaluate_command(workdir, **arguments)


def test_what_the_config_says_of_losses_alone_is_no_matter(
  evaluate_command, workdir, model, tmp_path
):
  model(right)
  other = tiny.as_if(workdir, tmp_path / 'other', evaluate={'stride': 16, 'sequence': 4})

  evaluate_command(other, tasks=COPY, lengths='300')

  assert len(list((tmp_path / 'out').glob('*.json'))) == 1


def test_answers_among_other_text_or_by_other_attention_have_files_of_their_own(
  evaluate_command, workdir, corpus, model, tmp_path
):
  model(right)
  needle = {'tasks': 'passkey:held_out=2,depths=2', 'lengths': '200', 'split': 'validation'}
  for more in ({}, {'files': corpus['validation_files']}, {'attention': 'chunked'}):
    evaluate_command(workdir, **needle, **more)

  out = tmp_path / 'out'
  reports = {
    path: json.loads(path.read_text())['runs'][0]['tasks'][0] for path in out.glob('*.json')
  }
  assert len(reports) == 3
  assert sorted(str(one['files']) for one in reports.values()) == sorted(
    ['None', 'None', corpus['validation_files']]
  )
  kept = list(out.rglob('*.jsonl'))
  assert len({path.name for path in kept}) == len(kept) == 3


def test_progress_tells_the_time_left_by_the_length_of_questions(monkeypatch, capsys):
  clock = iter([0.0, 0.0, 10.0, 10.5, 20.0])
  monkeypatch.setattr(benchmark_command.time, 'monotonic', lambda: next(clock))
  prompts = [answers.Prompt(str(size), (), {}, np.zeros(size), 0) for size in (50, 10, 10, 30, 100)]
  progress = benchmark_command.Progress(prompts)

  progress('fire', prompts[:1], False)  # there from before: nothing to measure by
  progress('fire', prompts[1:3], True)
  progress('fire', prompts[3:4], True)  # too soon to say so
  progress('fire', prompts[4:], True)

  assert capsys.readouterr().out.splitlines() == [
    'fire: 1 answers are there already',
    'fire: 3 of 5 answers, ETA 1:05',  # 20 tokens in 10 s, 130 are left
    'fire: 5 of 5 answers, ETA 0:00',
  ]


def test_a_bare_name_of_the_task_of_all_runs_has_their_options():
  asked = asking.Asked(('addition', 'copy', 'passkey'))

  alike = asking.resolved(asked, ['addition:length=9,hints=true'] * 2)
  needles = asking.resolved(asked, ['passkey:length=64,seed=3'])
  other = asking.resolved(asked, ['addition:length=9', 'addition:length=8'])

  assert alike.tasks == ('addition:length=9,hints=true', 'copy', 'passkey')
  assert needles.tasks == ('addition', 'copy', 'passkey:seed=3')
  assert other == asked


def test_answers_to_glue_are_handed_in_and_those_without_a_place_are_counted(
  workdir, glue_directory, model, tmp_path
):
  model(lambda prompt: 'positive' if prompt.id == '9' else 'So.')
  fields = {'split': 'test', 'tfds_directory': str(glue_directory)}

  found = run(workdir, tmp_path / 'kept', ['glue_sst2'], (64,), **fields)
  (file,) = submission.write(found, tmp_path / 'kept', tmp_path / 'handed')

  assert file.path == tmp_path / 'handed' / 'fire-at-64' / 'SST-2.tsv'
  assert file.path.read_text() == 'index\tprediction\n2\t0\n9\t1\n10\t0\n'
  assert file.note == '2 of 3 answers are none that the file has a place for'


def test_answers_to_multirc_and_record_are_handed_in(workdir, glue_directory, model, tmp_path):
  model(lambda prompt: 'True' if prompt.id == '3-1-10' else 'Oslo')
  fields = {'split': 'test', 'tfds_directory': str(glue_directory)}
  tasks = ['super_glue_multirc', 'super_glue_record']

  found = run(workdir, tmp_path / 'kept', tasks, (256,), **fields)
  options, queries = submission.write(found, tmp_path / 'kept', tmp_path / 'handed')

  answers_of = [{'idx': 9, 'label': 0}, {'idx': 10, 'label': 1}]
  assert json.loads(options.path.read_text()) == {
    'idx': 3,
    'passage': {'questions': [{'idx': 1, 'answers': answers_of}]},
  }
  lines = list(map(json.loads, queries.path.read_text().splitlines()))
  assert lines == [{'idx': 9, 'label': 'Oslo'}, {'idx': 10, 'label': 'Oslo'}]
  assert options.note == '1 of 2 answers are none that the file has a place for'
  assert queries.note == ''


def test_answers_to_multirc_are_judged_by_question_too(workdir, glue_directory, model, tmp_path):
  model(lambda prompt: 'False' if prompt.id == '3-1-10' else right(prompt))

  (found,) = run(
    workdir, tmp_path, ['super_glue_multirc'], (96,), tfds_directory=str(glue_directory)
  )

  # Two of three right options are found, and none besides; two of three questions are right.
  (of_task,) = found['tasks']
  assert of_task['scores'] == pytest.approx({'f1_of_class': 80.0, 'exact_match_of_groups': 200 / 3})
