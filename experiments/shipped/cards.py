"""Model cards of the weights that ship: data, command, commit, results and limits of each.

`experiments.shipped.run` writes them, from each run's config, what this directory has and _TRAINED.
"""

import json
import math
import pathlib
import textwrap
from collections.abc import Sequence

import jax

from experiments import sweep_results
from lex_fire import report as report_lib
from lex_fire import zoo

HERE = pathlib.Path(__file__).parent


# The commit at which each was trained.
_TRAINED = {'fire': '566f822', 'xpos': 'ebc6457', 'alibi': 'ebc6457', 'rope': 'ebc6457'}
# What it is called in seeds.jsonl.
_OF_SEVERAL_SEEDS = {'fire': 'two, rate 30', 'alibi': 'alibi'}
MASKS = ('causal', 'blockwise')
_CARD = """\
# {name}

A decoder of {parameters:,} parameters over bytes, with {encoding} for positions, trained on
{length} bytes at a time and evaluated on up to {longest}. It is small enough to ship with the
package, for tests, notebooks and demonstrations.

    model, params = lex_fire.zoo.load('{name}')  # byte b is token 3 + b, 1 ends a document

- **Data**: source and docstrings of the Python 3.11 standard library, under Python's own licence
  (PSF-2.0), a file a document; one file in 20, by a hash of its path, is held out.
- **Command**, at commit {commit}, seed {seed}, on a CPU core; {steps} steps of {rows} x {length}
  bytes, {tokens:,} in all. The config is `{name}.json`, the weights in half precision `{name}.npz`.

      python -m lex_fire.train --config=configs/zoo.py:encoding={encoding} \\
        --workdir=runs/shipped/{encoding}

- **Results**: nats per byte of {scored:,} held-out bytes of {documents} files, the same at every
  length, under the causal mask and in LeX's blocks (`experiments/shipped`):

{results}

{limits}
"""
_LIMITS = """\
- **Limits**: it has seen {megabytes:.0f} megabytes of one kind of text. What it writes looks like
Python and is none; it knows no other language and no facts. {seeds} Differences of 0.05 nats
between models are not to be leaned on. Lengths past {longest} are not in the table. Nothing was
done about what the text that it writes may say.
"""


def _of_seeds(encoding: str) -> str:
  """Returns what other seeds gave, a sentence."""
  if encoding not in _OF_SEVERAL_SEEDS:
    return 'It is of one seed.'
  rows = sweep_results.rows(sweep_results.read(HERE / 'seeds.jsonl'), 'same_tokens', 'causal')
  (row,) = (row for row in rows if row.variant == _OF_SEVERAL_SEEDS[encoding])
  first, *_, last = row.values
  return (
    f'Over {row.seeds} seeds, of which it is the first, the loss under the causal mask is '
    f'{row.text(first)} at {first} and {row.text(last)} at {last}.'
  )


def card(name: str, reports: Sequence[report_lib.Report]) -> str:
  """Returns the card of a shipped model as Markdown.

  Args:
    name: one of zoo.shipped().
    reports: of its run, by `evaluate`, one for each of MASKS.
  """
  run, (_, params) = zoo.config(name), zoo.load(name)
  tokens = run.train.steps * run.data.batch_size * run.data.length
  rows = reports[0]['lengths']
  lines = [f'{"length":<10}' + ''.join(f'{row["length"]:>8}' for row in rows)]
  for mask, report in zip(MASKS, reports, strict=True):
    losses = ''.join(f'{row["nats_per_token"]:>8.3f}' for row in report['lengths'])
    lines.append(f'{mask:<10}{losses}')
  limits = _LIMITS.format(
    megabytes=tokens / 1e6, seeds=_of_seeds(run.encoding.name), longest=rows[-1]['length']
  )
  return _CARD.format(
    name=name,
    parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)),
    encoding=run.encoding.name,
    length=run.data.length,
    longest=rows[-1]['length'],
    commit=_TRAINED[run.encoding.name],
    seed=run.train.seed,
    steps=run.train.steps,
    rows=run.data.batch_size,
    tokens=tokens,
    scored=rows[-1]['tokens'],
    documents=rows[-1]['documents'],
    limits=textwrap.fill(limits, 90, subsequent_indent='  '),
    results='\n'.join(f'      {line}' for line in lines),
  )


def cards() -> dict[str, str]:
  """Returns the card of each shipped model, from the results in shipped.json."""
  reports = json.loads((HERE / 'shipped.json').read_text())['runs']
  found = {(report['encoding']['name'], report['mask']): report for report in reports}
  return {
    name: card(name, [found[zoo.config(name).encoding.name, mask] for mask in MASKS])
    for name in zoo.shipped()
  }


def write() -> None:
  """Writes the cards beside the weights."""
  for name, text in cards().items():
    (zoo.WEIGHTS / f'{name}.md').write_text(text)
