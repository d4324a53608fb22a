"""Reads documents from text files: C4's `.json.gz`, `.jsonl`, `.txt` or `.parquet`, on any path that fsspec reads.

A record is one line, one row or one .txt file. A record without text is an error, or is counted and skipped. Memory is
bounded by the largest document, whatever a compressed file holds: it is decompressed in pieces.
"""

import collections
import glob
import os
import re
import sysconfig
import urllib.parse
import zlib
from collections.abc import Callable, Generator, Iterator

import msgspec

from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import UserError, one_line, require

EMBEDDED = "embedded"  # the interpreter's own documentation topics and standard-library sources
# The largest record in bytes, as a line or .txt file holds it. A document is held in memory several times while it is
# tokenized, and a small compressed file may hold a line of gigabytes.
MOST_BYTES = 128 * 2**20
_FORMATS = ("json", "jsonl", "txt", "parquet")
_EXPECTED_NAME = "expected a name ending in .json, .jsonl, .txt (each also .gz or .zst) or .parquet"
_CHUNK = 1 << 20  # bytes read at a time
# zstd turns 4 bytes into up to 128 KiB. python-zstandard cannot bound its output, so the input is bounded: 512 bytes
# become at most 16 MiB.
_ZSTD_INPUT = 512
_ZSTD_WINDOW = 2**31  # the largest window, of `zstd --long=31`; a decoder's memory grows up to the size of the window
_ROWS = 64  # rows of a parquet file decoded at a time
_BOM = b"\xef\xbb\xbf"  # byte order mark that some programs write at the start of UTF-8 files
_HALF = "half a surrogate pair"  # such as \ud83d alone, which JSON can write and Unicode text cannot hold
_MOST_REPAIRED = 2**22  # bytes of a line in which odd values of other fields are replaced, which takes much memory
# A string of a JSON text, or a number that Python's json writes although JSON has none.
_STRING_OR_NAN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|-?Infinity|NaN', re.DOTALL)
# An escape in a JSON string; the group matches half of a surrogate pair.
_ESCAPE = re.compile(rb"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(u[dD][89a-fA-F]..)|.)", re.DOTALL)


class RecordError(UserError):
    """A record without text.

    Args:
      message: file, line and problem.
      cause: the kind of problem, under which skipped records are counted.
    """

    def __init__(self, message: str, cause: str = "no text"):
        super().__init__(message, cause)  # both, so that the error can be pickled
        self.cause = cause

    def __str__(self) -> str:
        return self.args[0]


def expand(pattern: str) -> list[str]:
    """Paths that match a comma-separated list of globs: glob by glob, sorted within each, without duplicates.

    A name that exists is no glob, even if it holds brackets or commas. A folder stands for all files below it whose
    format `read` knows.

    Raises: UserError if a part matches no file, or a file whose format `read` does not know.
    """
    paths = []
    parts = [part for part in pattern.split(",") if part] or [pattern]
    while parts:
        found, count = _first_match(parts)
        paths += found
        parts = parts[count:]
    return list(dict.fromkeys(paths))  # removes duplicates and keeps the order


def _first_match(parts: list[str]) -> tuple[list[str], int]:
    """Matches the first parts of a list; a part that matches nothing may be a name with a comma, cut in two.

    Returns: (paths, number of parts that the match takes).
    """
    error = None
    for count in range(1, len(parts) + 1):
        try:
            return _matches(",".join(parts[:count])), count
        except UserError as problem:
            error = error or problem  # the first part is the one to name
    raise error


def _matches(part: str) -> list[str]:
    if part == EMBEDDED:
        return [part]
    if not part:
        raise UserError("expected names of text files, found none")
    fs, path = storage.filesystem(part)
    with storage.user_errors(part):
        if fs.isfile(path):
            found = [path]
        elif fs.isdir(path):
            found = [name for name in _files(fs, fs.find(path, detail=True)) if is_text(name)]
            found = [name for name in found if "/." not in name.removeprefix(path)]  # nothing hidden
            if not found:
                raise UserError(f"{part}: expected a folder with text files: {_EXPECTED_NAME}, found none")
        else:
            found = _files(fs, fs.glob(path, detail=True))
    if not found:
        raise UserError(f"{part}: expected at least one file, found none")
    found = [_whole_name(part, fs, name) for name in found]
    for name in found:
        if not is_text(name):
            archive = re.search(r"\.(zip|tar)\b", name)
            hint = f"; name files in an archive as in {archive[1]}://*.jsonl::{name}" if archive else ""
            raise UserError(f"{name}: {_EXPECTED_NAME}{hint}")
    return found


def _files(fs, entries: dict[str, dict]) -> list[str]:
    # A symbolic link to a file has a type of its own, so fsspec is asked again.
    kinds = {name: info["type"] for name, info in entries.items()}
    return sorted(name for name, kind in kinds.items() if kind == "file" or (kind != "directory" and fs.isfile(name)))


def _whole_name(part: str, fs, name: str) -> str:
    """The name of a match in the form of the part: with the protocol, and with the rest of a chain of URLs."""
    if not storage.is_url(part):
        return name
    links = part.split("::")
    links[_place(links)] = fs.unstrip_protocol(name)
    return "::".join(links)


def _place(links: list[str]) -> int:
    """Which link of a chain of URLs names the file: in "simplecache::zip://a.jsonl::b.zip" it is zip://a.jsonl."""
    return next((i for i, link in enumerate(links) if "://" in link), len(links) - 1)


def is_text(pattern: str) -> bool:
    """Whether `read` knows the format, judging by the end of the name."""
    return pattern == EMBEDDED or _format(pattern) in _FORMATS


def size(path: str) -> int | None:
    """Size of the file in bytes, as stored (compressed). None: the server does not say. Raises: UserError."""
    if path == EMBEDDED:
        return sum(os.path.getsize(source) for source in _stdlib_sources())
    fs, name = storage.filesystem(path)
    with storage.user_errors(path):
        return fs.size(name)


def read(
    path: str, text_key: str = "text", skipped: collections.Counter | None = None
) -> Generator[tuple[str, int], None, None]:
    """Yields (document, bytes of the file read so far). Empty documents are left out; an empty file has none.

    Args:
      text_key: JSON field or parquet column that holds the text.
      skipped: counts the records without text, by cause. None: such a record is an error.
    Raises: RecordError that names file and line; UserError for a file that cannot be read.
    """
    if path == EMBEDDED:
        yield from _embedded()
        return
    readers = {"parquet": _parquet, "txt": _whole_text}
    fs, name = storage.filesystem(path)
    with storage.user_errors(path), fs.open(name, "rb") as file:
        source = _Source(path, file, skipped)
        for text in readers.get(_format(path), _json_lines)(source, text_key):
            if text:
                yield text, source.position


def _file_name(path: str) -> str:
    """The name of the file: without the archive that it lies in, and without the query of a web address."""
    links = path.split("::")
    name = links[_place(links)]
    return urllib.parse.urlsplit(name).path if name.startswith(("http://", "https://")) else name


def _format(path: str) -> str:
    """The ending of the name, without that of a compression: "json" for "a.json.gz"."""
    return _file_name(path).removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]


class _Source:
    """An open file of documents.

    Attributes:
      path: its name in messages.
      file: the file, as stored.
      position: bytes read so far.
    """

    def __init__(self, path: str, file, skipped: collections.Counter | None):
        self.path, self.file, self._skipped = path, file, skipped
        self.position = 0

    def bad(self, error: RecordError) -> None:
        """Counts a record without text. Raises: RecordError if such records are not skipped."""
        if self._skipped is None:
            raise error
        self._skipped[error.cause] += 1

    def stored(self) -> Iterator[bytes]:
        """The bytes of the file. Not by its `tell`: a stream over HTTP has none."""
        while data := self.file.read(_CHUNK):
            self.position += len(data)
            yield data

    def chunks(self) -> Iterator[bytes]:
        """The bytes of the file in pieces of bounded size, decompressed, without a byte order mark."""
        name, chunks = _file_name(self.path), self.stored()
        if name.endswith(".gz"):
            # 31 = 16 (expect a gzip header) + 15 (the largest window).
            chunks = self._decompressed(lambda: zlib.decompressobj(31), _gzip_pieces, zlib.error)
        elif name.endswith(".zst"):
            zstandard = require("zstandard", "prepare", self.path)
            # A decompressor may be used by one stream at a time.
            chunks = self._decompressed(
                lambda: zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj(),
                _zstd_pieces,
                zstandard.ZstdError,
            )
        return _without_bom(chunks)

    def _decompressed(self, new_stream: Callable, pieces: Callable, stream_error: type[Exception]) -> Iterator[bytes]:
        # Not by the libraries' own file readers: zstandard's does not notice a stream that ends too early.
        stream = None
        for data in self.stored():
            while data:
                if stream is None or stream.eof:
                    if stream is not None:
                        data = data.lstrip(b"\0")  # tapes and some programs fill the last block with zeros
                        if not data:
                            break
                    stream = new_stream()  # a file may hold several streams, one after another
                try:
                    data = yield from pieces(stream, data)
                except stream_error as error:
                    raise UserError(f"{self.path}: {self._damage(error)}") from error
        if stream is not None and not stream.eof:
            raise UserError(f"{self.path}: the compressed file is cut off after {self.position} bytes")

    def _damage(self, error: Exception) -> str:
        if "too much memory" in str(error):
            return f"expected a zstd window of at most 2 GiB (zstd --long=31), found a larger one near {self.position}"
        return f"damaged compressed data near byte {self.position}: {one_line(error)}"


def _gzip_pieces(stream, data: bytes) -> Generator[bytes, None, bytes]:
    """Yields what the data adds to a gzip stream. Returns: the bytes after the end of the stream."""
    while True:
        piece = stream.decompress(data, _CHUNK)
        yield piece
        data = stream.unconsumed_tail
        # A full piece may have left output inside the stream.
        if stream.eof or (not data and len(piece) < _CHUNK):
            return stream.unused_data


def _zstd_pieces(stream, data: bytes) -> Generator[bytes, None, bytes]:
    """Yields what the data adds to a zstd stream. Returns: the bytes after the end of the stream."""
    gathered, size = [], 0
    for start in range(0, len(data), _ZSTD_INPUT):
        gathered.append(stream.decompress(data[start : start + _ZSTD_INPUT]))
        size += len(gathered[-1])
        if size >= _CHUNK:  # the reader of lines works best on large pieces
            whole = b"".join(gathered)
            yield from (whole[i : i + _CHUNK] for i in range(0, size, _CHUNK))
            gathered, size = [], 0
        if stream.eof:
            yield b"".join(gathered)
            return stream.unused_data + data[start + _ZSTD_INPUT :]
    yield b"".join(gathered)
    return b""


def _without_bom(chunks: Iterator[bytes]) -> Iterator[bytes]:
    start = b""
    for chunk in chunks:
        start += chunk
        if len(start) >= len(_BOM):
            break
    yield start.removeprefix(_BOM)
    yield from chunks


def _whole_text(source: _Source, text_key: str) -> Iterator[str]:
    """A .txt file is one document."""
    pieces, size = [], 0
    try:
        for chunk in source.chunks():
            pieces.append(chunk)
            size += len(chunk)
            if size > MOST_BYTES:
                raise _too_long(source.path, "a document")
        yield _decode(b"".join(pieces), source.path)
    except RecordError as error:
        source.bad(error)


def _too_long(where: str, what: str) -> RecordError:
    return RecordError(f"{where}: expected {what} of at most {MOST_BYTES:,} bytes, found a longer one", "too long")


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes | None]:
    """Yields each line; None as soon as a line is longer than MOST_BYTES, whose rest is left out."""
    # Pieces of a line whose end is still to come. They are joined once: appending to one bytes object would copy a long
    # line again for each chunk.
    rest, size, is_too_long = [], 0, False
    for chunk in chunks:
        first, newline, tail = chunk.partition(b"\n")
        if not is_too_long:
            rest.append(first)
            size += len(first)
            if size > MOST_BYTES:
                rest, is_too_long = [], True
                yield None
        if newline:
            if not is_too_long:
                yield b"".join(rest)
            *whole, last = tail.split(b"\n")
            yield from whole
            rest, size, is_too_long = [last], len(last), False
    if not is_too_long:
        yield b"".join(rest)


def _json_lines(source: _Source, text_key: str) -> Iterator[str]:
    """Each line that is not blank is a JSON object with one document."""
    text_of = _LineDecoder(text_key)
    is_first = True
    for number, line in enumerate(_lines(source.chunks()), 1):
        where = f"{source.path}: line {number}"
        try:
            if line is None:
                raise _too_long(where, "a line")
            if is_first and line.lstrip()[:1] == b"[":
                raise UserError(
                    f"{where}: expected one JSON object a line, found a JSON array (jq -c '.[]' converts it)"
                )
            if line.strip():
                is_first = False
                yield text_of(line, where)
        except RecordError as error:
            source.bad(error)


class _LineDecoder:
    """Decodes the text of a line of JSON. The other fields are only skipped, so an odd value there does no harm."""

    def __init__(self, text_key: str):
        self._key = text_key
        if re.search(r'["\\\x00-\x1f]', text_key):  # msgspec takes no such name for a field
            self._fast, self._raw = None, msgspec.json.Decoder(dict[str, msgspec.Raw])
            return
        name = {"text": text_key}
        self._fast = msgspec.json.Decoder(msgspec.defstruct("Line", [("text", str)], rename=name))
        undecoded = [("text", msgspec.Raw, msgspec.Raw())]
        self._raw = msgspec.json.Decoder(msgspec.defstruct("RawLine", undecoded, rename=name))

    def __call__(self, line: bytes, where: str) -> str:
        """Raises: RecordError."""
        try:
            if self._fast is not None:
                return self._fast.decode(line).text
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            pass  # the cause is found below, or it lies in another field
        _decode(line, where)
        if len(line) > _MOST_REPAIRED:
            half = next((match for match in _ESCAPE.finditer(line) if match[1]), None)
            if half:
                raise RecordError(f"{where}: expected Unicode text, found {_HALF} at byte {half.start()}", _HALF)
            return self._text(line, where)
        # Half surrogates, and numbers that are not in JSON, do no harm in other fields. Two replacements show whether
        # the text itself has one.
        one, other = (self._text(_repaired(line, escape), where) for escape in (rb"\\ufffd", rb"\\ufffe"))
        if one != other:
            at = next(i for i, (a, b) in enumerate(zip(one, other)) if a != b)
            raise RecordError(f"{where}: expected Unicode text, found {_HALF} at character {at}", _HALF)
        return one

    def _text(self, line: bytes, where: str) -> str:
        """The text, by a decoder that leaves the other values undecoded. Raises: RecordError."""
        try:
            fields = self._raw.decode(line)
        except msgspec.ValidationError as error:
            raise RecordError(f"{where}: expected one JSON object, found {_kind(line)}", "not an object") from error
        except msgspec.DecodeError as error:
            problem = one_line(error).removeprefix("JSON is malformed: ")
            raise RecordError(f"{where}: invalid JSON: {problem}", "invalid JSON") from error
        except RecursionError as error:
            raise RecordError(f"{where}: expected JSON, found values nested too deeply", "nested too deeply") from error
        value = bytes(fields.get(self._key, b"") if isinstance(fields, dict) else fields.text)
        if not value.startswith(b'"'):
            raise RecordError(f"{where}: expected text under {self._key!r}, found {_kind(value)}")
        return msgspec.json.decode(value, type=str)


def _repaired(line: bytes, escape: bytes) -> bytes:
    """The line with `escape` for half surrogates, and null for numbers that JSON does not have."""

    def repair(match: re.Match) -> bytes:
        if not match[0].startswith(b'"'):
            return b"null"
        return _ESCAPE.sub(lambda found: found.expand(escape) if found[1] else found[0], match[0])

    return _STRING_OR_NAN.sub(repair, line)


def _kind(value: bytes) -> str:
    """What a JSON value is, for messages."""
    start = value.lstrip()[:1]
    kinds = {
        b"": "none",
        b"n": "null",
        b"t": "true",
        b"f": "false",
        b"[": "an array",
        b"{": "an object",
        b'"': "a string",
    }
    return kinds.get(start, "a number")


def _parquet(source: _Source, text_key: str) -> Iterator[str]:
    """Each row holds one document."""
    if not source.file.seek(0, os.SEEK_END):
        return
    parquet = require("pyarrow.parquet", "prepare", source.path)
    pyarrow = require("pyarrow", "prepare", source.path)
    try:
        file = parquet.ParquetFile(source.file)
        names = file.schema_arrow.names
        if not file.metadata.num_rows:
            return
        if text_key not in names:
            raise UserError(f"{source.path}: expected a column {text_key!r}, found {', '.join(names)}")
        row = 0
        for batch in file.iter_batches(columns=[text_key], batch_size=_ROWS):
            source.position = source.file.tell()
            for value in batch.column(0):
                row += 1
                try:
                    yield _cell(value, f"{source.path}: row {row}", text_key)
                except RecordError as error:
                    source.bad(error)
    except pyarrow.ArrowException as error:
        raise UserError(f"{source.path}: damaged parquet: {one_line(error, 300)}") from error


def _cell(value, where: str, text_key: str) -> str:
    """The text of a value in a column. Raises: RecordError."""
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:  # Arrow does not check that strings are UTF-8
        raise RecordError(
            f"{where}: expected UTF-8, found byte 0x{error.object[error.start]:02x}", "not UTF-8"
        ) from error
    if not isinstance(text, str):
        found = "null" if text is None else type(text).__name__
        raise RecordError(f"{where}: expected text under {text_key!r}, found {found}")
    if len(text) > MOST_BYTES:
        raise _too_long(where, "a document")
    return text


def _decode(data: bytes, where: str) -> str:
    """The text of UTF-8. Raises: RecordError."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            found = "UTF-16"
        raise RecordError(f"{where}: expected UTF-8, found {found}", "not UTF-8") from error


def _stdlib_sources() -> list[str]:
    root = sysconfig.get_path("stdlib")
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings"}
    paths = sorted(glob.glob(f"{root}/**/*.py", recursive=True))
    return [path for path in paths if not left_out & set(os.path.relpath(path, root).split(os.sep))]


def _embedded() -> Iterator[tuple[str, int]]:
    """Python's documentation topics, and then the sources of its standard library."""
    import pydoc_data.topics

    done = 0
    for name in sorted(pydoc_data.topics.topics):
        yield pydoc_data.topics.topics[name], done
    for path in _stdlib_sources():
        with open(path, "rb") as file:
            data = file.read()
        done += len(data)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:  # the few sources that declare another encoding are left out
            continue
        if text:
            yield text, done
