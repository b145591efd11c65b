"""What is timed: attention on one sequence by each implementation, under each encoding, and peers.

A program is a function that runs once, to its end, and returns the seconds that a pass took.
"""

import functools
import json
import pathlib
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


def inputs(encoding: encodings.Encoding, case: Case) -> tuple[Any, jax.Array, list[jax.Array]]:
  """Returns parameters, the gradient of the output, and query, key and value, all random."""
  rng, *rngs = jax.random.split(jax.random.key(0), 5)
  params = encoding.init(rng, num_heads=HEADS, head_dim=HEAD_DIM, d_model=HEADS * HEAD_DIM)
  shape = (1, case.length, HEADS, HEAD_DIM)
  d_out, *arrays = (jax.random.normal(rng, shape).astype(case.dtype) for rng in rngs)
  return params, d_out, arrays


def one_pass(attend: Callable[..., jax.Array], backward: bool) -> Callable[..., Any]:
  """Returns (params, d_out, query, key, value) -> the output, or its gradients too."""

  def run(params, d_out, *arrays):
    if not backward:
      return attend(params, *arrays)
    out, pull = jax.vjp(attend, params, *arrays)
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


def attention(implementation: str, encoding: encodings.Encoding, length: int):
  """Returns (params, query, key, value) -> out_BLHC of the library, rotations included."""
  position_BL = jnp.arange(length)[None]

  def attend(params, query_BLHC, key_BLHC, value_BLHC):
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


def with_dense_bias(attend: Callable[..., jax.Array], encoding: encodings.Encoding, length: int):
  """Returns (params, query, key, value) -> out_BLHC of a library that takes the bias whole."""
  position_BL = jnp.arange(length)[None]

  def with_bias(params, query_BLHC, key_BLHC, value_BLHC):
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

  return library.dot_product_attention


LIBRARIES = {'jax.nn': jax_nn, 'tokamax': tokamax}


def make(implementation: str, encoding: str, case: Case) -> Program:
  """Returns the program of one of the library's implementations, or of a JAX library beside it."""
  made = encoding_of(encoding)
  if implementation in LIBRARIES:
    attend = with_dense_bias(LIBRARIES[implementation](), made, case.length)
  else:
    attend = attention(implementation, made, case.length)
  params, d_out, arrays = inputs(made, case)
  return timed(one_pass(attend, case.backward), params, d_out, *arrays)


class Torch:
  """A process of PyTorch that runs a pass whenever it is asked, and else waits."""

  def __init__(self, python: str, threads: int):
    """Starts it.

    Args:
      python: the interpreter that can import torch.
      threads: that it may use on a CPU.

    Raises:
      errors.UserError: if torch cannot be imported there.
    """
    script = str(pathlib.Path(__file__).parent / 'peers_torch.py')
    self._process = subprocess.Popen(
      [python, script, f'--threads={threads}'],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    self.about = json.loads(self._process.stdout.readline() or '{"reason": "it ended"}')
    if 'reason' in self.about:
      self.close()
      raise errors.UserError(
        f'{python} has no torch ({self.about["reason"]}); give --torch_python another'
      )

  def make(self, implementation: str, encoding: str, case: Case) -> Program:
    """Returns the program of torch.NAME, one of its IMPLEMENTATIONS.

    Raises:
      RuntimeError: with what the library says, if it cannot run that.
    """
    name = implementation.removeprefix('torch.')
    request = {'implementation': name, 'encoding': encoding, **case._asdict()}

    def seconds():
      self._process.stdin.write(json.dumps(request) + '\n')
      self._process.stdin.flush()
      found = json.loads(self._process.stdout.readline())
      if 'reason' in found:
        raise RuntimeError(found['reason'])
      return found['seconds']

    seconds()
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


def start_torch(python: str, threads: int) -> Torch | NoTorch:
  """Starts PyTorch if `python` has it."""
  try:
    return Torch(python, threads)
  except (errors.UserError, OSError) as error:
    return NoTorch(str(error))
