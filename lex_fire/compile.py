"""Compiles what a run would compute, for chips that are not here: does it fit, and what does it do?

    python -m lex_fire.compile --config=configs/c4.py:size=large,encoding=fire \
      --topology=v5e:16x16 [--num_slices=2] [--output=FILE.json] [--save=FILE]

It compiles the training step and, for each of evaluate.lengths, the evaluation step, and ends with
status 3 if one of them needs more memory than a chip has. It reads no data.
"""

import dataclasses
import functools
import itertools
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags

from lex_fire import (
  attention,
  cli,
  command,
  comparison,
  compile_report,
  errors,
  evaluate,
  executables,
  feed,
  hlo,
  kernels,
  metrics,
  reporting,
  sharding,
  storage,
  topologies,
  train,
)
from lex_fire import config as config_lib
from lex_fire.compile_report import Report


def compile_run(
  config: config_lib.Config,
  topology: topologies.Topology,
  progress: Callable[[str], None] = lambda line: None,
  save: pathlib.Path | None = None,
) -> Report:
  """Compiles the steps of a run for a topology.

  Args:
    config: of the run.
    topology: of topologies.find.
    progress: is called with a line before each step.
    save: the file for the compiled training step, if it fits; see executables.

  Returns:
    Of JSON values: chips, mesh, what a program may have of a chip, parameters, tokens and model
    FLOPs of a training step; and of each of `programs` name, length [tokens], rows, attention,
    bytes a chip, `excess_bytes` over what it may have (0: it fits), messages between chips by kind,
    the compiler's own count of FLOPs a chip (None if it was refused), and seconds to compile.

  Raises:
    errors.UserError: if the mesh does not divide the chips, the batch or a parameter, or as
      comparison.cases does.
  """
  devices = topology.devices
  mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
  programs = []
  with jax.default_device(devices[0]):  # by which kernels are chosen
    for step in _steps(config, mesh):
      progress(f'compiling the {step.about["name"]}')
      found, compiled = measure(step, topology)
      if save is not None and not programs and compiled is not None and not found['excess_bytes']:
        _save(save, compiled, config, mesh)
        progress(f'written: {save}')
      programs.append(step.about | found)
    return report(config, topology, mesh, programs)


def _save(path: pathlib.Path, compiled: jax.stages.Compiled, config, mesh) -> None:
  def write(file: pathlib.Path) -> None:
    executables.save(file, compiled, config, mesh)

  command.write_files(path.parent, {path.name: write})


def report(
  config: config_lib.Config,
  topology: topologies.Topology,
  mesh: jax.sharding.Mesh,
  programs: list[Report],
) -> Report:
  """Returns what compile_run does, of these programs."""
  state = jax.eval_shape(functools.partial(train.init, config))
  tokens = config.data.batch_size * config.data.length
  return {
    'topology': topology.name,
    'num_slices': topology.num_slices,
    'chips': len(topology.devices),
    'kind': topology.devices[0].device_kind,
    'memory_bytes': topology.memory_bytes,
    'memory_source': topology.memory_source,
    'mesh': dict(mesh.shape),
    'jax': jax.__version__,
    'encoding': config.to_dict()['encoding'],
    'parameters': sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state['params'])),
    'tokens_per_step': tokens,
    'model_flops_per_step': tokens
    * metrics.train_flops_per_token(config.model, config.data.length),
    'programs': programs,
  }


class Step(NamedTuple):
  """A program to compile: what is said of it, and the abstract arguments of a function."""

  about: Report
  function: train.OnMesh
  arguments: tuple[Any, ...]
  parts: dict[str, Any]  # of the arguments: trees whose bytes are told by name


def training_step(config: config_lib.Config, program: train.Program) -> Step:
  """Returns the step that `train` takes."""
  c, state = config.data, program.abstract_state
  with jax.set_mesh(program.mesh):
    transformer, counted = train.make_model(config), feed.is_counted(config)
    choice = attention.choice(transformer, c.length, counted=counted, rows=feed.own_rows(config))
  about = _about('training step', choice, c.length, c.batch_size)
  arguments = (state, train.abstract_batch(config, program))
  return Step(about, program.step, arguments, {'parameters': state['params'], **_rest(state)})


def _steps(config: config_lib.Config, mesh: jax.sharding.Mesh) -> Iterator[Step]:
  yield training_step(config, train.Program(config, mesh))
  cases = comparison.cases(config)
  shared, devices = config.evaluate.sequence, list(mesh.devices.flat)
  counted = evaluate.is_counted(config, shared)
  mesh = sharding.make_mesh(sequence=shared, devices=devices)  # that of evaluate
  params = comparison.abstract_params(config, mesh)
  for case, length in itertools.product(cases, config.evaluate.lengths):
    count = max(1, config.evaluate.max_tokens // (config.evaluate.stride or length))
    rows = evaluate.rows_at_once(length // shared, count, mesh.size // shared)
    compared = f', {case.override or "as trained"}, {case.mask_name}' if len(cases) > 1 else ''
    with jax.set_mesh(mesh):
      name = f'evaluation step at {length}{compared}'
      choice = attention.choice(case.transformer, length, counted=counted)
    about = _about(name, choice, length, rows)
    function = train.OnMesh(mesh, jax.jit(functools.partial(evaluate.step, case.transformer)))
    yield Step(about, function, (params, *_windows(rows, length, counted)), {'parameters': params})


def _rest(state: train.State) -> dict[str, Any]:
  return {name: tree for name, tree in state.items() if name != 'params'}


def _about(name: str, choice: kernels.Choice, length: int, rows: int) -> Report:
  return {'name': name, 'length': length, 'rows': rows, 'attention': choice._asdict()}


def _windows(rows: int, length: int, counted: bool) -> tuple[jax.ShapeDtypeStruct | None, ...]:
  """Returns inputs_BL, targets_BL and position_1L, or None, of an evaluation step."""
  tokens_BL, position_1L = (jax.ShapeDtypeStruct((count, length), jnp.int32) for count in (rows, 1))
  return tokens_BL, tokens_BL, None if counted else position_1L


def measure(step: Step, topology: topologies.Topology) -> tuple[Report, jax.stages.Compiled | None]:
  """Returns what a compiled program, or the compiler that refuses it, says of itself; and it."""
  start = time.monotonic()
  parts = {name: _bytes_of_a_chip(tree) for name, tree in step.parts.items()}
  try:
    compiled = step.function.lower(*step.arguments).compile(dict(topology.options))
  except jax.errors.JaxRuntimeError as error:
    found = topologies.exhausted(error)
    if found is None:
      raise
    needed, usable = found
    refused = {
      'bytes': {**parts, 'total': needed},
      'excess_bytes': needed - usable,
      'messages': None,
      'xla_flops': None,
      'seconds': round(time.monotonic() - start, 1),
    }
    return refused, None
  memory = _bytes(compiled.memory_analysis(), parts)
  messages = hlo.collectives(compiled.as_text() or '')
  available = topology.memory_bytes
  accepted = {
    'bytes': memory,
    'excess_bytes': 0 if available is None else max(0, memory['total'] - available),
    'messages': {kind: one._asdict() for kind, one in messages.items()},
    'xla_flops': (compiled.cost_analysis() or {}).get('flops'),
    'seconds': round(time.monotonic() - start, 1),
  }
  return accepted, compiled


def _bytes(memory: Any, parts: dict[str, int]) -> dict[str, int]:
  """Returns the bytes of a chip by what they are for.

  Padding of arrays to the chip's tiles is among the other arguments.
  """
  found = {
    **parts,
    'other arguments': memory.argument_size_in_bytes - sum(parts.values()),
    'outputs': memory.output_size_in_bytes - memory.alias_size_in_bytes,
    'temporaries': memory.temp_size_in_bytes,
    'program': memory.generated_code_size_in_bytes,
  }
  return {**found, 'total': sum(found.values())}


def _bytes_of_a_chip(tree: Any) -> int:
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def _file(flag: str) -> pathlib.Path | None:
  """Returns the file of a flag, before minutes are spent on what cannot be written there."""
  text = getattr(flags.FLAGS, flag)
  if text is None:
    return None
  path = storage.local(text, f'--{flag}')
  if path.is_dir():
    raise errors.UserError(f'--{flag}={text} is a directory; give the name of a file')
  command.output_directory(path.parent, path.name)
  return path


def main() -> None:
  """The command."""
  f = flags.FLAGS
  if f.topology is None:
    raise errors.UserError(f'--topology is missing; known: {", ".join(topologies.known())}')
  if f.workdir is not None:
    raise errors.UserError(
      f'--workdir={f.workdir} is of a run, and nothing runs here; leave it out'
    )
  if f.topology != topologies.HERE:
    jax.config.update('jax_platforms', 'cpu')  # before JAX looks for what may not be here
  output, save = (_file(name) for name in ('output', 'save'))
  topology = topologies.find(f.topology, f.num_slices)
  found = compile_run(cli.config(), topology, reporting.say, save)
  print(compile_report.table(found))
  if output is not None:

    def write(file: pathlib.Path) -> None:
      file.write_text(json.dumps(found, indent=2) + '\n')

    command.write_files(output.parent, {output.name: write})
    print(f'written: {output}')
  compile_report.refuse(found)


def define_flags() -> None:
  """Declares what the command takes besides --config."""
  cli.define_config()
  known = ', '.join(topologies.known())
  flags.DEFINE_string(
    'topology', None, f'what to compile for: {known}, or {topologies.HERE}: the devices of this one'
  )
  flags.DEFINE_integer('num_slices', 1, 'slices of TPUs, each of the topology')
  flags.DEFINE_string('output', None, 'a JSON file for the report')
  flags.DEFINE_string(
    'save', None, 'a file for the compiled training step, if it fits, for `train --executable`'
  )


if __name__ == '__main__':
  define_flags()
  flags.adopt_module_key_flags(cli)  # so that --help shows them
  cli.run(main)
