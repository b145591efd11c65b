"""Checkpoints by Orbax: saved in the background, latest and best kept, restored to any mesh."""

import contextlib
import json
import os
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from lex_fire import config as config_lib
from lex_fire import errors

_CONFIG = 'config.json'
_METRIC = 'validation_loss'


def _loss(metrics: dict[str, float]) -> float:
  return metrics[_METRIC]


class Checkpoints:
  """The checkpoints of a workdir; each has parameters and optimizer state as items of their own."""

  def __init__(self, workdir: str | pathlib.Path, keep_latest: int = 1, keep_best: int = 1):
    """Opens `workdir`/checkpoints, made if it is not there."""
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
    directory = pathlib.Path(workdir).absolute() / 'checkpoints'
    if directory.exists() and not directory.is_dir():
      raise errors.UserError(f'{str(directory)!r} must be a directory; move that file away')
    self._manager = ocp.CheckpointManager(
      directory,
      # best_fn makes Orbax write the metrics: without it the policy forgets them at a restart.
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policy, best_fn=_loss, best_mode='min'
      ),
      item_names=('params', 'optimizer'),
    )

  def save(self, step: int, state: dict[str, Any], validation_loss: float) -> None:
    """Saves the state after `step` steps: returns once it is copied, writes in the background."""
    items = {name: ocp.args.StandardSave(state[name]) for name in ('params', 'optimizer')}
    metrics = {_METRIC: validation_loss}
    self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

  def steps(self) -> list[int]:
    """Returns the steps of all checkpoints that are kept."""
    return list(self._manager.all_steps())

  def latest(self) -> int | None:
    """Returns the newest whole checkpoint's step, or None."""
    return self._manager.latest_step()

  def restore(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
    """Reads the items that `abstract` (of ShapeDtypeStructs with shardings) names, bit for bit.

    Raises:
      errors.UserError: if the checkpoint is damaged, or of another model.
    """
    items = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
    try:
      return dict(self._manager.restore(step, args=ocp.args.Composite(**items)).items())
    except (ValueError, KeyError, OSError) as error:
      path = pathlib.Path(self._manager.directory) / str(step)
      reason = ' '.join(str(error).split())[:200]
      raise errors.UserError(
        f'checkpoint {str(path)!r} is damaged or of another model: {reason}; '
        'delete that directory to go on from the one before'
      ) from error

  def close(self) -> None:
    """Waits for the saves and frees the manager's threads."""
    self._manager.close()


def claim_workdir(workdir: pathlib.Path, config: config_lib.Config) -> None:
  """Writes the config into a new workdir; in one that has one, checks that it is the same.

  But for its mesh: a run may go on on other devices, to the same numbers but for rounding.

  Raises:
    errors.UserError: if the workdir holds another config (its first differing fields are named) or
      cannot be written.
  """
  path = workdir / _CONFIG
  if not path.exists():
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      _write_json(path, config.to_dict())
    except OSError as error:
      raise errors.UserError(
        f'cannot write workdir {str(workdir)!r}: {error.strerror}; use another --workdir'
      ) from error
    return
  there, asked = (_flat(c.to_dict()) for c in (read_config(workdir), config))
  keys = (key for key in {**there, **asked} if not key.startswith('mesh.'))
  differ = [key for key in keys if there.get(key) != asked.get(key)]
  if differ:
    shown = ', '.join(f'{key}={there.get(key)!r} (asked: {asked.get(key)!r})' for key in differ[:3])
    raise errors.UserError(
      f'workdir {str(workdir)!r} holds a run of another config, {shown}; '
      'use another --workdir, or that config to go on'
    )


def claim_data(workdir: pathlib.Path, hashes: dict[str, str]) -> None:
  """Writes the hash of each split's tokens into a new workdir; in one that has them, compares.

  Raises:
    errors.UserError: if the data are no longer those that the run began with.
  """
  path = workdir / 'data.json'
  if not path.exists():
    _write_json(path, hashes)
    return
  for split, value in json.loads(path.read_text()).items():
    if hashes.get(split) != value:
      raise errors.UserError(
        f'the {split} data have changed since the run in {str(workdir)!r} began (sha256 '
        f'{str(hashes.get(split))[:12]}, then {value[:12]}); restore them, or use another --workdir'
      )


def _write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
  """Writes a file whole or not at all, by the first process."""
  if jax.process_index() == 0:
    temporary = path.with_name(f'.{path.name}.{os.getpid()}')
    temporary.write_text(json.dumps(values, indent=2) + '\n')
    os.replace(temporary, path)


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


def restore_params(workdir: pathlib.Path, abstract_params: Any) -> tuple[int, Any]:
  """Returns the newest checkpoint's step and its parameters.

  Raises:
    errors.UserError: if the workdir has no checkpoint.
  """
  with contextlib.closing(Checkpoints(workdir)) as checkpoints:
    step = checkpoints.latest()
    if step is None:
      raise errors.UserError(
        f'no checkpoint in {str(workdir)!r}; train first, or give another --workdir'
      )
    return step, checkpoints.restore(step, {'params': abstract_params})['params']


def _flat(values: dict[str, Any]) -> dict[str, Any]:
  return {
    f'{section}.{key}': value for section, fields in values.items() for key, value in fields.items()
  }
