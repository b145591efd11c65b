"""The softmax over keys of two sides, of what each side's gave."""

import jax
import jax.numpy as jnp
import numpy as np

from lex_fire.kernels import sides

HEADS, CHANNELS = 2, 3
# Of four queries the first sees no key, the next those of one side, the last both.
SEEN_YQ = np.array([[False, True, False, True], [False, False, True, True]])


def found(logits_HQK, value_HKC, seen_Q):
  """Returns out_BQHC and log_norm_BHQ of one softmax, by NumPy."""
  weights_HQK = np.exp(logits_HQK) * seen_Q[None, :, None]
  norm_HQ = weights_HQK.sum(axis=2)
  out_HQC = weights_HQK @ value_HKC / np.where(seen_Q, norm_HQ, 1)[..., None]
  log_norm_HQ = np.where(seen_Q, np.log(np.where(seen_Q, norm_HQ, 1)), np.inf)
  return np.float32(out_HQC.transpose(1, 0, 2)[None]), np.float32(log_norm_HQ[None])


def test_softmaxes_joined_are_one_over_the_keys_of_all():
  rng = np.random.default_rng(0)
  logits_YHQK = rng.normal(scale=20, size=(2, HEADS, 4, 5))
  value_YHKC = rng.normal(size=(2, HEADS, 5, CHANNELS))
  shown_YHQK = np.where(SEEN_YQ[:, None, :, None], logits_YHQK, -np.inf)

  out_BQHC, log_norm_BHQ = sides.together(*map(found, logits_YHQK, value_YHKC, SEEN_YQ))

  both = (
    np.concatenate(list(x_YH), axis=axis) for x_YH, axis in ((shown_YHQK, 2), (value_YHKC, 1))
  )
  expected_BQHC, expected_BHQ = found(*both, SEEN_YQ.any(axis=0))
  np.testing.assert_allclose(out_BQHC, expected_BQHC, atol=1e-6)
  np.testing.assert_allclose(log_norm_BHQ, expected_BHQ, rtol=1e-6)


def test_a_side_without_keys_leaves_the_other_as_it_is():
  rng = np.random.default_rng(0)
  one = found(rng.normal(size=(HEADS, 4, 5)), rng.normal(size=(HEADS, 5, CHANNELS)), SEEN_YQ[0])
  nothing = jnp.zeros_like(one[0]), jnp.full_like(one[1], jnp.inf)

  for pair in ((one, nothing), (nothing, one)):
    assert jax.tree.all(jax.tree.map(np.array_equal, sides.together(*pair), one))
