"""Rows of a ToL file for the decoder, from device memory, host memory or disk, behind the interface of `LiveRows`.

Rows go to the device as they are encoded and are decoded there. Host and disk keep a cache of rows on the device: a
fixed number of bytes, of which the least recently used rows leave first. Where the file is in order of frequency, the
cache starts with the most frequent rows.
"""

import collections
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.inference.decoder import bucket
from memoryllm_jax.model.token_memory import TokenRows
from memoryllm_jax.tol.format import TolFile
from memoryllm_jax.tol.layout import decode_rows
from memoryllm_jax.tol.overlay import Overlay
from memoryllm_jax.tol.reader import RowReader, staging

_LOAD_BYTES = 64 << 20  # read at a time where a whole table is loaded


class _FileRows:
    """What device, host and disk share: from encoded rows on the device to `TokenRows`, with an overlay's edits.

    Args:
      embedding: [V, D] on the device, where the file holds no x0; else not used.
      overlay: Overlay, or None.
    """

    def __init__(self, tol: TolFile, mesh, embedding=None, overlay: Overlay | None = None):
        if not tol.layout.has_x0 and embedding is None:
            raise ValueError("the file holds no x0: the embedding is needed")
        self.tol, self.mesh, self._overlay = tol, mesh, overlay
        self._replicated = NamedSharding(mesh, P())
        # Arguments of the jitted functions below, not constants compiled into them.
        self._constants = {"bases": self._put({name: tol.basis(name) for name in tol.layout.rotated})}
        if not tol.layout.has_x0:
            self._constants["embedding"] = embedding
        if overlay is not None:
            self._constants["overlay"] = self._put(overlay.arrays())

    def _put(self, tree):
        return jax.device_put(tree, self._replicated)

    def _zeros(self, *shape, dtype):
        """On the devices, without a copy on the host."""
        return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=self._replicated)()

    def _token_rows(self, constants, raw, tier_U, ids_U) -> TokenRows:
        """For use in jit. `raw`: what `Layout.view` makes of encoded rows, [U, ...]."""
        layout = self.tol.layout
        vectors = decode_rows(layout, raw, tier_U, constants["bases"])
        x0_UD = vectors["x0"] if layout.has_x0 else constants["embedding"][ids_U]
        ffn = [vectors.get(f"ffn.{layer}") for layer in range(layout.layers)]
        if self._overlay is not None:
            ffn = self._overlay.apply(constants["overlay"], ids_U, ffn)
        return TokenRows(x0_UD[None], [None if y_UD is None else y_UD[None] for y_UD in ffn])


def _load(tol: TolFile, place: Callable[[int, int, np.ndarray], None], repair) -> None:
    """Reads the whole table piece by piece, checksums verified.

    Args:
      place: is called with the tier, the number of the piece's first row within it, and rows uint8 [n, stride].
    """
    reader = RowReader(tol, repair=repair)
    token_of_row = tol.token_of_row()
    progress = Progress("loading rows", tol.vocab_size, "row", stream=sys.stderr)  # stdout is for the text
    for number, (tier, first) in enumerate(zip(tol.layout.tiers, tol.layout.first_rows)):
        step = max(1, _LOAD_BYTES // max(tier.stride, 1))
        for start in range(0, tier.rows, step):
            stop = min(start + step, tier.rows)
            raw, _ = reader.read(token_of_row[first + start : first + stop])
            place(number, start, raw[:, : tier.stride])
            progress.update(first + stop)
    progress.close()
    reader.close()


class DeviceRows(_FileRows):
    """The whole encoded table in device memory.

    Args:
      repair: as of `RowReader`.
    Raises: UserError if it does not fit.
    """

    on_device = True

    def __init__(self, tol: TolFile, mesh, embedding=None, overlay: Overlay | None = None, repair=None):
        super().__init__(tol, mesh, embedding, overlay)
        _check_fits(tol.layout.row_bytes, device_memory(mesh), f"{tol.path}: rows on the device")
        self._load_tables(repair)
        self._constants["row_of_token"] = self._put(tol.row_of_token)
        self._fetch = jax.jit(self._fetch_body)
        self.tokens = 0

    def _load_tables(self, repair):
        layout = self.tol.layout
        dtype, row_shape = layout.row_type
        is_bytes = dtype == np.uint8
        self._tables = []
        for tier in layout.tiers:
            shape = (tier.stride,) if is_bytes else row_shape  # tiers may have rows of different lengths
            self._tables.append(self._zeros(tier.rows, *shape, dtype=dtype))
        # The table is donated: it is updated in place instead of copied for every piece.
        put = jax.jit(lambda table, rows, at: jax.lax.dynamic_update_slice_in_dim(table, rows, at, 0), donate_argnums=0)

        def place(tier, start, raw):
            self._tables[tier] = put(self._tables[tier], raw if is_bytes else layout.view(raw), start)

        _load(self.tol, place, repair)

    def _fetch_body(self, constants, tables, ids_U):
        layout = self.tol.layout
        row_U = constants["row_of_token"][ids_U]
        tier_U = jnp.zeros_like(row_U)
        raw = None
        for number, (tier, first, table) in enumerate(zip(layout.tiers, layout.first_rows, tables)):
            # Every row is read from each tier, clipped into it, and then selected: shapes stay static.
            found = table[jnp.clip(row_U - first, 0, tier.rows - 1)]
            if len(tables) > 1:
                found = jnp.pad(found, ((0, 0), (0, layout.stride - tier.stride)))
            is_here = row_U >= first
            raw = found if raw is None else jnp.where(is_here[:, None], found, raw)
            tier_U = jnp.where(is_here, number, tier_U)
        return self._token_rows(constants, raw, tier_U, ids_U)

    def fetch(self, ids_U) -> TokenRows:
        """Rows of token ids."""
        self.tokens += len(ids_U)
        with jax.set_mesh(self.mesh):
            return self._fetch(self._constants, self._tables, ids_U)

    def stats(self) -> dict:
        return {"rows": "device", "row_requests": self.tokens, "device_bytes": self.tol.layout.row_bytes}

    def close(self) -> None:
        """Closes the file too."""
        self._tables = []
        self.tol.close()


class HostTable:
    """The whole encoded table in host memory, read row by row.

    Args:
      repair: as of `RowReader`.
    Attributes:
      bytes: read so far.
    Raises: UserError if it does not fit.
    """

    place = "host"
    repaired = 0

    def __init__(self, tol: TolFile, repair=None):
        self.tol, self.bytes = tol, 0
        _check_fits(tol.layout.row_bytes, host_memory(), f"{tol.path}: rows in host memory")
        self._tables = [np.empty((tier.rows, tier.stride), np.uint8) for tier in tol.layout.tiers]

        def place(tier, start, raw):
            self._tables[tier][start : start + len(raw)] = raw

        _load(tol, place, repair)

    def read(self, ids_U: np.ndarray, out: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """As `RowReader.read`: (uint8 [U, longest row], int32 [U], the tier of each row)."""
        rows_U = self.tol.row_of_token[ids_U]
        tier_U = self.tol.tier_of_row[rows_U].astype(np.int32)
        if out is None:
            out = np.empty((len(rows_U), self.tol.layout.stride), np.uint8)
        first_rows = self.tol.layout.first_rows
        for i, (row, tier) in enumerate(zip(rows_U, tier_U)):
            table = self._tables[tier]
            out[i, : table.shape[1]] = table[row - first_rows[tier]]
        self.bytes += int(self.tol.stride_of_row[rows_U].sum())
        return out, tier_U

    def close(self) -> None:
        self._tables = []


class _Lookup(NamedTuple):
    """Where the rows of a fetch are found. N distinct token ids stand for the U that were asked for.

    Attributes:
      ids_N: distinct ids in rising order.
      inverse_U: place in `ids_N` of each id that was asked for.
      is_cached_N: whether the cache holds the row.
      slot_N: int32, slot of the cache, or -1.
    """

    ids_N: np.ndarray
    inverse_U: np.ndarray
    is_cached_N: np.ndarray
    slot_N: np.ndarray

    @property
    def as_asked(self) -> bool:
        """Whether no row is cached, and the ids came distinct and in rising order but for repeats at the end.

        The rows are then staged in the order in which they were asked for, and need not be gathered.
        """
        count = len(self.ids_N)
        return not self.is_cached_N.any() and np.array_equal(self.inverse_U[:count], np.arange(count))


class CachedRows(_FileRows):
    """Rows of a table on the host or disk, through a cache on the device.

    Args:
      table: HostTable or RowReader.
      cache: bytes of encoded rows to keep; at least one row's.
    Attributes:
      requests, hits, misses: distinct rows that were asked for, found in the cache, read from the table.
      seconds: of each fetch, but for those that compiled.
    Raises: UserError if the cache has no room for a row or is larger than the device's memory.
    """

    on_device = False

    def __init__(self, table, mesh, cache: int, embedding=None, overlay: Overlay | None = None):
        tol = table.tol
        super().__init__(tol, mesh, embedding, overlay)
        self.table, stride = table, tol.layout.stride
        if cache < stride:
            raise ArgumentError("cache", f"expected at least one row of {tol.path}, {stride:,} bytes, found {cache:,}")
        free = device_memory(mesh)
        if cache > free:
            raise ArgumentError("cache", f"expected at most {free:,} bytes, free on the device, found {cache:,}")
        slots = min(cache // stride, tol.vocab_size)
        # {token: slot}, the token used last at the end
        self._slot_of: collections.OrderedDict[int, int] = collections.OrderedDict()
        self._free = list(range(slots))[::-1]
        dtype, shape = tol.layout.row_type
        self._cache = self._zeros(slots, *shape, dtype=dtype)
        self._tier_of_slot = np.zeros(slots, np.int32)
        self._assemble = jax.jit(self._assemble_body)
        # The cache is donated: it is updated in place.
        self._insert = jax.jit(
            lambda cache, staged, slots_M: cache.at[slots_M].set(staged, mode="drop"), donate_argnums=0
        )
        self._compiled: set[tuple[int, int, bool]] = set()
        self.requests = self.hits = self.misses = 0
        self.seconds: list[float] = []
        if "counts" in tol.tensors:
            self._warm(slots)
        self._bytes_before = table.bytes

    def _warm(self, slots):
        """Fills the cache with the most frequent rows; the most frequent counts as used last."""
        tokens = self.tol.token_of_row()[:slots]
        step = max(1, _LOAD_BYTES // self.tol.layout.stride)
        for start in range(0, slots, step):
            ids = tokens[start : start + step]
            raw, tier = self.table.read(ids)
            self._keep(ids, self.tol.layout.view(raw), tier)
        for token in tokens[::-1].tolist():
            self._slot_of.move_to_end(token)

    def _keep(self, ids, raw_MS, tier_M):
        """Puts rows into the cache, as many as there is room for; `raw_MS` may have further rows at its end."""
        slots = np.full(len(raw_MS), len(self._tier_of_slot), np.int32)  # past the end, where `_insert` drops rows
        for i, token in enumerate(ids[: len(self._tier_of_slot)].tolist()):
            if not self._free:
                _, freed = self._slot_of.popitem(last=False)
                self._free.append(freed)
            slots[i] = self._slot_of[token] = self._free.pop()
            self._tier_of_slot[slots[i]] = tier_M[i]
        self._cache = self._insert(self._cache, raw_MS, slots)

    def _assemble_body(self, constants, cache, staged, is_cached_U, at_U, tier_U, ids_U):
        """`at_U`: slot of the cache or place in `staged`. None for `is_cached_U`: `staged` is in order already."""
        if staged is None:
            raw = cache[at_U]
        elif is_cached_U is None:
            raw = staged
        else:
            is_cached = is_cached_U.reshape(-1, *[1] * (staged.ndim - 1))
            raw = jnp.where(is_cached, cache[at_U], staged[jnp.where(is_cached_U, 0, at_U)])
        return self._token_rows(constants, raw, tier_U, ids_U)

    def fetch(self, ids_U: np.ndarray) -> TokenRows:
        """Rows of token ids. Ids may repeat, and are read once; of repeats at the end, which pad, rows may be zero."""
        start = time.perf_counter()
        lookup = self._look_up(ids_U)
        missing = np.nonzero(~lookup.is_cached_N)[0]
        as_asked = lookup.as_asked
        at_N = lookup.slot_N.copy()
        tier_N = self._tier_of_slot[np.maximum(at_N, 0)]
        staged = None
        if len(missing):
            staged, tier_N[missing] = self._stage(lookup.ids_N[missing], len(ids_U), as_asked)
            at_N[missing] = np.arange(len(missing))
        inverse_U = lookup.inverse_U
        with jax.set_mesh(self.mesh):
            is_cached_U = None if as_asked else lookup.is_cached_N[inverse_U]
            rows = self._assemble(
                self._constants, self._cache, staged, is_cached_U, at_N[inverse_U], tier_N[inverse_U], ids_U
            )
            # After the rows were assembled: what is kept now may take the place of a row that they need.
            if staged is not None:
                self._keep(lookup.ids_N[missing], staged, tier_N[missing])
        shape = (len(ids_U), 0 if staged is None else len(staged), as_asked)
        if shape in self._compiled:
            self.seconds.append(time.perf_counter() - start)
        self._compiled.add(shape)
        self.requests += len(lookup.ids_N)
        self.misses += len(missing)
        self.hits += len(lookup.ids_N) - len(missing)
        return rows

    def _look_up(self, ids_U) -> _Lookup:
        """Finds rows in the cache, which counts as a use of them."""
        ids_N, inverse_U = np.unique(ids_U, return_inverse=True)
        slot_N = np.array([self._slot_of.get(token, -1) for token in ids_N.tolist()], np.int32)
        is_cached_N = slot_N >= 0
        for token in ids_N[is_cached_N].tolist():
            self._slot_of.move_to_end(token)
        return _Lookup(ids_N, inverse_U, is_cached_N, slot_N)

    def _stage(self, ids, asked: int, as_asked: bool) -> tuple[jax.Array, np.ndarray]:
        """Reads rows and hands them to the device: (encoded rows, padded with zeros; tier of each row).

        Args:
          asked: U, the number of ids in the fetch.
        """
        if as_asked:
            count = asked
        elif len(ids) == 1:  # the usual decode step
            count = 1
        else:
            count = bucket(len(ids), asked)  # few shapes, each of which is compiled
        buffer = staging(count, self.tol.layout.stride)
        buffer[len(ids) :] = 0
        _, tier = self.table.read(ids, buffer)
        return self._put(self.tol.layout.view(buffer)), tier

    def stats(self) -> dict:
        """Hits, bytes read, and milliseconds a fetch, reading the misses included."""
        ms = np.array(self.seconds) * 1e3
        return {
            "rows": self.table.place,
            "cache": "least recently used, on the device",
            "cache_bytes": len(self._tier_of_slot) * self.tol.layout.stride,
            "row_requests": self.requests,
            "hit_rate": self.hits / max(self.requests, 1),
            "bytes_per_token": (self.table.bytes - self._bytes_before) / max(self.requests, 1),
            "fetch_ms_p50": float(np.percentile(ms, 50)) if len(ms) else 0.0,
            "fetch_ms_p99": float(np.percentile(ms, 99)) if len(ms) else 0.0,
            "rows_repaired": self.table.repaired,
        }

    def close(self) -> None:
        """Closes the file too."""
        self.table.close()
        self.tol.close()


def device_memory(mesh) -> int:
    """Bytes that are free on a device; on a CPU, those of the host."""
    stats = mesh.devices.flat[0].memory_stats()
    if not stats or "bytes_limit" not in stats:
        return host_memory()
    return stats["bytes_limit"] - stats["bytes_in_use"]


def host_memory() -> int:
    """Bytes that are free on the host."""
    with open("/proc/meminfo", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))


def _check_fits(needed: int, free: int, what: str) -> None:
    if needed > free:
        raise UserError(f"{what}: needs {needed:,} bytes, found {free:,} bytes of memory")
