"""Tests of `lex_fire/data/stream.py`: what is on disk, that it is whole, that damage is seen."""

import errno
import hashlib
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from lex_fire import errors
from lex_fire.data import stream

EOS = 1
SIZE = 259
IDENTITY = {'format': 1, 'vocabulary': {'name': 'bytes', 'size': SIZE, 'eos_id': EOS}}


def document(*tokens):
  return stream.Document(np.array([*tokens, EOS]), len(tokens))


def question(inputs, separator, answer):
  """A question as `reading.documents` makes one."""
  ends = (len(inputs), len(inputs) + len(separator))
  return stream.Document(np.array([*inputs, *separator, *answer, EOS]), len(answer), ends)


def write(directory, *parts, size=SIZE, identity=IDENTITY):
  """Writes a stream of the documents of each part."""
  work = directory / 'work'
  work.mkdir()
  counts = [stream.write_part(work, *part, documents) for part, documents in numbered(parts, size)]
  stream.finish(work, directory / 's', identity, counts)
  return directory / 's'


def numbered(parts, size):
  return (((part, size), documents) for part, documents in enumerate(parts))


def contents(directory):
  return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_stream_is_the_documents_end_to_end_part_by_part(tmp_path):
  path = write(tmp_path, [document(5), document(6, 7)], [document(8)])

  first_L, second_L = stream.read(path).parts
  assert first_L.tolist() == [5, EOS, 6, 7, EOS]
  assert second_L.tolist() == [8, EOS]
  assert first_L.dtype == np.uint16
  assert isinstance(first_L, np.memmap)
  assert stream.read(path).ends is None


def test_the_manifest_says_what_the_stream_is_and_what_its_parts_are(tmp_path):
  path = write(tmp_path, [document(5), document(6, 7)], [document(8)])

  manifest = stream.read(path).manifest

  hashes = [part.pop('sha256') for part in manifest['parts']]
  whole = manifest.pop('sha256')
  assert manifest == IDENTITY | {
    'documents': 3,
    'tokens': 7,
    'text_bytes': 4,
    'windows': {'512': 0, '2048': 0, '8192': 0},
    'parts': [
      {
        'file': 'part-00000.npy',
        'documents': 2,
        'tokens': 5,
        'text_bytes': 3,
        'file_bytes': 128 + 2 * 5,
      },
      {
        'file': 'part-00001.npy',
        'documents': 1,
        'tokens': 2,
        'text_bytes': 1,
        'file_bytes': 128 + 2 * 2,
      },
    ],
  }
  little_endian = [b'\5\0\1\0\6\0\7\0\1\0', b'\x08\0\1\0']
  assert hashes == [hashlib.sha256(content).hexdigest() for content in little_endian]
  assert whole == hashlib.sha256(''.join(hashes).encode()).hexdigest()


def test_the_hash_of_a_part_is_of_its_tokens_and_that_of_the_whole_is_of_its_parts(tmp_path):
  path = write(tmp_path, [document(5)], [document(6)])

  # $ printf '\5\0\1\0' | sha256sum; printf '\6\0\1\0' | sha256sum
  first = 'aeb6173737ae1c3b6a1c89ffa5a3d560dfde74f48bf9763d2b882515e61da20c'
  second = '1e80e1e3912c9d30fb9db697be3f2fe5128fccc97672412556868cef723f8813'
  # $ printf FIRSTSECOND | sha256sum
  whole = 'da3e74d988a0d33de15c6f52aa336f7e8c6b469c1962eeda98b659f010ee52bb'
  assert [part['sha256'] for part in stream.read(path).manifest['parts']] == [first, second]
  assert stream.read(path).manifest['sha256'] == whole


def test_the_hash_of_the_whole_tells_the_order_of_parts_and_where_questions_end(tmp_path):
  long, short = question([10, 11], [3], [20]), question([10], [3, 3], [20])
  streams = [
    [[document(5)], [document(6)]],
    [[document(6)], [document(5)]],
    [[long]],
    [[short._replace(tokens_L=long.tokens_L)]],
  ]
  hashes = []
  for number, parts in enumerate(streams):
    (tmp_path / str(number)).mkdir()
    path = write(tmp_path / str(number), *parts)
    hashes.append(stream.read(path).manifest['sha256'])

  assert len(set(hashes)) == 4


def test_a_stream_is_finished_without_reading_its_parts_again(tmp_path, monkeypatch):
  monkeypatch.setattr(np, 'load', None)
  monkeypatch.setattr(stream, '_sha256', None)

  assert write(tmp_path, [document(5)], [document(6)]).exists()


@pytest.mark.parametrize(('size', 'dtype'), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_tokens_take_two_bytes_when_the_vocabulary_fits(tmp_path, size, dtype):
  path = write(tmp_path, [document(size - 1)], size=size)

  (tokens_L,) = stream.read(path).parts
  assert tokens_L.tolist() == [size - 1, EOS]
  assert tokens_L.dtype == dtype


def test_ends_say_where_inputs_prompt_and_answer_of_each_question_end(tmp_path):
  first = question([10, 11], [3, 3], [20])
  second = question([12], [3, 3], [21, 22])
  path = write(tmp_path, [first, second], [first])

  found = stream.read(path)

  (tokens_L, _), (ends_EX, other_EX) = found.parts, found.ends
  assert ends_EX.tolist() == [[2, 4, 6], [7, 9, 12]]
  assert other_EX.tolist() == [[2, 4, 6]]
  start = 0
  for example, (inputs_end, prompt_end, end) in zip((first, second), ends_EX, strict=True):
    expected = example.tokens_L.tolist()
    assert tokens_L[start:end].tolist() == expected
    assert tokens_L[start:inputs_end].tolist() == expected[: example.ends[0]]
    assert tokens_L[prompt_end:end].tolist() == expected[example.ends[1] :]
    start = end


def test_a_part_without_documents_keeps_ends_and_parts_together(tmp_path):
  path = write(tmp_path, [], [question([10], [3], [20])])

  found = stream.read(path)

  assert [len(tokens_L) for tokens_L in found.parts] == [0, 4]
  assert [ends_EX.tolist() for ends_EX in found.ends] == [[], [[1, 2, 4]]]
  stream.verify(path)


def test_a_part_that_is_written_again_is_the_same_file(tmp_path):
  for name in ('first', 'second'):
    (tmp_path / name).mkdir()
    stream.write_part(tmp_path / name, 0, SIZE, [question([10], [3], [20]), document(5)][:1])

  assert contents(tmp_path / 'first') == contents(tmp_path / 'second')


def test_a_part_that_is_there_is_left_as_it_is(tmp_path):
  first = stream.write_part(tmp_path, 3, SIZE, [document(5)])
  before = contents(tmp_path)

  second = stream.write_part(tmp_path, 3, SIZE, [document(6, 7)])

  assert second == first
  assert contents(tmp_path) == before


def test_a_failure_while_writing_leaves_nothing(tmp_path):
  def documents():
    yield document(5)
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    stream.write_part(tmp_path, 0, SIZE, documents())

  assert list(tmp_path.iterdir()) == []


def test_a_kill_while_writing_leaves_no_part_and_does_not_disturb_the_next(tmp_path):
  work, path = tmp_path / 'work', tmp_path / 's'
  work.mkdir()
  code = f"""if True:
    import os, pathlib, signal
    import numpy as np
    from lex_fire.data import stream
    def documents():
      yield stream.Document(np.array([5, 1]), 1)
      os.kill(os.getpid(), signal.SIGKILL)
    stream.write_part(pathlib.Path({str(work)!r}), 0, {SIZE}, documents())
  """

  killed = subprocess.run([sys.executable, '-c', code])
  left = [file.name for file in work.iterdir()]
  counts = stream.write_part(work, 0, SIZE, [document(7)])
  stream.finish(work, path, IDENTITY, [counts])

  assert killed.returncode == -signal.SIGKILL
  assert len(left) == 1
  assert left[0].startswith('.part-00000.npy.')
  assert stream.read(path).parts[0].tolist() == [7, EOS]
  assert sorted(file.name for file in path.iterdir()) == ['manifest.json', 'part-00000.npy']


def test_a_stream_is_readable_by_whom_the_umask_allows(tmp_path):
  (tmp_path / 'plain').touch()
  path = write(tmp_path, [document(7)])

  assert (path / 'part-00000.npy').stat().st_mode == (tmp_path / 'plain').stat().st_mode


def test_a_kill_before_the_last_step_leaves_the_parts_to_be_finished(tmp_path, monkeypatch):
  (tmp_path / 'work').mkdir()
  counts = stream.write_part(tmp_path / 'work', 0, SIZE, [document(5)])
  with monkeypatch.context() as patch:
    patch.setattr(os, 'replace', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
      stream.finish(tmp_path / 'work', tmp_path / 's', IDENTITY, [counts])

  again = stream.write_part(tmp_path / 'work', 0, SIZE, [document(6)])
  stream.finish(tmp_path / 'work', tmp_path / 's', IDENTITY, [again])

  assert stream.read(tmp_path / 's').parts[0].tolist() == [5, EOS]


def remove_tokens(path):
  (path / 'part-00000.npy').unlink()


def cut_tokens(path):
  os.truncate(path / 'part-00000.npy', 130)


def overwrite_header(path):
  (path / 'part-00000.npy').write_bytes(bytes(138))


def cut_ends(path):
  os.truncate(path / 'part-00000.ends.npy', 130)


def remove_ends(path):
  (path / 'part-00000.ends.npy').unlink()


def remove_manifest(path):
  (path / 'manifest.json').unlink()


def cut_manifest(path):
  os.truncate(path / 'manifest.json', 9)


def list_manifest(path):
  (path / 'manifest.json').write_text('[]')


def bare_manifest(path):
  (path / 'manifest.json').write_text('{"parts": [{"file": "part-00000.npy"}]}')


def empty_manifest(path):
  (path / 'manifest.json').write_text('{}')


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (remove_tokens, "s/part-00000.npy' is unreadable: No such file .*; delete its directory"),
    (cut_tokens, "s/part-00000.npy' has 130 bytes, not 138; delete its directory"),
    (overwrite_header, "s/part-00000.npy' is no array; delete its directory"),
    (cut_ends, "s/part-00000.ends.npy' has 130 bytes, not 152; delete its directory"),
    (remove_ends, "s/part-00000.ends.npy' is unreadable: No such file .*; delete its directory"),
    (remove_manifest, "s/manifest.json' is unreadable: No such file .*; delete its directory"),
    (cut_manifest, "s/manifest.json' is not JSON: .*; delete its directory"),
    (list_manifest, "s/manifest.json' is not a manifest of a stream; delete its directory"),
    (bare_manifest, "s/manifest.json' is not a manifest of a stream; delete its directory"),
    (empty_manifest, "s/manifest.json' names no parts; delete its directory"),
  ],
)
def test_a_damaged_stream_is_refused_by_file(tmp_path, damage, message):
  path = write(tmp_path, [question([5], [3], [6, 7])])
  stream.verify(path)
  damage(path)

  with pytest.raises(errors.UserError, match=message):
    stream.check(path, IDENTITY)


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('part-00001.npy', "part-00001.npy' has other tokens than its manifest says; delete"),
    ('part-00001.ends.npy', "part-00001.ends.npy' has other ends than its manifest says; delete"),
  ],
)
def test_another_byte_of_the_same_size_is_seen(tmp_path, name, message):
  path = write(tmp_path, [question([5], [3], [6])], [question([5], [3], [7])])
  content = (path / name).read_bytes()
  (path / name).write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])

  with pytest.raises(errors.UserError, match=message):
    stream.verify(path)
  later(path / name)
  with pytest.raises(errors.UserError, match=message):
    stream.check(path, IDENTITY)


def later(file):
  """Makes a file one that was written to a second later."""
  time_ns = file.stat().st_mtime_ns + 10**9
  os.utime(file, ns=(time_ns, time_ns))


def test_what_was_written_to_since_the_manifest_is_read_once_and_nothing_else(
  tmp_path, monkeypatch
):
  path = write(tmp_path, [document(5, 6)], [document(7, 8)])
  read = []
  sha256 = stream._sha256
  monkeypatch.setattr(stream, '_sha256', lambda array: read.append(array.tolist()) or sha256(array))

  stream.check(path, IDENTITY)
  assert not read
  (path / 'part-00001.npy').write_bytes((path / 'part-00001.npy').read_bytes())  # as a copy is
  os.utime(path / 'manifest.json', ns=(0, 0))
  os.utime(path / 'part-00000.npy', ns=(0, 0))
  stream.check(path, IDENTITY)
  assert read == [[7, 8, 1]]
  stream.check(path, IDENTITY)
  assert len(read) == 1


def test_a_stream_of_another_identity_is_refused(tmp_path):
  path = write(tmp_path, [document(7)])

  with pytest.raises(errors.UserError, match="s/manifest.json' has format=1, not 2"):
    stream.check(path, IDENTITY | {'format': 2})
  vocabulary = IDENTITY['vocabulary'] | {'name': 'sentencepiece-0123'}
  with pytest.raises(errors.UserError, match="'name': 'bytes'.*, not .*'sentencepiece-0123'"):
    stream.check(path, IDENTITY | {'vocabulary': vocabulary})


def test_a_stream_of_no_document_is_refused(tmp_path):
  with pytest.raises(errors.UserError, match="stream 's' would have no document"):
    write(tmp_path, [], [])


def test_a_part_in_a_directory_that_is_not_there_is_refused(tmp_path):
  with pytest.raises(errors.UserError, match=f"cannot write in '{tmp_path}/none': No such file"):
    stream.write_part(tmp_path / 'none', 0, SIZE, [document(5)])


def test_a_full_disk_is_said_and_loses_no_finished_part(tmp_path, monkeypatch):
  stream.write_part(tmp_path, 0, SIZE, [document(5)])
  before = contents(tmp_path)

  def documents():
    yield document(6)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  with pytest.raises(errors.UserError, match=f"in '{tmp_path}': No space left .*; make room"):
    stream.write_part(tmp_path, 1, SIZE, documents())

  assert contents(tmp_path) == before


def test_a_stream_that_cannot_be_moved_to_its_place_is_said(tmp_path):
  (tmp_path / 's').mkdir()
  (tmp_path / 's' / 'other').touch()

  with pytest.raises(errors.UserError, match=f"cannot write in '{tmp_path}': Directory not empty"):
    write(tmp_path, [document(5)])
