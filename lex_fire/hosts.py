"""The processes of a run that several machines share: how they meet, agree and end.

Each runs the same command. JAX finds the others by itself on Cloud TPU VMs, in GKE, under Slurm and
Open MPI; elsewhere three flags say who they are. A process that fails leaves at once, and those
that wait for it end soon after: none hangs.
"""

import faulthandler
import json
import os
import sys
import warnings
from typing import Any, NoReturn

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from lex_fire import errors

# After so long without a sign of life from one process, JAX ends the others [s].
HEARTBEAT_SECONDS = 30
MEETING_SECONDS = 300  # that the first waits for the last

_who = (0, 1)  # this process and their number, once they have met


def define_flags() -> None:
  """Declares the flags that `join` reads."""
  flags.DEFINE_string(
    'coordinator_address',
    None,
    'HOST:PORT of process 0, where JAX cannot find the processes of a run by itself',
  )
  flags.DEFINE_integer(
    'num_processes', None, 'of a run, likewise; 1: this one alone, whatever a cluster says'
  )
  flags.DEFINE_integer('process_id', None, 'of this process, from 0, likewise')


def join() -> None:
  """Meets the other processes of the run, before anything is computed; alone it does nothing.

  If they do not come within MEETING_SECONDS, JAX ends this process.

  Raises:
    errors.UserError: if only some of the flags are given, or what JAX found is not whole.
  """
  given = _given()
  if given['num_processes'] == 1:
    return
  is_told = given['num_processes'] is not None
  if is_told:
    _disable_dumps()
    print(f'waiting for all {given["num_processes"]} processes of the run', flush=True)
  # In Kubernetes, that JAX could be told of others: `_check_alone` says so where it counts.
  warnings.filterwarnings('ignore', 'Kubernetes environment detected', UserWarning)
  try:
    jax.distributed.initialize(
      **given,
      initialization_timeout=MEETING_SECONDS,
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
  except (RuntimeError, ValueError) as error:
    # JAX has found no cluster, or has computed already, as in a notebook.
    is_alone = any(words in str(error) for words in ('coordinator_address', 'before any JAX calls'))
    if is_alone and not is_told:
      _check_alone()
      return
    reason = ' '.join(str(error).split())[:200]
    raise errors.UserError(
      f'the processes of the run cannot meet as {given if is_told else "JAX found them"}: '
      f'{reason}; start the same command on all of them, or with --num_processes=1 to run alone'
    ) from error
  _disable_dumps()
  global _who
  _who = (jax.process_index(), jax.process_count())


def _check_alone() -> None:
  """Refuses to be one of several pods that each believe to be the whole run.

  Kubernetes tells a pod its number in an Indexed Job (JOB_COMPLETION_INDEX), be it the only one. Of
  TPUs GKE tells JAX all it wants besides; of GPUs JAX asks for it by a client that has to be
  installed.
  """
  number = os.environ.get('JOB_COMPLETION_INDEX')
  if number is not None:
    raise errors.UserError(
      f'this is pod JOB_COMPLETION_INDEX={number} of an Indexed Job, and JAX finds no other; '
      'pip install "jax[k8s]" and let its service account read pods, give the three flags of '
      'hosts, or --num_processes=1 to run alone'
    )


def _disable_dumps() -> None:
  """Lets JAX have the last word when it ends a process by a signal, as another one is gone.

  It says which; what each thread was doing would bury that.
  """
  faulthandler.disable()


def _given() -> dict[str, Any]:
  """Returns what the flags say of this process; all three of them, or None of each."""
  names = ('coordinator_address', 'num_processes', 'process_id')
  given = {name: flags.FLAGS[name].value for name in names}
  known = {name: value for name, value in given.items() if value is not None}
  count, number = given['num_processes'], given['process_id']
  if count is not None and count < 1:
    raise errors.UserError(f'--num_processes={count} must be at least 1')
  if known and count != 1 and len(known) < len(given):
    lacking = ' and '.join(f'--{name}' for name in given if name not in known)
    raise errors.UserError(
      f'no {lacking} beside --{next(iter(known))}={next(iter(known.values()))}; '
      'give all three, or none where JAX finds the processes by itself'
    )
  if count is not None and not 0 <= (number or 0) < count:
    raise errors.UserError(
      f'--process_id={number} must be at least 0 and below --num_processes={count}'
    )
  return given


def have_met() -> bool:
  """Returns whether this process is one of several of a run."""
  return _who[1] > 1


def name() -> str:
  """Returns what an error of this process begins with; '' if it is alone."""
  return f'process {_who[0]} of {_who[1]}: ' if have_met() else ''


def part() -> None:
  """Waits until all processes are done, so that none takes the end of another for its death."""
  if jax.distributed.is_initialized():
    jax.distributed.shutdown()


def leave(status: int) -> NoReturn:
  """Ends this process; one of several at once, as a usual end would wait for the others."""
  if have_met():
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
  sys.exit(status)


def lost(error: Exception) -> str | None:
  """Says what an error means of a computation that processes share; None if it is of one alone."""
  if not have_met() or 'RESOURCE_EXHAUSTED' in str(error):
    return None
  reason = ' '.join(str(error).split())[:200]
  return (
    f'what the processes compute together has failed: {reason}; if one of them has ended, its own '
    'error says why; the same command on all hosts goes on from the last checkpoint'
  )


def check_same(what: str, values: dict[str, Any]) -> None:
  """Compares JSON values, such as a config, with those of process 0.

  Args:
    what: they are, for the error.
    values: this process's.

  Raises:
    errors.UserError: if one of them is another.
  """
  text = json.dumps(values)
  own, first = json.loads(text), json.loads(of_first(text))
  for name in {**own, **first}:
    here, there = own.get(name), first.get(name)
    if here != there:
      raise errors.UserError(
        f'this process has {what} unlike process 0: {name} is {here}, there {there}; start the '
        'same command on all hosts, with the same files, and a workdir that all of them see'
      )


def wait(name: str) -> None:
  """Waits until all processes have come to this point, which has a name of its own."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def of_first(text: str) -> str:
  """Returns the text that process 0 has, to all, each of which calls this with its own."""
  if jax.process_count() == 1:
    return text
  own = np.frombuffer(text.encode(), np.uint8)
  (size,) = multihost_utils.broadcast_one_to_all(np.array([own.size]))
  padded = np.zeros(size, np.uint8)
  padded[: own.size] = own[:size]
  return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes().decode()
