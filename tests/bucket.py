"""A bucket of Google Cloud Storage on this machine: as much of its JSON API as clients here use.

https://cloud.google.com/storage/docs/json_api/v1: objects are written whole, listed by prefix, read
in ranges, copied and deleted, and have a generation, which conditions are about.
"""

import email
import http.server
import itertools
import json
import re
import sys
import threading
import urllib.parse

NAME = 'bucket'


class Handler(http.server.BaseHTTPRequestHandler):
  """Serves the objects of its server."""

  protocol_version = 'HTTP/1.1'

  def log_message(self, *arguments):
    """Says nothing."""

  def _reply(self, status, body=b'', kind='application/json', **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    self.send_response(status)
    for name, value in {'Content-Type': kind, 'Content-Length': len(data), **headers}.items():
      self.send_header(name.replace('_', '-'), str(value))
    self.end_headers()
    self.wfile.write(data)

  def _body(self):
    return self.rfile.read(int(self.headers.get('Content-Length', 0)))

  def _request(self):
    """Returns the parts of the path after the bucket, and the query."""
    url = urllib.parse.urlsplit(self.path)
    path = re.sub(rf'^.*/storage/v1/b/{NAME}', '', url.path)
    return [urllib.parse.unquote(part) for part in path.split('/')[1:]], dict(
      urllib.parse.parse_qsl(url.query)
    )

  def do_GET(self):
    """Describes the bucket, lists objects, or returns one or its description."""
    parts, query = self._request()
    objects = self.server.objects
    if not parts:
      self._reply(200, {'kind': 'storage#bucket', 'name': NAME, 'location': 'HERE'})
    elif parts == ['o']:
      self._reply(200, self.server.listing(query))
    elif parts[1] not in objects:
      self._reply(404, {'error': {'code': 404, 'message': 'none'}})
    elif query.get('alt') != 'media':
      self._reply(200, self.server.about(parts[1]))
    else:
      self._media(*objects[parts[1]])

  def _media(self, generation, data):
    first, last = 0, len(data) - 1
    asked = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
    headers = {'x_goog_generation': generation}
    if not asked or not data:
      self._reply(200, data, 'application/octet-stream', **headers)
      return
    first, last = int(asked[1]), min(int(asked[2] or last), last)
    headers['Content_Range'] = f'bytes {first}-{last}/{len(data)}'
    self._reply(206, data[first : last + 1], 'application/octet-stream', **headers)

  def do_POST(self):
    """Writes an object, or copies one, or deletes many."""
    body = self._body()
    if self.server.is_read_only:
      self._reply(403, {'error': {'code': 403, 'message': 'the project is over its quota'}})
      return
    if self.path.startswith('/batch'):
      self._batch(body)
      return
    if self.path.startswith('/part/'):
      part = re.fullmatch(r'bytes (?:0-\d+|\*)/\d+', self.headers['Content-Range'])
      assert part, 'an upload of more than one part'
      self._reply(200, self.server.put(urllib.parse.unquote(self.path.split('/')[-1]), body))
      return
    parts, query = self._request()
    if {'moveTo', 'rewriteTo'} & set(parts):
      self._copy(parts[2], parts[1], parts[-1])
      return
    name = query.get('name')
    if query['uploadType'] == 'resumable':
      name = urllib.parse.quote(name or json.loads(body)['name'], safe='')
      self._reply(200, Location=f'{self.server.address}/part/{name}')
      return
    if query['uploadType'] == 'multipart':
      kind = f'Content-Type: {self.headers["Content-Type"]}\n\n'.encode()
      metadata, content = email.message_from_bytes(kind + body).get_payload()
      name = name or json.loads(metadata.get_payload())['name']
      body = content.get_payload(decode=True)
    wanted = query.get('ifGenerationMatch')
    if wanted is not None and int(wanted) != self.server.objects.get(name, (0,))[0]:
      self._reply(412, {'error': {'code': 412, 'message': 'another generation'}})
    else:
      self._reply(200, self.server.put(name, body))

  do_PUT = do_POST

  def _copy(self, how, source, target):
    objects = self.server.objects
    if source not in objects:
      self._reply(404, {'error': {'code': 404, 'message': 'none'}})
      return
    about = self.server.put(target, objects[source][1])
    if how == 'moveTo':
      del objects[source]
      self._reply(200, about)
    else:
      self._reply(200, {'done': True, 'resource': about})

  def _batch(self, body):
    kind = self.headers['Content-Type']
    requests = email.message_from_bytes(f'Content-Type: {kind}\n\n'.encode() + body).get_payload()
    replies = []
    for request in requests:
      name = re.search(r'DELETE \S*/o/(\S+?)(?:\?\S*)? HTTP', request.as_string())[1]
      status = 204 if self.server.objects.pop(urllib.parse.unquote(name), None) else 404
      replies.append(
        f'--b\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status} -\r\n\r\n\r\n'
      )
    self._reply(200, ''.join([*replies, '--b--']).encode(), 'multipart/mixed; boundary=b')

  def do_DELETE(self):
    """Deletes an object."""
    self._body()
    parts, _ = self._request()
    self._reply(204 if self.server.objects.pop(parts[1], None) else 404)


class Bucket(http.server.ThreadingHTTPServer):
  """Serves an empty bucket of `NAME` at `address`; a context.

  Attributes:
    address: http://HOST:PORT.
    objects: {name: (generation, content)}.
    is_read_only: whether it refuses all that is written.
  """

  daemon_threads = True

  def __init__(self):
    super().__init__(('localhost', 0), Handler)
    self.address = f'http://localhost:{self.server_port}'
    self.objects: dict[str, tuple[int, bytes]] = {}
    self.is_read_only = False
    self._generations, self._lock = itertools.count(1), threading.Lock()

  def handle_error(self, request, client_address):
    """Says nothing of clients that have gone."""
    if not isinstance(sys.exc_info()[1], ConnectionError):
      super().handle_error(request, client_address)

  def put(self, name, data):
    with self._lock:
      self.objects[name] = (next(self._generations), data)
    return self.about(name)

  def about(self, name):
    generation, data = self.objects[name]
    link = f'{self.address}/download/storage/v1/b/{NAME}/o/{urllib.parse.quote(name, safe="")}'
    return {
      **{'kind': 'storage#object', 'name': name, 'bucket': NAME, 'size': str(len(data))},
      **{'generation': str(generation), 'metageneration': '1', 'mediaLink': f'{link}?alt=media'},
      **{'updated': '2000-01-01T00:00:00Z', 'timeCreated': '2000-01-01T00:00:00Z'},
    }

  def listing(self, query):
    prefix, delimiter = query.get('prefix', ''), query.get('delimiter')
    items, prefixes = [], set()
    for name in sorted(list(self.objects)):
      rest = name.removeprefix(prefix)
      if not name.startswith(prefix) or not query.get('startOffset', '') <= name:
        continue
      if 'endOffset' in query and name >= query['endOffset']:
        continue
      if delimiter and delimiter in rest:
        prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
      else:
        items.append(self.about(name))
    return {'kind': 'storage#objects', 'items': items, 'prefixes': sorted(prefixes)}

  def __enter__(self):
    threading.Thread(target=self.serve_forever, daemon=True).start()
    return self

  def __exit__(self, *error):
    self.shutdown()
    self.server_close()
