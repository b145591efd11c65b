"""Tests `../lex_fire/timing.py`: what a run's wall time goes to."""

import json
import types

import pytest

from lex_fire import timing


class Device:
  """Stands for an output of a step that is computed until `done`, on the clock of a test."""

  def __init__(self, watch, done):
    self._watch, self._done = watch, done

  def is_ready(self):
    return self._watch.now >= self._done


@pytest.fixture
def watch(monkeypatch):
  """A clock that stands still until the test moves it: `watch.now += seconds`."""
  watch = types.SimpleNamespace(now=1000.0)
  monkeypatch.setattr(timing, 'time', types.SimpleNamespace(monotonic=lambda: watch.now))
  return watch


def spend(watch, *, computed, part, seconds, steps=4):
  """Takes steps of `computed` seconds, before each of which the host works for `seconds`."""
  spent = timing.Spent()
  spent.dispatched(Device(watch, watch.now))
  watch.now += 30.0  # compiles
  spent.warm()
  free = watch.now  # when the devices have done all that they were given
  for _ in range(steps):
    with spent.on(part):
      watch.now += seconds
    free = max(free, watch.now) + computed
    spent.dispatched(Device(watch, free))
  watch.now = free
  return spent


def test_what_the_host_does_while_the_devices_compute_costs_nothing(watch):
  spent = spend(watch, computed=10.0, part='input', seconds=2.0)

  shares = spent.shares()

  # Only before the first of the four did they wait.
  assert shares['input'] == pytest.approx(2 / 42)
  assert shares['step'] == pytest.approx(40 / 42)
  assert sum(shares.values()) == pytest.approx(1.0)


def test_what_the_devices_wait_for_is_lost_and_never_said_to_be_less(watch):
  spent = spend(watch, computed=2.0, part='input', seconds=10.0)

  shares = spent.shares()

  # Of the 42 s they wait 10 and three times 8: that it is not 10 could be told only by waiting.
  assert shares['input'] == pytest.approx(40 / 42)


@pytest.mark.parametrize('part', timing.PARTS)
def test_each_part_is_told_apart(watch, part):
  spent = spend(watch, computed=0.0, part=part, seconds=1.0)

  expected = dict.fromkeys(('step', *timing.PARTS), 0.0) | {part: 1.0}
  assert spent.shares() == pytest.approx(expected)


def test_shares_are_of_the_time_since_they_were_asked_for(watch):
  spent = spend(watch, computed=5.0, part='logging', seconds=5.0, steps=1)
  spent.shares()

  watch.now += 3.0
  with spent.on('checkpoint'):
    watch.now += 1.0

  assert spent.shares() == pytest.approx(
    dict.fromkeys(timing.PARTS, 0.0) | {'step': 0.75, 'checkpoint': 0.25}
  )
  assert sum(spent.shares().values()) == 0.0  # no time has passed


def test_a_part_that_is_going_on_counts_the_next_time(watch):
  spent = spend(watch, computed=1.0, part='input', seconds=0.0, steps=1)

  with spent.on('logging'):
    watch.now += 2.0
    assert spent.shares()['step'] == pytest.approx(1.0)
    watch.now += 2.0

  assert spent.shares()['logging'] == pytest.approx(1.0)


def test_the_line_at_the_end_is_of_the_whole_run_without_its_first_step(watch):
  spent = spend(watch, computed=7.5, part='validation', seconds=2.5, steps=1)
  spent.shares()

  assert spent.lines() == [
    'time: step 75.0%, input 0.0%, logging 0.0%, validation 25.0%, checkpoint 0.0% of 10.0 s; the '
    'first step, which compiles, took 30.0 s'
  ]


def test_a_part_is_measured_although_it_ends_in_an_error(watch):
  spent = spend(watch, computed=1.0, part='input', seconds=0.0, steps=1)

  with pytest.raises(ZeroDivisionError), spent.on('checkpoint'):
    watch.now += 1.0
    raise ZeroDivisionError

  assert spent.shares()['checkpoint'] == pytest.approx(0.5)


def test_a_run_without_a_step_has_no_line():
  assert timing.Spent().lines() == []


# Of a run


def test_a_run_logs_shares_that_add_up(fire_run):
  workdir, _ = fire_run

  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]

  logged = [row for row in rows if 'loss' in row]
  assert len(logged) == 12
  for row in logged:
    shares = [row[f'{name}_share'] for name in ('step', *timing.PARTS)]
    assert sum(shares) == pytest.approx(1.0)
    assert all(share >= 0 for share in shares)
  # Those since the step before: only after a fourth is there a checkpoint.
  saved = [row['step'] - 1 for row in logged if row['checkpoint_share']]
  assert saved == [4, 8]
