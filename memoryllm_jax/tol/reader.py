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

_BUFFERS = os.sysconf("SC_IOV_MAX")  # that one call takes
_ALIGN = 64  # bytes
THREADS = 16  # reads in flight: what a solid-state disk needs to be busy


def staging(rows: int, row_bytes: int) -> np.ndarray:
    """uint8 [rows, row_bytes] at an address that a CPU device takes over without a copy; not to be written again."""
    memory = np.empty(rows * row_bytes + _ALIGN, np.uint8)
    start = -memory.ctypes.data % _ALIGN
    return memory[start : start + rows * row_bytes].reshape(rows, row_bytes)


class _Plan(NamedTuple):
    """Rows in the order of the disk: the places they go to in a buffer, where they lie, and their checksums."""

    places: list[int]
    starts: list[int]
    strides: list[int]
    sums: list[int]
    buffer: memoryview
    width: int  # bytes of a place

    def view(self, k) -> memoryview:
        start = self.places[k] * self.width
        return self.buffer[start : start + self.strides[k]]


def _fill(fd: int, views: list[memoryview], start: int) -> None:
    """Fills the views from consecutive bytes of a file. Raises: OSError, also where the file ends too early."""
    while views:
        count = os.preadv(fd, views, start)
        if count == 0 and len(views[0]):
            raise OSError(errno.EIO, "the file ends inside it")
        start += count
        while views and count >= len(views[0]):
            count -= len(views.pop(0))
        if count:
            views[0] = views[0][count:]


class RowReader:
    """Reads encoded rows of tokens.

    Args:
      repair: token ids -> encoded rows as the file should hold them, for rows whose checksum fails; None where the
        weights are not at hand.
    """

    def __init__(self, tol: TolFile, threads: int = THREADS, repair: Callable | None = None):
        self.tol, self._repair = tol, repair
        self._pool = concurrent.futures.ThreadPoolExecutor(threads)
        self._threads = threads
        self.bytes = self.repaired = 0
        os.posix_fadvise(tol.fd, 0, 0, os.POSIX_FADV_RANDOM)
        self._of_row = (tol.start_of_row, tol.stride_of_row, tol.checksums)

    def read(self, ids_U: np.ndarray, out: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(uint8 [U, longest row], tier [U]) of distinct token ids.

        Args:
          out: where the rows go, of at least U rows.
        Raises: UserError naming token and file.
        """
        if out is None:
            out = np.empty((len(ids_U), self.tol.layout.stride), np.uint8)
        rows = self.tol.row_of_token[ids_U]
        order = np.argsort(rows, kind="stable")  # of the disk
        rows = rows[order]
        tier = np.empty(len(rows), np.int32)
        tier[order] = self.tol.tier_of_row[rows]
        # Plain lists of all that the threads need: they share one interpreter.
        plan = _Plan(
            order.tolist(), *(a[rows].tolist() for a in self._of_row), memoryview(out.reshape(-1)), out.shape[1]
        )
        runs = self._runs(rows)
        tasks = [runs[k :: self._threads] for k in range(min(self._threads, len(runs)))]
        if len(tasks) < 2:
            bad = [i for task in tasks for i in self._read_runs(task, plan)]
        else:
            bad = [i for part in self._pool.map(lambda task: self._read_runs(task, plan), tasks) for i in part]
        self.bytes += sum(plan.strides)
        if bad:
            self._mend(ids_U, np.array(bad), out)
        return out[: len(rows)], tier

    def _runs(self, rows):
        """(start, stop) of neighbours that one call reads, of at most 1/threads of all and at most a mebibyte."""
        most = max(1, min((1 << 20) // max(self.tol.layout.stride, 1), -(-len(rows) // self._threads), _BUFFERS))
        new = (np.diff(rows) != 1) | (np.diff(self.tol.tier_of_row[rows]) != 0)
        starts = [0, *(np.nonzero(new)[0] + 1).tolist(), len(rows)]
        return [(s, min(s + most, stop)) for a, stop in itertools.pairwise(starts) for s in range(a, stop, most)]

    def _read_runs(self, runs, plan):
        """Reads runs and returns the places in `out` whose checksums differ."""
        bad = []
        for a, b in runs:
            views = [plan.view(k) for k in range(a, b)]
            try:
                _fill(self.tol.fd, views[:], plan.starts[a])
            except OSError:
                for k in range(a, b):  # which of them it is
                    self._read_one(plan, k)
            bad += [plan.places[a + k] for k, view in enumerate(views) if checksum(view) != plan.sums[a + k]]
        return bad

    def _read_one(self, plan, k):
        try:
            _fill(self.tol.fd, [plan.view(k)], plan.starts[k])
        except OSError as error:
            token = int(np.nonzero(self.tol.start_of_row[self.tol.row_of_token] == plan.starts[k])[0][0])
            raise UserError(f"{self.tol.path}: token {token}: its row cannot be read: {error.strerror}") from error

    def _mend(self, ids_U, bad, out):
        ids = ids_U[bad]
        if self._repair is None:
            raise UserError(
                f"{self.tol.path}: token {ids[0]}: the checksum of its row differs; the file is damaged: run "
                "precompute again"
            )
        self.repaired += len(ids)
        for i, row in zip(bad, self._repair(ids)):
            out[i, : len(row)] = row

    def close(self) -> None:
        self._pool.shutdown()
