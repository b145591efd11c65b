"""Scripts of configs/launch, with stand-ins for the programs of clouds."""

import os
import pathlib
import signal
import subprocess
import time

import pytest

LAUNCH = pathlib.Path(__file__).parents[1] / 'configs' / 'launch'
COMMAND = ('lex_fire.train', '--config=configs/c4.py:size=base,mesh=v5e-256', '--workdir=a b')


@pytest.fixture
def launch(tmp_path):
  """Calls a script and returns its status, and what each call of a stand-in was given."""

  def call(script, *arguments, stand_ins, **variables):
    told = tmp_path / 'told'
    for name in stand_ins:
      path = tmp_path / name
      path.write_text(f'#!/usr/bin/env bash\nprintf "%s\\0" "$@" $\'\\n\' >> {told}\n')
      path.chmod(0o755)
    path = f'{tmp_path}:{os.environ["PATH"]}'
    done = subprocess.run(
      [LAUNCH / script, *arguments],
      env={'PATH': path, **variables},
      capture_output=True,
      text=True,
    )
    calls = told.read_text().split('\n\0') if told.exists() else []
    return done, [call.split('\0')[:-1] for call in calls[:-1]]

  return call


CLOUD = {'ZONE': 'here', 'PROJECT': 'mine'}


def test_a_slice_runs_the_command_on_all_hosts_with_its_flags_as_they_were(launch):
  done, (start, log) = launch('tpu_vm.sh', *COMMAND, stand_ins=['gcloud'], TPU='tpu', **CLOUD)

  assert done.returncode == 0
  assert start[:5] == ['compute', 'tpus', 'tpu-vm', 'ssh', 'tpu']
  assert '--worker=all' in start and '--worker=0' in log
  _, _, command = start[-1].partition(' -m ')
  flags = subprocess.check_output(['bash', '-c', f'printf "%s\\n" {command.partition(">")[0]}'])
  assert tuple(flags.decode().splitlines()) == COMMAND


def test_the_connection_to_a_slice_ends_and_the_command_goes_on(tmp_path):
  script = '#!/usr/bin/env bash\ncd; last="${@: -1}"; exec bash -c "${last#--command=}"\n'
  (tmp_path / 'gcloud').write_text(script)
  python = tmp_path / 'lex_fire_checkout' / '.venv' / 'bin' / 'python'
  python.parent.mkdir(parents=True)
  python.write_text(f'#!/usr/bin/env bash\nsleep 1; echo "$@" > {tmp_path}/done\n')
  (tmp_path / 'tail').write_text(f'#!/usr/bin/env bash\ntouch {tmp_path}/followed\n')
  for name in (tmp_path / 'gcloud', tmp_path / 'tail', python):
    name.chmod(0o755)
  variables = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'HOME': str(tmp_path), 'TPU': 'tpu'}

  subprocess.run([LAUNCH / 'tpu_vm.sh', *COMMAND], env={**variables, **CLOUD}, check=True)

  assert (tmp_path / 'followed').exists()
  assert not (tmp_path / 'done').exists()
  while not (tmp_path / 'done').exists() or not (tmp_path / 'done').read_text():
    time.sleep(0.01)
  assert (tmp_path / 'done').read_text().split(maxsplit=1) == ['-m', f'{" ".join(COMMAND)}\n']


def test_gke_runs_the_command_in_each_of_the_slices(launch):
  names = {'CLUSTER': 'cluster', 'TYPE': 'v5litepod-256', 'RUN': 'fire', 'SLICES': '2', **CLOUD}

  done, (call,) = launch('gke.sh', *COMMAND, stand_ins=['xpk'], **names)

  assert done.returncode == 0
  assert call[:2] == ['workload', 'create']
  assert {'--workload=fire', '--num-slices=2', '--tpu-type=v5litepod-256'} <= set(call)
  assert call[-1].endswith(
    'exec python -m lex_fire.train --config=configs/c4.py:size=base\\,mesh=v5e-256 --workdir=a\\ b'
  )


def test_slurm_runs_a_task_for_each_gpu(launch):
  done, (call,) = launch('slurm.sh', *COMMAND, stand_ins=['srun'], PYTHON='python')

  assert done.returncode == 0
  assert call == ['--kill-on-bad-exit=1', 'python', '-m', *COMMAND]
  options = [line for line in (LAUNCH / 'slurm.sh').read_text().splitlines() if 'SBATCH' in line]
  assert {'#SBATCH --ntasks-per-node=8', '#SBATCH --gres=gpu:8'} <= set(options)


@pytest.mark.parametrize(
  'script, variable', [('tpu_vm.sh', 'TPU'), ('gke.sh', 'CLUSTER'), ('slurm.sh', '1')]
)
def test_what_is_missing_is_named(launch, script, variable):
  done, calls = launch(script, stand_ins=['gcloud', 'xpk', 'srun'])

  assert done.returncode != 0
  assert f'{variable}: ' in done.stderr
  assert not calls


@pytest.fixture
def python(tmp_path):
  """Returns a stand-in for Python that runs a script of bash and counts its calls in `calls`."""

  def make(script):
    path = tmp_path / 'python'
    path.write_text(f'#!/usr/bin/env bash\necho "$@" >> {tmp_path}/calls\n{script}\n')
    path.chmod(0o755)
    return {'PYTHON': str(path), 'PAUSE': '0', 'RESTARTS': '3'}

  return make


@pytest.mark.parametrize('status, calls', [(0, 1), (2, 1), (3, 1), (134, 4)])
def test_a_box_starts_again_what_crashed(launch, python, tmp_path, status, calls):
  done, _ = launch('box.sh', *COMMAND, stand_ins=[], **python(f'exit {status}'))

  assert done.returncode == status
  lines = (tmp_path / 'calls').read_text().splitlines()
  assert lines == [' '.join(('-m', *COMMAND))] * calls


def test_a_box_that_is_told_to_end_between_two_tries_does_not_try_again(python, tmp_path):
  variables = {**python('exit 134'), 'PAUSE': '600'}
  with subprocess.Popen(
    [LAUNCH / 'box.sh', *COMMAND], env={**os.environ, **variables}, stderr=subprocess.PIPE
  ) as script:
    assert script.stderr is not None and b'status 134' in script.stderr.readline()

    script.terminate()

    assert script.wait(60) == 134
  assert len((tmp_path / 'calls').read_text().splitlines()) == 1


@pytest.mark.parametrize('sent', [signal.SIGTERM, signal.SIGINT])
def test_a_box_that_is_told_to_end_tells_the_run_and_waits_for_it(python, tmp_path, sent):
  told = "trap 'touch saved; exit 1' TERM; touch started; while true; do sleep 0.01; done"
  variables = python(f'cd {tmp_path}; {told}')
  with subprocess.Popen(
    # Of what is started in the background a shell ignores SIGINT, and no trap changes that.
    ['env', '--default-signal=INT', LAUNCH / 'box.sh', *COMMAND],
    env={**os.environ, **variables},
    stderr=subprocess.DEVNULL,
  ) as script:
    while not (tmp_path / 'started').exists():
      assert script.poll() is None

    script.send_signal(sent)

    assert script.wait(60) == 1
  assert (tmp_path / 'saved').exists()
  assert len((tmp_path / 'calls').read_text().splitlines()) == 1
