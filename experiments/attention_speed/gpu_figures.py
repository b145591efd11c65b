"""What `gpu.py` measures of attention, a figure a call, which returns what goes into its JSON."""

import concurrent.futures
import functools
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.attention_speed import programs, run
from lex_fire import kernels

CHECK_HEADS, CHECK_KV_HEADS = 4, 2
ARRAYS = ('out', 'params', 'query', 'key', 'value')  # the output, and what has gradients


class Check(NamedTuple):
  """Attention to compare with the dense reference.

  Attributes:
    encoding: as in fire:hidden_layers=2.
    length: [tokens].
    mask: fields of kernels.Mask.
    segments: tokens of each of the packed segments; (): all is one.
    stride: of positions; a large one takes x over many breakpoints.
    channels: of a head.
    queries: that count, the last ones; None: all, which takes [length, length] logits.
    dtype: of queries, keys and values.
  """

  encoding: str
  length: int
  mask: dict[str, Any] = {}
  segments: tuple[int, ...] = ()
  stride: int = 1
  channels: int = 64
  queries: int | None = None
  dtype: str = 'bfloat16'

  @property
  def counted(self) -> int:
    """How many queries count."""
    return self.length if self.queries is None else self.queries

  def places(self) -> tuple[jax.Array, jax.Array | None]:
    """Returns position_1L and segment_1L."""
    lengths = self.segments or (self.length,)
    position_L = self.stride * np.concatenate([np.arange(length) for length in lengths])
    segment_L = np.repeat(np.arange(len(lengths)), lengths)
    return jnp.int32(position_L)[None], jnp.int32(segment_L)[None] if self.segments else None


def pull(check: Check, implementation: str):
  """Returns (position, segment, d_out, params, query, key, value) -> output, all gradients."""
  encoding, first = programs.encoding_of(check.encoding), check.length - check.counted
  start = first if implementation == 'reference' else 0  # it need not compute what does not count

  def attend(position_1L, segment_1L, params, query_BQHC, key_BKGC, value_BKGC):
    out_BQHC = kernels.attention(
      query_BQHC[:, start:],
      key_BKGC,
      value_BKGC,
      encoding=encoding,
      params=params,
      query_position_BQ=position_1L[:, start:],
      key_position_BK=position_1L,
      query_segment_BQ=None if segment_1L is None else segment_1L[:, start:],
      key_segment_BK=segment_1L,
      mask=kernels.Mask(**check.mask),
      implementation=implementation,
    )
    return out_BQHC[:, first - start :]

  @jax.jit
  def out_and_gradients(position_1L, segment_1L, d_out_BQHC, params, *arrays):
    attend_here = functools.partial(attend, position_1L, segment_1L)
    out_BQHC, pull_back = jax.vjp(attend_here, params, *arrays)
    return out_BQHC, *pull_back(d_out_BQHC)

  return out_and_gradients


def arguments(check: Check) -> tuple[Any, ...]:
  """Returns what `pull`'s function takes, all random."""
  encoding, size = programs.encoding_of(check.encoding), CHECK_HEADS * check.channels
  rng, *rngs = jax.random.split(jax.random.key(1), 5)
  sizes = {'num_heads': CHECK_HEADS, 'head_dim': check.channels, 'd_model': size}
  lengths = check.counted, *(check.length,) * 3
  heads = CHECK_HEADS, CHECK_HEADS, CHECK_KV_HEADS, CHECK_KV_HEADS
  shapes = [(1, length, n, check.channels) for length, n in zip(lengths, heads, strict=True)]
  d_out_BQHC, *arrays = [
    jax.random.normal(rng, shape).astype(check.dtype)
    for rng, shape in zip(rngs, shapes, strict=True)
  ]
  return *check.places(), d_out_BQHC, encoding.init(rng, **sizes), *arrays


def _error(found: Any, expected: Any) -> float:
  """Returns the norm of the difference of two trees over that of the second."""

  def norm(trees):
    return math.sqrt(sum(float(jnp.square(x).sum()) for x in trees))

  wide = jax.tree.map(jnp.float32, expected)
  difference = jax.tree.map(lambda one, other: one - other, found, wide)
  return norm(jax.tree.leaves(difference)) / (norm(jax.tree.leaves(wide)) or 1.0)


def correctness(implementation: str, check: Check) -> dict[str, Any]:
  """Returns the relative errors of a kernel's output and gradients, and if a rerun has their bits.

  The reference takes the same numbers in float32, and its products are in full float32.
  """
  given = arguments(check)
  attend = pull(check, implementation)
  found, again = attend(*given), attend(*given)
  places, numbers = given[:2], given[2:]
  with jax.default_matmul_precision('highest'):
    expected = pull(check, 'reference')(*places, *jax.tree.map(jnp.float32, numbers))
  pairs = dict(zip(ARRAYS, zip(found, expected, strict=True), strict=True))
  same = jax.tree.map(lambda one, other: bool((one == other).all()), found, again)
  return {
    'implementation': implementation,
    'errors': {name: _error(*pair) for name, pair in pairs.items()},
    'same_bits': all(jax.tree.leaves(same)),
  }


@functools.cache
def _torch(python: str, limit: float) -> programs.Torch | programs.NoTorch:
  return programs.start_torch(python, len(os.sched_getaffinity(0)), limit)


def turns(
  pairs: Sequence[tuple[str, str]], case: programs.Case, seconds: float, python: str, limit: float
) -> dict[str, Any]:
  """Returns the times of programs that take turns, and the reasons of those that cannot.

  Args:
    pairs: (implementation, encoding); the first is what the others are compared with.
    case: the sequence.
    seconds: for all rounds, about.
    python: that can import torch.
    limit: seconds that PyTorch may take for an answer.
  """
  of_torch = any(implementation.startswith('torch.') for implementation, _ in pairs)
  torch = _torch(python, limit) if of_torch else None
  made, absent = {}, []
  with concurrent.futures.ThreadPoolExecutor() as pool:
    jobs = {
      pair: pool.submit(programs.compiled, *pair, case)
      for pair in pairs
      if not pair[0].startswith('torch.')
    }
    concurrent.futures.wait(jobs.values())
  for pair in pairs:
    try:
      if pair in jobs:
        compiled, given = jobs.pop(pair).result()
        made[pair] = programs.timed(compiled, *given)
      elif torch is not None:
        made[pair] = torch.make(*pair, case)
    except Exception as error:  # a library says in many kinds of exceptions what it cannot do
      if pair == pairs[0]:
        raise
      absent.append(run.absence(*pair, case, error))
  times = run.take_turns(made, seconds, say=lambda line: None)
  return {
    'times': [{**case._asdict(), **row} for row in times],
    'absent': absent,
    'torch': None if torch is None else torch.about,
  }
