"""The whole table of a ToL file on the device or in host memory, and what all sources of a file's rows share.

Rows go to the device in their encoded form and are decoded there.
"""

import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.model.token_memory import TokenRows
from memoryllm_jax.tol.format import TolFile
from memoryllm_jax.tol.layout import decode_rows
from memoryllm_jax.tol.reader import RowReader

LOAD_BYTES = 64 << 20  # read at a time when a whole table is loaded


class FileRows:
    """What all places share: turns encoded rows on the device into `TokenRows`.

    Args:
      tol: the file, which `close` closes.
      mesh: devices that the rows are replicated on.
      embedding: [V, D] on the device, which gives x0 where the file holds none; else it is not used.
    """

    weights_bytes = 0  # the file replaces them; a tied embedding is the decoder's

    def __init__(self, tol: TolFile, mesh, embedding=None):
        if not tol.layout.has_x0 and embedding is None:
            raise ValueError("the file holds no x0: the embedding is needed")
        self.tol, self.mesh = tol, mesh
        self._replicated = NamedSharding(mesh, P())
        # Passed to the jitted functions as an argument, so that they are not compiled into each of them.
        self.constants = {"bases": self.put({name: tol.basis(name) for name in tol.layout.rotated})}
        if not tol.layout.has_x0:
            self.constants["embedding"] = embedding

    def put(self, tree):
        return jax.device_put(tree, self._replicated)

    def zeros(self, *shape, dtype):
        """Zeros made on the devices, without a copy on the host."""
        return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=self._replicated)()

    def token_rows(self, constants, raw, tier_U, ids_U) -> TokenRows:
        """Decodes rows. For use in jit.

        Args:
          constants: `self.constants`.
          raw: encoded rows as `Layout.view` gives them, [U, ...].
          tier_U: int32 [U], the tier of each row.
          ids_U: int32 [U], the token of each row.
        """
        layout = self.tol.layout
        vectors = decode_rows(layout, raw, tier_U, constants["bases"])
        x0_UD = vectors["x0"] if layout.has_x0 else constants["embedding"][ids_U]
        ffn = [vectors.get(f"ffn.{layer}") for layer in range(layout.layers)]
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
        step = max(1, LOAD_BYTES // max(tier.stride, 1))
        for start in range(0, tier.rows, step):
            stop = min(start + step, tier.rows)
            raw, _ = reader.read(token_of_row[first + start : first + stop])
            place(number, start, raw[:, : tier.stride])
            progress.update(first + stop)
    progress.close()
    reader.close()


class DeviceRows(FileRows):
    """Rows from the whole encoded table in device memory.

    Args:
      repair: as of `RowReader`.
    Attributes:
      tokens: number of rows fetched so far.
    Raises: UserError if the table does not fit.
    """

    on_device = True

    def __init__(self, tol: TolFile, mesh, embedding=None, repair=None):
        super().__init__(tol, mesh, embedding)
        _check_fits(tol.layout.row_bytes, device_memory(mesh), f"{tol.path}: rows on the device")
        self._load_tables(repair)
        self.constants["row_of_token"] = self.put(tol.row_of_token)
        self._gather = jax.jit(self.gather)
        self.tokens = 0

    @property
    def arrays(self):
        """What `gather` reads."""
        return self.constants, self._tables

    def _load_tables(self, repair):
        layout = self.tol.layout
        dtype, row_shape = layout.row_type
        is_bytes = dtype == np.uint8
        self._tables = []
        for tier in layout.tiers:
            shape = (tier.stride,) if is_bytes else row_shape  # tiers may have rows of different lengths
            self._tables.append(self.zeros(tier.rows, *shape, dtype=dtype))
        # The table is donated: it is updated in place instead of copied for every piece.
        put = jax.jit(lambda table, rows, at: jax.lax.dynamic_update_slice_in_dim(table, rows, at, 0), donate_argnums=0)

        def place(tier, start, raw):
            self._tables[tier] = put(self._tables[tier], raw if is_bytes else layout.view(raw), start)

        _load(self.tol, place, repair)

    def gather(self, arrays, ids_U) -> TokenRows:
        """Gathers rows from the tables of all tiers. For use in jit."""
        constants, tables = arrays
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
        return self.token_rows(constants, raw, tier_U, ids_U)

    def fetch(self, ids_U) -> TokenRows:
        """Rows of token ids [U]."""
        with jax.set_mesh(self.mesh):
            return self._gather(self.arrays, ids_U)

    def stats(self) -> dict:
        """Where rows are, and the bytes of the table."""
        return {"rows": "device", "device_bytes": self.tol.layout.row_bytes}

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
        for tier, (table, first) in enumerate(zip(self._tables, self.tol.layout.first_rows)):
            here = np.nonzero(tier_U == tier)[0]
            out[here, : table.shape[1]] = table[rows_U[here] - first]
        self.bytes += int(self.tol.stride_of_row[rows_U].sum())
        return out, tier_U

    def close(self) -> None:
        self._tables = []


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
