"""The interface of sources of token memory rows, and the source that computes rows live from the weights.

tol/rows.py has the sources that look rows up in a ToL file.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import ModelConfig
from memoryllm_jax.inference import ahead
from memoryllm_jax.model import memories
from memoryllm_jax.model.sharding import constrain, parts
from memoryllm_jax.model.token_memory import TokenRows


class RowSource(Protocol):
    """Gives rows of the token memory by token id.

    `fetch` gives the rows of ids that the host knows. `gather` is part of a jitted decode step, whose ids only the
    device knows. Where not all rows are on the device, the step asks `holds` first, and the host calls `hold` when it
    has read the ids.

    Attributes:
      on_device: whether `gather` finds every row. Sources of which that is true need no `holds`, `hold` and `reserve`.
      weights_bytes: bytes of the weights that rows are computed from; 0 where they are looked up.
      arrays: the arrays on the device that `gather` and `holds` read. Those of a jitted call are taken just before it.
    """

    on_device: bool
    weights_bytes: int
    arrays: Any

    def fetch(self, ids_U: np.ndarray) -> TokenRows:
        """Fetches rows.

        Args:
          ids_U: int32 token ids, which may repeat.
        Returns: x0 [1, U, D], and a sequence by layer of rows [1, U, D], or None if layers read nothing by token id.
        """

    def gather(self, arrays, ids_U) -> TokenRows:
        """Rows of token ids, as `fetch` gives them. For use in jit. Rows that `holds` does not find are arbitrary."""

    def holds(self, arrays, ids_U):
        """Whether `gather` finds each row, bool [U]. For use in jit."""

    def hold(self, ids_U: np.ndarray) -> bool:
        """Makes sure that `gather` finds the rows of these ids, which a step has drawn.

        Args:
          ids_U: int32, at most as many as were reserved.
        Returns: whether rows were missing.
        """

    def reserve(self, rows: int) -> None:
        """Makes room for the rows of one decode step, which all have to be on the device together."""

    def stats(self) -> dict:
        """Statistics of the fetches so far, as JSON holds them; {} if there are none."""

    def close(self) -> None:
        """Frees files and memory."""


def refuse_bigrams(config: ModelConfig) -> None:
    """Refuses a model whose rows do not follow from a token alone. Raises: UserError."""
    if memories.of(config).by_bigram:
        expected = "expected an architecture whose rows follow from a token alone"
        raise UserError(f"{expected}, found {config.architecture}, which can be trained and score text only")


def live_rows(config: ModelConfig, params: dict, ids_U) -> TokenRows:
    """Computes embeddings and token memory of token ids. Call it inside jit and a mesh.

    Args:
      params: parameters as `TrainedModel.load` gives them: "embedding" and, if the model has a token memory, "memory".
      ids_U: int32 token ids.
    Returns: x0 [1, U, D], and a list by layer of rows [1, U, D], or None without a token memory. A layer that looks up
      nothing has None in place of rows.
    """
    x0_1UD = live_x0(config, params["embedding"], ids_U)
    if not config.row_dim:
        return TokenRows(x0_1UD, None)
    source = live_source(config, params["embedding"], ids_U, x0_1UD)
    layers = memories.by_layer(config, params)
    return TokenRows(x0_1UD, [None if entry is None else live_layer(config, entry, source) for entry in layers])


def live_x0(config: ModelConfig, embedding_VD, ids_U):
    """The embeddings [1, U, D] of token ids. Call it inside jit and a mesh."""
    # The table may be padded in width, so that the mesh divides it.
    return _take(config, embedding_VD, ids_U)[..., : config.dim]


def live_source(config: ModelConfig, embedding_VD, ids_U, x0_1UD):
    """What the rows of token ids are computed from: embeddings [1, U, D] or ids [U]. Call it inside jit and a mesh."""
    return memories.of(config).source(ids_U, x0_1UD, functools.partial(live_x0, config, embedding_VD))


def live_layer(config: ModelConfig, entry, source):
    """One layer's rows of token ids, [1, U, D]. Call it inside jit and a mesh.

    Args:
      entry: the layer's entry of `memories.by_layer`.
      source: the result of `live_source`.
    """
    return memories.layer_rows(config, entry, source, functools.partial(_take, config))


def _take(config, table, ids_U):
    return table[ids_U].astype(config.dtype)[None]


def _split(ids_U):
    """The ids, placed so that each device computes a part of the rows. Call it inside jit and a mesh."""
    # A decode step of few sequences may have fewer ids than there are devices: then each device computes all rows.
    return constrain(ids_U, "shard") if len(ids_U) % parts("shard") == 0 else ids_U


# Parameters are arguments: arrays that a function closes over would be compiled into it as constants.
@functools.partial(ahead.jit, static_argnames="config")
def _source_and_x0(config, embedding_VD, ids_U, row_ids_U):
    ids_U = _split(ids_U)
    x0_1UD = live_x0(config, embedding_VD, ids_U)
    return live_source(config, embedding_VD, ids_U if row_ids_U is None else row_ids_U, x0_1UD), x0_1UD


# Compiled once for all layers
_layer = ahead.jit(live_layer, static_argnames="config")


class _Layers(Sequence):
    """A sequence over layers whose entries are computed each time they are indexed.

    Args:
      compute: function of a layer's number.
      layers: the number of layers.
    """

    def __init__(self, compute: Callable[[int], jax.Array], layers: int):
        self._compute, self._layers = compute, range(layers)

    def __len__(self):
        return len(self._layers)

    def __getitem__(self, layer):
        return self._compute(self._layers[layer])  # a range refuses numbers past its end, as iteration needs


class LiveRows:
    """A `RowSource` that computes rows from the weights. Lookups are verified against it.

    Args:
      params: parameters as `live_rows` takes them.
    """

    on_device = True

    def __init__(self, config: ModelConfig, params: dict, mesh):
        self.mesh, self._config = mesh, config
        self.fill(params)

    def fill(self, params: dict) -> None:
        """Takes other parameters of the same shapes; the compiled functions stay."""
        # Other parameters are not kept, so that the caller can free them.
        self.arrays = {name: params[name] for name in ("embedding", "memory") if name in params}

    def gather(self, arrays, ids_U) -> TokenRows:
        """Computes the rows of token ids. For use in jit."""
        return live_rows(self._config, arrays, _split(ids_U))

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weights that rows are computed from. A tied embedding is counted with the decoder instead."""
        params = dict(self.arrays)
        if self._config.tie_embeddings:
            del params["embedding"]
        return sum(x.nbytes for x in jax.tree.leaves(params))

    def fetch(self, ids_U, row_ids_U=None) -> TokenRows:
        """Computes embeddings now, and a layer's rows whenever they are indexed. So one layer's exist at a time.

        Args:
          row_ids_U: the rows that the ids read, in a model that looks them up by `bigrams.row_ids`.
        Raises: UserError for a model that does so, without them.
        """
        if row_ids_U is None:
            refuse_bigrams(self._config)
        with jax.set_mesh(self.mesh):
            source, x0_1UD = _source_and_x0(self._config, self.arrays["embedding"], ids_U, row_ids_U)
        if not self._config.row_dim:
            return TokenRows(x0_1UD, None)

        layers = memories.by_layer(self._config, self.arrays)

        def compute(layer):
            if layers[layer] is None:
                return None
            with jax.set_mesh(self.mesh):
                return _layer(self._config, layers[layer], source)

        return TokenRows(x0_1UD, _Layers(compute, self._config.layers))

    def stats(self) -> dict:
        return {}

    def close(self) -> None:
        """Nothing is held open."""
