"""Documents from every kind of file, and the sentence for every kind of bad one."""

import gzip
import json
import sys

import fsspec
import pytest
from fsspec.registry import known_implementations

from experiments.config import ConfigError
from experiments.data import files
from experiments.data.sources import pydoc_documents, text_documents


def jsonl(*records):
  return "".join(json.dumps(record) + "\n" for record in records).encode()


def test_pydoc_is_ordered_text_of_known_content():
  documents = list(pydoc_documents())
  assert documents == list(pydoc_documents())
  assert len(documents) > 70
  assert 400_000 < sum(len(text.encode()) for text in documents) < 700_000
  assert documents[0].startswith('The "assert" statement')


def test_plain_and_gzip_files_are_read_in_sorted_order(tmp_path):
  (tmp_path / "b.txt").write_bytes("zwei\r\nZeilen \u00e9".encode())
  (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one"))
  (tmp_path / "c.jsonl").write_bytes(jsonl({"text": "x"}) + b"\n  \n" + jsonl({"text": "y\n"}))
  (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(jsonl({"text": "\U0001f600"})))
  (tmp_path / "folder").mkdir()
  found = list(text_documents(f"{tmp_path}/*"))
  assert found == ["one", "zwei\r\nZeilen \u00e9", "x", "y\n", "\U0001f600"]
  assert list(text_documents(f"{tmp_path}/a.txt.gz")) == ["one"]


def test_recursive_glob_and_other_field(tmp_path):
  (tmp_path / "x" / "y").mkdir(parents=True)
  (tmp_path / "x" / "y" / "a.jsonl").write_bytes(jsonl({"body": "deep", "text": 3}))
  assert list(text_documents(f"{tmp_path}/**/*.jsonl", "body")) == ["deep"]


BAD = {
  "empty.txt": (b"", "empty.txt is empty"),
  "empty.jsonl": (b"\n\n", "empty.jsonl is empty"),
  "zero.txt": (b"abc\0def", "zero.txt is binary, not text: NUL at byte 3"),
  "latin.txt": (b"caf\xe9 au lait", "latin.txt is not UTF-8 text: byte 3"),
  "cut.jsonl": (jsonl({"text": "a"}) + b'{"text": "b', "cut.jsonl line 2 is not JSON"),
  "field.jsonl": (
    jsonl({"text": "a"}, {"body": "b", "id": 1}),
    r"field.jsonl line 2 has no text in field 'text' \(it has body, id\)",
  ),
  "number.jsonl": (jsonl({"text": 7}), "number.jsonl line 1 has no text in field 'text'"),
  "list.jsonl": (b"[1]\n", r"list.jsonl line 1 has no text .*it has list"),
  "zero.jsonl": (jsonl({"text": "a"}) + b"\0\n", "zero.jsonl line 2 is binary"),
  "half.jsonl": (rb'{"text": "\ud83d"}', "half.jsonl line 1 holds a lone surrogate"),
  "plain.txt.gz": (b"not compressed", "plain.txt.gz is not whole gzip"),
  "short.txt.gz": (gzip.compress(b"text" * 999)[:-9], "short.txt.gz is not whole gzip"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_by_name(tmp_path, name):
  content, message = BAD[name]
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ConfigError, match=message) as caught:
    list(text_documents(f"{tmp_path}/{name}"))
  assert "\n" not in str(caught.value)


def test_no_match_is_refused(tmp_path):
  with pytest.raises(ConfigError, match=r"no file matches .*/\*\.txt"):
    list(text_documents(f"{tmp_path}/*.txt"))


def test_unreadable_file_is_refused(tmp_path, monkeypatch):
  (tmp_path / "a.txt").write_bytes(b"text")

  def refuse(self, path, mode, **kwargs):
    raise PermissionError(13, "Permission denied", path)

  # The tests may run as root, whom no file mode stops.
  monkeypatch.setattr(fsspec.implementations.local.LocalFileSystem, "open", refuse)
  with pytest.raises(ConfigError, match=r"a\.txt can't be read: Permission denied"):
    list(text_documents(f"{tmp_path}/a.txt"))


def test_urls_are_read_like_paths():
  fs = fsspec.filesystem("memory")
  fs.pipe({"/sources/b.txt": b"second", "/sources/a.txt.gz": gzip.compress(b"first")})
  assert list(text_documents("memory://sources/*")) == ["first", "second"]


def test_bucket_without_its_backend_names_the_package(monkeypatch):
  entry = {"class": "no_such_module.Files", "err": "Please install gcsfs to access Google Storage"}
  monkeypatch.setitem(known_implementations, "gs", entry)
  monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "gs", raising=False)
  with pytest.raises(ConfigError, match=r"gs://bucket/\*\.txt can't be reached: .*gcsfs"):
    list(text_documents("gs://bucket/*.txt"))
  with pytest.raises(ConfigError, match="nosuch://x can't be reached"):
    files.find("nosuch://x")


def test_a_write_that_fails_leaves_nothing_visible(tmp_path):
  path = tmp_path / "out"
  with pytest.raises(KeyError), files.open_atomic(str(path)) as stream:
    stream.write(b"half")
    raise KeyError("killed here")
  assert not path.exists()
  files.write_atomic(str(path), b"whole")
  assert path.read_bytes() == b"whole"
  assert [p.name for p in tmp_path.iterdir()] == ["out"]
  with pytest.raises(ConfigError, match="can't be written"):
    files.write_atomic(str(path / "below_a_file"), b"x")
