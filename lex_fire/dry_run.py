"""Does what a run does up to the end of its first step, and leaves its workdir as it was.

python -m lex_fire.train --dry_run --config=configs/quickstart.py:encoding=fire [--workdir=DIR]
"""

import contextlib
import math
import pathlib
import time

import jax

from lex_fire import checkpoint, compile_report, errors, feed, reporting, storage, topologies, train
from lex_fire import compile as compile_lib
from lex_fire import config as config_lib


def dry_run(config: config_lib.Config, workdir: str | pathlib.Path | None = None) -> None:
  """Checks config, data, mesh and memory, compiles the step, and takes one.

  Streams of data that are not there are prepared, and stay. With several hosts each calls this.

  Args:
    config: of the run.
    workdir: that the run will have, which may hold a part of it: then the step is its next one.

  Raises:
    errors.UserError: as train.train does; or if the newest checkpoint is damaged.
    SystemExit: with status 3 if the step needs more memory than its devices have.
  """
  workdir = None if workdir is None else storage.path(workdir)
  begun = workdir is not None and (workdir / 'checkpoints').exists()
  program, data = train.prepare(config, is_new=not begun)
  if workdir is not None:
    checkpoint.check_workdir(workdir, config, data.hashes)
  compiled = _compile(config, program)
  first, state = 0, None
  if workdir is not None and begun:
    first, state = _restore(workdir, program, data)
  if first >= config.train.steps:
    reporting.say(f'{workdir}: done already, {first} steps')
  else:
    _step(program, compiled, state or train.first_state(config, program), data, first)
  reporting.say(
    f'dry run: all is well, and nothing was written{f" into {workdir}" if workdir else ""} '
    f'(prepared data are in {config.data.directory})'
  )


def _compile(config: config_lib.Config, program: train.Program) -> jax.stages.Compiled:
  """Compiles the step and reports on it; ends the command if it does not fit."""
  step, here = compile_lib.training_step(config, program), topologies.here()
  found, compiled = compile_lib.measure(step, here)
  report = compile_lib.report(config, here, program.mesh, [step.about | found])
  reporting.say(compile_report.table(report))
  compile_report.refuse(report)
  assert compiled is not None  # as what the compiler refuses does not fit
  return compiled


def _restore(
  workdir: pathlib.Path, program: train.Program, data: feed.Data
) -> tuple[int, train.State | None]:
  """Returns the steps and the state of the newest checkpoint; 0 and None if there is none."""
  opened = checkpoint.Checkpoints(workdir, read_only=True)
  with contextlib.closing(opened) as checkpoints:
    steps = checkpoints.steps()
    if not steps:
      return 0, None
    state = checkpoints.restore(steps[-1], program.abstract_state)
  data.restore_place(workdir, steps[-1])
  return steps[-1], state


def _step(program, compiled, state, data, first):
  batch = program.put(data.train_batch(first))
  jax.block_until_ready((state, batch))
  start = time.monotonic()
  with jax.set_mesh(program.mesh):
    _, arrays = compiled(state, batch)
  values = {name: float(x) for name, x in arrays.items()}
  line = (
    f'step {first + 1}: loss {values["loss"]:.4f}, gradient norm {values["gradient_norm"]:.4f}, '
    f'in {time.monotonic() - start:.2f} s'
  )
  if not all(map(math.isfinite, values.values())):
    raise errors.UserError(f'{line}, which is no number; look at its data and model.dtype')
  reporting.say(line)
