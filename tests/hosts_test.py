"""Runs of several processes, each with devices of its own: two on one machine, as two hosts."""

import contextlib
import dataclasses
import functools
import http.server
import json
import os
import signal
import socket
import threading
import time

import jax
import pytest
import tiny
from absl import flags
from absl.testing import flagsaver
from jax._src.clusters import cloud_tpu_cluster

from lex_fire import answers, asking, benchmark, errors, evaluate, hosts, train
from lex_fire import config as config_lib

STEPS = 96


@pytest.fixture
def find_port():
  """Finds ports that no other process is given before the test ends; a coordinator can bind them.

  Each stays bound, at all addresses as it will be, by a socket that takes no connections and lets
  those bind it too that ask to share it (SO_REUSEPORT), as gRPC does.
  """
  with contextlib.ExitStack() as held:

    def find():
      family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
      holder = held.enter_context(socket.socket(family))
      holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
      holder.bind(('', 0))
      return holder.getsockname()[1]

    yield find


def run_as_host(environment, module, arguments, out, err):
  """Runs a command where there are two devices, and where a dead host is soon missed."""
  os.environ.update(environment)
  if 'MEGASCALE_NUM_SLICES' in environment:
    # As if JAX had found a TPU: it looks for one before it asks what tells such machines of others.
    cloud_tpu_cluster.running_in_cloud_tpu_vm = True
    if 'TPU_SKIP_MDS_QUERY' not in environment:
      os.environ.pop('TPU_SKIP_MDS_QUERY', None)
  jax.config.update('jax_num_cpu_devices', 2)
  hosts.HEARTBEAT_SECONDS = 4
  tiny.run(module, arguments, out, err)


class Hosts:
  """Two processes that run a command together."""

  def __init__(self, directory, module, arguments, environments=({}, {})):
    """Starts them, each with its own arguments and what its environment says besides."""
    self.processes, self._outputs = [], []
    for own, environment in zip(arguments, environments, strict=True):
      paths = [directory / f'{name}-{time.monotonic_ns()}' for name in ('out', 'err')]
      for path in paths:
        path.touch()
      self._outputs.append(paths)
      self.processes.append(tiny.start(run_as_host, environment, module, own, *map(str, paths)))

  def end(self):
    """Waits for both and returns status, stdout and stderr of each."""
    found = []
    for process, paths in zip(self.processes, self._outputs, strict=True):
      process.join(120)
      found.append((process.exitcode, *(path.read_text() for path in paths)))
    return found


@pytest.fixture
def start(tmp_path, find_port):
  """Starts a command on two hosts that flags tell of each other; kills what a test leaves."""
  started = []

  def start_hosts(module, *arguments, own=((), ())):
    address = f'--coordinator_address=localhost:{find_port()}'
    both = [(address, '--num_processes=2', f'--process_id={number}') for number in range(2)]
    started.append(
      Hosts(tmp_path, module, [[*arguments, *a, *b] for a, b in zip(own, both, strict=True)])
    )
    return started[-1]

  yield start_hosts
  for process in (process for of_hosts in started for process in of_hosts.processes):
    process.kill()
    process.join()
    process.close()


def test_a_port_is_kept_for_the_test_that_found_it(find_port):
  port = find_port()

  for host in ('localhost', ''):
    with socket.socket() as other, pytest.raises(OSError, match='Address already in use'):
      other.bind((host, port))
  assert find_port() != port


def metrics_of(workdir):
  """Returns what a run has told of its steps."""
  path = workdir / 'metrics.jsonl'
  rows = path.read_text().splitlines(keepends=True) if path.exists() else ()
  return [json.loads(row) for row in rows if row.endswith('\n')]


def wait_for_step(workdir, step):
  deadline = time.monotonic() + 120
  while step not in [row['step'] for row in metrics_of(workdir)]:
    assert time.monotonic() < deadline
    time.sleep(0.002)


def assert_same_losses(workdir, expected, within):
  """Compares every step's loss, and those of validation, which a run that is told to end omits."""

  def losses(directory, name):
    return {row['step']: row[name] for row in metrics_of(directory) if name in row}

  assert losses(workdir, 'loss') == pytest.approx(losses(expected, 'loss'), rel=within)
  known = losses(expected, 'validation_loss')
  judged = losses(workdir, 'validation_loss')
  assert judged == pytest.approx({step: known[step] for step in judged}, rel=within)
  assert max(judged) == max(known)


def test_two_hosts_die_go_on_are_told_to_end_one_finishes_and_they_evaluate_as_one_does(
  corpus, tmp_path, start
):
  # Parameters and batches lie on devices of both hosts, and then the tokens of each window do.
  course, mesh = {'steps': STEPS, 'checkpoint_every': 12}, {'replica': 1, 'fsdp': 4, 'sequence': 1}
  values = tiny.values(corpus, train=course, mesh=mesh)
  workdir = tmp_path / 'two'
  begin = functools.partial(start, 'lex_fire.train', f'--workdir={workdir}', *tiny.flags(values))

  killed = begin()
  wait_for_step(workdir, 14)
  killed.processes[1].kill()
  began = time.monotonic()
  left, _ = killed.end()
  seconds = time.monotonic() - began
  told = begin()
  wait_for_step(workdir, 16)
  os.kill(told.processes[1].pid, signal.SIGTERM)
  told = told.end()
  last = metrics_of(workdir)[-1]['step']  # after which it saved
  again = begin('--config.mesh.fsdp=1', '--config.mesh.sequence=4')
  wait_for_step(workdir, last + 2)
  os.kill(again.processes[0].pid, signal.SIGTERM)
  again = again.end()
  one = tiny.config(corpus, train=course)
  train.train(one, workdir)  # alone

  assert seconds < 60
  assert left[0] not in (0, None)
  assert 'stopped sending heartbeats' in left[2] or 'process 0 of 2: error: ' in left[2]
  assert [status for status, *_ in (*told, *again)] == [0, 0, 0, 0], again
  assert 'SIGTERM: saved after step' in told[0][1]
  assert 'SIGTERM: saved after step' in again[0][1]
  assert f'to {STEPS} of 8 x 32 tokens, on 4 cpu' in again[0][1]
  assert 'step' not in told[1][1] + again[1][1]  # the first speaks for both
  train.train(one, tmp_path / 'one')
  assert_same_losses(workdir, tmp_path / 'one', within=1e-4)  # rounding grows over the steps

  arguments = [f'--workdir={workdir}', '--sequence=4', '--lengths=32,128', f'--output={tmp_path}']
  both = start('lex_fire.evaluate', *arguments, '--name=both').end()

  assert [status for status, *_ in both] == [0, 0], both
  assert 'written: ' in both[0][1]
  (found,) = json.loads((tmp_path / 'both.json').read_text())['runs']
  request = dataclasses.replace(one.evaluate, lengths=(32, 128))
  (alone,) = evaluate.evaluate(workdir, request)
  for of_both, of_one in zip(found['lengths'], alone['lengths'], strict=True):
    assert of_both == pytest.approx(of_one, rel=1e-5)


def test_two_hosts_answer_as_one_does_and_go_on_from_what_the_first_has(fire_run, tmp_path, start):
  task, first, other = 'copy:length=2,held_out=10', tmp_path / 'first', tmp_path / 'other'
  request = config_lib.EvaluateConfig((32,))
  (plan,) = benchmark.plan([fire_run[0]], asking.Asked((task,)), request)
  (alone,) = benchmark.run(plan, first / 'all')
  path = first / 'all' / alone['tasks'][0]['predictions']
  expected = answers.read(path)
  path.write_text(''.join(path.read_text().splitlines(keepends=True)[: 1 + 3]))

  arguments = [f'--workdir={fire_run[0]}', f'--tasks={task}', '--lengths=32', '--name=all']
  outputs = [[f'--output={directory}'] for directory in (first, other)]
  both = start('lex_fire.evaluate', *arguments, own=outputs).end()

  assert [status for status, *_ in both] == [0, 0], both
  assert '10 answers are asked for, on 4 cpu' in both[0][1]
  assert '3 answers are there already' in both[0][1]
  assert 'answers' not in both[1][1] and not other.exists()  # the first speaks and writes for both
  assert answers.read(path) == expected
  (found,) = json.loads((first / 'all.json').read_text())['runs']
  assert (alone['devices'], found['devices']) == (8, 4)
  for of_both, of_one in zip(found['tasks'], alone['tasks'], strict=True):
    chosen, expected = (made.pop('implementations') for made in (of_both, of_one))
    # For other reasons, as a device has other rows.
    assert [x['implementation'] for x in chosen] == [x['implementation'] for x in expected]
    assert of_both == of_one


@pytest.fixture
def serve_metadata():
  """Starts servers that tell a machine what Google's metadata server does of a slice of two."""
  servers = []

  def serve(number):
    told = {'agent-worker-number': str(number), 'worker-network-endpoints': 'localhost,localhost'}

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_GET(self):
        value = told.get(self.path.removeprefix('/computeMetadata/v1/instance/attributes/'))
        self.send_response(404 if value is None else 200)
        self.end_headers()
        self.wfile.write((value or '').encode())

      def log_message(self, *_):
        pass

    servers.append(http.server.ThreadingHTTPServer(('localhost', 0), Handler))
    threading.Thread(target=servers[-1].serve_forever).start()
    return f'localhost:{servers[-1].server_port}'

  yield serve
  for server in servers:
    server.shutdown()
    server.server_close()


def slurm(number, serve_metadata):
  return {
    **{'SLURM_JOB_ID': '1', 'SLURM_STEP_NODELIST': 'localhost', 'SLURM_NTASKS': '2'},
    **{'SLURM_LOCALID': '0', 'SLURM_PROCID': str(number)},
  }


ONE_SLICE = {'MEGASCALE_NUM_SLICES': '1', 'MEGASCALE_SLICE_ID': '0'}


def gke(number, serve_metadata):
  slices = {**ONE_SLICE, 'MEGASCALE_COORDINATOR_ADDRESS': 'localhost', 'TPU_SKIP_MDS_QUERY': 'true'}
  return {**slices, 'TPU_WORKER_HOSTNAMES': 'localhost,localhost', 'TPU_WORKER_ID': str(number)}


def tpu_vm(number, serve_metadata):
  coordinator = {'MEGASCALE_COORDINATOR_ADDRESS': ''}  # of a slice alone nobody tells one
  return {**ONE_SLICE, **coordinator, 'GCE_METADATA_IP': serve_metadata(number)}


@pytest.mark.parametrize('cluster', [slurm, gke, tpu_vm])
def test_hosts_of_a_cluster_find_each_other_and_train(
  corpus, tmp_path, find_port, serve_metadata, cluster
):
  port = {'JAX_COORDINATOR_PORT': str(find_port())}
  environments = [{**cluster(number, serve_metadata), **port} for number in range(2)]
  values = tiny.values(corpus, train={'steps': 3, 'checkpoint_every': 3})
  arguments = [f'--workdir={tmp_path / "run"}', *tiny.flags(values)]

  both = Hosts(tmp_path, 'lex_fire.train', [arguments] * 2, environments).end()

  assert [status for status, *_ in both] == [0, 0], both
  assert 'to 3 of 8 x 32 tokens, on 4 cpu' in both[0][1]
  assert 'step' not in both[1][1]


def test_a_pod_of_several_that_finds_no_other_does_not_run_alone(given, monkeypatch):
  given()
  monkeypatch.setenv('KUBERNETES_SERVICE_HOST', 'localhost')
  monkeypatch.setenv('JOB_COMPLETION_INDEX', '3')

  with pytest.raises(
    errors.UserError, match='pod JOB_COMPLETION_INDEX=3 of an Indexed Job.*jax.k8s'
  ):
    hosts.join()


def test_hosts_of_slurm_refuse_to_run_different_configs(corpus, tmp_path, find_port):
  port = {'JAX_COORDINATOR_PORT': str(find_port())}
  environments = [{**slurm(number, None), **port} for number in range(2)]
  arguments = [
    [f'--workdir={tmp_path / "run"}', *tiny.flags(tiny.values(corpus, train={'seed': seed}))]
    for seed in range(2)
  ]

  both = Hosts(tmp_path, 'lex_fire.train', arguments, environments).end()

  assert both[1][0] == 2
  message = (
    'process 1 of 2: error: this process has a config unlike process 0: train.seed is 1, there 0'
  )
  assert message in both[1][2]
  assert both[0][0] != 0


def test_hosts_that_do_not_share_a_workdir_are_refused(corpus, tmp_path, find_port):
  arguments = [
    [f'--workdir={tmp_path / str(number)}', *tiny.flags(tiny.values(corpus))] for number in range(2)
  ]
  address = [f'--coordinator_address=localhost:{find_port()}', '--num_processes=2']
  own = [[*arguments[number], *address, f'--process_id={number}'] for number in range(2)]

  both = Hosts(tmp_path, 'lex_fire.train', own).end()

  assert both[1][0] == 2, both
  assert f"process 1 of 2: error: this process has a workdir '{tmp_path}/1' unlike" in both[1][2]
  assert 'config is False, there True' in both[1][2]
  assert both[0][0] not in (0, None)


def test_hosts_with_other_data_are_refused(corpus, tmp_path, monkeypatch):
  def of_first(text):
    values = json.loads(text)
    return json.dumps(values | {'train': 'other'} if 'train' in values else values)

  monkeypatch.setattr(hosts, 'of_first', of_first)

  with pytest.raises(errors.UserError, match='this process has data unlike process 0: train is '):
    train.train(tiny.config(corpus), tmp_path / 'run')


@pytest.fixture
def given():
  """Sets flags of hosts for a test."""
  if 'process_id' not in flags.FLAGS:
    hosts.define_flags()
  flags.FLAGS.mark_as_parsed()
  with flagsaver.flagsaver():
    yield lambda **values: [setattr(flags.FLAGS, *item) for item in values.items()]


def test_who_a_process_is_must_be_told_whole(given):
  given(coordinator_address='one:1234', process_id=0)

  message = 'no --num_processes beside --coordinator_address=one:1234; give all three'
  with pytest.raises(errors.UserError, match=message):
    hosts.join()


def test_a_process_that_is_none_of_them_is_refused(given):
  given(coordinator_address='localhost:1', process_id=3, num_processes=2)

  with pytest.raises(errors.UserError, match='process_id=3 must be .* below --num_processes=2'):
    hosts.join()


def test_no_process_at_all_is_refused(given):
  given(num_processes=0)

  with pytest.raises(errors.UserError, match='--num_processes=0 must be at least 1'):
    hosts.join()


@pytest.mark.parametrize('values', [{}, {'num_processes': 1}])
def test_a_process_alone_meets_nobody(given, values):
  given(**values)

  hosts.join()

  assert not jax.distributed.is_initialized()
  assert hosts.name() == ''
