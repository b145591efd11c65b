"""Configs of finetuning: a run's model, or a new one, on questions of a Task."""

from collections.abc import Mapping
from typing import Any

from lex_fire import arguments, checkpoint, config, errors, presets, storage

_FROM_NOTHING = {'size': 'base', 'encoding': 'fire', 'vocabulary': 't5'}
_RECIPE: dict[str, dict[str, Any]] = {
  'data': {'batch_size': 128},
  'optimizer': {'learning_rate': 1e-4, 'warmup_steps': 100, 'final_fraction': 0.1},
  'train': {'steps': 2000, 'log_every': 20, 'checkpoint_every': 200},
}
# Of a config file. The mesh is not the checkpoint's, which was for other chips and another batch.
ARGUMENTS = {'checkpoint': '', **dict.fromkeys(_FROM_NOTHING, ''), 'mesh': 'any'}


def make(args: Mapping[str, str], task: str) -> dict[str, Any]:
  """Returns the config of a run that starts from another's newest parameters, or from nothing.

  It is nested dicts, as presets.make returns them.

  Args:
    args: values of ARGUMENTS, and length [tokens]. checkpoint: the workdir of a run, whose model,
      encoding, vocabulary and directories are taken; without it size (a preset), encoding and
      vocabulary count. mesh: a key of presets.MESHES.
    task: a key of tasks.QUESTIONS.

  Raises:
    errors.UserError: if there is no such run, it has another encoding, vocabulary or size than is
      given, or as presets.make and presets.mesh do.
  """
  length = arguments.whole('length', args['length'])
  data = {**_RECIPE['data'], 'task': task, 'length': length}
  if args['checkpoint']:
    values = _of_checkpoint(args, data)
  else:
    chosen = {name: args[name] or default for name, default in _FROM_NOTHING.items()}
    # A learned table has no positions past its own.
    options = {'max_length': length} if chosen['encoding'] == 'learned' else {}
    recipe = {**_RECIPE, 'data': {**data, 'vocabulary': chosen['vocabulary']}}
    values = presets.make(chosen['size'], chosen['encoding'], encoding=options, **recipe)
  values['mesh'] = config.Config().to_dict()['mesh'] | presets.mesh(args['mesh'])
  values['evaluate'].update(lengths=(length,), protocol='windows', checkpoint=config.LATEST)
  return values


def _of_checkpoint(args, data):
  """Returns the config of a run with other data, to be started from its parameters."""
  values = checkpoint.read_config(storage.path(args['checkpoint'])).to_dict()
  own = {'encoding': values['encoding']['name'], 'vocabulary': values['data']['vocabulary']}
  for name in _FROM_NOTHING:
    if args[name] and args[name] != own.get(name):
      raise errors.UserError(
        f'{name}={args[name]!r} is not that of checkpoint={args["checkpoint"]!r}, which counts; '
        'leave it out'
      )
  kept = {name: values['data'][name] for name in ('vocabulary', 'directory', 'tfds_directory')}
  values['data'] = config.Config().to_dict()['data'] | kept | data
  values['optimizer'] |= _RECIPE['optimizer']
  start = {**_RECIPE['train'], 'start_from': args['checkpoint']}
  values['train'] = config.Config().to_dict()['train'] | start
  return values
