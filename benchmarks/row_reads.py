"""Rows for the prefill of 2,048 tokens of real text, cold and warm, against raw ways to read the same rows.

    python benchmarks/row_reads.py --workdir=DIR --tol=FILE --data=DIR --output=benchmarks/results/NAME.json

`ours` is what `generate` waits for before a prefill, on a cache that holds none of the rows: distinct tokens are read,
their checksums verified, and handed to the device; `ours_decoded` waits until the device has decoded them too, which
`generate` does not. The raw ways only read bytes into memory. Every window is of other text; all
ways read it in turn. Before a cold read the file's pages are dropped from the page cache, before a warm one read.
"""

import concurrent.futures
import mmap
import os
import statistics
import time

import common
import jax
import numpy as np
from absl import flags

from memoryllm_jax import config
from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common import legacy
from memoryllm_jax.data import dataset
from memoryllm_jax.model.sharding import make_mesh
from memoryllm_jax.tol.format import TolFile
from memoryllm_jax.tol.rows import CachedRows, DiskTable

THREADS = 16


class Raw:
    """Ways to read given rows of a file into one buffer, nothing checked and nothing decoded."""

    def __init__(self, tol):
        self.tol, self.stride = tol, tol.layout.stride
        self._pool = concurrent.futures.ThreadPoolExecutor(THREADS)
        self._map = mmap.mmap(tol.fd, 0, prot=mmap.PROT_READ)

    def places(self, ids):
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


def main():
    f = flags.FLAGS
    tol = TolFile(f.tol)
    mesh = make_mesh(config.MeshConfig(1, 1, 1), jax.devices()[:1])
    trained = TrainedModel(f.workdir)
    tol.check_model(trained.config, trained.tokenizer.digest, None)
    stream = dataset.Dataset(f.data).validation
    raw = Raw(tol)
    ways = {
        name: getattr(raw, name) for name in ("pread_one_thread", "pread_threads", "willneed_then_pread", "memory_map")
    }

    cached = CachedRows(DiskTable(tol), mesh, tol.layout.stride)  # room for one row: nothing is cached

    def ours_decoded(ids):
        jax.block_until_ready(cached.fetch(ids))

    ways |= {"ours": cached.fetch, "ours_decoded": ours_decoded}
    seconds = {(state, way): [] for state in ("cold", "warm") for way in ways}
    distinct = []
    for window in range(f.windows + 1):  # the first compiles
        ids = np.unique(stream.read(window * 2048, 2048)).astype(np.int32)
        ids = ids[: len(ids) // 64 * 64]  # few shapes
        distinct.append(len(ids))
        for state in ("cold", "warm"):
            for way in sorted(ways, key=lambda _: np.random.default_rng(window).random()):
                if state == "cold":
                    os.sync()
                    os.posix_fadvise(tol.fd, 0, 0, os.POSIX_FADV_DONTNEED)
                else:
                    raw.pread_threads(ids)
                start = time.perf_counter()
                ways[way](ids)
                if window:
                    seconds[state, way].append(time.perf_counter() - start)
    distinct = distinct[1:]
    results = {}
    for state in ("cold", "warm"):
        best = min((w for w in ways if not w.startswith("ours")), key=lambda w: statistics.median(seconds[state, w]))
        print(f"{state}: {'way':<22}{'ms':>9}{'GB/s':>8}{'of best raw':>13}")
        for way in ways:
            times = seconds[state, way]
            share = [b / t for b, t in zip(seconds[state, best], times)]
            rate = [n * tol.layout.stride / t / 1e9 for n, t in zip(distinct, times)]
            results[f"{state} {way}"] = {
                "seconds": times,
                "gigabytes_per_second": statistics.median(rate),
                "share_of_best_raw": {"median": statistics.median(share), "min": min(share), "max": max(share)},
            }
            print(
                f"{'':<6}{way:<22}{1e3 * statistics.median(times):>9.1f}{statistics.median(rate):>8.2f}"
                f"{statistics.median(share):>13.2f}"
            )
    common.write(f.output, results, {"distinct_rows": distinct, "row_bytes": tol.layout.stride, "file_bytes": tol.size})
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "the model's checkpoints", required=True)
    flags.DEFINE_string("tol", None, "ToL file", required=True)
    flags.DEFINE_string("data", None, "prepared data", required=True)
    flags.DEFINE_integer("windows", 15, "windows of 2,048 tokens")
    flags.DEFINE_string("output", "", "JSON file for the result")
    legacy.run(main)
