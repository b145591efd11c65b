"""Does text of any length come at constant time and memory a token?

    python -m experiments.decode.run

The quickstart's model, untrained (what it writes does not change what a token costs), writes one
text under each mask, greedily. Writes decode.json and decode.png beside this file.
"""

import json
import multiprocessing
import pathlib
import time

import jax
import numpy as np

from configs import quickstart
from lex_fire import config as config_lib
from lex_fire import generate, kernels, model, sampling, train

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


def write(name: str, mask: kernels.Mask, tokens: int) -> dict:
  """Generates a text and returns time and memory by its length so far, in windows."""
  config = config_lib.Config.from_dict(quickstart.get_config('encoding=fire').to_dict())
  transformer = train.make_model(config).clone(mask=mask)
  params = train.init(config)['params']
  stream = generate.stream(
    transformer, params, [[1]], max_tokens=tokens + 1, sampling=sampling.GREEDY
  )
  next(stream)  # compiles
  rows, start = [], time.perf_counter()
  for count, _ in enumerate(stream, start=1):
    if count % WINDOW == 0:
      now = time.perf_counter()
      seconds, start = (now - start) / WINDOW, now
      rows.append({'tokens': count, 'seconds': seconds, 'resident_bytes': resident_bytes()})
  slots = generate.cache_slots(mask, tokens + 2)
  cache = jax.eval_shape(lambda: model.empty_cache(config.model, 1, slots))
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
  return {'mask': name, 'slots': slots, 'cache_bytes': size, 'windows': rows}


def table(results: list[dict]) -> str:
  """Returns the marks as text: the median over the windows since the mark before."""
  lines = ['mask            slots  cache MB   tokens   us/token   tokens/s   resident MB']
  for result in results:
    first = 0
    for mark in MARKS:
      rows = [row for row in result['windows'] if first < row['tokens'] <= mark]
      if rows and rows[-1]['tokens'] == mark:
        seconds = float(np.median([row['seconds'] for row in rows]))
        lines.append(
          f'{result["mask"]:<14}{result["slots"]:>7}{result["cache_bytes"] / 1e6:>10.1f}{mark:>9}'
          f'{seconds * 1e6:>11.0f}{1 / seconds:>11.0f}{rows[-1]["resident_bytes"] / 1e6:>14.0f}'
        )
      first = mark
  return '\n'.join(lines)


def plot(results: list[dict], path: pathlib.Path) -> None:
  """Draws the time of a token and the memory of the process by the length of the text."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(10, 4), layout='constrained')
  times, memory = figure.subplots(1, 2)
  for result in results:
    tokens = [row['tokens'] for row in result['windows']]
    label = f'{result["mask"]}, {result["slots"]:,} slots'
    times.plot(tokens, [row['seconds'] * 1e6 for row in result['windows']], label=label)
    memory.plot(tokens, [row['resident_bytes'] / 1e6 for row in result['windows']], label=label)
  for axes, text in ((times, 'microseconds a token'), (memory, 'resident memory [MB]')):
    axes.set(xlabel='tokens generated', ylabel=text, xscale='log')
    axes.grid(alpha=0.3)
  times.set_yscale('log')
  memory.set_ylim(0, None)
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
  main()
