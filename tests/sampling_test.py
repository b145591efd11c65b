"""Tests `../lex_fire/sampling.py`: tokens come as often as a float64 oracle says."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lex_fire import errors
from lex_fire.sampling import GREEDY, Sampling, log_weights, sample

VOCAB = 40
CASES = [
  Sampling(),
  Sampling(temperature=0.3),
  Sampling(temperature=4.0),
  Sampling(top_k=1),
  Sampling(top_k=7),
  Sampling(top_k=10 * VOCAB),
  Sampling(top_p=0.05),
  Sampling(top_p=0.9),
  Sampling(temperature=2.0, top_k=9, top_p=0.7),
  Sampling(temperature=0.5, top_k=3, top_p=0.999),
]
every_case = pytest.mark.parametrize('sampling', CASES, ids=str)


def logits(rows=4, scale=2.0):
  """Returns random logits_BV, of which the last row's come in pairs of equals."""
  logits_BV = scale * np.random.default_rng(0).normal(size=(rows, VOCAB))
  logits_BV[-1, 1::2] = logits_BV[-1, ::2]
  return jnp.asarray(logits_BV, jnp.float32)


def expected_probabilities(logits_V, temperature, top_k, top_p):
  """The definition, token by token in float64: likeliest first, and the lower id of equals."""
  order = sorted(range(len(logits_V)), key=lambda token: (-float(logits_V[token]), token))
  kept = order[:top_k]
  weight = {
    token: np.exp((float(logits_V[token]) - float(max(logits_V))) / temperature) for token in kept
  }
  total, mass, nucleus = sum(weight.values()), 0.0, []
  for token in kept:
    nucleus.append(token)
    mass += weight[token] / total
    if mass >= top_p:
      break
  probability_V = np.zeros(len(logits_V))
  for token in nucleus:
    probability_V[token] = weight[token] / sum(weight[other] for other in nucleus)
  return probability_V


@functools.partial(jax.jit, static_argnums=(1, 2))
def draws(logits_V, sampling, count, seed=0):
  """Returns the tokens drawn at positions 0 .. count - 1 of the first row."""

  def one(position):
    return sample(logits_V[None], sampling, jnp.uint32(seed), position[None])[0]

  return jax.lax.map(one, jnp.arange(count), batch_size=1000)


@every_case
def test_the_distribution_is_the_oracles(sampling):
  logits_BV = logits()

  found_BV = jax.nn.softmax(log_weights(logits_BV, sampling), axis=1)

  for found_V, logits_V in zip(found_BV, logits_BV, strict=True):
    expected_V = expected_probabilities(
      logits_V, sampling.temperature, sampling.top_k, sampling.top_p
    )
    np.testing.assert_allclose(found_V, expected_V, atol=1e-6)
    np.testing.assert_array_equal(found_V > 0, expected_V > 0)


@pytest.mark.parametrize('sampling', [CASES[0], CASES[8]], ids=str)
def test_tokens_come_as_often_as_their_probability_says(sampling):
  count, logits_V = 20_000, logits(1)[0]

  token_L = np.asarray(draws(logits_V, sampling, count))

  probability_V = expected_probabilities(
    logits_V, sampling.temperature, sampling.top_k, sampling.top_p
  )
  found_V = np.bincount(token_L, minlength=VOCAB)
  likely_V = probability_V * count > 5
  assert found_V[probability_V == 0].sum() == 0
  # Pearson's statistic has mean n and variance 2 n for n + 1 cells.
  square_V = (found_V - probability_V * count) ** 2 / np.maximum(probability_V * count, 1e-9)
  cells = likely_V.sum() - 1
  assert abs(square_V[likely_V].sum() - cells) < 4 * np.sqrt(2 * cells)


def test_draws_depend_on_seed_row_and_position_alone():
  logits_V = logits(1)[0]
  batch_BV = jnp.stack([logits_V] * 3)
  position_B = jnp.int32([5, 5, 9])

  token_B = np.asarray(sample(batch_BV, Sampling(), jnp.uint32(7), position_B))
  fewer_B = np.asarray(sample(batch_BV[:2], Sampling(), jnp.uint32(7), position_B[:2]))

  np.testing.assert_array_equal(token_B[:2], fewer_B)
  many = [np.asarray(draws(logits_V, Sampling(), 1000, seed)) for seed in (0, 0, 1)]
  np.testing.assert_array_equal(many[0], many[1])
  assert (many[0] != many[2]).mean() > 0.5  # another seed
  assert (many[0][1:] != many[0][:-1]).mean() > 0.5  # another position
  rows = [
    np.asarray(sample(batch_BV, Sampling(), jnp.uint32(seed), jnp.int32([5, 5, 5])))
    for seed in range(20)
  ]
  assert (np.stack(rows)[:, 0] != np.stack(rows)[:, 1]).mean() > 0.5  # another row


def test_a_limit_that_keeps_the_token_drawn_without_it_changes_nothing():
  logits_V = logits(1)[0]
  free, limited = (
    np.asarray(draws(logits_V, sampling, 1000)) for sampling in (Sampling(), Sampling(top_k=7))
  )

  kept = np.isin(free, np.argsort(-logits_V, stable=True)[:7])

  assert 0.3 < kept.mean() < 1
  np.testing.assert_array_equal(free[kept], limited[kept])


@pytest.mark.parametrize('sampling', [GREEDY, Sampling(temperature=1e-300), Sampling(top_k=1)])
def test_a_temperature_of_0_or_near_it_and_a_top_k_of_1_take_the_likeliest(sampling):
  logits_BV = logits(3)[:2]

  for seed in range(3):
    token_B = sample(logits_BV, sampling, jnp.uint32(seed), jnp.int32([0, 3]))
    np.testing.assert_array_equal(token_B, logits_BV.argmax(axis=1))


def test_of_equal_logits_the_lower_ids_are_kept():
  log_weights_BV = np.asarray(log_weights(jnp.zeros((1, 8)), Sampling(top_k=6, top_p=0.4)))

  np.testing.assert_array_equal(np.isfinite(log_weights_BV), [[1, 1, 1, 0, 0, 0, 0, 0]])


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'temperature': -0.1}, 'temperature=-0.1 must be 0'),
    ({'temperature': float('nan')}, 'temperature=nan must be 0'),
    ({'temperature': float('inf')}, 'temperature=inf must be 0'),
    ({'top_k': 0}, 'top_k=0 must be a whole number of at least 1'),
    ({'top_p': 0.0}, 'top_p=0.0 must be above 0'),
    ({'top_p': 1.5}, 'top_p=1.5 must be above 0 and at most 1'),
    ({'top_p': float('nan')}, 'top_p=nan must be above 0'),
  ],
)
def test_what_no_draw_can_be_is_refused(options, message):
  with pytest.raises(errors.UserError, match=re.escape(message)):
    Sampling(**options)
