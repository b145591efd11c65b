"""Products inside a kernel for NVIDIA's Blackwell, in its tensor memory.

Hopper adds products up in registers, and takes rows from there (`wgmma`). Blackwell has no such
instruction: one thread of a warpgroup starts products (`tcgen05`) of what is in shared memory, and
their sums are in a memory of their own, from which all threads take them (NVIDIA's PTX ISA 8.7,
section 9.7.16). A sum of 64 rows comes from there laid out as Hopper's, so that all else of a
tile is the same on both.
"""

# Not strict, as its neighbours are: kernels carry no types.
# pyright: basic

from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from lex_fire.kernels import mosaic_gpu_tile as tile_lib

ROWS = tile_lib.ROWS
HOPPER, BLACKWELL = '9', '10'  # compute capabilities; Blackwell's of 12 has no such memory
# By parts, channels and whether there are waves, where it is not as on Hopper: in shared memory are
# weights and gradients of logits too, and a sum on its way takes more registers.
FORWARD_SIZES = {
  (1, 128, False): tile_lib.Size(columns=64, stages=4),
  (2, 64, False): tile_lib.Size(columns=64, stages=4),
  (2, 128, False): tile_lib.Size(columns=64, stages=1),
  (2, 256, False): tile_lib.Size(columns=32, stages=1, units=1),
}
BACKWARD_SIZES = {
  (1, 256, False): tile_lib.Size(columns=32, stages=1),
  (2, 128, False): tile_lib.Size(columns=32, stages=1),
  (2, 64, True): tile_lib.Size(columns=32, stages=1),
}
MOST_BESIDE_WAVES = 256  # channels of a head times their parts


def capability() -> str:
  """Returns the compute capability that is compiled for, before the point; '' where there is none.

  It is that of `jax.default_device`, if set, or else of the host's first device, as in
  `kernels.platform`: a mesh says of its devices what kind they are, not this.
  """
  device = jax.extend.backend.get_default_device()
  return getattr(device, 'compute_capability', '').partition('.')[0]


class Room(NamedTuple):
  """What a warpgroup makes its products in.

  Attributes:
    tile_ref: tensor memory for sums [rows, columns].
    rows_ref: for sums [rows, channels].
    block_YLC: shared memory for parts of rows that are in registers.
    begin: a barrier at which all threads wait for each other before one of them starts products.
    done: a barrier at which products arrive.
  """

  tile_ref: Any
  rows_ref: Any
  block_YLC: Any
  begin: Any
  done: Any


def swizzled(columns: int, channels: int) -> int:
  """Returns how many channels of a block are swizzled together.

  A product of 64 rows makes the halves of a sum's columns apart.
  """
  return min(64, columns // 2, channels // 2)


def room(setup, columns, channels, block) -> Room:
  """Returns the room of a warpgroup, as scratch."""
  barrier = plgpu.Barrier(orders_tensor_core=True)
  return Room(
    tile_ref=plgpu.TMEM((ROWS, columns), jnp.float32),
    rows_ref=plgpu.TMEM((ROWS, channels), jnp.float32),
    block_YLC=block,
    begin=barrier,
    done=barrier,
  )


def held(room, parts):
  """Writes parts of rows, in registers, where products read them; returns refs of them."""
  refs = [room.block_YLC.at[y, :, : part.shape[1]] for y, part in enumerate(parts)]
  for ref, part in zip(refs, parts, strict=True):
    ref[...] = part
  plgpu.commit_smem()
  return refs


def add(room, sum_ref, start, pairs):
  """Returns start + the products of pairs (rows, columns) of refs to shared memory, in their order.

  Args:
    room: of the warpgroup.
    sum_ref: of it, for the sum.
    start: an array in registers; None: 0.
    pairs: of blocks [rows, K] and [K, columns].
  """
  if start is not None:
    plgpu.async_store_tmem(sum_ref, start)
    plgpu.commit_tmem()
  plgpu.barrier_arrive(room.begin)
  plgpu.barrier_wait(room.begin)
  for n, (a, b) in enumerate(pairs):
    plgpu.tcgen05_mma(sum_ref, a, b, accumulate=n > 0 or start is not None)
  plgpu.tcgen05_commit_arrive(room.done)
  plgpu.barrier_wait(room.done)
  result = plgpu.async_load_tmem(sum_ref, layout=plgpu.Layout.WGMMA)
  plgpu.wait_load_tmem()  # before the next sum is written there
  return result
