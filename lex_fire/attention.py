"""Multi-head attention as a Flax module: project, rotate, attend, project.

It owns its encoding's parameters.
"""

import math

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

    Args:
      x_BLD: normalised activations.
      position_BL: int32, a leading 1 broadcasts.
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
    if self.encoding.rotate is not None:
      query_BLHC = self.encoding.rotate(params, query_BLHC, position_BL)
      key_BLGC = self.encoding.rotate(params, key_BLGC, position_BL)
    out_BLHC = kernels.attention(
      sharding.constrain(query_BLHC, 'BLHC'),
      sharding.constrain(key_BLGC, 'BLGC'),
      sharding.constrain(value_BLGC, 'BLGC'),
      encoding=self.encoding,
      params=params,
      query_position_BQ=position_BL,
      key_position_BK=position_BL,
      query_segment_BQ=segment_ids_BL,
      key_segment_BK=segment_ids_BL,
      mask=self.mask,
      implementation=c.attention,
    )
    return jnp.einsum('BLHC,HCD->BLD', out_BLHC, out_HCD)


def encoding_params(module: nn.Module, encoding: encodings.Encoding, c: config_lib.ModelConfig):
  """Declares the encoding's parameters in `module` under 'encoding'; {} when nothing is learned."""
  sizes = {'num_heads': c.num_heads, 'head_dim': c.head_dim, 'd_model': c.d_model}
  if not encoding.learned:
    return encoding.init(None, **sizes)  # refuses sizes that it cannot encode
  return module.param('encoding', lambda rng: encoding.init(rng, **sizes))
