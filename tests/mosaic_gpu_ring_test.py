"""Rows that GPUs hold in parts, by the kernel for them: two devices, interpreted, as one."""

import functools

import jax
import jax.numpy as jnp
import mosaic_gpu_test
import numpy as np
import pytest
import ring_test
from jax._src.pallas.mosaic_gpu.interpret import params as interpreter
from jax._src.pallas.mosaic_gpu.interpret import shared_memory
from mosaic_gpu_test import _a_kernel_compiles_once  # noqa: F401  (a fixture, found by its name)

from lex_fire import encodings, kernels, sharding
from lex_fire.kernels import chunked, flash, mosaic_gpu, ring

LENGTH = 240  # parts of 120, whose chunks no tile divides
POSITION_1L, FIRST = np.arange(LENGTH, dtype=np.int32)[None], 130
PACKED = np.where(POSITION_1L < FIRST, POSITION_1L, POSITION_1L - FIRST), POSITION_1L >= FIRST


@pytest.fixture
def two_gpus(monkeypatch):
  """A mesh of two, whose rows are cut in parts and attended to by the ring of the kernel."""
  interpreted = functools.partial(mosaic_gpu.attention, interpret=interpreter.InterpretGPUParams())
  of_kernel = functools.partial(ring.attention, interpreted, flash.on_ring)
  monkeypatch.setitem(kernels.RINGS, 'mosaic_gpu_ring', of_kernel)
  # A device that ends before another would find its barriers, and take them for its own.
  memory = shared_memory.GPUSharedMemory
  monkeypatch.setattr(memory, 'assert_no_barriers_allocated', lambda _: None)
  monkeypatch.setitem(kernels.PLATFORM, 'mosaic_gpu', 'cpu')
  return sharding.make_mesh(1, 1, 2, 1, devices=jax.devices()[:2])


def arrays(dtype):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(size=(1, LENGTH, heads, 64)), dtype) for heads in (2, 1, 1)]


def out_and_gradients(attention, encoding, mask, arrays, order_L):
  """Returns out_BQHC and gradients, in the text's order, of rows that lie in another."""
  laid = [x_BLHC[:, order_L] for x_BLHC in arrays]
  position_1L, segment_1L = (jnp.asarray(x_1L[:, order_L], jnp.int32) for x_1L in PACKED)
  params = mosaic_gpu_test.make(encoding.name, {})[1]
  of_tokens = np.random.default_rng(1).normal(size=arrays[0].shape)[:, order_L]

  def functional(params, arrays):
    where = (position_1L,) * 2, (segment_1L,) * 2, mask
    out_BQHC = mosaic_gpu_test.attend(attention, encoding, params, arrays, *where)
    return (out_BQHC.astype(jnp.float32) * of_tokens).sum(), out_BQHC

  gradients, out_BQHC = jax.jit(jax.grad(functional, argnums=(0, 1), has_aux=True))(params, laid)
  back_L = np.argsort(order_L)
  return out_BQHC[:, back_L], gradients[0], *(x_BLHC[:, back_L] for x_BLHC in gradients[1])


@pytest.mark.parametrize(
  ('name', 'mask', 'dtype', 'tolerance'),
  [
    ('fire', {}, jnp.float32, 1e-4),
    ('sandwich', {'window': 40}, jnp.bfloat16, 0.01),  # where many see nothing of a device's keys
    ('xpos', {'causal': False}, jnp.float32, 1e-4),
  ],
)
def test_the_ring_of_the_kernel_gives_what_one_device_does(two_gpus, name, mask, dtype, tolerance):
  encoding, mask = encodings.get(name)._replace(rotate=None), kernels.Mask(**mask)
  on_ring = functools.partial(
    kernels.attention, implementation='mosaic_gpu', split=sharding.split, sequence_axis='sequence'
  )
  with jax.set_mesh(two_gpus):
    order_L = ring.zigzag(LENGTH, 2, 'a row')
    found = out_and_gradients(on_ring, encoding, mask, arrays(dtype), order_L)

  wide = [x_BLHC.astype(jnp.float32) for x_BLHC in arrays(dtype)]
  expected = out_and_gradients(chunked.attention, encoding, mask, wide, np.arange(LENGTH))
  assert all(x_BLHC.dtype == dtype for x_BLHC in (found[0], *found[2:]))
  ring_test.check_alike(jax.tree.map(np.float32, found), expected, most=tolerance)
