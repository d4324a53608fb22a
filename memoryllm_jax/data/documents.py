"""Documents out of files: C4's `.json.gz`, `.jsonl`, `.jsonl.zst`, `.txt`, `.parquet`, on any path fsspec reads."""

import glob
import importlib
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator

import fsspec

from memoryllm_jax.common.errors import UserError

EMBEDDED = "embedded"  # the interpreter's own documentation topics and standard-library sources
_FORMATS = ("json", "jsonl", "txt", "parquet")
_CHUNK = 1 << 20


def expand(pattern: str) -> list[str]:
    """Paths that a comma-separated list of globs matches, sorted within each. Raises: UserError."""
    paths = []
    for part in pattern.split(","):
        if part == EMBEDDED:
            paths.append(part)
            continue
        try:
            fs, path = fsspec.core.url_to_fs(part)
            found = sorted(p for p in fs.glob(path) if fs.isfile(p))
        except (ImportError, ValueError, OSError) as error:
            raise UserError(f"input {part}: {error}") from error
        if not found:
            raise UserError(f"input {part}: expected at least one file, found none")
        paths += [p if "://" not in part else fs.unstrip_protocol(p) for p in found]
    paths = list(dict.fromkeys(paths))
    for path in paths:
        if not is_text(path):
            raise UserError(
                f"input {path}: expected a name ending in .json, .jsonl, .txt (each also .gz or .zst) or .parquet"
            )
    return paths


def is_text(pattern: str) -> bool:
    """Whether `expand` takes it, by its name."""
    return pattern == EMBEDDED or _format(pattern) in _FORMATS


def size(path: str) -> int:
    """Bytes of the file, as stored."""
    if path == EMBEDDED:
        return sum(os.path.getsize(p) for p in _stdlib_sources())
    fs, path = fsspec.core.url_to_fs(path)
    return fs.size(path)


def read(path: str, text_key: str = "text") -> Iterator[tuple[str, int]]:
    """(document, bytes of the file read so far). Empty documents are left out. Raises: UserError with file and line."""
    if path == EMBEDDED:
        yield from _embedded()
        return
    try:
        with fsspec.open(path, "rb") as raw:
            if not raw.read(1):
                raise UserError(f"{path}: the file is empty")
            raw.seek(0)
            form = _format(path)
            if form == "parquet":
                documents = _parquet(raw, path, text_key)
            elif form == "txt":
                documents = [_decode(b"".join(_chunks(raw, path)), path)]
            else:
                documents = _json_lines(raw, path, text_key)
            for text in documents:
                if text:
                    yield text, raw.tell()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error


def _format(path):
    return path.removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]


def _chunks(raw, path):
    """The file's bytes, decompressed. Unlike the libraries' readers it notices a zstd stream that ends too early."""
    if path.endswith(".gz"):
        new, error_types = lambda: zlib.decompressobj(31), (zlib.error,)
    elif path.endswith(".zst"):
        zstandard = _need("zstandard", path)
        new, error_types = lambda: zstandard.ZstdDecompressor().decompressobj(), (zstandard.ZstdError,)
    else:
        yield from iter(lambda: raw.read(_CHUNK), b"")
        return
    stream = new()
    for data in iter(lambda: raw.read(_CHUNK), b""):
        while data:
            if stream.eof:
                stream = new()
            try:
                yield stream.decompress(data)
            except error_types as error:
                raise UserError(f"{path}: damaged compressed data near byte {raw.tell()}: {error}") from error
            data = stream.unused_data
    if not stream.eof:
        raise UserError(f"{path}: the compressed file is cut off after {raw.tell()} bytes")


def _json_lines(raw, path, text_key):
    def lines():
        rest = []
        for chunk in _chunks(raw, path):
            first, newline, tail = chunk.partition(b"\n")
            rest.append(first)
            if newline:
                yield b"".join(rest)
                *whole, last = tail.split(b"\n")
                yield from whole
                rest = [last]
        yield b"".join(rest)

    for number, line in enumerate(lines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(_decode(line, f"{path}: line {number}"))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {number}: invalid JSON: {error}") from error
        text = record.get(text_key) if isinstance(record, dict) else None
        yield _check(text, f"{path}: line {number}", text_key)


def _parquet(raw, path, text_key):
    parquet = _need("pyarrow.parquet", path)
    import pyarrow

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


def _check(text, where, text_key):
    if not isinstance(text, str):
        raise UserError(f"{where}: expected text under {text_key!r}, found {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: expected Unicode text, found half a surrogate pair at character {error.start}"
        ) from error
    return text


def _decode(data, where):
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: expected UTF-8, found byte 0x{data[error.start]:02x} at offset {error.start}"
        ) from error


def _need(module, path):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(f"{path}: reading it needs {package}: pip install 'memoryllm_jax[prepare]'") from error


def _stdlib_sources():
    root = sysconfig.get_path("stdlib")
    left_out = ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings")
    paths = sorted(glob.glob(f"{root}/**/*.py", recursive=True))
    return [p for p in paths if not set(left_out) & set(os.path.relpath(p, root).split(os.sep))]


def _embedded():
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
