"""AdamW: linear warmup, cosine decay, clipped by global norm, weight decay on matrices only."""

from typing import Any, cast

import jax
import optax

from lex_fire import config as config_lib
from lex_fire import sharding


def schedule(config: config_lib.Config) -> optax.Schedule:
  """Learning rate by step: from 0 to its peak over the warmup, then a cosine to final_fraction."""
  c = config.optimizer
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=c.learning_rate,
    warmup_steps=c.warmup_steps,
    decay_steps=config.train.steps,
    end_value=c.learning_rate * c.final_fraction,
  )


def make(config: config_lib.Config) -> optax.GradientTransformation:
  """Makes the optimizer of a run."""
  c = config.optimizer
  return optax.chain(
    optax.clip_by_global_norm(c.clip_norm),
    optax.scale_by_adam(b1=c.beta1, b2=c.beta2, eps=c.epsilon),
    optax.add_decayed_weights(c.weight_decay, mask=decays),
    optax.masked(optax.scale(c.encoding_rate), encoding_weights),
    optax.scale_by_learning_rate(schedule(config)),
  )


def count(state: optax.OptState) -> int:
  """Returns how many steps the state of `make`'s optimizer has taken; one that is skipped is none.

  By it goes the learning rate.
  """
  *_, of_rate = cast(tuple[Any, ...], state)
  return int(of_rate.count)


def decays(params):
  """Returns a tree of bools: matrices decay; norms, biases and an encoding's parameters do not."""
  return _by_path(
    params, lambda names: len(sharding.suffix(names[-1])) > 1 and 'encoding' not in names
  )


def encoding_weights(params):
  """Returns a tree of bools: the arrays of position encodings, which learn at `encoding_rate`.

  A bias must come to differ by many nats between near and far, which takes small steps long. A
  scalar (FIRE's c and the multiplier of L) is a factor of order 1, for which they are right.
  """
  return _by_path(params, lambda names: 'encoding' in names and sharding.suffix(names[-1]) != '')


def _by_path(params, choose):
  return jax.tree_util.tree_map_with_path(
    lambda path, _: choose([str(key.key) for key in path]), params
  )
