"""Tests `../lex_fire/finetuning.py` and its configs: a run's model goes on to answer questions."""

import dataclasses
import runpy

import pytest
import tiny

from lex_fire import asking, benchmark, benchmark_plots, checkpoint, errors, train
from lex_fire import config as config_lib

pytest.importorskip('seqio')


def get_config(file, arg):
  return runpy.run_path(f'configs/{file}.py')['get_config'](arg)


@pytest.mark.parametrize('file, task', [('glue', 'super_glue_cb'), ('scrolls', 'qasper')])
def test_a_run_goes_on_with_its_own_model_and_vocabulary_on_other_data(file, task, fire_run):
  workdir, _ = fire_run
  before = checkpoint.read_config(workdir)

  values = get_config(file, f'task={task},length=99,checkpoint={workdir}')
  found = config_lib.Config.from_dict(values.to_dict())

  assert (found.model, found.encoding) == (before.model, before.encoding)
  assert found.data.task.endswith(task) and found.data.train_files == ''
  assert (found.data.length, found.evaluate.lengths) == (99, (99,))
  assert (found.data.vocabulary, found.data.directory) == ('bytes', before.data.directory)
  assert found.train.start_from == str(workdir)


def test_its_mesh_is_its_own(fire_run, monkeypatch):
  workdir, _ = fire_run
  of_a_pod = checkpoint.read_config(workdir)
  of_a_pod = dataclasses.replace(of_a_pod, mesh=config_lib.MeshConfig(replica=16, fsdp=16))
  monkeypatch.setattr(checkpoint, 'read_config', lambda _: of_a_pod)
  arg = f'task=qmsum,checkpoint={workdir}'

  assert get_config('scrolls', arg).mesh.to_dict() == config_lib.Config().to_dict()['mesh']
  mesh = get_config('scrolls', f'{arg},mesh=host').mesh
  assert (mesh.replica, mesh.fsdp, mesh.tensor) == (1, 8, 1)
  with pytest.raises(errors.UserError, match="unknown preset mesh='tpu'; known: any, chip"):
    get_config('scrolls', f'{arg},mesh=tpu')


def test_what_a_checkpoint_has_may_be_said_again_and_nothing_else(fire_run):
  arg = f'task=qmsum,length=99,checkpoint={fire_run[0]}'
  same = get_config('scrolls', f'{arg},encoding=fire,vocabulary=bytes')

  assert same.to_dict() == get_config('scrolls', arg).to_dict()
  for other in ('encoding=rope', 'vocabulary=t5', 'size=base'):
    with pytest.raises(errors.UserError, match='is not that of checkpoint=.*leave it out'):
      get_config('scrolls', f'{arg},{other}')


def test_what_is_no_run_is_refused(tmp_path):
  with pytest.raises(errors.UserError, match=f"no run in workdir '{tmp_path}"):
    get_config('glue', f'checkpoint={tmp_path}')


def test_a_model_learns_a_task_of_glue_and_its_accuracy_is_reported(glue_directory, tmp_path):
  """The sentences are 'good' and 'bad', so that a few steps are enough."""
  values = get_config('glue', 'task=glue_sst2,size=tiny,encoding=rope,vocabulary=bytes,length=64')
  values = values.to_dict()
  data = {'batch_size': 8, 'directory': str(tmp_path), 'tfds_directory': str(glue_directory)}
  for section, fields in {
    'model': tiny.MODEL,
    'data': data,
    'optimizer': {'learning_rate': 0.03, 'warmup_steps': 2},
    'train': {'steps': 40, 'checkpoint_every': 40},
  }.items():
    values[section].update(fields)

  config = config_lib.Config.from_dict(values)
  train.train(config, tmp_path / 'run')
  asked = asking.Asked(('glue_sst2',))
  (plan,) = benchmark.plan([tmp_path / 'run'], asked, config.evaluate)
  (report,) = benchmark.run(plan, tmp_path / 'answers')

  (entry,) = report['tasks']
  assert (entry['split'], entry['length'], entry['questions']) == ('validation', 64, 4)
  assert entry['scores'] == {'accuracy': 100.0}
  assert 'glue_sst2 at 64 [accuracy, %]' in benchmark_plots.table([report])
