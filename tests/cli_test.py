"""Tests the commands as a user meets them: statuses, messages, and what they leave behind."""

import gzip
import os
import pathlib
import sys

import aiohttp
import jax
import pytest
import tiny
from google.protobuf import json_format

from lex_fire import checkpoint, cli, errors

QUICK = '--config=configs/quickstart.py'
TEXT = '--config=configs/text.py'
LEARNED = '--config=configs/quickstart.py:encoding=learned'

# Arguments of `python -m lex_fire.train`, and what the one line on stderr says. WORKDIR is a new
# folder.
TRAIN_MISTAKES = {
  'config missing': (['--workdir=WORKDIR'], '--config is missing, for example --config=configs/'),
  'workdir missing': ([QUICK], '--workdir is missing'),
  'no config file': (
    ['--config=configs/none.py', '--workdir=WORKDIR'],
    "cannot read --config: there is no file 'configs/none.py'; see configs/",
  ),
  'config of another kind': (['--config=README.md'], 'cannot read --config: SyntaxError: '),
  'config of a run': (['--config=EMPTY/of_a_run.py'], 'cannot read --config: NameError: '),
  'config without a function': (['--config=EMPTY/none.py'], "no attribute 'get_config'"),
  "unknown section of a config of one's own": (
    ['--config=EMPTY/own.py', '--config.modle.x=1'],
    "key 'modle.x'; known for 'modle': data, ",
  ),
  'unknown section': ([QUICK, '--config.modle.x=1', '--workdir=WORKDIR'], "key 'modle.x'; known"),
  'unknown key': ([QUICK, '--config.model.layers=1', '--workdir=WORKDIR'], 'num_layers'),
  'unknown option': ([QUICK, '--config.encoding.slope=1', '--workdir=WORKDIR'], 'threshold'),
  'unknown flag': ([QUICK, '--workdri=WORKDIR'], "'workdri'"),
  'no flag': ([QUICK, 'workdir'], "unknown argument 'workdir'; flags start with --"),
  'unknown argument': (
    [QUICK + ':size=base', '--workdir=WORKDIR'],
    "'size=base'; known: encoding=",
  ),
  'unknown encoding': ([QUICK + ':encoding=rop', '--workdir=WORKDIR'], "'rop'; known: alibi, "),
  'unknown preset': ([TEXT + ':size=huge', '--workdir=WORKDIR'], "size='huge'; known: tiny, base"),
  'wrong type': (
    [QUICK, '--config.model.num_layers=2.5', '--workdir=WORKDIR'],
    "--config.model.num_layers=2.5: must be a whole number, not '2.5'",
  ),
  'no number': (
    [QUICK, '--config.optimizer.learning_rate=fast', '--workdir=WORKDIR'],
    "--config.optimizer.learning_rate=fast: must be a number, not 'fast'",
  ),
  'out of range': (
    [QUICK, '--config.model.num_layers=0', '--workdir=WORKDIR'],
    'model.num_layers=0 must be at least 1',
  ),
  'past a learned table': (
    [LEARNED, '--config.encoding.max_length=100', '--workdir=WORKDIR'],
    'data.length=256 is past the 100 positions',
  ),
  'mesh': (
    [QUICK, '--config.mesh.replica=3', '--workdir=WORKDIR'],
    'mesh replica=3, fsdp=1, sequence=1, tensor=1 does not fit',
  ),
  'batch': (
    [QUICK, '--config.data.batch_size=12', '--workdir=WORKDIR'],
    'B=12, which mesh axes replica=8 x fsdp=1 do not divide',
  ),
  'no files': (
    [TEXT, '--workdir=WORKDIR'],
    "needs a glob of files for each split, not data.train_files=''",
  ),
  'empty file': ([TEXT, 'FILES=empty.txt', '--workdir=WORKDIR'], 'empty.txt'),
  'broken gzip': ([TEXT, 'FILES=broken.txt.gz', '--workdir=WORKDIR'], 'broken.txt.gz'),
  'long name': (
    [QUICK, '--dry_run', f'--workdir=EMPTY/{"x" * 300}'],
    "/checkpoints'; give another path, or the right to use it",
  ),
  'many steps': (
    [QUICK, f'--config.train.steps={2**31}', '--workdir=WORKDIR'],
    'train.steps=2147483648 must be at most',
  ),
  'no match': ([TEXT, 'FILES=none*.txt', '--workdir=WORKDIR'], 'none*.txt'),
  'profile of no numbers': (
    [QUICK, '--profile=first,last', '--workdir=WORKDIR'],
    '--profile=first,last must be whole numbers',
  ),
  'profile past the end': (
    [QUICK, '--profile=390,410', '--workdir=WORKDIR'],
    '--profile=390,410 must be the first and the last step to trace, in order and from 1 to train.',
  ),
  'dry profile': ([QUICK, '--dry_run', '--profile=1,2'], '--profile=1,2 is of a run; leave it out'),
  'dry executable': (
    [QUICK, '--dry_run', '--executable=step'],
    '--executable=step is of a run, and --dry_run compiles; leave one of them out',
  ),
  'dry run of no config': (['--dry_run'], '--config is missing'),
}
EVALUATE_MISTAKES = {
  'workdir missing': ([], '--workdir is missing'),
  'no run': (['--workdir=EMPTY'], 'no run in workdir'),
  'no checkpoint': (['--workdir=CLAIMED'], 'no checkpoint in'),
  'checkpoint': (
    ['--workdir=CLAIMED', '--checkpoint=first'],
    'evaluate.checkpoint=first must be latest, best or a step',
  ),
  'lengths': (
    ['--workdir=CLAIMED', '--lengths=256,long'],
    '--lengths=256,long must be whole numbers',
  ),
  'twice': (['--workdir=CLAIMED,CLAIMED'], 'names a run twice'),
  'output': (
    ['--workdir=CLAIMED', '--output=EMPTY/empty.txt'],
    "empty.txt': File exists; give ano",
  ),
  'zero': (['--workdir=CLAIMED', '--lengths=0'], 'lengths=(0,)'),
  'protocol': (['--workdir=CLAIMED', '--protocol=same'], "'same'; known: windows, same_tokens"),
  'mask': (['--workdir=CLAIMED', '--mask=causal,blokwise'], "unknown mask 'blokwise'; known: caus"),
  'mask of no size': (['--workdir=CLAIMED', '--mask=window:x'], "mask 'window:x' needs a whole"),
  'no mask': (['--workdir=CLAIMED', '--mask='], 'evaluate.masks=() must be one or more names'),
  'mask twice': (['--workdir=CLAIMED', '--mask=causal,causal'], "compares 'causal' with itself"),
  'full mask': (['--workdir=CLAIMED', '--mask=full'], "use mask 'causal'"),
  'causal mask': (['--workdir=ENCODER', '--mask=window:8'], "use mask 'full'"),
  'replaced by none': (
    ['--workdir=CLAIMED', '--encoding=as_trained', '--encoding=fir:c=1'],
    "unknown encoding 'fir'",
  ),
  'replaced by no option': (
    ['--workdir=CLAIMED', '--encoding=fire:scale=2'],
    "encoding 'fire' has no option 'scale'; it takes: hidden_layers",
  ),
  'replaced by other parameters': (
    ['--workdir=CLAIMED', '--encoding=rope:base_period=100'],
    "encoding 'rope:base_period=100' does not take the parameters that the run learned with 'fire'",
  ),
  'attention': (
    ['--workdir=CLAIMED', '--attention=dense'],
    "unknown evaluate.attention='dense'; known: as_trained, auto, reference",
  ),
  'a flag twice': (['--workdir=CLAIMED', '--workdir=ENCODER'], 'already defined as ['),
  'two objectives': (
    ['--workdir=CLAIMED,ENCODER'],
    'has model.causal=False, not True as',
  ),
  'two mask rates': (
    ['--workdir=ENCODER,ENCODER_HALF'],
    'has data.mask_rate=0.5, not 0.15 as',
  ),
}
GENERATE = ['--workdir=CLAIMED', '--prompt=a']
GENERATE_MISTAKES = {
  'workdir missing': (['--prompt=a'], '--workdir is missing'),
  'no run': (['--workdir=EMPTY', '--prompt=a'], 'no run in workdir'),
  'no checkpoint': (GENERATE, 'no checkpoint in'),
  'checkpoint': ([*GENERATE, '--checkpoint=-1'], 'evaluate.checkpoint=-1 must be latest, best'),
  'no prompt': (['--workdir=CLAIMED'], '--prompt is missing'),
  'empty prompt': ([*GENERATE, '--prompt='], 'prompt 2 of 2 is empty'),
  'prompt in latin 1': (['--workdir=CLAIMED', '--prompt=caf\udce9'], 'is not UTF-8 at byte 3'),
  'empty file': (['--workdir=CLAIMED', '--prompt_file=EMPTY/empty.txt'], 'prompt 1 of 1 is empty'),
  'no file': (['--workdir=CLAIMED', '--prompt_file=EMPTY/none'], "/none': No such file"),
  'binary file': (
    ['--workdir=CLAIMED', '--prompt_file=EMPTY/broken.txt.gz'],
    'not UTF-8 at byte 1',
  ),
  'no tokens': ([*GENERATE, '--max_tokens=-9'], 'max_tokens=-9 must be a whole number of at least'),
  'temperature': ([*GENERATE, '--temperature=nan'], 'temperature=nan must be 0'),
  'top_k': ([*GENERATE, '--top_k=0'], 'top_k=0 must be a whole number of at least 1'),
  'top_p': ([*GENERATE, '--top_p=0'], 'top_p=0.0 must be above 0'),
  'seed': ([*GENERATE, '--seed=-1'], 'seed=-1 must be at least 0'),
  'mask': ([*GENERATE, '--mask=blokwise'], "unknown mask 'blokwise'; known: causal"),
  'full mask': ([*GENERATE, '--mask=full'], "use mask 'causal'"),
  'encoding': ([*GENERATE, '--encoding=fir'], "unknown encoding 'fir'"),
  'encoder': (['--workdir=ENCODER', '--prompt=a'], 'model.causal=False, or a mask that is not'),
}
OWN_CONFIG = """
from lex_fire import presets
from ml_collections import config_dict


def get_config():
  return config_dict.ConfigDict(presets.make('tiny', 'rope'))
"""
MISTAKES = {'train': TRAIN_MISTAKES, 'evaluate': EVALUATE_MISTAKES, 'generate': GENERATE_MISTAKES}
# A mistake of each command that is made in a new interpreter, as users do; the first is found by
# TensorFlow, whose notes must not be seen.
AS_USERS_DO = [
  ('train', 'broken gzip'),
  ('evaluate', 'workdir missing'),
  ('generate', 'workdir missing'),
]


@pytest.fixture(scope='module')
def results(tmp_path_factory):
  """Runs every mistake once: {(command, name): (status, stdout, stderr)}."""
  root = tmp_path_factory.mktemp('mistakes')
  (root / 'empty.txt').write_text('')
  (root / 'none.py').write_text('')
  (root / 'of_a_run.py').write_text('{"causal": true}\n')
  (root / 'own.py').write_text(OWN_CONFIG)
  (root / 'broken.txt.gz').write_bytes(gzip.compress(b'text' * 100)[:-9])
  (root / 'text.txt').write_text('text\n' * 1000)
  data = tiny.write_corpus(root / 'corpus')
  claimed = root / 'claimed'
  checkpoint.claim_workdir(claimed, tiny.config(data))
  model = {'causal': False, 'vocab_size': 260}
  checkpoint.claim_workdir(root / 'encoder', tiny.config(data, model=model))
  half = tiny.config({**data, 'mask_rate': 0.5}, model=model)
  checkpoint.claim_workdir(root / 'half', half)

  def expand(argument):
    name, _, file = argument.partition('FILES=')
    if file and not name:
      return [
        f'--config.data.train_files={root / file}',
        f'--config.data.validation_files={root / "text.txt"}',
        f'--config.data.directory={root / "prepared"}',
      ]
    return [
      argument.replace('WORKDIR', str(root / 'new'))
      .replace('CLAIMED', str(claimed))
      .replace('EMPTY', str(root))
      .replace('ENCODER_HALF', str(root / 'half'))
      .replace('ENCODER', str(root / 'encoder'))
    ]

  found = {}
  for module, mistakes in MISTAKES.items():
    for name, (arguments, _) in mistakes.items():
      as_users_do = (module, name) in AS_USERS_DO
      run = tiny.run_in_a_new_interpreter if as_users_do else tiny.run_command
      expanded = (new for old in arguments for new in expand(old))
      found[module, name] = run(f'lex_fire.{module}', *expanded)
  return found, root


@pytest.mark.parametrize(
  ('command', 'name', 'expected'),
  [
    (command, name, expected)
    for command, mistakes in MISTAKES.items()
    for name, (_, expected) in mistakes.items()
  ],
)
def test_a_mistake_gets_one_line_and_status_2(results, command, name, expected):
  status, _, stderr = results[0][command, name]

  assert status == 2, stderr
  lines = [line for line in stderr.splitlines() if line.strip()]
  assert len(lines) == 1
  assert lines[0].startswith('error: ')
  assert expected in lines[0]


def fail_with(kind, text, err):
  """Is a command that ends in an error that is nobody's mistake in the input."""

  def main():
    raise kind(text)

  os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT), 2)
  sys.argv = ['command']
  cli.run(main)


@pytest.mark.parametrize(
  ('kind', 'text'),
  [
    (MemoryError, 'Unable to allocate 8.00 TiB'),
    (MemoryError, ''),
    (jax.errors.JaxRuntimeError, 'RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes\nwhere'),
  ],
)
def test_too_little_memory_is_told_in_a_sentence(kind, text, tmp_path):
  process = tiny.start(fail_with, kind, text, tmp_path / 'err')
  process.join()

  (line,) = (tmp_path / 'err').read_text().splitlines()
  assert process.exitcode == 2
  said = text.partition('\n')[0] or 'MemoryError'
  assert line.startswith(f'error: out of memory: {said}; ask for less: ')


def test_a_bucket_that_cannot_be_reached_is_told_in_a_sentence(tmp_path):
  unreachable = aiohttp.ClientConnectionError  # of the client that fetches from buckets
  process = tiny.start(fail_with, unreachable, 'no such host', tmp_path / 'err')
  process.join()

  (line,) = (tmp_path / 'err').read_text().splitlines()
  assert process.exitcode == 2
  assert line.startswith(
    'error: cannot reach the bucket: no such host; see that there is a network'
  )


def test_other_errors_that_google_raises_are_not_of_a_bucket():
  assert errors.of_network(json_format.ParseError('a file')) is None


def test_a_mistake_in_the_config_leaves_no_workdir_behind(results):
  _, root = results

  assert not pathlib.Path(root / 'new').exists()
