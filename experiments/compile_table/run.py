"""Does each preset fit each TPU, under each encoding, at lengths up to 131,072? (Without a TPU.)

    make test-tpu  # makes .venv-tpu
    JAX_PLATFORMS=cpu .venv-tpu/bin/python -m experiments.compile_table.run [--sizes=base,large]
      [--encodings=fire,rope] [--topologies=v5e:4x4] [--lengths=2048,131072]

Compiles the training step, and the evaluation step at each length, and keeps what is found in
compile_table.json beside this file after each case: the same command goes on with those that are
not in it. Then it writes compile_table.md, of all that are.
"""

import itertools
import json
import pathlib
import time

import jax
from absl import flags

from lex_fire import cli, compile, compile_report, encodings, metrics, presets, topologies
from lex_fire import config as config_lib

HERE = pathlib.Path(__file__).parent
FILE = HERE / 'compile_table.json'
CHOICES = {
  'sizes': ['base', 'large', 'lex_medium'],
  'encodings': list(encodings.ENCODINGS),
  'topologies': ['v5e:4x4', 'v6e:4x4', 'v5p:4x4x4'],
  'lengths': ['2048', '8192', '32768', '131072'],
}
MESH = {'replica': -1, 'fsdp': 4}


def make_config(size: str, encoding: str, lengths: tuple[int, ...]) -> config_lib.Config:
  """Returns a preset that has positions for the lengths, at which it scores the longest once."""
  options = presets.reaching(encoding, max(lengths)) if encoding == 'learned' else {}
  evaluate = {'lengths': lengths, 'max_tokens': max(lengths)}
  values = presets.make(size, encoding, encoding=options, evaluate=evaluate, mesh=MESH)
  return config_lib.Config.from_dict(values)


def run(todo: list[tuple[str, str, str]], lengths: tuple[int, ...], results: dict) -> None:
  """Compiles each (size, encoding, topology) and keeps its report."""
  start = time.monotonic()
  for done, (size, encoding, name) in enumerate(todo, start=1):
    config = make_config(size, encoding, lengths)
    report = compile.compile_run(config, topologies.find(name))
    results[key(size, encoding, name, lengths)] = {'size': size, **report}
    partial = FILE.with_suffix('.partial')
    partial.write_text(json.dumps(results, indent=1) + '\n')
    partial.replace(FILE)
    left = (time.monotonic() - start) / done * (len(todo) - done)
    print(f'{done} of {len(todo)}, ETA {metrics.clock(left)}: {size} {encoding} {name}', flush=True)
    jax.clear_caches()


def key(size: str, encoding: str, topology: str, lengths: tuple[int, ...]) -> str:
  """Returns the name of a result."""
  return f'{size} {encoding} {topology} {",".join(map(str, lengths))}'


def table(results: dict) -> str:
  """Returns a line of Markdown for each result: GiB a chip, and messages of a training step."""
  lengths = sorted({one['length'] for r in results.values() for one in r['programs'][1:]})
  heads = ['size', 'encoding', 'chips', 'of', 'training', *(f'at {n:,}' for n in lengths)]
  heads += ['attention', 'messages', 'model FLOPs']
  lines = [heads, ['---', '---', '---', *['---:'] * (2 + len(lengths)), '---', '---:', '---:']]
  for r in sorted(results.values(), key=_place):
    step, *evaluations = r['programs']
    totals = {one['length']: cell(one) for one in evaluations}
    sent = sum(n['bytes'] for n in (step['messages'] or {}).values())
    first = [r['size'], r['encoding']['name'], r['topology'], compile_report.gib(r['memory_bytes'])]
    memory = [cell(step), *(totals.get(n, '') for n in lengths)]
    chosen = dict.fromkeys(one['attention']['implementation'] for one in r['programs'])
    rest = [', '.join(chosen), f'{sent / 2**20:,.0f}']
    lines.append([*first, *memory, *rest, f'{r["model_flops_per_step"] / r["chips"]:.3g}'])
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _place(result: dict) -> list[int]:
  """Returns where a result stands in the table."""
  found = result['size'], result['encoding']['name'], result['topology']
  return [names.index(name) for name, names in zip(found, CHOICES.values(), strict=False)]


def cell(program: dict) -> str:
  """Returns what a program needs of a chip, bold if that is too much."""
  total = compile_report.gib(program['bytes']['total'])
  return f'**{total}**' if program['excess_bytes'] else total


def main() -> None:
  """The experiment."""
  asked = {name: flags.FLAGS[name].value for name in CHOICES}
  lengths = cli.whole_numbers('lengths') or ()
  results = json.loads(FILE.read_text()) if FILE.exists() else {}
  cases = itertools.product(asked['sizes'], asked['encodings'], asked['topologies'])
  run([case for case in cases if key(*case, lengths) not in results], lengths, results)
  (HERE / 'compile_table.md').write_text(table(results) + '\n')
  print(table(results))


if __name__ == '__main__':
  for option, choices in CHOICES.items():
    flags.DEFINE_list(option, choices, f'of {", ".join(choices)}')
  cli.run(main)
