"""Tests `../lex_fire/compile.py`, `compile_report.py`, `topologies.py` and `hlo.py`.

Eight CPU devices stand for chips; compile_command_tpu_test.py compiles for TPUs.
"""

import functools
import json
import math
import pathlib
import re
import runpy
import types

import jax
import numpy as np
import pytest
import tiny

from lex_fire import (
  cli,
  compile,
  compile_report,
  errors,
  feed,
  hlo,
  metrics,
  presets,
  topologies,
  train,
)
from lex_fire import config as config_lib

CORPUS = {'task': 'text', 'train_files': '*.txt', 'validation_files': '*.txt'}  # never opened


def run_config(**sections):
  return tiny.config(CORPUS, 'fire', **{'evaluate': {'lengths': (32,)}, **sections})


def eight_chips(memory_bytes=2**30):
  return topologies.Topology('cpu:8', 1, jax.devices(), memory_bytes, 'documented', {})


@functools.cache
def report(replica=8):
  mesh = {'replica': replica, 'fsdp': 8 // replica}
  return compile.compile_run(run_config(mesh=mesh), eight_chips())


# Steps


@pytest.mark.parametrize(
  ('sizes', 'data'),
  [
    ((2, 4), {}),
    ((2, 4), {'isolate_documents': True}),
    ((2, 4), {'position_range': 64}),
    ((2, 2, 2), {}),  # devices share the tokens of a row
  ],
)
def test_the_step_that_is_compiled_is_the_one_that_training_runs(sizes, data, corpus):
  mesh = train.sharding.make_mesh(*sizes)
  config = tiny.config(corpus, 'fire', mesh=dict(mesh.shape), data=data)
  program = train.Program(config, mesh)
  batch = program.put(feed.Data(config).train_batch(0))

  abstract = train.abstract_batch(config, program)

  texts = [program.step.lower(program.abstract_state, one).as_text() for one in (batch, abstract)]
  assert texts[0] == texts[1]
  assert 'sharding' in texts[0]


def test_a_report_counts_parameters_tokens_and_flops():
  found, config = report(), run_config()

  state = jax.eval_shape(functools.partial(train.init, config))
  count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state['params']))
  assert found['parameters'] == count
  assert found['tokens_per_step'] == 8 * 32
  per_token = metrics.train_flops_per_token(config.model, 32)
  assert found['model_flops_per_step'] == pytest.approx(256 * per_token)
  assert (found['topology'], found['chips'], found['memory_bytes']) == ('cpu:8', 8, 2**30)
  json.dumps(found)


def test_each_length_has_its_evaluation_step(monkeypatch):
  monkeypatch.setattr(compile, 'measure', lambda step, topology: ({}, None))
  config = run_config(evaluate={'lengths': (32, 64), 'max_tokens': 1024})

  found = compile.compile_run(config, eight_chips())

  step, short, long = found['programs']
  assert step['name'] == 'training step'
  assert (short['name'], long['name']) == ('evaluation step at 32', 'evaluation step at 64')
  assert (short['rows'], long['rows']) == (1024 // 32, 1024 // 64)
  assert all(one['attention']['implementation'] == 'reference' for one in found['programs'])


def test_devices_that_share_a_window_go_round_in_a_ring(monkeypatch):
  monkeypatch.setattr(compile, 'measure', lambda step, topology: ({}, None))
  evaluate = {'lengths': (64,), 'max_tokens': 64 * 4, 'sequence': 4}
  config = run_config(evaluate=evaluate, mesh={'replica': 4, 'sequence': 2})

  found = compile.compile_run(config, eight_chips())

  assert [one['attention']['implementation'] for one in found['programs']] == ['ring'] * 2
  assert found['mesh'] == {'replica': 4, 'fsdp': 1, 'sequence': 2, 'tensor': 1}
  assert found['programs'][1]['rows'] == 4


def test_masks_that_are_compared_are_named(monkeypatch):
  monkeypatch.setattr(compile, 'measure', lambda step, topology: ({}, None))
  config = run_config(evaluate={'lengths': (32,), 'masks': ('causal', 'window:9')})

  found = compile.compile_run(config, eight_chips())

  assert [one['name'] for one in found['programs'][1:]] == [
    'evaluation step at 32, as trained, causal',
    'evaluation step at 32, as trained, window:9',
  ]


def test_bytes_of_a_chip_are_those_of_its_share():
  """On one host's copies, and cut in eight: Adam keeps two numbers a parameter, and counters."""
  whole, cut = (report(replica)['programs'][0]['bytes'] for replica in (8, 1))

  count = report()['parameters']
  assert whole['parameters'] == 4 * count
  assert 8 * count <= whole['optimizer'] < 8 * count + 64
  assert whole['total'] == sum(value for name, value in whole.items() if name != 'total')
  assert cut['parameters'] < whole['parameters'] / 4  # FIRE's are whole everywhere
  assert whole['other arguments'] >= 0


def test_copies_add_up_gradients_and_parts_are_gathered():
  copies, cut = (report(replica)['programs'][0]['messages'] for replica in (8, 1))

  assert set(copies) == {'all-reduce'}
  assert copies['all-reduce']['bytes'] >= 4 * report()['parameters']
  assert 'all-gather' in cut


def test_a_notebook_keeps_its_device():
  assert jax.config.jax_default_device is None
  report()
  assert jax.config.jax_default_device is None


# What does not fit


TPU_MESSAGES = {
  'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. '
  'Used 21.16G of 15.75G hbm. Exceeded hbm capacity by 5.41G.': (21.16, 15.75),
  'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries '
  '(8.00T) exceeds available HBM (15.75G).': (8192, 15.75),
}


@pytest.mark.parametrize('text', TPU_MESSAGES)
def test_the_compilers_refusal_is_read(text):
  found = topologies.exhausted(jax.errors.JaxRuntimeError(text))

  assert found == tuple(round(number * 2**30) for number in TPU_MESSAGES[text])


@pytest.mark.parametrize(
  'text', ['INVALID_ARGUMENT: (8.00T) HBM (15.75G)', 'RESOURCE_EXHAUSTED: ?']
)
def test_another_refusal_is_not(text):
  assert topologies.exhausted(jax.errors.JaxRuntimeError(text)) is None


class Refused:
  """A function that the compiler refuses."""

  def __init__(self, text):
    self.text = text

  def lower(self, *arguments):
    raise jax.errors.JaxRuntimeError(self.text)


def test_a_step_that_the_compiler_refuses_has_its_numbers(monkeypatch):
  (text, *_) = TPU_MESSAGES
  monkeypatch.setattr(train.OnMesh, 'lower', Refused(text).lower)

  found = compile.compile_run(run_config(), eight_chips())

  assert found['programs'][0]['bytes']['total'] == round(21.16 * 2**30)
  assert 'optimizer' in found['programs'][0]['bytes']
  (sentence, _) = compile_report.excess(found)
  assert 'needs 21.16 GiB a chip, which is 5.41 more than' in sentence
  assert 'does not fit' in compile_report.table(found)


def test_what_the_compiler_refuses_for_another_reason_keeps_its_traceback(monkeypatch):
  monkeypatch.setattr(train.OnMesh, 'lower', Refused('INTERNAL: a defect').lower)

  with pytest.raises(jax.errors.JaxRuntimeError, match='a defect'):
    compile.compile_run(run_config(), eight_chips())


# The command


def test_a_directory_is_no_file_to_write_and_a_home_is_known(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.setattr(
    compile.flags, 'FLAGS', types.SimpleNamespace(save=str(tmp_path), output='~/report.json')
  )

  assert compile._file('output') == tmp_path / 'report.json'
  with pytest.raises(errors.UserError, match=f'--save={tmp_path} is a directory; give the name of'):
    compile._file('save')


def command(monkeypatch, chips, **given):
  """Runs it on a topology of the CPU's."""
  fields = {'topology': 'cpu:8', 'num_slices': 1, 'workdir': None, 'output': None, 'save': None}
  fields |= given
  monkeypatch.setattr(compile.flags, 'FLAGS', types.SimpleNamespace(**fields))
  monkeypatch.setattr(cli, 'config', run_config)
  monkeypatch.setattr(topologies, 'find', lambda name, num_slices: chips)
  compile.main()


def test_the_command_prints_and_writes_its_report(monkeypatch, tmp_path, capsys):
  command(monkeypatch, eight_chips(), output=str(tmp_path / 'report.json'))

  printed = capsys.readouterr().out
  written = json.loads((tmp_path / 'report.json').read_text())
  assert compile_report.table(written) in printed
  assert re.search(r'8 of cpu \(cpu:8\): replica=8', printed)
  assert 'compiling the evaluation step at 32' in printed
  assert 'does not fit' not in printed and not compile_report.excess(written)


def test_the_command_ends_with_3_and_names_the_excess_of_what_does_not_fit(
  monkeypatch, tmp_path, capsys
):
  with pytest.raises(SystemExit, match='3'):
    command(monkeypatch, eight_chips(memory_bytes=1000), output=str(tmp_path / 'report.json'))

  printed, complaints = capsys.readouterr()
  step, evaluation = json.loads((tmp_path / 'report.json').read_text())['programs']
  assert step['excess_bytes'] == step['bytes']['total'] - 1000
  assert evaluation['excess_bytes'] == evaluation['bytes']['total'] - 1000
  first, second = complaints.splitlines()
  assert first.startswith('error: the training step needs 0.00 GiB a chip, which is 0.00 more than')
  assert second.startswith('error: the evaluation step at 32 needs 0.00 GiB a chip, which is')
  assert printed.count('does not fit') == 2


def test_the_command_says_what_it_lacks(monkeypatch):
  with pytest.raises(errors.UserError, match='--topology is missing; known: v4:4x4x4, v5e:4x4'):
    command(monkeypatch, eight_chips(), topology=None)
  with pytest.raises(errors.UserError, match='--workdir=runs is of a run, and nothing runs here'):
    command(monkeypatch, eight_chips(), workdir='runs')


# Topologies


@pytest.mark.parametrize(
  'name',
  ['', 'v5e', 'v5e:', 'v5e:16', 'v5e:0x4', 'v9:4x4', 'cuda:h1x8', 'cuda:h200', 'cuda:h200x0'],
)
def test_an_unknown_topology_is_refused_with_those_that_there_are(name):
  message = f'unknown topology={name!r}; known: v4:4x4x4, v5e:4x4, v5e:16x16, v5p:4x4x4'
  with pytest.raises(errors.UserError, match=re.escape(message)) as raised:
    topologies.find(name)
  assert all(known in str(raised.value) for known in ('v5p:8x8x8', 'v6e:16x16', 'cuda:h200x8'))


def test_a_slice_wider_than_any_is_refused():
  """The compiler would end the process: a v5e has 256 chips at most (Cloud TPU's page on it)."""
  with pytest.raises(errors.UserError, match="'v5e:32x32' is wider than any .* at most 16 chips"):
    topologies.find('v5e:32x32')


def test_counts_of_slices_are_checked():
  with pytest.raises(errors.UserError, match='num_slices=0 must be at least 1'):
    topologies.find('v5e:4x4', 0)
  with pytest.raises(errors.UserError, match='num_slices=2 is of TPUs; say .* cuda:h200xCOUNT'):
    topologies.find('cuda:h200x8', 2)


@pytest.mark.parametrize(
  ('name', 'remedy'),
  [('v5e:4x4', 'requirements-tpu.txt'), ('cuda:h200x8', 'requirements-cuda.txt')],
)
def test_a_compiler_that_is_not_installed_is_named(monkeypatch, name, remedy):
  monkeypatch.setattr(topologies.importlib.util, 'find_spec', lambda name: None)

  with pytest.raises(errors.UserError, match=f"topology='{name}' needs .*{remedy}"):
    topologies.find(name)


# Messages

TEXT = """\
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%async (p: bf16[4,8]) -> bf16[16,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.7 = bf16[16,8]{1,0} all-gather(%p), channel_id=1, dimensions={0}
}

%condition (state: (s32[], bf16[4,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12), backend_config={}
  %state = (s32[]{:T(128)}, bf16[4,8]{1,0}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %lt = pred[]{:T(512)} compare(%counter, %limit), direction=LT
}

%body (state: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %state.1 = (s32[]{:T(128)}, bf16[4,8]{1,0}) parameter(0)
  %part = bf16[4,8]{1,0:T(8,128)(2,1)} get-tuple-element(%state.1), index=1
  %start = ((bf16[4,8]), bf16[16,8], u32[]) async-start(%part), calls=%async
  %done = bf16[16,8]{1,0} async-done(%start), calls=%async
  %both = (bf16[4,8]{1,0}, /*index=1*/f32[2]{0:T(128)S(1)}) all-reduce(%part, %two), to_apply=%add
  %two = f32[2]{0:T(128)} constant({1, 2})
  ROOT %next = (s32[]{:T(128)}, bf16[4,8]{1,0}) tuple(%counter.1, %part)
}

%noted_body (own: (f32[8])) -> (f32[8]) {
  %own = (f32[8]{0}) parameter(0)
  %eight = f32[8]{0} get-tuple-element(%own), index=0
  %exchanged = f32[8]{0} all-to-all(%eight), dimensions={0}
  ROOT %one_of = (f32[8]{0}) tuple(%exchanged)
}

ENTRY %main (p0: f32[32,8], p1: f32[16]) -> f32[4,8] {
  %p0 = f32[32,8]{1,0} parameter(0)
  %p1 = f32[16]{0} parameter(1)
  %loop = (s32[]{:T(128)}, bf16[4,8]{1,0}) while(%tuple), condition=%condition, body=%body
  %noted = (f32[8]) while(%one), condition=%other, body=%noted_body, \
backend_config={"known_trip_count":{"n":"5"}}
  %permute = (f32[16]{0}, f32[16]{0}) collective-permute-start(%p1), source_target_pairs={{0,1}}
  %permuted = f32[16]{0} collective-permute-done(%permute)
  ROOT %scattered = f32[4,8]{1,0} reduce-scatter(%p0), dimensions={0}, to_apply=%add
}
"""


def test_messages_are_counted_as_often_as_they_are_sent():
  assert hlo.collectives(TEXT) == {
    'all-gather': (12, 12 * 16 * 8 * 2),
    'reduce-scatter': (1, 32 * 8 * 4),
    'all-reduce': (12, 12 * (4 * 8 * 2 + 2 * 4)),
    'all-to-all': (5, 5 * 8 * 4),
    'collective-permute': (1, 16 * 4),
  }


@pytest.mark.parametrize('unroll', [1, 4])
def test_a_loop_counts_what_its_steps_would_if_they_stood_one_after_another(unroll):
  mesh = train.sharding.make_mesh(8)

  def total(x_8L):
    def add(carry, _):
      with_all = jax.lax.with_sharding_constraint(
        carry * 2, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
      )
      own = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('replica'))
      return jax.lax.with_sharding_constraint(with_all, own), None

    return jax.lax.scan(add, x_8L, None, length=4, unroll=unroll)[0]

  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('replica'))
  text = jax.jit(total).lower(jax.ShapeDtypeStruct((8, 3), np.float32, sharding=split)).compile()

  assert hlo.collectives(text.as_text()) == {'all-gather': (4, 4 * 8 * 3 * 4)}


# Presets of meshes


@pytest.mark.parametrize('size', ['base', 'large', 'lex_medium'])
@pytest.mark.parametrize('name', presets.MESHES)
def test_each_mesh_divides_the_runs_as_published(name, size):
  fields = {'replica': 1, 'fsdp': 1, 'tensor': 1} | presets.mesh(name)
  config = config_lib.Config.from_dict(presets.make(size, 'fire', mesh=presets.mesh(name)))
  sizes = tuple(fields.get(axis, 1) for axis in train.sharding.AXES)

  program = train.Program(config, jax.sharding.AbstractMesh(sizes, train.sharding.AXES))

  shards = {
    leaf.sharding.shard_shape(leaf.shape)[0]
    for leaf in jax.tree.leaves(program.abstract_state['params']['embedding_VD'])
  }
  assert shards == {config.model.vocab_size // fields['tensor']}


CHIPS = {
  'chip': 1,
  'host': 8,
  '8-gpus': 8,
  'v5e-256': 256,
  'v5p-512': 256,
  'two-slices-v5e-256': 512,
}


def test_meshes_have_the_chips_that_their_names_say():
  assert {
    name: math.prod(presets.mesh(name).values()) for name in presets.MESHES if name != 'any'
  } == CHIPS
  assert presets.MESHES['any'] == {}


def test_an_unknown_mesh_is_refused():
  with pytest.raises(errors.UserError, match="unknown preset mesh='v5e'; known: any, chip, host"):
    presets.mesh('v5e')


@pytest.mark.parametrize('file', ['c4', 'text'])
def test_the_files_of_configs_take_a_mesh(file):
  path = pathlib.Path(__file__).parents[1] / 'configs' / f'{file}.py'
  get_config = runpy.run_path(str(path))['get_config']

  meshes = [get_config(arg).mesh.to_dict() for arg in ('', 'mesh=two-slices-v5e-256')]

  default = config_lib.Config().to_dict()['mesh']
  assert meshes == [default, default | {'replica': 32, 'fsdp': 8, 'tensor': 2}]
