"""What does xPos cost over RoPE, which turns the same pairs and does not decay?

    python -m experiments.xpos_cost.run

Attention forward and backward, one sequence, 12 heads of 64, in one process, one after the other in
each round. Writes xpos_cost.json beside this file.
"""

import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from lex_fire import cli, encodings, kernels

HERE = pathlib.Path(__file__).parent
ROUNDS = {1024: 60, 2048: 30, 4096: 10}  # by length
HEADS, HEAD_DIM = 12, 64


def program(name: str, pairing: str, length: int):
  """Returns a function that runs attention forward and backward, compiled."""
  encoding = encodings.get(name, pairing=pairing)
  position_BL = jnp.arange(length)[None]
  keys = jax.random.split(jax.random.key(0), 3)
  arrays = [jax.random.normal(key, (1, length, HEADS, HEAD_DIM)) for key in keys]

  def total(query_BLHC, key_BLHC, value_BLHC):
    return kernels.attention(
      encoding.rotate({}, query_BLHC, position_BL),
      encoding.rotate({}, key_BLHC, position_BL),
      value_BLHC,
      encoding=encoding,
      params={},
      query_position_BQ=position_BL,
      key_position_BK=position_BL,
    ).sum()

  gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))
  jax.block_until_ready(gradient(*arrays))
  return lambda: jax.block_until_ready(gradient(*arrays))


def measure(pairing: str, length: int) -> dict[str, float]:
  """Returns the ratio of least times and the median of ratios by round."""
  programs = {name: program(name, pairing, length) for name in ('rope', 'xpos')}
  seconds = {name: [] for name in programs}
  for _ in range(ROUNDS[length]):
    for name, run in programs.items():
      start = time.perf_counter()
      run()
      seconds[name].append(time.perf_counter() - start)
  rope, xpos = (np.array(seconds[name]) for name in programs)
  return {'least': float(xpos.min() / rope.min()), 'median': float(np.median(xpos / rope))}


def main() -> None:
  """The experiment."""
  results = []
  for pairing in ('interleaved', 'halves'):
    for length in ROUNDS:
      results.append({'pairing': pairing, 'length': length, **measure(pairing, length)})
      print(results[-1], flush=True)
  (HERE / 'xpos_cost.json').write_text(json.dumps(results, indent=1) + '\n')


if __name__ == '__main__':
  cli.run(main)
