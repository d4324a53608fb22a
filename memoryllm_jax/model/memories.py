"""The kinds of token memory: how each computes a layer's row of a token id, and how the layer takes the row.

    ffn        FFN-M(NM(X_0)), added to the residual stream
    rows       a row of a table, added to the residual stream
    bigram     such a row, looked up by the token and the one before (bigrams.py)
    value      a row of a table, added to the values of attention
    bov        a row of a table, scaled, in place of the values of attention in the last third of the layers
    per_layer  a row of a table, normalised, which a gate that reads the residual stream lets through to the stream
    none       nothing

`TokenMemory` is their interface. Each has three controls, `model.rows`, which say what the rows' meaning is worth:

    permuted   a token reads the row of another one, by a fixed permutation of the ids
    shared     all tokens read the row of id 0, so that each layer adds one learned vector
    frozen     rows are drawn at random by id and layer, and no parameters make them

Only `row_ids` knows about permuted and shared rows, so that training, live rows, ToL files and analyses agree. In
training, permuted rows are a control of FFN-M alone: a table that trains with them learns as well as one without, as
its rows are not made of anything. `compare` scores trained models of all kinds with permuted rows too.

The equations of the architectures are in transformer.py, and token_memory.py says how positions take rows.

Shapes: B sequences, T positions, D model width, H heads as attention's weights store them, K head size, V token ids,
S batch shards, U distinct token ids of a shard, P width of a row.
"""

import functools
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.config import ModelConfig
from memoryllm_jax.model.modules import Norm, SwiGLU, matmul, note, output_std, parameter, weight


class TokenMemory:
    """A kind of token memory in a model of some config, and the kind `none`. Other kinds override what differs.

    Methods that are given a module build theirs inside it: call them in its compact method.

    Attributes:
      adds_rows: whether a layer adds the row itself to the residual stream. Such rows can be looked up in a ToL file.
      reads_x0: whether rows are computed from embeddings; else they are looked up by id.
      frozen_std: standard deviation of frozen rows.
      normalises: whether rows pass a norm or a trained scale after they are looked up.
      replaces_values: whether layers with rows have no W_V.
      by_bigram: whether rows are looked up by the token and the one before.
      row_weights: weights of a layer that a row is multiplied from.
      gate_weights: weights by which a layer lets a row through.
      parameters: those of a layer that its rows come from.
    """

    adds_rows = reads_x0 = normalises = replaces_values = by_bigram = False
    row_weights = gate_weights = parameters = 0

    def __init__(self, config: ModelConfig):
        self.config = config

    @property
    def frozen_std(self) -> float:
        return self.config.init_std  # as the embeddings at the start

    def source(self, ids, x0, embed: Callable):
        """What the rows of token ids are computed from: embeddings, or the ids themselves.

        Args:
          x0: the embeddings of the ids.
          embed: function of ids that gives their embeddings. It is called where the rows are those of other tokens.
        """
        read = row_ids(self.config, ids)
        if not self.reads_x0 or self.config.rows == "frozen":
            return read
        return x0 if read is ids else embed(read)

    def rows(self, module: nn.Module, source, take: Callable):
        """One layer's rows [..., P] of token ids.

        Args:
          source: the result of `source`.
          take: function of (table [V, P] as stored, with padding; ids) that returns rows in the config's dtype.
        """
        raise NotImplementedError  # the kind `none` has no rows

    def values(self, project: Callable, row_BTP, heads: int):
        """The values that attention reads, [B, T, H, K], in a layer with rows.

        Args:
          project: makes those of W_V. A layer that does not call it has no W_V.
          heads: H, the key heads with those that pad the stored weights.
        """
        return project()

    def stream(self, module: nn.Module, y_BTD, row_BTP, shards: int):
        """The residual stream with what the row adds to it.

        Args:
          shards: number of batch shards, for `note`.
        """
        return y_BTD + row_BTP if self.adds_rows else y_BTD


class FeedForward(TokenMemory):
    """FFN-M_l(NM_l(X_0)). Each layer has its own norm, which the paper found to matter for convergence."""

    adds_rows = reads_x0 = True

    @property
    def row_weights(self):
        return 3 * self.config.dim * self.config.memory_dim

    @property
    def parameters(self):
        return self.row_weights + self.config.dim  # its norm

    def rows(self, module, source, take):
        return SwiGLU(self.config, self.config.memory_dim, name="ffn")(Norm(self.config, name="norm")(source))


class Table(TokenMemory):
    """E_l[token], a row of a table for each layer. The kinds with tables are subclasses."""

    @property
    def parameters(self):
        return self.config.vocab_size * self.config.row_dim

    @property
    def init_std(self):
        """Standard deviation of the rows at the start of training."""
        return self.config.init_std

    @property
    def frozen_std(self):
        return self.init_std

    def rows(self, module, source, take):
        c = self.config
        table_VP = parameter(module, "table", (c.vocab_size, c.row_dim), ("vocab", "embed"), self.init_std)
        return take(table_VP, source)[..., : c.row_dim]


class RowTable(Table):
    """An embedding of the token that is added to the residual stream, as FFN-M's output is: rows without an FFN."""

    adds_rows = True


class BigramTable(RowTable):
    """An embedding of the token and the one before, hashed to as many rows as there are ids. Rows begin as zeros."""

    by_bigram = True
    init_std = 0.0

    @property
    def frozen_std(self):
        return self.config.init_std


class ValueTable(Table):
    """An embedding of the token that is added to the values of attention."""

    def values(self, project, row_BTP, heads):
        return project() + self.by_head(row_BTP, heads)

    def by_head(self, row_BTP, heads: int):
        """The rows as values [B, T, H, K], padded."""
        row_BTHK = row_BTP.reshape(*row_BTP.shape[:2], self.config.key_heads, self.config.head_dim)
        return jnp.pad(row_BTHK, [(0, 0), (0, 0), (0, heads - self.config.key_heads), (0, 0)])


class BankOfValues(ValueTable):
    """An embedding in place of attention's values, in the last third of the layers: Bank of Values.

    He et al. 2026 (arXiv 2606.02780): v = gamma_l E_l[token] with a trained number gamma_l, which begins as 1. Their
    tables begin as RMSNorm(X_0) W_V with a random W_V. Here rows are drawn independently, with the deviation of those.
    """

    normalises = replaces_values = True

    @property
    def parameters(self):
        return super().parameters + 1  # gamma

    @property
    def init_std(self):
        return self.config.init_std * self.config.dim**0.5

    def rows(self, module, source, take):
        scale_1 = module.param("scale", nn.with_logical_partitioning(nn.initializers.ones, (None,)), (1,))
        return (super().rows(module, source, take) * scale_1).astype(self.config.dtype)

    def values(self, project, row_BTP, heads):
        return self.by_head(row_BTP, heads)


class GatedTable(Table):
    """A per-layer embedding, gated by the residual stream: (GELU(NG(y) W_gate) * row) W_out (Gemma 3n)."""

    normalises = True
    frozen_std = 1.0  # as rows have behind their norm

    @property
    def gate_weights(self):
        return 2 * self.config.dim * self.config.table_dim

    @property
    def parameters(self):
        return super().parameters + self.config.row_dim  # the rows' norm

    def rows(self, module, source, take):
        return Norm(self.config, name="norm")(super().rows(module, source, take))

    def stream(self, module, y_BTD, row_BTP, shards):
        gated_BTD = Gate(self.config, name="row_gate")(Norm(self.config, name="row_gate_norm")(y_BTD), row_BTP)
        note(module, "row_gate", gated_BTD, shards)
        return y_BTD + gated_BTD


class Gate(nn.Module):
    """(GELU(x W_gate) * row) W_out."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD, row_BTP):
        D, P = x_BTD.shape[-1], self.config.table_dim
        gate_DP = weight(self, "gate", (D, P), ("embed", "mlp"), self.config.init_std)
        out_PD = weight(self, "out", (P, D), ("mlp", "embed"), output_std(self.config))
        openness_BTP = nn.gelu(matmul(x_BTD, gate_DP))
        padding = openness_BTP.shape[-1] - P  # columns that pad the stored weights
        row_BTP = jnp.pad(row_BTP, [(0, 0), (0, 0), (0, padding)])
        return matmul(openness_BTP * row_BTP, out_PD)


_KINDS = {
    "ffn": FeedForward,
    "rows": RowTable,
    "bigram": BigramTable,
    "value": ValueTable,
    "bov": BankOfValues,
    "per_layer": GatedTable,
    "none": TokenMemory,
}


def of(config: ModelConfig) -> TokenMemory:
    """The token memory of a model; base's is that of the kind `none`."""
    kind = _KINDS[config.token_memory] if config.row_dim else TokenMemory
    return kind(config)


def can_edit(config: ModelConfig) -> bool:
    """Whether tokens have rows in the checkpoint that layers add to the residual stream, which edits can replace."""
    memory = of(config)
    return memory.adds_rows and not memory.by_bigram and config.rows != "frozen"


# Checkpoints and ToL files depend on the permutation and on frozen rows: neither this seed nor what draws from it may
# change. The bits of RandomState and Threefry are fixed. What jax.random.normal makes of them may differ in the last
# places by device, and by version of JAX: tests/model/test_memories.py holds some of the numbers.
_SEED = 20260602


def row_ids(config: ModelConfig, ids):
    """The ids whose rows tokens read: int32 in the shape of `ids`; `ids` itself where tokens read their own rows."""
    if config.rows == "permuted":
        return jnp.asarray(_permutation(config.vocab_size))[ids]
    return jnp.zeros_like(ids) if config.rows == "shared" else ids


@functools.cache
def _permutation(size: int) -> np.ndarray:
    return np.random.RandomState(_SEED).permutation(size).astype(np.int32)


def _frozen_rows(config: ModelConfig, layer, ids):
    """Rows [..., P] of a layer, drawn from a normal distribution."""
    key = jax.random.fold_in(jax.random.key(_SEED, impl="threefry2x32"), layer)

    def row(token):
        return jax.random.normal(jax.random.fold_in(key, token), config.row_dim)

    rows_NP = jax.vmap(row)(ids.reshape(-1)) * of(config).frozen_std
    return rows_NP.reshape(*ids.shape, -1).astype(config.dtype)


class MemoryLayer(nn.Module):
    """One layer of a model's token memory. The arguments and the result are those of `TokenMemory.rows`.

    Frozen rows need the number of the layer too, and make no parameters.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, source, take: Callable, number=None):
        if self.config.rows == "frozen":
            return _frozen_rows(self.config, number, source)
        return of(self.config).rows(self, source, take)


def by_layer(config: ModelConfig, params: Mapping) -> list:
    """What `layer_rows` takes for each layer: its parameters or, for frozen rows, its number; None for no rows.

    Args:
      params: parameters as `TrainedModel.load` gives them.
    """
    entries = range(config.layers) if config.rows == "frozen" else params["memory"]
    return [entries[layer] if layer in config.row_layers else None for layer in range(config.layers)]


def layer_rows(config: ModelConfig, entry, source, take: Callable):
    """One layer's rows [..., P] of token ids, after training. Call it inside jit and a mesh.

    Args:
      entry: the layer's entry of `by_layer`.
      source: the result of `TokenMemory.source`.
      take: as of `TokenMemory.rows`.
    """
    layer = MemoryLayer(config)
    if config.rows == "frozen":
        return layer.apply({}, source[None], take, entry)  # one batch shard, which `take` adds to rows of tables
    return layer.apply({"params": entry}, source, take)
