"""What holds for every test: 8 CPU devices, quick compilation, no silent broadcasting of ranks."""

import importlib.metadata
import os
import pathlib
import re

_FLAGS = [
  '--xla_force_host_platform_device_count=8',
  # Tests compile hundreds of tiny programs and run each once or twice: a program compiles in an
  # eighth of the time when neither XLA nor LLVM optimises its loops.
  '--xla_backend_optimization_level=0',
  '--xla_llvm_disable_expensive_passes=true',
]
# A flag that XLA does not know ends the process: the first of these, half of the gain, is gone in
# 0.12. The second compiles a program as one part; for each of 32 the machinery costs more than it.
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  _FLAGS += ['--xla_cpu_use_fusion_emitters=false', '--xla_cpu_parallel_codegen_split_count=1']

# Both are read once, when jax is imported.
os.environ['XLA_FLAGS'] = ' '.join([os.environ.get('XLA_FLAGS', ''), *_FLAGS]).strip()
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture(scope='module', autouse=True)
def _compiled_programs_last_as_long_as_their_file():
  """Those of all files together take gigabytes."""
  yield
  jax.clear_caches()


@pytest.fixture
def taken(monkeypatch):
  """Returns a list that gets the name of each implementation by which attention is computed."""
  from lex_fire import kernels

  names = []
  for name in ('reference', 'chunked'):
    kept = kernels.IMPLEMENTATIONS[name]

    def noted(*arrays, name=name, kept=kept, **options):
      names.append(name)
      return kept(*arrays, **options)

    monkeypatch.setitem(kernels.IMPLEMENTATIONS, name, noted)
  return names


@pytest.fixture(scope='session')
def corpus(tmp_path_factory):
  """Returns the data fields of a config that name the files of a tiny corpus."""
  import tiny

  return tiny.write_corpus(tmp_path_factory.mktemp('corpus'))


@pytest.fixture(scope='session')
def fire_run(corpus, tmp_path_factory):
  """Returns the workdir of a tiny run of FIRE, never interrupted, and its state in the end."""
  import tiny

  from lex_fire import train

  workdir = tmp_path_factory.mktemp('runs') / 'fire'
  return workdir, train.train(tiny.config(corpus), workdir)


@pytest.fixture(scope='session')
def scrolls_globs(tmp_path_factory):
  """Returns {split: glob} of the files of a task of SCROLLS."""
  import tiny_scrolls

  return tiny_scrolls.write_files(tmp_path_factory.mktemp('published'))


@pytest.fixture(scope='session')
def scrolls_directory(scrolls_globs, tmp_path_factory):
  """Returns a directory of TFDS with scrolls/qmsum, made of these."""
  from lex_fire.data import build_scrolls

  directory = tmp_path_factory.mktemp('tfds')
  build_scrolls.build('qmsum', directory, scrolls_globs)
  return directory


@pytest.fixture(scope='session')
def glue_directory(tmp_path_factory):
  """Returns a directory of TFDS with a few tasks of GLUE and SuperGLUE."""
  import tiny_glue

  directory = tmp_path_factory.mktemp('tfds')
  tiny_glue.write(directory)
  return directory


@pytest.fixture
def evaluate_command(tmp_path):
  """Calls `evaluate`, in this process, and returns the directory that it wrote into."""
  from absl import flags
  from absl.testing import flagsaver

  from lex_fire import benchmark_command, command, evaluate, hosts

  if 'tasks' not in flags.FLAGS:
    command.define_flags()
    benchmark_command.define_flags()
    hosts.define_flags()

  def call(*workdirs, **arguments):
    named = {'workdir': ','.join(map(str, workdirs)), 'output': tmp_path / 'out', **arguments}
    with flagsaver.flagsaver():
      flags.FLAGS(['evaluate', *(f'--{name}={value}' for name, value in named.items())])
      evaluate.main()
    return tmp_path / 'out'

  return call


# Which laws hold for which encoding: `pytest --laws` prints what its tests found.

_held: dict[tuple[str, str], bool] = {}  # (law, encoding): whether all its cases passed


def pytest_addoption(parser):
  parser.addoption('--laws', action='store_true', help='print the laws that each encoding holds')
  parser.addoption('--faults', type=int, default=4, help='that faults_test.py gives a run')


def pytest_runtest_logreport(report):
  from lex_fire import encodings

  file, _, test = report.nodeid.partition('::')
  law, bracket, parameters = test.partition('[')
  if not bracket or (report.when != 'call' and report.passed):
    return
  # 'chunked-causal-fire 2 layers' and 'nope+sinusoidal' name encodings, the latter as alike.
  words = {part.split(' ')[0] for part in re.split(r'[-+]', parameters.rstrip(']'))}
  for name in words & set(encodings.ENCODINGS):
    key = (f'{pathlib.Path(file).stem.removesuffix("_test")}: {law.removeprefix("test_")}', name)
    _held[key] = _held.get(key, True) and report.passed


def pytest_terminal_summary(terminalreporter, config):
  from lex_fire import encodings

  if not config.getoption('--laws') or not _held:
    return
  laws, names = list(dict.fromkeys(law for law, _ in _held)), list(encodings.ENCODINGS)
  terminalreporter.section('laws')
  for index, name in enumerate(names):
    terminalreporter.write_line(f'{"| " * index}{name}')
  for law in laws:
    cells = ({True: '+', False: 'F', None: '.'}[_held.get((law, name))] for name in names)
    terminalreporter.write_line(f'{" ".join(cells)}  {law.replace("_", " ")}')
  terminalreporter.write_line('+ holds, F fails, . says nothing of this encoding')
