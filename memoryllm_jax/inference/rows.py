"""Where the decoder's rows of the token memory come from: the interface, and rows computed live from the weights.

tol/rows.py has the sources that look rows up in a ToL file instead.
"""

from typing import Protocol

import jax

from memoryllm_jax.config import ModelConfig
from memoryllm_jax.model import sharding, transformer
from memoryllm_jax.model.sharding import constrain
from memoryllm_jax.model.token_memory import TokenRows


class RowSource(Protocol):
    """Gives rows of the token memory by token id.

    Attributes:
      on_device: whether `fetch` takes ids that are on the device without waiting for them. If not, the host must know
        the ids.
    """

    on_device: bool

    def fetch(self, ids_U) -> TokenRows:
        """The rows of int32 token ids [U], which may repeat: x0 [1, U, D], and FFN-M's [1, U, D] of each layer."""

    def stats(self) -> dict:
        """Numbers about the fetches so far, for people and JSON."""

    def close(self) -> None:
        """Frees files and memory."""


def live_rows(config: ModelConfig, params: dict, ids_U) -> TokenRows:
    """Embeddings and token memory of the ids: x0 [1, U, D], and a list of rows [1, U, D] by layer, or None in base.

    For use inside jit and a mesh.

    Args:
      params: as `TrainedModel.load` gives them, with "embedding" and, unless the model is base, "memory".
    """

    def take(table, ids):
        return table[ids].astype(config.dtype)[None]

    x0 = take(params["embedding"], ids_U)[..., : config.dim]
    if not config.row_dim:
        return TokenRows(x0, None)
    if config.memory_dim:
        return TokenRows(x0, [transformer.apply_memory_layer(config, layer, x0).row for layer in params["memory"]])
    table = transformer.MemoryTable(config)
    return TokenRows(x0, [table.apply({"params": layer}, ids_U, take) for layer in params["memory"]])


class LiveRows:
    """A `RowSource` that computes rows from the weights, which lookups are compared with."""

    on_device = True

    def __init__(self, config: ModelConfig, params: dict, mesh):
        self.mesh, self._config = mesh, config
        names = ("embedding", "memory") if config.row_dim else ("embedding",)
        self._params = {name: params[name] for name in names}
        self._shards = sharding.batch_shards(mesh)
        self._rows = jax.jit(self._rows_body)

    def _rows_body(self, params, ids_U):
        if len(ids_U) % self._shards == 0:
            ids_U = constrain(ids_U, "shard")  # each device computes its part
        return live_rows(self._config, params, ids_U)

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weights that rows are computed from; a tied embedding counts as the decoder's."""
        params = dict(self._params)
        if self._config.tie_embeddings:
            del params["embedding"]
        return sum(x.nbytes for x in jax.tree.leaves(params))

    def fetch(self, ids_U) -> TokenRows:
        with jax.set_mesh(self.mesh):
            return self._rows(self._params, ids_U)

    def stats(self) -> dict:
        return {}

    def close(self) -> None:
        """Nothing is held open."""
