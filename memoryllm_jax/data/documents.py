"""Documents out of text files: C4's `.json.gz`, `.jsonl`, `.txt` or `.parquet`, on any path that fsspec reads."""

import glob
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterator

import fsspec

from memoryllm_jax.common.errors import UserError, require

EMBEDDED = "embedded"  # the interpreter's own documentation topics and standard-library sources
_FORMATS = ("json", "jsonl", "txt", "parquet")
_CHUNK = 1 << 20  # bytes read at a time


def expand(pattern: str) -> list[str]:
    """Paths that a comma-separated list of globs matches, sorted within each glob. Raises: UserError."""
    paths = []
    for part in pattern.split(","):
        paths += [part] if part == EMBEDDED else _matches(part)
    paths = list(dict.fromkeys(paths))  # each once, in order
    for path in paths:
        if not is_text(path):
            raise UserError(
                f"input {path}: expected a name ending in .json, .jsonl, .txt (each also .gz or .zst) or .parquet"
            )
    return paths


def _matches(part):
    try:
        fs, path = fsspec.core.url_to_fs(part)
        found = sorted(name for name in fs.glob(path) if fs.isfile(name))
    except (ImportError, ValueError, OSError) as error:
        raise UserError(f"input {part}: {error}") from error
    if not found:
        raise UserError(f"input {part}: expected at least one file, found none")
    return [fs.unstrip_protocol(name) for name in found] if "://" in part else found


def is_text(pattern: str) -> bool:
    """Whether the name is that of a text file which `read` takes."""
    return pattern == EMBEDDED or _format(pattern) in _FORMATS


def size(path: str) -> int:
    """Bytes of the file, as stored."""
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
            readers = {"parquet": _parquet, "txt": _whole_text}
            for text in readers.get(_format(path), _json_lines)(raw, path, text_key):
                if text:
                    yield text, raw.tell()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error


def _format(path):
    return path.removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]


def _raw_chunks(raw) -> Iterator[bytes]:
    while data := raw.read(_CHUNK):
        yield data


def _chunks(raw, path) -> Iterator[bytes]:
    """The file's bytes, decompressed."""
    if path.endswith(".gz"):
        # 31: a gzip header, with the largest window.
        yield from _decompressed(raw, path, lambda: zlib.decompressobj(31), zlib.error)
    elif path.endswith(".zst"):
        zstandard = require("zstandard", "prepare", path)
        decompressor = zstandard.ZstdDecompressor()
        yield from _decompressed(raw, path, decompressor.decompressobj, zstandard.ZstdError)
    else:
        yield from _raw_chunks(raw)


def _decompressed(raw, path, new_stream: Callable, stream_error: type[Exception]):
    # By hand, as the libraries' own readers do not notice a zstd stream that ends too early.
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


def _whole_text(raw, path, text_key):
    yield _decode(b"".join(_chunks(raw, path)), path)


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    rest = []  # pieces of a line that no chunk has ended yet: joined once, however long the line is
    for chunk in chunks:
        first, newline, tail = chunk.partition(b"\n")
        rest.append(first)
        if newline:
            yield b"".join(rest)
            *whole, last = tail.split(b"\n")
            yield from whole
            rest = [last]
    yield b"".join(rest)


def _json_lines(raw, path, text_key):
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


def _parquet(raw, path, text_key):
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
    if not isinstance(text, str):
        raise UserError(f"{where}: expected text under {text_key!r}, found {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may hold "\ud800", which no tokenizer takes
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
        except UnicodeDecodeError:  # a few sources declare another encoding
            continue
        if text:
            yield text, done
