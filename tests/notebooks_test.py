"""Every notebook of `../experiments/notebooks` runs from top to bottom, and is kept as it ran."""

import importlib.util
import re
import site
import subprocess
import sys

import matplotlib
import nbformat
import pytest

from experiments.notebooks import run
from lex_fire import encodings
from lex_fire.encodings import base

README = (run.HERE / 'README.md').read_text()
every_notebook = pytest.mark.parametrize('name', run.NOTEBOOKS)


def kept(name):
  return nbformat.read(run.path_of(name), as_version=4)


@pytest.fixture(scope='module')
def home(tmp_path_factory):
  """Returns what the kernels have for the home of whoever runs them; the first prepares text."""
  return tmp_path_factory.mktemp('home')


@every_notebook
# Of third parties, who talk to the kernel.
@pytest.mark.filterwarnings('ignore')
def test_a_notebook_runs_from_top_to_bottom(name, home, monkeypatch):
  if run.lacks(name):
    pytest.skip(f'needs {run.lacks(name)}: make test{"-tpu" * (name == "pod")}')
  # Packages may be installed there, and Matplotlib would look for fonts anew, and say so.
  monkeypatch.setenv('PYTHONUSERBASE', site.getuserbase())
  monkeypatch.setenv('MPLCONFIGDIR', matplotlib.get_cachedir())
  monkeypatch.setenv('HOME', str(home))

  assert not run.mistakes(run.clean(run.execute(name)))


@every_notebook
def test_what_is_kept_of_a_notebook_is_how_it_ran(name):
  notebook = kept(name)

  nbformat.validate(notebook)
  assert not run.mistakes(notebook)
  assert notebook.metadata == run.METADATA
  pictures = [output for cell in notebook.cells for output in cell.get('outputs', [])]
  assert any('image/png' in output.get('data', {}) for output in pictures)


def test_a_notebook_that_is_not_fit_to_be_kept_is_found_out():
  notebook = kept('encodings')
  code = [cell for cell in notebook.cells if cell.cell_type == 'code']
  assert not run.mistakes(notebook)

  code[0].execution_count = 7
  code[0].metadata['execution'] = {'iopub.execute_input': '2026-01-01T00:00:00Z'}
  code[1].outputs.append(nbformat.v4.new_output('stream', name='stderr', text='in /home/me/a.py'))
  code[2].source += '#' * run.LARGEST

  assert run.mistakes(notebook) == [
    'its cells were not executed once each, from top to bottom',
    f"cell '{code[0].id}' says when it ran",
    f"cell '{code[1].id}' writes to stderr or raises",
    f"cell '{code[1].id}' names the path /home/me/a.py",
    f'it has {len(nbformat.writes(notebook).encode()):,} bytes, more than {run.LARGEST:,}',
  ]


def test_the_folder_has_no_other_notebook_and_its_table_all():
  assert {path.stem for path in run.HERE.glob('*.ipynb')} == set(run.NOTEBOOKS)
  assert run.table(run.read_times()) in README


def test_each_notebook_took_less_than_three_minutes():
  """A reader waits for it; two cores with nothing else to do made the kept outputs."""
  seconds = run.read_times()

  assert set(seconds) == set(run.NOTEBOOKS)
  assert max(seconds.values()) < 180


@every_notebook
def test_a_notebook_says_what_it_is_and_installs_what_is_missing(name):
  first, second = kept(name).cells[:2]

  assert first.cell_type == 'markdown' and re.match(r'# \w', first.source)
  assert re.search(r'(minute|minutes) on', first.source)
  assert "PROJECT = '../..'  # @param" in second.source


@every_notebook
def test_an_uploaded_notebook_says_what_to_set_where_there_is_no_copy(name, tmp_path, monkeypatch):
  """Where it lies beside a copy, or is given a git address, pip is called instead."""
  source = kept(name).cells[1].source
  called = []
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  monkeypatch.setattr(sys, 'path', sys.path.copy())
  monkeypatch.setattr(subprocess, 'run', lambda command, check: called.append(command))

  monkeypatch.chdir(tmp_path)
  with pytest.raises(
    FileNotFoundError, match=r"^PROJECT='\.\./\.\.' is no copy of .*; set PROJECT"
  ):
    exec(source, {})
  assert not called
  exec(source.replace("'../..'", "'git+https://host/lex_fire'"), {})
  monkeypatch.chdir(run.HERE)
  exec(source, {})

  assert 'git+https://host/lex_fire' in called[0]
  assert '../../requirements.txt' in called[1] and '../..' not in called[1]
  assert sys.path[0] == str(run.ROOT)


def test_an_encoding_that_is_written_anew_takes_the_place_of_the_old_one(monkeypatch):
  """As in a notebook, whose cell is changed and run again."""
  made = []
  for name in ('first', 'second'):
    factory = lambda name=name: base.Encoding(name, init=base.no_parameters)  # noqa: E731
    monkeypatch.setitem(encodings.ENCODINGS, 'mine', factory)
    made.append(encodings.get('mine').name)

  assert made == ['first', 'second']
