"""What a run reports: numbers by step in metrics.jsonl and TensorBoard, and a line with the ETA."""

import contextlib
import json
import math
import pathlib
import time
from collections.abc import Iterator

import jax

from lex_fire import config as config_lib
from lex_fire import errors, events, storage

# Peak of dense bfloat16 products a chip [FLOP/s], from the vendors' data sheets; by JAX's
# device_kind.
PEAK_FLOPS = {
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5': 459e12,
  'TPU v6 lite': 918e12,
  'NVIDIA A100-SXM4-40GB': 312e12,
  'NVIDIA A100-SXM4-80GB': 312e12,
  'NVIDIA H100 80GB HBM3': 989e12,
  'NVIDIA H200': 989e12,
  'NVIDIA B200': 2250e12,
}


def train_flops_per_token(c: config_lib.ModelConfig, length: int) -> float:
  """Returns the model FLOPs to train on one token: 6 P + 12 N H C K, K the keys that a query sees.

  As in PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B): forward and backward are three
  times the forward, in which each weight of a matrix product (P of them, the output layer's
  included) costs 2, and each key costs 2 C a head for its logit and 2 C for its value. A causal
  query sees (L + 1) / 2 on average, where PaLM counts all L, which a bidirectional one sees. What
  rematerialization computes again does not count.
  """
  projections = 2 * c.d_model * c.head_dim * (c.num_heads + c.num_kv_heads)
  mlp = (3 if c.activation == 'swiglu' else 2) * c.d_model * c.d_ff
  weights = c.num_layers * (projections + mlp) + c.d_model * c.vocab_size
  keys = (length + 1) / 2 if c.causal else length
  return 6.0 * weights + 12.0 * c.num_layers * c.num_heads * c.head_dim * keys


def utilization(flops_per_second: float) -> float | None:
  """Returns the fraction of all devices' peak that model FLOPs reach (MFU); None if unlisted."""
  peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
  return None if peak is None else flops_per_second / (peak * jax.device_count())


_BUCKET_SECONDS = 30.0  # between uploads of metrics.jsonl
_EVENTS_SECONDS = 30.0  # between writes of TensorBoard's events, which wait for the disk


class Writer:
  """Appends metrics by step; on a resume it first drops what lies past the checkpoint.

  Only the first process writes.
  """

  def __init__(self, workdir: pathlib.Path, first_step: int):
    """Opens the logs of a run whose next step is `first_step`, counted from 0.

    Raises:
      errors.UserError: if they cannot be written, as on a full disk; so do all the others.
    """
    self._path = workdir / 'metrics.jsonl'
    self._unwritten, self._wrote, self._flushed = '', -math.inf, -math.inf
    self._active = jax.process_index() == 0
    if self._active:
      with self._writing():
        _truncate(self._path, first_step)
        self._events = events.Events(workdir, first_step + 1)

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    try:
      yield
    except OSError as error:
      raise errors.UserError(
        f'metrics cannot be written into {str(self._path.parent)!r}: {error.strerror or error}; '
        'make room, and run the same command again, which goes on from the last checkpoint'
      ) from error

  def write(self, step: int, values: dict[str, float]) -> None:
    """Writes the values after `step` steps."""
    if not self._active:
      return
    self._unwritten += json.dumps({'step': step, **values}) + '\n'
    # In a bucket each time is an upload of the whole file.
    pause = _BUCKET_SECONDS if storage.is_bucket(self._path) else 0.0
    self._events.write(step, values)
    if time.monotonic() - self._wrote >= pause:
      self._append()
    if time.monotonic() - self._flushed >= _EVENTS_SECONDS:
      self.flush()

  def _append(self) -> None:
    if self._unwritten:
      with self._writing():
        storage.append(self._path, self._unwritten)
      self._unwritten, self._wrote = '', time.monotonic()

  def flush(self) -> None:
    """Writes what is in memory."""
    self._append()
    if self._active:
      with self._writing():
        self._events.flush()
      self._flushed = time.monotonic()


def _truncate(path: pathlib.Path, last_step: int) -> None:
  """Keeps the lines up to `last_step`; a line that a kill cut short is dropped too."""
  if not path.exists():
    return
  kept = []
  for line in path.read_bytes().splitlines():
    try:
      if json.loads(line)['step'] <= last_step:
        kept.append(line + b'\n')
    except ValueError:
      break
  storage.write(path, b''.join(kept))


class Pace:
  """Measures tokens a second and the time left, leaving out the first step, which compiles."""

  def __init__(self, first_step: int, steps: int, tokens_per_step: int):
    """Starts at `first_step` of `steps`."""
    self._steps, self._tokens_per_step = steps, tokens_per_step
    self._first_step, self._start = first_step, time.monotonic()
    self._last = (first_step, self._start)

  def warm(self, step: int) -> None:
    """Says that `step` steps are done and compiled: measuring starts here."""
    self._first_step, self._start = step, time.monotonic()
    self.resume(step)

  def resume(self, step: int) -> None:
    """Says that a pause after `step` steps is over: the rate leaves it out, not the time left."""
    self._last = (step, time.monotonic())

  def measure(self, step: int) -> tuple[float, float] | None:
    """Returns tokens/s since the last call, and the seconds left at the mean pace so far.

    None if there has been no step since, or none but the one that compiled.
    """
    now = time.monotonic()
    last_step, last = self._last
    if step == last_step:
      return None
    self._last = (step, now)
    rate = (step - last_step) * self._tokens_per_step / max(now - last, 1e-9)
    per_step = (now - self._start) / (step - self._first_step)
    return rate, per_step * (self._steps - step)


def clock(seconds: float) -> str:
  """Returns a duration as 1:02:03 or 2:03."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'
