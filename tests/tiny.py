"""Runs so small that tests train them in a second: a corpus of text files, a config, commands."""

import json
import pathlib
import subprocess
import sys

from lex_fire import config as config_lib
from lex_fire import presets

MODEL = {
  'num_layers': 2,
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


def flags(fields: dict) -> list[str]:
  """Returns the flags that turn configs/text.py:size=tiny into the config of `fields`."""
  encoding = fields['encoding']['name']
  out = [f'--config=configs/text.py:size=tiny,encoding={encoding}']
  for section, section_fields in fields.items():
    for name, value in section_fields.items():
      if (section, name) != ('encoding', 'name'):
        out.append(f'--config.{section}.{name}={value}')
  return out


_DRIVER = """
import io, json, os, runpy, sys, tempfile
import lex_fire.train, lex_fire.evaluate  # once for all; JAX starts no thread before it is used
results = []
for module, *arguments in json.load(sys.stdin):
  with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
    child = os.fork()
    if child == 0:
      os.dup2(out.fileno(), 1)
      os.dup2(err.fileno(), 2)
      sys.argv = [module, *arguments]
      for name in ('lex_fire.train', 'lex_fire.evaluate'):
        sys.modules.pop(name, None)
      status = 0
      try:
        runpy.run_module(module, run_name='__main__')
      except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
      except BaseException:
        import traceback
        traceback.print_exc()
        status = 1
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(status or 0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    texts = []
    for file in (out, err):
      file.seek(0)
      texts.append(file.read().decode())
    results.append([status, *texts])
json.dump(results, sys.stdout)
"""


def run_commands(commands: list[list[str]]) -> list[tuple[int, str, str]]:
  """Runs `python -m MODULE ARGUMENTS...` for each; returns status, stdout and stderr.

  One interpreter imports the library and forks for each, so that a command costs no import.
  """
  done = subprocess.run(
    [sys.executable, '-c', _DRIVER], input=json.dumps(commands), capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  return [tuple(result) for result in json.loads(done.stdout)]
