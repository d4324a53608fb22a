"""Writes ToL files, in any order of their rows; a file that was left unfinished goes on."""

import contextlib
import hashlib
import math
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from memoryllm_jax.common import records, storage
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.common.records import Count, Record
from memoryllm_jax.common.safetensors_header import Tensor
from memoryllm_jax.tol import header
from memoryllm_jax.tol.format import ALIGN, DTYPES, TolFile, checksum
from memoryllm_jax.tol.header import Place
from memoryllm_jax.tol.layout import Layout


class FilePlan(NamedTuple):
    """A file that is to be written.

    Attributes:
      header: its first bytes, up to the data.
      tensors: {name: Tensor}, where the tensors go.
      size: bytes of the whole file.
    """

    header: bytes
    tensors: dict[str, Tensor]
    size: int


def plan(layout: Layout, extra: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> FilePlan:
    """Decides where everything in a file goes.

    Args:
      layout: what rows hold.
      extra: {name: (dtype, shape)} of the tensors beside the rows and their checksums.
      metadata: {key: text}, to which the header's checksum is added.
    """
    places: dict[str, Place] = {}
    offset = 0

    def add(name, dtype, shape):
        nonlocal offset
        end = offset + math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        places[name] = Place(dtype, shape, offset, end)
        offset = end

    # safetensors allows no gaps between tensors, so that padding is a tensor too.
    for number, tier in enumerate(layout.tiers):
        if offset % ALIGN:
            add(f"padding.{number}", "U8", (-offset % ALIGN,))
        if tier.float_bits:
            add(f"rows.{number}", {16: "BF16", 32: "F32"}[tier.float_bits], (tier.rows, len(tier.parts), layout.dim))
        else:
            add(f"rows.{number}", "U8", (tier.rows, tier.stride))
    if offset % 8:
        add("padding", "U8", (-offset % 8,))
    add("checksums", "U64", (layout.rows,))
    # Tensors of larger elements come first, so that each begins at a multiple of the size of its elements.
    for name, (dtype, shape) in sorted(extra.items(), key=lambda item: -np.dtype(DTYPES[item[1][0]]).itemsize):
        add(name, dtype, shape)
    first = header.to_bytes(metadata, places, ALIGN)
    tensors = {name: Tensor(p.dtype, p.shape, len(first) + p.start, len(first) + p.end) for name, p in places.items()}
    return FilePlan(first, tensors, len(first) + offset)


def to_replace(path: str) -> dict[str, str] | None:
    """The metadata of the ToL file that a new one at `path` would replace; None where there is no file.

    Raises: ArgumentError for the output, if something other than a ToL file is there or no file can be.
    """
    if storage.is_url(path):
        raise ArgumentError("output", f"expected a path on a disk, found the URL {path}")
    folder = os.path.dirname(os.path.abspath(path))
    if not os.access(folder, os.W_OK):
        raise ArgumentError("output", f"expected a path in a folder that can be written to, found {path}")
    if not os.path.exists(path):
        return None
    try:
        found = TolFile(path)
    except UserError as error:
        expected = "expected a name that is free, or the name of a ToL file to replace"
        raise ArgumentError("output", f"{expected}, found another file: {error}") from error
    found.close()
    return found.metadata


class _Progress(Record):
    """How far an unfinished file is.

    Attributes:
      plan: digest of what is written, and in which chunks.
      chunks: number of chunks that are on disk.
    """

    plan: str
    chunks: Count


class TolWriter:
    """Writes a ToL file of a known layout in any order, and gives the file its name when it is whole.

    Until then the file is PATH.part. PATH.part.progress says how many chunks are on disk, so that a build that was
    killed goes on.

    Args:
      path: of the finished file.
      layout, extra, metadata: as of `plan`.
      chunking: names the chunks that rows are written in. An unfinished file of another header or other chunks is
        started anew.
    Raises: UserError if the file does not fit the disk or cannot be written.
    """

    def __init__(self, path: str, layout: Layout, extra, metadata, chunking: str):
        self.path, self.layout = path, layout
        # Not `storage.replaced`, which removes the partial file on an error: a build that was stopped goes on with it.
        self._part, self._progress = f"{path}.part", f"{path}.part.progress"
        self._header, self.tensors, self.size = plan(layout, extra, metadata)
        # The header has the checksums of all tensors but the rows, and the digests of the weights that rows come from.
        self._plan_digest = hashlib.sha256(self._header + chunking.encode()).hexdigest()
        self._fd: int | None = None

    def is_there(self) -> bool:
        """Whether the file is there already, whole and with this header."""
        if not os.path.isfile(self.path) or os.path.getsize(self.path) != self.size:
            return False
        with open(self.path, "rb") as file:
            return file.read(len(self._header)) == self._header

    def remove_leftover(self) -> None:
        """Removes the note of progress that a writer left that was killed after it had given the file its name."""
        if not os.path.exists(self._part) and self.done() is not None:
            storage.remove(self._progress)

    def begin(self) -> None:
        """Opens the partial file; makes it, unless an earlier writer with this plan left it unfinished."""
        try:
            if os.path.isdir(self.path):
                raise UserError(f"{self.path}: expected a name for a file, found a folder")
            self._fd = os.open(self._part, os.O_RDWR | os.O_CREAT, 0o644)
            storage.lock_byte(self._fd, self._part, 0)
            # Another run may have renamed the partial file between opening and locking.
            if not self._has_part():
                raise UserError(f"{self.path}: another run has just finished it; run the same line again")
            if self.done() is None:
                self._check_own()
            if self.done() is None or os.fstat(self._fd).st_size != self.size:
                self._start_anew()
        except OSError as error:
            self._give_up()
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from error

    def _has_part(self) -> bool:
        """Whether the open file is the one under the partial name."""
        try:
            return os.fstat(self._fd).st_ino == os.stat(self._part).st_ino
        except FileNotFoundError:
            return False

    def _check_own(self):
        """Refuses to overwrite a file under the partial name that no writer of ToL files began."""
        first = os.pread(self._fd, ALIGN, 0)
        # A writer that was killed early may have left only zeros.
        if first.strip(b"\0") and b'"format": "memoryllm_tol"' not in first:
            raise UserError(f"{self._part}: expected an unfinished ToL file, which is overwritten; found another file")

    def _start_anew(self):
        free = os.statvfs(self._part)
        occupied = os.fstat(self._fd).st_blocks * 512  # by an unfinished file, which is overwritten
        room = free.f_bavail * free.f_frsize + occupied
        if room < self.size:
            self._give_up()
            raise UserError(f"{self.path}: needs {self.size:,} bytes, found room for {room:,} on its disk")
        os.ftruncate(self._fd, 0)
        if os.path.exists(self._progress):
            os.remove(self._progress)
        os.posix_fallocate(self._fd, 0, self.size)  # so that a full disk shows now, not after hours
        self._write(np.frombuffer(self._header, np.uint8), 0)

    def _give_up(self):
        if self._fd is not None:
            self.close()
            os.remove(self._part)

    def done(self) -> int | None:
        """Number of this plan's chunks that are on disk; None if no file of this plan was begun."""
        if not os.path.exists(self._progress):
            return None
        progress = records.read(_Progress, self._progress, "the progress of an unfinished ToL file")
        return progress.chunks if progress.plan == self._plan_digest else None

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes a whole tensor."""
        self._write(np.ascontiguousarray(array), self.tensors[name].start)

    def write_rows(self, tier: int, first: int, raw: np.ndarray) -> None:
        """Writes consecutive encoded rows and their checksums.

        Args:
          first: number of the first row within the tier.
          raw: uint8 [n, bytes of a row].
        """
        raw = np.ascontiguousarray(raw)
        self._write(raw, self.tensors[f"rows.{tier}"].start + first * self.layout.tiers[tier].stride)
        sums = np.array([checksum(row) for row in raw], np.uint64)
        self._write(sums, self.tensors["checksums"].start + 8 * (self.layout.first_rows[tier] + first))

    def _write(self, array, start):
        view, done = memoryview(array.reshape(-1).view(np.uint8)), 0
        with self._resumable():
            while done < len(view):
                done += os.pwrite(self._fd, view[done:], start + done)

    @contextlib.contextmanager
    def _resumable(self) -> Iterator[None]:
        """Turns an OSError into a UserError; the partial file stays."""
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}; run the same line again") from error

    def record(self, chunks: int) -> None:
        """Notes that the first `chunks` chunks are written."""
        with self._resumable():
            os.fdatasync(self._fd)  # before the note: a chunk that it counts is never written again
        storage.write_json(self._progress, {"plan": self._plan_digest, "chunks": chunks})

    def finish(self) -> None:
        """Gives the whole file its name."""
        with self._resumable():
            os.fsync(self._fd)
            os.replace(self._part, self.path)
        storage.remove(self._progress)
        self.close()

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
