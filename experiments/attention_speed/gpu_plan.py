"""What `gpu.py` measures, the most important first."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from experiments.attention_speed import gpu_figures, gpu_training, programs, results, run


class Figure(NamedTuple):
  """What is measured at once.

  Attributes:
    stage: figures of one stage share a process.
    name: unique.
    of: the implementation without which it makes no sense.
    expected: seconds that it should take, compilation included.
    measure: () -> JSON; what it says of itself.
  """

  stage: str
  name: str
  of: str
  expected: float
  measure: Callable[[], dict[str, Any]]

  @property
  def limit(self) -> float:
    """After how many seconds it is given up."""
    return 45 + 2 * self.expected  # XLA tries what is fastest, which takes its time


class Sizes(NamedTuple):
  """What of a plan depends on the machine.

  Attributes:
    kernel: that is measured.
    rival: its place in training, beside it.
    lengths: of attention, ascending [tokens].
    ragged: length of what is compared with dense attention, no multiple of a block [tokens].
    turns: seconds of all rounds of a figure.
    runs: (size, length, rows, steps, expected seconds) of presets; by the kernel and, but for the
      first, which would take too long, by its rival.
    model: fields of their config to change.
  """

  kernel: str = 'mosaic_gpu'
  rival: str = 'auto'
  lengths: tuple[int, ...] = (8192, 32768, 131072)
  ragged: int = 1500
  turns: float = 4.0
  runs: tuple[tuple[str, int, int, int, float], ...] = (
    ('large', 131072, 1, 2, 60.0),
    ('base', 2048, 16, 6, 15.0),
    ('large', 2048, 16, 6, 20.0),
    ('base', 32768, 1, 3, 20.0),
    ('large', 32768, 1, 3, 30.0),
  )
  model: dict[str, Any] = {}


H200 = Sizes()


def checks(sizes: Sizes) -> dict[str, gpu_figures.Check]:
  """Returns what the kernel is compared in."""
  length, longest = sizes.ragged, sizes.lengths[-1]
  part, check = length // 3, gpu_figures.Check
  return {
    'fire, ragged': check('fire', length, stride=16),
    'nope, packed': check('nope', length, segments=(part, length - part)),
    'fire, packed, window': check('fire', length, {'window': part}, segments=(part, length - part)),
    f'fire, {longest} tokens, their last 128 queries': check('fire', longest, queries=128),
    'fire of two layers, bidirectional, heads of 128': check(
      'fire:hidden_layers=2,width=16', length, {'causal': False}, channels=128
    ),
    # A row of 24,000 positions, where a stretch of the decay has 16,000.
    'xpos, bidirectional, two stretches': check('xpos', length, {'causal': False}, stride=16),
    'sandwich, heads of 256': check('sandwich', length, channels=256),
    'kerple_log, heads of 256, float32': check('kerple_log', length, channels=256, dtype='float32'),
  }


def plan(sizes: Sizes, python: str) -> Iterator[Figure]:
  """Yields all figures, the most important first.

  Args:
    sizes: of the machine.
    python: that can import torch.
  """
  kernel, turns = sizes.kernel, sizes.turns
  for name, check in checks(sizes).items():
    measure = functools.partial(gpu_figures.correctness, kernel, check)
    yield Figure('correctness', name, kernel, 7.0, measure)

  def figure(stage, pairs, length, backward, expected, limit=0.0):
    case = programs.Case(length, backward, 'bfloat16')
    name = f'{stage}, {results.PASSES[backward]}, {length}'
    measure = functools.partial(gpu_figures.turns, pairs, case, turns, python, limit)
    return Figure(stage, name, kernel, expected, measure)

  own = [(kernel, 'nope'), (kernel, 'fire')]
  libraries = [('jax.nn', 'nope'), ('tokamax', 'nope')]
  for length in sizes.lengths:
    for backward in results.PASSES:
      yield figure('attention', own + libraries, length, backward, 12.0)
  # First what may have to be ended, and then loses what PyTorch has compiled; other encodings and
  # the module, which holds all logits, at one length.
  fire = [own[1], ('torch.flex', 'fire'), ('torch.flex', 'fire, frozen')]
  more = [('torch.flex', 'nope'), ('torch.sdpa', 'fire'), ('torch.sdpa', 'nope')]
  for number, length in enumerate(sizes.lengths):
    pairs, expected = (fire, 25.0) if number else (fire + more, 45.0)
    yield figure('PyTorch', pairs, length, True, expected, limit=45.0)
  others = [(kernel, name) for name in run.ENCODINGS if name not in ('nope', 'fire')]
  yield figure('encodings', own[:1] + others, sizes.lengths[1], True, 25.0)
  for number, (size, length, rows, steps, expected) in enumerate(sizes.runs):
    for attention in (kernel, sizes.rival)[: 1 if number == 0 else 2]:
      asked = gpu_training.Run(size, length, rows, attention, steps, sizes.model)
      name = f'{size}, {rows} x {length} tokens, {attention}'
      measure = functools.partial(gpu_training.training, asked)
      yield Figure('training', name, attention, expected, measure)
