"""A bucket on this machine: as much of Google Cloud Storage's JSON API as gcsfs, TensorStore and
google-cloud-storage use, with its rules: whole objects, generations, conditions, lists by prefix.

    with Store() as store:
      subprocess.run(..., env=os.environ | store.env)

Reference: https://cloud.google.com/storage/docs/json_api/v1. Knows any bucket but `missing`.
"""

import base64
import contextlib
import datetime
import email
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit


class _Server(ThreadingHTTPServer):
  daemon_threads = True

  def handle_error(self, request: Any, client_address: Any) -> None:
    """Clients that are killed leave connections behind."""


class Thing(NamedTuple):
  """An object as it is stored."""

  data: bytes
  generation: int
  time: str


class Store:
  """The server, and what it holds by (bucket, name).

  Tests may break it: every request is refused with the HTTP code `refusal`, if that is not 0.
  """

  def __init__(self):
    self.objects: dict[tuple[str, str], Thing] = {}
    self.requests: list[str] = []  # method and path of each
    self.refusal = 0
    self.lock = threading.RLock()
    self.uploads: dict[str, dict[str, Any]] = {}
    self._generations = itertools.count(1)
    self._server = _Server(("127.0.0.1", 0), type("Bound", (_Handler,), {"store": self}))
    self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

  @property
  def env(self) -> dict[str, str]:
    """Points the clients here."""
    url = f"http://127.0.0.1:{self._server.server_port}"
    return {
      "STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url, "GOOGLE_CLOUD_PROJECT": "test",
      "GCE_METADATA_ROOT": "127.0.0.1:1", "NO_GCE_CHECK": "true",
      "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }  # fmt: skip

  def __enter__(self) -> "Store":
    self._thread.start()
    return self

  def __exit__(self, *_: Any) -> None:
    self._server.shutdown()
    self._server.server_close()

  def names(self, bucket: str = "yard", prefix: str = "") -> list[str]:
    with self.lock:
      return sorted(n for b, n in self.objects if b == bucket and n.startswith(prefix))

  def read(self, name: str, bucket: str = "yard") -> bytes:
    return self.objects[bucket, name].data

  def put(self, name: str, data: bytes, bucket: str = "yard") -> Thing:
    with self.lock:
      time = datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z")
      thing = Thing(data, next(self._generations), time)
      self.objects[bucket, name] = thing
      return thing


class _RefusedError(Exception):
  pass


class _Handler(BaseHTTPRequestHandler):
  store: Store
  protocol_version = "HTTP/1.1"

  def log_message(self, *_: Any) -> None:
    pass

  def _answer(self) -> None:
    length = int(self.headers.get("Content-Length") or 0)
    body = self._chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else (
      self.rfile.read(length)
    )  # fmt: skip
    self.store.requests.append(f"{self.command} {self.path}")
    if self.store.refusal:
      self._send(self.store.refusal, b"{}")
      return
    try:
      with self.store.lock:
        self._send(*_reply(self.store, self.command, self.path, dict(self.headers), body))
    except _RefusedError as e:
      self._send(
        int(str(e)), json.dumps({"error": {"code": int(str(e)), "message": "no"}}).encode()
      )

  do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _answer

  def _chunks(self) -> bytes:
    def parts() -> Iterator[bytes]:
      while size := int(self.rfile.readline(), 16):
        yield self.rfile.read(size)
        self.rfile.readline()
      self.rfile.readline()

    return b"".join(parts())

  def _send(self, code: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
    if code in (204, 304):
      body = b""
    with contextlib.suppress(ConnectionError):
      self.send_response(code)
      for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
        self.send_header(name, value)
      if code not in (204, 304):
        self.send_header("Content-Length", str(len(body)))
      self.end_headers()
      self.wfile.write(body)


def _reply(store: Store, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple:
  """(code, body, headers) of one request; also of those inside a batch."""
  url = urlsplit(path)
  query = {k: v[0] for k, v in parse_qs(url.query).items()}
  headers = {k.lower(): v for k, v in headers.items()}
  if "/b/missing/" in f"{url.path}/":
    raise _RefusedError(404)
  if url.path.startswith("/batch"):
    return _batch(store, headers, body)
  if match := re.fullmatch(r"/upload(?:/storage/v1)?/b/([^/]+)/o/?", url.path):
    return _upload(store, method, match[1], query, headers, body)
  if match := re.fullmatch(
    r"(?:/storage/v1|/download/storage/v1)?/b/([^/]+)(?:/o(?:/(.*))?)?", url.path
  ):
    bucket, name = match[1], match[2] and unquote(match[2])
    if "/o" not in url.path.removeprefix("/storage/v1").removeprefix(f"/b/{bucket}"):
      return 200, _json({"kind": "storage#bucket", "name": bucket, "id": bucket, "location": "US"})
    if not name:
      return 200, _json(_list(store, bucket, query))
    if match := re.fullmatch(r"(.*)/(copyTo|rewriteTo|moveTo)(?:/b/([^/]+))?/o/(.*)", match[2]):
      return _copy(store, bucket, query, *match.groups())
    return _object(store, method, bucket, name, query, headers)
  raise _RefusedError(404)


def _copy(store, bucket, query, name, how, to_bucket, to_name) -> tuple:
  name, to_name, to_bucket = unquote(name), unquote(to_name), to_bucket or bucket
  made = store.put(to_name, _get(store, bucket, name, query).data, to_bucket)
  if how == "moveTo":
    del store.objects[bucket, name]
  facts = _facts(to_bucket, to_name, made)
  return 200, _json({"done": True, "resource": facts, **facts})


def _object(store, method, bucket, name, query, headers) -> tuple:
  thing = _get(store, bucket, name, query)
  if method == "DELETE":
    del store.objects[bucket, name]
    return (204,)
  facts = _facts(bucket, name, thing)
  if query.get("alt") != "media":
    return 200, _json(facts)
  data, code = thing.data, 200
  extra = {"x-goog-generation": str(thing.generation), "ETag": facts["etag"]}
  if match := re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("range", "")):
    size = len(data)
    begin = int(match[1]) if match[1] else max(0, size - int(match[2]))
    end = min(size, int(match[2]) + 1) if match[1] and match[2] else size
    if begin >= size:
      raise _RefusedError(416)
    data, code = data[begin:end], 206
    extra["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
  return code, data, {"Content-Type": "application/octet-stream", **extra}


def _get(store: Store, bucket: str, name: str, query: dict[str, str]) -> Thing:
  thing = store.objects.get((bucket, name))
  _check(thing, query)
  if thing is None:
    raise _RefusedError(404)
  return thing


def _check(thing: Thing | None, query: dict[str, str]) -> None:
  now = thing.generation if thing else 0
  if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != now:
    raise _RefusedError(412)
  if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == now:
    raise _RefusedError(304)


def _list(store: Store, bucket: str, query: dict[str, str]) -> dict[str, Any]:
  prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
  after, most = query.get("pageToken", ""), int(query.get("maxResults", 1000))
  items, prefixes = [], set()
  for name in store.names(bucket, prefix):
    rest = name[len(prefix) :]
    if not query.get("startOffset", "") <= name or (
      "endOffset" in query and name >= query["endOffset"]
    ):
      continue
    if delimiter and delimiter in rest:
      prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
    elif name > after:
      items.append(_facts(bucket, name, store.objects[bucket, name]))
  found = {"kind": "storage#objects", "items": items[:most], "prefixes": sorted(prefixes)}
  return found | ({"nextPageToken": items[most - 1]["name"]} if len(items) > most else {})


def _upload(store, method, bucket, query, headers, body) -> tuple:
  kind = query.get("uploadType")
  if kind == "resumable":
    return _resumable(store, method, bucket, query, headers, body)
  name = query.get("name")
  if kind == "multipart":
    head = f"Content-Type: {headers['content-type']}\n\n".encode()
    facts, data = email.message_from_bytes(head + body).get_payload()
    name, body = json.loads(facts.get_payload())["name"], data.get_payload(decode=True)
  return _store(store, bucket, name, query, body)


def _resumable(store, method, bucket, query, headers, body) -> tuple:
  if method == "POST" and "upload_id" not in query:
    name = query.get("name") or json.loads(body)["name"]
    key = str(len(store.uploads))
    store.uploads[key] = {"name": name, "query": query, "data": b""}
    there = f"http://{headers['host']}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={key}"
    return 200, b"{}", {"Location": there}
  upload = store.uploads[query["upload_id"]]
  upload["data"] += body
  if re.fullmatch(r"bytes .*/\*", headers.get("content-range", "")):
    return 308, b"", {"Range": f"bytes=0-{len(upload['data']) - 1}"}
  return _store(store, bucket, upload["name"], upload["query"], upload["data"])


def _store(store, bucket, name, query, data) -> tuple:
  _check(store.objects.get((bucket, name)), query)
  return 200, _json(_facts(bucket, name, store.put(name, data, bucket)))


def _batch(store, headers, body) -> tuple:
  head = f"Content-Type: {headers['content-type']}\n\n".encode()
  parts = []
  for part in email.message_from_bytes(head + body).get_payload():
    method, path, _ = part.get_payload().split("\r\n")[0].split(" ", 2)
    try:
      code = _reply(store, method, path, {}, b"")[0]
    except _RefusedError as e:
      code = int(str(e))
    about = f"<response-{part['Content-ID'].strip('<>')}>"
    head = f"--x\r\nContent-Type: application/http\r\nContent-ID: {about}\r\n\r\n"
    parts.append(f"{head}HTTP/1.1 {code} -\r\n\r\n")
  return (
    200,
    ("\r\n".join(parts) + "\r\n--x--").encode(),
    {"Content-Type": "multipart/mixed; boundary=x"},
  )


def _facts(bucket: str, name: str, thing: Thing) -> dict[str, Any]:
  digest = base64.b64encode(hashlib.md5(thing.data).digest()).decode()
  return {
    "kind": "storage#object", "bucket": bucket, "name": name, "size": str(len(thing.data)),
    "generation": str(thing.generation), "metageneration": "1", "md5Hash": digest, "etag": digest,
    "updated": thing.time, "timeCreated": thing.time, "id": f"{bucket}/{name}/{thing.generation}",
  }  # fmt: skip


def _json(value: Any) -> bytes:
  return json.dumps(value).encode()
