"""What is timed: attention on one sequence by each implementation, under each encoding, and peers.

A program is a function that runs once, to its end, and returns the seconds that a pass took.
"""

import functools
import json
import pathlib
import select
import subprocess
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lex_fire import config as config_lib
from lex_fire import encodings, errors, kernels

HEADS, HEAD_DIM = 12, 64
TRAIN_LENGTH = 2048  # of the encodings that want to be told it, as of FIRE's models [tokens]
LEAST_TURN = (
  0.02  # seconds; shorter passes are repeated, so that the clock and the call do not count
)

Program = Callable[[], float]


class Case(NamedTuple):
  """One sequence.

  Attributes:
    length: [tokens].
    backward: whether gradients of queries, keys, values and parameters are computed too.
    dtype: of queries, keys and values.
  """

  length: int
  backward: bool
  dtype: str


def encoding_of(text: str) -> encodings.Encoding:
  """Makes NAME or NAME:OPTION=VALUE,OPTION=VALUE."""
  return config_lib.EncodingConfig(text.partition(':')[0]).replaced_by(text, TRAIN_LENGTH).make()


def inputs(encoding: encodings.Encoding, case: Case) -> tuple[Any, ...]:
  """Returns what a pass takes: positions, and all random, parameters, the gradient of the output,
  query, key and value."""
  rng, *rngs = jax.random.split(jax.random.key(0), 5)
  params = encoding.init(rng, num_heads=HEADS, head_dim=HEAD_DIM, d_model=HEADS * HEAD_DIM)
  shape = (1, case.length, HEADS, HEAD_DIM)
  d_out, *arrays = (jax.random.normal(rng, shape).astype(case.dtype) for rng in rngs)
  return jnp.arange(case.length)[None], params, d_out, *arrays


def one_pass(attend: Callable[..., jax.Array], backward: bool) -> Callable[..., Any]:
  """Returns a pass, of what `inputs` makes: it returns the output, or its gradients too.

  Positions are an argument, as in a model: what follows from constants, XLA computes beforehand.
  """

  def run(position_BL, params, d_out, *arrays):
    attend_there = functools.partial(attend, position_BL)
    if not backward:
      return attend_there(params, *arrays)
    out, pull = jax.vjp(attend_there, params, *arrays)
    return out, pull(d_out)

  return jax.jit(run)


def timed(run: Callable[..., Any], *arguments: Any) -> Program:
  """Returns the program of a pass, compiled."""

  def seconds(repeats):
    start = time.perf_counter()
    for _ in range(repeats):
      out = run(*arguments)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / repeats

  seconds(1)
  return functools.partial(seconds, max(1, round(LEAST_TURN / seconds(1))))


def attention(implementation: str, encoding: encodings.Encoding):
  """Returns (position, params, query, key, value) -> out_BLHC of the library, rotations too."""

  def attend(position_BL, params, query_BLHC, key_BLHC, value_BLHC):
    if encoding.rotate is not None:
      query_BLHC = encoding.rotate(params, query_BLHC, position_BL)
      key_BLHC = encoding.rotate(params, key_BLHC, position_BL)
    return kernels.attention(
      query_BLHC,
      key_BLHC,
      value_BLHC,
      encoding=encoding,
      params=params,
      query_position_BQ=position_BL,
      key_position_BK=position_BL,
      implementation=implementation,
    )

  return attend


def with_dense_bias(attend: Callable[..., jax.Array], encoding: encodings.Encoding):
  """Returns (position, params, query, key, value) -> out_BLHC of what takes the bias whole."""

  def with_bias(position_BL, params, query_BLHC, key_BLHC, value_BLHC):
    bias_BHQK = None
    if encoding.bias is not None:
      bias_BHQK = encoding.bias(params, position_BL, position_BL, HEADS).astype(query_BLHC.dtype)
    return attend(query_BLHC, key_BLHC, value_BLHC, bias=bias_BHQK, is_causal=True)

  return with_bias


def jax_nn() -> Callable[..., jax.Array]:
  """Returns JAX's own attention: cuDNN's kernel on a GPU, elsewhere what XLA makes of it."""
  implementation = 'cudnn' if jax.default_backend() == 'gpu' else 'xla'
  return functools.partial(jax.nn.dot_product_attention, implementation=implementation)


def tokamax() -> Callable[..., jax.Array]:
  """Returns the best that tokamax has here."""
  import tokamax as library  # pyright: ignore[reportMissingImports]
  from absl import flags

  flags.FLAGS.mark_as_parsed()  # else it would read this command's own as its own
  return library.dot_product_attention


LIBRARIES = {'jax.nn': jax_nn, 'tokamax': tokamax}


def pass_of(implementation: str, encoding: encodings.Encoding, backward: bool):
  """Returns `one_pass` of an implementation of the library, or of a JAX library beside it."""
  if implementation in LIBRARIES:
    return one_pass(with_dense_bias(LIBRARIES[implementation](), encoding), backward)
  return one_pass(attention(implementation, encoding), backward)


def compiled(implementation: str, encoding: str, case: Case) -> tuple[Any, tuple[Any, ...]]:
  """Returns `pass_of` an implementation, compiled, and what it takes."""
  made = encoding_of(encoding)
  arguments = inputs(made, case)
  return pass_of(implementation, made, case.backward).lower(*arguments).compile(), arguments


def make(implementation: str, encoding: str, case: Case) -> Program:
  """Returns the program of `pass_of` an implementation."""
  run, arguments = compiled(implementation, encoding, case)
  return timed(run, *arguments)


class Torch:
  """A process of PyTorch that runs a pass whenever it is asked, and else waits."""

  def __init__(self, python: str, threads: int, limit: float | None = None):
    """Starts it.

    Args:
      python: the interpreter that can import torch.
      threads: that it may use on a CPU.
      limit: seconds that an answer may take, compilation included, and ten passes; what takes
        longer is not tried again. None: any.

    Raises:
      errors.UserError: if torch cannot be imported there.
    """
    self._python, self._limit, self._slow = python, limit, set()
    script = str(pathlib.Path(__file__).parent / 'peers_torch.py')
    self._command = [python, script, f'--threads={threads}']
    self._start()

  def _start(self) -> None:
    pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE}
    self._process = subprocess.Popen(self._command, **pipes, text=True)
    self.about = self._answer()
    if 'reason' in self.about:
      self.close()
      raise errors.UserError(
        f'{self._python} has no torch ({self.about["reason"]}); give --torch_python another'
      )

  def _answer(self) -> dict[str, Any]:
    """Returns the next line; ends a process that says none in time, and raises TimeoutError."""
    answers = self._process.stdout
    if self._limit is not None and not select.select([answers], [], [], self._limit)[0]:
      self._process.kill()
      self.close()
      raise TimeoutError(f'no answer within {self._limit:.0f} s')
    return json.loads(answers.readline() or '{"reason": "it ended"}')

  def make(self, implementation: str, encoding: str, case: Case) -> Program:
    """Returns the program of torch.NAME, one of its IMPLEMENTATIONS.

    Raises:
      RuntimeError: with what the library says, if it cannot run that.
      TimeoutError: if it is too slow, or was at another length.
    """
    name = implementation.removeprefix('torch.')
    asked = name, encoding, case.backward
    if asked in self._slow:
      raise TimeoutError('not tried, as it was too slow at another length')
    request = {'implementation': name, 'encoding': encoding, **case._asdict()}

    def seconds():
      if self._process.poll() is not None:
        self._start()
      self._process.stdin.write(json.dumps(request) + '\n')
      self._process.stdin.flush()
      found = self._answer()
      if 'reason' in found:
        raise RuntimeError(found['reason'])
      return found['seconds']

    try:
      pass_seconds = seconds()
      if self._limit is not None and pass_seconds > self._limit / 10:
        raise TimeoutError(f'a pass takes {pass_seconds:.1f} s')
    except TimeoutError:
      self._slow.add(asked)
      raise
    return seconds

  def close(self) -> None:
    """Ends it."""
    self._process.communicate()


class NoTorch:
  """Stands where there is no torch: what it is asked for, it answers with the reason."""

  about = None

  def __init__(self, reason: str):
    """Takes the reason."""
    self._reason = reason

  def make(self, implementation: str, encoding: str, case: Case) -> Program:
    """Raises errors.UserError with the reason."""
    raise errors.UserError(self._reason)

  def close(self) -> None:
    """Has nothing to end."""


def start_torch(python: str, threads: int, limit: float | None = None) -> Torch | NoTorch:
  """Starts PyTorch if `python` has it."""
  try:
    return Torch(python, threads, limit)
  except (errors.UserError, OSError) as error:
    return NoTorch(str(error))
