"""An open text file: its bytes, decompressed in pieces of bounded size, and the count of its records without text."""

import collections
import urllib.parse
import zlib
from collections.abc import Callable, Generator, Iterator

from memoryllm_jax.common.errors import UserError, one_line, require

# The largest record in bytes, as a line or row holds it. A document is held in memory several times while it is
# tokenized, and a small compressed file may hold a line of gigabytes.
MOST_BYTES = 128 * 2**20
_CHUNK = 1 << 20  # bytes read at a time
# zstd turns 4 bytes into up to 128 KiB. python-zstandard cannot bound its output, so the input is bounded: 512 bytes
# become at most 16 MiB.
_ZSTD_INPUT = 512
_ZSTD_WINDOW = 2**31  # the largest window, of `zstd --long=31`; a decoder's memory grows up to the size of the window
_BOM = b"\xef\xbb\xbf"  # byte order mark that some programs write at the start of UTF-8 files


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


class TextFile:
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
        name, chunks = file_name(self.path), self.stored()
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


def too_long(where: str, what: str, most: int) -> RecordError:
    """The error for a record of more than `most` bytes."""
    return RecordError(f"{where}: expected {what} of at most {most:,} bytes, found a longer one", "too long")


def decode_utf8(data: bytes, where: str) -> str:
    """The text of UTF-8. Raises: RecordError."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            found = "UTF-16"
        raise RecordError(f"{where}: expected UTF-8, found {found}", "not UTF-8") from error


def file_name(path: str) -> str:
    """The name of the file: without the archive that it lies in, and without the query of a web address."""
    links = path.split("::")
    name = links[place(links)]
    return urllib.parse.urlsplit(name).path if name.startswith(("http://", "https://")) else name


def place(links: list[str]) -> int:
    """Which link of a chain of URLs names the file: in "simplecache::zip://a.jsonl::b.zip" it is zip://a.jsonl."""
    return next((i for i, link in enumerate(links) if "://" in link), len(links) - 1)
