"""Time and memory of one pass in a process that has done nothing else, and what it ran on."""

import importlib.metadata
import os
import pathlib
import platform
import resource
import subprocess
import time
from typing import Any

import jax

from experiments.attention_speed import programs

HERE = pathlib.Path(__file__).parent


def commit() -> str:
  """Returns the commit of this file's repository, 'unknown' where there is none."""

  def git(*arguments):
    command = ['git', '-C', str(HERE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

  try:
    changed = ', and changes since' if git('status', '--porcelain', '../../lex_fire') else ''
    return git('rev-parse', '--short', 'HEAD') + changed
  except (OSError, subprocess.CalledProcessError):
    return 'unknown'


def _processor() -> str:
  """Returns what Linux calls the processor."""
  path = pathlib.Path('/proc/cpuinfo')
  lines = path.read_text().splitlines() if path.exists() else []
  names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
  return names[0] if names else platform.machine()


def machine() -> dict[str, Any]:
  """Returns what the measurements are of."""
  device = jax.devices()[0]
  names = ('jax', 'jaxlib', 'numpy')
  return {
    'platform': device.platform,
    'device': _processor() if device.platform == 'cpu' else device.device_kind,
    'threads': len(os.sched_getaffinity(0)),
    'load_before': os.getloadavg()[0],
    'python': platform.python_version(),
    **{name: importlib.metadata.version(name) for name in names},
    'commit': commit(),
  }


def measure(implementation: str, encoding: str, case: programs.Case) -> dict[str, Any]:
  """Compiles and runs one pass; to be called in a fresh process.

  Returns:
    The seconds; the bytes of XLA's temporaries; and the most bytes that were in use: of the
    process, Python, JAX and compiler included, and on an accelerator those of the device.
  """
  run, arguments = programs.compiled(implementation, encoding, case)
  jax.block_until_ready(arguments)
  start = time.perf_counter()
  jax.block_until_ready(run(*arguments))
  seconds = time.perf_counter() - start
  on_device = jax.devices()[0].memory_stats() or {}
  return {
    'implementation': implementation,
    'encoding': encoding,
    **case._asdict(),
    'seconds': seconds,
    'temporary_bytes': run.memory_analysis().temp_size_in_bytes,
    # Linux says it in KiB.
    'process_bytes': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    'device_bytes': on_device.get('peak_bytes_in_use'),
  }
