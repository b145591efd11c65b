"""Checkpoints by Orbax: saved in the background, latest and best kept, restored to any mesh."""

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
          get_metric_fn=lambda metrics: metrics[_METRIC], reverse=True, n=keep_best
        ),
      ]
    )
    self._manager = ocp.CheckpointManager(
      pathlib.Path(workdir).absolute() / 'checkpoints',
      options=ocp.CheckpointManagerOptions(preservation_policy=policy),
      item_names=('params', 'optimizer'),
    )

  def save(self, step: int, state: dict[str, Any], validation_loss: float) -> None:
    """Saves the state after `step` steps: returns once it is copied, writes in the background."""
    items = {name: ocp.args.StandardSave(state[name]) for name in ('params', 'optimizer')}
    metrics = {_METRIC: validation_loss}
    self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

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

  def wait(self) -> None:
    """Returns once all saves are on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the saves and frees the manager's threads."""
    self._manager.close()


def claim_workdir(workdir: pathlib.Path, config: config_lib.Config) -> None:
  """Writes the config into a new workdir; in one that has one, checks that it is the same.

  Raises:
    errors.UserError: if the workdir holds another config (its first differing fields are named) or
      cannot be written.
  """
  path = workdir / _CONFIG
  if not path.exists():
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      if jax.process_index() == 0:
        temporary = workdir / f'.{_CONFIG}.{os.getpid()}'
        temporary.write_text(json.dumps(config.to_dict(), indent=2) + '\n')
        os.replace(temporary, path)
    except OSError as error:
      raise errors.UserError(
        f'cannot write workdir {str(workdir)!r}: {error.strerror}; use another --workdir'
      ) from error
    return
  there, asked = (_flat(c.to_dict()) for c in (read_config(workdir), config))
  differ = [key for key in {**there, **asked} if there.get(key) != asked.get(key)]
  if differ:
    shown = ', '.join(f'{key}={there.get(key)!r} (asked: {asked.get(key)!r})' for key in differ[:3])
    raise errors.UserError(
      f'workdir {str(workdir)!r} holds a run of another config, {shown}; '
      'use another --workdir, or that config to go on'
    )


def read_config(workdir: pathlib.Path) -> config_lib.Config:
  """Reads the config of a run.

  Raises:
    errors.UserError: if there is none, or it is not a config.
  """
  path = workdir / _CONFIG
  try:
    return config_lib.Config.from_dict(json.loads(path.read_text()))
  except OSError as error:
    raise errors.UserError(
      f'no run in workdir {str(workdir)!r}: {_CONFIG}: {error.strerror}; '
      'give the --workdir of `python -m lex_fire.train`'
    ) from error
  except json.JSONDecodeError as error:
    raise errors.UserError(f'{str(path)!r} is not JSON: {error}; restore or delete it') from error


def restore_params(workdir: pathlib.Path, abstract_params: Any) -> tuple[int, Any]:
  """Returns the newest checkpoint's step and its parameters.

  Raises:
    errors.UserError: if the workdir has no checkpoint.
  """
  checkpoints = Checkpoints(workdir)
  step = checkpoints.latest()
  if step is None:
    raise errors.UserError(
      f'no checkpoint in {str(workdir)!r}; train first, or give another --workdir'
    )
  params = checkpoints.restore(step, {'params': abstract_params})['params']
  checkpoints.close()
  return step, params


def _flat(values: dict[str, Any]) -> dict[str, Any]:
  return {
    f'{section}.{key}': value for section, fields in values.items() for key, value in fields.items()
  }
