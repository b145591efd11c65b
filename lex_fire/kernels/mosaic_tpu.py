"""Attention as a Pallas kernel for TPU (Mosaic), with any bias or decay computed inside the tile.

The online softmax of FlashAttention (Dao et al. 2022, arXiv:2205.14135): a forward kernel, and two
backward ones, for queries and for keys. A bias is its encoding's `piecewise.Table`: from positions
alone, a tile computes x once for its heads and a line of it a head, and more only for breakpoints
that x can reach there, which `plan.make` finds beforehand. The gradient of the table is a running
sum in the order of the grid: no [Q, K] array, and the same bits each run.

`experiments/attention_tpu` says what the compiler makes of it: how long each part of a tile takes.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from lex_fire import errors
from lex_fire.encodings import base
from lex_fire.kernels import decay, flash, sides, tile
from lex_fire.kernels import mask as mask_lib
from lex_fire.kernels import mosaic_tpu_backward as backward_lib
from lex_fire.kernels import mosaic_tpu_band as band_lib
from lex_fire.kernels import mosaic_tpu_call as call
from lex_fire.kernels import mosaic_tpu_far as far_lib
from lex_fire.kernels import mosaic_tpu_heads as heads_lib
from lex_fire.kernels import mosaic_tpu_x as x_lib
from lex_fire.kernels import plan as plan_lib
from lex_fire.kernels.mosaic_tpu_products import dot
from lex_fire.kernels.mosaic_tpu_size import BLOCK, LANES, blocks, has_band, num_segments, why_not
from lex_fire.kernels.mosaic_tpu_tile import Constants, Setup, Tile
from lex_fire.kernels.plan import Keys, Queries


@sides.joined
def attention(
  query_BQHC: jax.Array,
  key_BKGC: jax.Array,
  value_BKGC: jax.Array,
  *,
  encoding: base.Encoding,
  params: base.Params,
  query_position_BQ: jax.Array,
  key_position_BK: jax.Array,
  query_segment_BQ: jax.Array | None,
  key_segment_BK: jax.Array | None,
  mask: mask_lib.Mask,
  block: int = BLOCK,
  interpret: bool = False,
  pieces: int = 1,
  make_flash: Callable[..., Any] = flash.on_device,
) -> tuple[jax.Array, jax.Array]:
  """Attention like `reference.attention`, in tiles of `block` queries by twice the keys.

  The block is a multiple of 128 on a TPU. Interpreted, it runs on any platform, slowly.

  Args:
    query_BQHC: see `kernels.attention`, as for all that is not said here.
    key_BKGC: likewise.
    value_BKGC: likewise.
    encoding: likewise.
    params: likewise.
    query_position_BQ: likewise.
    key_position_BK: likewise.
    query_segment_BQ: likewise.
    key_segment_BK: likewise.
    mask: likewise.
    block: queries of a tile, at most.
    interpret: see above.
    pieces: equal parts of a row that follow one another in the array and not in the text: a tile is
      no longer than one, as one that has tokens of two has more to do.
    make_flash: Kernels -> what computes all blocks, as `flash.on_device` makes it.

  Raises:
    errors.UserError: as `mosaic_tpu_size.why_not` says.
  """
  reason = why_not(encoding, query_BQHC, key_BKGC, pieces)
  if reason:
    raise errors.UserError(f"{reason}; use implementation='chunked'")
  query_BQHC, key_BKGC = tile.prepare(
    query_BQHC,
    key_BKGC,
    encoding=encoding,
    query_position_BQ=query_position_BQ,
    key_position_BK=key_position_BK,
    causal=mask.causal,
  )
  table = None if encoding.table is None else encoding.table(params, query_BQHC.shape[2])
  cut = blocks(query_BQHC, key_BKGC, block, num_segments(encoding), pieces, has_band(encoding))
  # Of two blocks of keys none is far; of a part of a row other devices have more.
  far = pieces > 1 or key_BKGC.shape[1] > 2 * cut.keys
  far = far and far_lib.has_room(encoding, cut.keys, query_BQHC.shape[3], interpret)
  band = band_lib.fitting(cut, key_BKGC.shape[1] // pieces, mask.causal)
  setup, constants = _setup(encoding, table, query_BQHC, cut, band, far, mask.causal, interpret)
  wide = x_lib.width(cut.queries, cut.keys)
  queries, keys = plan_lib.cut(
    mask,
    cut.queries,
    cut.keys,
    setup.stretch,
    (query_BQHC, query_position_BQ, query_segment_BQ),
    (key_BKGC, value_BKGC, key_position_BK, key_segment_BK),
  )
  make_plan = functools.partial(
    plan_lib.make,
    mask,
    cut.queries,
    cut.keys,
    coordinate=encoding.coordinate,
    part=(wide, wide),
    rate=x_lib.factors(encoding)[1],
    band=band,
    far=far,
  )
  kernels = Kernels(setup, constants, make_plan)
  out_BHQC, log_norm_BHQ = make_flash(kernels)(table, queries, keys)
  num_queries = query_BQHC.shape[1]
  return jnp.swapaxes(out_BHQC, 1, 2)[:, :num_queries], log_norm_BHQ[..., :num_queries]


def _setup(encoding, table, query_BQHC, cut, band, far, causal, interpret):
  """Returns Setup and Constants."""
  batch, _, num_heads, channels = query_BQHC.shape
  rate_1C = stretch = None
  if encoding.log_decay is not None:
    rate_1C = np.float32(encoding.log_decay(channels)[None])
    stretch = decay.stretch_of(encoding.log_decay(channels))
  trace = functools.partial(x_lib.trace, encoding, table, causal=causal)
  wide = x_lib.width(cut.queries, cut.keys)
  nodes = far_lib.nodes(cut.keys, wide, query_BQHC.dtype) if far else None
  functions, of_functions = trace(cut.queries, cut.keys, nodes=far_lib.ROWS if far else 0)
  band_functions = of_band_functions = None
  if band is not None:
    traced = trace(band.count * wide, wide, nodes=0)
    # Of pairs it has no numbers.
    band_functions = traced[0]._replace(of_pairs=None, of_keys=None)
    of_band_functions = traced[1]._replace(of_pairs=(), of_keys=())
  together = call.rows_together(batch, num_heads // cut.heads, band)
  setup = Setup(
    functions=functions,
    band_functions=band_functions,
    band=band,
    learned=encoding.learned,
    stretch=stretch,
    query_block=cut.queries,
    key_block=cut.keys,
    heads=cut.heads,
    groups=cut.groups,
    sum_rows=cut.sum_rows,
    together=together,
    # What cores can share is on the first axis, if on either.
    heads_first=batch == together,
    interpret=interpret,
  )
  return setup, Constants(rate_1C, of_functions, of_band_functions, nodes)


class Found(NamedTuple):
  """What a softmax over some keys gives; N blocks of H heads."""

  out_BHQC: Any
  log_norm_BNHQ: Any  # the logarithm of its normaliser, +inf where a query sees no key


def _forward_kernel(spans, held, inputs, so_far, found, sums, largest, norms, own, *, setup):
  """Visits tiles row by row.

  It goes on from what was found over other keys, if there were any.
  """
  at = call.Place(setup, by_column=False)

  def go_on(head, _):
    log_norm_Q1 = so_far.log_norm_BNHQ[0, 0, pl.ds(head, 1)].T
    seen_Q1 = log_norm_Q1 < jnp.inf
    sums[head] = so_far.out_BHQC[0, head]  # 0 where no key was seen
    largest_Q1 = jnp.where(seen_Q1, log_norm_Q1, 2 * mask_lib.HIDDEN_LOGIT)
    largest[head] = jnp.broadcast_to(largest_Q1, largest.shape[1:])
    norms[head] = jnp.broadcast_to(jnp.where(seen_Q1, 1.0, 0.0), norms.shape[1:])

  band_lib.lay_out(setup, at, spans, inputs, own.band)

  @pl.when(at.begins)
  def _():
    sums[...] = jnp.zeros_like(sums)
    largest[...] = jnp.full_like(largest, 2 * mask_lib.HIDDEN_LOGIT)
    norms[...] = jnp.zeros_like(norms)
    if so_far is not None:
      jax.lax.fori_loop(0, setup.heads, go_on, None)

  @pl.when(spans[at.tile] != 0)
  def _():
    tile = Tile(setup, spans[at.tile], held[at.tile], at.first_head, inputs, own)

    def add(head, products, bias):
      logits_QK, height = tile.logits(head, products, bias)
      _, value_KC = tile.key_and_value(head)
      if height is not None:
        # Of two numbers of each query, which lie in registers of their own, it would take longer.
        logits_QK += height
      largest_QT = jnp.maximum(largest[head], logits_QK.max(axis=1, keepdims=True))
      shrink_QT = jnp.exp(largest[head] - largest_QT)
      weights_QK = jnp.exp(logits_QK - _widened(largest_QT, logits_QK.shape[1]))
      values_QC = dot(weights_QK.astype(value_KC.dtype), value_KC, (1, 0))
      sums[head] = sums[head] * _widened(shrink_QT, values_QC.shape[1]) + values_QC
      norms[head] = norms[head] * shrink_QT + weights_QK.sum(axis=1, keepdims=True)
      largest[head] = largest_QT

    heads_lib.visit(tile, functools.partial(heads_lib.each_head, setup.heads, add))

  @pl.when(at.ends)
  def _():
    def write(head, _):
      """A query that saw no key gets 0 and +inf: exp(logit - inf) is 0 in the backward pass."""
      largest_Q1, norm_Q1 = largest[head][:, :1], norms[head][:, :1]
      seen_Q1 = largest_Q1 > mask_lib.HIDDEN_LOGIT / 2
      norm_Q1 = jnp.where(seen_Q1, norm_Q1, 1.0)
      out_QC = jnp.where(seen_Q1, sums[head] / norm_Q1, 0.0)
      found.out_BHQC[0, head] = out_QC.astype(found.out_BHQC.dtype)
      log_norm_Q1 = jnp.where(seen_Q1, largest_Q1 + jnp.log(norm_Q1), jnp.inf)
      found.log_norm_BNHQ[0, 0, pl.ds(head, 1)] = log_norm_Q1.T

    jax.lax.fori_loop(0, setup.heads, write, None)


def _widened(number_QT, columns):
  """Returns a number of each query, which all lanes have, in so many columns."""
  times = pl.cdiv(columns, number_QT.shape[1])
  return jnp.tile(number_QT, (1, times))[:, :columns]


class Kernels(NamedTuple):
  """Those for TPU, as `flash.Kernels` has them.

  Attributes:
    setup: what is static of them.
    constants: arrays that all tiles read.
    make_plan: (queries=, keys=, table=) -> what each tile has to do.
  """

  setup: Setup
  constants: Constants
  make_plan: Callable[..., plan_lib.Plan]

  def nothing(self, queries: Queries) -> flash.Found:
    """Returns what is found over no keys."""
    shape = queries.query_BHQC.shape
    return jnp.zeros(shape, jnp.float32), jnp.full(shape[:3], jnp.inf)

  def forward(
    self, table: Any, queries: Queries, keys: Keys, plan: plan_lib.Plan, so_far: Any = None
  ) -> flash.Found:
    """Returns out_BHQC and log_norm_BHQ."""
    setup, query_BHQC = self.setup, queries.query_BHQC
    batch, num_heads, num_queries, channels = query_BHQC.shape
    rows, columns = plan.low_IJ.shape
    specs = call.Specs(setup, columns, by_column=False)
    inputs = call.inputs(setup, plan, queries, keys, table, self.constants)
    norm = self._norm(query_BHQC)
    tile = (setup.heads, setup.query_block)
    of_found, dtype = Found(specs.query(query_BHQC), specs.norm()), keys.value_BGKC.dtype
    if so_far is not None:
      so_far, dtype = Found(so_far[0], so_far[1].reshape(norm)), jnp.float32
    (found,) = call.call(
      _forward_kernel,
      setup,
      (*norm[:2], rows, columns),
      plan,
      plan.key_IJ,
      (inputs, so_far),
      (specs.inputs(inputs), None if so_far is None else of_found),
      (
        Found(
          call.Output(call.like(query_BHQC, dtype), of_found.out_BHQC),
          call.Output(jax.ShapeDtypeStruct(norm, jnp.float32), of_found.log_norm_BNHQ),
        ),
      ),
      [(*tile, channels), (*tile, LANES), (*tile, LANES)],
      call.scratch(setup, table, learned=False),
      in_place=so_far is not None,
    )
    return found.out_BHQC, found.log_norm_BNHQ.reshape(batch, num_heads, num_queries)

  def _norm(self, query_BHQC):
    """Returns the shape of a number of each query, in N blocks of heads."""
    batch, num_heads, num_queries, _ = query_BHQC.shape
    return batch, num_heads // self.setup.heads, self.setup.heads, num_queries

  def softmax(self, found: flash.Found, d_found: flash.Found) -> backward_lib.Softmax:
    """Returns what kernels of the backward pass take."""
    (out_BHQC, log_norm_BHQ), (d_out_BHQC, d_log_norm_BHQ) = found, d_found
    delta_BHQ = (d_out_BHQC.astype(jnp.float32) * out_BHQC.astype(jnp.float32)).sum(axis=3)
    delta_BHQ -= d_log_norm_BHQ  # of a logit it is its weight times this
    norm = self._norm(out_BHQC)
    return backward_lib.Softmax(d_out_BHQC, log_norm_BHQ.reshape(norm), delta_BHQ.reshape(norm))

  def gradients(
    self,
    table: Any,
    queries: Queries,
    keys: Keys,
    plan: plan_lib.Plan,
    softmax: backward_lib.Softmax,
    dtype: Any = None,
  ) -> tuple[Any, Queries, Keys]:
    """Returns those of table, queries and keys."""
    of_all = self.setup, self.constants, table, queries, keys, plan, softmax, dtype
    d_query_BHQC, d_table = backward_lib.query_gradient(*of_all)
    d_key_BGKC, d_value_BGKC = backward_lib.key_gradient(*of_all)
    # None: positions and segments are integers and have no gradient.
    d_queries = Queries(d_query_BHQC, *[None] * (len(queries) - 1))
    return d_table, d_queries, Keys(d_key_BGKC, d_value_BGKC, *[None] * (len(keys) - 2))
