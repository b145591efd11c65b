"""What attention costs under each encoding, forward and backward, over that without any.

    python -m experiments.zoo.costs

Writes costs.json beside this file, and prints it. A ratio is the median over rounds, each of which
runs every encoding once; better on a machine that does nothing else.
"""

import json
import operator
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp

from lex_fire import cli, encodings, kernels

HERE = pathlib.Path(__file__).parent
NUM_HEADS, HEAD_DIM, LENGTH, ROUNDS = 12, 64, 2048, 30


def measure() -> dict[str, float]:
  """Returns the time of attention forward and backward under each encoding, NoPE's being 1."""
  position_BL = jnp.arange(LENGTH)[None]
  shape = (1, LENGTH, NUM_HEADS, HEAD_DIM)
  arrays = [jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 3)]

  def timed(name):
    encoding = encodings.get(name)
    params = encoding.init(
      jax.random.key(1),
      num_heads=NUM_HEADS,
      head_dim=HEAD_DIM,
      d_model=NUM_HEADS * HEAD_DIM,
    )

    def total(params, query_BLHC, key_BLHC, value_BLHC):
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
      ).sum()

    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))
    return lambda: jax.block_until_ready(gradient(params, *arrays))

  programs = {name: timed(name) for name in encodings.ENCODINGS}
  seconds = {name: [] for name in programs}
  for done in range(ROUNDS + 1):
    for name, program in programs.items():
      start = time.perf_counter()
      program()
      if done:  # the first round compiles
        seconds[name].append(time.perf_counter() - start)
    print(f'cost: round {done} of {ROUNDS}', flush=True)
  return {
    name: statistics.median(map(operator.truediv, values, seconds['nope']))
    for name, values in seconds.items()
  }


def main() -> None:
  """The command."""
  ratios = measure()
  text = json.dumps({name: round(ratio, 4) for name, ratio in ratios.items()}, indent=2)
  (HERE / 'costs.json').write_text(f'{text}\n')
  print(text)


if __name__ == '__main__':
  cli.run(main)
