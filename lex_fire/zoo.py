"""Named models: `load('fire-tiny')` is a trained one, `config('fire-base')` says what to train.

A name is ENCODING-SIZE. The weights that ship with the package are in `weights/`, as NAME.npz (half
precision, no pickle) beside NAME.json (the config of the run); experiments/shipped makes them.
"""

import contextlib
import functools
import json
import pathlib
import zipfile
import zlib
from typing import Any, cast

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from lex_fire import (
  checkpoint,
  encodings,
  errors,
  lock,
  model,
  optimizer,
  presets,
  storage,
  train,
)
from lex_fire import config as config_lib

WEIGHTS = pathlib.Path(__file__).parent / 'weights'


def shipped() -> tuple[str, ...]:
  """Returns the names whose weights ship with the package."""
  return tuple(sorted(path.stem for path in WEIGHTS.glob('*.npz')))


def config(name: str) -> config_lib.Config:
  """Returns the config of a named model: as it was trained if its weights ship, else a preset's.

  Args:
    name: ENCODING-SIZE: one of `shipped()`, or a key of encodings.ENCODINGS with one of
      presets.PRESETS.

  Raises:
    errors.UserError: for a name of neither kind.
  """
  if name in shipped():
    return config_lib.Config.from_json(json.loads((WEIGHTS / f'{name}.json').read_text()))
  encoding, _, size = name.partition('-')
  if encoding not in encodings.ENCODINGS or size not in presets.PRESETS:
    raise errors.UserError(
      f'unknown model {name!r}; known: with weights {", ".join(shipped())}; to be trained '
      f'ENCODING-SIZE, of {", ".join(encodings.ENCODINGS)} and {", ".join(presets.PRESETS)}'
    )
  return config_lib.Config.from_dict(presets.make(size, encoding))


def load(name: str) -> tuple[model.Transformer, dict[str, Any]]:
  """Returns a trained model and its parameters, float32: `model.apply({'params': params}, tokens)`.

  >>> transformer, params = load('fire-tiny')
  >>> transformer.encoding.name, transformer.config.vocab_size
  ('fire', 259)

  Args:
    name: one of `shipped()`. Their tokens are bytes: id 3 + byte; id 1 ends a document.

  Raises:
    errors.UserError: for an unknown name, or one whose weights do not ship.
  """
  run = config(name)
  if name not in shipped():
    raise errors.UserError(
      f'no weights ship for {name!r}, only for: {", ".join(shipped())}; '
      "train it from lex_fire.zoo.config's config"
    )
  params = read(WEIGHTS / f'{name}.npz')
  abstract = jax.eval_shape(functools.partial(train.init, run))['params']
  found, wanted = (jax.tree.map(np.shape, tree) for tree in (params, abstract))
  if found != wanted:
    raise errors.UserError(
      f'the weights of {name!r} do not fit its config; install the package again'
    )
  return train.make_model(run), params


def unpack(name: str, workdir: str | pathlib.Path) -> None:
  """Makes a workdir of a trained model, which `evaluate`, `analyze` and `generate` take as a run's.

  It has the model's config and one checkpoint, after the last step. The optimizer's state is that
  of a first step, since none ships: to train on, start another run from it (`train.start_from`).
  Where that is already, nothing changes.

  Args:
    name: one of `shipped()`.
    workdir: a new one, or one that this made.

  Raises:
    errors.UserError: as `load` does, or if the workdir has another run, is in use or cannot be
      written.
  """
  run, (_, params) = config(name), load(name)
  workdir = storage.path(workdir)
  checkpoint.claim_workdir(workdir, run)
  with (
    lock.hold(workdir),
    contextlib.closing(checkpoint.Checkpoints(workdir, keep_best=0)) as checkpoints,
  ):
    if checkpoints.latest() is None:
      state = {'params': params, 'optimizer': optimizer.make(run).init(params)}
      checkpoints.save(run.train.steps, state, None)
  _check_unpacked(name, workdir, run.train.steps, params)


def _check_unpacked(name, workdir, steps, params):
  """Refuses a workdir whose newest checkpoint is not the model's, as of a run of its config."""
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
  )
  step, found = checkpoint.restore_params(workdir, abstract)
  same = jax.tree.map(np.array_equal, found, params)
  if step != steps or not all(jax.tree.leaves(same)):
    raise errors.UserError(
      f'{str(workdir)!r} holds a run of the config of {name!r} at step {step}, and not its shipped '
      'parameters; give another workdir'
    )


def read(path: pathlib.Path) -> dict[str, Any]:
  """Reads parameters that `write` wrote, as float32 arrays.

  Raises:
    errors.UserError: if there is no such file, or it is damaged.
  """
  try:
    with path.open('rb') as file, np.load(file, allow_pickle=False) as arrays:
      flat = {key: jnp.float32(arrays[key]) for key in arrays.files}
  except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
    raise errors.UserError(f'cannot read weights {str(path)!r}: {error}') from error
  return flax.traverse_util.unflatten_dict(flat, sep='/')


def write(path: pathlib.Path, params: dict[str, Any]) -> None:
  """Writes parameters in half precision.

  Raises:
    errors.UserError: if a parameter is beyond half precision's range.
  """
  flat = cast(
    dict[str, np.ndarray], flax.traverse_util.flatten_dict(jax.device_get(params), sep='/')
  )
  for key, array in flat.items():
    if not np.all(np.abs(array) < np.finfo(np.float16).max):
      raise errors.UserError(f'{key} is beyond the range of half precision; cannot ship it')
  path.parent.mkdir(parents=True, exist_ok=True)
  arrays: dict[str, Any] = {key: np.float16(array) for key, array in flat.items()}
  np.savez_compressed(path, **arrays)
