"""The training step as a file: compiled once, anywhere, and loaded by `train` in no time.

    python -m lex_fire.compile --config=CONFIG --topology=v5e:16x16 --save=step.executable
    python -m lex_fire.train --config=CONFIG --workdir=DIR --executable=step.executable

A file has a line of JSON that says what it was compiled for and with, and a pickle. WHO READS A
PICKLE RUNS WHAT ITS WRITER WANTS, and a compiled program besides: load only your own. The digest
tells of damage, not of malice.
"""

import functools
import hashlib
import importlib.metadata
import json
import pathlib
import pickle
from typing import Any

import jax
import jaxlib
from jax.experimental import serialize_executable

from lex_fire import checkpoint, errors
from lex_fire import config as config_lib

_FORMAT = 'lex_fire step 1'

# What of a config a step depends on: these sections, and these fields. Not where data lie, what is
# logged, or how a run is evaluated.
SECTIONS = ('model', 'encoding', 'optimizer')
FIELDS = (
  'data.length',
  'data.batch_size',
  'data.isolate_documents',
  'data.position_range',  # without one a batch has no positions
  'train.steps',  # of the schedule
  'train.accumulation',
)
# The packages that compile for a platform, besides jaxlib.
_COMPILERS = {'tpu': ('libtpu',), 'gpu': ('jax-cuda13-pjrt', 'jax-cuda12-pjrt')}


def save(
  path: pathlib.Path,
  compiled: jax.stages.Compiled,
  config: config_lib.Config,
  mesh: jax.sharding.Mesh,
) -> None:
  """Writes the compiled `Program.step` of a run.

  Args:
    path: of the file.
    compiled: for the devices of the mesh, or those that they stand for.
    config: of the run.
    mesh: of the run.
  """
  body = pickle.dumps(serialize_executable.serialize(compiled))
  header = {
    'format': _FORMAT,
    'sha256': hashlib.sha256(body).hexdigest(),
    'of': _description(config, mesh),
  }
  path.write_bytes(json.dumps(header).encode() + b'\n' + body)


def load(
  path: pathlib.Path, config: config_lib.Config, mesh: jax.sharding.Mesh
) -> jax.stages.Compiled:
  """Returns the step of a run, as `save` wrote it; nothing is compiled.

  It runs code of the file's: see above.

  Args:
    path: of the file.
    config: of the run.
    mesh: of the run, whose devices are here.

  Raises:
    errors.UserError: if the file cannot be read, is damaged, or was compiled for another config,
      device or mesh, or by another version.
  """
  header, body = _read(path)
  found, asked = header['of'], _description(config, mesh)
  for name in {**asked, **found}:
    if found.get(name) != asked.get(name):
      raise errors.UserError(
        f'executable {str(path)!r} is of {name}={found.get(name)!r}, not {asked.get(name)!r} as '
        'here; compile one for this run, or leave --executable out'
      )
  try:
    program, inputs, outputs = pickle.loads(body)
    devices = list(mesh.devices.flat)
    return serialize_executable.deserialize_and_load(
      program, inputs, outputs, backend=devices[0].client, execution_devices=devices
    )
  except (jax.errors.JaxRuntimeError, KeyError, ValueError) as error:
    reason = ' '.join(str(error).split())[:200]
    raise errors.UserError(
      f'executable {str(path)!r} cannot be loaded on these devices: {reason}; leave --executable '
      'out'
    ) from error


def _read(path: pathlib.Path) -> tuple[dict[str, Any], bytes]:
  """Returns what a file says of itself, and its pickle."""
  try:
    first, _, body = path.read_bytes().partition(b'\n')
  except OSError as error:
    raise errors.UserError(f'cannot read executable {str(path)!r}: {error.strerror}') from error
  try:
    header = json.loads(first)
  except ValueError:  # no JSON, or no text
    header = None
  if not isinstance(header, dict) or header.get('format') != _FORMAT:
    raise errors.UserError(
      f'{str(path)!r} is no executable of `python -m lex_fire.compile --save`; make one by that'
    )
  if header['sha256'] != hashlib.sha256(body).hexdigest():
    raise errors.UserError(
      f'executable {str(path)!r} is damaged: its {len(body)} bytes are not those once written; '
      'copy it again, or make another by `python -m lex_fire.compile --save`'
    )
  return header, body


def _description(config: config_lib.Config, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """Returns, as of JSON, all that must be the same where a step is compiled and where it runs."""
  device = mesh.devices.flat[0]
  platform = 'gpu' if device.platform in ('cuda', 'rocm') else device.platform
  found = {
    'lex_fire': _digest_of_sources(),
    **{name: _version(name) for name in ('flax', 'optax')},
    'jax': jax.__version__,
    'jaxlib': jaxlib.version.__version__,
    **{name: _version(name) for name in _COMPILERS.get(platform, ())},
    'platform': platform,
    'device': device.device_kind,
    'devices': mesh.size,
    **{f'mesh.{axis}': size for axis, size in mesh.shape.items()},
  }
  fields = checkpoint.flat(config)
  found |= {
    name: value
    for name, value in fields.items()
    if name.partition('.')[0] in SECTIONS or name in FIELDS
  }
  return json.loads(json.dumps(found))


@functools.cache
def _digest_of_sources() -> str:
  """Returns a hash of this package's code, of which the step is compiled."""
  package = pathlib.Path(__file__).parent
  files = (path.read_bytes() for path in sorted(package.rglob('*.py')))
  return hashlib.sha256(b'\0'.join(files)).hexdigest()[:16]


def _version(package: str) -> str | None:
  """Returns the version of a package, None if it is not installed."""
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None
