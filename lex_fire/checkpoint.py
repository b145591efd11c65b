"""Checkpoints by Orbax: saved in the background, latest and best kept, restored to any mesh."""

import contextlib
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint.checkpoint_managers import preservation_policy

from lex_fire import config as config_lib
from lex_fire import errors, hosts, storage

_CONFIG = 'config.json'
_DATA = 'data.json'
VOCABULARY = 'vocabulary'  # beside the splits, in _DATA
_METRIC = 'validation_loss'


def _loss(metrics: dict[str, float]) -> float:
  return metrics[_METRIC]


class Damaged(errors.UserError):
  """A checkpoint that cannot be read."""


@contextlib.contextmanager
def _reading_losses(directory: pathlib.Path) -> Iterator[None]:
  """Names the file of a validation loss that a power cut has emptied: Orbax reads all of them."""
  try:
    yield
  except ValueError as error:
    for path in sorted(directory.glob('*/metrics/metrics')):
      try:
        json.loads(path.read_bytes())
      except ValueError:
        raise errors.UserError(
          f'{str(path)!r} is damaged: {error}; delete that checkpoint, {str(path.parents[1])!r}, '
          'and the same command takes the one before'
        ) from error
    raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps Orbax from warning of each option that reading leaves without a use."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(verbosity)


class Checkpoints:
  """The checkpoints of a workdir; each has parameters and optimizer state as items of their own."""

  def __init__(
    self,
    workdir: str | pathlib.Path,
    keep_latest: int = 1,
    keep_best: int = 1,
    read_only: bool = False,
  ):
    """Opens `workdir`/checkpoints, made if it is not there and may be written.

    Args:
      workdir: of the run.
      keep_latest: how many of the newest are kept.
      keep_best: how many are kept as those of the lowest validation loss; 0: none, and the loss is
        not saved.
      read_only: whether nothing may be written.
    """
    # LatestN beside BestN: keeping only the best would delete the newest when it is worse, and a
    # resume would go back in time.
    policy = preservation_policy.AnyPreservationPolicy(
      [
        preservation_policy.LatestN(keep_latest),
        preservation_policy.BestN(
          get_metric_fn=_loss, reverse=True, n=keep_best, keep_checkpoints_without_metrics=False
        ),
      ]
    )
    directory = storage.absolute(storage.path(workdir)) / 'checkpoints'
    if directory.exists() and not directory.is_dir():
      raise errors.UserError(f'{str(directory)!r} must be a directory; move that file away')
    with _reading_losses(directory), _quiet() if read_only else contextlib.nullcontext():
      self._manager = ocp.CheckpointManager(
        directory,
        # best_fn makes Orbax write the metrics, without which the policy forgets them at a restart,
        # and warn of those that are missing.
        options=ocp.CheckpointManagerOptions(
          preservation_policy=policy,
          best_fn=_loss if keep_best else None,
          best_mode='min',
          read_only=read_only,
          cleanup_tmp_directories=not read_only,  # what a save has begun that a kill ended
        ),
        item_names=('params', 'optimizer'),
      )

  def save(self, step: int, state: dict[str, Any], validation_loss: float | None) -> None:
    """Saves the state after `step` steps: returns once it is copied, writes in the background.

    Args:
      step: steps so far.
      state: as `train.State`.
      validation_loss: by which the best are kept; None: not measured, and it is never one of them.

    Raises:
      errors.UserError: if this or the save before cannot be written, as on a full disk.
    """
    items = {name: ocp.args.StandardSave(state[name]) for name in ('params', 'optimizer')}
    metrics = None if validation_loss is None else {_METRIC: validation_loss}
    with self._writing():
      self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Makes users' mistakes of what Orbax and TensorStore raise when they cannot write."""
    try:
      yield
    except (OSError, ValueError) as error:
      reason = _reason(error)
      raise errors.UserError(
        f'a checkpoint cannot be written into {str(self._manager.directory)!r}: {reason}; '
        'make room, and run the same command again, which goes on from the one before'
      ) from error

  def steps(self) -> list[int]:
    """Returns the steps of all whole checkpoints that are there, in order.

    Orbax's own list has one that is being written, and lacks those that go once it is.
    """
    directory = storage.path(self._manager.directory)
    if not directory.exists():  # in a bucket, where nothing has been saved yet
      return []
    found = [path for path in directory.iterdir() if path.name.isdecimal()]
    if storage.is_bucket(directory):  # where Orbax renames nothing, and marks what is whole
      found = [path for path in found if (path / 'commit_success.txt').exists()]
    return sorted(int(path.name) for path in found)

  def latest(self) -> int | None:
    """Returns the newest whole checkpoint's step, or None."""
    return self._manager.latest_step()

  def named(self, name: str) -> int | None:
    """Returns the step of a whole checkpoint, or None if there is none such.

    Args:
      name: config.LATEST, config.BEST (of the lowest validation loss), or a step.
    """
    if name == config_lib.LATEST:
      return self.latest()
    step = self._manager.best_step() if name == config_lib.BEST else int(name)
    return step if step in self.steps() else None

  def restore_newest(
    self, abstract: dict[str, Any], say: Callable[[str], None]
  ) -> tuple[int, dict[str, Any]] | None:
    """Reads the newest checkpoint that is whole, as `restore`; None if there is no checkpoint.

    One that is damaged is moved to `damaged` in the workdir, and the one before is read. Of several
    hosts one may find damage that others do not: it ends the run, to be started again.

    Args:
      abstract: as for restore.
      say: is told of damage.

    Raises:
      errors.UserError: if it is of another model, if there are checkpoints and none is whole, or if
        one is damaged and this is one of several hosts.
    """
    damaged: list[tuple[int, Damaged]] = []
    steps = self.steps()
    for step in reversed(steps):
      try:
        restored = self.restore(step, abstract)
      except Damaged as error:
        if jax.process_count() > 1 and step > steps[0]:
          place = self._put_away(step)
          raise errors.UserError(
            f'{error}; it is now {str(place)!r}, and the same command on all hosts goes on from '
            'the one before'
          ) from error
        damaged.append((step, error))
        continue
      for of_damaged, error in damaged:
        place = self._put_away(of_damaged)
        say(f'{error}; it is now {str(place)!r}, and the run goes on from step {step}')
      return step, restored
    if damaged:
      raise errors.UserError(
        f'{damaged[0][1]}; there is no other that is whole: restore one, or use another --workdir'
      )
    return None

  def _put_away(self, step: int) -> pathlib.Path:
    """Moves a checkpoint out of the way of those to come; returns where it is now."""
    directory = storage.path(self._manager.directory)
    place = directory.parent / 'damaged' / f'{step}-{int(time.time())}'
    with contextlib.suppress(FileNotFoundError):  # another host was faster
      storage.move(directory / str(step), place)
    self._manager.reload()
    return place

  def _check_model(self, step: int, abstract_params: Any) -> None:
    """Raises errors.UserError for the first parameter that differs from a model's, if any."""
    # Orbax wants a path of its own kind; any will do.
    folder: Any = storage.path(self._manager.directory) / str(step) / 'params'
    try:
      metadata: Any = ocp.StandardCheckpointHandler().metadata(folder)
      found = shapes(metadata.tree)
    except Exception:  # damaged, which reading tells better; Orbax raises errors of all kinds
      return
    asked = shapes(abstract_params)
    for name in sorted({**found, **asked}):
      if found.get(name) != asked.get(name):
        there, wanted = (tree.get(name, 'no such array') for tree in (found, asked))
        raise errors.UserError(
          f'checkpoint {str(folder.parent)!r} is of another model: of {name} it has {there}, and '
          f'the config {wanted}; restore config.json, or use another --workdir'
        )

  def restore(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
    """Reads the items that `abstract` (of ShapeDtypeStructs with shardings) names, bit for bit.

    Raises:
      errors.UserError: if the checkpoint is of another model, by the first parameter that differs.
      Damaged: if it cannot be read.
    """
    self._check_model(step, abstract['params'])
    items = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
    try:
      return dict(self._manager.restore(step, args=ocp.args.Composite(**items)).items())
    except jax.errors.JaxRuntimeError:  # no memory, or another host has gone
      raise
    except Exception as error:  # Orbax and TensorStore raise errors of all kinds, bare ones too
      path = storage.path(self._manager.directory) / str(step)
      reason = _reason(error)
      raise Damaged(f'checkpoint {str(path)!r} is damaged: {reason}') from error

  def wait(self) -> None:
    """Waits for the saves.

    Raises:
      errors.UserError: if a save cannot be written.
    """
    with self._writing():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the saves and frees the manager's threads.

    Raises:
      errors.UserError: if a save cannot be written.
    """
    with self._writing():
      self._manager.close()


def make_workdir(workdir: pathlib.Path) -> None:
  """Makes the directory of a run, if it is not there.

  Raises:
    errors.UserError: if it cannot be made.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise errors.UserError(
      f'cannot write workdir {str(workdir)!r}: {error.strerror or error}; use another --workdir'
    ) from error


def claim_workdir(workdir: pathlib.Path, config: config_lib.Config) -> None:
  """Writes the config into a new workdir; in one that has one, checks that it is the same.

  But for its mesh: a run may go on on other devices, to the same numbers but for rounding.

  Raises:
    errors.UserError: if the workdir holds another config (its first differing fields are named) or
      cannot be written.
  """
  path = workdir / _CONFIG
  if not path.exists():
    make_workdir(workdir)
    _write_json(path, config.to_dict())
    return
  there, asked = (flat(c) for c in (read_config(workdir), config))
  keys = (key for key in {**there, **asked} if not key.startswith('mesh.'))
  differ = [key for key in keys if there.get(key) != asked.get(key)]
  if differ:
    shown = ', '.join(f'{key}={there.get(key)!r} (asked: {asked.get(key)!r})' for key in differ[:3])
    raise errors.UserError(
      f'workdir {str(workdir)!r} holds a run of another config, {shown}; '
      'use another --workdir, or that config to go on'
    )


def check_workdir(workdir: pathlib.Path, config: config_lib.Config, hashes: dict[str, str]) -> None:
  """Checks what claim_workdir and claim_data do, as far as it is there, and writes nothing.

  Raises:
    errors.UserError: if the workdir holds another config, or began with other data.
  """
  if (workdir / _CONFIG).exists():
    claim_workdir(workdir, config)
  if (workdir / _DATA).exists():
    claim_data(workdir, hashes)


def check_vocabulary(workdir: pathlib.Path, name: str) -> None:
  """Checks that the vocabulary at hand is that which a run began with, if the run says which.

  Args:
    workdir: of the run.
    name: of the vocabulary that its config leads to now, with the hash of its model.

  Raises:
    errors.UserError: if it is another.
  """
  path = workdir / _DATA
  began = _read_data(path).get(VOCABULARY, name) if path.exists() else name
  if began != name:
    raise errors.UserError(
      f'the vocabulary of the run in {str(workdir)!r} is {name!r} now and was {began!r} when it '
      'began; restore its file'
    )


def claim_data(workdir: pathlib.Path, hashes: dict[str, str]) -> None:
  """Writes the hash of each split's tokens into a new workdir; in one that has them, compares.

  Raises:
    errors.UserError: if the data are no longer those that the run began with.
  """
  path = workdir / _DATA
  if not path.exists():
    _write_json(path, hashes)
    return
  for split, value in _read_data(path).items():
    if hashes.get(split) != value:
      raise errors.UserError(
        f'the {split} data have changed since the run in {str(workdir)!r} began (now '
        f'{str(hashes.get(split))[:40]}, then {value[:40]}); restore them, or use another --workdir'
      )


def _read_data(path: pathlib.Path) -> dict[str, str]:
  """Reads what `claim_data` wrote.

  Raises:
    errors.UserError: if it is damaged, as by a power cut.
  """
  try:
    return dict(json.loads(path.read_text()))
  except ValueError as error:
    raise errors.UserError(
      f'{str(path)!r} is damaged: {error}; delete it, and the same command writes it anew of the '
      'data that are there now'
    ) from error


def _write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
  """Writes a file whole or not at all, by the first process.

  Raises:
    errors.UserError: if it cannot be written.
  """
  if jax.process_index() == 0:
    try:
      storage.write(path, json.dumps(values, indent=2) + '\n')
    except OSError as error:
      raise errors.UserError(
        f'cannot write {str(path)!r}: {error.strerror or error}; make room, or use another '
        '--workdir'
      ) from error


def read_config(workdir: pathlib.Path) -> config_lib.Config:
  """Reads the config of a run.

  Raises:
    errors.UserError: if there is none, or it is not a config.
  """
  path = workdir / _CONFIG
  try:
    values = json.loads(path.read_text())
    if not isinstance(values, dict):
      raise errors.UserError(f'a config must have sections, not be {values!r}')
    return config_lib.Config.from_json(values)
  except errors.UserError as error:
    raise errors.UserError(f'{str(path)!r}: {error}') from error
  except OSError as error:
    raise errors.UserError(
      f'no run in workdir {str(workdir)!r}: {_CONFIG}: {error.strerror}; '
      'give the --workdir of `python -m lex_fire.train`'
    ) from error
  except ValueError as error:
    raise errors.UserError(f'{str(path)!r} is not JSON: {error}; restore or delete it') from error


def restore_params(
  workdir: pathlib.Path, abstract_params: Any, name: str = config_lib.LATEST
) -> tuple[int, Any]:
  """Returns a checkpoint's step and its parameters.

  Args:
    workdir: of the run.
    abstract_params: of its model, ShapeDtypeStructs with shardings.
    name: as for Checkpoints.named.

  Raises:
    errors.UserError: if the workdir has no such checkpoint, it is damaged or of another model, or
      another process has found another.
  """
  with contextlib.closing(Checkpoints(workdir, read_only=True)) as checkpoints:
    step = checkpoints.named(name)
    hosts.check_same('a checkpoint', {name: step})  # a run may be adding some, and deleting others
    if step is None:
      raise errors.UserError(_none_such(name, workdir, checkpoints.steps()))
    try:
      return step, checkpoints.restore(step, {'params': abstract_params})['params']
    except Damaged as error:
      remedy = 'delete that directory to use the one before'
      if name != config_lib.LATEST:
        remedy = 'ask for another --checkpoint'
      raise errors.UserError(f'{error}; {remedy}') from error


def _reason(error: Exception) -> str:
  """Returns what a library says of what it could not read, without where in itself that was."""
  return ' '.join(str(error).partition('See full TensorStore details')[0].split())[:200]


def _none_such(name: str, workdir: pathlib.Path, steps: list[int]) -> str:
  """Says that a run has no checkpoint of a name, and which it has."""
  if not steps:
    return f'no checkpoint in {str(workdir)!r}; train first, or give another --workdir'
  there = ', '.join(map(str, steps))
  others = ', '.join(known for known in ('latest', 'best') if known != name)
  return (
    f'no checkpoint {name!r} in {str(workdir)!r}; use {others} or a step that is there: {there}'
  )


def shapes(params: Any) -> dict[str, tuple[int, ...]]:
  """Returns {the name of each array: its shape}."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): tuple(x.shape) for path, x in leaves
  }


def flat(config: config_lib.Config) -> dict[str, Any]:
  """Returns the fields of a config as {'SECTION.FIELD': value}."""
  return {
    f'{section}.{field}': value
    for section, fields in config.to_dict().items()
    for field, value in fields.items()
  }
