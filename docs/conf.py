"""How Sphinx builds these pages: `make docs`, offline, with warnings as errors."""

import dataclasses
import inspect
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parents[1]
SECTIONS = ('Args:', 'Attributes:', 'Returns:', 'Raises:', 'Yields:')
sys.path.insert(0, str(ROOT))

project = 'lex_fire'
author = 'The lex_fire authors'
project_copyright = author
extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
# The root of the repository is the source, so that links mean here what they mean in the files.
root_doc = 'docs/index'
include_patterns = [
  '*.md',
  'docs/*.md',
  'docs/*/*.md',
  'configs/launch/README.md',
  'experiments/*/README.md',
]
exclude_patterns = ['.*', 'docs/_build', 'runs']
html_theme = 'furo'
html_title = 'lex_fire'
html_static_path = []
html_show_sourcelink = False
highlight_language = 'text'
smartquotes = False  # which would change 'auto' into what cannot be copied
default_role = 'code'
nitpicky = True
# Types of other packages, whose pages are not fetched, and the names that stand for types here.
nitpick_ignore_regex = [('py:.*', r'(?!lex_fire).*')]
myst_heading_anchors = 3
autodoc_member_order = 'bysource'
autodoc_default_options = {'members': True}
autodoc_typehints = 'signature'
autodoc_typehints_format = 'short'
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_use_ivar = True
napoleon_attr_annotations = False


def starts_literal(line, last):
  """Returns whether a line begins an indented paragraph: an equation, a table, a drawing."""
  return bool(last) and indent_of(line) > indent_of(last) and not last.lstrip().startswith('- ')


def indent_of(line):
  return len(line) - len(line.lstrip())


def escape(line):
  """Returns a line of text without markup but for backquotes."""
  parts = re.split(r'(`[^`]*`)', line)
  parts[::2] = [re.sub(r'([*|\\]|(?<=\w)_(?!\w))', r'\\\1', part) for part in parts[::2]]
  return ''.join(parts)


def as_restructured_text(lines):
  """Returns lines of a docstring, which is plain text, so that its equations stay as they are.

  An indented paragraph becomes a literal block, a list gets its blank line, and of characters that
  reStructuredText reads as markup only backquotes are. Examples (>>>) are left alone, and so is
  what follows the first section (Args and so on), which napoleon reads.
  """
  out, literal, example, last = [], None, False, ''
  sections = False
  for line, before in zip(lines, ['', *lines], strict=False):
    text = line.strip()
    sections = sections or text in SECTIONS
    example = bool(text) and (example or text.startswith('>>> '))
    if text and literal is not None and indent_of(line) < literal:
      out += [''] if before.strip() else []
      literal = None
    if text and literal is None and not example:
      if not sections and starts_literal(line, last):
        literal = indent_of(line)
        out += ['', ' ' * indent_of(last) + '::', '']
      elif text.startswith('- ') and before.strip() and not before.strip().startswith('- '):
        out += [''] if indent_of(line) == indent_of(before) else []
    out.append(line if literal is not None or example else escape(line))
    last = line.rstrip() if text else last
  return out


def fields(dataclass):
  """Returns the fields of a dataclass with their comments, as its source has them."""
  source = inspect.getsource(dataclass).splitlines()
  found = [line.strip() for line in source if re.match(r'  \w+: .* = ', line)]
  return ['', '::', '', *(f'  {line}' for line in found)] if found else []


def setup(app):
  """Called by Sphinx."""

  def process(app, what, name, obj, options, lines):
    lines[:] = as_restructured_text(lines)
    if what == 'class' and dataclasses.is_dataclass(obj):
      lines += [] if 'Attributes:' in lines else fields(obj)

  def skip(app, what, name, obj, skipped, options):
    return True if (getattr(obj, '__doc__', None) or '').startswith('Alias for field') else skipped

  app.connect('autodoc-process-docstring', process, priority=100)  # before napoleon
  app.connect('autodoc-skip-member', skip)
