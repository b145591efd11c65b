"""The Transformer: embed, blocks of attention and MLP with norms before them, norm, logits."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from lex_fire import attention, encodings, errors, kernels, loss, rematerialization, sharding
from lex_fire import config as config_lib
from lex_fire.encodings import piecewise


class Norm(nn.Module):
  """LayerNorm (scale and bias) or RMSNorm (scale), computed in float32."""

  config: config_lib.ModelConfig
  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x_BLD):
    dtype, x_BLD = x_BLD.dtype, x_BLD.astype(jnp.float32)
    scale_D = self.param('scale_D', nn.initializers.ones, (x_BLD.shape[-1],))
    if self.config.norm == 'layernorm':
      x_BLD = x_BLD - x_BLD.mean(axis=-1, keepdims=True)
    x_BLD = x_BLD * jax.lax.rsqrt(jnp.square(x_BLD).mean(axis=-1, keepdims=True) + self.epsilon)
    x_BLD = x_BLD * scale_D[None, None]
    if self.config.norm == 'layernorm':
      x_BLD = x_BLD + self.param('bias_D', nn.initializers.zeros, scale_D.shape)[None, None]
    return x_BLD.astype(dtype)


class Mlp(nn.Module):
  """GELU: gelu(x W) U. SwiGLU: (silu(x W) * x V) U (Shazeer 2020, arXiv:2002.05202)."""

  config: config_lib.ModelConfig

  @nn.compact
  def __call__(self, x_BLD):
    c = self.config
    shape = (c.d_model, c.d_ff)
    in_DF = self.param('in_DF', attention.fan_in(1), shape).astype(x_BLD.dtype)
    hidden_BLF = jnp.einsum('BLD,DF->BLF', x_BLD, in_DF)
    if c.activation == 'swiglu':
      gate_DF = self.param('gate_DF', attention.fan_in(1), shape).astype(x_BLD.dtype)
      hidden_BLF = jax.nn.silu(jnp.einsum('BLD,DF->BLF', x_BLD, gate_DF)) * hidden_BLF
    else:
      hidden_BLF = jax.nn.gelu(hidden_BLF)
    out_init = attention.fan_in(1, (2 * c.num_layers) ** -0.5)
    out_FD = self.param('out_FD', out_init, shape[::-1]).astype(x_BLD.dtype)
    return jnp.einsum('BLF,FD->BLD', sharding.constrain(hidden_BLF, 'BLF'), out_FD)


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""

  config: config_lib.ModelConfig
  encoding: encodings.Encoding
  mask: kernels.Mask

  @nn.compact
  def __call__(self, x_BLD, position_BL, segment_ids_BL, shared_params):
    c = self.config
    attend = attention.Attention(c, self.encoding, self.mask, name='attention')
    y_BLD = Norm(c, name='attention_norm')(x_BLD)
    x_BLD = x_BLD + attend(y_BLD, position_BL, segment_ids_BL, shared_params)
    x_BLD = x_BLD + Mlp(c, name='mlp')(Norm(c, name='mlp_norm')(x_BLD))
    return sharding.constrain(x_BLD, 'BLD'), None  # (carry, output) of a scan over layers


class Transformer(nn.Module):
  """A decoder, or an encoder if its config is not causal; any length, with any encoding.

  Attributes:
    config: the model's shape.
    encoding: the position encoding; owned by each attention, or by the model if it is `shared`.
    mask: which keys a query may see; None: all that the config's `causal` lets it.
  """

  config: config_lib.ModelConfig
  encoding: encodings.Encoding
  mask: kernels.Mask | None = None

  @nn.compact
  def __call__(
    self,
    tokens_BL: jax.Array,
    position_BL: jax.Array | None = None,
    segment_ids_BL: jax.Array | None = None,
    targets_BL: jax.Array | None = None,
  ) -> jax.Array:
    """Returns logits_BLV, float32, or of targets their loss_BL, for which fewer logits are held.

    Args:
      tokens_BL: int32 ids below vocab_size.
      position_BL: int32 positions in each segment; a leading 1 broadcasts; None: 0 .. L - 1.
      segment_ids_BL: int32, a token sees only its own segment; None: each row is one segment.
      targets_BL: int32, for `loss.chunked_losses`.

    Raises:
      errors.UserError: for a row longer than the encoding's max_length.
    """
    c, encoding = self.config, self.encoding
    check_length(encoding, tokens_BL.shape[1])
    shared_params = attention.encoding_params(self, encoding, c) if encoding.shared else {}
    # Rows of unit length in a tied output give logits of order 1; the input scales them back up
    # (Vaswani et al. 2017, section 3.4). A tied model so begins by predicting its input, with a
    # loss above log V by order sqrt(D), and unlearns that in its first steps.
    embedding_VD = self.param('embedding_VD', _embedding_init, (c.vocab_size, c.d_model))
    x_BLD = embedding_VD[tokens_BL] * c.d_model**0.5
    if encoding.embed is not None:
      place_BL = kernels.positions(x_BLD, position_BL)
      x_BLD = x_BLD + encoding.embed(shared_params, place_BL, c.d_model)
    x_BLD = sharding.constrain(x_BLD.astype(c.dtype), 'BLD')
    x_BLD = self._blocks(x_BLD, position_BL, segment_ids_BL, shared_params)
    x_BLD = Norm(c, name='norm')(x_BLD)
    if c.tied_embeddings:
      output_VD = embedding_VD
    else:
      output_VD = self.param('output_VD', _embedding_init, (c.vocab_size, c.d_model))
    if targets_BL is None:
      return loss.logits(x_BLD, output_VD)
    return loss.chunked_losses(x_BLD, output_VD, targets_BL)

  def _blocks(self, x_BLD, position_BL, segment_ids_BL, shared_params):
    c = self.config
    mask = self.mask or kernels.Mask(causal=c.causal)
    policy = rematerialization.POLICIES[c.remat]
    block = nn.remat(Block, policy=policy) if policy else Block
    rest = (position_BL, segment_ids_BL, shared_params)
    if c.scan_layers:
      block = nn.scan(
        block,
        variable_axes={'params': 0, 'cache': 0, 'intermediates': 0},
        split_rngs={'params': True},
        # Flax leaves in_axes unannotated; a type checker takes it for the int of its default.
        in_axes=cast(Any, (nn.broadcast,) * len(rest)),
        length=c.num_layers,
      )
      return block(c, self.encoding, mask, name='blocks')(x_BLD, *rest)[0]
    for layer in range(c.num_layers):
      x_BLD, _ = block(c, self.encoding, mask, name=f'block_{layer}')(x_BLD, *rest)
    return x_BLD


def initial(transformer: Transformer, rng: jax.Array) -> Any:
  """Returns a model's parameters before training.

  They depend neither on the length of what it is given nor on how it computes attention, of which
  some kernels take no row of one token.
  """
  config = dataclasses.replace(transformer.config, attention='reference')
  return transformer.clone(config=config).init(rng, jnp.zeros((1, 1), jnp.int32))['params']


def empty_cache(config: config_lib.ModelConfig, batch: int, slots: int) -> dict[str, Any]:
  """Returns the variable collection `cache` of a model that has seen no token.

  Applied with it and `mutable=['cache']`, a model takes the next tokens of each row, at positions
  that follow those before, and attends to the cached ones as if all had come at once. Segments are
  1, and 0 for padding at the end of shorter rows.

  Args:
    config: the model's shape.
    batch: rows.
    slots: positions to keep a row; see `attention.Cache` [tokens].
  """

  def of_block():
    return {'attention': {'keys': attention.empty_cache(config, batch, slots)}}

  if not config.scan_layers:  # arrays of their own for each, so that a program may be given them
    return {f'block_{layer}': of_block() for layer in range(config.num_layers)}
  return {
    'blocks': jax.tree.map(lambda x: jnp.broadcast_to(x, (config.num_layers, *x.shape)), of_block())
  }


def tabulated(transformer: Transformer, params: Any) -> tuple[Transformer, Any]:
  """Returns a model and parameters that give the same logits by a table of the bias, made once.

  They are what they were if there is no table; if the bias is one of the distance, which is a line
  or is looked up already; and beside a rotation or an embedding, which have their own parameters.
  """
  encoding = transformer.encoding
  has_more = encoding.rotate is not None or encoding.embed is not None
  if encoding.table is None or encoding.shift_invariant or has_more:
    return transformer, params

  def of_tree(tree):
    return {
      name: _table(encoding, transformer.config, leaf)
      if name == 'encoding'
      else (of_tree(leaf) if isinstance(leaf, Mapping) else leaf)
      for name, leaf in tree.items()
    }

  return transformer.clone(encoding=piecewise.tabulated(encoding)), of_tree(params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _table(encoding, config, params):
  """Returns the table of an encoding's parameters, of all layers if those are stacked."""

  def of_layer(params):
    return encoding.table(params, config.num_heads)

  table = jax.vmap(of_layer) if config.scan_layers and not encoding.shared else of_layer
  return jax.tree.map(lambda array: sharding.constrain(array, ''), table(params))


def _embedding_init(rng, shape):
  return jax.random.normal(rng, shape, jnp.float32) * shape[1] ** -0.5


def check_length(encoding: encodings.Encoding, length: int) -> None:
  """Raises errors.UserError if the encoding has no positions for rows this long."""
  if encoding.max_length is not None and length > encoding.max_length:
    raise errors.UserError(
      f'{length=} is past the {encoding.max_length} positions that encoding {encoding.name!r} has; '
      'use fewer tokens, or train with a larger max_length'
    )
