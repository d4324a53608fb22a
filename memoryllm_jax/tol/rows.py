"""Rows of a ToL file for the decoder, from device memory, host memory or disk, behind the interface of `LiveRows`.

Rows travel to the device as they are encoded and are decoded there. Host and disk keep a cache of rows on the device:
a fixed number of bytes, least recently used rows leave first, and where the file is in order of frequency it starts
with the most frequent rows. A disk is told which rows are likely next while the device works.
"""

import collections
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.inference.decoder import bucket
from memoryllm_jax.model.token_memory import TokenRows
from memoryllm_jax.tol.build import decode_rows
from memoryllm_jax.tol.format import TolFile
from memoryllm_jax.tol.reader import RowReader, staging

_LOAD_BYTES = 64 << 20  # read at a time where a whole table is loaded


class _Rows:
    """What the three places share: encoded rows on the device -> `TokenRows`, with the edits of an overlay."""

    def __init__(self, tol: TolFile, mesh, embedding=None, overlay=None):
        self.tol, self.mesh = tol, mesh
        self.replicated = NamedSharding(mesh, P())
        if not tol.layout.has_x0 and embedding is None:
            raise ValueError("the file holds no x0: the embedding is needed")
        bases = {name: tol.basis(name) for name in tol.layout.rotated}
        self._constants = jax.device_put({"bases": bases}, self.replicated)
        self._constants |= {"embedding": embedding} if not tol.layout.has_x0 else {}
        self._constants |= {"overlay": jax.device_put(overlay.arrays(), self.replicated)} if overlay else {}
        self._overlay = overlay

    def _zeros(self, *shape, dtype=np.uint8):
        """On the devices, without a copy on the host."""
        return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=self.replicated)()

    def _token_rows(self, constants, raw, tier_U, ids_U) -> TokenRows:
        """For use in jit."""
        layout = self.tol.layout
        vectors = decode_rows(layout, raw, tier_U, constants["bases"])
        x0 = vectors["x0"] if layout.has_x0 else constants["embedding"][ids_U]
        ffn = [vectors.get(f"ffn.{layer}") for layer in range(layout.layers)]
        if self._overlay is not None:
            ffn = self._overlay.apply(constants["overlay"], ids_U, ffn)
        return TokenRows(x0[None], [None if y is None else y[None] for y in ffn])


def _load(tol: TolFile, place, repair) -> None:
    """Hands `place(tier, first, rows)` the whole table piece by piece, checksums verified."""
    reader = RowReader(tol, repair=repair)
    token_of_row = tol.token_of_row()
    first = 0
    progress = Progress("loading rows", tol.vocab_size, "row", stream=sys.stderr)  # stdout is for the text
    for number, tier in enumerate(tol.layout.tiers):
        step = max(1, _LOAD_BYTES // max(tier.stride, 1))
        for start in range(0, tier.rows, step):
            ids = token_of_row[first + start : first + min(start + step, tier.rows)]
            place(number, start, reader.read(ids)[0][:, : tier.stride])
            progress.update(first + start + len(ids))
        first += tier.rows
    progress.close()
    reader.close()


class DeviceRows(_Rows):
    """The whole encoded table in device memory. Raises: UserError if it does not fit."""

    on_device = True

    def __init__(self, tol: TolFile, mesh, embedding=None, overlay=None, repair=None):
        super().__init__(tol, mesh, embedding, overlay)
        _check_fits(tol.layout.row_bytes, device_memory(mesh), f"{tol.path}: rows on the device")
        dtype, shape = tol.layout.row_type
        self._tables = [
            self._zeros(t.rows, *(shape if dtype != np.uint8 else (t.stride,)), dtype=dtype) for t in tol.layout.tiers
        ]
        put = jax.jit(lambda table, rows, at: jax.lax.dynamic_update_slice_in_dim(table, rows, at, 0), donate_argnums=0)

        def place(tier, start, rows):
            rows = tol.layout.view(rows) if dtype != np.uint8 else rows
            self._tables[tier] = put(self._tables[tier], rows, start)

        _load(tol, place, repair)
        self._constants["row_of_token"] = jax.device_put(tol.row_of_token, self.replicated)
        self._fetch = jax.jit(self._fetch_body)
        self.tokens = 0

    def _fetch_body(self, constants, tables, ids_U):
        row_U, first, raw = constants["row_of_token"][ids_U], 0, None
        tier_U = jnp.zeros_like(row_U)
        for number, (tier, table) in enumerate(zip(self.tol.layout.tiers, tables)):
            mine = table[jnp.clip(row_U - first, 0, tier.rows - 1)]
            if len(tables) > 1:
                mine = jnp.pad(mine, ((0, 0), (0, self.tol.layout.stride - tier.stride)))
            here = row_U >= first
            raw = mine if raw is None else jnp.where(here[:, None], mine, raw)
            tier_U = jnp.where(here, number, tier_U)
            first += tier.rows
        return self._token_rows(constants, raw, tier_U, ids_U)

    def fetch(self, ids_U) -> TokenRows:
        self.tokens += len(ids_U)
        with jax.set_mesh(self.mesh):
            return self._fetch(self._constants, self._tables, ids_U)

    def prefetch(self, ids) -> None:
        """All rows are where they are needed."""

    def stats(self) -> dict:
        return {"rows": "device", "row_requests": self.tokens, "device_bytes": self.tol.layout.row_bytes}

    def close(self) -> None:
        """Closes the file too."""
        self._tables = []
        self.tol.close()


class HostTable:
    """The whole encoded table in host memory, read row by row. Raises: UserError if it does not fit."""

    name = "host"

    def __init__(self, tol: TolFile, repair=None):
        self.tol, self.bytes = tol, 0
        _check_fits(tol.layout.row_bytes, host_memory(), f"{tol.path}: rows in host memory")
        self._tables = [np.empty((t.rows, t.stride), np.uint8) for t in tol.layout.tiers]

        def place(tier, start, rows):
            self._tables[tier][start : start + len(rows)] = rows

        _load(tol, place, repair)
        self._firsts = np.cumsum([0] + [t.rows for t in tol.layout.tiers])[:-1]

    def read(self, ids_U, out=None):
        """(uint8 [U, longest row], tier [U])."""
        rows = self.tol.row_of_token[ids_U]
        tier = self.tol.tier_of_row[rows].astype(np.int32)
        if out is None:
            out = np.empty((len(rows), self.tol.layout.stride), np.uint8)
        for i, (row, k) in enumerate(zip(rows, tier)):
            out[i, : self._tables[k].shape[1]] = self._tables[k][row - self._firsts[k]]
        self.bytes += int(self.tol.stride_of_row[rows].sum())
        return out, tier

    def close(self) -> None:
        """Closes the file too."""
        self._tables = []
        self.tol.close()


class DiskTable(RowReader):
    """Rows read from the file when they are asked for, with hints for those that are likely next."""

    name = "disk"

    def __init__(self, tol: TolFile, **options):
        super().__init__(tol, **options)
        self._successors = tol.read("successors") if "successors" in tol.tensors else None

    def likely_next(self, ids) -> np.ndarray:
        """Token ids that often follow these; none where the file was made without text."""
        return np.empty(0, np.int32) if self._successors is None else np.unique(self._successors[ids])

    def hint(self, ids) -> None:
        """Asks the kernel to read these tokens' rows into its page cache, without waiting."""
        for row in self.tol.row_of_token[ids]:
            start, length = int(self.tol.start_of_row[row]), int(self.tol.stride_of_row[row])
            os.posix_fadvise(self.tol.fd, start, length, os.POSIX_FADV_WILLNEED)


class CachedRows(_Rows):
    """Rows of a `HostTable` or `DiskTable` through a cache on the device.

    Args:
      cache_bytes: of encoded rows; at least one row's.
    Raises: UserError if the cache has no room for a row or is larger than the device's memory.
    """

    on_device = False

    def __init__(self, table, mesh, cache_bytes: int, embedding=None, overlay=None):
        tol = table.tol
        super().__init__(tol, mesh, embedding, overlay)
        self.table, stride = table, tol.layout.stride
        if cache_bytes < stride:
            raise UserError(
                f"--cache: expected at least one row of {tol.path}, {stride:,} bytes, found {cache_bytes:,}"
            )
        _check_fits(cache_bytes, device_memory(mesh), "--cache")
        slots = min(cache_bytes // stride, tol.vocab_size)
        self._slot_of: collections.OrderedDict[int, int] = collections.OrderedDict()
        self._free = list(range(slots))[::-1]
        dtype, shape = tol.layout.row_type
        self._cache = self._zeros(slots, *shape, dtype=dtype)
        self._tier = np.zeros(slots, np.int32)
        self._assemble = jax.jit(self._assemble_body)
        self._insert = jax.jit(
            lambda cache, staged, slots_M: cache.at[slots_M].set(staged, mode="drop"), donate_argnums=0
        )
        self._hinted: set[int] = set()
        self._compiled: set[tuple[int, int, bool]] = set()  # a fetch that compiles is not timed
        self.requests = self.hits = self.misses = self.hinted_misses = 0
        self.seconds: list[float] = []
        if "counts" in tol.tensors:
            self._warm(slots)
        self._bytes_before = table.bytes

    def _warm(self, slots):
        """The most frequent rows, the most frequent as the one used last."""
        tokens = self.tol.token_of_row()[:slots]
        step = max(1, _LOAD_BYTES // self.tol.layout.stride)
        for start in range(0, slots, step):
            ids = tokens[start : start + step]
            raw, tier = self.table.read(ids)
            self._keep(ids, self.tol.layout.view(raw), tier)
        for token in tokens[::-1].tolist():
            self._slot_of.move_to_end(token)

    def _keep(self, ids, raw_MS, tier_M):
        """Puts rows into the cache, as many as there is room for; `raw_MS` may be padded."""
        slots = np.full(len(raw_MS), len(self._tier), np.int32)  # past the end: nowhere
        for i, token in enumerate(ids[: len(self._tier)].tolist()):
            if not self._free:
                self._free.append(self._slot_of.popitem(last=False)[1])
            slots[i] = self._slot_of[token] = self._free.pop()
            self._tier[slots[i]] = tier_M[i]
        self._cache = self._insert(self._cache, raw_MS, slots)

    def _assemble_body(self, constants, cache, staged, hit_U, at_U, tier_U, ids_U):
        if staged is None:
            raw = cache[at_U]
        elif hit_U is None:
            raw = staged
        else:
            hit = hit_U.reshape(-1, *[1] * (staged.ndim - 1))
            raw = jnp.where(hit, cache[at_U], staged[jnp.where(hit_U, 0, at_U)])
        return self._token_rows(constants, raw, tier_U, ids_U)

    def fetch(self, ids_U: np.ndarray) -> TokenRows:
        """Rows of token ids; ids may repeat, and are read once. Repeats at the end are padding: rows may be zero."""
        start = time.perf_counter()
        ids, inverse = np.unique(ids_U, return_inverse=True)
        slots = [self._slot_of.get(token, -1) for token in ids.tolist()]
        hit = np.array(slots) >= 0
        at, missing = np.array(slots, np.int32), np.nonzero(~hit)[0]
        tier = self._tier[np.maximum(at, 0)]
        for token in ids[hit].tolist():
            self._slot_of.move_to_end(token)
        staged = None
        # All rows are new and each is asked for once, but for repeats at the end: they are staged as they are wanted.
        straight = not hit.any() and np.array_equal(inverse[: len(ids)], np.arange(len(ids)))
        if len(missing):
            count = len(ids_U) if straight else bucket(len(missing), len(ids_U)) if len(missing) > 1 else 1
            staged = staging(count, self.tol.layout.stride)
            staged[len(missing) :] = 0
            _, tier[missing] = self.table.read(ids[missing], staged)
            at[missing] = np.arange(len(missing))
            staged = jax.device_put(self.tol.layout.view(staged), self.replicated)
        with jax.set_mesh(self.mesh):
            some = None if straight else hit[inverse]
            rows = self._assemble(self._constants, self._cache, staged, some, at[inverse], tier[inverse], ids_U)
            if staged is not None:
                self._keep(ids[missing], staged, tier[missing])
        shape = (len(ids_U), 0 if staged is None else len(staged), straight)
        if shape in self._compiled:
            self.seconds.append(time.perf_counter() - start)
        self._compiled.add(shape)
        self.requests += len(ids)
        self.hits += len(ids) - len(missing)
        self.misses += len(missing)
        self.hinted_misses += len(self._hinted.intersection(ids[missing].tolist()))
        return rows

    def prefetch(self, ids) -> None:
        """While the device works: hints the disk at the tokens that often follow these, unless they are cached."""
        if isinstance(self.table, DiskTable):
            likely = [t for t in self.table.likely_next(np.asarray(ids)).tolist() if t not in self._slot_of]
            self.table.hint(np.array(likely, np.int32))
            self._hinted = set(likely)

    def stats(self) -> dict:
        """What was asked for and how long a fetch took, in milliseconds, the reading of misses included."""
        ms = np.array(self.seconds) * 1e3
        return {
            "rows": self.table.name,
            "cache": "least recently used, on the device",
            "cache_bytes": len(self._tier) * self.tol.layout.stride,
            "row_requests": self.requests,
            "hit_rate": self.hits / max(self.requests, 1),
            "misses_hinted": self.hinted_misses / max(self.misses, 1),
            "bytes_per_token": (self.table.bytes - self._bytes_before) / max(self.requests, 1),
            "fetch_ms_p50": float(np.percentile(ms, 50)) if len(ms) else 0.0,
            "fetch_ms_p99": float(np.percentile(ms, 99)) if len(ms) else 0.0,
            "rows_repaired": getattr(self.table, "repaired", 0),
        }

    def close(self) -> None:
        """Closes the file too."""
        self.table.close()
        self.tol.close()


def device_memory(mesh) -> int:
    """Bytes that a device has left, or on a CPU the host."""
    stats = mesh.devices.flat[0].memory_stats()
    return stats["bytes_limit"] - stats["bytes_in_use"] if stats and "bytes_limit" in stats else host_memory()


def host_memory() -> int:
    """Bytes that the host has left."""
    with open("/proc/meminfo", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))


def _check_fits(needed: int, there: int, what: str) -> None:
    if needed > there:
        raise UserError(f"{what}: needs {needed:,} bytes, found {there:,} bytes of memory")
