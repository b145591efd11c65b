"""Runs so small that tests train them in a second: a corpus of text files, a config, commands."""

import json
import multiprocessing
import multiprocessing.forkserver
import os
import pathlib
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable

import pytest

from lex_fire import config as config_lib
from lex_fire import presets

MODEL = {
  'num_layers': 1,
  'd_model': 16,
  'num_heads': 2,
  'num_kv_heads': 1,
  'head_dim': 8,
  'd_ff': 32,
}


def write_corpus(directory: pathlib.Path) -> dict[str, str]:
  """Writes files of numbered lines for both splits and returns the data fields that name them."""
  for split, numbers in {'train': range(0, 3000), 'validation': range(3000, 4500)}.items():
    (directory / split).mkdir(parents=True)
    for part in range(3):
      lines = [f'{number} times 7 is {number * 7}.\n' for number in numbers[part::3]]
      (directory / split / f'{part}.txt').write_text(''.join(lines))
  return {
    'task': 'text',
    'directory': str(directory / 'prepared'),
    **{f'{split}_files': str(directory / split / '*.txt') for split in ('train', 'validation')},
  }


def values(corpus: dict[str, str], name: str = 'fire', **sections) -> dict:
  """Returns the config of a tiny run with encoding `name`, as nested dicts; `sections` override."""
  fields = {
    'model': MODEL,
    'data': {**corpus, 'length': 32, 'batch_size': 8},
    'optimizer': {'warmup_steps': 2, 'learning_rate': 3e-3},
    'train': {'steps': 12, 'log_every': 1, 'checkpoint_every': 4, 'validation_windows': 8},
    'evaluate': {'lengths': (32, 64, 128), 'max_tokens': 2048},
  }
  for section, changes in sections.items():
    fields[section] = {**fields.get(section, {}), **changes}
  return presets.make('tiny', name, **fields)


def config(corpus: dict[str, str], name: str = 'fire', **sections) -> config_lib.Config:
  """Returns the config of a tiny run."""
  return config_lib.Config.from_dict(values(corpus, name, **sections))


def as_if(workdir, copy, **sections):
  """Copies a run and changes its config, as if it had been trained so, and returns the copy."""
  shutil.copytree(workdir, copy)
  values = json.loads((copy / 'config.json').read_text())
  for section, fields in sections.items():
    values[section].update(fields)
  (copy / 'config.json').write_text(json.dumps(values))
  return copy


def flags(fields: dict) -> list[str]:
  """Returns the flags that turn configs/text.py:size=tiny into the config of `fields`."""
  encoding = fields['encoding']['name']
  out = [f'--config=configs/text.py:size=tiny,encoding={encoding}']
  for section, section_fields in fields.items():
    for name, value in section_fields.items():
      if (section, name) != ('encoding', 'name'):
        out.append(f'--config.{section}.{name}={value}')
  return out


def untimed(rows: list[dict]) -> list[dict]:
  """Returns lines of metrics.jsonl but for what was measured in seconds."""
  ends = ('per_second', 'utilization', '_share')
  return [{name: row[name] for name in row if not name.endswith(ends)} for row in rows]


# Every command of a test is forked from one process that has imported what is slow to import, and
# whose JAX has started no thread, as it was not used.
_forks = multiprocessing.get_context('forkserver')
_forks.set_forkserver_preload(['lex_fire.train', 'lex_fire.evaluate', 'seqio'])


def run(module: str, arguments: list[str], out: str, err: str) -> None:
  """What a fork does: `python -m MODULE ARGUMENTS...` with its output in files."""
  for descriptor, path in ((1, out), (2, err)):
    os.dup2(os.open(path, os.O_WRONLY), descriptor)
  sys.argv = [module, *arguments]
  sys.modules.pop(module, None)
  runpy.run_module(module, run_name='__main__')


def start_command(module: str, *arguments: str, out: str = os.devnull, err: str = os.devnull):
  """Starts `python -m MODULE ARGUMENTS...` and returns its `multiprocessing.Process`."""
  return start(run, module, arguments, out, err)


def start(function: Callable[..., None], *arguments):
  """Calls a function of a test's module in a process of its own, and returns that."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('TF_CPP_MIN_LOG_LEVEL', '3')  # of what it notes when imported without a GPU
    multiprocessing.forkserver.ensure_running()
  process = _forks.Process(target=function, args=arguments)
  process.start()
  return process


def run_command(module: str, *arguments: str) -> tuple[int | None, str, str]:
  """Runs `python -m MODULE ARGUMENTS...`; returns status, stdout and stderr."""
  with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
    process = start_command(module, *arguments, out=out.name, err=err.name)
    process.join()
    status = process.exitcode
    process.close()
    return status, out.read().decode(), err.read().decode()


def run_in_a_new_interpreter(module: str, *arguments: str) -> tuple[int | None, str, str]:
  """Does the same as a user's shell would, at the price of all imports."""
  done = subprocess.run([sys.executable, '-m', module, *arguments], capture_output=True, text=True)
  return done.returncode, done.stdout, done.stderr


def write_vocabulary(path: pathlib.Path, texts: Iterable[str]) -> str:
  """Trains a SentencePiece model of the bytes and a few pieces more, and returns its path."""
  from lex_fire.data import spec, train_vocabulary

  source = path.with_suffix('.txt')
  source.write_text('\n'.join(texts))
  what = spec.Spec('text', files={'train': str(source)})
  train_vocabulary.train(what, 'train', 290, path, max_characters=10**6)
  return str(path)
