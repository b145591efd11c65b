"""What of a block is kept for its backward pass, and what is computed again there.

A step's memory goes to what is kept of all blocks (Chen et al. 2016, "Training Deep Nets with
Sublinear Memory Cost", arXiv:1604.06174). What is computed again costs time instead.

A step of the preset `base` with FIRE, 16 rows of 2048 tokens on each chip of v5e:4x4: as its
compiler says (XLA counts the loop over layers once, and no kernels), and what is computed again, of
three times the work of a forward pass (its products of matrices and causal attention):

    name                 GiB of temporaries  XLA's FLOPs  attention kernels  computed again
    none                         28.1 (1)              -                  -            0
    elementwise                  11.4            1.81e12                  3            0
    block_but_attention           5.3            2.12e12                  3          15%
    block                         2.9            2.12e12                  4          20%

(1) More than a v5e has. `block_but_attention` gains with length, as the work of attention does per
token and what is kept does not.
"""

from collections.abc import Callable
from typing import Any

import jax

from lex_fire.kernels import residuals

_of_attention = jax.checkpoint_policies.save_only_these_names(residuals.NAME)

# By what is computed again: what `jax.checkpoint` may keep besides a block's input; None: all.
# `elementwise` keeps what matrices and attention give; norms, activations, rotations are computed
# again. The dense reference of attention names nothing, so that all of it is computed again.
POLICIES: dict[str, Callable[..., Any] | None] = {
  'none': None,
  'elementwise': jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _of_attention
  ),
  'block_but_attention': _of_attention,
  'block': jax.checkpoint_policies.nothing_saveable,
}
