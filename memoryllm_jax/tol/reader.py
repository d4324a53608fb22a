"""Reads rows from the file: several threads, neighbouring rows in one call, and every row's checksum verified.

A memory-map would make the disk read ahead megabytes for a row of kilobytes. Positioned reads fetch only the row.
"""

import concurrent.futures
import errno
import itertools
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.tol.format import TolFile, checksum

_BUFFERS = os.sysconf("SC_IOV_MAX")  # buffers that one call of preadv takes, at most
_RUN_BYTES = 1 << 20  # bytes that one call reads, at most, so that the threads share the work
_ALIGN = 64  # bytes: the alignment at which a CPU device uses the host's memory without a copy
THREADS = 16  # a solid-state disk needs that many reads at a time to be busy


def staging(rows: int, row_bytes: int) -> np.ndarray:
    """An empty buffer uint8 [rows, row_bytes], aligned so that a CPU device uses its memory without a copy.

    The device may read it at any later time: after it was handed over it must not be written again.
    """
    # NumPy aligns less strictly: a little more is allocated, and the buffer begins at the first aligned byte.
    memory = np.empty(rows * row_bytes + _ALIGN, np.uint8)
    start = -memory.ctypes.data % _ALIGN
    return memory[start : start + rows * row_bytes].reshape(rows, row_bytes)


class _Rows(NamedTuple):
    """Rows to read, in the order of the disk, and the buffer that they go to.

    Attributes:
      places: row of the buffer that each row goes to.
      starts: first byte of each row in the file.
      strides: bytes of each row.
      sums: expected checksum of each row.
      buffer: bytes of the whole buffer.
      width: bytes of a row of the buffer.
    """

    # Plain lists: single elements are read from them faster than from NumPy arrays.
    places: list[int]
    starts: list[int]
    strides: list[int]
    sums: list[int]
    buffer: memoryview
    width: int

    def view(self, k: int) -> memoryview:
        """The part of the buffer that row k goes to."""
        start = self.places[k] * self.width
        return self.buffer[start : start + self.strides[k]]


def _fill(fd: int, views: list[memoryview], start: int) -> None:
    """Fills the views, and empties the list of them, from consecutive bytes of a file.

    Raises: OSError, also where the file ends too early.
    """
    while views:
        count = os.preadv(fd, views, start)
        if count == 0 and len(views[0]):
            raise OSError(errno.EIO, "the file ends inside it")
        start += count
        # The kernel may read fewer bytes than asked for: full views leave the list, and the next call fills the rest.
        while views and count >= len(views[0]):
            count -= len(views.pop(0))
        if count:
            views[0] = views[0][count:]


class RowReader:
    """Reads encoded rows of tokens from the file.

    Args:
      tol: the file, which the caller closes.
      threads: number of reads at a time.
      repair: called with the token ids of rows whose checksums fail; returns the encoded rows that the file should
        hold. None: such rows raise a UserError.
    Attributes:
      place: where the rows are, for statistics.
      bytes: number of bytes read so far.
      repaired: number of rows that `repair` made so far.
    """

    place = "disk"

    def __init__(self, tol: TolFile, threads: int = THREADS, repair: Callable | None = None):
        self.tol, self._repair = tol, repair
        self._pool = concurrent.futures.ThreadPoolExecutor(threads)
        self._threads = threads
        self.bytes = 0
        self.repaired = 0
        os.posix_fadvise(tol.fd, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead by the kernel
        self._checksums = tol.checksums

    def read(self, ids_U: np.ndarray, out: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Reads the rows of distinct token ids.

        Args:
          ids_U: int [U].
          out: uint8 [U or more, bytes of the longest row], the buffer that the rows go to; by default a new one.
        Returns: (rows uint8 [U, bytes of the longest row], tier of each row int32 [U]). Bytes after a shorter row are
          left as they were.
        Raises: UserError that names the token and the file.
        """
        tol = self.tol
        if out is None:
            out = np.empty((len(ids_U), tol.layout.stride), np.uint8)
        rows = tol.row_of_token[ids_U]
        tier = tol.tier_of_row[rows].astype(np.int32)
        order = np.argsort(rows, kind="stable")
        rows = rows[order]
        wanted = _Rows(
            places=order.tolist(),
            starts=tol.start_of_row[rows].tolist(),
            strides=tol.stride_of_row[rows].tolist(),
            sums=self._checksums[rows].tolist(),
            buffer=memoryview(out.reshape(-1)),
            width=out.shape[1],
        )
        damaged = self._read_all(self._runs(rows), wanted)
        self.bytes += sum(wanted.strides)
        if damaged:
            self._mend(ids_U, np.array(damaged), out)
        return out[: len(rows)], tier

    def _runs(self, rows: np.ndarray) -> list[tuple[int, int]]:
        """(start, stop) in `rows`, which are sorted, of neighbouring rows of one tier that one call reads."""
        share = -(-len(rows) // self._threads)  # no run is longer, so that every thread has work
        most = max(1, min(_RUN_BYTES // max(self.tol.layout.stride, 1), share, _BUFFERS))
        apart = (np.diff(rows) != 1) | (np.diff(self.tol.tier_of_row[rows]) != 0)
        edges = [0, *(np.nonzero(apart)[0] + 1).tolist(), len(rows)]
        return [
            (start, min(start + most, end))
            for begin, end in itertools.pairwise(edges)
            for start in range(begin, end, most)
        ]

    def _read_all(self, runs, wanted: _Rows) -> list[int]:
        """Reads the runs on all threads. Returns: rows of the buffer whose checksums differ."""
        tasks = [runs[k :: self._threads] for k in range(min(self._threads, len(runs)))]
        if len(tasks) == 1:  # handing it to a thread would only take time
            return self._read_runs(tasks[0], wanted)
        found = self._pool.map(lambda task: self._read_runs(task, wanted), tasks)
        return [place for places in found for place in places]

    def _read_runs(self, runs, wanted: _Rows) -> list[int]:
        """Reads runs one after the other. Returns: rows of the buffer whose checksums differ."""
        damaged = []
        for start, stop in runs:
            views = [wanted.view(k) for k in range(start, stop)]
            try:
                _fill(self.tol.fd, views[:], wanted.starts[start])  # a copy, as `_fill` empties it
            except OSError:
                for k in range(start, stop):  # again, one by one, to name the row that cannot be read
                    self._read_one(wanted, k)
            for k, view in enumerate(views, start):
                if checksum(view) != wanted.sums[k]:
                    damaged.append(wanted.places[k])
        return damaged

    def _read_one(self, wanted: _Rows, k: int):
        try:
            _fill(self.tol.fd, [wanted.view(k)], wanted.starts[k])
        except OSError as error:
            token = int(np.nonzero(self.tol.start_of_row[self.tol.row_of_token] == wanted.starts[k])[0][0])
            raise UserError(f"{self.tol.path}: token {token}: its row cannot be read: {error.strerror}") from error

    def _mend(self, ids_U, damaged, out):
        """Puts repaired rows into the buffer in place of damaged ones. Raises: UserError if they cannot be repaired."""
        ids = ids_U[damaged]
        if self._repair is None:
            raise UserError(
                f"{self.tol.path}: token {ids[0]}: the checksum of its row differs; the file is damaged: remove it and "
                "run precompute again"
            )
        self.repaired += len(ids)
        for place, row in zip(damaged, self._repair(ids)):
            out[place, : len(row)] = row

    def close(self) -> None:
        self._pool.shutdown()
