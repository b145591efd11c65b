"""Tests `../lex_fire/profiling.py`: traces of some steps."""

import contextlib
import gzip
import json

import jax
import pytest
import tiny

from lex_fire import errors, profiling, train


def traced(workdir, run):
  """Returns the steps that a trace of this process has, by what `train` calls them."""
  # For XProf, and for any viewer of traces.
  kinds = ('xplane.pb', 'trace.json.gz')
  (plane,), (viewed,) = (
    (workdir / 'plugins' / 'profile' / run).glob(f'*-0.{kind}') for kind in kinds
  )
  assert b'step_num' in plane.read_bytes()
  events = json.loads(gzip.decompress(viewed.read_bytes()))['traceEvents']
  return [int(event['args']['step_num']) for event in events if event.get('name') == 'train']


def test_a_run_leaves_a_trace_of_the_steps_asked_for_where_tensorboard_looks(
  corpus, tmp_path, capsys
):
  train.train(tiny.config(corpus, train={'steps': 5}), tmp_path, profiled=(2, 3))

  assert traced(tmp_path, 'steps-2-3') == [2, 3]
  assert f'profile written: tensorboard --logdir={tmp_path}' in capsys.readouterr().out


def test_a_run_that_ends_among_the_steps_writes_them_too(tmp_path):
  profile = profiling.Profile(tmp_path, (2, 9), done=0)

  with pytest.raises(errors.UserError, match='no room'), contextlib.closing(profile):
    profile.start()
    with jax.profiler.StepTraceAnnotation('train', step_num=2):
      raise errors.UserError('no room')

  assert traced(tmp_path, 'steps-2-9') == [2]


def test_a_run_that_goes_on_traces_only_what_is_left(tmp_path, capsys):
  assert profiling.Profile(tmp_path, (3, 8), done=2).first == 3
  assert profiling.Profile(tmp_path, (3, 8), done=5).first == 6
  assert capsys.readouterr().out == ''

  assert profiling.Profile(tmp_path, (3, 8), done=8).first == 0  # never

  assert capsys.readouterr().out == 'steps 3 to 8 are taken already, and not profiled\n'


def test_a_run_that_is_not_to_be_profiled_is_not(fire_run, tmp_path):
  profile = profiling.Profile(tmp_path, None, done=3)
  profile.close()

  assert (profile.first, profile.last) == (0, 0)
  assert not list(tmp_path.iterdir())
  assert not (fire_run[0] / 'plugins').exists()


def test_a_trace_that_cannot_be_written_is_said(tmp_path):
  (tmp_path / 'plugins').touch()
  profile = profiling.Profile(tmp_path, (1, 2), done=0)
  profile.start()

  message = "profile of steps 1 to 2 cannot be written into '.*/steps-1-2': .*; make room, or leave"
  with pytest.raises(errors.UserError, match=message):
    profile.stop()


@pytest.mark.parametrize('steps', [(), (3,), (0, 3), (4, 3), (1, 13), (1, 2, 3)])
def test_steps_that_are_no_part_of_the_run_are_refused(steps):
  text = ','.join(map(str, steps))
  with pytest.raises(errors.UserError, match=f'--profile={text} must be .* to train.steps=12'):
    profiling.check(steps, 12)


def test_steps_of_the_run_may_be_profiled_and_need_not():
  assert profiling.check((1, 12), 12) == (1, 12)
  assert profiling.check(None, 12) is None
