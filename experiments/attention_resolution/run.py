"""Attention resolution of trained models at the length of training and at twice it: LeX's table 3.

    python -m experiments.length_generalization.run --data_dir=DIR
    python -m experiments.attention_resolution.run [--runs=DIR] [--seeds=0,1,2]

The models are those of experiments/length_generalization. What is measured is kept as it comes in
NAME.json beside this file, NAME being the last part of --runs, and a run in it is not repeated; the
table that is made of it, and printed, is in NAME.txt.
"""

import dataclasses
import json
import pathlib
import statistics
import textwrap
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments import sweep
from lex_fire import analyze, checkpoint, cli, command, documents, published, storage
from lex_fire import config as config_lib

HERE = pathlib.Path(__file__).parent
MASKS = ('causal', 'blockwise')
ENCODINGS = ('sinusoidal', 'rope', 'alibi', 'xpos', 'fire')  # LeX's, and FIRE
PUBLISHED = published.TABLES['lex_resolution']
Report = dict[str, Any]  # of a run under one mask


def measure(encoding: str, seed: int, workdir: pathlib.Path) -> list[Report]:
  """Returns the reports of a run."""
  config = checkpoint.read_config(workdir)
  lengths = (config.data.length, 2 * config.data.length)
  request = dataclasses.replace(
    config.evaluate, lengths=lengths, masks=MASKS, encodings=(config_lib.AS_TRAINED,)
  )
  asked = dataclasses.replace(config, evaluate=request)
  progress = command.Progress(len(MASKS), documents.windows(asked))
  _, reports = analyze.analyze(workdir, request, progress=progress)
  fields = ('length', 'tokens', 'resolution')
  return [
    {
      'encoding': encoding,
      'seed': seed,
      'mask': report['mask'],
      'lengths': [{name: row[name] for name in fields} for row in report['lengths']],
    }
    for report in reports
  ]


def table(reports: Sequence[Report]) -> str:
  """Returns means and standard deviations over seeds, beside what LeX publishes."""
  found: dict[tuple[str, str], dict[int, list[float]]] = {}
  for report in reports:
    of_lengths = found.setdefault((report['encoding'], report['mask']), {})
    for row in report['lengths']:
      of_lengths.setdefault(row['length'], []).append(row['resolution'])
  lengths = list(next(iter(found.values())))
  theirs = list(next(iter(PUBLISHED.rows.values())))
  heads = [*(f'LeX at {length}' for length in theirs), *(f'here at {length}' for length in lengths)]
  rows = [f'{"encoding":<22}' + ''.join(f'{head:>20}' for head in heads)]
  for (encoding, mask), of_lengths in found.items():
    # Of some it is not told under which mask: they stand beside those of training's.
    masks = (mask, published.UNCLEAR) if mask == 'causal' else (mask,)
    values = next(
      (PUBLISHED.rows[encoding, of] for of in masks if (encoding, of) in PUBLISHED.rows), None
    )
    cells = [f'{values[length]:.2f}' if values else '-' for length in theirs]
    cells += [_text(of_lengths[length]) for length in lengths]
    rows.append(f'{f"{encoding} {mask}":<22}' + ''.join(f'{cell:>20}' for cell in cells))
  return '\n'.join(rows)


def _text(values: Sequence[float]) -> str:
  spread = f' +-{statistics.stdev(values):.2g}' if len(values) > 1 else ''
  return f'{statistics.fmean(values):.3g}{spread}'


def main() -> None:
  """The command."""
  runs = storage.local(flags.FLAGS.runs, '--runs')
  path = HERE / f'{runs.name}.json'
  reports = json.loads(path.read_text()) if path.exists() else []
  found = {(report['encoding'], report['seed']) for report in reports}
  for seed in sweep.seeds_of_flags():
    for encoding in ENCODINGS:
      if (encoding, seed) not in found:
        reports += measure(encoding, seed, runs / f'{encoding}-{seed}')
        storage.write(path, json.dumps(reports, indent=1) + '\n')
  text = table(reports)
  path.with_suffix('.txt').write_text(f'{textwrap.indent(text, "    ")}\n')
  print(text)


if __name__ == '__main__':
  flags.DEFINE_string(
    'runs', 'runs/length_generalization/books_laptop', 'where length_generalization keeps the runs'
  )
  flags.DEFINE_list('seeds', ['0', '1', '2'], 'one or more, whole numbers')
  cli.run(main, 'interrupted; the same command goes on')
