"""Tests the commands as a user meets them: statuses, messages, and what they leave behind."""

import gzip
import pathlib

import pytest
import tiny

from lex_fire import checkpoint

QUICK = '--config=configs/quickstart.py'
TEXT = '--config=configs/text.py'
LEARNED = '--config=configs/quickstart.py:encoding=learned'

# Arguments of `python -m lex_fire.train`, and what the one line on stderr says. WORKDIR is a new
# folder.
TRAIN_MISTAKES = {
  'config missing': (['--workdir=WORKDIR'], '--config is missing, for example --config=configs/'),
  'workdir missing': ([QUICK], '--workdir is missing'),
  'no config file': (['--config=configs/none.py', '--workdir=WORKDIR'], "'configs/none.py'"),
  'unknown section': ([QUICK, '--config.modle.x=1', '--workdir=WORKDIR'], "key 'modle.x'; known"),
  'unknown key': ([QUICK, '--config.model.layers=1', '--workdir=WORKDIR'], 'num_layers'),
  'unknown option': ([QUICK, '--config.encoding.slope=1', '--workdir=WORKDIR'], 'threshold'),
  'unknown flag': ([QUICK, '--workdri=WORKDIR'], "'workdri'"),
  'no flag': ([QUICK, 'workdir'], "unknown argument 'workdir'; flags start with --"),
  'unknown argument': (
    [QUICK + ':size=base', '--workdir=WORKDIR'],
    "'size=base'; known: encoding=",
  ),
  'unknown encoding': ([QUICK + ':encoding=rop', '--workdir=WORKDIR'], "'rop'; known: alibi, fire"),
  'unknown preset': ([TEXT + ':size=huge', '--workdir=WORKDIR'], "size='huge'; known: tiny, base"),
  'wrong type': ([QUICK, '--config.model.num_layers=2.5', '--workdir=WORKDIR'], "'2.5'"),
  'out of range': (
    [QUICK, '--config.model.num_layers=0', '--workdir=WORKDIR'],
    'model.num_layers=0 must be at least 1',
  ),
  'past a learned table': (
    [LEARNED, '--config.encoding.max_length=100', '--workdir=WORKDIR'],
    'data.length=256 is past the 100 positions',
  ),
  'mesh': (
    [QUICK, '--config.mesh.data=3', '--workdir=WORKDIR'],
    'mesh data=3, fsdp=1 does not fit',
  ),
  'batch': (
    [QUICK, '--config.data.batch_size=12', '--workdir=WORKDIR'],
    'B=12, which mesh axes data=8 x fsdp=1 do not divide',
  ),
  'no files': ([TEXT, '--workdir=WORKDIR'], "needs both globs of files, not data.train_files=''"),
  'empty file': ([TEXT, 'FILES=empty.txt', '--workdir=WORKDIR'], 'empty.txt'),
  'broken gzip': ([TEXT, 'FILES=broken.txt.gz', '--workdir=WORKDIR'], 'broken.txt.gz'),
  'no match': ([TEXT, 'FILES=none*.txt', '--workdir=WORKDIR'], 'none*.txt'),
}
EVALUATE_MISTAKES = {
  'workdir missing': ([], '--workdir is missing'),
  'no run': (['--workdir=EMPTY'], 'no run in workdir'),
  'no checkpoint': (['--workdir=CLAIMED'], 'no checkpoint in'),
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
}


@pytest.fixture(scope='module')
def results(tmp_path_factory):
  """Runs every mistake once: {(command, name): (status, stdout, stderr)}."""
  root = tmp_path_factory.mktemp('mistakes')
  (root / 'empty.txt').write_text('')
  (root / 'broken.txt.gz').write_bytes(gzip.compress(b'text' * 100)[:-9])
  (root / 'text.txt').write_text('text\n' * 1000)
  data = tiny.write_corpus(root / 'corpus')
  claimed = root / 'claimed'
  checkpoint.claim_workdir(claimed, tiny.config(data))

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
    ]

  keys, commands = [], []
  for module, mistakes in (('train', TRAIN_MISTAKES), ('evaluate', EVALUATE_MISTAKES)):
    for name, (arguments, _) in mistakes.items():
      keys.append((module, name))
      commands.append([f'lex_fire.{module}', *(new for old in arguments for new in expand(old))])
  return dict(zip(keys, tiny.run_commands(commands), strict=True)), root


@pytest.mark.parametrize(
  ('command', 'name', 'expected'),
  [
    *(('train', name, expected) for name, (_, expected) in TRAIN_MISTAKES.items()),
    *(('evaluate', name, expected) for name, (_, expected) in EVALUATE_MISTAKES.items()),
  ],
)
def test_a_mistake_gets_one_line_and_status_2(results, command, name, expected):
  status, _, stderr = results[0][command, name]

  assert status == 2, stderr
  lines = [line for line in stderr.splitlines() if line.strip()]
  assert len(lines) == 1
  assert lines[0].startswith('error: ')
  assert expected in lines[0]


def test_a_mistake_in_the_config_leaves_no_workdir_behind(results):
  _, root = results

  assert not pathlib.Path(root / 'new').exists()
