"""Documents read from files: on any path, under any name, and from whatever corpora hold."""

import collections
import gzip
import http.server
import json
import threading
import tracemalloc
import zipfile

import fsspec
import pytest

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data import documents, json_lines, text_file
from memoryllm_jax.data.text_file import TextFile

LINE = b'{"text": "a"}\n'


def texts(pattern, **options):
    return [text for path in documents.expand(str(pattern)) for text, _ in documents.read(path, **options)]


def test_documents_are_read_from_urls(corpus):
    for part in (0, 1):
        with fsspec.open(f"memory://bucket/part-{part}.jsonl", "wb") as file:
            file.write(b"".join(open(corpus, "rb").readlines()[part::2]))
    assert documents.expand("memory://bucket/*.jsonl") == [f"memory:///bucket/part-{part}.jsonl" for part in (0, 1)]
    assert sorted(texts("memory://bucket/*.jsonl")) == sorted(texts(corpus))


def test_a_web_server_that_gives_no_length_is_read():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(LINE * 9)

        do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    pytest.importorskip("aiohttp")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.jsonl?download=true"
        assert texts(url) == ["a"] * 9 and documents.size(url) is None
        server.shutdown()


def test_the_embedded_corpus_has_megabytes_of_text():
    found = texts("embedded")
    assert len(found) > 300 and sum(map(len, found)) > 5_000_000


def test_names_of_any_form_and_folders_and_archives_are_read(tmp_path):
    for name in ("a[1],b.jsonl", "x,y/a.jsonl", "x,y/deep/b.jsonl", "x,y/.hidden/c.jsonl", "x,y/README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(LINE)
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("a.jsonl", LINE)
        archive.writestr("b.jsonl.gz", gzip.compress(LINE, mtime=0))
    folder = [f"{tmp_path}/x,y/a.jsonl", f"{tmp_path}/x,y/deep/b.jsonl"]
    assert documents.expand(f"{tmp_path}/x,y,{tmp_path}/a[1],b.jsonl") == [*folder, f"{tmp_path}/a[1],b.jsonl"]
    assert documents.expand(f"{tmp_path}/x,y/*.jsonl,{tmp_path}/x,y") == folder
    archived = f"zip://*.jsonl*::{tmp_path}/c.zip"
    assert documents.expand(archived) == [f"zip://{name}::{tmp_path}/c.zip" for name in ("a.jsonl", "b.jsonl.gz")]
    assert texts(archived) == ["a", "a"]
    with pytest.raises(UserError, match=r"c.zip: expected a name .*; name files in an archive as in zip://\*.jsonl::"):
        documents.expand(f"{tmp_path}/c.zip")


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("a.jsonl", b"\xef\xbb\xbf" + LINE, ["a"]),
        ("a.txt", b"\xef\xbb\xbfabc", ["abc"]),
        ("a.txt.gz", gzip.compress(b"\xef\xbb\xbfabc", mtime=0), ["abc"]),
        (
            "a.jsonl.gz",
            gzip.compress(LINE, mtime=0) + bytes(600) + gzip.compress(LINE, mtime=0) + bytes(2**20),
            ["a", "a"],
        ),
        ("a.jsonl.gz", b"", []),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), []),
        ("a.parquet", b"", []),
        ("a.txt", b"", []),
        ("a.jsonl", b'{"text": "a", "n": %s}' % (b"9" * 5000), ["a"]),
        ("a.jsonl", b'{"text": "NaN \\\\ud800", "n": [NaN, "\\ud800", -Infinity]}', ["NaN \\ud800"]),
        ("a.jsonl", b'{"t\\u0065xt": "\\ud83d\\ude00", "\xff": "\xff"}', ["\U0001f600"]),
    ],
)
def test_what_corpora_hold_is_read(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    assert texts(tmp_path / name) == expected


@pytest.mark.parametrize("key", ["class", "a b", 'a"b', "a\\b", "é", ""])
def test_a_text_key_may_be_any_name(tmp_path, key):
    (tmp_path / "a.jsonl").write_text(json.dumps({"other": 1, key: "a"}))
    assert texts(tmp_path / "a.jsonl", text_key=key) == ["a"]


@pytest.mark.parametrize(
    "line, message, cause",
    [
        (b'{"text": "half \\ud83d"}', "found half a surrogate pair at character 5", "half a surrogate pair"),
        (b'{"text": "\\udc00\\u0041"}', "found half a surrogate pair at character 0", "half a surrogate pair"),
        (b'{"text": "a", "n": %s}' % (b"[" * 100_000), "nested too deeply", "nested too deeply"),
        (b'{"text": {"a": 1}}', "expected text under 'text', found an object", "no text"),
        (b'{"text": "%s"}' % (b"a" * 2**21), "expected a line of at most 1,048,576 bytes", "too long"),
        (b'{"text": "\xed\xa0\x80"}', "expected UTF-8, found byte 0xed at offset 10", "not UTF-8"),
        (b'{"text": "a"', "invalid JSON: ", "invalid JSON"),
    ],
)
def test_bad_records_are_named_or_counted(tmp_path, monkeypatch, line, message, cause):
    monkeypatch.setattr(text_file, "MOST_BYTES", 2**20)
    (tmp_path / "a.jsonl").write_bytes(LINE + line + b"\n" + LINE)
    with pytest.raises(documents.RecordError, match=rf"a\.jsonl: line 2: .*{message}"):
        texts(tmp_path / "a.jsonl")
    skipped = collections.Counter()
    assert texts(tmp_path / "a.jsonl", skipped=skipped) == ["a", "a"] and skipped == {cause: 1}


def test_a_text_file_is_one_document_of_any_size_unless_a_small_file_becomes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(text_file, "MOST_BYTES", 2**20)
    (tmp_path / "a.txt").write_bytes(bytes(2**22))
    assert len(texts(tmp_path / "a.txt")[0]) == 2**22
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(bytes(2**22)))
    with pytest.raises(documents.RecordError, match=r"a.txt.gz: expected a document of at most 1,048,576 bytes"):
        texts(tmp_path / "a.txt.gz")


def test_blank_lines_are_counted(tmp_path):
    """Some chunks of the file hold nothing else, others a part of a line too."""
    (tmp_path / "a.jsonl").write_bytes(
        b" \n" * 2**20 + LINE + b"\r\n\n" * 2**19 + b'{"text": \n' + b"\n" * 2**21 + LINE + b" "
    )
    skipped = collections.Counter()
    assert texts(tmp_path / "a.jsonl", skipped=skipped) == ["a", "a"] and skipped == {"invalid JSON": 1}
    with pytest.raises(documents.RecordError, match=f"line {2**20 + 1 + 2**20 + 1}: invalid JSON"):
        texts(tmp_path / "a.jsonl")


def test_odd_values_of_a_line_are_replaced_in_little_memory():
    line = b'{"text": "a", "n": [%sNaN]}' % (b'"\\ud800",' * 10**4)
    tracemalloc.start()
    repaired, _ = json_lines._repaired(line)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert repaired == line.replace(b"d800", b"fffd").replace(b"NaN", b"0  ") and peak < 4 * len(line)


def test_zstd_is_decompressed_in_bounded_pieces_with_any_window(tmp_path):
    """`zstd --long=31` is read. A small file of 150 MB is not held in memory, nor is its only line."""
    zstandard = pytest.importorskip("zstandard")
    long = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=long).compressobj()
    (tmp_path / "long.jsonl.zst").write_bytes(stream.compress(LINE * 9) + stream.flush() + zstandard.compress(LINE))
    assert texts(tmp_path / "long.jsonl.zst") == ["a"] * 10
    stream = zstandard.ZstdCompressor().compressobj()
    path = tmp_path / "large.jsonl.zst"
    path.write_bytes(b"".join(stream.compress(bytes(10**7)) for _ in range(15)) + stream.flush())
    with open(path, "rb") as file:
        pieces = [len(piece) for piece in TextFile(str(path), file, None).chunks()]
    assert sum(pieces) == 15 * 10**7 and max(pieces) <= 2**20
    with pytest.raises(UserError, match="expected a line of at most 134,217,728 bytes"):
        texts(path)
