"""A model's memory as edits see it: FFN-M's rows of every token, in a ToL file or computed from the weights.

An overlay is checked against `rows_digest`, the digest of the weights that rows come from. So one that was made for a
ToL file also edits the rows of the model that runs without the file, and the other way round.
"""

import abc
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.checkpoint.trained import Digest, TrainedModel
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.config import ModelConfig
from memoryllm_jax.data.tokenizer import Tokenizer
from memoryllm_jax.inference import vocabulary
from memoryllm_jax.inference.rows import live_x0
from memoryllm_jax.model import memories
from memoryllm_jax.model.modules import Norm, swiglu_coefficients
from memoryllm_jax.tol.format import TolFile
from memoryllm_jax.tol.sources import (
    FileSource,
    Repair,
    RowWeights,
    gives_rows,
    live_vectors,
    row_weights,
    row_weights_for,
)

NEEDS_ROWS = "expected a model that adds a row for each token to the residual stream"
_KEY_ROWS = 8192  # tokens that a key's coefficients are computed for at a time
_RECENT_KEYS = 16  # that are kept, with a coefficient for every token
_READ_ROWS = 16  # rows that `rows` reads at a time: edits name a few tokens


class Key(NamedTuple):
    """One key of FFN-M of a layer, which is a sum over keys of coefficient * value (MemoryLLM, section 2.3.1).

    Attributes:
      coefficients_V: float32, the key's coefficient for every token; 0 where the token's row lacks the layer.
      value_D: float32, the key's value.
    """

    coefficients_V: np.ndarray
    value_D: np.ndarray


class Memory(abc.ABC):
    """FFN-M's rows of every token of a model. Several threads may read them.

    Attributes:
      name: the file or checkpoint, for error messages.
      vocab_size: V.
      layers: L.
      dim: D.
      tokenizer: the model's.
    """

    name: str
    vocab_size: int
    layers: int
    dim: int
    tokenizer: Tokenizer

    @property
    @abc.abstractmethod
    def rows_digest(self) -> str:
        """The digest of the weights that rows come from, as ToL files name it."""

    @abc.abstractmethod
    def rows(self, ids: np.ndarray) -> np.ndarray:
        """The rows of n token ids without edits, float32 [n, L, D]. Layers that a row lacks are zero."""

    @abc.abstractmethod
    def holds(self, layer: int) -> np.ndarray:
        """Whether each token's row has this layer, bool [V]."""

    def key(self, layer: int, key: int) -> Key:
        """One key of a layer; do not change it. Raises: UserError, also for a layer or key that does not exist."""
        return self._recent_key(layer, key)

    @functools.cached_property
    def _recent_key(self):
        # A request that suppresses the key of an earlier one does not pass over the vocabulary again.
        return functools.lru_cache(_RECENT_KEYS)(self._read_key)

    @abc.abstractmethod
    def _read_key(self, layer: int, key: int) -> Key:
        """One key of a layer, computed from the weights. Raises: UserError."""

    def token(self, token: int | str, argument: str) -> int:
        """The id of a token, which is given as id, as "#ID" or as text that is one token.

        Raises: ArgumentError that names the argument.
        """
        text = token if isinstance(token, str) else f"#{token}"
        return self.tokenizer.token(text, argument, self.vocab_size)

    @abc.abstractmethod
    def close(self) -> None:
        """Frees what reading rows needed. What the memory was made of stays open."""


class FileMemory(Memory):
    """The memory in a ToL file.

    Args:
      tol: the file, which the caller closes.
      trained: its model, which the caller closes. Keys are computed from the model's weights, and so are rows that are
        damaged in the file; None: both are refused.
      weights: the model's parameters with "embedding" and "memory", in the dtype that the rows were computed in; None:
        they are read from the checkpoint for the first key, and kept.
    Attributes:
      repair: what computes damaged rows, as of `RowReader`.
    """

    def __init__(self, tol: TolFile, trained: TrainedModel | None = None, weights: Mapping | None = None):
        self.tol, self._trained, self._given = tol, trained, weights
        self.repair = None if trained is None else Repair(trained, tol)
        self.name, self.vocab_size = tol.path, tol.vocab_size
        self.layers, self.dim = tol.layout.layers, tol.layout.dim

    @property
    def rows_digest(self) -> str:
        return self.tol.metadata["rows_digest"]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return self.tol.tokenizer()

    @functools.cached_property
    def _source(self) -> FileSource:
        return FileSource(self.tol, self.repair)

    def rows(self, ids):
        return _rows(self._source.vectors, ids, self.layers)

    def holds(self, layer):
        return self.tol.holds(layer)

    def _read_key(self, layer, key):
        trained = self._trained
        if trained is None:
            raise ArgumentError("suppress", "expected a workdir too, as a key's coefficients come from the weights")
        check_key(trained.config, layer, key)  # before the weights are read, which takes longest
        weights = self._weights
        if weights.digest != self.rows_digest:
            expected = f"expected the weights that the rows of {self.name} were made from"
            raise ArgumentError("suppress", f"{expected}, found others at step {trained.step} of the model")
        found = read_key(weights.config, weights.params, trained.mesh, layer, key)
        # A row that lacks the layer has nothing of the key that could be taken away.
        found.coefficients_V[~self.tol.holds(layer)] = 0
        return found

    @functools.cached_property
    def _weights(self) -> RowWeights:
        """The model's weights. Without parameters if they are not those that the rows were made from."""
        trained, params = self._trained, self._given
        if params is None:
            found = row_weights_for(self.tol, trained)
        else:
            digest = trained.digest(functools.partial(gives_rows, trained), params)
            found = RowWeights(trained.config, params, digest)
        return found if found.digest == self.rows_digest else found._replace(params={})

    def close(self):
        if "_source" in self.__dict__:
            self._source.close()


class LiveMemory(Memory):
    """The memory of a trained model whose rows are computed from its weights.

    Args:
      trained: the model, which the caller closes.
      params: parameters with "embedding" and "memory", as `TrainedModel.load` gives them; None: those of `fill`, or
        else they are read at the first use.
    Raises: UserError if the model has no rows that edits can replace.
    """

    def __init__(self, trained: TrainedModel, params: Mapping | None = None):
        c = self.config = trained.config
        check_editable(c, trained.workdir)
        self._trained = trained
        self.name = f"{trained.workdir}, step {trained.step}"
        self.vocab_size, self.layers, self.dim, self.tokenizer = c.vocab_size, c.layers, c.dim, trained.tokenizer
        self._rows_digest = ""
        self._given = params

    def fill(self, params: Mapping, rows_digest: str = "") -> None:
        """Takes the parameters, and their digest where it was computed while they were read."""
        self._given, self._rows_digest = params, rows_digest

    def digest(self) -> Digest:
        """A Digest that gives `rows_digest`, for `TrainedModel.load`."""
        return Digest(functools.partial(gives_rows, self._trained))

    @property
    def _params(self) -> Mapping:
        if self._given is None:
            _, self._given, self._rows_digest = row_weights(self._trained)
        return self._given

    @property
    def rows_digest(self) -> str:
        # From the parameters at hand: a second read of the weights would take as long as the first.
        params = self._params
        if not self._rows_digest:
            self._rows_digest = self._trained.digest(functools.partial(gives_rows, self._trained), params)
        return self._rows_digest

    def rows(self, ids):
        def vectors(ids_U):
            with jax.set_mesh(self._trained.mesh):
                return live_vectors(self.config, self._params, jnp.asarray(ids_U))

        return _rows(vectors, ids, self.layers)

    def holds(self, layer):
        return np.ones(self.vocab_size, bool)

    def _read_key(self, layer, key):
        check_key(self.config, layer, key)
        return read_key(self.config, self._params, self._trained.mesh, layer, key)

    def close(self):
        """Nothing is held open."""


def _rows(vectors, ids, layers: int) -> np.ndarray:
    """Rows of ids, float32 [n, layers, D], from a function of ids [U] that gives {part name: [U, D]}."""
    # In pieces of one shape, so that the functions compile once and a row does not depend on the others.
    pieces = []
    for chunk in vocabulary.chunks(np.asarray(ids, np.int32), _READ_ROWS):
        parts = vectors(chunk.ids)
        row_ULD = np.stack([np.asarray(parts[f"ffn.{layer}"], np.float32) for layer in range(layers)], 1)
        pieces.append(row_ULD[: chunk.count])
    return np.concatenate(pieces)


def check_editable(config: ModelConfig, where: str) -> None:
    """Refuses a model without rows that edits can replace. Raises: UserError that begins with `where`."""
    if not memories.can_edit(config):
        raise UserError(f"{where}: {NEEDS_ROWS}, found {config.architecture}")


def check_key(config: ModelConfig, layer: int, key: int) -> None:
    """Refuses a layer or a key that FFN-M does not have. Raises: ArgumentError."""
    if not config.memory_dim:
        raise ArgumentError("suppress", f"expected a model with FFN-M, which has keys, found {config.architecture}")
    if layer >= config.layers or key >= config.memory_dim:
        expected = f"expected a layer below {config.layers} and a key below {config.memory_dim}"
        raise ArgumentError("suppress", f"{expected}, found {layer}:{key}")


def read_key(config: ModelConfig, params: Mapping, mesh, layer: int, key: int) -> Key:
    """One key of FFN-M, computed from the weights.

    Args:
      params: parameters with "embedding" and "memory", as `TrainedModel.load` gives them.
      mesh: the mesh that they lie on.
    """
    p, D = params["memory"][layer], config.dim
    gate_D, up_D, value_D = (p["ffn"]["gate"][:D, key], p["ffn"]["up"][:D, key], p["ffn"]["down"][key, :D])
    every_id = np.arange(config.vocab_size)
    with jax.set_mesh(mesh):
        parts = [
            np.asarray(_coefficients(config, params["embedding"], p["norm"], gate_D, up_D, chunk.ids))[: chunk.count]
            for chunk in vocabulary.chunks(every_id, min(_KEY_ROWS, config.vocab_size))
        ]
    return Key(np.concatenate(parts), np.asarray(value_D, np.float32))


@functools.partial(jax.jit, static_argnames="config")
def _coefficients(config, embedding_VD, norm, gate_D, up_D, ids_U):
    x0_UD = live_x0(config, embedding_VD, memories.row_ids(config, ids_U))[0]
    q_UD = Norm(config).apply({"params": norm}, x0_UD).astype(jnp.float32)
    return swiglu_coefficients(q_UD, gate_D.astype(jnp.float32), up_D.astype(jnp.float32))
