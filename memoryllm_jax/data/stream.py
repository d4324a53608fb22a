"""A stream of token ids over file shards, read by position. No JAX.

File shards on a disk are read with `pread`, which moves no more than the window: a memory map reads ahead up to
megabytes, and ends the process with SIGBUS where a file was cut short. Behind a URL, each window is one ranged read,
and the reads of one call run concurrently.
"""

import bisect
import functools
import os
import resource
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import fsspec
import numpy as np

from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data.verification import FileShard, Verification

_MOST_OPEN = 1024  # files that one stream keeps open, at most
_ADVISED = 64  # windows announced to the disk at a time; their files are open, besides those kept open


class _Piece(NamedTuple):
    """A range of tokens inside one file shard."""

    shard: int
    first: int
    end: int


class Tokens:
    """One split as a stream of token ids over its file shards, in their order. Threads may read at the same time.

    Args:
      shards: the file shards.
      documents, text_bytes: numbers of documents and of bytes of text in the split.
      vocab_size: number of token ids.
      verification: of the file shards.
    Attributes:
      tokens, bytes, documents: numbers of tokens, bytes of text and documents in the split.
      shards, vocab_size: as given.
    """

    def __init__(
        self,
        shards: Sequence[FileShard],
        documents: int,
        text_bytes: int,
        vocab_size: int,
        verification: Verification,
    ):
        self.shards, self.documents, self.bytes, self.vocab_size = tuple(shards), documents, text_bytes, vocab_size
        self._verification = verification
        self._starts = []
        self.tokens = 0
        for shard in self.shards:
            self._starts.append(self.tokens)
            self.tokens += shard.tokens
        names = [shard.name for shard in self.shards]
        self._opened = functools.lru_cache(_most_open())(lambda number: _OpenFile(names[number]))

    def read(self, start: int, count: int) -> np.ndarray:
        """Reads one range of tokens.

        Args:
          start: position of the first token in the split.
          count: number of tokens; the range ends earlier where the split does.
        Returns: int32 [count] token ids.
        Raises: UserError if a file cannot be read, is too short, or holds an id outside the vocabulary.
        """
        return self.read_each([start], count)[0]

    def read_each(self, starts: Sequence[int], count: int) -> list[np.ndarray]:
        """Reads the range of `count` tokens at each start, as `read` does; behind a URL, all ranges concurrently."""
        pieces_of_ranges = [self._pieces(start, min(start + count, self.tokens)) for start in starts]
        # One call for the pieces of all ranges, as it reads them concurrently.
        fetched = iter(self._fetch([piece for pieces in pieces_of_ranges for piece in pieces]))
        out = []
        for pieces in pieces_of_ranges:
            ids = [self._checked(piece, next(fetched)) for piece in pieces]
            out.append(np.concatenate(ids) if ids else np.empty(0, np.int32))
        return out

    def verify(self, starts: Iterable[int], count: int) -> None:
        """Verifies the file shards that `read_each` reads from, unless they are known to be right, and remembers it.

        Raises: UserError that names a file shard whose checksum differs.
        """
        numbers = set()
        for start in starts:
            numbers.update(piece.shard for piece in self._pieces(start, min(start + count, self.tokens)))
        shards = [self.shards[number] for number in sorted(numbers)]
        self._verification.check(shards)
        self._verification.remember(shards)

    def _pieces(self, start: int, stop: int) -> list[_Piece]:
        """Cuts the range of positions where a file shard ends."""
        out = []
        while start < stop:
            shard = bisect.bisect_right(self._starts, start) - 1
            is_last = shard + 1 == len(self._starts)
            end = stop if is_last else min(stop, self._starts[shard + 1])
            out.append(_Piece(shard, start - self._starts[shard], end - self._starts[shard]))
            start = end
        return out

    def _fetch(self, pieces: list[_Piece]) -> list[np.ndarray]:
        """The stored ids of each piece. Raises: UserError if a read fails or is too short."""
        # The folders of the data may lie on a disk and behind several kinds of URL.
        places: dict[fsspec.AbstractFileSystem, list[int]] = {}
        for number, piece in enumerate(pieces):
            places.setdefault(self.shards[piece.shard].fs, []).append(number)
        out: dict[int, np.ndarray] = {}
        for fs, numbers in places.items():
            chosen = [pieces[number] for number in numbers]
            found = self._read_files(chosen) if storage.is_local(fs) else self._read_ranges(fs, chosen)
            out.update(zip(numbers, found))
        return [out[number] for number in range(len(pieces))]

    def _read_files(self, pieces: list[_Piece]) -> list[np.ndarray]:
        """Reads pieces of file shards on a disk."""
        out = []
        for first in range(0, len(pieces), _ADVISED):
            chosen = pieces[first : first + _ADVISED]
            files = [self._open_file(piece.shard) for piece in chosen]
            if len(chosen) > 1 and hasattr(os, "posix_fadvise"):  # which macOS lacks
                # So the disk starts on all windows at once. Reads one after the other would wait for each in turn.
                for piece, file in zip(chosen, files):
                    start, end = self._bytes_of(piece)
                    os.posix_fadvise(file.fd, start, end - start, os.POSIX_FADV_WILLNEED)
            out += [self._read_file(piece, file) for piece, file in zip(chosen, files)]
        return out

    def _bytes_of(self, piece: _Piece) -> tuple[int, int]:
        """Where a piece starts and ends in its file."""
        size = self.shards[piece.shard].dtype.itemsize
        return piece.first * size, piece.end * size

    def _open_file(self, number: int) -> "_OpenFile":
        try:
            return self._opened(number)
        except OSError as error:
            raise UserError(f"{self.shards[number].path}: cannot be opened: {storage.reason(error)}") from error

    def _read_file(self, piece: _Piece, file: "_OpenFile") -> np.ndarray:
        shard = self.shards[piece.shard]
        start, end = self._bytes_of(piece)
        parts = []
        while start < end:
            try:
                # A read may return less than it was asked for: Linux reads at most 2 GiB at a time.
                part = os.pread(file.fd, end - start, start)
            except OSError as error:
                raise UserError(f"{shard.path}: cannot be read: {storage.reason(error)}") from error
            if not part:
                found = os.fstat(file.fd).st_size
                raise UserError(f"{shard.path}: expected {shard.size} bytes, as when it was opened, found {found}")
            parts.append(part)
            start += len(part)
        return np.frombuffer(b"".join(parts), shard.dtype)

    def _read_ranges(self, fs: fsspec.AbstractFileSystem, pieces: list[_Piece]) -> list[np.ndarray]:
        """Reads pieces of file shards of one file system, concurrently."""
        shards = [self.shards[piece.shard] for piece in pieces]
        firsts, ends = zip(*map(self._bytes_of, pieces))
        # cat_ranges returns for each range its bytes, or the exception that its read raised.
        fetched = fs.cat_ranges([shard.name for shard in shards], list(firsts), list(ends))
        for shard, first, end, data in zip(shards, firsts, ends, fetched):
            if isinstance(data, Exception):
                raise UserError(f"{shard.path}: cannot be read: {storage.reason(data)}") from data
            if len(data) != end - first:
                raise UserError(f"{shard.path}: expected bytes up to {end}, found {len(data)} from {first}")
        return [np.frombuffer(data, shard.dtype) for shard, data in zip(shards, fetched)]

    def _checked(self, piece: _Piece, ids: np.ndarray) -> np.ndarray:
        # On the device, an id outside the vocabulary would silently be clamped to the last one.
        if ids.max() >= self.vocab_size:
            at = piece.first + int(ids.argmax())
            path = self.shards[piece.shard].path
            raise UserError(f"{path}: token {at}: expected an id below {self.vocab_size}, found {ids.max()}")
        return ids.astype(np.int32)


class _OpenFile:
    """An open file, which is closed when nothing refers to it any more.

    So a thread that still reads from a file keeps it open, when another thread has pushed it out of the cache. Closed
    by number, the descriptor could already stand for another file.
    """

    def __init__(self, name: str):
        self.fd = -1  # stays if the file cannot be opened
        self.fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self):
        if self.fd >= 0:
            os.close(self.fd)


def _most_open() -> int:
    """How many files one stream keeps open: a quarter of what the process may have, as both splits of data have one."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return _MOST_OPEN
    return max(1, min(_MOST_OPEN, limit // 4))
