"""Model cards of the weights that ship: data, command, commit, results and limits of each.

    python -m experiments.zoo.cards

writes lex_fire/weights/NAME.md for each NAME from the run's config, zoo.json and TRAINED.
"""

import json
import math
import pathlib

import jax

from lex_fire import cli, zoo
from lex_fire import report as report_lib

HERE = pathlib.Path(__file__).parent
TRAINED = '0b6c044'  # the commit at which the shipped runs were trained
_CARD = """\
# {name}

A decoder of {parameters:,} parameters over bytes, with {encoding} for positions, trained on
{length} bytes at a time and evaluated on up to {longest}. It is small enough to ship with the
package, for tests, notebooks and demonstrations.

    model, params = lex_fire.zoo.load('{name}')  # byte b is token 3 + b, 1 ends a document

- **Data**: source and docstrings of the Python 3.11 standard library, under Python's own licence
  (PSF-2.0), a file a document; one file in 20, by a hash of its path, is held out.
- **Command**, at commit {commit}, seed {seed}, on two CPU cores; {steps} steps of {rows} x {length}
  bytes, {tokens:,} in all. The config is `{name}.json`, the weights in half precision `{name}.npz`.

      python -m lex_fire.train --config=configs/quickstart.py:encoding={encoding} \\
        --workdir=runs/zoo/{encoding}

- **Results**: on {scored:,} held-out bytes of {documents} files, the same at every length, under
  the causal mask (`experiments/zoo`):

{results}

- **Limits**: it has seen less than a megabyte of one kind of text, for minutes. What it writes
  looks like Python and is none; it knows no other language and no facts. One seed: differences of
  0.03 nats between models are not to be leaned on. Lengths past {longest} are not in the table.
  Nothing was done about what the text that it writes may say.
"""


def card(name: str, report: report_lib.Report) -> str:
  """Returns the card of a shipped model as Markdown.

  Args:
    name: one of zoo.shipped().
    report: of its run, by `evaluate`.
  """
  run, (_, params) = zoo.config(name), zoo.load(name)
  rows = report['lengths']
  lines = [
    ''.join(f'{row["length"]:>10}' for row in rows) + '  bytes',
    ''.join(f'{row["nats_per_token"]:>10.3f}' for row in rows) + '  nats per byte',
    ''.join(f'{row["standard_error"]:>10.3f}' for row in rows) + '  standard error, by file',
  ]
  return _CARD.format(
    name=name,
    parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)),
    encoding=run.encoding.name,
    length=run.data.length,
    longest=rows[-1]['length'],
    commit=TRAINED,
    seed=run.train.seed,
    steps=run.train.steps,
    rows=run.data.batch_size,
    tokens=run.train.steps * run.data.batch_size * run.data.length,
    scored=rows[-1]['tokens'],
    documents=rows[-1]['documents'],
    results='\n'.join(f'      {line}' for line in lines),
  )


def cards() -> dict[str, str]:
  """Returns the card of each shipped model, from the results in zoo.json."""
  reports = json.loads((HERE / 'zoo.json').read_text())['runs']
  own = {report['run']: report for report in reports if report['encoding_override'] is None}
  return {name: card(name, own[zoo.config(name).encoding.name]) for name in zoo.shipped()}


def main() -> None:
  """The command."""
  for name, text in cards().items():
    (zoo.WEIGHTS / f'{name}.md').write_text(text)


if __name__ == '__main__':
  cli.run(main)
