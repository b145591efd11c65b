"""Stand-ins for the instructions of NVIDIA's Blackwell, which JAX's interpreter has not."""

import dataclasses

import jax.numpy as jnp
from jax._src.state.types import TransformedRef, TransposeTransform
from jax.experimental.pallas import mosaic_gpu as plgpu


class TensorMemory:
  """Tensor memory and its products, by what they are documented to do.

  A product is there when a barrier says so, and then once; they are to be given in their order.
  """

  def __init__(self):
    self.arrive, self.wait = plgpu.barrier_arrive, plgpu.barrier_wait
    self.order, self.products = [], []

  def barrier_arrive(self, barrier):
    self.order.append('arrive')
    self.arrive(barrier)

  def barrier_wait(self, barrier):
    self.order.append('wait')
    self.wait(barrier)

  def async_store_tmem(self, ref, x):
    assert self.order[-1] != 'load', 'it may still be read'
    self.order.append('store')
    ref[...] = x

  def commit_tmem(self):
    self.order.append('commit')

  def tcgen05_mma(self, *factors, accumulate):
    assert self.order[-2:] == ['arrive', 'wait'], 'other threads may still write or read'
    if accumulate and not self.products:
      assert self.order[-4:-2] == ['store', 'commit']
    self.products.append((*factors, accumulate))

  def tcgen05_commit_arrive(self, barrier):
    for sum_ref, a, b, accumulate in self.products:
      product = jnp.dot(_read(a), _read(b), preferred_element_type=jnp.float32)
      sum_ref[...] = sum_ref[...] + product if accumulate else product
    self.products.clear()
    self.order.append('product')
    self.arrive(barrier)

  def async_load_tmem(self, ref, layout):
    assert layout == plgpu.Layout.WGMMA
    assert self.order[-2:] == ['product', 'wait']
    self.order.append('load')
    x = ref[...]
    ref[...] = jnp.full(ref.shape, jnp.nan)  # what is left there is not to be used again
    return x

  def wait_load_tmem(self):
    self.order.append('loaded')


def _read(ref):
  """Returns what lies in a ref; of a transposed one, which the interpreter cannot read, too."""
  if not isinstance(ref, TransformedRef) or not isinstance(ref.transforms[-1], TransposeTransform):
    return ref[...]
  given = dataclasses.replace(ref, transforms=ref.transforms[:-1])
  return given[...].transpose(ref.transforms[-1].permutation)


def stand_in(monkeypatch):
  """Has kernels that are interpreted call a `TensorMemory`, which it returns."""
  instructions = TensorMemory()
  for name in vars(TensorMemory):
    if not name.startswith('__'):
      monkeypatch.setattr(plgpu, name, getattr(instructions, name))
  monkeypatch.setattr(plgpu, 'TMEM', plgpu.SMEM)
  return instructions
