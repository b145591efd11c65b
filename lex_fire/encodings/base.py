"""What a position encoding is: a value holding pure functions of positions.

Positions are arguments, never lengths: a kernel tile, a packed row, a decode step, a sequence shard
and an evaluation 64 times past training are the same call. Nothing here knows Flax.

The dimension key of the whole project (one capital a dimension, as the suffix of an array's name):

  B batch         L sequence (queries = keys)     Q queries       K keys
  H heads         G heads of keys and values      C channels per head
  D model width   R rotation pairs (C / 2)        P the two of a pair
  F feed-forward  V vocabulary                    N layers
  W, X widths of an MLP, waves, columns           Z buckets, or rows of a table
  I, J blocks of queries and of keys              Y parts of a tile, number, softmax
  S, T rows and lanes, as a kernel lays them out  1 a broadcast dimension

A position array named `_BL` may have a leading 1: all rows then share their positions, and a bias
is computed once for the batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

Params = Any  # a pytree of float32 arrays; {} when nothing is learned


class Encoding(NamedTuple):
  """A position encoding as pure functions; a factory in `lex_fire.encodings.ENCODINGS` makes one.

  The logits of an encoding at query position i and key position j are, before the softmax,

      sum_c rotate(q, i)_c rotate(k, j)_c exp(log_decay_c (i - j)) / sqrt(C)  +  bias(i, j).

  A multiplicative decay is handed over as its rate and not applied by `rotate`, since only i - j
  matters: whoever computes a tile of logits subtracts an origin near it, so that neither factor
  leaves float32's range at any length, and rotated keys can be cached.

  >>> import jax.numpy as jnp
  >>> from lex_fire import encodings
  >>> alibi = encodings.get('alibi')
  >>> query_position_BQ, key_position_BK = jnp.array([[9]]), jnp.array([[7, 8]])
  >>> alibi.bias({}, query_position_BQ, key_position_BK, 2).tolist()  # [B, H, Q, K]
  [[[[-0.125, -0.0625]], [[-0.0078125, -0.00390625]]]]

  Attributes:
    name: as registered.
    init: (rng, *, num_heads, head_dim, d_model) -> params.
    embed: (params, position_BL, d_model) -> float32 [B, L, D] added to token embeddings, or None.
    rotate: (params, x_BLHC, position_BL) -> x_BLHC in x's dtype, or None.
    log_decay: head_dim -> log_decay_C, static numpy float64 <= 0, nats per token, or None.
    bias: (params, query_position_BQ, key_position_BK, num_heads) -> bias_BHQK, float32 nats added
      to the scaled logits, or None. Finite, with finite gradient, for keys after the query too.
    table: (params, num_heads) -> a `piecewise.Table` of the same bias, computed once for many
      tiles, or None.
    coordinate: (table.coordinate, i_Q1, j_1K) -> x_QK of that table, float32, for the positions of
      queries and keys; all may have more axes before, which broadcast. Where the table has
      breakpoints, monotone in i and in j on each side of i = j, where it is the same for all. Of
      no use without a table.
    factors: two functions whose product `coordinate` is, or None: (table.coordinate, i_Q1, j_1K) ->
      what depends on the distance alone, and (table.coordinate, position) -> a number above 0, of
      the later position, in which it is monotone. Of no use where `coordinate` itself depends on
      the distance alone.
    smooth: whether x of a query is, over the keys before it, as smooth in their distance d as
      log(d) and d^p are, 0 <= p <= 4: kernels may then interpolate it where d is large. Of no use
      without a table.
    waves: position -> float32 [..., W], or None. `coordinate` is the inner product of those of i
      and of j: a kernel can then make x by a product as it makes the logits.
    shared: whether one set of parameters serves all layers (FIRE-S, and whatever is only embedded).
    shift_invariant: whether adding one number to all positions leaves the logits as they are.
    learned: whether `params` holds anything.
    max_length: positions from here on have no encoding [tokens]; None when every position has one.
    bidirectional: whether it tells keys after the query apart, as a bidirectional encoder needs.
    prefix_stable: whether `rotate` turns a position by that position alone. If not (dynamic NTK),
      the logits of a prefix change as the sequence grows, and a cache keeps keys unrotated.
  """

  name: str
  init: Callable[..., Params]
  embed: Callable[[Params, jax.Array, int], jax.Array] | None = None
  rotate: Callable[[Params, jax.Array, jax.Array], jax.Array] | None = None
  log_decay: Callable[[int], np.ndarray] | None = None
  bias: Callable[[Params, jax.Array, jax.Array, int], jax.Array] | None = None
  table: Callable[[Params, int], Any] | None = None
  coordinate: Callable[[Any, jax.Array, jax.Array], jax.Array] | None = None
  factors: tuple[Callable[..., jax.Array], Callable[..., jax.Array]] | None = None
  smooth: bool = False
  waves: Callable[[jax.Array], jax.Array] | None = None
  shared: bool = False
  shift_invariant: bool = True
  learned: bool = False
  max_length: int | None = None
  bidirectional: bool = True
  prefix_stable: bool = True


def no_parameters(rng: jax.Array, *, num_heads: int, head_dim: int, d_model: int) -> Params:
  """The `init` of an encoding that learns nothing."""
  del rng, num_heads, head_dim, d_model
  return {}


def distance(query_position_BQ: jax.Array, key_position_BK: jax.Array) -> jax.Array:
  """Returns i - j as int32 [B, Q, K], exact at every length; positive for a key in the past."""
  return query_position_BQ[:, :, None] - key_position_BK[:, None, :]
