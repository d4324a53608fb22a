"""Sources of rows (`inference.rows.RowSource`) that look them up in a ToL file: on the device, the host or the disk.

Rows go to the device in their encoded form and are decoded there. Rows on the host or the disk go through a cache of
fixed size on the device, which the least recently used rows leave first. Where the file is in order of frequency, the
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
from memoryllm_jax.inference import vocabulary
from memoryllm_jax.inference.decoder import bucket
from memoryllm_jax.model.token_memory import TokenRows
from memoryllm_jax.tol.format import TolFile
from memoryllm_jax.tol.layout import decode_rows
from memoryllm_jax.tol.overlay import Overlay
from memoryllm_jax.tol.reader import RowReader, staging

_LOAD_BYTES = 64 << 20  # read at a time when a whole table is loaded


class _FileRows:
    """What all places share: turns encoded rows on the device into `TokenRows`, with an overlay's edits.

    Args:
      tol: the file, which `close` closes.
      mesh: devices that the rows are replicated on.
      embedding: [V, D] on the device, which gives x0 where the file holds none; else it is not used.
      overlay: edits of the rows, or None.
    """

    weights_bytes = 0  # the file replaces them; a tied embedding is the decoder's

    def __init__(self, tol: TolFile, mesh, embedding=None, overlay: Overlay | None = None):
        if not tol.layout.has_x0 and embedding is None:
            raise ValueError("the file holds no x0: the embedding is needed")
        self.tol, self.mesh, self._overlay = tol, mesh, overlay
        self._replicated = NamedSharding(mesh, P())
        # Passed to the jitted functions as an argument, so that they are not compiled into each of them.
        self._constants = {"bases": self._put({name: tol.basis(name) for name in tol.layout.rotated})}
        if not tol.layout.has_x0:
            self._constants["embedding"] = embedding
        if overlay is not None:
            self._constants["overlay"] = self._put(overlay.arrays())

    def _put(self, tree):
        return jax.device_put(tree, self._replicated)

    def _zeros(self, *shape, dtype):
        """Zeros made on the devices, without a copy on the host."""
        return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=self._replicated)()

    def _token_rows(self, constants, raw, tier_U, ids_U) -> TokenRows:
        """Decodes rows and edits them. For use in jit.

        Args:
          constants: `self._constants`.
          raw: encoded rows as `Layout.view` gives them, [U, ...].
          tier_U: int32 [U], the tier of each row.
          ids_U: int32 [U], the token of each row.
        """
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
      place: is called for each piece with its tier, the number of its first row within the tier, and its rows, uint8
        [n, bytes of a row].
      repair: as of `RowReader`.
    """
    reader = RowReader(tol, repair=repair)
    token_of_row = tol.token_of_row()
    progress = Progress("loading rows", tol.vocab_size, "row", stream=sys.stderr)  # stdout is for generated text
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
    """Rows from the whole encoded table in device memory.

    Args:
      repair: as of `RowReader`.
    Attributes:
      tokens: number of rows fetched so far.
    Raises: UserError if the table does not fit.
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
        """Gathers rows from the tables of all tiers. For use in jit."""
        layout = self.tol.layout
        row_U = constants["row_of_token"][ids_U]
        tier_U = jnp.zeros_like(row_U)
        raw = None
        for number, (tier, first, table) in enumerate(zip(layout.tiers, layout.first_rows, tables)):
            # Shapes must be static: some row is read from every tier, and that of the token's own tier is selected.
            found = table[jnp.clip(row_U - first, 0, tier.rows - 1)]
            if len(tables) > 1:
                found = jnp.pad(found, ((0, 0), (0, layout.stride - tier.stride)))
            # Tiers are in the order of rows: later ones overwrite what earlier ones selected.
            is_here = row_U >= first
            raw = found if raw is None else jnp.where(is_here[:, None], found, raw)
            tier_U = jnp.where(is_here, number, tier_U)
        return self._token_rows(constants, raw, tier_U, ids_U)

    def fetch(self, ids_U) -> TokenRows:
        """Rows of token ids [U], which may be on the device: the host does not wait for them."""
        self.tokens += len(ids_U)
        with jax.set_mesh(self.mesh):
            return self._fetch(self._constants, self._tables, ids_U)

    def stats(self) -> dict:
        """Where rows are, how many were fetched, and the bytes of the table."""
        return {"rows": "device", "row_requests": self.tokens, "device_bytes": self.tol.layout.row_bytes}

    def close(self) -> None:
        """Frees the table and closes the file."""
        self._tables = []
        self.tol.close()


class HostTable:
    """The whole encoded table in host memory, with the interface of `RowReader`.

    Args:
      tol: the file, which the caller closes.
      repair: as of `RowReader`; it is used while the table is loaded.
    Attributes:
      bytes: number of bytes read from the table so far.
    Raises: UserError if the table does not fit.
    """

    place = "host"
    repaired = 0  # rows that were repaired while the table was loaded are not counted

    def __init__(self, tol: TolFile, repair=None):
        self.tol, self.bytes = tol, 0
        _check_fits(tol.layout.row_bytes, host_memory(), f"{tol.path}: rows in host memory")
        self._tables = [np.empty((tier.rows, tier.stride), np.uint8) for tier in tol.layout.tiers]

        def place(tier, start, raw):
            self._tables[tier][start : start + len(raw)] = raw

        _load(tol, place, repair)

    def read(self, ids_U: np.ndarray, out: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Copies rows of token ids, with the arguments and the result of `RowReader.read`."""
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
    """Where the rows of a fetch are found. N is the number of distinct ids among the U that were asked for.

    Attributes:
      ids_N: the distinct ids in rising order.
      inverse_U: the place in `ids_N` of each id that was asked for.
      is_cached_N: whether the cache holds the row.
      slot_N: int32, the slot of the cache that holds the row, or -1.
    """

    ids_N: np.ndarray
    inverse_U: np.ndarray
    is_cached_N: np.ndarray
    slot_N: np.ndarray

    @property
    def as_asked(self) -> bool:
        """Whether rows read from the table can be used in the order in which they were read, without a gather.

        That is so if no row is cached and the ids came distinct and in rising order, except for repeats at the end.
        """
        count = len(self.ids_N)
        return not self.is_cached_N.any() and np.array_equal(self.inverse_U[:count], np.arange(count))


class CachedRows(_FileRows):
    """Rows of a table on the host or disk, through a cache on the device.

    Args:
      table: HostTable or RowReader; `close` closes it.
      cache: size of the cache in bytes, at least that of one row.
    Attributes:
      requests: number of rows that were asked for, counting each distinct row of a fetch once.
      hits: number of those that the cache held.
      misses: number of those that were read from the table.
      seconds: the time of each fetch that did not compile.
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
        # {token: slot}; the least recently used token comes first.
        self._slot_of: collections.OrderedDict[int, int] = collections.OrderedDict()
        self._free = list(range(slots))[::-1]
        dtype, shape = tol.layout.row_type
        self._cache = self._zeros(slots, *shape, dtype=dtype)
        self._tier_of_slot = np.zeros(slots, np.int32)
        self._assemble = jax.jit(self._assemble_body)
        # The cache is donated: it is updated in place instead of copied for every fetch.
        self._insert = jax.jit(
            lambda cache, staged, slots_M: cache.at[slots_M].set(staged, mode="drop"), donate_argnums=0
        )
        self._compiled: set[tuple[int, int, bool]] = set()
        self.requests = 0
        self.hits = 0
        self.misses = 0
        self.seconds: list[float] = []
        if "counts" in tol.tensors:
            self._warm(slots)
        self._bytes_before = table.bytes  # statistics leave out what filled the cache

    def _warm(self, slots):
        """Fills the cache with the most frequent rows; the most frequent one counts as used most recently."""
        tokens = self.tol.token_of_row()[:slots]
        step = max(1, _LOAD_BYTES // self.tol.layout.stride)
        for chunk in vocabulary.chunks(tokens, step):
            ids = chunk.real_ids
            raw, tier = self.table.read(ids)
            self._keep(ids, self.tol.layout.view(raw), tier)
        for token in tokens[::-1].tolist():
            self._slot_of.move_to_end(token)

    def _keep(self, ids, raw_MS, tier_M):
        """Puts rows into the cache, as many as there is room for, in place of the least recently used ones.

        Args:
          ids: tokens of the first rows.
          raw_MS: encoded rows; those after the rows of `ids` are padding.
          tier_M: the tier of each row.
        """
        size = len(self._tier_of_slot)
        slots = np.full(len(raw_MS), size, np.int32)  # past the end, where `_insert` drops rows
        for i, token in enumerate(ids[:size].tolist()):
            if not self._free:
                _, freed = self._slot_of.popitem(last=False)
                self._free.append(freed)
            slot = self._free.pop()
            slots[i] = slot
            self._slot_of[token] = slot
            self._tier_of_slot[slot] = tier_M[i]
        self._cache = self._insert(self._cache, raw_MS, slots)

    def _assemble_body(self, constants, cache, staged, is_cached_U, at_U, tier_U, ids_U):
        """Gathers rows from the cache and from those that were just read. For use in jit.

        Args:
          constants, tier_U, ids_U: as of `_token_rows`.
          cache: encoded rows [slots, ...].
          staged: encoded rows that were just read; None where all rows are cached.
          is_cached_U: whether each row is in the cache; None where `staged` holds all rows in their order.
          at_U: the slot of each row in the cache, or its place in `staged`.
        """
        if staged is None:
            raw = cache[at_U]
        elif is_cached_U is None:
            raw = staged
        else:
            is_cached = is_cached_U.reshape(-1, *[1] * (staged.ndim - 1))
            raw = jnp.where(is_cached, cache[at_U], staged[jnp.where(is_cached_U, 0, at_U)])
        return self._token_rows(constants, raw, tier_U, ids_U)

    def fetch(self, ids_U: np.ndarray) -> TokenRows:
        """Rows of token ids, int32 [U] on the host. A distinct id is read once.

        Repeats of an id at the end count as padding: their rows may be zero.
        """
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
            # Only after the rows were assembled: what is kept now may replace a cached row that they need.
            if staged is not None:
                self._keep(lookup.ids_N[missing], staged, tier_N[missing])
        # The first fetch of these shapes compiled: its time says nothing about later ones.
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
        """Reads rows from the table and hands them to the device.

        Args:
          ids: distinct token ids to read.
          asked: U, the number of ids in the fetch.
          as_asked: as of `_Lookup`.
        Returns: (encoded rows, padded with zeros; the tier of each id's row).
        """
        if as_asked:
            count = asked  # the rows are used without a gather, so that their number must be right
        elif len(ids) == 1:  # the usual decode step
            count = 1
        else:
            count = bucket(len(ids), asked)  # rounded up, as every number of rows compiles anew
        buffer = staging(count, self.tol.layout.stride)
        buffer[len(ids) :] = 0
        _, tier = self.table.read(ids, buffer)
        return self._put(self.tol.layout.view(buffer)), tier

    def stats(self) -> dict:
        """Hit rate, bytes read, and the milliseconds of a fetch, which include reading from the table."""
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
        """Closes the table and the file."""
        self.table.close()
        self.tol.close()


def device_memory(mesh) -> int:
    """Free bytes on a device of the mesh; on a CPU, free bytes of the host."""
    stats = mesh.devices.flat[0].memory_stats()
    if not stats or "bytes_limit" not in stats:
        return host_memory()
    return stats["bytes_limit"] - stats["bytes_in_use"]


def host_memory() -> int:
    """Free bytes of the host's memory."""
    with open("/proc/meminfo", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))


def _check_fits(needed: int, free: int, what: str) -> None:
    if needed > free:
        raise UserError(f"{what}: needs {needed:,} bytes, found {free:,} bytes of memory")
