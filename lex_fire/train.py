"""Trains a model; running the same command again goes on where it stopped.

python -m lex_fire.train --config=configs/quickstart.py:encoding=fire --workdir=DIR
"""

import contextlib
import dataclasses
import functools
import math
import pathlib
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from lex_fire import (
  attention,
  checkpoint,
  cli,
  errors,
  executables,
  feed,
  hosts,
  lock,
  model,
  optimizer,
  preemption,
  profiling,
  reporting,
  sharding,
  storage,
)
from lex_fire import config as config_lib
from lex_fire.data import text
from lex_fire.kernels import ring

State = dict[str, Any]  # {'params': pytree, 'optimizer': pytree}
Batch = feed.Batch


def make_model(config: config_lib.Config) -> model.Transformer:
  """Makes the model of a run."""
  return model.Transformer(config.model, config.encoding.make())


def init(config: config_lib.Config) -> State:
  """Returns the state before the first step; a function of config.train.seed alone."""
  params = model.initial(make_model(config), jax.random.key(config.train.seed))
  return {'params': params, 'optimizer': optimizer.make(config).init(params)}


def loss_sums(transformer: model.Transformer, params, batch: Batch) -> tuple[jax.Array, jax.Array]:
  """Returns the weighted sum of the tokens' losses [nats] and the sum of their weights."""
  arrays = (batch[f'{name}_BL'] for name in ('inputs', 'position', 'segment_ids', 'targets'))
  # Flax returns a pair only if asked by `mutable`.
  loss_BL = cast(jax.Array, transformer.apply({'params': params}, *arrays))
  loss_BL = loss_BL * batch['loss_weights_BL']
  return loss_BL.sum(), batch['loss_weights_BL'].sum()


def gradient_sums(config: config_lib.Config, params, batch: Batch):
  """Returns the sums of `loss_sums` and the gradients of the first of them.

  The batch is computed in config.train.accumulation parts. If there are several, each adds its
  gradients where they arise, layer by layer, to arrays that are changed in place: were it to return
  them to be added, there would be two copies of all.
  """
  transformer, parts = make_model(config), config.train.accumulation
  if parts == 1:
    of_all = functools.partial(loss_sums, transformer, batch=batch)
    (loss_sum, weight_sum), gradients = jax.value_and_grad(of_all, has_aux=True)(params)
    return loss_sum, weight_sum, gradients
  gradients = jax.tree.map(lambda leaf: jax.new_ref(jnp.zeros_like(leaf)), params)

  def add_part(sums, part):
    of_part = functools.partial(loss_sums, transformer, batch=part)
    loss_sum, backward, weight_sum = jax.vjp(of_part, params, has_aux=True)
    backward.with_refs(gradients)(jnp.ones_like(loss_sum))
    return (sums[0] + loss_sum, sums[1] + weight_sum), None

  zeros = (jnp.float32(0), jnp.float32(0))
  sums, _ = jax.lax.scan(add_part, zeros, jax.tree.map(lambda x: _split(x, parts), batch))
  return *sums, jax.tree.map(jax.freeze, gradients)


def step(
  config: config_lib.Config, state: State, batch: Batch
) -> tuple[State, dict[str, jax.Array]]:
  """Takes one optimizer step; the batch is computed in config.train.accumulation parts.

  Returns:
    The next state, or the same one if `loss` or `gradient_norm` is not finite; and these scalars,
    in nats per token and before clipping.
  """
  loss_sum, weight_sum, gradients = gradient_sums(config, state['params'], batch)
  gradients = jax.tree.map(lambda gradient: gradient / weight_sum, gradients)
  updates, optimizer_state = optimizer.make(config).update(
    gradients, state['optimizer'], state['params']
  )
  values = {'loss': loss_sum / weight_sum, 'gradient_norm': optax.tree.norm(gradients)}
  following = {
    'params': optax.apply_updates(state['params'], updates),
    'optimizer': optimizer_state,
  }
  is_finite = jnp.isfinite(values['loss']) & jnp.isfinite(values['gradient_norm'])
  state = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), following, state)
  return state, values


def _split(x, parts):
  """Cuts rows in parts, each with rows of every device; a leading 1 repeats.

  [B, ...] -> [parts, B / parts, ...]
  """
  if x.shape[0] == 1:
    return jnp.broadcast_to(x[None], (parts, *x.shape))
  return jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)


class OnMesh:
  """A jitted function that is traced, compiled and run with its mesh set.

  Without a mesh set, constraints on activations are silently void.
  """

  def __init__(self, mesh: jax.sharding.Mesh, function: jax.stages.Wrapped | jax.stages.Compiled):
    """Binds the function to the mesh; one that is compiled can be called alone."""
    self._mesh, self._function = mesh, function

  def __call__(self, *arguments):
    """Calls the function."""
    with jax.set_mesh(self._mesh):
      return self._function(*arguments)

  def lower(self, *arguments) -> jax.stages.Lowered:
    """Lowers the function for arguments that may be abstract."""
    with jax.set_mesh(self._mesh):
      return cast(jax.stages.Wrapped, self._function).lower(*arguments)


class Program:
  """A run's computations, compiled for its mesh.

  Attributes:
    mesh: of the run's devices.
    abstract_state: the state as ShapeDtypeStructs with their shardings.
    init: () -> state.
    step: (state, batch) -> state, metrics; the old state's memory is used again.
    loss_sums: (params, batch) -> sum of losses [nats], sum of weights.
  """

  def __init__(self, config: config_lib.Config, mesh: jax.sharding.Mesh):
    """Lays the state and the batches out on the mesh; nothing is computed yet.

    Raises:
      errors.UserError: if the mesh does not divide the batch, a window or a parameter.
    """
    self.mesh = mesh
    ring.zigzag(config.data.length, mesh.shape['sequence'], 'data.length')  # refuses other lengths
    rows = config.data.batch_size // config.train.accumulation
    sharding.check_rows(rows, mesh, 'data.batch_size / train.accumulation')
    abstract = jax.eval_shape(functools.partial(init, config))
    shardings = sharding.of_tree(abstract, mesh)
    self.abstract_state = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    self.init = OnMesh(mesh, jax.jit(functools.partial(init, config), out_shardings=shardings))
    self.step = OnMesh(
      mesh,
      jax.jit(
        functools.partial(step, config),
        donate_argnums=0,
        in_shardings=(shardings, None),
        out_shardings=(shardings, whole),
      ),
    )
    self.loss_sums = OnMesh(
      mesh,
      jax.jit(
        functools.partial(loss_sums, make_model(config)),
        in_shardings=(shardings['params'], None),
        out_shardings=whole,
      ),
    )

  @functools.cached_property
  def share(self) -> tuple[int, int]:
    """Which part of a batch's rows this process reads, and of how many; see sharding.share."""
    return sharding.share(self.mesh)

  def put(self, batch: Batch) -> Batch:
    """Makes this process's rows a part of the global batch on the mesh.

    If devices share the tokens of a row, these lie in the order of `ring.zigzag`. Each takes its
    target, weight, position and segment along, and where it lies in the array means nothing to its
    loss: so every loss is what it was, at another place, and so is their sum.
    """
    rows, length = batch['inputs_BL'].shape
    shared_by = self.mesh.shape['sequence']
    order_L = ring.zigzag(length, shared_by, 'the batch')
    alone = batch['segment_ids_BL'] is not None
    if shared_by > 1 and batch['position_BL'] is None:
      batch = {**batch, 'position_BL': np.arange(length, dtype=np.int32)[None]}

    def put_leaf(name, x):
      if x is None:
        return None
      shared = name == 'position_BL' and not alone  # the same for all rows of all processes
      shape = (x.shape[0] if shared else rows * self.share[1], *x.shape[1:])
      layout = self.layout(name, shape)
      return jax.make_array_from_process_local_data(layout, x[:, order_L], shape)

    return {name: put_leaf(name, x) for name, x in batch.items()}

  def layout(self, name: str, shape: tuple[int, ...]) -> jax.sharding.NamedSharding:
    """Returns how an array of the batch of all processes lies on the mesh."""
    spec = sharding.spec(sharding.suffix(name), shape, dict(self.mesh.shape), name)
    return jax.sharding.NamedSharding(self.mesh, spec)


def abstract_batch(config: config_lib.Config, program: Program) -> Batch:
  """Returns a batch of a run as ShapeDtypeStructs, as it lies on the mesh."""
  c = config.data
  of_rows, of_all = (c.batch_size, c.length), (1, c.length)
  alone, whole = c.isolate_documents, program.mesh.shape['sequence'] == 1
  found = {
    'inputs_BL': (of_rows, jnp.int32),
    'targets_BL': (of_rows, jnp.int32),
    'loss_weights_BL': (of_rows, jnp.float32),
    'position_BL': (of_rows if alone else of_all, jnp.int32),
    'segment_ids_BL': (of_rows, jnp.int32) if alone else None,
  }
  if feed.is_counted(config) and whole:
    found['position_BL'] = None
  return {
    name: leaf and jax.ShapeDtypeStruct(*leaf, sharding=program.layout(name, leaf[0]))
    for name, leaf in found.items()
  }


def validate(program: Program, params, data: feed.Data) -> float:
  """Returns the mean loss of the validation windows [nats per token]."""
  sums = [program.loss_sums(params, program.put(batch)) for batch in data.validation_batches()]
  loss_sum, weight_sum = (sum(float(s[i]) for s in sums) for i in (0, 1))
  return loss_sum / weight_sum


def train(
  config: config_lib.Config,
  workdir: str | pathlib.Path,
  profiled: tuple[int, int] | None = None,
  executable: str | pathlib.Path | None = None,
) -> State:
  """Trains to config.train.steps, from the newest checkpoint of `workdir` if it has one.

  A batch is a function of seed and step alone, or of a place that is saved with a checkpoint, and
  the state is restored bit for bit: so a run that was killed at any moment and started again ends
  as one that was not.

  Args:
    config: of the run; a workdir belongs to one config.
    workdir: gets config.json, checkpoints/, metrics.jsonl and TensorBoard events.
    profiled: first and last of the steps of which it gets a trace too, counted from 1.
    executable: a file of `executables.save`, of your own, to run and not to compile the step.

  Returns:
    The final state.

  Raises:
    errors.UserError: if the workdir holds another config or is in use, the data cannot be read, the
      mesh does not divide the batch or a parameter, the run to start from is of another model, a
      checkpoint or metrics cannot be written, or the loss is not finite; or as executables.load
      does.
  """
  workdir = storage.path(workdir)
  program, data = prepare(config, is_new=not (workdir / 'checkpoints').exists())
  if executable is not None:
    loaded = executables.load(storage.local(executable, '--executable'), config, program.mesh)
    program.step = OnMesh(program.mesh, loaded)
  keep = config.train.keep_latest, config.train.keep_best
  checkpoint.make_workdir(workdir)
  with contextlib.ExitStack() as stack:
    stack.enter_context(lock.hold(workdir))
    checkpoint.claim_workdir(workdir, config)
    checkpoint.claim_data(workdir, data.hashes)
    hosts.wait('the workdir')
    checkpoints = checkpoint.Checkpoints(workdir, *keep)
    stack.enter_context(contextlib.closing(checkpoints))
    found = {'config': (workdir / 'config.json').exists(), 'steps': checkpoints.steps()}
    hosts.check_same(f'a workdir {str(workdir)!r}', found)
    restored = checkpoints.restore_newest(program.abstract_state, reporting.say)
    first, state = restored or (0, first_state(config, program))
    if first:
      data.restore_place(workdir, first)
    _announce(config, program, workdir, first)
    learned = optimizer.count(state['optimizer'])
    reporter = reporting.Reporter(config, workdir, first, first - learned, data.validation_manifest)
    profile = profiling.Profile(workdir, profiled, first)
    with contextlib.closing(reporter), contextlib.closing(profile):
      state = _loop(config, workdir, program, data, checkpoints, reporter, profile, state, first)
    with reporter.spent.on('checkpoint'):
      checkpoints.wait()
    for line in reporter.spent.lines():
      reporting.say(line)
    return state


def prepare(config: config_lib.Config, *, is_new: bool) -> tuple[Program, feed.Data]:
  """Lays a run out on its devices and prepares its data.

  Args:
    config: of the run, the same on all hosts.
    is_new: whether it has no checkpoint, so that it needs the one that it is to start from.

  Raises:
    errors.UserError: as train does of all but the workdir.
  """
  hosts.check_same('a config', checkpoint.flat(config))
  program = Program(config, sharding.make_mesh(**dataclasses.asdict(config.mesh)))
  # What attention cannot do is refused before data are prepared, and a workdir is this config's.
  batch = abstract_batch(config, program)
  program.loss_sums.lower(program.abstract_state['params'], batch)
  if config.train.start_from and is_new:
    _check_source(config)  # before data are prepared, and before the workdir is that of this config
  data = feed.Data(config, reporting.say, program.share)
  hosts.check_same('data', data.hashes)
  return program, data


def first_state(config: config_lib.Config, program: Program) -> State:
  """Returns the state before the first step, with another run's parameters if that is asked."""
  if not config.train.start_from:
    return program.init()
  source = _check_source(config)
  step, params = checkpoint.restore_params(source, program.abstract_state['params'])
  reporting.say(f'starting from step {step} of {source}')
  return {**program.init(), 'params': params}


# What does not change what a model computes, or only how fast.
_MAY_DIFFER = ('attention', 'dtype', 'remat')


def _check_source(config: config_lib.Config) -> pathlib.Path:
  """Returns the workdir of the run to start from; refuses one of another model."""
  source = storage.path(config.train.start_from)
  other = checkpoint.read_config(source)
  pairs = {
    f'model.{field}': (getattr(other.model, field), getattr(config.model, field))
    for field in dataclasses.asdict(config.model)
    if field not in _MAY_DIFFER
  }
  pairs['encoding.name'] = (other.encoding.name, config.encoding.name)
  found, asked = (text.codec(c.data.spec()).vocabulary.name for c in (other, config))
  pairs['data.vocabulary'] = (found, asked)
  # An encoding's options may decide them.
  found, asked = (checkpoint.shapes(_abstract_params(c)) for c in (other, config))
  pairs |= {name: (found.get(name), asked.get(name)) for name in {**found, **asked}}
  for field, (found, asked) in pairs.items():
    if found != asked:
      raise errors.UserError(
        f'train.start_from={str(source)!r} is a run of {field}={found!r}, not {asked!r} as here; '
        'make them the same, or start from another run'
      )
  return source


def _abstract_params(config):
  return jax.eval_shape(functools.partial(init, config))['params']


def _announce(config, program, workdir, first):
  count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(program.abstract_state['params']))
  if first >= config.train.steps:
    reporting.say(
      f'{workdir}: done already, {first} steps; to train it longer, '
      f'--config.train.start_from={workdir} with another --workdir'
    )
  else:
    reporting.say(
      f'{workdir}: {config.encoding.name}, {count:,} parameters, steps {first} to '
      f'{config.train.steps} of {config.data.batch_size} x {config.data.length} tokens, '
      f'on {jax.device_count()} {jax.devices()[0].device_kind}'
    )
    with jax.set_mesh(program.mesh):
      how = {'counted': feed.is_counted(config), 'rows': feed.own_rows(config)}
      choice = attention.choice(make_model(config), config.data.length, **how)
    reporting.say(attention.line([choice]))


def _loop(config, workdir, program, data, checkpoints, reporter, profile, state, first):
  spent = reporter.spent
  with preemption.Notice() as notice:
    for index in range(first, config.train.steps):
      done = index + 1
      if done == profile.first:
        reporter.pause(index, profile.start)
      with jax.profiler.StepTraceAnnotation('train', step_num=done):
        with spent.on('input'):
          batch = data.train_batch(index)
          placed = program.put(batch)
        state, values = program.step(state, placed)
        spent.dispatched(values['loss'])
      if index == first:
        jax.block_until_ready(values)
        reporter.warm(done)
      reporter.after(done, batch, values)
      if done == profile.last:
        reporter.pause(done, profile.stop)
      is_due = done % config.train.checkpoint_every == 0 or done == config.train.steps
      came = notice.came(done)
      if is_due or came:
        reporter.flush()
        # There is no time to judge it when the machine is about to go.
        with spent.on('validation'):
          value = None if came else validate(program, state['params'], data)
          if value is not None:
            reporter.validation(done, value)
        reporter.write()
        with spent.on('checkpoint'):
          data.save_place(workdir, keep=checkpoints.steps())
          checkpoints.save(done, state, value)
        reporter.resume(done)
      if came:
        reporting.say(f'SIGTERM: saved after step {done}; the same command goes on from there')
        return state
  return state


def main() -> None:
  """The command."""
  workdir, profiled = flags.FLAGS.workdir, cli.whole_numbers('profile')
  executable = flags.FLAGS.executable
  if flags.FLAGS.dry_run:
    from lex_fire import dry_run  # which imports this module

    if profiled is not None:
      asked = ','.join(map(str, profiled))
      raise errors.UserError(f'--profile={asked} is of a run; leave it out with --dry_run')
    if executable is not None:
      raise errors.UserError(
        f'--executable={executable} is of a run, and --dry_run compiles; leave one of them out'
      )
    hosts.join()
    dry_run.dry_run(cli.config(), workdir)
    return
  if workdir is None:
    raise errors.UserError('--workdir is missing: where checkpoints and metrics go')
  hosts.join()
  config = cli.config()
  train(config, workdir, profiling.check(profiled, config.train.steps), executable)


def define_flags() -> None:
  """Declares what the command takes besides --config, --workdir and who the hosts are."""
  flags.DEFINE_boolean(
    'dry_run', False, 'check data, mesh and memory, take one step, and leave the workdir as it was'
  )
  flags.DEFINE_string(
    'executable',
    None,
    'a file of `python -m lex_fire.compile --save`, of this config, to run and not to compile the '
    'step; loading it runs what whoever wrote it wants, so take none but your own',
  )
  flags.DEFINE_list('profile', None, 'FIRST,LAST: steps of which a trace goes into the workdir')


if __name__ == '__main__':
  define_flags()
  cli.define_config()
  hosts.define_flags()
  for module in (cli, hosts):
    flags.adopt_module_key_flags(module)  # so that --help shows them
  cli.run(main, 'interrupted; the same command goes on from the last checkpoint')
