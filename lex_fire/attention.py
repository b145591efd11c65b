"""Multi-head attention as a Flax module: project, rotate, attend, project.

It owns its encoding's parameters, and while text is generated the keys and values of the past.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lex_fire import config as config_lib
from lex_fire import encodings, kernels, sharding


def fan_in(axes: int, scale: float = 1.0):
  """An initializer: normal with variance scale^2 / (product of the first `axes` dimensions)."""

  def init(rng, shape):
    deviation = scale * math.prod(shape[:axes]) ** -0.5
    return deviation * jax.random.normal(rng, shape, jnp.float32)

  return init


class Cache(NamedTuple):
  """Keys and values of the past, a ring of K slots: position n lies in slot n modulo K.

  So K = all positions keeps everything, and a mask that reaches back r positions needs but
  K = r + (tokens that come at once) - 1 of them, for text of any length.

  Attributes:
    key_BKGC: rotated, unless the encoding is not prefix stable; in the model's dtype.
    value_BKGC: likewise.
    position_BK: int32.
    segment_BK: int32, 1 for a token, 0 for a slot that holds none yet.
  """

  key_BKGC: jax.Array
  value_BKGC: jax.Array
  position_BK: jax.Array
  segment_BK: jax.Array


def empty_cache(config: config_lib.ModelConfig, batch: int, slots: int) -> Cache:
  """Returns the cache of one attention with no token in it."""
  shape = (batch, slots, config.num_kv_heads, config.head_dim)
  return Cache(
    key_BKGC=jnp.zeros(shape, config.dtype),
    value_BKGC=jnp.zeros(shape, config.dtype),
    position_BK=jnp.zeros((batch, slots), jnp.int32),
    segment_BK=jnp.zeros((batch, slots), jnp.int32),
  )


def _remember(cache: Cache, tokens: Cache) -> Cache:
  """Writes tokens of segment 1 over the oldest slots; those of segment 0 are padding, and lost."""
  slots = cache.position_BK.shape[1]
  slot_BL = jnp.where(tokens.segment_BK > 0, tokens.position_BK % slots, slots)

  # Row by row, so that devices which share the rows have nothing to tell each other.
  def of_row(old, new, slot_L):
    return old.at[slot_L].set(new, mode='drop')

  return jax.tree.map(lambda old, new: jax.vmap(of_row)(old, new, slot_BL), cache, tokens)


class Attention(nn.Module):
  """Grouped-query attention under an encoding.

  Attributes:
    config: the model's shape.
    encoding: rotates queries and keys and biases the logits.
    mask: which keys a query may see.
  """

  config: config_lib.ModelConfig
  encoding: encodings.Encoding
  mask: kernels.Mask

  @nn.compact
  def __call__(self, x_BLD, position_BL, segment_ids_BL, shared_params):
    """Returns [B, L, D] in x's dtype.

    Applied with a variable `cache`, it attends to what is cached and to x itself, which is cached
    too; positions and segments (1, or 0 for padding) must then have all rows.

    Args:
      x_BLD: normalised activations.
      position_BL: int32, a leading 1 broadcasts; None: 0 .. L - 1.
      segment_ids_BL: int32, or None: each row is one segment.
      shared_params: the encoding's parameters if its `shared` is true; unused otherwise.
    """
    c = self.config
    dtype = x_BLD.dtype

    def weight(name, shape, init):
      return self.param(name, init, shape).astype(dtype)

    query_DHC = weight('query_DHC', (c.d_model, c.num_heads, c.head_dim), fan_in(1))
    key_DGC = weight('key_DGC', (c.d_model, c.num_kv_heads, c.head_dim), fan_in(1))
    value_DGC = weight('value_DGC', (c.d_model, c.num_kv_heads, c.head_dim), fan_in(1))
    # Keeps the residual stream's variance independent of depth.
    out_scale = (2 * c.num_layers) ** -0.5
    out_HCD = weight('out_HCD', (c.num_heads, c.head_dim, c.d_model), fan_in(2, out_scale))
    params = shared_params if self.encoding.shared else encoding_params(self, self.encoding, c)

    query_BLHC = jnp.einsum('BLD,DHC->BLHC', x_BLD, query_DHC)
    key_BLGC = jnp.einsum('BLD,DGC->BLGC', x_BLD, key_DGC)
    value_BLGC = jnp.einsum('BLD,DGC->BLGC', x_BLD, value_DGC)
    keys = Cache(key_BLGC, value_BLGC, position_BL, segment_ids_BL)
    place_BL = kernels.positions(x_BLD, position_BL)
    if self.encoding.rotate is not None:
      query_BLHC = self.encoding.rotate(params, query_BLHC, place_BL)
    keys = self._rotated_keys(params, keys, place_BL)
    self.sow('intermediates', 'query_BLHC', query_BLHC)
    self.sow('intermediates', 'key_BLGC', keys.key_BKGC)
    out_BLHC = kernels.attention(
      sharding.constrain(query_BLHC, 'BLHC'),
      sharding.constrain(keys.key_BKGC, 'BKGC'),
      sharding.constrain(keys.value_BKGC, 'BKGC'),
      encoding=self.encoding,
      params=params,
      query_position_BQ=position_BL,
      key_position_BK=keys.position_BK,
      query_segment_BQ=segment_ids_BL,
      key_segment_BK=keys.segment_BK,
      mask=self.mask,
      implementation=c.attention,
      split=sharding.split,
      sequence_axis=sharding.sequence_axis(query_BLHC.shape[1]),
      row_devices=sharding.ways('B'),
    )
    return jnp.einsum('BLHC,HCD->BLD', out_BLHC, out_HCD)

  def _rotated_keys(self, params, new: Cache, place_BL: jax.Array) -> Cache:
    """Returns the keys to attend to, rotated: the new, at their places, after any in the cache."""

    def rotated(keys):
      if self.encoding.rotate is None:
        return keys
      position_BK = place_BL if keys.position_BK is None else keys.position_BK
      return keys._replace(key_BKGC=self.encoding.rotate(params, keys.key_BKGC, position_BK))

    if not self.has_variable('cache', 'keys'):
      return rotated(new)
    cache: Any = self.variable('cache', 'keys', lambda: None)  # Flax infers None from the default
    stable = self.encoding.prefix_stable
    cache.value = _remember(cache.value, rotated(new) if stable else new)
    return cache.value if stable else rotated(cache.value)


def choice(
  transformer: Any, length: int, slots: int | None = None, *, counted: bool, rows: int = 1
) -> kernels.Choice:
  """Returns by what implementation a `model.Transformer` attends at a length, and why.

  On the mesh of `jax.set_mesh`, if any.

  Args:
    transformer: the model.
    length: of rows [tokens].
    slots: of a cache that has the keys, if one does.
    counted: whether it is given neither positions nor segments.
    rows: of all devices, that have positions of their own; 1: all share theirs.
  """
  c = transformer.config
  query, key = (
    jax.ShapeDtypeStruct((1, count, heads, c.head_dim), jnp.dtype(c.dtype))
    for count, heads in ((length, c.num_heads), (slots or length, c.num_kv_heads))
  )
  mask = transformer.mask or kernels.Mask(causal=c.causal)
  axis = sharding.sequence_axis(length)
  return kernels.choose(
    *(c.attention, transformer.encoding, mask, query, key, axis, counted),
    rows=max(1, rows // sharding.ways('B')),
  )


def line(choices: Iterable[kernels.Choice], where: str = '') -> str:
  """Returns what a command says of choices, each once.

  >>> line([kernels.Choice('chunked', 'as asked')], ' at 512')
  'attention at 512: chunked, as asked'
  """
  told = dict.fromkeys(f'{chosen.implementation}, {chosen.reason}' for chosen in choices)
  return f'attention{where}: {"; ".join(told)}'


def encoding_params(module: nn.Module, encoding: encodings.Encoding, c: config_lib.ModelConfig):
  """Declares the encoding's parameters in `module` under 'encoding'; {} when nothing is learned."""
  sizes = {'num_heads': c.num_heads, 'head_dim': c.head_dim, 'd_model': c.d_model}
  if not encoding.learned:
    return encoding.init(None, **sizes)  # refuses sizes that it cannot encode
  return module.param('encoding', lambda rng: encoding.init(rng, **sizes))
