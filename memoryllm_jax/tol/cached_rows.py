"""A ToL file's rows on the host or the disk, through a cache on the device (an `inference.rows.RowSource`).

The cache has a fixed size, and the least recently used rows leave it first. Where the file is in order of frequency, it
starts with the most frequent rows.
"""

import collections
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.inference import vocabulary
from memoryllm_jax.inference.decoder import bucket, next_power_of_two
from memoryllm_jax.model.token_memory import TokenRows
from memoryllm_jax.tol import rows as rows_lib
from memoryllm_jax.tol.reader import staging
from memoryllm_jax.tol.rows import LOAD_BYTES, FileRows

_RECENT = 10_000  # times that are kept: a server fetches without end


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


class CachedRows(FileRows):
    """Rows of a table on the host or disk, through a cache on the device.

    The host knows which rows the cache holds. The device knows too, for decode steps whose ids are not read yet.

    Args:
      table: HostTable or RowReader; `close` closes it.
      cache: size of the cache in bytes, at least that of one row.
    Attributes:
      requests: number of rows that were asked for, counting each distinct row of a fetch or a decode step once.
      hits: number of those that the cache held.
      misses: number of those that were read from the table.
      seconds: the times of the recent fetches and `hold`s that did not compile.
    Raises: UserError if the cache has no room for a row or is larger than the device's memory.
    """

    on_device = False

    def __init__(self, table, mesh, cache: int, embedding=None):
        tol = table.tol
        super().__init__(tol, mesh, embedding)
        self.table, stride = table, tol.layout.stride
        if cache < stride:
            raise ArgumentError("cache", f"expected at least one row of {tol.path}, {stride:,} bytes, found {cache:,}")
        free = rows_lib.device_memory(mesh)
        if cache > free:
            raise ArgumentError("cache", f"expected at most {free:,} bytes, free on the device, found {cache:,}")
        self._assemble = jax.jit(self._assemble_body)
        # The cache is donated: it is updated in place instead of copied for every fetch.
        self._insert = jax.jit(_insert, donate_argnums=0)
        self._compiled: set[tuple[int, int, bool]] = set()
        self.requests = 0
        self.hits = 0
        self.misses = 0
        self.seconds: collections.deque[float] = collections.deque(maxlen=_RECENT)
        self._bytes_to_fill = 0  # bytes read to fill the cache at the start, which statistics leave out
        self._make_cache(min(cache // stride, tol.vocab_size))

    def _make_cache(self, slots: int):
        """Makes a new cache of this many rows, with the most frequent ones if the file knows them."""
        vocab = self.tol.vocab_size
        self._slot_of_token = np.full(vocab, -1, np.int32)  # -1: the row is not in the cache
        self._token_of_slot = np.full(slots, vocab, np.int32)  # the vocabulary's size: the slot is empty
        self._tier_of_slot = np.zeros(slots, np.int32)
        self._used = np.zeros(slots, np.int64)  # number of the last use; 0: the slot is empty
        self._uses = 0
        dtype, shape = self.tol.layout.row_type
        tables = self.put({"slot_of_token": self._slot_of_token, "tier_of_slot": self._tier_of_slot})
        self._cache = tables | {"rows": self.zeros(slots, *shape, dtype=dtype)}
        if "counts" in self.tol.tensors:
            before = self.table.bytes
            self._warm(slots)
            self._bytes_to_fill += self.table.bytes - before

    def _warm(self, slots):
        """Fills the cache with the most frequent rows; the most frequent one counts as used most recently."""
        tokens = self.tol.token_of_row()[:slots]
        step = max(1, LOAD_BYTES // self.tol.layout.stride)
        for chunk in vocabulary.chunks(tokens, step):
            ids = chunk.real_ids
            raw, tier = self.table.read(ids)
            self._keep(ids, self.tol.layout.view(raw), tier)
        self._use(self._slot_of_token[tokens[::-1]])

    def _use(self, slots):
        """Counts a use of these slots, one after the other."""
        self._used[slots] = self._uses + 1 + np.arange(len(slots))
        self._uses += len(slots)

    def _keep(self, ids, raw_MS, tier_M):
        """Puts rows into the cache, as many as there is room for, in place of the least recently used ones.

        Args:
          ids: tokens of the first rows.
          raw_MS: encoded rows; those after the rows of `ids` are padding.
          tier_M: the tier of each row.
        """
        size, vocab = len(self._used), self.tol.vocab_size
        ids = ids[:size]
        slots = np.argpartition(self._used, len(ids) - 1)[: len(ids)]
        left = self._token_of_slot[slots]
        self._slot_of_token[left[left < vocab]] = -1
        self._slot_of_token[ids], self._token_of_slot[slots] = slots, ids
        self._tier_of_slot[slots] = tier_M[: len(ids)]
        self._use(slots)

        # In one array, because each array that goes to the device takes time. Padding is past the end of the tables.
        changes_4M = np.full((4, len(raw_MS)), max(size, vocab), np.int32)
        changes_4M[:, : len(ids)] = slots, left, ids, tier_M[: len(ids)]
        self._cache = self._insert(self._cache, raw_MS, changes_4M)

    def _assemble_body(self, constants, cache, staged, is_cached_U, at_U, tier_U, ids_U):
        """Gathers rows from the cache and from those that were just read. For use in jit.

        Args:
          constants, tier_U, ids_U: as of `token_rows`.
          cache: encoded rows [slots, ...], those of `self._cache`.
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
        return self.token_rows(constants, raw, tier_U, ids_U)

    @property
    def arrays(self):
        """What `gather` and `holds` read. A later `hold` or `fetch` donates the cache, and makes another one."""
        return self.constants, self._cache

    def gather(self, arrays, ids_U) -> TokenRows:
        """Gathers rows from the cache. For use in jit."""
        constants, cache = arrays
        at_U = jnp.maximum(cache["slot_of_token"][ids_U], 0)
        return self.token_rows(constants, cache["rows"][at_U], cache["tier_of_slot"][at_U], ids_U)

    def holds(self, arrays, ids_U):
        """Whether the cache holds each row. For use in jit."""
        _, cache = arrays
        return cache["slot_of_token"][ids_U] >= 0

    def reserve(self, rows: int) -> None:
        """Replaces the cache by a larger one if it has no room for the rows of one decode step."""
        if rows > len(self._used):
            self._make_cache(rows)

    def hold(self, ids_U: np.ndarray) -> bool:
        """Reads the rows of these ids that the cache does not hold. Returns: whether there were any."""
        start = time.perf_counter()
        lookup = self._look_up(ids_U)
        missing = lookup.ids_N[~lookup.is_cached_N]
        if len(missing):
            # Padded to one of two shapes: a single row, the usual case, or as many as a step may need.
            # An array of the host: the call that keeps it takes it to the device in less time than `put` does.
            staged, tier = self._stage(missing, 1 if len(missing) == 1 else next_power_of_two(len(ids_U)))
            with jax.set_mesh(self.mesh):
                self._keep(missing, staged, tier)
        self._count(lookup, (0, len(staged) if len(missing) else 0, False), start)
        return len(missing) > 0

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
            # Rows that are used without a gather must have the right number. Else it is rounded up, as every number of
            # rows compiles anew.
            count = len(ids_U) if as_asked else bucket(len(missing), len(ids_U))
            staged, tier_N[missing] = self._stage(lookup.ids_N[missing], count)
            staged = self.put(staged)  # two calls take it
            at_N[missing] = np.arange(len(missing))
        inverse_U = lookup.inverse_U
        with jax.set_mesh(self.mesh):
            is_cached_U = None if as_asked else lookup.is_cached_N[inverse_U]
            rows = self._assemble(
                self.constants, self._cache["rows"], staged, is_cached_U, at_N[inverse_U], tier_N[inverse_U], ids_U
            )
            # Only after the rows were assembled: what is kept now may replace a cached row that they need.
            if staged is not None:
                self._keep(lookup.ids_N[missing], staged, tier_N[missing])
        self._count(lookup, (len(ids_U), 0 if staged is None else len(staged), as_asked), start)
        return rows

    def _count(self, lookup: _Lookup, shape: tuple[int, int, bool], start: float):
        """Adds a fetch to the statistics.

        Args:
          shape: identifies the shapes of its arrays.
          start: when it began.
        """
        # The first fetch of these shapes compiled: its time says nothing about later ones.
        if shape in self._compiled:
            self.seconds.append(time.perf_counter() - start)
        self._compiled.add(shape)
        hits = int(lookup.is_cached_N.sum())
        self.requests += len(lookup.ids_N)
        self.misses += len(lookup.ids_N) - hits
        self.hits += hits

    def _look_up(self, ids_U) -> _Lookup:
        """Finds rows in the cache, which counts as a use of them."""
        if len(ids_U) == 1:  # for each token of a single text, np.unique would be a tenth of the host's time
            ids_N, inverse_U = ids_U, np.zeros(1, np.intp)
        else:
            ids_N, inverse_U = np.unique(ids_U, return_inverse=True)
        slot_N = self._slot_of_token[ids_N]
        is_cached_N = slot_N >= 0
        self._use(slot_N[is_cached_N])
        return _Lookup(ids_N, inverse_U, is_cached_N, slot_N)

    def _stage(self, ids, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Reads rows from the table.

        Args:
          ids: distinct token ids to read.
          count: number of rows of the result; those past the ids' are zero.
        Returns: (encoded rows, the tier of each id's row).
        """
        buffer = staging(count, self.tol.layout.stride)
        buffer[len(ids) :] = 0
        _, tier = self.table.read(ids, buffer)
        return self.tol.layout.view(buffer), tier

    def stats(self) -> dict:
        """Hit rate, bytes read, and the milliseconds of a fetch, which include reading from the table."""
        ms = np.array(self.seconds.copy()) * 1e3  # copied at once, as another thread may append
        return {
            "rows": self.table.place,
            "cache": "least recently used, on the device",
            "cache_bytes": len(self._used) * self.tol.layout.stride,
            "row_requests": self.requests,
            "hit_rate": self.hits / max(self.requests, 1),
            "bytes_per_token": (self.table.bytes - self._bytes_to_fill) / max(self.requests, 1),
            "fetch_ms_p50": float(np.percentile(ms, 50)) if len(ms) else 0.0,
            "fetch_ms_p99": float(np.percentile(ms, 99)) if len(ms) else 0.0,
            "rows_repaired": self.table.repaired,
        }

    def close(self) -> None:
        """Closes the table and the file."""
        self.table.close()
        self.tol.close()


def _insert(cache, raw_MS, changes_4M):
    """Puts rows into slots of a cache as `CachedRows` keeps it. For use in jit.

    Args:
      raw_MS: encoded rows.
      changes_4M: int32, for each row its slot, the token whose row leaves the slot, the row's token, and its tier.
        Those past the end of the cache and of the vocabulary are dropped.
    """
    slots_M, left_M, ids_M, tier_M = changes_4M
    slot_of_token = cache["slot_of_token"].at[left_M].set(-1, mode="drop")
    return {
        "rows": cache["rows"].at[slots_M].set(raw_MS, mode="drop"),
        "slot_of_token": slot_of_token.at[ids_M].set(slots_M, mode="drop"),
        "tier_of_slot": cache["tier_of_slot"].at[slots_M].set(tier_M, mode="drop"),
    }
