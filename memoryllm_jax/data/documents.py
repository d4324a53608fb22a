"""Reads documents from text files: C4's `.json.gz`, `.jsonl`, `.txt` or `.parquet`, on any path that fsspec reads."""

import glob
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterator

import fsspec

from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import UserError, require

EMBEDDED = "embedded"  # the interpreter's own documentation topics and standard-library sources
_FORMATS = ("json", "jsonl", "txt", "parquet")
_CHUNK = 1 << 20  # bytes read at a time


def expand(pattern: str) -> list[str]:
    """Paths that match a comma-separated list of globs: glob by glob, sorted within each, without duplicates.

    Raises: UserError if a glob matches no file, or a file whose format `read` does not know.
    """
    paths = []
    for part in pattern.split(","):
        paths += [part] if part == EMBEDDED else _matches(part)
    paths = list(dict.fromkeys(paths))  # removes duplicates and keeps the order
    for path in paths:
        if not is_text(path):
            raise UserError(
                f"{path}: expected a name ending in .json, .jsonl, .txt (each also .gz or .zst) or .parquet"
            )
    return paths


def _matches(glob_or_url: str) -> list[str]:
    try:
        fs, path = fsspec.core.url_to_fs(glob_or_url)
        found = sorted(name for name in fs.glob(path) if fs.isfile(name))
    except (ImportError, ValueError, OSError) as error:
        raise UserError(f"{glob_or_url}: {error}") from error
    if not found:
        raise UserError(f"{glob_or_url}: expected at least one file, found none")
    if storage.is_url(glob_or_url):
        found = [fs.unstrip_protocol(name) for name in found]
    return found


def is_text(pattern: str) -> bool:
    """Whether `read` knows the format, judging by the end of the name."""
    return pattern == EMBEDDED or _format(pattern) in _FORMATS


def size(path: str) -> int:
    """Size of the file in bytes, as stored (compressed)."""
    if path == EMBEDDED:
        return sum(os.path.getsize(source) for source in _stdlib_sources())
    fs, path = fsspec.core.url_to_fs(path)
    return fs.size(path)


def read(path: str, text_key: str = "text") -> Iterator[tuple[str, int]]:
    """Yields (document, bytes of the file read so far). Empty documents are left out.

    Args:
      text_key: JSON field or parquet column that holds the text.
    Raises: UserError that names file and line.
    """
    if path == EMBEDDED:
        yield from _embedded()
        return
    try:
        with fsspec.open(path, "rb") as raw:
            if not raw.read(1):
                raise UserError(f"{path}: the file is empty")
            raw.seek(0)
            readers = {"parquet": _parquet, "txt": _whole_text, "json": _json_lines, "jsonl": _json_lines}
            reader = readers.get(_format(path), _json_lines)
            for text in reader(raw, path, text_key):
                if text:
                    yield text, raw.tell()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error


def _format(path: str) -> str:
    """The ending of the name, without that of a compression: "json" for "a.json.gz"."""
    return path.removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]


def _raw_chunks(raw) -> Iterator[bytes]:
    while data := raw.read(_CHUNK):
        yield data


def _chunks(raw, path) -> Iterator[bytes]:
    """The file's bytes, decompressed."""
    if path.endswith(".gz"):
        # 31 = 16 (expect a gzip header) + 15 (the largest window).
        yield from _decompressed(raw, path, lambda: zlib.decompressobj(31), zlib.error)
    elif path.endswith(".zst"):
        zstandard = require("zstandard", "prepare", path)
        decompressor = zstandard.ZstdDecompressor()
        yield from _decompressed(raw, path, decompressor.decompressobj, zstandard.ZstdError)
    else:
        yield from _raw_chunks(raw)


def _decompressed(raw, path, new_stream: Callable, stream_error: type[Exception]) -> Iterator[bytes]:
    # Not by the libraries' own file readers: zstandard's does not notice a stream that ends too early.
    stream = new_stream()
    for data in _raw_chunks(raw):
        while data:
            if stream.eof:  # a file may hold several streams, one after another
                stream = new_stream()
            try:
                yield stream.decompress(data)
            except stream_error as error:
                raise UserError(f"{path}: damaged compressed data near byte {raw.tell()}: {error}") from error
            data = stream.unused_data
    if not stream.eof:
        raise UserError(f"{path}: the compressed file is cut off after {raw.tell()} bytes")


def _whole_text(raw, path, text_key) -> Iterator[str]:
    """A .txt file is one document."""
    yield _decode(b"".join(_chunks(raw, path)), path)


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    # Pieces of a line whose end is still to come. They are joined once: appending to one bytes object would copy a long
    # line again for each chunk.
    rest = []
    for chunk in chunks:
        first, newline, tail = chunk.partition(b"\n")
        rest.append(first)
        if newline:
            yield b"".join(rest)
            *whole, last = tail.split(b"\n")
            yield from whole
            rest = [last]
    yield b"".join(rest)


def _json_lines(raw, path, text_key) -> Iterator[str]:
    """Each line that is not blank is a JSON object with one document."""
    for number, line in enumerate(_lines(_chunks(raw, path)), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            record = json.loads(_decode(line, where))
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: invalid JSON: {error}") from error
        text = record.get(text_key) if isinstance(record, dict) else None
        yield _check(text, where, text_key)


def _parquet(raw, path, text_key) -> Iterator[str]:
    """Each row holds one document."""
    parquet = require("pyarrow.parquet", "prepare", path)
    pyarrow = require("pyarrow", "prepare", path)
    try:
        file = parquet.ParquetFile(raw)
        if text_key not in file.schema_arrow.names:
            raise UserError(f"{path}: expected a column {text_key!r}, found {', '.join(file.schema_arrow.names)}")
        row = 0
        for batch in file.iter_batches(columns=[text_key], batch_size=1024):
            for text in batch.column(0).to_pylist():
                row += 1
                yield _check(text, f"{path}: row {row}", text_key)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: damaged parquet: {error}") from error


def _check(text, where, text_key) -> str:
    """The text, if it is one. Raises: UserError."""
    if not isinstance(text, str):
        raise UserError(f"{where}: expected text under {text_key!r}, found {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may hold half a surrogate pair, "\ud800", which tokenizers reject
        raise UserError(
            f"{where}: expected Unicode text, found half a surrogate pair at character {error.start}"
        ) from error
    return text


def _decode(data: bytes, where) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: expected UTF-8, found byte 0x{data[error.start]:02x} at offset {error.start}"
        ) from error


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
