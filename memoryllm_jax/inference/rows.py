"""Rows of the token memory computed live from the weights."""

import jax

from memoryllm_jax.config import ModelConfig
from memoryllm_jax.model import sharding, transformer
from memoryllm_jax.model.sharding import constrain
from memoryllm_jax.model.token_memory import TokenRows


def live_rows(config: ModelConfig, params: dict, ids_U) -> TokenRows:
    """Embeddings and token memory of the ids, for use inside jit and a mesh: x0 [1, U, D] and a list of layers'.

    `params` is what `TrainedModel.load` returns, with "embedding" and, unless the model is base, "memory".
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
    """Rows computed from the weights when they are asked for: the peer that lookups are held against."""

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
        """Bytes of the weights that rows are made from, without a tied embedding, which is the decoder's."""
        mine = {k: v for k, v in self._params.items() if k == "memory" or not self._config.tie_embeddings}
        return sum(x.nbytes for x in jax.tree.leaves(mine))

    def fetch(self, ids_U) -> TokenRows:
        with jax.set_mesh(self.mesh):
            return self._rows(self._params, ids_U)

    def prefetch(self, ids) -> None:
        """Nothing is to be read ahead."""

    def stats(self) -> dict:
        return {}

    def close(self) -> None:
        """Nothing is held open."""
