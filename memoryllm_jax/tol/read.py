"""Rows read by position: several threads of positioned reads, neighbours in one call, every row's checksum verified.

A memory-map would make the disk read ahead megabytes for a row of kilobytes; these reads fetch the row and no more.
"""

import concurrent.futures
import errno
import itertools
import os
import threading
from collections.abc import Callable

import numpy as np

from memoryllm_jax.cli import UserError
from memoryllm_jax.tol.format import TolFile, checksum

_BUFFERS = os.sysconf("SC_IOV_MAX")  # that one call takes
_ALIGN = 64  # bytes
THREADS = 16  # reads in flight: what a solid-state disk needs to be busy


def staging(rows: int, row_bytes: int) -> np.ndarray:
    """uint8 [rows, row_bytes] at an address that a CPU device takes over without a copy; not to be written again."""
    memory = np.empty(rows * row_bytes + _ALIGN, np.uint8)
    start = -memory.ctypes.data % _ALIGN
    return memory[start : start + rows * row_bytes].reshape(rows, row_bytes)


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
        self._lock = threading.Lock()
        self.bytes = self.repaired = 0
        os.posix_fadvise(tol.fd, 0, 0, os.POSIX_FADV_RANDOM)
        tol.checksums  # noqa: B018  read before the threads start

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
        runs = self._runs(rows)
        if len(runs) > self._threads:  # the kernel begins to read all while the threads take them one by one
            for start, stop in runs:
                self._hint(rows[start], rows[stop - 1])
        shares = np.array_split(np.arange(len(runs)), min(self._threads, max(len(runs), 1)))
        tasks = [[(order[a:b].tolist(), rows[a:b]) for a, b in (runs[k] for k in share)] for share in shares]
        if len(tasks) == 1:
            bad = self._read_runs(tasks[0], out)
        else:
            bad = [i for part in self._pool.map(lambda task: self._read_runs(task, out), tasks) for i in part]
        if bad:
            self._mend(ids_U, np.array(bad), out)
        tier = np.empty(len(rows), np.int32)
        tier[order] = self.tol.tier_of_row[rows]
        return out[: len(rows)], tier

    def _runs(self, rows):
        """(start, stop) of neighbours that one call reads, of at most 1/threads of all and at most a mebibyte."""
        most = max(1, min((1 << 20) // max(self.tol.layout.stride, 1), -(-len(rows) // self._threads), _BUFFERS))
        new = (np.diff(rows) != 1) | (np.diff(self.tol.tier_of_row[rows]) != 0)
        starts = np.concatenate([[0], np.nonzero(new)[0] + 1, [len(rows)]])
        pieces = [(s, min(s + most, stop)) for a, stop in itertools.pairwise(starts) for s in range(a, stop, most)]
        return [(int(a), int(b)) for a, b in pieces]

    def _hint(self, first_row, last_row):
        start = int(self.tol.start_of_row[first_row])
        end = int(self.tol.start_of_row[last_row] + self.tol.stride_of_row[last_row])
        os.posix_fadvise(self.tol.fd, start, end - start, os.POSIX_FADV_WILLNEED)

    def _read_runs(self, runs, out):
        bad = []
        for places, rows in runs:
            stride = int(self.tol.stride_of_row[rows[0]])
            views = [memoryview(out[i])[:stride] for i in places]
            try:
                self._fill(list(views), int(self.tol.start_of_row[rows[0]]))
            except OSError:
                for row, i in zip(rows, places):  # which of them it is
                    self._read_one(row, out[i])
            sums = self.tol.checksums[rows].tolist()
            bad += [i for i, view, want in zip(places, views, sums) if checksum(view) != want]
        return bad

    def _read_one(self, row, out):
        try:
            self._fill([memoryview(out[: self.tol.stride_of_row[row]])], int(self.tol.start_of_row[row]))
        except OSError as error:
            token = int(np.nonzero(self.tol.row_of_token == row)[0][0])
            raise UserError(f"{self.tol.path}: token {token}: its row cannot be read: {error.strerror}") from error

    def _fill(self, views, start):
        total, done = sum(len(view) for view in views), 0
        while done < total:
            count = os.preadv(self.tol.fd, views, start + done)
            if count == 0:
                raise OSError(errno.EIO, "the file ends inside it")
            done += count
            while views and count >= len(views[0]):
                count -= len(views.pop(0))
            if count:
                views[0] = views[0][count:]
        with self._lock:
            self.bytes += total

    def _mend(self, ids_U, bad, out):
        ids = ids_U[bad]
        if self._repair is None:
            raise UserError(
                f"{self.tol.path}: token {ids[0]}: the checksum of its row differs; the file is damaged "
                "and the weights to compute the row again are not at hand"
            )
        with self._lock:
            self.repaired += len(ids)
        for i, row in zip(bad, self._repair(ids)):
            out[i, : len(row)] = row

    def close(self) -> None:
        self._pool.shutdown()
