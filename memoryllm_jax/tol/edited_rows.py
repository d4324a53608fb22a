"""Rows with the edits of an overlay, from any source of rows: for the decoder, and whole for comparing and writing."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from memoryllm_jax.inference import ahead
from memoryllm_jax.inference.rows import RowSource
from memoryllm_jax.model.token_memory import TokenRows
from memoryllm_jax.tol.overlay import LayerEdits, Overlay, edited
from memoryllm_jax.tol.sources import Source


class EditedRows:
    """A `RowSource` that gives the rows of another one with edits.

    Args:
      source: the source; `close` closes it.
      overlay: the edits. Later changes of it have no effect.
      mesh: devices that the source's rows lie on.
    Attributes:
      source: as given.
    """

    def __init__(self, source: RowSource, overlay: Overlay, mesh):
        self.source, self._mesh = source, mesh
        # Arguments of the jitted functions, so that they are not compiled into each of them.
        self._layers = jax.device_put(overlay.layers(), NamedSharding(mesh, P()))

    @property
    def on_device(self) -> bool:
        return self.source.on_device

    @property
    def weights_bytes(self) -> int:
        return self.source.weights_bytes

    @property
    def arrays(self):
        """What `gather` and `holds` read: the source's arrays and the edits."""
        return self.source.arrays, self._layers

    def fill(self, params: dict) -> None:
        """Gives the source other parameters."""
        self.source.fill(params)

    def gather(self, arrays, ids_U) -> TokenRows:
        """Rows of token ids with the edits. For use in jit."""
        of_source, layers = arrays
        rows = self.source.gather(of_source, ids_U)
        return rows._replace(rows_LSUP=[_of_layer(*found, ids_U) for found in zip(layers, rows.rows_LSUP, strict=True)])

    def holds(self, arrays, ids_U):
        """Whether the source finds each row. For use in jit."""
        return self.source.holds(arrays[0], ids_U)

    def hold(self, ids_U: np.ndarray) -> bool:
        return self.source.hold(ids_U)

    def reserve(self, rows: int) -> None:
        self.source.reserve(rows)

    def fetch(self, ids_U: np.ndarray) -> TokenRows:
        """Rows of token ids, edited a layer at a time when they are used: the source may compute them only then."""
        rows = self.source.fetch(ids_U)
        return rows._replace(rows_LSUP=_EditedLayers(rows.rows_LSUP, self._layers, ids_U, self._mesh))

    def stats(self) -> dict:
        return self.source.stats()

    def close(self) -> None:
        """Closes the source."""
        self.source.close()


def _of_layer(layer: LayerEdits | None, y_1UD, ids_U):
    """A layer's rows [1, U, D] with its edits. Both may be None. For use in jit."""
    return y_1UD if layer is None else edited(layer, ids_U, None if y_1UD is None else y_1UD[0])[None]


# One function for all layers: those with as many edits have one compiled function.
_edited_layer = ahead.jit(_of_layer)


class _EditedLayers(Sequence):
    """The layers of a fetch with their edits, each made when it is asked for."""

    def __init__(self, rows: Sequence, layers: list[LayerEdits | None], ids_U, mesh):
        self._rows, self._layers, self._ids_U, self._mesh = rows, layers, ids_U, mesh

    def __len__(self):
        return len(self._layers)

    def __getitem__(self, layer):
        y_1UD = self._rows[layer]
        if self._layers[layer] is None:
            return y_1UD
        with jax.set_mesh(self._mesh):
            return _edited_layer(self._layers[layer], y_1UD, self._ids_U)


class EditedSource:
    """A `Source` that gives the full rows of another one with edits.

    Args:
      source: the rows that are edited; its attributes are this one's too.
      overlay: the edits.
    """

    def __init__(self, source: Source, overlay: Overlay):
        self._source, self._layers = source, overlay.layers()
        self.mesh, self.vocab_size, self.dim, self.layers = source.mesh, source.vocab_size, source.dim, source.layers
        self.has_x0, self.identity = source.has_x0, source.identity
        self.bits, self.counts = source.bits, source.counts

    def vectors(self, ids_U) -> dict:
        """The edited rows of token ids, as of `Source`."""
        vectors = self._source.vectors(ids_U)
        for number, layer in enumerate(self._layers):
            if layer is not None:
                vectors[f"ffn.{number}"] = _edited_vectors(layer, jnp.asarray(ids_U), vectors[f"ffn.{number}"])
        return vectors


_edited_vectors = jax.jit(edited)
