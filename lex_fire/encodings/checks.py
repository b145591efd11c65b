"""Whether an encoding is what it has to be, so that whoever writes one is told in a sentence."""

# Not strict: eval_shape carries no types.
# pyright: basic

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lex_fire import errors
from lex_fire.encodings import base

_SIZES = {'num_heads': 4, 'head_dim': 64, 'd_model': 256}
_QUERIES, _KEYS = 2, 3


def check(encoding: base.Encoding) -> None:
  """Refuses an encoding that is not what `base.Encoding` says, by shapes alone.

  Raises:
    errors.UserError: if it has a table without a coordinate; if what `init` returns is not what
      `learned` says; or if its bias has another shape.
  """
  who = f'encoding {encoding.name!r}'
  if encoding.table is not None and encoding.coordinate is None:
    raise errors.UserError(f'{who} has a table and no coordinate; give it both, or neither')
  try:
    params = jax.eval_shape(lambda: encoding.init(jax.random.key(0), **_SIZES))
  except (errors.UserError, jax.errors.ConcretizationTypeError):
    return  # it encodes other sizes than these, or looks at what it draws
  names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  if bool(names) != encoding.learned:
    raise errors.UserError(
      f'{who} says learned={encoding.learned}, and its init returns {", ".join(names) or "nothing"}'
      f'; say learned={not encoding.learned}'
    )
  if encoding.bias is not None:
    _check_bias(who, encoding.bias, params)


def _check_bias(who: str, bias: Callable[..., jax.Array], params: base.Params) -> None:
  heads = _SIZES['num_heads']
  positions = (jax.ShapeDtypeStruct((1, count), jnp.int32) for count in (_QUERIES, _KEYS))
  found: jax.ShapeDtypeStruct = jax.eval_shape(
    lambda params, i_BQ, j_BK: bias(params, i_BQ, j_BK, heads), params, *positions
  )
  wanted = (1, heads, _QUERIES, _KEYS)
  if (found.shape, found.dtype) != (wanted, jnp.float32):
    raise errors.UserError(
      f'{who} has a bias of {found.dtype}{list(found.shape)} for {heads} heads, {_QUERIES} queries '
      f'and {_KEYS} keys; it must be float32{list(wanted)}: rows, heads, queries, keys'
    )
