"""Does text of any length come at constant time and memory a token?

    python -m experiments.decode.run

The quickstart's model, untrained (what it writes does not change what a token costs), writes one
text under each mask, greedily. Writes decode.json and decode.png beside this file.
"""

import json
import multiprocessing
import pathlib
import time
from collections.abc import Iterator

import jax
import numpy as np

from configs import quickstart
from lex_fire import cli, generate, kernels, model, sampling, train
from lex_fire import config as config_lib

HERE = pathlib.Path(__file__).parent
WINDOW = 500  # tokens; the time of a token is a window's mean
BLOCK = 128  # half the training length, as in LeX
TEXTS = (
  (f'blocks of {BLOCK}', kernels.Mask(block=BLOCK), 100_000),
  ('causal', kernels.Mask(), 1_000),
  ('causal', kernels.Mask(), 10_000),
)
MARKS = (1_000, 10_000, 100_000)


def resident_bytes() -> int:
  """Returns the memory of this process that is in RAM."""
  pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
  return pages * 4096


def seconds_a_token(stream: Iterator) -> float:
  """Takes a window of tokens."""
  start = time.perf_counter()
  for _ in range(WINDOW):
    next(stream)
  return (time.perf_counter() - start) / WINDOW


def write(name: str, mask: kernels.Mask, tokens: int) -> dict:
  """Generates a text; returns time and memory by its length so far, in windows.

  After each window a new text has one too: what slows the machine slows both.
  """
  config = config_lib.Config.from_dict(quickstart.get_config('encoding=fire').to_dict())
  transformer = train.make_model(config).clone(mask=mask)
  params = train.init(config)['params']

  def begin(max_tokens):
    stream = generate.stream(
      transformer, params, [[1]], max_tokens=max_tokens, sampling=sampling.GREEDY
    )
    next(stream)  # compiles
    return stream

  stream, rows = begin(tokens + 1), []
  begin(WINDOW + 1)
  for count in range(WINDOW, tokens + 1, WINDOW):
    row = {'tokens': count, 'seconds': seconds_a_token(stream)}
    row['new_text_seconds'] = seconds_a_token(begin(WINDOW + 1))
    rows.append({**row, 'resident_bytes': resident_bytes()})
  slots = generate.cache_slots(mask, tokens + 2)
  cache = jax.eval_shape(lambda: model.empty_cache(config.model, 1, slots))
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
  return {'mask': name, 'slots': slots, 'cache_bytes': size, 'windows': rows}


def table(results: list[dict]) -> str:
  """Returns the marks as text: the median over the windows since the mark before."""
  lines = [
    'mask            slots  cache MB   tokens   us/token   tokens/s   of a new text   resident MB'
  ]
  for result in results:
    first = 0
    for mark in MARKS:
      rows = [row for row in result['windows'] if first < row['tokens'] <= mark]
      if rows and rows[-1]['tokens'] == mark:
        seconds = float(np.median([row['seconds'] for row in rows]))
        ratio = float(np.median([row['seconds'] / row['new_text_seconds'] for row in rows]))
        lines.append(
          f'{result["mask"]:<14}{result["slots"]:>7}{result["cache_bytes"] / 1e6:>10.1f}{mark:>9}'
          f'{seconds * 1e6:>11.0f}{1 / seconds:>11.0f}{ratio:>16.2f}'
          f'{rows[-1]["resident_bytes"] / 1e6:>14.0f}'
        )
      first = mark
  return '\n'.join(lines)


def plot(results: list[dict], path: pathlib.Path) -> None:
  """Draws, by the length of the text, a token's time in that of a new text's, and the memory."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(10, 4), layout='constrained')
  times, memory = figure.subplots(1, 2)
  for result in results:
    rows = result['windows']
    tokens = [row['tokens'] for row in rows]
    label = f'{result["mask"]}, {result["slots"]:,} slots'
    times.plot(tokens, [row['seconds'] / row['new_text_seconds'] for row in rows], label=label)
    memory.plot(tokens, [row['resident_bytes'] / 1e6 for row in rows], label=label)
  times.set(ylabel="time a token, in a new text's", yscale='log', ylim=(0.5, 100))
  memory.set(ylabel='resident memory [MB]', ylim=(0, 1000))
  for axes in (times, memory):
    axes.set(xlabel='tokens generated', xscale='log')
    axes.grid(alpha=0.3)
  times.legend()
  figure.savefig(path, dpi=120)


def main() -> None:
  """The experiment."""
  # A process for each, so that none has the memory of those before.
  with multiprocessing.get_context('spawn').Pool(1, maxtasksperchild=1) as pool:
    results = pool.starmap(write, TEXTS, chunksize=1)
  (HERE / 'decode.json').write_text(json.dumps(results, indent=1) + '\n')
  plot(results, HERE / 'decode.png')
  print(table(results))


if __name__ == '__main__':
  cli.run(main)
