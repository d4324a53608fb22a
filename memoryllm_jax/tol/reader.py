"""Rows read by position: several threads of positioned reads, neighbours in one call, every row's checksum verified.

A memory-map would make the disk read ahead megabytes for a row of kilobytes; these reads fetch the row and no more.
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

_BUFFERS = os.sysconf("SC_IOV_MAX")  # one call takes no more
_RUN_BYTES = 1 << 20  # one call reads no more, so that threads share the work
_ALIGN = 64  # bytes
THREADS = 16  # reads in flight: what a solid-state disk needs to be busy


def staging(rows: int, row_bytes: int) -> np.ndarray:
    """uint8 [rows, row_bytes], aligned so that a CPU device takes the memory over without a copy.

    The device may go on reading it, so that it must not be written again after it was handed over.
    """
    memory = np.empty(rows * row_bytes + _ALIGN, np.uint8)
    start = -memory.ctypes.data % _ALIGN
    return memory[start : start + rows * row_bytes].reshape(rows, row_bytes)


class _Rows(NamedTuple):
    """Rows to read, in the order of the disk. Plain lists: their elements come faster than those of NumPy arrays."""

    places: list[int]  # where in the buffer each row goes, counted in rows
    starts: list[int]  # first byte in the file
    strides: list[int]  # bytes
    sums: list[int]  # expected checksums
    buffer: memoryview
    width: int  # bytes of a row of the buffer

    def view(self, k: int) -> memoryview:
        """The part of the buffer that row k goes to."""
        start = self.places[k] * self.width
        return self.buffer[start : start + self.strides[k]]


def _fill(fd: int, views: list[memoryview], start: int) -> None:
    """Fills the views from consecutive bytes of a file. Raises: OSError, also where the file ends too early."""
    while views:
        count = os.preadv(fd, views, start)
        if count == 0 and len(views[0]):
            raise OSError(errno.EIO, "the file ends inside it")
        start += count
        # The kernel may read fewer bytes than asked for: what is full is taken off, and the next call goes on.
        while views and count >= len(views[0]):
            count -= len(views.pop(0))
        if count:
            views[0] = views[0][count:]


class RowReader:
    """Reads encoded rows of tokens from the file.

    Args:
      repair: given token ids, returns their encoded rows as the file should hold them, for rows whose checksum fails;
        None where the weights are not at hand.
    Attributes:
      bytes: read so far.  repaired: rows that `repair` made so far.
    """

    place = "disk"

    def __init__(self, tol: TolFile, threads: int = THREADS, repair: Callable | None = None):
        self.tol, self._repair = tol, repair
        self._pool = concurrent.futures.ThreadPoolExecutor(threads)
        self._threads = threads
        self.bytes = self.repaired = 0
        os.posix_fadvise(tol.fd, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead by the kernel
        self._checksums = tol.checksums

    def read(self, ids_U: np.ndarray, out: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Reads the rows of distinct token ids.

        Args:
          out: uint8 [U or more, longest row], where the rows go.
        Returns: (uint8 [U, longest row], int32 [U], the tier of each row).
        Raises: UserError naming token and file.
        """
        tol = self.tol
        if out is None:
            out = np.empty((len(ids_U), tol.layout.stride), np.uint8)
        rows = tol.row_of_token[ids_U]
        tier = tol.tier_of_row[rows].astype(np.int32)
        order = np.argsort(rows, kind="stable")
        rows = rows[order]
        wanted = _Rows(
            order.tolist(),
            tol.start_of_row[rows].tolist(),
            tol.stride_of_row[rows].tolist(),
            self._checksums[rows].tolist(),
            memoryview(out.reshape(-1)),
            out.shape[1],
        )
        damaged = self._read_all(self._runs(rows), wanted)
        self.bytes += sum(wanted.strides)
        if damaged:
            self._mend(ids_U, np.array(damaged), out)
        return out[: len(rows)], tier

    def _runs(self, rows: np.ndarray) -> list[tuple[int, int]]:
        """(start, stop) of neighbours in `rows` that one call reads: of one tier, and no more than a thread's share."""
        share = -(-len(rows) // self._threads)
        most = max(1, min(_RUN_BYTES // max(self.tol.layout.stride, 1), share, _BUFFERS))
        apart = (np.diff(rows) != 1) | (np.diff(self.tol.tier_of_row[rows]) != 0)
        edges = [0, *(np.nonzero(apart)[0] + 1).tolist(), len(rows)]
        return [
            (start, min(start + most, end))
            for begin, end in itertools.pairwise(edges)
            for start in range(begin, end, most)
        ]

    def _read_all(self, runs, wanted: _Rows) -> list[int]:
        """Reads the runs on all threads and returns the places in the buffer of rows whose checksums differ."""
        tasks = [runs[k :: self._threads] for k in range(min(self._threads, len(runs)))]
        if len(tasks) == 1:  # not worth a thread
            return self._read_runs(tasks[0], wanted)
        found = self._pool.map(lambda task: self._read_runs(task, wanted), tasks)
        return [place for places in found for place in places]

    def _read_runs(self, runs, wanted: _Rows) -> list[int]:
        damaged = []
        for start, stop in runs:
            views = [wanted.view(k) for k in range(start, stop)]
            try:
                _fill(self.tol.fd, views[:], wanted.starts[start])
            except OSError:
                for k in range(start, stop):  # one by one, to name the row that cannot be read
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
        ids = ids_U[damaged]
        if self._repair is None:
            raise UserError(
                f"{self.tol.path}: token {ids[0]}: the checksum of its row differs; the file is damaged: run "
                "precompute again"
            )
        self.repaired += len(ids)
        for place, row in zip(damaged, self._repair(ids)):
            out[place, : len(row)] = row

    def close(self) -> None:
        self._pool.shutdown()
