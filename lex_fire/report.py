"""What a length evaluation reports: numbers by length with their errors, and how they are shown.

A report is of one run under one encoding and one mask: a dict of JSON values that
`evaluate.evaluate` makes. Several are compared.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Report = dict[str, Any]


class Losses(NamedTuple):
  """What a model lost on the windows of one length.

  Attributes:
    loss_WL: float32 [nats].
    weight_WL: how much each token counts; 0: it is not scored.
    targets_WL: int32 tokens.
    document_W: int32 index of the document that a window is from.
  """

  loss_WL: np.ndarray
  weight_WL: np.ndarray
  targets_WL: np.ndarray
  document_W: np.ndarray


def _mean(loss, weight) -> float:
  """Returns the weighted mean, summed in float64."""
  return float((loss * weight).sum(dtype=np.float64) / weight.sum(dtype=np.float64))


def _mean_by_document(losses: Losses) -> tuple[float, float | None, int]:
  """Returns the mean over tokens, its standard error, and the number of documents.

  The error takes documents as independent; tokens of a document are not. The mean is a ratio of two
  sums over documents, of losses and of weights; its variance is that of the sums of loss - mean.
  None: there is but one document.
  """
  _, index_W = np.unique(losses.document_W, return_inverse=True)
  mean = _mean(losses.loss_WL, losses.weight_WL)
  excess_WL = (losses.loss_WL.astype(np.float64) - mean) * losses.weight_WL
  weight_Z = np.bincount(index_W, weights=losses.weight_WL.sum(axis=1))
  excess_Z = np.bincount(index_W, weights=excess_WL.sum(axis=1))[weight_Z > 0]
  count = len(excess_Z)
  if count < 2:
    return mean, None, count
  return mean, math.sqrt(count / (count - 1) * (excess_Z**2).sum()) / weight_Z.sum(), count


def of_length(losses: Losses, text_bytes: int | None) -> Report:
  """Returns the numbers of one length.

  Args:
    losses: of its windows.
    text_bytes: of the text that the losses are of, or None: they do not add up to that of a text.
  """
  mean, error, documents = _mean_by_document(losses)
  tokens = int(np.count_nonzero(losses.weight_WL))
  bits_per_byte = None if text_bytes is None else mean * tokens / text_bytes / math.log(2)
  return {
    'length': losses.loss_WL.shape[1],
    'tokens': tokens,
    'documents': documents,
    'nats_per_token': mean,
    'standard_error': error,
    'perplexity': math.exp(mean),
    'bits_per_byte': bits_per_byte,
  }


def change(losses: Mapping[int, Losses]) -> Report:
  """Returns the change from the shortest to the longest length.

  Its standard error is that of the differences token by token, so it exists only if both scored the
  same tokens: what makes one document harder than another cancels.
  """
  first, last = losses[min(losses)], losses[max(losses)]
  values = [_mean(x.loss_WL, x.weight_WL) for x in (first, last)]
  error = None
  if all(
    np.array_equal(a.ravel(), b.ravel())
    for a, b in ((first.targets_WL, last.targets_WL), (first.weight_WL, last.weight_WL))
  ):
    difference_WL = last.loss_WL - first.loss_WL.reshape(last.loss_WL.shape)
    error = _mean_by_document(last._replace(loss_WL=difference_WL))[1]
  return {
    'from': min(losses),
    'to': max(losses),
    'nats_per_token': values[1] - values[0],
    'standard_error': error,
  }


def by_position(losses: Losses) -> list[Report]:
  """Returns the mean loss in buckets of positions that double: [0, 16), [16, 32), [32, 64) ...

  None, where no token of a bucket is scored.
  """
  length = losses.loss_WL.shape[1]
  edges = [0, *(2**power for power in range(4, 64) if 2**power < length), length]
  buckets = []
  for low, high in zip(edges[:-1], edges[1:], strict=True):
    weight_WL = losses.weight_WL[:, low:high]
    mean = _mean(losses.loss_WL[:, low:high], weight_WL) if weight_WL.any() else None
    buckets.append({'from': low, 'to': high, 'nats_per_token': mean})
  return buckets


def series(report: Report) -> str:
  """Names the model of a report: its run, and what stands in the place of the run's encoding.

  Reports of before there was such a place lack its field.
  """
  override = report.get('encoding_override')
  return f'{report["run"]} {override}' if override else report['run']


def unit(report: Report) -> str:
  """Returns the unit of a report's losses; reports of before there were encoders do not say it."""
  return 'nats per masked token' if report.get('objective') == 'masked' else 'nats per token'


def labels(reports: Sequence[Report]) -> list[str]:
  """Names each report among others: by its mask too, unless all have that of their training."""
  masks = {report['mask'] for report in reports}
  if masks <= {'causal'} or masks <= {'full'}:
    return [series(report) for report in reports]
  return [f'{series(report)} {report["mask"]}' for report in reports]


def table(reports: Sequence[Report]) -> str:
  """Returns the losses as text: a row a report, a column a length, the change first to last."""
  lengths = [row['length'] for row in reports[0]['lengths']]
  names = labels(reports)
  width = max(len('run'), *map(len, names))
  lines = [f'{"run":<{width}}' + ''.join(f'{length:>9}' for length in lengths) + '   change']
  for name, report in zip(names, reports, strict=True):
    cells = ''.join(f'{row["nats_per_token"]:>9.3f}' for row in report['lengths'])
    difference, error = report['change']['nats_per_token'], report['change']['standard_error']
    spread = '' if error is None else f' +-{error:.3f}'
    lines.append(f'{name:<{width}}{cells}{difference:>+9.3f}{spread}')
  return '\n'.join(lines)


def rows(reports: Sequence[Report]) -> list[Report]:
  """Returns a flat dict for each report and length, as CSV has them."""
  return [
    {
      'run': report['run'],
      'encoding': report['encoding_override'] or report['encoding']['name'],
      'mask': report['mask'],
      **row,
    }
    for report in reports
    for row in report['lengths']
  ]
