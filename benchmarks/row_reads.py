"""Time to read the rows for a prefill of 2,048 tokens of real text, beside raw ways to read the same bytes.

    python benchmarks/row_reads.py --workdir=DIR --tol=FILE --data=DIR --output=benchmarks/results/NAME.json

`ours` is the time that `generate` waits for rows before a prefill if its cache holds none of them: the rows of the
distinct tokens are read, their checksums are verified, and they are handed to the device. `ours_decoded` also waits
until the device has decoded them, which `generate` does not. The raw ways only read bytes into memory. All ways take
turns on a window of text, and each window is different text. Before a cold read the file's pages are dropped from the
page cache; before a warm one they are read.
"""

import concurrent.futures
import mmap
import os
import statistics
import time
from collections.abc import Callable
from typing import Annotated

import common
import jax
import numpy as np

from memoryllm_jax import config
from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common import cli
from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.common.options import Option
from memoryllm_jax.data import dataset
from memoryllm_jax.model.sharding import make_mesh
from memoryllm_jax.tol.cached_rows import CachedRows
from memoryllm_jax.tol.format import TolFile
from memoryllm_jax.tol.reader import RowReader

THREADS = 16
WINDOW = 2048  # tokens
RAW = ("pread_one_thread", "pread_threads", "willneed_then_pread", "memory_map")


class Raw:
    """Ways to read rows of a file into one buffer, without checking or decoding them.

    Each method reads the rows of token ids [U].
    """

    def __init__(self, tol):
        self.tol, self.stride = tol, tol.layout.stride
        self._pool = concurrent.futures.ThreadPoolExecutor(THREADS)
        self._map = mmap.mmap(tol.fd, 0, prot=mmap.PROT_READ)

    def places(self, ids):
        """Where the rows start in the file, in ascending order, and a buffer for them."""
        rows = np.sort(self.tol.row_of_token[ids])
        return self.tol.start_of_row[rows].tolist(), np.empty((len(ids), self.stride), np.uint8)

    def _each(self, starts, out, slots):
        for i in slots:
            os.preadv(self.tol.fd, [out[i]], starts[i])

    def pread_one_thread(self, ids):
        starts, out = self.places(ids)
        self._each(starts, out, range(len(starts)))

    def pread_threads(self, ids):
        starts, out = self.places(ids)
        parts = np.array_split(np.arange(len(starts)), THREADS)
        list(self._pool.map(lambda part: self._each(starts, out, part), parts))

    def willneed_then_pread(self, ids):
        starts, out = self.places(ids)
        for start in starts:
            os.posix_fadvise(self.tol.fd, start, self.stride, os.POSIX_FADV_WILLNEED)
        self._each(starts, out, range(len(starts)))

    def memory_map(self, ids):
        starts, out = self.places(ids)
        for i, start in enumerate(starts):
            out[i] = np.frombuffer(self._map, np.uint8, self.stride, start)


def measure(ways: dict[str, Callable], tol: TolFile, stream, windows: int) -> tuple[dict, list[int]]:
    """Reads windows of text in all ways.

    Args:
      ways: {name: function of token ids [U]}.
      stream: the text.
    Returns: {(state, way): seconds of each window}, and the number of distinct rows of each window.
    """
    raw = Raw(tol)
    seconds = {(state, way): [] for state in ("cold", "warm") for way in ways}
    distinct = []
    for window in range(windows + 1):
        ids = np.unique(stream.read(window * WINDOW, WINDOW)).astype(np.int32)
        ids = ids[: len(ids) // 64 * 64]  # a multiple of 64, so that few shapes compile
        order = sorted(ways, key=lambda _: np.random.default_rng(window).random())
        for state in ("cold", "warm"):
            for way in order:
                if state == "cold":
                    os.sync()  # only pages that are written back can be dropped
                    os.posix_fadvise(tol.fd, 0, 0, os.POSIX_FADV_DONTNEED)
                else:
                    raw.pread_threads(ids)
                start = time.perf_counter()
                ways[way](ids)
                if window:  # the first one compiles, and does not count
                    seconds[state, way].append(time.perf_counter() - start)
        if window:
            distinct.append(len(ids))
    return seconds, distinct


def compare(seconds: dict, distinct: list[int], stride: int) -> dict:
    """Prints and returns the speed of each way, and its ratio to the fastest raw way.

    Args:
      seconds, distinct: as `measure` returns them.
      stride: bytes of a row.
    """
    ways = list(dict.fromkeys(way for _, way in seconds))
    results = {}
    for state in ("cold", "warm"):
        best = min(RAW, key=lambda way: statistics.median(seconds[state, way]))
        print(f"{state}: {'way':<22}{'ms':>9}{'GB/s':>8}{'of best raw':>13}")
        for way in ways:
            times = seconds[state, way]
            rate = statistics.median(rows * stride / t / 1e9 for rows, t in zip(distinct, times))
            share = common.ratio(seconds[state, best], times)
            results[f"{state} {way}"] = {"seconds": times, "gigabytes_per_second": rate, "share_of_best_raw": share}
            milliseconds = 1e3 * statistics.median(times)
            print(f"{'':<6}{way:<22}{milliseconds:>9.1f}{rate:>8.2f}{share['median']:>13.2f}")
    return results


def main(
    workdir: Annotated[str, Option("the model's checkpoints")],
    tol: Annotated[str, Option("ToL file")],
    data: Annotated[str, Option("prepared data")],
    windows: Annotated[int, Option("windows of 2,048 tokens", least=1)] = 15,
    output: Annotated[str, Option("JSON file for the result", writes=True)] = "",
) -> None:
    stream, needed = dataset.Dataset(data).validation, (windows + 1) * WINDOW
    if stream.tokens < needed:
        raise ArgumentError("data", f"expected {needed:,} held-out tokens for all windows, found {stream.tokens:,}")
    file = TolFile(tol)
    mesh = make_mesh(config.MeshConfig(1, 1, 1), jax.devices()[:1])
    trained = TrainedModel(workdir)
    file.check_model(trained.config, trained.tokenizer.digest, None)
    stride = file.layout.stride
    cached = CachedRows(RowReader(file), mesh, stride)  # its cache has room for one row, so that all rows are read
    raw = Raw(file)
    ways = {name: getattr(raw, name) for name in RAW} | {"ours": cached.fetch}
    ways["ours_decoded"] = lambda ids: jax.block_until_ready(cached.fetch(ids))
    seconds, distinct = measure(ways, file, stream, windows)
    facts = {"distinct_rows": distinct, "row_bytes": stride, "file_bytes": file.size}
    common.write(output, compare(seconds, distinct, stride), facts)


if __name__ == "__main__":
    cli.run(main)
