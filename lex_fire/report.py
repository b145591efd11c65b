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
  """What a model lost on the scored tokens of the windows of one length, in their order.

  Attributes:
    length: of the windows.
    loss_L: float32 [nats].
    targets_L: int32, the tokens.
    position_L: of each in its window.
    document_L: index of the document that each is from.
    too_short: how many documents were read that have no window of the length.
  """

  length: int
  loss_L: np.ndarray
  targets_L: np.ndarray
  position_L: np.ndarray
  document_L: np.ndarray
  too_short: int


def _mean(loss_L) -> float:
  """Returns the mean, summed in float64."""
  return float(loss_L.mean(dtype=np.float64))


def _mean_by_document(losses: Losses) -> tuple[float, float | None, int]:
  """Returns the mean over tokens, its standard error, and the number of documents.

  The error takes documents as independent; tokens of a document are not. The mean is a ratio of two
  sums over documents, of losses and of tokens; its variance is that of the sums of loss - mean.
  None: there is but one document.
  """
  _, index_L = np.unique(losses.document_L, return_inverse=True)
  mean = _mean(losses.loss_L)
  excess_Z = np.bincount(index_L, weights=losses.loss_L.astype(np.float64) - mean)
  count = len(excess_Z)
  if count < 2:
    return mean, None, count
  error = math.sqrt(count / (count - 1) * (excess_Z**2).sum()) / len(losses.loss_L)
  return mean, error, count


def of_length(losses: Losses, text_bytes: int | None) -> Report:
  """Returns the numbers of one length.

  Args:
    losses: of its windows.
    text_bytes: of the text that the losses are of, or None: they do not add up to that of a text.
  """
  mean, error, documents = _mean_by_document(losses)
  tokens = len(losses.loss_L)
  bits_per_byte = None if text_bytes is None else mean * tokens / text_bytes / math.log(2)
  return {
    'length': losses.length,
    'tokens': tokens,
    'documents': documents,
    'documents_too_short': losses.too_short,
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
  error = None
  if all(
    np.array_equal(a, b)
    for a, b in ((first.targets_L, last.targets_L), (first.document_L, last.document_L))
  ):
    error = _mean_by_document(last._replace(loss_L=last.loss_L - first.loss_L))[1]
  return {
    'from': first.length,
    'to': last.length,
    'nats_per_token': _mean(last.loss_L) - _mean(first.loss_L),
    'standard_error': error,
  }


def by_position(losses: Losses) -> list[Report]:
  """Returns the mean loss in buckets of positions that double: [0, 16), [16, 32), [32, 64) ...

  None, where no token of a bucket is scored.
  """
  edges = [0, *(2**power for power in range(4, 64) if 2**power < losses.length), losses.length]
  buckets = []
  for low, high in zip(edges[:-1], edges[1:], strict=True):
    loss_L = losses.loss_L[(low <= losses.position_L) & (losses.position_L < high)]
    mean = _mean(loss_L) if loss_L.size else None
    buckets.append({'from': low, 'to': high, 'nats_per_token': mean})
  return buckets


def how(report: Report) -> str:
  """Names the protocol of a report and its stride; reports of before there was one lack it."""
  stride = report.get('stride')
  return f'{report["protocol"]}, stride {stride}' if stride else report['protocol']


def documents(report: Report) -> str:
  """Names the documents of a report; reports of before files were named lack them."""
  files = report.get('files')
  return f'{report["split"]} of {report["task"]}{f" {files}" if files else ""}'


def checkpoints(reports: Sequence[Report]) -> str:
  """Says of which checkpoint of each run reports are."""
  steps = {report['run']: report['checkpoint_step'] for report in reports}
  return 'checkpoint: ' + ', '.join(f'step {step} of {run}' for run, step in steps.items())


def heading(report: Report) -> str:
  """Says what a table of a report and others on the same documents shows."""
  last = report['lengths'][-1]
  count = last['documents']
  tokens = f'{last["tokens"]:,} tokens of {count} document{"" if count == 1 else "s"}'
  if last['documents_too_short']:
    tokens += f'; {last["documents_too_short"]} more are shorter than {last["length"]}'
  return f'{unit(report)} by length ({how(report)}, {tokens}), {documents(report)}'


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
      **{name: report[name] for name in ('task', 'split', 'files', 'protocol', 'stride')},
      **row,
    }
    for report in reports
    for row in report['lengths']
  ]
