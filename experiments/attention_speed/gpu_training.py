"""What `gpu.py` measures of training: steps of a preset under FIRE."""

import dataclasses
import os
import pathlib
import statistics
import time
from typing import Any, NamedTuple

import jax
import numpy as np


class Run(NamedTuple):
  """A preset's training step.

  Attributes:
    size: a key of presets.PRESETS.
    length: of a row [tokens].
    rows: of a batch.
    attention: of config.ModelConfig.
    steps: to take, at least two.
    model: fields of its config to change.
  """

  size: str
  length: int
  rows: int
  attention: str
  steps: int
  model: dict[str, Any] = {}


def config_of(asked: Run):
  """Returns the config of a run of FIRE on one device."""
  from lex_fire import config, presets

  values = presets.make(
    asked.size,
    'fire',
    data={'length': asked.length, 'batch_size': asked.rows},
    model={'attention': asked.attention, **asked.model},
    optimizer={'warmup_steps': 0},  # so that a few steps show whether it learns
    mesh={'replica': 1},
  )
  return config.Config.from_dict(values)


def text(rows: int, length: int) -> dict[str, Any]:
  """Returns a batch of the bytes of Python's standard library."""
  tokens, count = b'', rows * (length + 1)
  for path in sorted(pathlib.Path(os.__file__).parent.glob('*.py')):
    tokens += path.read_bytes() if len(tokens) < count else b''
  tokens_BL = np.frombuffer(tokens[:count], np.uint8).astype(np.int32).reshape(rows, length + 1)
  return {
    'inputs_BL': tokens_BL[:, :-1],
    'targets_BL': tokens_BL[:, 1:],
    'loss_weights_BL': np.ones((rows, length), np.float32),
    'position_BL': None,
    'segment_ids_BL': None,
  }


def training(asked: Run) -> dict[str, Any]:
  """Takes steps on one batch; returns seconds and loss of each, and what the compiler says."""
  from lex_fire import compile as compile_lib
  from lex_fire import metrics, sharding, topologies, train

  config = config_of(asked)
  mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh), devices=jax.devices()[:1])
  program = train.Program(config, mesh)
  step = compile_lib.training_step(config, program)
  found, compiled = compile_lib.measure(step, topologies.here())
  if compiled is None:
    raise MemoryError(f'{found["excess_bytes"] / 2**30:.1f} GiB more than there are')
  state, batch = program.init(), program.put(text(asked.rows, asked.length))
  jax.block_until_ready((state, batch))
  seconds, losses = [], []
  for _ in range(asked.steps):
    start = time.perf_counter()
    with jax.set_mesh(mesh):
      state, values = compiled(state, batch)
    losses.append(float(values['loss']))
    seconds.append(time.perf_counter() - start)
  a_step = statistics.median(seconds[1:])  # the first may wait for what is loaded then
  per_second = asked.rows * asked.length / a_step
  flops = metrics.train_flops_per_token(config.model, asked.length) * per_second
  return {
    **asked._asdict(),
    'parameters': sum(leaf.size for leaf in jax.tree.leaves(state['params'])),
    'implementation': step.about['attention']['implementation'],
    'seconds': seconds,
    'a_step': a_step,
    'losses': losses,
    'tokens_per_second': per_second,
    'utilization': metrics.utilization(flops * jax.device_count()),  # of the one that works
    'bytes': found['bytes'],
  }
