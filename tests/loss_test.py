"""Tests of `lex_fire/loss.py`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lex_fire import loss, sharding

VOCAB = 11


def test_token_losses_equal_float64_at_logits_of_any_size():
  rng = np.random.default_rng(0)
  scale_B11 = np.array([1e-3, 1.0, 100.0, 1e4, 1e30])[:, None, None]
  logits_BLV = (rng.normal(size=(5, 6, VOCAB)) * scale_B11).astype(np.float32)
  targets_BL = rng.integers(0, VOCAB, (5, 6))

  loss_BL = loss.token_losses(logits_BLV, targets_BL)

  exact_BLV = np.float64(logits_BLV)
  highest_BL1 = exact_BLV.max(axis=-1, keepdims=True)
  total_BL = np.log(np.exp(exact_BLV - highest_BL1).sum(axis=-1)) + highest_BL1[..., 0]
  expected_BL = total_BL - np.take_along_axis(exact_BLV, targets_BL[..., None], axis=-1)[..., 0]
  assert loss_BL.dtype == jnp.float32
  # A difference of two numbers as large as the logits carries their rounding.
  error_BL = np.abs(loss_BL - expected_BL) / np.maximum(1.0, np.abs(highest_BL1[..., 0]))
  assert error_BL.max() < 1e-6


def test_the_gradient_of_a_loss_is_softmax_minus_the_target_at_logits_of_any_size():
  logits_BLV = jnp.float32([[[0.0, 1.0, 2.0], [1e4, 0.0, -1e4], [-1e30, 1e30, 0.0]]])

  @jax.jit
  @jax.grad
  def gradient(logits_BLV):
    return loss.token_losses(logits_BLV, jnp.int32([[2, 0, 0]])).sum()

  gradient_BLV = gradient(logits_BLV)

  weight_V = np.exp([0.0, 1.0, 2.0]) / np.exp([0.0, 1.0, 2.0]).sum()
  expected_LV = [weight_V - [0, 0, 1], [0, 0, 0], [-1, 1, 0]]
  np.testing.assert_allclose(gradient_BLV[0], expected_LV, atol=1e-6)


ROWS, LENGTH, WIDTH = 2, 12, 5


@pytest.fixture(scope='module')
def output():
  """Activations, an output and targets."""
  rng = np.random.default_rng(1)
  x_BLD = rng.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
  output_VD = rng.normal(size=(VOCAB, WIDTH)).astype(np.float32)
  return x_BLD, output_VD, rng.integers(0, VOCAB, (ROWS, LENGTH))


def exact(x_BLD, output_VD, targets_BL, weight_BL):
  """The losses and the gradients of their weighted sum, in float64."""
  x_BLD, output_VD = np.float64(x_BLD), np.float64(output_VD)
  weights_BLV = np.exp(x_BLD @ output_VD.T)
  softmax_BLV = weights_BLV / weights_BLV.sum(axis=-1, keepdims=True)
  target_BLV = np.eye(VOCAB)[targets_BL]
  losses_BL = -np.log((softmax_BLV * target_BLV).sum(axis=-1))
  error_BLV = (softmax_BLV - target_BLV) * weight_BL[..., None]
  return losses_BL, error_BLV @ output_VD, np.einsum('BLV,BLD->VD', error_BLV, x_BLD)


# All logits, those of half the tokens, of one and a bit, which is one, and of less than one token.
@pytest.mark.parametrize('at_once', [ROWS * LENGTH * VOCAB, 144, 2 * ROWS * VOCAB - 1, 1])
@pytest.mark.parametrize('length', [LENGTH, 7])
def test_chunked_losses_and_gradients_equal_float64(output, at_once, length, monkeypatch):
  monkeypatch.setattr(loss, 'LOGITS_AT_ONCE', at_once)
  x_BLD, output_VD, targets_BL = output[0][:, :length], output[1], output[2][:, :length]
  weight_BL = np.linspace(0.0, 1.0, targets_BL.size).reshape(targets_BL.shape)

  @jax.jit
  def losses(x_BLD, output_VD):
    loss_BL = loss.chunked_losses(x_BLD, output_VD, targets_BL)
    return (loss_BL * weight_BL).sum(), loss_BL

  gradients, loss_BL = jax.grad(losses, argnums=(0, 1), has_aux=True)(x_BLD, output_VD)

  expected_BL, *expected = exact(x_BLD, output_VD, targets_BL, weight_BL)
  np.testing.assert_allclose(loss_BL, expected_BL, rtol=1e-5)
  for gradient, of_float64 in zip(gradients, expected, strict=True):
    np.testing.assert_allclose(gradient, of_float64, atol=1e-5)


@pytest.mark.parametrize(('at_once', 'chunks'), [(ROWS * LENGTH * VOCAB, 1), (50, 3), (1, 6)])
def test_each_chunk_has_tokens_of_all_devices_that_share_a_row(
  output, at_once, chunks, monkeypatch
):
  """Logits of 24 tokens over two devices are 132 each; a chunk has one token of each at least."""
  monkeypatch.setattr(loss, 'LOGITS_AT_ONCE', at_once)

  with jax.set_mesh(sharding.make_mesh(sequence=2, devices=jax.devices()[:2])):
    lowered = jax.jit(lambda *arrays: loss.chunked_losses(*arrays)).lower(*output)
    loss_BL = lowered.compile()(*output)

  expected_BL, *_ = exact(*output, np.ones((ROWS, LENGTH)))
  np.testing.assert_allclose(loss_BL, expected_BL, rtol=1e-5)
  assert f'tensor<{ROWS}x{LENGTH // chunks}x{VOCAB}xf32>' in lowered.as_text()


@pytest.mark.parametrize('chunks', [1, 2, 6])
def test_no_more_logits_are_there_than_those_of_a_chunk(output, chunks, monkeypatch):
  monkeypatch.setattr(loss, 'LOGITS_AT_ONCE', ROWS * LENGTH * VOCAB // chunks)
  x_BLD, output_VD, targets_BL = output

  def total(x_BLD, output_VD):
    return loss.chunked_losses(x_BLD, output_VD, targets_BL).sum()

  text = jax.jit(jax.grad(total, argnums=(0, 1))).lower(x_BLD, output_VD).as_text()

  sizes = [tuple(map(int, size.split('x'))) for size in re.findall(r'tensor<([\dx]+)xf32>', text)]
  most = max(np.prod(size) for size in sizes if VOCAB in size and size != (VOCAB, WIDTH))
  assert most == ROWS * LENGTH * VOCAB // chunks


def test_the_gradient_of_an_output_is_summed_in_float32_for_activations_of_bfloat16(monkeypatch):
  monkeypatch.setattr(loss, 'LOGITS_AT_ONCE', 1)
  x_1LD = jnp.ones((1, 513, 1), jnp.bfloat16)
  targets_1L = jnp.zeros((1, 513), jnp.int32)
  output_VD = jnp.zeros((2, 1), jnp.float32)

  gradient_VD = jax.grad(lambda o: loss.chunked_losses(x_1LD, o, targets_1L).sum())(output_VD)

  # Each token adds a half, and in bfloat16 128 and a half is 128.
  np.testing.assert_allclose(gradient_VD, [[-256.5], [256.5]])
