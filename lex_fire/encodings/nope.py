"""No position encoding: a decoder learns order from the causal mask alone.

Kazemnejad et al. 2023, arXiv:2305.19466.
"""

from lex_fire.encodings import base


def nope() -> base.Encoding:
  """NoPE: logits are q.k / sqrt(C), whatever the positions."""
  return base.Encoding(name='nope', init=base.no_parameters)
