"""Tests that what the pages tell a reader to do is there to be done: links, commands, examples."""

import argparse
import doctest
import functools
import importlib
import pathlib
import re
import runpy
import shlex
import sys
import tempfile

import pytest
import tiny
import yaml
from absl import app, flags

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted(
  [*ROOT.glob('*.md'), *ROOT.glob('docs/**/*.md'), *ROOT.glob('configs/*/*.md')]
  + [*ROOT.glob('experiments/*/README.md')]
)
HOWTOS = sorted(ROOT.glob('docs/**/*.md'))
every_page = pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
WITH_PYTHON = [page for page in (ROOT / 'README.md', *HOWTOS) if '```python' in page.read_text()]
EXAMPLES = [
  path for path in sorted((ROOT / 'lex_fire').rglob('*.py')) if '>>> ' in path.read_text()
]
# Of commands on these pages: what a reader puts in the place of these is not there.
STAND_INS = {'encoding=mine': 'encoding=alibi'}
# They are made when a run is there, or take the flags of another program too.
OF_A_RUN, OTHERS_FLAGS = 'checkpoint=', ('lex_fire.data.prepare_beam',)


def prose(text):
  """Returns a page without its code."""
  return re.sub(r'```.*?```|^ {4}[^\n]*|`[^`\n]*`', '', text, flags=re.DOTALL | re.MULTILINE)


def anchors(page):
  """Returns the names of a page's headings, as GitHub and MyST make them."""
  headings = re.findall(
    r'^#+ (.*)$', re.sub(r'```.*?```', '', page.read_text(), flags=re.DOTALL), re.M
  )
  return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


def code(page):
  """Returns the lines of commands on a page, each whole."""
  text = page.read_text()
  fenced = re.findall(r'```sh\n(.*?)```', text, re.DOTALL)
  indented = re.findall(r'^ {4}(.*)$', re.sub(r'```.*?```', '', text, flags=re.DOTALL), re.M)
  return '\n'.join([*fenced, *indented]).replace('\\\n', ' ').splitlines()


def commands(page):
  """Yields (module, arguments) of each `python -m MODULE ARGUMENTS` on a page."""
  for line in code(page):
    match = re.search(
      r'(?:python -m|configs/launch/\w+\.sh) ((?:lex_fire|experiments)\.\S+)(.*)', line
    )
    if match:
      module, arguments = match.groups()
      yield module, [word for word in shlex.split(arguments, comments=True) if word != '||']


def source(module):
  path = ROOT.joinpath(*module.split('.'))
  return path.with_suffix('.py') if path.with_suffix('.py').exists() else path / '__init__.py'


def tell_flags(module, out, err):
  """Where a command would read its flags, writes what they are called, and ends."""

  def tell(names):
    print(*names)
    sys.exit()

  app.run = lambda *_, **__: tell(flags.FLAGS)
  argparse.ArgumentParser.parse_args = lambda parser, *_: tell(
    re.findall(r'--(\w+)', parser.format_usage())
  )
  tiny.run(module, [], out, err)


@functools.cache
def flags_of(module):
  """Returns the names of a command's flags, by itself."""
  reads = re.search(r'cli\.run\(|\.parse_args\(', source(module).read_text())
  assert reads, f'{module} has no flags'
  with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
    process = tiny.start(tell_flags, module, out.name, err.name)
    process.join()
    assert process.exitcode == 0, err.read().decode()
    return set(out.read().decode().split())


@every_page
def test_the_files_and_headings_that_a_page_points_to_exist(page):
  for target in re.findall(r'\]\((?!https?:)([^)\s]+)\)', prose(page.read_text())):
    path, _, anchor = target.partition('#')
    there = page if not path else page.parent / path

    assert there.exists(), target
    assert not anchor or anchor in anchors(there), target


@every_page
def test_the_commands_of_a_page_have_their_flags(page):
  for module, arguments in commands(page):
    assert source(module).exists(), module

    for argument in arguments if module not in OTHERS_FLAGS else ():
      if argument.startswith('--'):
        name = re.split(r'[.=]', argument[2:])[0]  # config.train.steps=10 is of config
        assert name in flags_of(module), f'{module} has no flag {argument}'


@pytest.mark.parametrize('page', HOWTOS, ids=lambda page: page.stem)
def test_the_configs_of_a_page_have_the_fields_that_it_sets(page):
  pytest.importorskip('ml_collections')
  for _, arguments in commands(page):
    given = dict(word[2:].split('=', 1) for word in arguments if word.startswith('--config'))
    file, _, arg = given.pop('config', '').partition(':')
    arg = ','.join(STAND_INS.get(part, part) for part in arg.split(',') if OF_A_RUN not in part)
    if file.endswith('.py'):
      fields = runpy.run_path(ROOT / file)['get_config'](arg).to_dict()
      for name in given:
        section, field = name.removeprefix('config.').split('.')
        assert field in fields[section], name


@pytest.mark.parametrize('page', HOWTOS, ids=lambda page: page.stem)
def test_the_files_that_a_page_names_exist(page):
  for path in re.findall(
    r'`((?:lex_fire|configs|experiments|tests|docs)/[\w/.]+)`', page.read_text()
  ):
    assert (ROOT / path).exists() or path.endswith('mine.py'), path


@pytest.mark.parametrize('page', WITH_PYTHON, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page, fire_run, tmp_path, monkeypatch, capsys):
  workdir, _ = fire_run
  (tmp_path / 'runs' / 'quickstart').mkdir(parents=True)
  (tmp_path / 'runs' / 'quickstart' / 'fire').symlink_to(workdir)
  monkeypatch.chdir(tmp_path)
  names = {}

  for block in re.findall(r'```python\n(.*?)```', page.read_text(), re.DOTALL):
    exec(compile(block, str(page), 'exec'), names)

  out = capsys.readouterr().out
  for said in re.findall(r'print\(.*\)  # (.*)', page.read_text()):
    assert said in out


@pytest.mark.parametrize('path', EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_of_docstrings_give_what_they_say(path):
  parts = path.relative_to(ROOT).with_suffix('').parts
  module = importlib.import_module('.'.join(parts).removesuffix('.__init__'))

  found = doctest.testmod(module)

  assert found.attempted and not found.failed


def test_first_functions_of_a_user_have_examples():
  names = {str(path.relative_to(ROOT / 'lex_fire')) for path in EXAMPLES}

  assert names >= {
    *('encodings/__init__.py', 'encodings/base.py', 'encodings/represent.py', 'zoo.py'),
    *('kernels/__init__.py', 'kernels/mask.py', 'analysis.py', 'presets.py', 'config.py'),
    'generate.py',
  }


def test_the_reference_has_every_public_module():
  shown = set()
  for page in ROOT.glob('docs/reference/*.md'):
    shown |= set(re.findall(r'automodule:: (\S+)', page.read_text()))

  assert all(source(module).exists() for module in shown)
  exported = importlib.import_module('lex_fire').__all__
  registered = {path.stem for path in (ROOT / 'lex_fire' / 'encodings').glob('[a-z]*.py')}
  assert shown >= {f'lex_fire.{name}' for name in exported}
  assert shown >= {f'lex_fire.encodings.{name}' for name in registered}


def test_the_citation_is_a_citation_file_of_the_two_papers():
  """The keys that CFF 1.2.0 requires (citation-file-format.github.io), of the references too."""
  citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
  project = (ROOT / 'pyproject.toml').read_text()

  assert {'cff-version', 'message', 'title', 'authors'} <= set(citation)
  assert citation['cff-version'] == '1.2.0'
  assert f'version = "{citation["version"]}"' in project
  assert [author['name'] for author in citation['authors']] == ['The lex_fire authors']
  for paper, number in zip(citation['references'], ('2310.04418', '2212.10554'), strict=True):
    assert {'type', 'title', 'authors', 'year'} <= set(paper)
    assert all({'family-names', 'given-names'} == set(author) for author in paper['authors'])
    assert number in paper['url']
    readme = (ROOT / 'README.md').read_text()
    assert paper['title'] in readme and f'eprint    = {{{number}}}' in readme
