"""Accelerators that are not here, as devices to compile for: 'v5e:16x16', 'cuda:h200x8'.

Nothing can run on them. The compiler for TPU comes with requirements-tpu.txt, that for NVIDIA's
GPUs with requirements-cuda.txt.
"""

import contextlib
import importlib.util
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from lex_fire import errors
from lex_fire.data import lazy

_GIB = 2**30
TARGETS = pathlib.Path(__file__).parent / 'targets'  # GPUs, as XLA describes them


class Tpu(NamedTuple):
  """A generation of TPUs.

  Attributes:
    memory_bytes: of a chip (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e).
    shapes: of slices, such as are often used; the compiler takes others.
    longest: side of a slice [chips].
    options: that make a device of each chip, where it has two cores.
  """

  memory_bytes: int
  shapes: Sequence[str]
  longest: int
  options: Mapping[str, Any] = {}


TPUS = {
  'v4': Tpu(32 * _GIB, ('4x4x4',), 16, {'chip_config_name': 'megacore'}),
  'v5e': Tpu(16 * _GIB, ('4x4', '16x16'), 16),
  'v5p': Tpu(95 * _GIB, ('4x4x4', '4x8x8', '8x8x8'), 24),
  'v6e': Tpu(32 * _GIB, ('4x4', '16x16'), 16),
}
HERE = 'here'  # the devices that JAX has found
GPUS = tuple(sorted(path.stem for path in TARGETS.glob('*.txtpb')))
_PLUGINS = ('jax_cuda13_plugin', 'jax_cuda12_plugin')


class Topology(NamedTuple):
  """Chips to compile for.

  Attributes:
    name: as asked for.
    num_slices: of TPUs, that a slower network connects; 1 for GPUs.
    devices: one of jax a chip; they only compile.
    memory_bytes: what a program may have of a chip; None if nobody says.
    memory_source: who says so: 'compiler', 'documented' or, of those that are here, 'device'.
    options: of the compiler, that it needs where no such chip is.
  """

  name: str
  num_slices: int
  devices: Sequence[Any]
  memory_bytes: int | None
  memory_source: str
  options: Mapping[str, Any]


def known() -> list[str]:
  """Returns names of topologies, such as are often used."""
  tpus = [f'{name}:{shape}' for name, tpu in TPUS.items() for shape in tpu.shapes]
  return [*tpus, *(f'cuda:{name}x8' for name in GPUS)]


def find(name: str, num_slices: int = 1) -> Topology:
  """Returns the chips of a name.

  Args:
    name: of a generation of TPUs and the shape of a slice, like v5e:16x16, or cuda:CHIPxCOUNT, or
      HERE.
    num_slices: of TPUs.

  Raises:
    errors.UserError: for an unknown name or count, or if the compiler for it is not installed.
  """
  if num_slices < 1:
    raise errors.UserError(f'{num_slices=} must be at least 1')
  if name == HERE and num_slices != 1:
    raise errors.UserError(f'{num_slices=} is of TPUs that are not here; leave it out')
  if name == HERE:
    return here()
  kind, _, shape = name.partition(':')
  gpu = re.fullmatch(r'(\w+?)x([1-9]\d*)', shape)
  if kind == 'cuda' and gpu and gpu[1] in GPUS:
    return _gpus(name, gpu[1], int(gpu[2]), num_slices)
  if kind not in TPUS or not re.fullmatch(r'[1-9]\d*(x[1-9]\d*){1,2}', shape):
    raise errors.UserError(
      f'unknown topology={name!r}; known: {", ".join(known())}, and other shapes of these TPUs'
    )
  return _tpus(name, TPUS[kind], max(map(int, shape.split('x'))), num_slices)


def here() -> Topology:
  """Returns the devices that JAX has found; of CPUs nobody says what a program may have."""
  memory = jax.local_devices()[0].memory_stats() or {}
  return Topology(HERE, 1, jax.devices(), memory.get('bytes_limit'), 'device', {})


def _tpus(name: str, tpu: Tpu, longest: int, num_slices: int) -> Topology:
  # Asked to compile for more, libtpu ends the process.
  if longest > tpu.longest:
    raise errors.UserError(
      f'topology={name!r} is wider than any slice, whose sides have at most {tpu.longest} chips; '
      'take several of a smaller one by num_slices'
    )
  if importlib.util.find_spec('libtpu') is None:
    raise errors.UserError(
      f'topology={name!r} needs the compiler for TPU, which is not installed: '
      'pip install -r requirements-tpu.txt, in an environment of its own'
    )
  slices = {} if num_slices == 1 else {'num_slices': num_slices}
  with _no_tpu_here(), lazy.quiet_stderr():
    try:
      found = topologies.get_topology_desc(
        platform='tpu', topology_name=name, **tpu.options, **slices
      )
    except jax.errors.JaxRuntimeError as error:
      raise errors.UserError(
        f'the compiler has no topology={name!r}: {str(error).splitlines()[0]}; known: '
        f'{", ".join(known())}'
      ) from error
  usable = _usable_bytes(found.devices[0])
  source = 'documented' if usable is None else 'compiler'
  return Topology(name, num_slices, found.devices, usable or tpu.memory_bytes, source, {})


@contextlib.contextmanager
def _no_tpu_here() -> Iterator[None]:
  """Tells libtpu, as it is loaded, that it is asked for its compiler alone.

  It would look for its TPU, for a minute, and for others that use it. Where there is a TPU, it is
  left in peace.
  """
  only_compiles = {'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
  if jax.default_backend() == 'tpu':
    only_compiles = {}
  added = [name for name in only_compiles if name not in os.environ]
  for name in added:
    os.environ[name] = only_compiles[name]
  try:
    yield
  finally:
    for name in added:
      del os.environ[name]


def _usable_bytes(device: Any) -> int | None:
  """Returns what a program may have of a chip; None if the compiler does not say.

  It says so of a program that needs more than any chip has.
  """
  one_chip = jax.sharding.SingleDeviceSharding(device)
  eight_tebibytes = jax.ShapeDtypeStruct((2**20, 2**21), jnp.float32, sharding=one_chip)
  try:
    jax.jit(jnp.negative).lower(eight_tebibytes).compile()
  except jax.errors.JaxRuntimeError as error:
    needed = exhausted(error)
    return needed and needed[1]
  return None


def exhausted(error: Exception) -> tuple[int, int] | None:
  """Returns the bytes that a refused program needs, and those that it may have.

  None if it was refused for another reason, or the compiler says it in other words.
  """
  text = str(error)
  for pattern in (r'Used ([\d.]+[KMGT]) of ([\d.]+[KMGT]) hbm', r'\(([\d.]+\w)\) .*HBM \((.*?)\)'):
    match = re.search(pattern, text)
    if 'RESOURCE_EXHAUSTED' in text and match:
      return _bytes(match[1]), _bytes(match[2])
  return None


def _bytes(text: str) -> int:
  """Reads a number as XLA writes it: '15.75G'."""
  return round(float(text[:-1]) * 1024 ** ('KMGT'.index(text[-1]) + 1))


def has_cuda_compiler() -> bool:
  """Returns whether the compiler for NVIDIA's GPUs is installed: jax's plugin, and a ptxas.

  JAX finds that of NVIDIA's wheels by itself, and else needs one on the PATH.
  """
  wheels = importlib.util.find_spec('nvidia')
  folders = (wheels and wheels.submodule_search_locations) or ()
  of_wheels = any(any(pathlib.Path(folder).glob('*/bin/ptxas')) for folder in folders)
  has_plugin = any(map(importlib.util.find_spec, _PLUGINS))
  return has_plugin and (of_wheels or shutil.which('ptxas') is not None)


def _gpus(name: str, chip: str, count: int, num_slices: int) -> Topology:
  if num_slices != 1:
    raise errors.UserError(f'{num_slices=} is of TPUs; say how many GPUs by cuda:{chip}xCOUNT')
  if not has_cuda_compiler():
    raise errors.UserError(
      f"topology={name!r} needs jax's CUDA plugin and a CUDA toolkit's ptxas, and one of them is "
      'not here: pip install -r requirements-cuda.txt, in an environment of its own'
    )
  target = (TARGETS / f'{chip}.txtpb').read_text(encoding='utf-8')
  with lazy.quiet_stderr():
    found = topologies.get_topology_desc(
      platform='cuda', topology_name='', target_config=target, topology=f'1x1x{count}'
    )
  match = re.search(r'device_memory_size: (\d+)', target)
  assert match is not None
  # Of which JAX takes this part, unless it is told another (docs.jax.dev, GPU memory allocation).
  fraction = float(os.environ.get('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.75'))
  memory_bytes = int(fraction * int(match[1]))
  options = {'xla_gpu_autotune_level': 0}  # which would run what it compares
  return Topology(name, 1, found.devices, memory_bytes, 'documented', options)
