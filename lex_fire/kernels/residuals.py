"""A name for what a kernel keeps for its backward pass, by which it can be kept past others.

Where activations are computed again for the backward pass, so would all of attention be, whose
arrays to keep are small: the output, and one number a query and head.
"""

import jax
from jax.ad_checkpoint import checkpoint_name

NAME = 'attention'


def named(out: jax.Array, log_norm: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns attention's output and the log of its softmax's normaliser, under NAME.

  `jax.checkpoint_policies.save_only_these_names` knows it. A kernel that is differentiated by its
  own rule names them there.
  """
  return checkpoint_name((out, log_norm), NAME)
