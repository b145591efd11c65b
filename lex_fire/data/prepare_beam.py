"""`prepare` as an Apache Beam pipeline, for a corpus that outgrows one machine.

    python -m lex_fire.data.prepare_beam --task=c4 --vocabulary=t5 --split=train --directory=DIR \\
      --runner=FnApiRunner
    python -m lex_fire.data.prepare_beam --task=c4 --vocabulary=t5 --split=train \\
      --tfds_directory=gs://BUCKET/tfds --directory=gs://BUCKET/streams --runner=DataflowRunner \\
      --project=PROJECT --region=REGION --temp_location=gs://BUCKET/temp \\
      --sdk_container_image=IMAGE

What `prepare` does not know is for Beam, `--runner` above all. The stream is the same, file by
file, and so is its name: training finds one that was prepared by either. A worker writes a part on
its own disk and then copies it to its place, and last a record that says so, by which a pipeline
that is started again knows what is there. Two at once do no harm, as they write the same bytes; on
one machine the second waits.

DIR is a directory, or a URL of a file system of Beam's, that this machine and all workers reach
under one name, as they must the corpus and a SentencePiece model. They check that they see what
this machine sees. IMAGE is one of Beam's with lex_fire in it and what requirements-beam.txt asks
for; gs:// and Dataflow want apache-beam[gcp] here. At a URL a stream is whole when it has its
manifest; training reads a copy of it, or a mount, and `prepare` on that compares all hashes.
"""

from __future__ import annotations

import functools
import io
import json
import logging
import pathlib
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any

from lex_fire import errors
from lex_fire.data import beam as beam_lib
from lex_fire.data import lazy, reading, spec, stream, tasks
from lex_fire.data import prepare as prepare_lib

_PARTS = '.parts.json'  # what the manifest says of all parts, when they are all there
_NAMESPACE, _COUNTERS = 'lex_fire.prepare', ('documents', 'tokens', 'parts')
_one_at_a_time = threading.Lock()


def prepare(
  what: spec.Spec,
  split: str,
  directory: str,
  flags: Sequence[str] = (),
  modules: Sequence[str] = (),
) -> str:
  """Returns the place of the stream of a split; has a pipeline write it if it is not there.

  Args:
    what: the Task, which workers can make: one of tasks.TASKS, or one that a module registers.
    split: one of the Task's.
    directory: where all streams are kept, which all workers see: a path or a URL.
    flags: for Beam, such as --runner=FnApiRunner.
    modules: that workers import, as this process has.

  Raises:
    errors.UserError: as prepare.prepare does, here or on a worker; for a flag unknown to Beam; if a
      worker sees another corpus, or Beam is not installed or cannot write at the URL.
  """
  if what.base not in tasks.TASKS and not modules:
    tasks.get_task(what)
    raise errors.UserError(
      f'task {what.name!r} is registered in this process alone, so that workers cannot make it; '
      'name the module that registers it, or use lex_fire.data.prepare in this process'
    )
  write = functools.partial(_write_parts, beam_lib.options_of(flags), modules)
  if beam_lib.is_url(directory):
    return _prepare_at_url(what, split, directory, write)
  return str(prepare_lib.prepare(what, split, pathlib.Path(directory).absolute(), write))


def _prepare_at_url(what: spec.Spec, split: str, url: str, write_parts: Any) -> str:
  """Writes the files of a stream where no directory can be moved, the manifest last."""
  files = beam_lib.files(url)
  identity = prepare_lib.identity_of(what, split)
  place = files.join(url, prepare_lib.name_of(identity))
  with stream.writing(place):
    is_there = files.exists(files.join(place, stream.MANIFEST))
  if not is_there:
    parts = write_parts(what, identity, place)
    content = stream.manifest_of(place, identity, parts)
    beam_lib.put(io.BytesIO(content.encode()), place, stream.MANIFEST)
    with stream.writing(place):
      files.delete([files.join(place, '.*')])
  return place


def _write_parts(
  options: Any,
  modules: Sequence[str],
  what: spec.Spec,
  identity: prepare_lib.Identity,
  place: str | pathlib.Path,
) -> list[dict[str, Any]]:
  """Runs the pipeline that writes the parts that are missing; returns what it says of all parts."""
  beam, place = beam_lib.load(), str(place)
  count = reading.parts(tasks.get_task(what), identity['split'])
  write = functools.partial(_write_part, modules, what, identity, place, count)
  start = time.monotonic()
  with beam_lib.mistakes():
    pipeline = beam.Pipeline(options=options)
    _ = (
      pipeline
      | beam.Create(range(count))
      | beam.Reshuffle()
      | 'write a part' >> beam.Map(write)
      | beam.combiners.ToList()
      | 'list the parts' >> beam.Map(functools.partial(_list_parts, place))
    )
    result = pipeline.run()
    state = result.wait_until_finish()
  if state != 'DONE':
    raise errors.UserError(
      f'the pipeline ended as {state}; run the same again, which goes on with the parts that are '
      'missing'
    )
  _report(result, time.monotonic() - start)
  return _read(place, _PARTS)


def _report(result: Any, seconds: float) -> None:
  """Says what was written this time, as Beam counted it; a service shows that on the way."""
  counters = result.metrics().query()['counters']
  counted = {c.key.metric.name: c.result for c in counters if c.key.metric.namespace == _NAMESPACE}
  documents, tokens, parts = (counted.get(name, 0) for name in _COUNTERS)
  print(
    f'wrote {documents:,} documents, {tokens:,} tokens, {parts} parts in {seconds:,.0f} s'
    f' ({tokens / seconds:,.0f} tokens/s)',
    file=sys.stderr,
  )


def _read(place: str, name: str) -> Any:
  """Returns the JSON value of a file, or None if it is not there."""
  files = beam_lib.files(place)
  with stream.writing(place):
    if not files.exists(files.join(place, name)):
      return None
    with files.open(files.join(place, name)) as file:
      return json.load(file)


def _write_part(
  modules: Sequence[str],
  what: spec.Spec,
  identity: prepare_lib.Identity,
  place: str,
  num_parts: int,
  part: int,
) -> tuple[int, dict[str, Any]]:
  """Writes a part on a worker if it is not there; returns it and what the manifest says of it."""
  from apache_beam.metrics import Metrics  # pyright: ignore[reportMissingImports]

  beam_lib.quieten()
  written = _read(place, stream.record_of(part))
  if written is not None:
    return part, written
  counters = [Metrics.counter(_NAMESPACE, name) for name in _COUNTERS]

  def count(*numbers):
    for counter, number in zip(counters, numbers, strict=True):
      counter.inc(number)

  with _one_at_a_time, tempfile.TemporaryDirectory() as work:
    lazy.import_modules(modules)
    _check_identity(what, identity)
    directory = pathlib.Path(work)
    written = prepare_lib.write_part(what, identity['split'], directory, part, num_parts, count)
    # The record, whose name begins with a dot, is last.
    for path in sorted(directory.iterdir(), reverse=True):
      with path.open('rb') as source:
        beam_lib.put(source, place, path.name)
  return part, written


def _check_identity(what: spec.Spec, identity: prepare_lib.Identity) -> None:
  """Raises errors.UserError if a worker sees another corpus or vocabulary."""
  found = prepare_lib.identity_of(what, identity['split'])
  for key, value in identity.items():
    if found[key] != value:
      raise errors.UserError(
        f'a worker finds {key}={found[key]!r} for task {what.name!r}, not {value!r}; let it see '
        'the same files as this machine, with the same names and times'
      )


def _list_parts(place: str, parts: list[tuple[int, dict[str, Any]]]) -> None:
  """Writes what the manifest says of parts, in order, for the process that started the pipeline."""
  content = json.dumps([written for _, written in sorted(parts, key=lambda part: part[0])])
  beam_lib.put(io.BytesIO(content.encode()), place, _PARTS)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command and returns its exit status, 2 for a mistake of the user's."""
  parser = prepare_lib.define_parser('lex_fire.data.prepare_beam', __doc__)
  parser.allow_abbrev = False  # an abbreviation may be a flag of Beam's
  arguments, flags = parser.parse_known_args(argv)
  beam_lib.quieten()
  logging.getLogger('apache_beam.runners.dataflow').setLevel(logging.INFO)  # where to see the job

  def run():
    what, modules = spec.of_arguments(arguments, arguments.vocabulary), arguments.module_import
    place = prepare(what, arguments.split, arguments.directory, flags, modules)
    if beam_lib.is_url(place):
      print(place)
    else:
      prepare_lib.report(pathlib.Path(place))

  return prepare_lib.status_of(run)


if __name__ == '__main__':
  from lex_fire.data import prepare_beam  # by this name, not __main__, workers find what is in it

  sys.exit(prepare_beam.main())
