"""Text from a model, token by token over a cache, of any length.

    python -m lex_fire.generate --workdir=DIR --prompt='def read(' --mask=blockwise

Under a mask that reaches back a bounded way the cache is a ring: memory and time a token stay what
they are, however long the text.
"""

import dataclasses
import functools
import io
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from lex_fire import (
  attention,
  checkpoint,
  cli,
  comparison,
  errors,
  kernels,
  metrics,
  model,
  sharding,
  storage,
)
from lex_fire import config as config_lib
from lex_fire import sampling as sampling_lib
from lex_fire.data import text as text_lib

PREFILL_CHUNK = 64  # tokens of a prompt that come at once; a ring has to hold them all
NO_TOKEN = -1  # stands after the end of a row that ended before others


class State(NamedTuple):
  """Texts as far as they have come.

  Attributes:
    cache: of the model.
    logits_BV: of each row's next token, float32.
    position_B: of that token.
    ended_B: whether the row has had its EOS.
  """

  cache: Any
  logits_BV: jax.Array
  position_B: jax.Array
  ended_B: jax.Array


def _apply(transformer, params, cache, tokens_BL, position_BL, segment_ids_BL):
  logits_BLV, variables = transformer.apply(
    {'params': params, 'cache': cache}, tokens_BL, position_BL, segment_ids_BL, mutable=['cache']
  )
  return logits_BLV, variables['cache']


# Compiled, so that no device ever has the rows of all.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _empty(config, slots, length_B):
  """Returns the state before prompts of so many tokens."""
  rows = length_B.size
  state = State(
    cache=model.empty_cache(config, rows, slots),
    logits_BV=jnp.zeros((rows, config.vocab_size), jnp.float32),
    position_B=length_B,
    ended_B=jnp.zeros(rows, bool),
  )
  return sharding.constrain_tree(state)


# The old cache is given away, so that the new one takes its memory.
@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _prefill(transformer, params, state, tokens_BL, start, length_B):
  """Feeds the tokens from `start` on of each row of `length_B` tokens, as many as it has here."""
  tokens_BL = sharding.constrain(tokens_BL, 'BL')
  index_1L = start + jnp.arange(tokens_BL.shape[1])[None]
  is_token_BL = index_1L < length_B[:, None]
  # Padding repeats the last position: an encoding may depend on a row's greatest.
  position_BL = jnp.minimum(index_1L, length_B[:, None] - 1)
  logits_BLV, cache = _apply(
    transformer, params, state.cache, tokens_BL, position_BL, is_token_BL.astype(jnp.int32)
  )
  newest_BL = index_1L == length_B[:, None] - 1
  newest_B11 = newest_BL.argmax(axis=1)[:, None, None]
  logits_BV = jnp.where(
    newest_BL.any(axis=1)[:, None],
    jnp.take_along_axis(logits_BLV, newest_B11, axis=1)[:, 0],
    state.logits_BV,
  )
  return sharding.constrain_tree(state._replace(cache=cache, logits_BV=logits_BV))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _step(transformer, sampling, params, state, seed, eos_id):
  """Draws a token of each row and feeds it; returns the new state, and the tokens."""
  token_B, shown_B = _drawn(sampling, seed, state.logits_BV, state.position_B, state.ended_B)
  logits_BLV, cache = _apply(
    transformer,
    params,
    state.cache,
    token_B[:, None],
    state.position_B[:, None],
    jnp.ones((token_B.shape[0], 1), jnp.int32),
  )
  ended_B = state.ended_B | (token_B == eos_id)
  state = State(cache, logits_BLV[:, 0], state.position_B + 1, ended_B)
  return sharding.constrain_tree(state), shown_B


@functools.partial(jax.jit, static_argnums=0)
def _drawn(sampling, seed, logits_BV, position_B, ended_B):
  """Returns a token of each row, and what is shown of it."""
  token_B = sampling_lib.sample(logits_BV, sampling, seed, position_B)
  return token_B, sharding.constrain(jnp.where(ended_B, NO_TOKEN, token_B), '')


def cache_slots(mask: kernels.Mask, length: int, chunk: int = PREFILL_CHUNK) -> int:
  """Returns the positions a row that a cache has to keep [tokens].

  Args:
    mask: of the model.
    length: of the longest row, prompt and text.
    chunk: tokens that come at once.
  """
  slots = length if mask.reach is None else min(length, mask.reach + chunk - 1)
  # In multiples of a chunk, so that prompts of other lengths seldom need another program.
  return -(-slots // chunk) * chunk


def choices(
  transformer: model.Transformer, length: int, rows: int, chunk: int = PREFILL_CHUNK
) -> list[kernels.Choice]:
  """Returns by what attention is computed of a prompt's chunks and of a step, and why.

  Args:
    transformer: the model.
    length: of the longest row, prompt and text.
    rows: of a batch.
    chunk: tokens that come at once.
  """
  chunk = _chunk(transformer, chunk)
  slots = cache_slots(_mask(transformer), length, chunk)
  return [
    attention.choice(transformer, queries, slots, counted=False, rows=rows)
    for queries in (chunk, 1)
  ]


def stream(
  transformer: model.Transformer,
  params: Any,
  prompts: Sequence[Sequence[int] | np.ndarray],
  *,
  max_tokens: int,
  sampling: sampling_lib.Sampling = sampling_lib.Sampling(),
  seed: int = 0,
  eos_id: int | None = None,
  chunk: int = PREFILL_CHUNK,
) -> Iterator[np.ndarray]:
  """Continues prompts together, a token of each at a time.

  A row's tokens are, to rounding, those that it would have alone in the same row of a batch, and
  those that the whole text so far would give without a cache (if the encoding is not
  `prefix_stable`, with keys as they stood when their layer's input was computed). Under one mask,
  each batch size and number of slots compiles three programs, whatever the lengths. The devices of
  the mesh of `jax.set_mesh`, if any, share the rows, and the tokens come out on all hosts.

  Args:
    transformer: a causal model; its mask bounds the cache, if it is bounded.
    params: its parameters.
    prompts: token ids, at least one a row; rows may differ in length.
    max_tokens: to add to each.
    sampling: how they are drawn.
    seed: of the random numbers, below 2^32; a token's depend on it, its row and its position alone.
    eos_id: the token after which a row ends; None: none ends.
    chunk: tokens of a prompt that come at once.

  Yields:
    tokens_B, int32; NO_TOKEN in rows that ended before. It stops when all have.

  Raises:
    errors.UserError: for a model that is not causal, a prompt that is empty or has a token beyond
      the vocabulary, a length past the encoding's positions, a number out of its range, or, once
      it begins, rows that the devices do not divide.
  """
  rows = [np.asarray(prompt) for prompt in prompts]
  _check(transformer, rows, max_tokens, seed, chunk)
  chunk = _chunk(transformer, chunk)
  slots = cache_slots(_mask(transformer), max(row.size for row in rows) + max_tokens, chunk)
  transformer, params = _of_steps(transformer, params)
  return _stream(
    functools.partial(_prefilled, transformer, params, rows, slots, chunk),
    functools.partial(_step, transformer, sampling, params),
    functools.partial(_drawn, sampling, np.uint32(seed)),
    max_tokens,
    np.uint32(seed),
    NO_TOKEN if eos_id is None else eos_id,
  )


def _of_steps(transformer, params):
  """Returns the model and the parameters that take part in many steps.

  On 2 CPU cores a token of FIRE after 1,024 to 16,384 others takes 0.7 to 1.0 of the time by its
  table. Not measured elsewhere: a GPU's host has to read at each segment whether a loop goes on.
  """
  if kernels.platform() != 'cpu':
    return transformer, params
  return model.tabulated(transformer, params)


def _mask(transformer):
  return transformer.mask or kernels.Mask(causal=transformer.config.causal)


def _chunk(transformer, chunk):
  """Returns how many tokens come at once of a model that may have fewer positions."""
  return min(chunk, transformer.encoding.max_length or chunk)


def _check(transformer, rows, max_tokens, seed, chunk):
  """Refuses what cannot be continued."""
  if not _mask(transformer).causal:
    raise errors.UserError(
      'a bidirectional model (model.causal=False, or a mask that is not causal) sees what follows '
      'and cannot continue a text; use a causal one'
    )
  if not rows:
    raise errors.UserError('prompts=[] has no prompt; give one or more')
  for number, row in enumerate(rows, start=1):
    if row.ndim != 1 or not row.size:
      raise errors.UserError(f'prompt {number} of {len(rows)} is empty; give it at least one token')
    if not np.issubdtype(row.dtype, np.integer):
      raise errors.UserError(f'prompt {number} of {len(rows)} is of {row.dtype}, not of token ids')
    vocab_size = transformer.config.vocab_size
    if row.min() < 0 or row.max() >= vocab_size:
      raise errors.UserError(
        f'prompt {number} of {len(rows)} has tokens {row.min()} to {row.max()}, not all from 0 to '
        f'{vocab_size - 1} as the model; encode it with the vocabulary of its Task'
      )
  _check_positive(max_tokens=max_tokens, chunk=chunk)
  if not 0 <= seed < 2**32:
    raise errors.UserError(f'{seed=} must be at least 0 and below 2**32')
  # The last token is not fed, and needs no position.
  model.check_length(transformer.encoding, max(row.size for row in rows) + max_tokens - 1)


def _check_positive(**numbers):
  for name, value in numbers.items():
    if not isinstance(value, int) or value < 1:
      raise errors.UserError(f'{name}={value} must be a whole number of at least 1')


def _prefilled(transformer, params, rows, slots, chunk) -> State:
  """Returns the state after the prompts, which enter in chunks of one shape."""
  length_B = np.array([row.size for row in rows], np.int32)
  padded = -(-length_B.max() // chunk) * chunk
  tokens_BL = np.stack([np.pad(row, (0, padded - row.size)) for row in rows]).astype(np.int32)
  state = _empty(transformer.config, slots, length_B)
  for start in range(0, padded, chunk):
    state = _prefill(
      transformer, params, state, tokens_BL[:, start : start + chunk], np.int32(start), length_B
    )
  return state


def _stream(prefilled, step, drawn, max_tokens, seed, eos_id):
  """Runs one step ahead of what it yields, so that the device does not wait for who reads."""
  state, ahead = prefilled(), []
  drawn(*state[1:])  # compiled now, so that no text waits for that before its end
  for left in reversed(range(max_tokens)):
    # What nothing follows is not fed.
    state, tokens_B = step(state, seed, eos_id) if left else (state, drawn(*state[1:])[1])
    ahead.append(tokens_B)
    if len(ahead) > 1:
      yield (shown_B := np.asarray(ahead.pop(0)))
      if np.isin(shown_B, (eos_id, NO_TOKEN)).all():
        return
  yield np.asarray(ahead.pop())


def generate(
  transformer: model.Transformer,
  params: Any,
  prompts: Sequence[Sequence[int] | np.ndarray],
  **options: Any,
) -> list[np.ndarray]:
  """Returns what `stream` adds to each prompt, as arrays of tokens, EOS included where it came.

  >>> from lex_fire import zoo
  >>> transformer, params = zoo.load('fire-tiny')  # of bytes: id 3 + byte
  >>> prompt = [3 + byte for byte in b'import ']
  >>> (tokens,) = generate(transformer, params, [prompt], max_tokens=6)
  >>> tokens.shape
  (6,)

  Args:
    transformer: as `stream` takes it.
    params: likewise.
    prompts: likewise.
    **options: likewise; `max_tokens` is required.

  Raises:
    errors.UserError: as `stream` does.
  """
  tokens_BL = np.stack(list(stream(transformer, params, prompts, **options)), axis=1)
  return [row_L[row_L != NO_TOKEN] for row_L in tokens_BL]


class Meter:
  """Counts the tokens that pass, and tells how many there are a second.

  The first step, which compiles and reads the prompts, is told apart.
  """

  def __init__(self, most: int):
    """Starts the clock; `most` tokens can come."""
    self._most, self._tokens = most, 0
    self._start = time.monotonic()
    self._first: tuple[float, int] | None = None  # when the first came, and how many came then

  def watch(self, stream: Iterator[np.ndarray], progress: bool) -> Iterator[np.ndarray]:
    """Passes a stream on; if asked to, it prints the pace and the time left on the way."""
    shown = 0.0
    for tokens_B in stream:
      self._tokens += int((tokens_B != NO_TOKEN).sum())
      now = time.monotonic()
      if self._first is None:
        self._first, shown = (now, self._tokens), now
      elif progress and now - shown > 2.0:
        left = metrics.clock((self._most - self._tokens) / self._rate(now))
        _note(
          f'{self._tokens:,} of at most {self._most:,} tokens, {self._rate(now):,.0f} tokens/s, '
          f'ETA {left}'
        )
        shown = now
      yield tokens_B

  def _rate(self, now):
    first, tokens = self._first or (now, 0)
    return (self._tokens - tokens) / max(now - first, 1e-9)

  def summary(self) -> str:
    """Returns what came and how fast."""
    now = time.monotonic()
    first = (self._first or (now, 0))[0] - self._start
    return (
      f'{self._tokens:,} tokens; the first after {first:.1f} s (compilation, and prefill of the '
      f'prompt), the rest at {self._rate(now):,.0f} tokens/s'
    )


def _note(line):
  """Prints a line that is not text of the model."""
  print(line, file=sys.stderr, flush=True)


def _pieces(codec, row, tokens) -> Iterator[str]:
  """Yields the prompt as the model reads it, and then the text of its tokens, up to EOS."""
  decoder = codec.decoder()
  yield decoder.feed(row)
  for token in tokens:
    if token in (codec.eos_id, NO_TOKEN):
      break
    yield decoder.feed([token])
  yield decoder.close() + '\n'


def _prompts() -> list[str]:
  """Returns the prompts of the flags.

  Raises:
    errors.UserError: if there is none, a file cannot be read, or one is not UTF-8.
  """
  # As bytes again, which they were before Python decoded them by the locale.
  contents = [(f'--prompt={text!a}', os.fsencode(text)) for text in flags.FLAGS.prompt]
  path = flags.FLAGS.prompt_file
  if path is not None:
    contents.append((f'--prompt_file={path!r}', _read(path)))
  if not contents:
    raise errors.UserError('--prompt is missing: the text to continue, or --prompt_file=PATH')
  return [_decoded(flag, content) for flag, content in contents]


def _read(path: str) -> bytes:
  try:
    return sys.stdin.buffer.read() if path == '-' else pathlib.Path(path).read_bytes()
  except OSError as error:
    raise errors.UserError(f'cannot read --prompt_file={path!r}: {error.strerror}') from error


def _decoded(flag: str, content: bytes) -> str:
  try:
    return content.decode()
  except UnicodeDecodeError as error:
    raise errors.UserError(
      f'{flag} is not UTF-8 at byte {error.start}; convert it to UTF-8'
    ) from error


def _asked(config: config_lib.Config, length: int) -> config_lib.Config:
  """Returns the run's config with the checkpoint, the mask and the encoding of the flags."""
  if config.data.position_range:
    raise errors.UserError(
      f'a run of data.position_range={config.data.position_range} knows positions drawn from there,'
      ' and a text has those that follow one another; generate from another run'
    )
  f = flags.FLAGS
  request = config_lib.EvaluateConfig(
    lengths=(length,), masks=(f.mask,), encodings=(f.encoding,), checkpoint=f.checkpoint
  )
  return dataclasses.replace(config, evaluate=request)


def main() -> None:
  """The command."""
  f = flags.FLAGS
  if f.workdir is None:
    raise errors.UserError('--workdir is missing: the run whose model continues the prompt')
  options = {
    'max_tokens': f.max_tokens,
    'sampling': sampling_lib.Sampling(f.temperature, f.top_k, f.top_p),
    'seed': f.seed,
  }
  texts = _prompts()
  workdir = storage.path(f.workdir)
  config = checkpoint.read_config(workdir)
  codec = text_lib.codec(config.data.spec())
  rows = [codec.encode(text) for text in texts]
  _check_positive(max_tokens=f.max_tokens)
  longest = max(row.size for row in rows) + f.max_tokens
  config = _asked(config, longest - 1)  # as the last token is not read
  (case,) = comparison.cases(config)
  transformer = case.transformer
  _check(transformer, rows, f.max_tokens, f.seed, PREFILL_CHUNK)  # before a checkpoint is read
  mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
  step, params = comparison.restore(config, workdir, mesh)
  meter = Meter(len(rows) * f.max_tokens)
  tokens = stream(transformer, params, rows, eos_id=codec.eos_id, **options)
  _write(codec, rows, meter.watch(tokens, progress=len(rows) > 1))
  slots = cache_slots(_mask(transformer), longest, _chunk(transformer, PREFILL_CHUNK))
  cache = jax.eval_shape(lambda: model.empty_cache(transformer.config, len(rows), slots))
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
  _note(f'checkpoint: step {step}')
  _note(attention.line(choices(transformer, longest, len(rows))))
  _note(f'{meter.summary()}; cache of {slots:,} slots a row, {size / 1e6:,.1f} MB')


def _write(codec, rows, stream):
  """Prints one text as it comes; several, one after another when all are done."""
  # For a terminal that is not UTF-8.
  cast(io.TextIOWrapper, sys.stdout).reconfigure(errors='replace')
  if len(rows) == 1:
    for piece in _pieces(codec, rows[0], (tokens_B[0] for tokens_B in stream)):
      print(piece, end='', flush=True)
    return
  tokens_BL = np.stack(list(stream), axis=1)
  for number, (row, tokens_L) in enumerate(zip(rows, tokens_BL, strict=True), start=1):
    print(f'--- prompt {number} of {len(rows)} ---')
    print(''.join(_pieces(codec, row, tokens_L)), end='', flush=True)


def define_flags() -> None:
  """Declares the command's flags."""
  flags.DEFINE_string('workdir', None, 'the run whose model continues the prompts')
  flags.DEFINE_string(
    'checkpoint', config_lib.LATEST, 'of it: latest, best (of the lowest validation loss) or a step'
  )
  flags.DEFINE_multi_string('prompt', [], 'a text to continue; may be given several times')
  flags.DEFINE_string('prompt_file', None, 'a UTF-8 file of one more; - is the standard input')
  flags.DEFINE_integer('max_tokens', 256, 'to add to each prompt')
  flags.DEFINE_float('temperature', 1.0, '0 takes the likeliest token')
  flags.DEFINE_integer('top_k', None, 'draw from the K likeliest tokens (default: from all)')
  flags.DEFINE_float('top_p', 1.0, 'draw from the likeliest tokens that together reach P')
  flags.DEFINE_integer('seed', 0, 'of the draws')
  flags.DEFINE_string(
    'mask',
    config_lib.AS_TRAINED,
    'causal, blockwise (of half the training length), blockwise:N or window:N',
  )
  flags.DEFINE_string(
    'encoding',
    config_lib.AS_TRAINED,
    'in the place of the trained one: NAME or NAME:OPTION=VALUE,OPTION=VALUE',
  )


if __name__ == '__main__':
  define_flags()
  cli.run(main, interrupted='')
