"""Which keys a query may see, as one small static value that every implementation reads."""

import dataclasses
import functools

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

  >>> position_BL = jnp.arange(5)[None]
  >>> Mask(block=2).visible(position_BL, position_BL)[0, 4].tolist()
  [False, False, True, True, True]

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
    i_BQ1 = query_position_BQ[:, :, None]
    j_BQK = jnp.broadcast_arrays(key_position_BK[:, None, :], i_BQ1)[0]
    return _within(j_BQK, self.first(i_BQ1), self.last(i_BQ1))

  def first(self, position: jax.Array) -> jax.Array | None:
    """Returns the first position that a query may see, elementwise; None: no bound."""
    firsts = []
    if self.block is not None:
      firsts.append((position // self.block - 1) * self.block)
    if self.window is not None:
      firsts.append(position - self.window + 1)
    return functools.reduce(jnp.maximum, firsts) if firsts else None

  def last(self, position: jax.Array) -> jax.Array | None:
    """Returns the last position that a query may see, elementwise; None: no bound."""
    return position if self.causal else None

  def may_see(self, query_low, query_high, key_low, key_high) -> jax.Array:
    """Returns whether any query in a range of positions may see any key in another: a tile's test.

    Args:
      query_low: int32 bound (inclusive); the four broadcast to one shape.
      query_high: likewise.
      key_low: likewise.
      key_high: likewise.

    Returns:
      A boolean of that shape. False only if the mask hides every pair in the ranges.
    """
    query_low, query_high, key_low, key_high = jnp.broadcast_arrays(
      query_low, query_high, key_low, key_high
    )
    seen = _within(key_low, None, self.last(query_high))
    return seen & _within(key_high, self.first(query_low), None)


def _within(position, first, last):
  """Returns whether a position lies between bounds, inclusive; None is no bound."""
  inside = jnp.ones_like(position, bool)
  if first is not None:
    inside &= first <= position
  if last is not None:
    inside &= position <= last
  return inside


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
