"""Configs of finetuning: a run's model, or a new one, on questions of a Task."""

import pathlib
from collections.abc import Mapping
from typing import Any

from lex_fire import checkpoint, config, errors, presets

_FROM_NOTHING = {'size': 'base', 'encoding': 'fire', 'vocabulary': 't5'}
ARGUMENTS = {'checkpoint': '', **dict.fromkeys(_FROM_NOTHING, '')}  # of a config, for parse_arg


def make(args: Mapping[str, str], data: dict[str, Any], **recipe: dict[str, Any]) -> dict[str, Any]:
  """Returns the config of a run that starts from another's newest parameters, or from nothing.

  It is nested dicts, as presets.make returns them.

  Args:
    args: values of ARGUMENTS. checkpoint: the workdir of a run, whose model, encoding, vocabulary
      and directories are taken; without it size (a preset), encoding and vocabulary count.
    data: task, length [tokens] and batch_size.
    **recipe: fields of `optimizer` and `train`.

  Raises:
    errors.UserError: if there is no such run, it has another encoding, vocabulary or size than is
      given, or as presets.make does.
  """
  if args['checkpoint']:
    values = _of_checkpoint(args, data, recipe)
  else:
    chosen = {name: args[name] or default for name, default in _FROM_NOTHING.items()}
    # A learned table has no positions past its own.
    options = {'max_length': data['length']} if chosen['encoding'] == 'learned' else {}
    data = {**data, 'vocabulary': chosen['vocabulary']}
    values = presets.make(chosen['size'], chosen['encoding'], encoding=options, data=data, **recipe)
  values['evaluate'].update(lengths=(data['length'],), protocol='windows')
  return values


def _of_checkpoint(args, data, recipe):
  """Returns the config of a run with other data, to be started from its parameters."""
  values = checkpoint.read_config(pathlib.Path(args['checkpoint']).expanduser()).to_dict()
  own = {'encoding': values['encoding']['name'], 'vocabulary': values['data']['vocabulary']}
  for name in _FROM_NOTHING:
    if args[name] and args[name] != own.get(name):
      raise errors.UserError(
        f'{name}={args[name]!r} is not that of checkpoint={args["checkpoint"]!r}, which counts; '
        'leave it out'
      )
  kept = {name: values['data'][name] for name in ('vocabulary', 'directory', 'tfds_directory')}
  values['data'] = config.Config().to_dict()['data'] | kept | data
  values['optimizer'] |= recipe['optimizer']
  start = {**recipe['train'], 'start_from': args['checkpoint']}
  values['train'] = config.Config().to_dict()['train'] | start
  return values
