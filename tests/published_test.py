"""Tests `../lex_fire/published.py`: numbers against the papers' own sentences, and rankings."""

import re

import pytest

from lex_fire import encodings, errors, kernels, published
from lex_fire.kernels import mask as mask_lib

LEX = published.TABLES['lex_perplexity']


def test_every_run_compares_encodings_that_are_here():
  for run in published.RUNS.values():
    assert set(run.encodings) <= set(encodings.ENCODINGS)
    assert run.best is None or run.best in run.encodings


@pytest.mark.parametrize('table', published.TABLES.values(), ids=published.TABLES)
def test_every_table_is_of_its_run(table):
  run = published.RUNS[table.run]

  assert {encoding for encoding, _ in table.rows} == set(run.encodings)
  for (_, mask), values in table.rows.items():
    assert mask == published.UNCLEAR or isinstance(mask_lib.parse(mask, 1024), kernels.Mask)
    assert set(values) <= set(run.lengths)


def test_lex_alone_gets_better_with_length():
  """Its table 2: "the only method that has lower perplexity along with increased length"."""
  better = {
    row for row, values in LEX.rows.items() if sorted(values.values())[::-1] == [*values.values()]
  }

  assert better == {('xpos', 'blockwise')}


def test_blocks_cost_and_save_what_lex_says_they_do():
  """Its section 4.4.2: without them xPos loses about 1 at 2048, and 8 at 4096."""
  blocks, causal = (LEX.rows['xpos', mask] for mask in ('blockwise', 'causal'))

  assert {n: round(causal[n] - blocks[n]) for n in causal} == {
    **dict.fromkeys((256, 512, 1024), 0),
    2048: 1,
    4096: 8,
  }


def test_the_papers_rank_their_own_encoding_first():
  assert published.ranking('lex', 4096) == (('xpos',), ('alibi',), ('rope',), ('sinusoidal',))
  for name in ('fire_base', 'fire_large', 'fire_scrolls'):
    first, *rest = published.ranking(name, 8192)
    assert first == ('fire',)
    assert rest == [('alibi', 'fire_s', 'kerple_log', 'nope', 'rope', 't5')]  # their order: unknown


def test_a_ranking_is_of_the_mask_that_is_asked_for():
  assert published.ranking('lex', 4096, 'causal') == (('alibi',), ('xpos',), ('rope',))
  assert published.ranking('lex', 2048, 'causal') == (('xpos',), ('alibi',), ('rope',))
  assert published.ranking('lex', 4096, 'blockwise') == (('xpos',), ('alibi',), ('rope',))
  assert published.ranking('fire_base', 512, 'causal') == published.ranking('fire_base', 512)


@pytest.mark.parametrize(
  ('measured', 'expected'),
  [
    ('abc', (3, 3)),
    ('cba', (0, 3)),
    ('bac', (2, 3)),
    ('a', (0, 0)),
    ('xaycz', (1, 1)),  # x, y and z were not published
    ('abdc', (5, 5)),  # c and d share a place
    ('adbc', (4, 5)),
  ],
)
def test_agreement_counts_the_pairs_that_stand_as_published(measured, expected):
  assert published.agreement((('a',), ('b',), ('c', 'd')), list(measured)) == expected


def test_a_ranking_in_words_brackets_what_shares_a_place():
  assert published.in_words((('a',), ('b', 'c'), ('d',))) == 'a, (b, c), d'


def test_curves_are_in_nats():
  found = published.curves(LEX)

  assert found.keys() == LEX.rows.keys()
  assert found['xpos', 'blockwise'][4096] == pytest.approx(3.0316, abs=5e-5)  # log 20.73


def test_what_is_not_known_is_said_to_be_unknown():
  assert 'an unknown number of tokens, on unknown hardware' in published.describe('fire_glue')
  assert '26,214,400,000 tokens, on 16 V100' in published.describe('lex')


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (('fire', 8192), "unknown published run 'fire'; known: fire_base, fire_large"),
    (('lex', 8192), "'lex' has no results at length=8192; lengths: 256, 512, 1024, 2048, 4096"),
    (('fire_glue', 512), "'fire_glue' has no results at length=512; lengths: none known"),
    (('lex', 4096, 'full'), "'lex' has no results under mask='full'; masks: blockwise, causal"),
    (('lex', 4096, 'unclear'), "'lex' has no results under mask='unclear'; masks: blockwise, "),
    (('fire_base', 512, 'blockwise'), "no results under mask='blockwise'; masks: causal"),
  ],
)
def test_a_ranking_that_was_not_published_is_refused(arguments, message):
  with pytest.raises(errors.UserError, match=re.escape(message)):
    published.ranking(*arguments)


def test_an_unknown_run_is_not_described():
  with pytest.raises(errors.UserError, match="unknown published run 'xpos'; known: fire_base"):
    published.describe('xpos')
