"""Gradients of attention have the same bits in each run: every sum is made in a fixed order.

Two runs on an idle machine agree even where nothing but chance keeps an order. So programs are also
searched for sums that leave it open, and runs differ in what may differ: another order of what a
TPU may do in any, threads that wait for others, races looked for in a GPU's shared memory.
"""

import contextlib
import functools
import math
import threading

import jax
import jax.numpy as jnp
import kernels_test
import mosaic_gpu_test
import numpy as np
import pytest
import ring_test
from jax._src.pallas.mosaic_gpu.interpret import params as gpu_interpreter
from jax.experimental.pallas import tpu as pltpu
from jax.extend import core
from mosaic_gpu_test import _a_kernel_compiles_once  # noqa: F401  (a fixture, found by its name)

from lex_fire import encodings, kernels
from lex_fire.kernels import mosaic_gpu, mosaic_tpu, ring


def steps(jaxpr):
  """Yields all equations of a program, those of its loops and kernels too."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda x: isinstance(x, core.Jaxpr)
    ):
      inner = getattr(inner, 'jaxpr', inner)
      if isinstance(inner, core.Jaxpr):
        yield from steps(inner)


def leaves_order_open(equation):
  """Whether it adds numbers, of which two may meet, in an order of the device's choice."""
  name = equation.primitive.name
  if name != 'scatter-add':
    return 'atomic' in name
  operand, indices = (operand.aval for operand in equation.invars[:2])
  windows = math.prod(indices.shape[:-1])
  rounds = jnp.issubdtype(operand.dtype, jnp.inexact)
  return rounds and windows > 1 and not equation.params['unique_indices']


def open_sums(function, *arguments):
  program = jax.make_jaxpr(function)(*arguments)
  return [str(equation) for equation in steps(program.jaxpr) if leaves_order_open(equation)]


def test_the_search_sees_sums_in_any_order():
  x_Z, index_Z = jnp.ones(3), jnp.array([0, 2, 2])

  def taken(x_Z):
    return jax.lax.fori_loop(0, 2, lambda _, total: total + x_Z[index_Z].sum(), 0.0)

  assert len(open_sums(lambda: x_Z.at[index_Z].add(1.0))) == 1
  assert len(open_sums(jax.jit(jax.grad(jax.checkpoint(taken))), x_Z)) == 1
  assert not open_sums(lambda: x_Z.at[1].add(1.0))
  assert not open_sums(lambda: index_Z.at[index_Z].add(1))


# {implementation: case -> (function of params and arrays, these)}, whose gradient is the program.


def on_one_device(implementation, case, length=24, rows=2):
  encoding, params = kernels_test.make(case)
  where = kernels_test.POSITION_BL[:rows, :length], None, kernels_test.SEGMENT_BL[:rows, :length]
  attend = functools.partial(kernels_test.attend, implementation, encoding)
  arrays = kernels_test.inputs(rows, length, length)
  return lambda params, arrays: attend(params, arrays, *where).sum(), params, arrays


def on_gpu(case, interpret=False):
  encoding, params = mosaic_gpu_test.make(*mosaic_gpu_test.CASES[case])
  (position_BL, _), (segment_BL, _), mask = mosaic_gpu_test.where(mosaic_gpu_test.PACKED, 'causal')

  def total(params, arrays):
    return mosaic_gpu.attention(
      *arrays,
      encoding=encoding,
      params=params,
      query_position_BQ=position_BL,
      key_position_BK=position_BL,
      query_segment_BQ=segment_BL,
      key_segment_BK=segment_BL,
      mask=mask,
      interpret=interpret,
    ).sum()

  dtype = jnp.float32 if interpret else jnp.bfloat16
  return total, params, [jnp.asarray(x, dtype) for x in mosaic_gpu_test.inputs(1, 64)]


def on_ring(name):
  """To be called on a mesh."""
  encoding = encodings.get(name, **ring_test.OPTIONS.get(name, {}))
  order_L = ring.zigzag(ring_test.LENGTH, 4, 'a row')
  *arrays, position_BL, segment_BL = (x_BL[:, order_L] for x_BL in ring_test.arrays())
  attend = ring_test.attend(encoding, kernels.Mask())

  def total(params, arrays):
    return attend(params, *arrays, position_BL, segment_BL).sum()

  return total, ring_test.parameters(encoding), arrays


def gradient(function):
  return jax.grad(function, argnums=(0, 1))


@pytest.mark.parametrize(
  ('implementation', 'case'),
  [
    (i, c)
    for i in ('chunked', 'mosaic_tpu')
    for c in kernels_test.CASES
    if kernels_test.is_able(i, c)
  ],
)
def test_no_sum_of_a_gradient_is_made_in_any_order(implementation, case):
  function, *arguments = on_one_device(implementation, case)

  assert not open_sums(gradient(function), *arguments)


@pytest.mark.parametrize('case', mosaic_gpu_test.CASES)
def test_no_sum_of_a_gradient_on_a_gpu_is_made_in_any_order(case):
  function, *arguments = on_gpu(case)

  assert not open_sums(gradient(function), *arguments)


# Not the rows of a table of embeddings, which are taken before attention.
@pytest.mark.parametrize('name', [n for n in encodings.ENCODINGS if not encodings.get(n).embed])
def test_no_sum_of_a_gradient_on_a_ring_is_made_in_any_order(name):
  with jax.set_mesh(ring_test.make_mesh(ring_test.FOUR)):
    function, *arguments = on_ring(name)
    assert not open_sums(gradient(function), *arguments)


# Runs


@contextlib.contextmanager
def busy(threads=1):
  """Works meanwhile, so that threads wait for one another elsewhere than before."""
  done = threading.Event()

  def work():
    while not done.is_set():
      np.ones((200, 200)) @ np.ones((200, 200))

  workers = [threading.Thread(target=work) for _ in range(threads)]
  for worker in workers:
    worker.start()
  yield
  done.set()
  for worker in workers:
    worker.join()


def assert_same_bits(first, second):
  for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
    assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def twice(function, *arguments):
  """Returns what a compiled gradient gives alone, and beside other work."""
  run = jax.jit(gradient(function))
  alone = jax.block_until_ready(run(*arguments))
  with busy():
    return alone, jax.block_until_ready(run(*arguments))


def test_tiles_give_the_same_bits_beside_other_work():
  assert_same_bits(*twice(*on_one_device('chunked', 'fire 2 layers')))


def test_a_ring_gives_the_same_bits_beside_other_work():
  with jax.set_mesh(ring_test.make_mesh(ring_test.FOUR)):
    assert_same_bits(*twice(*on_ring('fire')))


def test_the_tpu_kernel_gives_the_same_bits_in_any_order_that_it_leaves_open(monkeypatch):
  """Rows of the batch and blocks of heads, in turn and shuffled."""
  problem = 'mosaic_tpu', 'fire+fire_s', 40, 3
  function, *arguments = on_one_device(*problem)
  in_turn = jax.jit(gradient(function))(*arguments)
  shuffled = functools.partial(
    mosaic_tpu.attention, block=16, interpret=pltpu.InterpretParams(random_seed=1)
  )
  monkeypatch.setitem(kernels_test.IMPLEMENTATIONS, 'mosaic_tpu', shuffled)

  function, *arguments = on_one_device(*problem)

  assert_same_bits(in_turn, jax.jit(gradient(function))(*arguments))


def test_the_gpu_kernel_gives_the_same_bits_beside_other_work_and_has_no_race(capsys):
  interpret = gpu_interpreter.InterpretGPUParams(detect_races=True)

  assert_same_bits(*twice(*on_gpu('fire', interpret)))
  assert 'RACE DETECTED' not in capsys.readouterr().out  # which the interpreter prints
