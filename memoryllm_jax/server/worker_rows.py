"""Rows of the served model for the worker thread."""

from memoryllm_jax.inference.engine import Engine
from memoryllm_jax.inference.rows import RowSource
from memoryllm_jax.tol.cached_rows import CachedRows
from memoryllm_jax.tol.reader import RowReader
from memoryllm_jax.tol.sources import Repair

_CACHE_BYTES = 64 << 20


class WorkerRows:
    """The engine's rows, from a source that another thread can use while the engine runs.

    Args:
      engine: the model.
    Attributes:
      source: the engine's own source where its fetches change nothing; else one that reads the same file, through a
        cache of its own.
    """

    source: RowSource

    def __init__(self, engine: Engine):
        rows = self.source = engine.rows
        self._reader = None
        # A fetch of `CachedRows` donates its cache, which the engine's thread may be about to read.
        if isinstance(rows, CachedRows):
            tol = rows.tol
            self._reader = RowReader(tol, repair=Repair(engine.trained, tol))
            cache = max(min(_CACHE_BYTES, tol.layout.row_bytes), tol.layout.stride)
            self.source = CachedRows(self._reader, rows.mesh, cache, rows.constants.get("embedding"))

    def close(self) -> None:
        """Ends the threads that read. The file stays open: it is the engine's."""
        if self._reader:
            self._reader.close()
