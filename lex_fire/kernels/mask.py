"""Which keys a query may see, as one small static value that every implementation reads."""

import dataclasses

import jax
import jax.numpy as jnp

from lex_fire import errors

# Added nowhere, selected instead of a hidden logit: low enough that exp underflows to 0 beside any
# real logit, finite so that a row that sees nothing has no NaN, in value or gradient.
HIDDEN_LOGIT = -1e30


@dataclasses.dataclass(frozen=True)
class Mask:
  """Which keys a query at position i may see; a key j must also be in the query's segment.

  With block = 2, `causal` beside blockwise and a window of 3 (rows i, columns j, positions 0 .. 4):

      causal        blockwise     window = 3
      1 . . . .     1 . . . .     1 . . . .
      1 1 . . .     1 1 . . .     1 1 . . .
      1 1 1 . .     1 1 1 . .     1 1 1 . .
      1 1 1 1 .     1 1 1 1 .     . 1 1 1 .
      1 1 1 1 1     . . 1 1 1     . . 1 1 1

  Attributes:
    causal: only keys with j <= i.
    block: blockwise attention (LeX, arXiv:2212.10554, section 3): only the query's block of this
      many positions and the one before it; None for no such limit [tokens].
    window: only keys with i - j < window; None for no such limit [tokens].
  """

  causal: bool = True
  block: int | None = None
  window: int | None = None

  def __post_init__(self):
    for name in ('block', 'window'):
      value = getattr(self, name)
      if value is not None and (value < 1 or not self.causal):
        raise errors.UserError(f'a mask with {name}={value} needs it at least 1, and causal=True')

  @property
  def reach(self) -> int | None:
    """How many positions back a query may see, itself included; None: to the beginning."""
    limits = [] if self.block is None else [2 * self.block]
    return min(limits + ([] if self.window is None else [self.window]), default=None)

  def visible(self, query_position_BQ: jax.Array, key_position_BK: jax.Array) -> jax.Array:
    """Returns visible_BQK, boolean, from positions alone (B may be 1)."""
    i_BQ1, j_B1K = query_position_BQ[:, :, None], key_position_BK[:, None, :]
    visible_BQK = j_B1K <= i_BQ1 if self.causal else jnp.ones_like(j_B1K <= i_BQ1)
    if self.block is not None:
      visible_BQK &= i_BQ1 // self.block - j_B1K // self.block <= 1
    if self.window is not None:
      visible_BQK &= i_BQ1 - j_B1K < self.window
    return visible_BQK

  def may_see(self, query_low, query_high, key_low, key_high) -> jax.Array:
    """Returns whether any query in a range of positions may see any key in another: a tile's test.

    Args:
      query_low: int32 bound (inclusive); the four broadcast to one shape.
      query_high: likewise.
      key_low: likewise.
      key_high: likewise.

    Returns:
      A boolean of that shape. False only if `visible` is False for every pair in the ranges.
    """
    seen = key_low <= query_high if self.causal else jnp.ones_like(key_low <= query_high)
    if self.block is not None:
      seen &= query_low // self.block - key_high // self.block <= 1
    if self.window is not None:
      seen &= query_low - key_high < self.window
    return seen


def parse(name: str, train_length: int) -> Mask:
  """Returns the mask that a user asks for by name.

  Args:
    name: 'causal'; 'full', which a bidirectional encoder has; 'blockwise', of blocks of half the
      training length (Sun et al. 2022, arXiv:2212.10554, section 3); 'blockwise:N', of blocks of N
      tokens; or 'window:N', of the last N tokens.
    train_length: of the windows that the model was trained on [tokens].

  Raises:
    errors.UserError: for an unknown name, an N that is no whole number above 0, or 'blockwise' of a
      training length that has no half.
  """
  whole = {'causal': Mask(), 'full': Mask(causal=False)}
  if name in whole:
    return whole[name]
  if name == 'blockwise':
    if train_length < 2 or train_length % 2:
      raise errors.UserError(
        f"mask 'blockwise' takes half the training length, but {train_length=} is not even and "
        'above 0; give the block, as in blockwise:128'
      )
    return Mask(block=train_length // 2)
  kind, _, tokens = name.partition(':')
  if kind not in ('blockwise', 'window'):
    raise errors.UserError(
      f'unknown mask {name!r}; known: {", ".join(whole)}, blockwise, blockwise:N, window:N'
    )
  if not tokens.isdecimal() or not 0 < int(tokens) < 2**31:
    raise errors.UserError(
      f'mask {name!r} needs a whole number of tokens above 0 (and below 2**31), as in {kind}:128'
    )
  return Mask(block=int(tokens)) if kind == 'blockwise' else Mask(window=int(tokens))


def visible(
  mask: Mask,
  query_position_BQ: jax.Array,
  key_position_BK: jax.Array,
  query_segment_BQ: jax.Array | None,
  key_segment_BK: jax.Array | None,
) -> jax.Array:
  """Returns visible_BQK: what the mask shows within one segment (None: all is one segment)."""
  visible_BQK = mask.visible(query_position_BQ, key_position_BK)
  if query_segment_BQ is None or key_segment_BK is None:
    return visible_BQK
  return visible_BQK & (query_segment_BQ[:, :, None] == key_segment_BK[:, None, :])
