"""What a run tells of itself as it goes: a line, metrics.jsonl and TensorBoard."""

import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lex_fire import config as config_lib
from lex_fire import errors, feed, metrics, optimizer, replay, timing
from lex_fire.data import stream

_RATES = 2**16  # learning rates that are computed at once


def say(line: str) -> None:
  """Prints a line, on the first process only."""
  if jax.process_index() == 0:
    print(line, flush=True)


class Reporter:
  """Writes and prints a step's numbers once the next is under way, so that none waits for it.

  Every step's loss is looked at, those between two that are logged with the next of these.

  Attributes:
    spent: what the run's time goes to.
  """

  def __init__(
    self,
    config: config_lib.Config,
    workdir: pathlib.Path,
    first_step: int,
    skipped: int,
    manifest: dict[str, Any],
  ):
    """Opens the logs.

    Args:
      config: of the run.
      workdir: of the run.
      first_step: steps so far.
      skipped: of these, as their loss was not finite.
      manifest: says how many bytes a token stands for.
    """
    self._recent = replay.Recent(workdir, config.train.log_every + 1)
    self._unseen: list[tuple[int, dict[str, jax.Array]]] = []
    self._skipped = skipped
    self._config, self._writer = config, metrics.Writer(workdir, first_step)
    tokens = config.data.batch_size * config.data.length
    self._pace = metrics.Pace(first_step, config.train.steps, tokens)
    self._flops = metrics.train_flops_per_token(config.model, config.data.length)
    # Many at once: asked of devices that compute a step, each would wait for its end.
    self._rates = functools.lru_cache(maxsize=1)(functools.partial(_rates, config))
    self._rate(first_step - skipped)  # before the first step
    self.spent = timing.Spent()
    # Of questions only the answers are scored, which code no text.
    self._codes_text = config.model.causal and not stream.is_of_questions(manifest)
    self._tokens_per_byte = manifest['tokens'] / max(manifest['text_bytes'], 1)

  def after(self, done: int, batch: feed.Batch, values: dict[str, jax.Array]) -> None:
    """Takes the values of the step that made it `done` steps; reports those it took before.

    Args:
      done: steps so far.
      batch: this process's rows of the step.
      values: of `train.step`.

    Raises:
      errors.UserError: if a loss was not finite and the config says to stop; or if none was finite
        of all steps since the last that was logged.
    """
    c = self._config.train
    if self._unseen and self._unseen[-1][0] % c.log_every == 0:
      self.flush()
    self._recent.add(done, batch)
    self._unseen.append((done, values))

  def warm(self, done: int) -> None:
    """Says that the first step of this process is done: pace is measured from here."""
    self._pace.warm(done)
    self.spent.warm()

  def resume(self, done: int) -> None:
    """Says that a pause after `done` steps is over: tokens/s leave it out, the ETA does not."""
    self._pace.resume(done)

  def pause(self, done: int, act: Callable[[], None]) -> None:
    """Waits for the steps so far, and then does something that no step's time shall include."""
    self.flush()
    with self.spent.on('profile'):
      act()
    self.resume(done)

  def flush(self) -> None:
    """Looks at the steps that are pending, and reports the last if it is one to be logged."""
    unseen, self._unseen = self._unseen, []
    if not unseen:
      return
    steps = [(done, {name: float(x) for name, x in arrays.items()}) for done, arrays in unseen]
    with self.spent.on('logging'):  # but not the wait for the values, which is time of the steps
      self._check(steps)
      done, values = steps[-1]
      c = self._config.train
      if (done % c.log_every == 0 or done == c.steps) and _is_finite(values):
        self._report(done, values)

  def _check(self, steps):
    bad = [(done, values) for done, values in steps if not _is_finite(values)]
    for done, values in bad:
      folder = self._recent.write(done, values)
      what = f'loss={values["loss"]}, gradient_norm={values["gradient_norm"]} at step {done}'
      if self._config.train.non_finite == 'stop' or len(bad) == len(steps) > 1:
        raise errors.UserError(
          f'{what}; its batch is in {str(folder)!r}, checkpoints before it are kept; lower '
          'optimizer.learning_rate or raise optimizer.warmup_steps, in another --workdir'
        )
      self._skipped += 1
      say(f'{what}: skipped ({self._skipped} so far); its batch is in {str(folder)!r}')

  def _report(self, done, values):
    values |= self._bits_per_byte('', values['loss'])
    values['learning_rate'] = self._rate(done - 1 - self._skipped)
    pace = self._pace.measure(done)
    if pace is not None:
      values |= self._speed(pace[0])
    values |= {f'{name}_share': share for name, share in self.spent.shares().items()}
    self._writer.write(done, values)
    self._print(done, values, pace and pace[1])

  def _speed(self, rate: float) -> dict[str, float]:
    """Returns {name: number} of a rate [tokens/s]."""
    found = {'tokens_per_second': rate, 'model_flops_per_second': rate * self._flops}
    utilization = metrics.utilization(rate * self._flops)
    return found | ({} if utilization is None else {'model_flops_utilization': utilization})

  def _rate(self, step):
    """Returns the learning rate of a step that comes after so many that were not skipped."""
    block, index = divmod(step, _RATES)
    return float(self._rates(block)[index])

  def _bits_per_byte(self, prefix: str, nats: float) -> dict[str, float]:
    """Returns {name: bits} for a loss per token; {} for that of some tokens, which code no text."""
    if not self._codes_text:
      return {}
    return {f'{prefix}bits_per_byte': nats * self._tokens_per_byte / math.log(2)}

  def _print(self, done, values, seconds_left):
    bits = values.get('bits_per_byte')
    rate, utilization = (
      values.get(name) for name in ('tokens_per_second', 'model_flops_utilization')
    )
    say(
      f'step {done:>{len(str(self._config.train.steps))}}/{self._config.train.steps}'
      f'  loss {values["loss"]:.3f}'
      + (f'  {bits:.3f} bits/byte' if bits is not None else '')
      + (f'  {rate:,.0f} tokens/s' if rate is not None else '')
      + (f'  {utilization:.1%} of peak' if utilization is not None else '')
      + (f'  ETA {metrics.clock(seconds_left)}' if seconds_left is not None else '')
    )

  def validation(self, done: int, value: float) -> None:
    """Reports the validation loss after `done` steps [nats per token].

    Raises:
      errors.UserError: if it is not finite.
    """
    if not math.isfinite(value):
      raise errors.UserError(
        f'validation loss={value} at step {done}; checkpoints before it are kept; lower '
        'optimizer.learning_rate or raise optimizer.warmup_steps, in another --workdir'
      )
    bits = self._bits_per_byte('validation_', value)
    self._writer.write(done, {'validation_loss': value, **bits})
    line = f'step {done}: validation loss {value:.4f}'
    say(line + ''.join(f', {number:.4f} bits/byte' for number in bits.values()))

  def write(self) -> None:
    """Writes all that has been reported: before a checkpoint, from which a resume goes on."""
    with self.spent.on('logging'):
      self._writer.flush()

  def close(self) -> None:
    """Reports what is pending, and writes it."""
    self.flush()
    self.write()


def _rates(config: config_lib.Config, block: int) -> np.ndarray:
  return np.asarray(optimizer.schedule(config)(np.arange(block * _RATES, (block + 1) * _RATES)))


def _is_finite(values: dict[str, float]) -> bool:
  return all(map(math.isfinite, values.values()))
