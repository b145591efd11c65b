"""`python -m lex_fire.compile` for TPUs, without one: `make test-tpu`."""

import functools
import importlib.util
import json
import os
import subprocess
import sys

import pytest

from lex_fire import errors, presets, sharding, topologies

if importlib.util.find_spec('libtpu') is None:
  pytest.skip('needs the compiler for TPU: make test-tpu', allow_module_level=True)

GIB = 2**30
SMALL = {
  'model.num_layers': 2,
  'model.scan_layers': True,
  'model.dtype': 'bfloat16',
  'data.batch_size': 64,
  'evaluate.lengths': (2048,),
}


def compile_for(directory, topology, num_slices=1, environment=None, **fields):
  """Runs the command on a small model; returns its status, report and stderr."""
  output = directory / 'report.json'
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'lex_fire.compile'),
      *('--config=configs/text.py:size=tiny,encoding=fire', f'--topology={topology}'),
      *(f'--num_slices={num_slices}', f'--output={output}'),
      *(f'--config.{name}={value}' for name, value in (SMALL | fields).items()),
    ],
    capture_output=True,
    text=True,
    env={**os.environ, **(environment or {})},
  )
  report = json.loads(output.read_text()) if output.exists() else None
  return done.returncode, report, done.stderr


def test_the_step_of_two_slices_fits_and_runs_kernels_on_each_chips_rows(tmp_path):
  """Where nothing says that JAX is to leave the TPU alone; whose lack is no error."""
  fields = {'mesh.replica': 4, 'mesh.fsdp': 4, 'mesh.tensor': 2, 'model.vocab_size': 260}
  environment = {'JAX_PLATFORMS': ''}
  status, report, stderr = compile_for(tmp_path, 'v5e:4x4', 2, environment, **fields)

  assert (status, stderr) == (0, '')
  assert (report['chips'], report['kind'], report['num_slices']) == (32, 'TPU v5 lite', 2)
  assert report['memory_source'] == 'compiler'
  assert report['memory_bytes'] == 15.75 * GIB
  step, evaluation = report['programs']
  assert {one['attention']['implementation'] for one in (step, evaluation)} == {'mosaic_tpu'}
  assert step['messages']['all-gather']['count'] >= 2  # of each of two layers, at least once
  assert step['messages']['all-reduce']['bytes'] > 0
  assert evaluation['messages'] == {}
  assert report['parameters'] * 4 / 8 < step['bytes']['parameters'] < report['parameters'] * 4 / 2
  assert step['bytes']['temporaries'] > 0


def test_a_model_that_exceeds_the_chip_ends_with_3_and_says_by_how_much(tmp_path):
  """Two layers of two matrices of 8 GiB."""
  fields = {'model.d_ff': 2**24}
  status, report, stderr = compile_for(tmp_path, 'v5e:4x4', **fields)

  assert status == 3
  step = report['programs'][0]
  assert step['bytes']['parameters'] > 32 * GIB
  assert step['excess_bytes'] > 3 * 32 * GIB - report['memory_bytes']  # with Adam's two
  excess = step['excess_bytes'] / GIB
  assert f'error: the training step needs {excess + 15.75:.2f} GiB a chip, which is ' in stderr
  assert f'{excess:.2f} more than the 15.75 that a program may have of a TPU v5 lite' in stderr


@pytest.mark.parametrize(
  ('name', 'chips', 'gibibytes'),
  [
    ('v4:4x4x4', 64, 32),
    ('v5e:4x4', 16, 16),
    ('v5e:16x16', 256, 16),
    ('v5p:4x4x4', 64, 95),
    ('v5p:4x8x8', 256, 95),
    ('v5p:8x8x8', 512, 95),
    ('v6e:4x4', 16, 32),
    ('v6e:16x16', 256, 32),
  ],
)
def test_each_topology_has_its_chips_and_about_the_memory_of_the_vendors_page(
  name, chips, gibibytes
):
  found = cached(name)

  assert name in topologies.known()
  assert len(found.devices) == chips
  assert found.memory_source == 'compiler'
  assert found.memory_bytes == pytest.approx(gibibytes * GIB, rel=0.05)


cached = functools.cache(topologies.find)


def test_slices_multiply_chips():
  found = topologies.find('v5e:4x4', 2)

  assert {device.slice_index for device in found.devices} == {0, 1}
  assert len(found.devices) == 2 * len(cached('v5e:4x4').devices)


def test_a_shape_that_no_slice_has_is_refused():
  with pytest.raises(errors.UserError, match="has no topology='v5e:3x3': INVALID_ARGUMENT: .*v5e:"):
    topologies.find('v5e:3x3')


def test_what_tells_libtpu_that_it_only_compiles_is_gone_afterwards(monkeypatch):
  """So that a notebook finds its TPU as it would have."""
  monkeypatch.delenv('TPU_SKIP_MDS_QUERY', raising=False)

  topologies.find('v6e:4x4')

  assert 'TPU_SKIP_MDS_QUERY' not in os.environ


@pytest.mark.parametrize(
  ('mesh', 'name', 'num_slices'),
  [
    ('v5e-256', 'v5e:16x16', 1),
    ('v5p-512', 'v5p:4x8x8', 1),
    ('two-slices-v5e-256', 'v5e:16x16', 2),
    ('host', 'v5e:2x4', 1),
  ],
)
def test_each_mesh_of_the_presets_lies_on_its_chips(mesh, name, num_slices):
  found = topologies.find(name, num_slices)

  made = sharding.make_mesh(**presets.mesh(mesh), devices=found.devices)

  assert made.size == len(found.devices)


@pytest.mark.parametrize('name', ['v4:4x4x4', 'v5e:4x4', 'v5p:4x4x4', 'v6e:4x4'])
def test_an_axis_may_be_a_part_of_a_side_of_a_slice(name):
  """Eight of chips that lie four by four."""
  made = sharding.make_mesh(-1, 8, devices=cached(name).devices)

  assert made.shape['fsdp'] == 8
