"""Reads documents from text files: C4's `.json.gz`, `.jsonl`, `.txt` or `.parquet`, on any path that fsspec reads.

A record is one line, one row or one .txt file. A record without text is an error, or is counted and skipped. Memory is
bounded by the largest document, whatever a compressed file holds: it is decompressed in pieces.
"""

import collections
import glob
import os
import re
import sysconfig
from collections.abc import Generator, Iterator

from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import UserError, one_line, require
from memoryllm_jax.data import text_file
from memoryllm_jax.data.json_lines import read_json_lines
from memoryllm_jax.data.text_file import RecordError, TextFile

EMBEDDED = "embedded"  # the interpreter's own documentation topics and standard-library sources
_FORMATS = ("json", "jsonl", "txt", "parquet")
_EXPECTED_NAME = "expected a name ending in .json, .jsonl, .txt (each also .gz or .zst) or .parquet"
_ROWS = 64  # rows of a parquet file decoded at a time
# A .txt file is one document, of any size, unless a small compressed file becomes a very large one. Text seldom becomes
# ten times smaller.
_MOST_COMPRESSION = 10


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
    links[text_file.place(links)] = fs.unstrip_protocol(name)
    return "::".join(links)


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
        source = TextFile(path, file, skipped)
        for text in readers.get(_format(path), read_json_lines)(source, text_key):
            if text:
                yield text, source.position


def _format(path: str) -> str:
    """The ending of the name, without that of a compression: "json" for "a.json.gz"."""
    return text_file.file_name(path).removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]


def _whole_text(source: TextFile, text_key: str) -> Iterator[str]:
    """A .txt file is one document."""
    pieces, size = [], 0
    try:
        for chunk in source.chunks():
            pieces.append(chunk)
            size += len(chunk)
            most = max(text_file.MOST_BYTES, _MOST_COMPRESSION * source.position)
            if size > most:
                raise text_file.too_long(source.path, "a document", most)
        yield text_file.decode_utf8(b"".join(pieces), source.path)
    except RecordError as error:
        source.bad(error)


def _parquet(source: TextFile, text_key: str) -> Iterator[str]:
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
    if len(text) > text_file.MOST_BYTES:
        raise text_file.too_long(where, "a document", text_file.MOST_BYTES)
    return text


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
