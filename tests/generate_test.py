"""Tests `../lex_fire/generate.py`: text over a cache is that of whole passes, and the command."""

import contextlib
import dataclasses
import functools
import pathlib
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lex_fire import (
  checkpoint,
  comparison,
  encodings,
  errors,
  generate,
  hlo,
  kernels,
  model,
  train,
)
from lex_fire import config as config_lib
from lex_fire.data import text as text_lib
from lex_fire.data.spec import Spec
from lex_fire.sampling import GREEDY, Sampling, sample

VOCAB = 32
SHAPE = {
  'num_layers': 2,
  'd_model': 16,
  'num_heads': 4,
  'num_kv_heads': 2,
  'head_dim': 4,
  'd_ff': 24,
  'vocab_size': VOCAB,
  'tied_embeddings': False,  # tied, random parameters repeat their last token
}
CHUNK, MAX_TOKENS, SEED = 2, 28, np.uint32(3)
PROMPT_LENGTHS = (5, 1, 12)  # whole chunks, less than one, and a ragged last
LENGTH = max(PROMPT_LENGTHS) + MAX_TOKENS
# Options of any encoding at which these rows are long: many times past a training length.
SHORT = {
  'train_length': 8,
  'threshold': 6.0,
  'max_length': LENGTH,
  'num_buckets': 8,
  'max_distance': 12,
  'width': 8,
  'd_bar': 8,
  'scale_base': 16.0,
}
# The last two reach back 4 tokens: with chunks of 2, over rings of 6 slots.
MASKS = {
  'causal': kernels.Mask(),
  'blockwise': kernels.Mask(block=2),
  'window': kernels.Mask(window=4),
}
ROUNDING = 2e-5  # of logits of order 1 to 4: other tiles, other orders of sums

every_encoding = pytest.mark.parametrize('name', encodings.ENCODINGS)


@functools.cache
def make(name='rope', mask='causal', **shape):
  """Returns a tiny model and random parameters, away from their start, where biases are 0."""
  options = {option: SHORT[option] for option in encodings.options(name) if option in SHORT}
  c = config_lib.ModelConfig(**SHAPE | shape)
  transformer = model.Transformer(c, encodings.get(name, **options), MASKS[mask])
  shapes = jax.eval_shape(transformer.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  rng = np.random.default_rng(5)

  def draw(path, leaf):
    mean = path[-1].key in ('scale_D', 'c', 'length_multiplier')
    return jnp.asarray(mean + 0.3 * rng.normal(size=leaf.shape), jnp.float32)

  return transformer, jax.tree_util.tree_map_with_path(draw, shapes['params'])


def prompts(lengths=PROMPT_LENGTHS, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, VOCAB, length).astype(np.int32) for length in lengths]


def decode(transformer, params, rows, sampling=Sampling(), steps=MAX_TOKENS, chunk=CHUNK):
  """Returns tokens_BL drawn over a cache after prompts, and the logits_BLV they were drawn from."""
  slots = generate.cache_slots(transformer.mask, LENGTH, chunk)
  state = generate._prefilled(*generate._of_steps(transformer, params), rows, slots, chunk)
  return decode_from(state, transformer, params, sampling, steps)


def decode_from(state, transformer, params, sampling=Sampling(), steps=MAX_TOKENS):
  transformer, params = generate._of_steps(transformer, params)
  logits, tokens = [], []
  for _ in range(steps):
    logits.append(np.array(state.logits_BV))
    state, tokens_B = generate._step(transformer, sampling, params, state, SEED, -1)
    tokens.append(np.asarray(tokens_B))
  return np.stack(tokens, axis=1), np.stack(logits, axis=1)


def recomputed(transformer, params, rows, tokens_BL):
  """Returns logits_BLV that each token of a text is drawn from, by a pass over all before it.

  These prefixes are rows of one batch, padded to one length by a segment that they do not see.
  """
  wholes = [np.concatenate(pair) for pair in zip(rows, tokens_BL, strict=True)]
  lengths = [np.arange(len(row), len(whole)) for row, whole in zip(rows, wholes, strict=True)]
  padded = [
    np.tile(np.pad(whole, (0, LENGTH - len(whole))), (tokens_BL.shape[1], 1)) for whole in wholes
  ]
  last_B1, index_1L = np.concatenate(lengths)[:, None] - 1, np.arange(LENGTH)[None]
  dense = dataclasses.replace(transformer.config, attention='reference')
  # Not compiled: its operations are, once for all encodings.
  logits_BLV = transformer.clone(config=dense).apply(
    {'params': params},
    np.concatenate(padded),
    np.minimum(index_1L, last_B1).astype(np.int32),
    (index_1L <= last_B1).astype(np.int32),
  )
  logits_BV = np.asarray(logits_BLV)[np.arange(len(last_B1)), last_B1[:, 0]]
  return logits_BV.reshape(*tokens_BL.shape, VOCAB)


@functools.partial(jax.jit, static_argnums=1)
def draw(logits_LV, row, position_L):
  """Returns the tokens that a row of a batch draws at positions."""

  def one(logits_V, position):
    batch_BV = jnp.broadcast_to(logits_V[None], (row + 1, VOCAB))
    return sample(batch_BV, Sampling(), SEED, jnp.full(row + 1, position))[row]

  return jax.vmap(one)(logits_LV, position_L)


def assert_is_text_of_whole_passes(transformer, params, rows, tokens_BL, logits_BLV):
  expected_BLV = recomputed(transformer, params, rows, tokens_BL)

  np.testing.assert_allclose(logits_BLV, expected_BLV, atol=ROUNDING, rtol=ROUNDING)
  for row, expected_LV in enumerate(expected_BLV):
    drawn_L = draw(expected_LV, row, len(rows[row]) + np.arange(len(expected_LV)))
    np.testing.assert_array_equal(tokens_BL[row], drawn_L)


@every_encoding
def test_text_after_prompts_in_chunks_is_that_of_a_whole_pass_at_each_step(name):
  # If angles depend on the row's length, so does what a second layer cached of earlier tokens.
  num_layers = 2 if encodings.get(name).prefix_stable else 1

  transformer, params = make(name, num_layers=num_layers)
  rows = prompts()

  tokens_BL, logits_BLV = decode(transformer, params, rows)

  assert_is_text_of_whole_passes(transformer, params, rows, tokens_BL, logits_BLV)


@every_encoding
def test_a_ring_gives_the_text_of_whole_passes_under_its_mask(name):
  """From a first token that nothing comes before, drawn from equal logits."""
  transformer, params = make(name, 'blockwise', num_layers=1)
  start = generate.State(
    model.empty_cache(transformer.config, 2, transformer.mask.reach),
    jnp.zeros((2, VOCAB)),
    jnp.zeros(2, jnp.int32),
    jnp.zeros(2, bool),
  )

  tokens_BL, logits_BLV = decode_from(start, transformer, params)

  rows, tokens_BL, logits_BLV = tokens_BL[:, :1], tokens_BL[:, 1:], logits_BLV[:, 1:]
  assert_is_text_of_whole_passes(transformer, params, rows, tokens_BL, logits_BLV)


@pytest.mark.parametrize(
  ('mask', 'shape'),
  [
    ('blockwise', {'scan_layers': True, 'norm': 'rmsnorm', 'activation': 'swiglu'}),
    ('window', {'attention': 'chunked'}),
  ],
)
def test_rings_of_layers_give_the_text_of_whole_passes(mask, shape):
  transformer, params = make('fire', mask, **shape)
  rows = prompts()

  tokens_BL, logits_BLV = decode(transformer, params, rows)

  assert_is_text_of_whole_passes(transformer, params, rows, tokens_BL, logits_BLV)


def test_a_ring_is_as_long_as_its_mask_reaches_and_no_longer():
  chunk = generate.PREFILL_CHUNK

  for mask in (kernels.Mask(block=128), kernels.Mask(window=66)):
    needed = mask.reach + chunk - 1
    assert needed <= generate.cache_slots(mask, 10**6) < needed + chunk
  assert generate.cache_slots(kernels.Mask(block=128), 5) == chunk
  assert 10**6 <= generate.cache_slots(kernels.Mask(), 10**6) < 10**6 + chunk


# Rows and chunks


UNSTABLE = [name for name in encodings.ENCODINGS if not encodings.get(name).prefix_stable]


@pytest.mark.parametrize('name', ['fire', *UNSTABLE])
def test_a_row_has_the_text_that_it_has_alone(name):
  """For an encoding that looks at a row's greatest position, padding must not count."""
  transformer, params = make(name, num_layers=1)
  rows = prompts((9, 2, 14))

  tokens_BL, logits_BLV = decode(transformer, params, rows, steps=8, chunk=8)
  alone_BL, alone_BLV = decode(transformer, params, rows[:1], steps=8, chunk=9)

  np.testing.assert_array_equal(tokens_BL[0], alone_BL[0])
  np.testing.assert_allclose(logits_BLV[0], alone_BLV[0], atol=ROUNDING, rtol=ROUNDING)


def test_bfloat16_gives_finite_logits_and_text_of_the_vocabulary():
  transformer, params = make('fire', 'blockwise', dtype='bfloat16')

  tokens_BL, logits_BLV = decode(transformer, params, prompts())

  assert logits_BLV.dtype == np.float32 and np.isfinite(logits_BLV).all()
  assert tokens_BL.min() >= 0 and tokens_BL.max() < VOCAB


# The stream


def text(rows=None, **options):
  """Returns what the tiny model of RoPE adds to prompts, as a list of arrays."""
  transformer, params = make()
  given = {'max_tokens': MAX_TOKENS, 'chunk': CHUNK, 'seed': int(SEED)} | options
  return generate.generate(transformer, params, rows or prompts(), **given)


def test_the_stream_is_the_text_of_every_step():
  tokens_BL, _ = decode(*make(), prompts())

  np.testing.assert_array_equal(np.stack(text()), tokens_BL)


def test_greedy_text_takes_the_likeliest_tokens():
  tokens_BL, logits_BLV = decode(*make(), prompts(), GREEDY)

  np.testing.assert_array_equal(tokens_BL, logits_BLV.argmax(axis=2))
  np.testing.assert_array_equal(np.stack(text(sampling=GREEDY)), tokens_BL)


def test_a_seed_gives_its_text_again_and_another_seed_another():
  first, again, other = text(), text(), text(seed=4)

  np.testing.assert_array_equal(first, again)
  assert (np.stack(first) != np.stack(other)).mean() > 0.5


def test_a_row_ends_with_its_eos_and_the_stream_when_all_rows_have():
  endless = text()
  eos_id = int(endless[1][5])
  assert all(eos_id in row_L for row_L in endless), 'take another token'
  ends = [int(np.flatnonzero(row_L == eos_id)[0]) for row_L in endless]

  rows = text(eos_id=eos_id)
  transformer, params = make()
  streamed = list(
    generate.stream(
      transformer,
      params,
      prompts(),
      max_tokens=MAX_TOKENS,
      chunk=CHUNK,
      seed=int(SEED),
      eos_id=eos_id,
    )
  )

  for row_L, endless_L, end in zip(rows, endless, ends, strict=True):
    np.testing.assert_array_equal(row_L, endless_L[: end + 1])
  assert len(streamed) == max(ends) + 1
  for row, end in enumerate(ends):
    assert all(
      (tokens_B[row] == generate.NO_TOKEN) == (t > end) for t, tokens_B in enumerate(streamed)
    )


def test_other_lengths_and_seeds_do_not_recompile():
  transformer, params = make('alibi', 'blockwise')
  traces = []

  def bias(*arguments):
    traces.append(arguments)
    return transformer.encoding.bias(*arguments)

  counted = transformer.clone(encoding=transformer.encoding._replace(bias=bias))
  for lengths, max_tokens, seed in (((3, 1), 20, 0), ((30, 7), 60, 1)):
    rows = prompts(lengths)
    list(generate.stream(counted, params, rows, max_tokens=max_tokens, seed=seed, chunk=CHUNK))

  assert len(traces) == 2 * SHAPE['num_layers']  # of prefill, and of a step


@pytest.mark.parametrize('shape', [{}, {'scan_layers': True}], ids=str)
@pytest.mark.parametrize('name', ['fire', 'fire_s'])
def test_a_network_is_made_a_table_before_the_first_step_and_is_no_part_of_any(name, shape):
  transformer, params = make(name, **shape)
  tables = []

  def table(params, num_heads):
    jax.debug.callback(lambda: tables.append(name))  # when it runs, and not when it is compiled
    return transformer.encoding.table(params, num_heads)

  def bias(*_):
    pytest.fail('a network was evaluated')

  counted = transformer.clone(encoding=transformer.encoding._replace(table=table, bias=bias))
  options = {'max_tokens': 5, 'seed': int(SEED), 'chunk': CHUNK}
  found = generate.generate(counted, params, prompts(), **options)

  jax.effects_barrier()
  at_once = transformer.encoding.shared or shape
  assert len(tables) == (1 if at_once else SHAPE['num_layers'])
  expected_BL, _ = decode(transformer, params, prompts())
  np.testing.assert_array_equal(found, expected_BL[:, :5])


def test_devices_keep_the_cache_of_their_own_rows_and_tell_each_other_but_tokens():
  transformer, params = make('fire')
  mesh, whole = train.sharding.make_mesh(), jax.P()
  rows, slots = 2 * jax.device_count(), generate.cache_slots(transformer.mask, LENGTH, CHUNK)
  tokens_BL, length_B = np.ones((rows, CHUNK), np.int32), np.full(rows, CHUNK, np.int32)

  with jax.set_mesh(mesh):
    params = jax.device_put(params, jax.NamedSharding(mesh, whole))
    empty = generate._empty(transformer.config, slots, length_B)
    arguments = (params, empty, tokens_BL, np.int32(0), length_B)
    prefill = generate._prefill.lower(transformer, *arguments).compile()
    empty_shards, filled = shard_rows(empty), prefill(*arguments)
    arguments = (params, filled, SEED, -1)
    step = generate._step.lower(transformer, GREEDY, *arguments).compile()
    filled_shards, (state, tokens_B) = shard_rows(filled), step(*arguments)

  assert empty_shards == filled_shards == shard_rows(state) == {2}
  assert hlo.collectives(prefill.as_text()) == {}
  messages = hlo.collectives(step.as_text())
  assert set(messages) == {'all-gather'}
  assert messages['all-gather'].bytes <= rows * (4 + 1)  # a token, and whether its row has ended
  assert tokens_B.is_fully_replicated


def shard_rows(state):
  """Returns how many rows of its arrays each device has."""
  leaves = jax.tree.leaves(state)
  return {shard.data.shape[0] for leaf in leaves for shard in leaf.addressable_shards}


@pytest.mark.parametrize(
  ('rows', 'options', 'message'),
  [
    ([], {}, 'prompts=[] has no prompt'),
    ([[1.5]], {}, 'prompt 1 of 1 is of float64, not of token ids'),
    ([[1]], {'max_tokens': 2.5}, 'max_tokens=2.5 must be a whole number of at least 1'),
    ([[1], []], {}, 'prompt 2 of 2 is empty'),
    ([[1, VOCAB]], {}, 'prompt 1 of 1 has tokens 1 to 32, not all from 0 to 31'),
    ([[-1, 3]], {}, 'prompt 1 of 1 has tokens -1 to 3'),
    ([[1]], {'max_tokens': 0}, 'max_tokens=0 must be a whole number of at least 1'),
    ([[1]], {'chunk': 0}, 'chunk=0 must be a whole number of at least 1'),
    ([[1]], {'seed': -1}, 'seed=-1 must be at least 0'),
    ([[1]], {'seed': 2**32}, 'seed=4294967296 must be at least 0 and below 2**32'),
  ],
)
def test_what_cannot_be_continued_is_refused_before_any_work(rows, options, message):
  with pytest.raises(errors.UserError, match=re.escape(message)):
    generate.stream(*make(), rows, **{'max_tokens': 4} | options)


def test_a_text_longer_than_a_learned_table_is_refused_before_any_work():
  """Of a text the last token is not read."""
  generate.stream(*make('learned'), [[1] * 12], max_tokens=MAX_TOKENS + 1)
  with pytest.raises(errors.UserError, match=f'length={LENGTH + 1} is past the {LENGTH} positions'):
    generate.stream(*make('learned'), [[1] * 12], max_tokens=MAX_TOKENS + 2)


def test_a_text_may_end_a_token_after_a_learned_table():
  transformer, params = make('learned')
  (prompt,) = prompts((LENGTH - 2,))

  (found,) = generate.generate(transformer, params, [prompt], max_tokens=3, sampling=GREEDY)

  whole_BLV = transformer.apply({'params': params}, np.concatenate([prompt, found])[None, :LENGTH])
  np.testing.assert_array_equal(whole_BLV.argmax(axis=-1)[0, LENGTH - 3 :], found)


def test_a_bidirectional_model_is_refused():
  transformer, params = make()
  encoder = dataclasses.replace(transformer.config, causal=False)

  for bidirectional in (
    transformer.clone(mask=kernels.Mask(causal=False)),
    transformer.clone(mask=None, config=encoder),
  ):
    with pytest.raises(errors.UserError, match='model.causal=False'):
      generate.stream(bidirectional, params, [[1]], max_tokens=4)


# The command


PROMPT, OTHER = '3001 times 7', 'é'
RETHRESHOLD = '--encoding=fire:threshold=4'


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A run of no steps: its model writes noise, which is bytes that are no UTF-8 for the most."""
  workdir = tmp_path_factory.mktemp('runs') / 'fire'
  config = tiny.config({'task': 'stdlib'}, train={'seed': 3})
  checkpoint.claim_workdir(workdir, config)
  state = train.Program(config, train.sharding.make_mesh()).init()
  with contextlib.closing(checkpoint.Checkpoints(workdir)) as checkpoints:
    checkpoints.save(1, state, 5.0)
    checkpoints.save(2, jax.tree.map(jnp.zeros_like, state), 6.0)  # not asked for
  return workdir


@pytest.fixture(scope='module')
def outputs(workdir):
  """What the command writes: {name: (status, stdout, stderr)}."""
  common = ['lex_fire.generate', f'--workdir={workdir}', '--max_tokens=30', f'--prompt={PROMPT}']
  commands = {
    'one': [*common, '--checkpoint=best'],
    'two': [
      *common,
      '--checkpoint=1',
      f'--prompt={OTHER}',
      '--temperature=0',
      '--mask=blockwise:4',
      RETHRESHOLD,
    ],
  }
  return {name: tiny.run_command(*command) for name, command in commands.items()}


def expected_text(workdir, prompts, changes, **options):
  """Returns prompts and texts of the function, by a model with changes."""
  config = checkpoint.read_config(workdir)
  abstract = comparison.abstract_params(config, train.sharding.make_mesh())
  _, params = checkpoint.restore_params(workdir, abstract, '1')
  codec = text_lib.codec(Spec('stdlib'))
  rows = [codec.encode(prompt) for prompt in prompts]
  tokens = generate.generate(
    train.make_model(config).clone(**changes),
    params,
    rows,
    max_tokens=30,
    eos_id=codec.eos_id,
    **options,
  )
  as_bytes = [bytes(int(token) - 3 if token > 2 else 0xFF for token in row_L) for row_L in tokens]
  return [
    prompt + text.decode('utf-8', 'replace') for prompt, text in zip(prompts, as_bytes, strict=True)
  ]


def test_one_prompt_is_echoed_and_continued_as_the_function_does(outputs, workdir):
  (expected,) = expected_text(workdir, [PROMPT], {})

  status, stdout, stderr = outputs['one']

  assert status == 0, stderr
  assert stdout == expected + '\n'


def test_several_prompts_follow_one_another_under_headers(outputs, workdir):
  changes = {'mask': kernels.Mask(block=4), 'encoding': encodings.get('fire', threshold=4.0)}
  first, second = expected_text(workdir, [PROMPT, OTHER], changes, sampling=GREEDY)

  status, stdout, stderr = outputs['two']

  assert status == 0, stderr
  assert stdout == f'--- prompt 1 of 2 ---\n{first}\n--- prompt 2 of 2 ---\n{second}\n'


def test_stderr_says_by_what_attention_how_much_how_fast_and_in_what_memory(outputs):
  """A chunk of 64 of the prompt, and a step, over 64 slots."""
  assert re.fullmatch(
    r'checkpoint: step 1\n'
    r'attention: reference, 64 x 64 logits are at most 16384 on cpu; reference, 1 x 64 logits .*\n'
    r'30 tokens; the first after \d+\.\d s \(.*\), the rest at [\d,]+ tokens/s; '
    r'cache of 64 slots a row, 0\.0 MB\n',
    outputs['one'][2],
  )


def test_what_follows_eos_is_not_shown():
  codec = text_lib.codec(Spec('stdlib'))
  row, more = codec.encode('one '), codec.encode('twothree')

  pieces = generate._pieces(codec, row, [*more[:3], codec.eos_id, *more[3:]])
  ended = generate._pieces(codec, row, [*more[:3], generate.NO_TOKEN])

  assert ''.join(pieces) == ''.join(ended) == 'one two\n'


@pytest.fixture
def interruptible():
  """Commands heed an interrupt, though a job in the background, as this may be, ignores it."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def test_an_interrupt_ends_the_line_and_says_nothing(workdir, interruptible):
  command = [sys.executable, '-m', 'lex_fire.generate', f'--workdir={workdir}', '--prompt=a']
  process = subprocess.Popen(
    # The likeliest token, which in a loop of them is not the end of the text.
    [*command, '--max_tokens=100000000', '--mask=blockwise', '--temperature=0'],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    cwd=pathlib.Path(__file__).parents[1],
  )
  assert process.stdout.read(2)[:1] == b'a'  # the prompt, and something more

  process.send_signal(signal.SIGINT)

  _, stderr = process.communicate(timeout=60)
  assert (process.returncode, stderr) == (130, b'\n')
