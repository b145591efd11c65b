"""What is compared: runs, each under encodings and masks."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from lex_fire import checkpoint, errors, kernels, model, sharding, train
from lex_fire import config as config_lib
from lex_fire.data import text as text_lib
from lex_fire.data import vocabularies


class Case(NamedTuple):
  """What is evaluated of a run: its model under an encoding and a mask.

  Attributes:
    override: the encoding asked for in the place of the trained one; None: it is the trained one.
    encoding: that the model has here.
    mask_name: as asked for.
    mask: that the model has here.
    transformer: the model.
  """

  override: str | None
  encoding: config_lib.EncodingConfig
  mask_name: str
  mask: kernels.Mask
  transformer: model.Transformer


def cases(config: config_lib.Config) -> list[Case]:
  """Returns what config.evaluate asks of a run: every encoding under every mask.

  Raises:
    errors.UserError: as EvaluateConfig's methods do; if there are no positions for a length, or an
      encoding does not fit the run's parameters.
  """
  request, c = config.evaluate, config.model
  if request.attention != config_lib.AS_TRAINED:
    c = dataclasses.replace(c, attention=request.attention)
  masks = request.named_masks(c.causal, config.data.length)
  found = []
  for text, encoding in request.named_encodings(config.encoding, config.data.length).items():
    override = None if text == config_lib.AS_TRAINED else text
    for name, mask in masks.items():
      transformer = model.Transformer(c, encoding.make(), mask)
      found.append(Case(override, encoding, name, mask, transformer))
    _check(config, override, transformer)
  return found


def of_case(config: config_lib.Config, case: Case) -> dict[str, Any]:
  """Returns what a report says of a case."""
  return {
    'encoding': {'name': case.encoding.name, **dict(case.encoding.options)},
    'encoding_override': case.override,
    'trained_encoding': config.to_dict()['encoding'],
    'mask': case.mask_name,
    'mask_fields': dataclasses.asdict(case.mask),
    'attention': case.transformer.config.attention,
  }


def _check(config, override, transformer):
  """Refuses lengths without positions, and an encoding that the run's parameters do not serve."""
  longest, reach = max(config.evaluate.lengths), config.data.position_range
  if reach and longest > reach:
    raise errors.UserError(
      f'length={longest} is past data.position_range={reach}, of which the run draws its positions;'
      ' evaluate shorter'
    )
  model.check_length(transformer.encoding, reach or longest)
  other = transformer.encoding.learned and transformer.encoding.name != config.encoding.name
  if override and (other or _abstract(transformer) != _abstract(train.make_model(config))):
    raise errors.UserError(
      f'encoding {override!r} does not take the parameters that the run learned with '
      f'{config.encoding.name!r}; use one that learns the same arrays, or none if it has none'
    )


def check_vocabulary_size(config: config_lib.Config, vocabulary: vocabularies.Vocabulary) -> None:
  """Refuses a vocabulary of more ids than a run has embeddings.

  Raises:
    errors.UserError: if it is such.
  """
  if vocabulary.size > config.model.vocab_size:
    raise errors.UserError(
      f'vocabulary {config.data.vocabulary!r} has {vocabulary.size} ids, more than '
      f'model.vocab_size={config.model.vocab_size}; it is not that of the run any more: restore it'
    )


def _abstract(transformer):
  """Returns the parameters as ShapeDtypeStructs."""
  return jax.eval_shape(lambda: model.initial(transformer, jax.random.key(0)))


def restore(
  config: config_lib.Config, workdir: pathlib.Path, mesh: jax.sharding.Mesh
) -> tuple[int, Any]:
  """Returns the step of the checkpoint of config.evaluate, and its parameters, laid out on a mesh.

  Raises:
    errors.UserError: if the workdir has none such, a damaged one or one of another model, or the
      vocabulary has changed since the run began.
  """
  checkpoint.check_vocabulary(workdir, text_lib.codec(config.data.spec()).vocabulary.name)
  abstract = abstract_params(config, mesh)
  return checkpoint.restore_params(workdir, abstract, config.evaluate.checkpoint)


def abstract_params(config: config_lib.Config, mesh: jax.sharding.Mesh) -> Any:
  """Returns the parameters of a run as ShapeDtypeStructs, laid out on a mesh."""
  abstract = _abstract(train.make_model(config))
  return jax.tree.map(
    lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout),
    abstract,
    sharding.of_tree(abstract, mesh),
  )


def names(workdirs: Sequence[pathlib.Path]) -> list[str]:
  """Names runs by the last parts of their paths, as many as tell each from the others."""
  parts = [pathlib.Path(os.path.abspath(workdir)).parts for workdir in workdirs]

  def name(own):
    ends = (own[-count:] for count in range(1, len(own) + 1))
    return next(end for end in ends if sum(other[-len(end) :] == end for other in parts) == 1)

  return [str(pathlib.Path(*name(own))) for own in parts]
