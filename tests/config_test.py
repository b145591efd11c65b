"""Configs and presets: what they refuse, and that what they make builds; configs_test has files."""

import functools
import json
import math
import pathlib
import re

import jax
import pytest

from lex_fire import arguments, encodings, errors, presets, train
from lex_fire import config as config_lib

every_preset = pytest.mark.parametrize('size', presets.PRESETS)
every_encoding = pytest.mark.parametrize('name', encodings.ENCODINGS)


def make(size='tiny', name='rope', **sections):
  return config_lib.Config.from_dict(presets.make(size, name, **sections))


def count(tree):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@functools.cache
def abstract_state(model, encoding):
  config = config_lib.Config(model=model, encoding=encoding)
  return jax.eval_shape(functools.partial(train.init, config))


def abstract_params(config):
  return abstract_state(config.model, config.encoding)['params']


# Into a Config and out of it


@every_preset
@every_encoding
def test_a_config_is_what_its_json_says(size, name):
  config = make(size, name, data={'batch_size': 6}, optimizer={'beta1': 0.875})

  text = json.dumps(config.to_dict())

  assert config_lib.Config.from_dict(json.loads(text)) == config
  assert config_lib.Config.from_dict(config.to_dict()) == config
  assert config.data.batch_size == 6 and config.optimizer.beta1 == 0.875
  assert config.encoding.name == name


def test_a_config_of_an_early_version_says_what_was_done_then():
  early = json.loads((pathlib.Path(__file__).parent / 'golden/early_config.json').read_text())

  found = config_lib.Config.from_json(early).to_dict()

  assert early['mesh'].pop('data') == found['mesh'].pop('replica') == 2  # which it was called
  assert early['model'].pop('remat') is True and found['model'].pop('remat') == 'block'
  defaults = config_lib.Config().to_dict()
  for section, fields in found.items():
    for name, value in fields.items():
      expected = early[section][name] if name in early[section] else defaults[section][name]
      assert value == tuple(expected) if isinstance(value, tuple) else value == expected, name


def test_equal_configs_are_one_key_and_a_change_is_another():
  config = make('base', 'fire')

  assert hash(config) == hash(make('base', 'fire'))
  assert len({config, make('base', 'fire'), make('base', 'fire', train={'seed': 1})}) == 2
  with pytest.raises(AttributeError):
    config.train.seed = 1


def test_options_of_an_encoding_reach_it_in_any_order():
  values = make('tiny', 'learned', encoding={'max_length': 300}).to_dict()
  assert config_lib.Config.from_dict(values).encoding.make().max_length == 300

  fire = {'name': 'fire', 'width': 4, 'threshold': 9.0, 'c': 1.0, 'hidden_layers': 1}
  backwards = dict(reversed(fire.items()))
  of = config_lib.Config.from_dict
  assert of(values | {'encoding': fire}) == of(values | {'encoding': backwards})


def test_an_int_stands_for_a_float_and_a_list_for_a_tuple_and_both_are_converted():
  config = make(optimizer={'clip_norm': 2}, evaluate={'lengths': [7, 8]})

  assert type(config.optimizer.clip_norm) is float and config.optimizer.clip_norm == 2.0
  assert config.evaluate.lengths == (7, 8)


# Presets


@every_preset
@every_encoding
def test_every_preset_initializes_abstractly_with_every_encoding(size, name):
  config = make(size, name)

  params = abstract_params(config)

  own = config.encoding.make().init(
    jax.random.key(0),
    num_heads=config.model.num_heads,
    head_dim=config.model.head_dim,
    d_model=config.model.d_model,
  )
  copies = 1 if config.encoding.make().shared else config.model.num_layers
  assert count(params) == count(abstract_params(make(size, 'nope'))) + copies * count(own)


@pytest.mark.parametrize(
  ('size', 'layers', 'width', 'hidden', 'published'),
  [
    ('base', 12, 768, 3072, 125e6),
    ('large', 24, 1024, 4096, 350e6),
    ('lex_medium', 24, 1024, 4096, 355e6),
  ],
)
def test_presets_have_about_the_published_number_of_parameters(
  size, layers, width, hidden, published
):
  """Within 15%: the papers name the sizes of GPT-3, whose vocabulary is 50,257 and not 32,128.

  With it, the same layers and embeddings are within 2% (124M, 354M).
  """
  # Q, K, V and output of D x D, two matrices of D x F, scale and bias of two norms.
  layer = 4 * width**2 + 2 * width * hidden + 4 * width
  expected = layers * layer + 32_128 * width + 2 * width

  parameters = count(abstract_params(make(size, 'nope')))

  assert parameters == expected
  assert abs(parameters / published - 1) < 0.15
  assert abs((parameters + (50_257 - 32_128) * width) / published - 1) < 0.02


def test_the_tiny_preset_is_the_defaults():
  assert (
    presets.make('tiny', 'nope')
    == config_lib.Config(encoding=config_lib.EncodingConfig('nope')).to_dict()
  )


def test_changes_to_a_preset_replace_its_fields_and_no_others():
  values = presets.make('base', 'fire', data={'length': 64}, encoding={'threshold': 9.0})

  expected = presets.make('base', 'fire')
  expected['data']['length'] = 64
  expected['encoding']['threshold'] = 9.0
  assert values == expected
  assert presets.PRESETS['base']['data']['length'] == 2048


# What is refused


def refuses(message):
  return pytest.raises(errors.UserError, match=re.escape(message))


@pytest.mark.parametrize(
  ('section', 'fields', 'message'),
  [
    ('model', {'activation': 'relu'}, "unknown model.activation='relu'; known: gelu, swiglu"),
    ('model', {'norm': 'batch'}, "unknown model.norm='batch'; known: layernorm, rmsnorm"),
    ('model', {'dtype': 'float16'}, "unknown model.dtype='float16'; known: float32, bfloat16"),
    ('model', {'num_layers': 0}, 'model.num_layers=0 must be at least 1'),
    ('model', {'d_model': -3}, 'model.d_model=-3 must be at least 1'),
    ('model', {'num_heads': 0}, 'model.num_heads=0 must be at least 1'),
    ('model', {'num_kv_heads': 0}, 'model.num_kv_heads=0 must be at least 1'),
    ('model', {'head_dim': 0}, 'model.head_dim=0 must be at least 1'),
    ('model', {'d_ff': 0}, 'model.d_ff=0 must be at least 1'),
    ('model', {'vocab_size': 0}, 'model.vocab_size=0 must be at least 1'),
    ('model', {'num_kv_heads': 3}, 'model.num_kv_heads=3 must divide model.num_heads=4'),
    ('model', {'num_kv_heads': 8}, 'model.num_kv_heads=8 must divide model.num_heads=4'),
    ('model', {'d_model': 16.0}, 'model.d_model=16.0 must be of type int'),
    ('model', {'remat': 1}, 'model.remat=1 must be of type str'),
    (
      'model',
      {'remat': 'all'},
      "unknown model.remat='all'; known: none, elementwise, block_but_attention, block",
    ),
    ('model', {'num_layers': True}, 'model.num_layers=True must be of type int'),
    ('model', {'dtype': None}, 'model.dtype=None must be of type str'),
    ('model', {'width': 7}, "unknown config key 'model.width'; known: num_layers, d_model"),
    ('data', {'length': 0}, 'data.length=0 must be at least 1'),
    ('data', {'batch_size': 0}, 'data.batch_size=0 must be at least 1'),
    ('data', {'mask_rate': 0}, 'data.mask_rate=0.0 must be above 0 and below 1'),
    ('data', {'mask_rate': 1.0}, 'data.mask_rate=1.0 must be above 0 and below 1'),
    ('data', {'mask_rate': float('nan')}, 'data.mask_rate=nan must be above 0 and below 1'),
    ('data', {'position_range': 255}, 'data.position_range=255 must be 0 or at least data.length='),
    ('data', {'position_range': -1}, 'data.position_range=-1 must be 0 or at least data.length='),
    ('data', {'lenght': 5}, "unknown config key 'data.lenght'; known: task"),
    ('optimizer', {'beta1': '0.9'}, "optimizer.beta1='0.9' must be of type float"),
    ('optimizer', {'warmup_steps': -1}, 'optimizer.warmup_steps=-1'),
    ('optimizer', {'warmup_steps': 1000}, 'optimizer.warmup_steps=1000'),
    ('optimizer', {'learning_rate': -1.0}, 'optimizer.learning_rate=-1.0 must be above 0'),
    ('optimizer', {'learning_rate': float('nan')}, 'optimizer.learning_rate=nan must be above 0'),
    ('optimizer', {'clip_norm': 0.0}, 'optimizer.clip_norm=0.0 must be above 0'),
    ('optimizer', {'beta1': 1.0}, 'optimizer.beta1=1.0 must be at least 0 and below 1'),
    ('optimizer', {'final_fraction': -0.1}, 'optimizer.final_fraction=-0.1 must be at least 0'),
    ('optimizer', {'weight_decay': -1.0}, 'optimizer.weight_decay=-1.0 must be at least 0'),
    ('model', {'attention': 'dense'}, "unknown model.attention='dense'; known: auto, reference"),
    ('train', {'seed': -1}, 'train.seed=-1 must be from 0 to'),
    ('train', {'seed': 2**32}, 'train.seed=4294967296 must be from 0 to'),
    ('data', {'position_range': 2**31}, 'data.position_range=2147483648 must be at most'),
    ('evaluate', {'lengths': (2**31,)}, 'evaluate.lengths=2147483648 must be at most 2147483647'),
    ('evaluate', {'lengths': ()}, 'evaluate.lengths=() must be one or more different'),
    ('evaluate', {'lengths': (8, 8)}, 'evaluate.lengths=(8, 8) must be one or more different'),
    ('evaluate', {'lengths': ('a',)}, "evaluate.lengths=('a',) must be one or more"),
    ('evaluate', {'max_tokens': 0}, 'evaluate.max_tokens=0 must be at least 1'),
    ('evaluate', {'stride': -1}, 'evaluate.stride=-1 must be at least 0'),
    ('evaluate', {'sequence': 0}, 'evaluate.sequence=0 must be at least 1'),
    ('evaluate', {'lengths': (16, 18), 'sequence': 2}, 'evaluate.lengths has L=18, which the 4'),
    ('evaluate', {'protocol': 'same'}, "unknown protocol 'same'; known: windows, same_tokens"),
    ('encoding', {'base_period': '9'}, "base_period='9' of 'rope' must be of type float"),
    ('encoding', {'base_period': float('nan')}, 'base_period=nan above 0'),
    ('mesh', {'model': 2}, "'mesh.model'; known: replica, fsdp, sequence, tensor"),
    ('train', {'steps': 0}, 'train.steps=0 must be at least 1'),
    ('train', {'accumulation': 0}, 'train.accumulation=0 must be at least 1'),
    ('train', {'accumulation': 3}, 'train.accumulation=3 must divide data.batch_size=8'),
    ('train', {'log_every': 0}, 'train.log_every=0 must be at least 1'),
    ('train', {'keep_latest': 0}, 'train.keep_latest=0 must be at least 1'),
    ('evaluate', {'lengths': 5}, 'evaluate.lengths=5 must be of type tuple'),
    ('evaluate', {'protocols': 'x'}, "unknown config key 'evaluate.protocols'"),
    ('evaluate', {'masks': ()}, 'evaluate.masks=() must be one or more names'),
    ('evaluate', {'masks': (3,)}, 'evaluate.masks=(3,) must be one or more names'),
    ('evaluate', {'masks': ('blokwise',)}, "unknown mask 'blokwise'; known: causal, full, blockw"),
    ('evaluate', {'masks': ('full',)}, "mask 'full' needs a model of model.causal=False"),
    ('evaluate', {'masks': ('causal', 'as_trained')}, "compares 'causal' with itself; name each"),
    ('evaluate', {'masks': ('blockwise', 'blockwise:128')}, "compares 'blockwise:128' with itself"),
    ('evaluate', {'encodings': ()}, 'evaluate.encodings=() must be one or more names'),
    ('evaluate', {'encodings': ('rop',)}, "unknown encoding 'rop'; known: alibi"),
    ('evaluate', {'encodings': ('xpos:beta=4',)}, "encoding 'xpos' has no option 'beta'; it takes"),
    ('evaluate', {'encodings': ('xpos:gamma=x',)}, "option gamma=x of 'xpos' must be of type flo"),
    ('evaluate', {'encodings': ('xpos:gamma',)}, "option gamma= of 'xpos' must be of type float"),
    ('evaluate', {'encodings': ('xpos:gamma=-1',)}, 'xpos needs gamma=-1.0'),
    ('evaluate', {'encodings': ('rope', 'as_trained')}, "compares 'as_trained' with itself"),
    ('evaluate', {'attention': 'dense'}, "unknown evaluate.attention='dense'; known: as_trained"),
    ('encoding', {'name': 'ropee'}, "unknown encoding 'ropee'; known: alibi, dynamic_ntk"),
    ('encoding', {'treshold': 3.0}, "encoding 'rope' has no option 'treshold'; it takes: base_"),
    ('schedule', {'kind': 'x'}, "unknown config key 'schedule'; known: model, encoding"),
  ],
  ids=str,
)
def test_a_value_out_of_range_is_refused_by_name_and_value(section, fields, message):
  with refuses(message):
    make(**{section: fields})


@pytest.mark.parametrize('key', ['data', 'model', 'encoding'])
def test_a_missing_section_is_refused_by_name(key):
  values = make().to_dict()
  del values[key]

  with refuses(f"config key '{key}' is missing"):
    config_lib.Config.from_dict(values)


def test_a_missing_field_is_refused_by_name():
  values = make().to_dict()
  del values['train']['steps']

  with refuses("config key 'train.steps' is missing"):
    config_lib.Config.from_dict(values)


def test_an_encoding_without_a_name_is_refused():
  with refuses('unknown encoding None'):
    config_lib.Config.from_dict(make().to_dict() | {'encoding': {}})


def test_training_past_a_learned_table_is_refused():
  make('tiny', 'learned', data={'length': 2048})

  with refuses("data.length=2049 is past the 2048 positions of encoding 'learned'"):
    make('tiny', 'learned', data={'length': 2049})
  with refuses("data.length=256 is past the 100 positions of encoding 'learned'"):
    make('tiny', 'learned', encoding={'max_length': 100})


def test_positions_drawn_from_past_a_learned_table_are_refused():
  make('tiny', 'learned', data={'position_range': 2048})

  with refuses("data.position_range=2049 is past the 2048 positions of encoding 'learned'; lower"):
    make('tiny', 'learned', data={'position_range': 2049})


def test_positions_spread_past_what_a_tile_of_a_decay_can_hold_are_refused():
  make('tiny', 'xpos', data={'position_range': 30_000})
  make('tiny', 'rope', data={'position_range': 1_000_000})

  with refuses('data.position_range=40000 is past 3'):
    make('tiny', 'xpos', data={'position_range': 40_000})


def test_blocks_of_half_an_odd_training_length_are_refused():
  make(data={'length': 33}, evaluate={'masks': ('blockwise:16',)})

  with refuses('half the training length, but train_length=33 is not even'):
    make(data={'length': 33}, evaluate={'masks': ('blockwise',)})


def test_a_bidirectional_model_is_not_evaluated_with_what_cannot_serve_it():
  t5 = {'name': 't5', 'encoding': {'bidirectional': True}, 'model': {'causal': False}}
  make(**t5)

  with refuses("model.causal=False, but encoding 't5'"):
    make(**t5, evaluate={'encodings': ('t5:bidirectional=false',)})
  with refuses("mask 'causal' needs a model of model.causal=True, but this is one of"):
    make(**t5, evaluate={'masks': ('causal',)})


def test_an_encoding_in_the_place_of_another_keeps_what_both_have():
  trained = config_lib.EncodingConfig('rope', (('base_period', 500.0), ('pairing', 'interleaved')))

  def replaced(text):
    encoding = trained.replaced_by(text, train_length=64)
    return encoding.name, dict(encoding.options)

  assert trained.replaced_by('as_trained', 64) is trained
  kept = {'base_period': 500.0, 'pairing': 'interleaved'}
  assert replaced('rope') == ('rope', kept)
  assert replaced('ntk:scale=8') == ('ntk', kept | {'scale': 8.0})
  assert replaced('rope_pi:scale=2,pairing=halves') == (
    'rope_pi',
    {'base_period': 500.0, 'pairing': 'halves', 'scale': 2.0},
  )
  name, options = replaced('yarn:scale=16,ramp=code')
  assert name == 'yarn'
  assert options == encodings.options('yarn') | kept | {
    'scale': 16.0,
    'ramp': 'code',
    'train_length': 64,  # the model's
  }
  assert replaced('yarn:train_length=128')[1]['train_length'] == 128
  assert replaced('t5:bidirectional=true')[1]['bidirectional'] is True
  assert replaced('nope') == ('nope', {})


def test_an_unknown_preset_is_refused():
  with refuses("unknown preset size='huge'; known: tiny, base, large, lex_medium"):
    presets.make('huge', 'fire')


def test_an_unknown_encoding_of_a_preset_is_refused():
  with refuses("unknown encoding 'firee'; known: alibi, dynamic_ntk, fire"):
    presets.make('tiny', 'firee')


def test_own_text_needs_the_files_of_both_splits():
  assert make().data.spec('train').files is None
  globs = {'train_files': 'a/*.txt', 'validation_files': 'b/*.txt'}
  data = make(data={'task': 'text', **globs}).data
  assert data.spec('train', 'validation').files == {'train': 'a/*.txt', 'validation': 'b/*.txt'}
  assert data.spec('validation').files == {'validation': 'b/*.txt'}

  with refuses(
    "data.task='text' needs a glob of files for each split, not data.validation_files=''"
  ):
    make(data={'task': 'text', 'train_files': 'a/*.txt'}).data.spec('train', 'validation')


def test_a_head_that_an_encoding_cannot_rotate_is_refused():
  config = make('tiny', 'rope', model={'head_dim': 7})

  with refuses('a rotary encoding needs an even head_dim=7'):
    jax.eval_shape(functools.partial(train.init, config))


# The argument of a config file


@pytest.mark.parametrize(
  ('arg', 'expected'),
  [
    ('', {'size': 'tiny', 'encoding': 'fire'}),
    ('size=base', {'size': 'base', 'encoding': 'fire'}),
    ('encoding=t5,size=large', {'size': 'large', 'encoding': 't5'}),
    ('size=a=b,', {'size': 'a=b', 'encoding': 'fire'}),
    ('size=', {'size': '', 'encoding': 'fire'}),
  ],
)
def test_an_argument_is_names_and_values(arg, expected):
  assert arguments.parse(arg, size='tiny', encoding='fire') == expected


@pytest.mark.parametrize('part', ['sise=base', 'size', 'base', '=base', 'size:base'])
def test_a_part_of_an_argument_that_is_no_known_name_and_value_is_refused(part):
  with refuses(f'unknown config argument {part!r}; known: size=, encoding='):
    arguments.parse(f'encoding=t5,{part}', size='tiny', encoding='fire')


def test_masks_that_count_positions_are_refused_where_positions_are_drawn():
  make('tiny', 'fire', data={'position_range': 4096}, evaluate={'masks': ('causal',)})

  with refuses("mask 'blockwise' counts positions, of which data.position_range=4096 leaves out"):
    make('tiny', 'fire', data={'position_range': 4096}, evaluate={'masks': ('blockwise',)})


def test_an_encoding_in_the_place_of_another_is_held_to_the_same_limits():
  spread = {'data': {'position_range': 100_000}}
  make('tiny', 'rope', evaluate={'encodings': ('yarn',)}, **spread)

  with refuses("could span more positions than the decay of encoding 'xpos' can in float32"):
    make('tiny', 'rope', evaluate={'encodings': ('xpos',)}, **spread)


@pytest.mark.parametrize('name', ['yarn', 'dynamic_ntk'])
def test_the_training_length_of_an_encoding_is_the_data_s_unless_it_is_told(name):
  length = {'length': 512}

  def train_length(run):
    return dict(run.encoding.options)['train_length']

  assert train_length(make('tiny', name, data=length)) == 512
  told = make('tiny', name, data=length, encoding={'train_length': 64})
  assert train_length(told) == 64
  assert dict(told.encoding.replaced_by('yarn:scale=2', 512).options)['train_length'] == 512
