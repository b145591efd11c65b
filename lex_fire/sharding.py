"""How arrays lie on a mesh: one table from the letters of an array's shape suffix to mesh axes.

`jax.jit` with these shardings is pjit. Parameters carry their shape in their name ('query_DHC'), so
a rule needs neither wrappers nor a second list of axes, and the optimizer's copies follow by
themselves.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lex_fire import errors

AXES = ('replica', 'fsdp', 'sequence', 'tensor')

# Letter of a dimension -> mesh axes that split it. An array uses an axis once: the first letter
# takes it, so an activation [B, L, D] is split by batch, and a parameter [D, F] by both. Only
# activations and batches have letters of a sequence.
RULES = {
  'B': ('replica', 'fsdp'),
  'D': ('fsdp',),
  'F': ('tensor',),
  'G': ('tensor',),
  'H': ('tensor',),
  'K': ('sequence',),
  'L': ('sequence',),
  'Q': ('sequence',),
  'V': ('tensor',),
}


def make_mesh(
  replica: int = -1,
  fsdp: int = 1,
  sequence: int = 1,
  tensor: int = 1,
  devices: Sequence[Any] | None = None,
) -> Mesh:
  """Makes the mesh of this run; any size may be -1: all devices that are left.

  On several slices of TPUs, which a slower network connects, `replica` goes over the slices, so
  that of a step nothing but gradients crosses it.

  Args:
    replica: devices over which batches are split and parameters copied.
    fsdp: devices over which both batches and parameters are split (Zhao et al. 2023,
      arXiv:2304.11277).
    sequence: devices over which the tokens of each row are split, see `kernels.ring`.
    tensor: devices over which heads, the MLP's width and the vocabulary are split (Shoeybi et al.
      2019, arXiv:1909.08053).
    devices: the devices to use; all of them by default.

  Raises:
    errors.UserError: if the sizes do not multiply to the number of devices, or the slices do not
      divide `replica`.
  """
  devices = jax.devices() if devices is None else devices
  asked = {'replica': replica, 'fsdp': fsdp, 'sequence': sequence, 'tensor': tensor}
  sizes = _sizes(asked, len(devices))
  # Auto axes: the compiler places what no rule names (Explicit, the default, refuses constraints).
  types = (AxisType.Auto,) * len(AXES)
  slices = len({getattr(device, 'slice_index', 0) for device in devices})
  # An axis may be but a part of a side of a slice's torus.
  if slices == 1:
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=types)
  if sizes[0] % slices:
    raise errors.UserError(
      f'mesh replica={sizes[0]} is not a multiple of the {slices} slices; use one'
    )
  within = (sizes[0] // slices, *sizes[1:])
  across = (slices, *[1] * (len(AXES) - 1))
  grid = mesh_utils.create_hybrid_device_mesh(
    within, across, devices, allow_split_physical_axes=True
  )
  return Mesh(grid, AXES, axis_types=types)


def _sizes(asked: dict[str, int], num_devices: int) -> tuple[int, ...]:
  """Returns the sizes of axes, with the one that is -1, if any, found."""
  sizes = list(asked.values())
  known = math.prod(size for size in sizes if size != -1)
  if known > 0 and sizes.count(-1) == 1 and num_devices % known == 0:
    sizes[sizes.index(-1)] = num_devices // known
  if min(sizes) < 1 or math.prod(sizes) != num_devices:
    shown = ', '.join(f'{axis}={size}' for axis, size in asked.items())
    raise errors.UserError(
      f'mesh {shown} does not fit {num_devices} device{"" if num_devices == 1 else "s"}; '
      'the sizes must multiply to their number (one may be -1: all that are left)'
    )
  return tuple(sizes)


def share(mesh: Mesh) -> tuple[int, int]:
  """Returns which part of a batch's rows this process reads, and of how many parts.

  Processes whose devices hold the same rows, as those do that share the tokens of a window, read
  the same part.

  Raises:
    errors.UserError: if a process holds some rows of another's, and not all.
  """
  ways = math.prod(mesh.shape[axis] for axis in RULES['B'])
  layout = NamedSharding(mesh, PartitionSpec(RULES['B']))
  rows: dict[int, set[int]] = {}
  for device, (index,) in layout.devices_indices_map((ways,)).items():
    rows.setdefault(device.process_index, set()).add(index.start or 0)
  parts = sorted({tuple(sorted(of_process)) for of_process in rows.values()})
  if sum(map(len, parts)) != ways or len(set(map(len, parts))) > 1:
    shown = ', '.join(f'{axis}={size}' for axis, size in mesh.shape.items())
    raise errors.UserError(
      f'mesh {shown} lets {len(rows)} hosts hold rows of each other in part; choose sizes of which '
      'the devices of a host are a multiple or a divisor'
    )
  return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)


def suffix(name: str) -> str:
  """Returns the shape letters that end a name: 'query_DHC' -> 'DHC', 'step' -> ''."""
  match = re.search(r'_([A-Z0-9]+)$', name)
  return match[1] if match else ''


def spec(
  letters: str, shape: tuple[int, ...], mesh_shape: dict[str, int], name: str
) -> PartitionSpec:
  """Returns the PartitionSpec of an array by RULES; leading dimensions without a letter are whole.

  Raises:
    errors.UserError: if a rule's axes do not divide a dimension.
  """
  parts: list = [None] * len(shape)
  free = set(mesh_shape)
  for index, letter in enumerate(letters, start=len(shape) - len(letters)):
    axes = tuple(axis for axis in RULES.get(letter, ()) if axis in free)
    ways = math.prod(mesh_shape[axis] for axis in axes)
    if ways == 1 or shape[index] == 1:  # which broadcasts
      continue
    _check_divides(letter, shape[index], axes, mesh_shape, name)
    parts[index] = axes
    free -= set(axes)
  return PartitionSpec(*parts)


def check_rows(rows: int, mesh: Mesh, name: str) -> None:
  """Refuses rows that are computed at once if the mesh does not divide them, one row too.

  Raises:
    errors.UserError: if it does not.
  """
  _check_divides('B', rows, RULES['B'], dict(mesh.shape), name)


def _check_divides(letter, size, axes, mesh_shape, name):
  if size % math.prod(mesh_shape[axis] for axis in axes):
    split = ' x '.join(f'{axis}={mesh_shape[axis]}' for axis in axes)
    raise errors.UserError(
      f'{name} has {letter}={size}, which mesh axes {split} do not divide; '
      'use a multiple or a smaller mesh'
    )


def of_tree(tree, mesh: Mesh):
  """Returns the NamedSharding of each array of a pytree of named arrays.

  Such as parameters, optimizer state, or a batch.
  """
  return jax.tree.map(
    lambda of_leaf: NamedSharding(mesh, of_leaf),
    _specs(tree, dict(mesh.shape)),
    is_leaf=lambda x: isinstance(x, PartitionSpec),
  )


def _specs(tree, mesh_shape: dict[str, int]):
  """Returns the PartitionSpec of each array, by the innermost name above it."""

  def of_leaf(path, leaf):
    names = (getattr(key, 'key', getattr(key, 'name', None)) for key in reversed(path))
    name = next((str(name) for name in names if name is not None), '')
    return spec(suffix(name), np.shape(leaf), mesh_shape, name)

  return jax.tree_util.tree_map_with_path(of_leaf, tree)


def ways(letter: str) -> int:
  """Returns in how many parts the mesh of `jax.set_mesh`, if any, splits a dimension."""
  mesh_shape = jax.sharding.get_abstract_mesh().shape
  return math.prod(mesh_shape.get(axis, 1) for axis in RULES[letter])


def sequence_axis(length: int) -> str | None:
  """Returns the axis that splits rows of a length on the mesh of `jax.set_mesh`; None: none does.

  A row of one token is whole, as every dimension of 1 is.
  """
  return 'sequence' if ways('L') > 1 and length > 1 else None


def split(function, table, arrays: dict[str, jax.Array | None]) -> jax.Array:
  """Runs a function on each device's own share of arrays, on the mesh of `jax.set_mesh`, if any.

  Its own rows, heads and tokens, that is: for what the compiler cannot divide by itself, as kernels
  and the ring of devices that share a sequence. The gradient of an array is summed over
  the devices that share it.

  Args:
    function: (table, **arrays) -> an array that lies as the first of the arrays does.
    table: a pytree of arrays with their shapes as suffix, such as a `piecewise.Table`.
    arrays: by name, likewise; None stays None.
  """
  mesh_shape = _several()
  if not mesh_shape:
    return function(table, **arrays)
  specs = _specs(arrays, mesh_shape)
  split_function = jax.shard_map(
    lambda table, arrays: function(table, **arrays),
    in_specs=(_specs(table, mesh_shape), specs),
    out_specs=specs[next(iter(arrays))],
    check_vma=False,  # kernels do not say over what they vary
  )
  return split_function(table, arrays)


def constrain(array: jax.Array, letters: str) -> jax.Array:
  """Asks the compiler to lay an activation out by RULES on the mesh of `jax.set_mesh`, if any.

  Without letters it is whole on every device, and so on every host.
  """
  mesh_shape = _several()
  if not mesh_shape:
    return array
  return jax.lax.with_sharding_constraint(
    array, spec(letters, array.shape, mesh_shape, f'an activation {letters}')
  )


def constrain_tree(tree):
  """Asks the same of each array of a pytree of named arrays, such as a cache."""
  mesh_shape = _several()
  return jax.lax.with_sharding_constraint(tree, _specs(tree, mesh_shape)) if mesh_shape else tree


def _several() -> dict[str, int]:
  """Returns the axes of the mesh of `jax.set_mesh`; {} if that has one device, or there is none."""
  mesh = jax.sharding.get_abstract_mesh()
  return dict(mesh.shape) if math.prod(mesh.shape.values()) > 1 else {}
