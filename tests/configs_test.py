"""The files of configs/: all that a user may type builds, and published runs are as published."""

import dataclasses
import functools
import importlib.util
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
from config_test import abstract_params, abstract_state, count, every_encoding, every_preset

from experiments.compile_table import run as compile_table
from lex_fire import (
  compile,
  compile_report,
  encodings,
  errors,
  presets,
  published,
  sharding,
  train,
)
from lex_fire import config as config_lib
from lex_fire.data import algorithms, glue, needles, scrolls

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'


@functools.cache
def load(file):
  spec = importlib.util.spec_from_file_location(file, CONFIGS / f'{file}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def get_config(file, arg):
  return load(file).get_config(arg)


def build(file, arg):
  return config_lib.Config.from_dict(get_config(file, arg))


@every_encoding
@pytest.mark.parametrize('file', sorted(path.stem for path in CONFIGS.glob('*.py')))
def test_config_files_give_a_config_for_every_encoding(file, name):
  values = get_config(file, f'encoding={name}')

  config = config_lib.Config.from_dict(values)

  assert config_lib.Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
  assert config.encoding.make().name == name
  # Those of published runs are their models', all others a laptop's, if with a long learned table.
  largest = {'c4': 2e8, 'glue': 2e8, 'scrolls': 2e8, 'pile': 4e8, 'zoo': 3e6}
  assert count(abstract_params(config)) < largest.get(file, 2e6)


# What a user may type for each argument; of equal meshes one, and a run to start from has its own
# tests (finetuning_test.py).
PRETRAINING = {
  'size': presets.PRESETS,
  'vocabulary': ('t5', 'bytes'),
  'mesh': set(presets.MESHES) - {'8-gpus'},
}
FINETUNING = {'size': presets.PRESETS, 'vocabulary': ('t5', 'bytes'), 'mesh': ('any', 'host')}
ARGUMENTS = {
  'algorithms': {
    'task': algorithms.ALGORITHMS,
    'length': ('5', '40'),
    'hints': ('true', 'false'),
    'lengths': algorithms.LENGTHS,
    'randomized': ('true', 'false'),
  },
  'c4': PRETRAINING,
  'glue': {'task': glue.TASKS, 'length': ('256', '512'), **FINETUNING},
  'mlm': {'encoding': encodings.ENCODINGS},
  'needles': {'task': needles.NEEDLES, 'length': ('128', '512'), 'size': presets.PRESETS},
  'pile': PRETRAINING,
  'quickstart': {'encoding': encodings.ENCODINGS},
  'scrolls': {'task': scrolls.CONFIGS, 'length': ('2048', '16384'), **FINETUNING},
  'text': {'size': presets.PRESETS, 'mesh': PRETRAINING['mesh']},
  'zoo': {'encoding': encodings.ENCODINGS},
}


@pytest.mark.parametrize('file', sorted(path.stem for path in CONFIGS.glob('*.py')))
def test_all_that_a_user_may_type_builds_and_counts(file):
  choices = ARGUMENTS[file]
  typed = [
    ','.join(f'{name}={value}' for name, value in zip(choices, values, strict=True))
    for values in itertools.product(*choices.values())
  ]

  assert len({build(file, arg) for arg in typed}) == len(typed)


def alike(tree):
  """Returns the shapes and dtypes of a tree, by its paths."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): (leaf.shape, leaf.dtype) for path, leaf in leaves}


STEPS = [(file, '') for file in ARGUMENTS] + [
  (file, f'size={size}')
  for file, choices in ARGUMENTS.items()
  for size in choices.get('size', ())
  if build(file, f'size={size}') != build(file, '')
]


# That it compiles is asked, not how fast it then is; without optimization it takes half the time.
UNOPTIMIZED = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}


@pytest.mark.parametrize(('file', 'arg'), STEPS)
def test_the_training_step_of_every_file_and_size_compiles(file, arg):
  """Each as `compile` has it, on 8 devices."""
  config = build(file, arg)
  mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
  step = compile.training_step(config, train.Program(config, mesh))

  lowered = step.function.lower(*step.arguments)

  state, values = lowered.out_info
  assert alike(state) == alike(step.arguments[0])
  assert values['loss'].shape == ()
  program = lowered.compile(compiler_options=UNOPTIMIZED)
  assert program.memory_analysis().argument_size_in_bytes > 0


# Published runs


every_run = pytest.mark.parametrize('name', published.RUNS)


@every_run
def test_a_published_run_has_its_config(name):
  run = published.RUNS[name]

  for encoding in run.encodings:
    config = build(run.config, f'{run.arguments},encoding={encoding}')
    assert set(run.lengths) <= set(config.evaluate.lengths)
    if run.tokens is not None:
      assert run.tokens == config.train.steps * config.data.batch_size * config.data.length
      assert run.lengths == config.evaluate.lengths


@every_run
def test_a_config_says_what_was_published(name):
  docstring = load(published.RUNS[name].config).__doc__

  assert published.describe(name) in ' '.join(docstring.split())


def test_the_config_of_lex_shows_its_table_and_is_judged_under_its_masks():
  table = published.TABLES['lex_perplexity']

  for line in published.text(table).splitlines():
    assert f'\n    {line}\n' in load('pile').__doc__
  assert build('pile', '').data.length == table.trained
  masks = {mask for _, mask in table.rows} - {published.UNCLEAR}
  assert masks == set(build('pile', '').evaluate.masks)


def test_the_config_of_fire_says_what_the_compiler_found():
  found = json.loads(compile_table.FILE.read_text())['base fire v5e:4x4 2048,32768,131072']

  needs, has = (
    compile_report.gib(size)
    for size in (found['programs'][0]['bytes']['total'], found['memory_bytes'])
  )
  docstring = ' '.join(load('c4').__doc__.split())
  assert f'takes {needs} of {has} GiB of each of {found["chips"]} chips of TPU v5e' in docstring


@pytest.mark.parametrize(
  ('name', 'encoding'),
  [
    (name, encoding)
    for name, run in published.RUNS.items()
    if run.config in ('c4', 'pile')
    for encoding in run.encodings
  ],
)
def test_a_step_of_every_published_run_traces(name, encoding):
  run = published.RUNS[name]
  config = build(run.config, f'{run.arguments},encoding={encoding}')
  state = abstract_state(config.model, config.encoding)
  rows = config.data.batch_size, config.data.length
  batch = {
    'inputs_BL': jax.ShapeDtypeStruct(rows, jnp.int32),
    'targets_BL': jax.ShapeDtypeStruct(rows, jnp.int32),
    'loss_weights_BL': jax.ShapeDtypeStruct(rows, jnp.float32),
    'position_BL': None,
    'segment_ids_BL': None,
  }

  following, values = jax.eval_shape(functools.partial(train.step, config), state, batch)

  assert following == state
  assert values['loss'] == jax.ShapeDtypeStruct((), jnp.float32)


@every_preset
def test_the_text_config_takes_every_preset(size):
  values = get_config('text', f'size={size},encoding=xpos').to_dict()

  expected = presets.make(size, 'xpos', data={'task': 'text'})
  assert config_lib.Config.from_dict(values) == config_lib.Config.from_dict(expected)


@every_encoding
def test_the_mlm_config_is_the_quickstart_of_an_encoder(name):
  values = get_config('mlm', f'encoding={name}').to_dict()

  quickstart = get_config('quickstart', f'encoding={name}').to_dict()
  quickstart['model'] |= {'causal': False, 'vocab_size': quickstart['model']['vocab_size'] + 1}
  if 'bidirectional' in quickstart['encoding']:
    quickstart['encoding']['bidirectional'] = True
  assert values == quickstart


def test_config_files_refuse_an_unknown_argument():
  with pytest.raises(errors.UserError, match="'size=base'; known: encoding="):
    get_config('quickstart', 'size=base')


@pytest.mark.parametrize(
  ('file', 'arg', 'message'),
  [
    ('algorithms', 'length=abc', 'option length=abc .* must be of type int'),
    ('algorithms', 'length=-4,hints=true', 'length=-4 has no half to evaluate; use at least 2'),
    ('algorithms', 'length=61,hints=true', 'length=61 is evaluated up to 488, for which the 486'),
    ('algorithms', 'randomized=maybe', "randomized='maybe' must be true or false"),
    ('algorithms', 'hints=maybe', 'option hints=maybe .* must be of type bool'),
    ('algorithms', 'task=divide', "unknown task='divide'; known: copy, "),
    ('needles', 'length=-4', 'config argument length=-4 must be a whole number above 0'),
    ('scrolls', 'length=8k', 'config argument length=8k must be a whole number above 0'),
    ('scrolls', 'task=qm', "unknown task='qm' of SCROLLS; known: qmsum, "),
    ('scrolls', 'checkpoint=a', "no run in workdir 'a'"),
    ('glue', 'task=sst2', "unknown task='sst2' of GLUE and SuperGLUE; known: glue_cola, "),
    ('glue', 'length=0', 'config argument length=0 must be a whole number above 0'),
  ],
)
def test_a_wrong_argument_of_a_config_file_is_refused(file, arg, message):
  with pytest.raises(errors.UserError, match=message):
    get_config(file, arg)


def test_hints_make_a_longer_row_however_they_are_spelt():
  lengths = [get_config('algorithms', arg).data.length for arg in ('', 'hints=true', 'hints=True')]

  assert lengths[1] == lengths[2] > lengths[0]
