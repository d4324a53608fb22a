"""Compares file shards with their checksums, and remembers in a workdir which ones were right.

A file shard is verified once for each workdir: it counts as verified while its storage reports the same version of the
file, which on a disk is its size and time of modification.
"""

import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Literal, NamedTuple

import fsspec
import msgspec
import numpy as np

from memoryllm_jax.common import records, storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.common.records import Record

FILE = "verified_data.json"  # in the workdir
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]  # in hexadecimal
_THREADS = 8  # file shards that are read at the same time


class FileShard(NamedTuple):
    """A file shard of opened data.

    Attributes:
      path: as the user wrote it, for error messages.
      fs, name: the file system, and the path as that expects it.
      dtype: little-endian type of the token ids.
      tokens: number of token ids.
      sha256: the checksum in dataset.json.
      version: as of `storage.Listed`.
    """

    path: str
    fs: fsspec.AbstractFileSystem
    name: str
    dtype: np.dtype
    tokens: int
    sha256: str
    version: str

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.tokens * self.dtype.itemsize


class _Verified(Record):
    """What is remembered of a file shard: the version of the file, and the checksum that it had."""

    version: str
    sha256: Sha256


class _Memory(Record):
    """The contents of verified_data.json: {absolute path or URL of a file shard: what is remembered of it}."""

    format: Literal[1]
    files: dict[str, _Verified]


class Verification:
    """Verifies file shards, and remembers it.

    Args:
      workdir: folder or URL that holds the memory; "": nothing is remembered beyond this process.
    """

    def __init__(self, workdir: str = ""):
        self._path = os.path.join(workdir, FILE) if workdir else ""
        self._verified = self._read()

    def check(
        self, shards: Sequence[FileShard], show: bool = True, stopped: Callable[[], bool] = lambda: False
    ) -> bool:
        """Verifies those file shards that are not known to be right.

        Args:
          show: whether to show progress.
          stopped: called for each piece that is read; if it returns True, the reading ends.
        Returns: whether all are verified; False if the reading was stopped.
        Raises: UserError that names a file shard whose checksum differs.
        """
        unknown = [shard for shard in shards if not self._is_known(shard)]
        if unknown:
            if not _compare_checksums(unknown, show, stopped):
                return False
            self._verified |= {_key(shard): _Verified(version=shard.version, sha256=shard.sha256) for shard in unknown}
        return True

    def remember(self, shards: Sequence[FileShard]) -> None:
        """Writes into the workdir that these file shards are right. A workdir that cannot be written to is left alone.

        With several hosts, one calls it when all have verified their shares.
        """
        # Storage that names no version could change a file unnoticed, so it is read again the next time.
        self._add(
            {_key(shard): _Verified(version=shard.version, sha256=shard.sha256) for shard in shards if shard.version}
        )

    def remember_from(self, workdirs: Iterable[str]) -> None:
        """Writes into the workdir what other workdirs remember, such as those of earlier runs on the same data."""
        new: dict[str, _Verified] = {}
        for other in workdirs:
            new |= Verification(other)._verified
        if new and not storage.is_url(self._path):
            os.makedirs(os.path.dirname(self._path), exist_ok=True)  # the run has not begun yet
        self._add(new)

    def _add(self, new: dict[str, _Verified]) -> None:
        before = self._read()  # anew, as another process may have written it since
        if not self._path or all(before.get(path) == verified for path, verified in new.items()):
            return
        try:
            storage.write_json(self._path, records.to_json(_Memory(format=1, files=before | new)))
        except UserError as error:
            print(f"{error}; the data will be verified again next time", flush=True)

    def _is_known(self, shard: FileShard) -> bool:
        known = self._verified.get(_key(shard))
        return known is not None and (known.version, known.sha256) == (shard.version, shard.sha256)

    def _read(self) -> dict[str, _Verified]:
        """What the workdir remembers. A damaged file is as good as none: it only spares the reading of data."""
        if not self._path:
            return {}
        try:
            if not storage.exists(self._path):
                return {}
            return records.read(_Memory, self._path, "a record of verified data").files
        except UserError as error:
            print(f"{error}; the data is verified again", flush=True)
            return {}


def _key(shard: FileShard) -> str:
    return storage.absolute(shard.path)


class _StoppedError(UserError):
    """Ends the reading of a file shard. A UserError, as `storage.sha256` turns others into one."""


def _compare_checksums(shards: Sequence[FileShard], show: bool, stopped: Callable[[], bool]) -> bool:
    """Arguments and results as of `Verification.check`."""
    progress = Progress("verify data", sum(shard.size for shard in shards), "B", enabled=show)
    lock, ended = threading.Lock(), threading.Event()

    def step(count: int) -> None:
        if ended.is_set() or stopped():
            raise _StoppedError
        with lock:
            progress.update(progress.done + count)

    def check(shard: FileShard) -> None:
        found = storage.sha256(shard.path, step)
        if found != shard.sha256:
            raise UserError(f"{shard.path}: checksum differs: expected {shard.sha256[:12]}..., found {found[:12]}...")

    with contextlib.closing(progress), concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        try:
            # list() waits for all and raises the first error.
            list(pool.map(check, shards))
        except _StoppedError:
            return False
        finally:
            ended.set()  # after an error or Ctrl-C, the other threads do not read their file shards to the end
    return True
