"""How arrays lie on a mesh: one table from the letters of an array's shape suffix to mesh axes.

`jax.jit` with these shardings is pjit. Parameters carry their shape in their name ('query_DHC'), so
a rule needs neither wrappers nor a second list of axes, and the optimizer's copies follow by
themselves.
"""

import math
import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lex_fire import errors

AXES = ('data', 'fsdp')

# Letter of a dimension -> mesh axes that split it. An array uses an axis once: the first letter
# takes it, so an activation [B, L, D] is split by batch, and a parameter [D, F] by D.
RULES = {'B': ('data', 'fsdp'), 'D': ('fsdp',)}


def make_mesh(data: int = -1, fsdp: int = 1, devices=None) -> Mesh:
  """Makes the mesh of this run.

  Args:
    data: devices over which batches are split and parameters copied; -1 takes all that are left.
    fsdp: devices over which both batches and parameters are split.
    devices: the devices to use; all of them by default.

  Raises:
    errors.UserError: if the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [data, fsdp]
  known = math.prod(size for size in sizes if size != -1)
  if known > 0 and sizes.count(-1) == 1 and len(devices) % known == 0:
    sizes[sizes.index(-1)] = len(devices) // known
  if min(sizes) < 1 or math.prod(sizes) != len(devices):
    raise errors.UserError(
      f'mesh data={data}, fsdp={fsdp} does not fit {len(devices)} devices; '
      'the sizes must multiply to their number (one may be -1: all that are left)'
    )
  # Auto axes: the compiler places what no rule names (Explicit, the default, refuses constraints).
  return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


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
    if ways == 1 or shape[index] == 1:
      continue
    if shape[index] % ways:
      split = ' x '.join(f'{axis}={mesh_shape[axis]}' for axis in axes)
      raise errors.UserError(
        f'{name} has {letter}={shape[index]}, which mesh axes {split} do not divide; '
        'use a multiple or a smaller mesh'
      )
    parts[index] = axes
    free -= set(axes)
  return PartitionSpec(*parts)


def of_tree(tree, mesh: Mesh):
  """Returns the NamedSharding of each array of a pytree of named arrays.

  Such as parameters, optimizer state, or a batch.
  """

  def of_leaf(path, leaf):
    name = next((str(key.key) for key in reversed(path) if hasattr(key, 'key')), '')
    return NamedSharding(mesh, spec(suffix(name), np.shape(leaf), dict(mesh.shape), name))

  return jax.tree_util.tree_map_with_path(of_leaf, tree)


def split_rows(function, whole, arrays: dict[str, jax.Array | None]) -> jax.Array:
  """Runs a function on each device's own rows, on the mesh of `jax.set_mesh`, if any.

  For what the compiler cannot divide by itself, as kernels. The gradient of `whole` is summed over
  devices.

  Args:
    function: (whole, **arrays) -> an array that lies as the first of the arrays does.
    whole: a pytree that each device has in full.
    arrays: by name, with their shapes as suffix; None stays None.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or math.prod(mesh.shape.values()) == 1:
    return function(whole, **arrays)
  specs = {
    name: None if array is None else spec(suffix(name), array.shape, dict(mesh.shape), name)
    for name, array in arrays.items()
  }
  split = jax.shard_map(
    lambda whole, arrays: function(whole, **arrays),
    in_specs=(PartitionSpec(), specs),
    out_specs=next(iter(specs.values())),
    check_vma=False,  # kernels do not say over what they vary
  )
  return split(whole, arrays)


def constrain(array: jax.Array, letters: str) -> jax.Array:
  """Asks the compiler to lay an activation out by RULES on the mesh of `jax.set_mesh`, if any."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or math.prod(mesh.shape.values()) == 1:
    return array
  return jax.lax.with_sharding_constraint(
    array, spec(letters, array.shape, dict(mesh.shape), f'an activation {letters}')
  )
