"""Executes the notebooks anew and saves them with their outputs, clean and small.

    python -m experiments.notebooks.run [--notebooks=encodings,zoo]

Each runs from top to bottom in a kernel of this Python, whatever kernels are installed, with an
empty directory to work in. Writes the seconds that each took into times.json beside this file.
"""

import base64
import importlib.util
import io
import json
import os
import pathlib
import re
import sys
import tempfile
import time

import nbclient
import nbformat
import traitlets
from absl import flags
from jupyter_client import kernelspec, manager
from PIL import Image

from lex_fire import cli, command, errors

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
# Each notebook, and the module beside lex_fire without which it cannot run.
NOTEBOOKS = {
  'encodings': 'matplotlib',
  'extrapolate': 'seqio',
  'zoo': 'seqio',
  'your_encoding': 'seqio',
  'pod': 'libtpu',
}
LARGEST = 400_000  # bytes of a notebook with its outputs
COLORS = 48  # of a picture; curves, their shades and a few colormaps need no more
SECONDS_PER_CELL = 600
TIMES = HERE / 'times.json'
METADATA = {
  'kernelspec': {'display_name': 'Python 3', 'language': 'python', 'name': 'python3'},
  'language_info': {'name': 'python'},
}
_ABSOLUTE = re.compile(r'(?<![\w.:/])/(?:[\w.-]+/)+[\w.-]+|[A-Z]:\\\w')


class _OnlyKernel(kernelspec.KernelSpecManager):
  """Knows the kernel of the Python that runs this, by whatever name it is asked for."""

  def get_kernel_spec(self, kernel_name):
    del kernel_name
    # It warns of whoever listens to this machine's ports.
    argv = [
      sys.executable,
      '-m',
      'ipykernel_launcher',
      '-f',
      '{connection_file}',
      '--log-level=ERROR',
    ]
    return kernelspec.KernelSpec(argv=argv, display_name='Python 3', language='python')


class _Kernel(manager.AsyncKernelManager):
  @traitlets.default('kernel_spec_manager')
  def _of_this_python(self):
    return _OnlyKernel(parent=self)


def lacks(name: str) -> str | None:
  """Returns the module that a notebook needs and this Python lacks, or None."""
  module = NOTEBOOKS[name]
  return module if importlib.util.find_spec(module) is None else None


def path_of(name: str) -> pathlib.Path:
  """Returns where a notebook lies."""
  return HERE / f'{name}.ipynb'


def execute(name: str) -> nbformat.NotebookNode:
  """Runs a notebook from top to bottom, and returns it with its outputs as they come.

  Raises:
    nbclient.exceptions.CellExecutionError: if a cell raises.
  """
  notebook = nbformat.read(path_of(name), as_version=4)
  with tempfile.TemporaryDirectory() as directory:
    environment = {
      **os.environ,
      'XLA_FLAGS': '',  # a reader sets none
      'PYTHONPATH': str(ROOT),
      'IPYTHONDIR': directory,  # without the start-up files of whoever runs this
    }
    client = nbclient.NotebookClient(
      notebook,
      timeout=SECONDS_PER_CELL,
      coalesce_streams=True,
      kernel_manager_class=_Kernel,
      resources={'metadata': {'path': directory}},
    )
    return client.execute(env=environment)


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
  """Takes out what differs from run to run or is large: times, kernels, colours."""
  notebook.metadata = nbformat.from_dict(METADATA)
  for cell in notebook.cells:
    cell.metadata = nbformat.from_dict({})
    for output in cell.get('outputs', []):
      data = output.get('data', {})
      if 'image/png' in data:
        data['image/png'] = _smaller(data['image/png'])
        data.pop('text/plain', None)
  return notebook


def _smaller(png: str) -> str:
  """Returns a picture, in base64, with no more than COLORS."""
  picture = Image.open(io.BytesIO(base64.b64decode(png))).convert('RGB')
  file = io.BytesIO()
  picture.quantize(COLORS).save(file, format='png', optimize=True)
  return base64.b64encode(file.getvalue()).decode()


def mistakes(notebook: nbformat.NotebookNode) -> list[str]:
  """Returns a sentence for each thing in which a notebook is not fit to be kept."""
  cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
  found = []
  if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
    found.append('its cells were not executed once each, from top to bottom')
  for cell in cells:
    told = ''.join(json.dumps(_without_pictures(output)) for output in cell.outputs)
    if '"stderr"' in told or '"error"' in told:
      found.append(f'cell {cell.id!r} writes to stderr or raises')
    for path in _ABSOLUTE.findall(f'{cell.source}\n{told}'):
      found.append(f'cell {cell.id!r} names the path {path}')
    if 'execution' in cell.metadata:
      found.append(f'cell {cell.id!r} says when it ran')
  size = len(nbformat.writes(notebook).encode())
  if size > LARGEST:
    found.append(f'it has {size:,} bytes, more than {LARGEST:,}')
  return found


def _without_pictures(output):
  data = {kind: value for kind, value in output.get('data', {}).items() if 'image' not in kind}
  return {**output, 'data': data}


def read_times() -> dict[str, float]:
  """Returns the seconds that each notebook took when it was saved."""
  return json.loads(TIMES.read_text()) if TIMES.exists() else {}


def table(seconds: dict[str, float]) -> str:
  """Returns the seconds that notebooks took, as Markdown."""
  rows = [f'| [{name}.ipynb]({name}.ipynb) | {seconds[name]:.0f} s |' for name in NOTEBOOKS]
  return '\n'.join(['| notebook | time |', '|---|---:|', *rows])


def main() -> None:
  """The command."""
  asked = flags.FLAGS.notebooks or list(NOTEBOOKS)
  for name in asked:
    if name not in NOTEBOOKS:
      raise errors.UserError(f'unknown notebook {name!r}; known: {", ".join(NOTEBOOKS)}')
    if lacks(name):
      raise errors.UserError(
        f'notebook {name!r} needs {lacks(name)!r}, which is not installed; install requirements-'
        f'{"tpu" if lacks(name) == "libtpu" else "dev"}.txt, or leave it out by --notebooks'
      )
  seconds = read_times()
  for name in asked:
    start = time.monotonic()
    notebook = execute(name)
    seconds[name] = round(time.monotonic() - start, 1)
    wrong = mistakes(clean(notebook))
    if wrong:
      raise errors.UserError(f'{name}.ipynb is not saved: {"; ".join(wrong)}')
    written = {f'{name}.ipynb': lambda file, notebook=notebook: nbformat.write(notebook, file)}
    written[TIMES.name] = lambda file: file.write_text(json.dumps(seconds, indent=2) + '\n')
    command.write_files(HERE, written)
    print(f'{name}: {seconds[name]:.0f} s', flush=True)


if __name__ == '__main__':
  flags.DEFINE_list('notebooks', None, f'of {", ".join(NOTEBOOKS)}; by default all')
  cli.run(main)
