"""The habits of the code that a machine can check: shape suffixes, directions of import, sizes."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'lex_fire'
FILES = sorted(PACKAGE.rglob('*.py'))
every_file = pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(ROOT)))

MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 100
# Slow to import, or absent where only models run: imported inside the functions that need them.
LATE_IMPORTS = {
  'tensorflow',
  'tensorflow_datasets',
  'seqio',
  'grain',
  'ml_collections',
  'matplotlib',
}
# Rooms that stand alone, and what each may import of lex_fire beside itself.
ROOMS = {
  'lex_fire.encodings': ('lex_fire.errors',),
  'lex_fire.kernels': (
    'lex_fire.errors',
    'lex_fire.encodings.base',
    'lex_fire.encodings.piecewise',
  ),
  'lex_fire.data': ('lex_fire.errors', 'lex_fire.scores', 'lex_fire.storage'),
}


def parse(path):
  return ast.parse(path.read_text(encoding='utf-8'))


def dimension_key():
  """Returns the letters that the docstring of `encodings/base.py` lists, and the digit 1."""
  docstring = ast.get_docstring(parse(PACKAGE / 'encodings' / 'base.py'))
  table = re.search(r'The dimension key.*?\n\n(.*?)\n\n', docstring, re.DOTALL).group(1)
  entries = re.findall(r'(?:^|(?<=  ))((?:[A-Z1], )*[A-Z1]) (?=[a-z])', table, re.MULTILINE)
  return {letter for entry in entries for letter in entry.split(', ')}


KEY = dimension_key()


def suffix(name):
  """Returns the shape suffix of `value_BKGC` or `pair_BLR2`; None for constants and bare names."""
  match = re.fullmatch(r'_?[a-z][a-z0-9_]*_(\d*[A-Z][A-Z0-9]*)', name)
  return match and match.group(1)


def name_of(node):
  """Returns what `x_BL`, `self.x_BL` and `params['x_BL']` are called, or None."""
  if isinstance(node, ast.Name):
    return node.id
  if isinstance(node, ast.Attribute):
    return node.attr
  if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
    return node.slice.value if isinstance(node.slice.value, str) else None
  return None


def is_einsum(node):
  return (
    isinstance(node, ast.Call)
    and isinstance(node.func, ast.Attribute)
    and node.func.attr == 'einsum'
    and isinstance(node.args[0], ast.Constant)
  )


def einsum_mistakes(tree):
  """Yields a sentence for each operand or target whose suffix is not what its einsum spells."""
  for node in ast.walk(tree):
    if is_einsum(node):
      inputs = node.args[0].value.split('->')[0].split(',')
      for letters, operand in zip(inputs, node.args[1:], strict=True):
        found = suffix(name_of(operand) or '')
        if found and found != letters:
          yield f'line {node.lineno}: {name_of(operand)} enters {node.args[0].value!r} as {letters}'
    if isinstance(node, ast.Assign) and is_einsum(node.value):
      output = node.value.args[0].value.split('->')[1]
      for target in node.targets:
        found = suffix(name_of(target) or '')
        if found and found != output:
          yield f'line {node.lineno}: {name_of(target)} is given {node.value.args[0].value!r}'


def suffixed_names(tree):
  """Yields (line, name) of every variable, argument, field, and string key with a shape suffix."""
  for node in ast.walk(tree):
    name = None
    if isinstance(node, ast.arg):
      name = node.arg
    elif isinstance(node, ast.Name):
      name = node.id
    elif isinstance(node, ast.Attribute):
      name = node.attr
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
      name = node.value
    if name and suffix(name):
      yield node.lineno, name


LATER = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def is_for_types_only(node):
  return isinstance(node, ast.If) and name_of(node.test) == 'TYPE_CHECKING'


def imports(path, *, top_level_only):
  """Yields (line, module) of a file's imports, `from a import b` as a.b where that is a module."""
  waiting = [parse(path)]
  while waiting:
    node = waiting.pop()
    if top_level_only and (isinstance(node, LATER) or is_for_types_only(node)):
      continue
    waiting += ast.iter_child_nodes(node)
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield node.lineno, alias.name
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}:{node.lineno}: write imports in full'
      for alias in node.names:
        inner = ROOT / node.module.replace('.', '/') / alias.name
        is_module = inner.is_dir() or inner.with_suffix('.py').exists()
        yield node.lineno, f'{node.module}.{alias.name}' if is_module else node.module


def within(module, package):
  return module == package or module.startswith(package + '.')


def test_the_dimension_key_is_read_from_its_docstring():
  assert {'B', 'L', 'Q', 'K', 'H', 'C', 'D', 'W', 'X', 'I', 'J', '1'} <= KEY
  assert all(len(letter) == 1 for letter in KEY)


def test_the_lint_of_einsum_sees_what_is_wrong():
  """The example that Shazeer's own text got wrong, and an operand."""
  wrong = "value_BMHK = jnp.einsum('BLD,DHK->BLHK', x_BLD, params['w_DKH'])"

  assert len(list(einsum_mistakes(ast.parse(wrong)))) == 2


@every_file
def test_einsums_spell_the_shapes_of_their_operands_and_target(path):
  assert not list(einsum_mistakes(parse(path)))


@every_file
def test_shape_suffixes_are_of_the_dimension_key(path):
  unknown = {
    f'line {line}: {name}'
    for line, name in suffixed_names(parse(path))
    if not set(suffix(name)) <= KEY
  }

  assert not unknown, f'the key in encodings/base.py has {"".join(sorted(KEY))}'


@every_file
def test_rooms_import_only_what_they_may(path):
  module = '.'.join(path.relative_to(ROOT).with_suffix('').parts)
  room = next((room for room in ROOMS if within(module, room)), None)
  if room is None:
    return
  for line, imported in imports(path, top_level_only=False):
    if within(imported, 'lex_fire'):
      allowed = any(within(imported, place) for place in (room, *ROOMS[room]))
      assert allowed, f'line {line}: {room} may not import {imported}'


@every_file
def test_heavy_packages_are_imported_inside_functions(path):
  for line, imported in imports(path, top_level_only=True):
    assert imported.split('.')[0] not in LATE_IMPORTS, f'line {line}: {imported}'


def test_importing_lex_fire_imports_no_tensorflow():
  program = 'import sys, lex_fire, lex_fire.encodings, lex_fire.kernels; print(*sys.modules)'

  loaded = subprocess.run(
    [sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, check=True
  ).stdout.split()

  assert 'lex_fire.kernels' in loaded
  assert not LATE_IMPORTS & {module.split('.')[0] for module in loaded}


@every_file
def test_files_and_functions_are_short(path):
  assert len(path.read_text(encoding='utf-8').splitlines()) <= MAX_FILE_LINES
  for node in ast.walk(parse(path)):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name
