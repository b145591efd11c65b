"""What a run tells of itself costs its devices nothing: no step waits until a number is read."""

import numpy as np
import pytest
import tiny

from lex_fire import optimizer, reporting

MANIFEST = {'tokens': 1000, 'text_bytes': 1000, 'parts': []}


class Scalar:
  """A number that devices may still compute; reading it waits for them."""

  def __init__(self, step, read):
    self._step, self._read = step, read

  def __float__(self):
    self._read.append(self._step)
    return 1.0


def test_a_number_is_read_only_once_the_next_step_is_under_way(corpus, tmp_path):
  config = tiny.config(corpus, train={'steps': 12, 'log_every': 4})
  reporter = reporting.Reporter(config, tmp_path, 0, 0, MANIFEST)
  reporter.warm(0)
  read, seen = [], []

  for done in range(1, 13):
    values = {name: Scalar(done, read) for name in ('loss', 'gradient_norm')}
    reporter.after(done, {'inputs_BL': np.zeros((1, 1))}, values)
    seen.append(sorted(set(read)))

  # Those up to a step that is logged, together, when the one after it has been dispatched.
  assert seen == [[]] * 4 + [[1, 2, 3, 4]] * 4 + [[*range(1, 9)]] * 4
  reporter.close()
  assert sorted(set(read)) == list(range(1, 13))


def test_rates_are_those_of_the_schedule_however_many_steps_there_are(corpus, tmp_path):
  """Of a run without an end too, whose rates would fill the memory."""
  config = tiny.config(corpus, train={'steps': 2**31 - 1})
  reporter = reporting.Reporter(config, tmp_path, 0, 0, MANIFEST)
  rate = optimizer.schedule(config)

  for step in (0, 1, reporting._RATES - 1, reporting._RATES, 10**9):
    assert reporter._rate(step) == pytest.approx(float(rate(step)), rel=1e-6)
