"""What a run reports: FLOPs by count, logs that survive a kill, pace and clock."""

import json
import types

import jax
import jax.numpy as jnp
import pytest

from lex_fire import config as config_lib
from lex_fire import encodings, loss, metrics, model

# FLOPs


def forward_flops(c, length):
  """Counts the products of one sequence, twice (multiply, add) for each element, pair by pair."""
  products = []  # (rows, inner, columns)
  for _ in range(c.num_layers):
    products += [(length, c.d_model, c.head_dim)] * (c.num_heads + 2 * c.num_kv_heads)  # q, k, v
    for query in range(length):
      for _ in range(query + 1 if c.causal else length):  # the keys that it sees
        for _ in range(c.num_heads):
          products += [(1, c.head_dim, 1), (1, 1, c.head_dim)]  # the logit; weight times value
    products += [(length, c.num_heads * c.head_dim, c.d_model)]
    products += [(length, c.d_model, c.d_ff)] * (2 if c.activation == 'swiglu' else 1)
    products += [(length, c.d_ff, c.d_model)]
  products += [(length, c.d_model, c.vocab_size)]
  return sum(2 * rows * inner * columns for rows, inner, columns in products)


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('activation', ['gelu', 'swiglu'])
@pytest.mark.parametrize('num_kv_heads', [1, 4])
def test_flops_of_training_are_three_times_the_forward_products(
  activation, num_kv_heads, tied, causal
):
  """The gradient of a product is two of its size; the input embedding is a look-up, and free."""
  c = config_lib.ModelConfig(
    num_layers=3,
    d_model=12,
    num_heads=4,
    num_kv_heads=num_kv_heads,
    head_dim=5,
    d_ff=20,
    vocab_size=17,
    activation=activation,
    tied_embeddings=tied,
    causal=causal,
  )

  for length in (1, 7, 16):
    expected = 3 * forward_flops(c, length) / length
    assert metrics.train_flops_per_token(c, length) == pytest.approx(expected, rel=1e-12)


def test_flops_of_training_are_those_that_xla_counts():
  """XLA's count is that of dense attention, L keys a query for our (L + 1) / 2, and of all sums.

  At D = 64 those elementwise operations, norms, softmax and the rest, are less than a quarter.
  """
  length = 32
  c = config_lib.ModelConfig(
    num_layers=2,
    d_model=64,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    d_ff=256,
    vocab_size=128,
    attention='reference',
  )
  transformer = model.Transformer(c, encodings.get('nope'))
  tokens_BL = jax.ShapeDtypeStruct((2, length), jnp.int32)

  def total(params, tokens_BL):
    return loss.token_losses(transformer.apply(params, tokens_BL), tokens_BL).sum()

  params = jax.eval_shape(transformer.init, jax.random.key(0), tokens_BL)
  compiled = jax.jit(jax.value_and_grad(total)).lower(params, tokens_BL).compile()
  counted = compiled.cost_analysis()['flops'] / tokens_BL.size

  hidden_keys = length - (length + 1) / 2
  dense = metrics.train_flops_per_token(c, length)
  dense += 12 * c.num_layers * c.num_heads * c.head_dim * hidden_keys
  assert 1.0 <= counted / dense < 1.25


def test_utilization_is_a_fraction_of_the_peak_of_all_devices(monkeypatch):
  assert metrics.utilization(1e12) is None

  monkeypatch.setitem(metrics.PEAK_FLOPS, jax.devices()[0].device_kind, 2e12)

  assert jax.device_count() == 8
  assert metrics.utilization(4e12) == pytest.approx(0.25)


# Logs


def write_run(workdir, first_step, steps):
  writer = metrics.Writer(workdir, first_step)
  for step in steps:
    writer.write(step, {'loss': 10.0 - step})
  writer.flush()


def read_lines(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def read_steps(workdir):
  return [line['step'] for line in read_lines(workdir)]


def test_a_writer_appends_lines_by_step(tmp_path):
  write_run(tmp_path, 0, [1, 2])

  assert read_lines(tmp_path) == [{'step': 1, 'loss': 9.0}, {'step': 2, 'loss': 8.0}]
  assert list(tmp_path.glob('events.*'))


def test_a_resumed_writer_drops_the_steps_after_the_checkpoint_and_keeps_the_earlier(tmp_path):
  write_run(tmp_path, 0, [1, 2, 3, 4, 4, 5, 6])

  write_run(tmp_path, 4, [5, 6, 7])

  assert read_steps(tmp_path) == [1, 2, 3, 4, 4, 5, 6, 7]


def test_a_run_from_the_start_drops_all_lines(tmp_path):
  write_run(tmp_path, 0, [1, 2, 3])

  write_run(tmp_path, 0, [1])

  assert read_steps(tmp_path) == [1]


@pytest.mark.parametrize(
  'torn', [b'{"step": 2, "lo', b'{"step": 2', b'{', b'{"step": 3, "loss": 7.0}', b'\xff\x00']
)
def test_a_line_that_a_kill_cut_short_is_dropped_and_the_next_one_starts_a_line(tmp_path, torn):
  """Cut before its newline, a line may also be whole."""
  write_run(tmp_path, 0, [1, 2])
  with (tmp_path / 'metrics.jsonl').open('ab') as file:
    file.write(torn)

  write_run(tmp_path, 2, [3, 4])

  assert read_steps(tmp_path) == [1, 2, 3, 4]
  assert not list(tmp_path.glob('*.partial'))


def test_only_the_first_process_writes(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)

  write_run(tmp_path, 0, [1])

  assert not list(tmp_path.iterdir())


# Pace


@pytest.fixture
def watch(monkeypatch):
  """A clock that stands still until the test moves it: `watch.now += seconds`."""
  watch = types.SimpleNamespace(now=1000.0)
  monkeypatch.setattr(metrics, 'time', types.SimpleNamespace(monotonic=lambda: watch.now))
  return watch


def test_pace_leaves_out_the_first_step_which_compiles(watch):
  pace = metrics.Pace(first_step=40, steps=100, tokens_per_step=50)

  watch.now += 300.0  # compiles
  pace.warm(41)
  watch.now += 20.0
  rate, seconds_left = pace.measure(51)

  assert rate == pytest.approx(10 * 50 / 20)
  assert seconds_left == pytest.approx(49 * 2.0)


def test_the_rate_is_of_the_steps_since_the_last_measure_and_the_time_left_of_all(watch):
  pace = metrics.Pace(first_step=0, steps=100, tokens_per_step=50)

  pace.warm(1)
  watch.now += 10.0
  pace.measure(11)
  watch.now += 30.0
  rate, seconds_left = pace.measure(21)

  assert rate == pytest.approx(10 * 50 / 30)
  assert seconds_left == pytest.approx(79 * 2.0)  # 40 s for the 20 steps after the first


def test_a_pause_counts_for_the_time_left_and_not_for_the_rate(watch):
  pace = metrics.Pace(first_step=0, steps=100, tokens_per_step=50)

  pace.warm(1)
  watch.now += 10.0
  pace.measure(11)
  watch.now += 60.0  # validates and saves
  pace.resume(11)
  watch.now += 10.0
  rate, seconds_left = pace.measure(21)

  assert rate == pytest.approx(10 * 50 / 10)
  assert seconds_left == pytest.approx(79 * 80 / 20)


def test_a_measure_without_a_second_is_finite(watch):
  pace = metrics.Pace(first_step=0, steps=100, tokens_per_step=50)

  assert pace.measure(1) == (pytest.approx(5e10), 0.0)


def test_nothing_is_said_of_no_step_and_of_none_but_that_which_compiles(watch):
  """As of a run that goes on one step before a line of its log."""
  pace = metrics.Pace(first_step=39, steps=100, tokens_per_step=50)

  assert pace.measure(39) is None
  watch.now += 300.0
  pace.warm(40)
  assert pace.measure(40) is None
  watch.now += 10.0
  assert pace.measure(50) == (pytest.approx(50.0), pytest.approx(50.0))


@pytest.mark.parametrize(
  ('seconds', 'text'),
  [
    (0, '0:00'),
    (9.4, '0:09'),
    (59.6, '1:00'),
    (123, '2:03'),
    (3599.4, '59:59'),
    (3599.6, '1:00:00'),
    (3723, '1:02:03'),
    (100 * 3600 + 1, '100:00:01'),
  ],
)
def test_a_clock_reads_hours_minutes_and_seconds(seconds, text):
  assert metrics.clock(seconds) == text
