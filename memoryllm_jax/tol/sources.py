"""Where full rows come from: computed from a checkpoint, or decoded from a ToL file."""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from memoryllm_jax.checkpoint.trained import Digest, TrainedModel
from memoryllm_jax.common import devices
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import MeshConfig, ModelConfig
from memoryllm_jax.data.tokenizer import Tokenizer
from memoryllm_jax.inference import vocabulary
from memoryllm_jax.inference.rows import live_layer, live_x0
from memoryllm_jax.model import memories, sharding
from memoryllm_jax.tol import codec
from memoryllm_jax.tol.format import TolFile
from memoryllm_jax.tol.layout import decode_rows
from memoryllm_jax.tol.reader import RowReader

_CHUNK_ROWS = 1024  # rows that `full_vectors` asks for at a time


@dataclasses.dataclass(frozen=True)
class Identity:
    """The model that rows were made from, as the metadata of a ToL file names it (docs/tol.md).

    Attributes:
      architecture: such as "flex-3".
      step: training step of the checkpoint.
      dtype: of the computation that made the rows.
      rows_digest: of the weights that the rows come from.
      decoder_digest: of the model's other weights.
      tokenizer: the model's.
    """

    architecture: str
    step: int
    dtype: str
    rows_digest: str
    decoder_digest: str
    tokenizer: Tokenizer


class Source(Protocol):
    """Gives full rows, which are not encoded, for every token of a vocabulary.

    Attributes:
      mesh: devices that the rows are made on.
      vocab_size: V.
      dim: D.
      layers: the model's number of layers.
      has_x0: whether rows hold the input embedding.
      identity: the model that the rows come from.
      bits: 32 or 16, those of an element that keep the rows as they are.
      counts: int64 [V], how often each token occurs; None where that is not known.
    """

    mesh: Mesh
    vocab_size: int
    dim: int
    layers: int
    has_x0: bool
    identity: Identity
    bits: int
    counts: np.ndarray | None

    def vectors(self, ids_U) -> dict[str, jax.Array]:
        """The rows of token ids int32 [U], which may repeat: {part name: [U, D]}."""


class RowWeights(NamedTuple):
    """The weights that rows are computed from.

    Attributes:
      config: of the model, with the dtype that they were read for.
      params: parameters with "embedding" and "memory", as `live_vectors` takes them.
      digest: their digest, which ToL files and overlays name as `rows_digest`.
    """

    config: ModelConfig
    params: Mapping
    digest: str


def gives_rows(trained: TrainedModel, name: str) -> bool:
    """Whether rows depend on a parameter. A tied embedding counts as the decoder's, and FFN-M reads it too."""
    return trained.is_memory(name) or name == "embedding"


def row_weights(trained: TrainedModel) -> RowWeights:
    """Reads the weights that a model's rows are computed from. Raises: UserError."""
    digest = Digest()
    params = trained.load(functools.partial(gives_rows, trained), digest)
    return RowWeights(trained.config, params, digest.text())


def row_weights_for(tol: TolFile, trained: TrainedModel) -> RowWeights:
    """Reads a model's weights in the dtype that a file's rows were computed in; the model may run in another one.

    They are those that the file was made from if their digest is the file's `rows_digest`. Raises: UserError.
    """
    dtype = tol.metadata["dtype"]
    with contextlib.closing(TrainedModel(trained.workdir, trained.step, dtype, trained.mesh)) as reopened:
        return row_weights(reopened)


class LiveSource:
    """Rows computed from a checkpoint by `jax.vmap` over token ids.

    Attributes:
      params: the parameters that rows are computed from, as `live_vectors` takes them.
    """

    counts = None  # only text says how often tokens occur

    def __init__(self, trained: TrainedModel):
        c = self.config = trained.config
        self.mesh, self.vocab_size = trained.mesh, c.vocab_size
        self.dim, self.layers, self.has_x0 = c.dim, c.layers, not c.tie_embeddings
        decoder_digest = trained.digest(lambda name: not trained.is_memory(name))
        weights = row_weights(trained)
        self.params = weights.params
        self.identity = Identity(
            architecture=c.architecture,
            step=trained.step,
            dtype=c.dtype,
            rows_digest=weights.digest,
            decoder_digest=decoder_digest,
            tokenizer=trained.tokenizer,
        )
        self.bits = 32 if c.dtype == "float32" else 16

    def vectors(self, ids_U) -> dict:
        with jax.set_mesh(self.mesh):
            return live_vectors(self.config, self.params, ids_U)


def live_vectors(config: ModelConfig, params: Mapping, ids_U) -> dict:
    """The rows of token ids [U] as {part name: [U, D]}, each layer's by one call of the same compiled function."""
    x0_UD = _x0(config, params["embedding"], ids_U)
    parts = {} if config.tie_embeddings else {"x0": x0_UD}
    memory = memories.of(config)
    source_U = memory.source(ids_U, x0_UD, functools.partial(_x0, config, params["embedding"]))
    for layer, entry in enumerate(memories.by_layer(config, params)):
        parts[f"ffn.{layer}"] = _layer(config, entry, source_U)
    return parts


# `live_x0` and `live_layer` take and give arrays of ids; mapped over ids by `jax.vmap`, these have one element.
@functools.partial(jax.jit, static_argnames="config")
def _x0(config, embedding_VD, ids_U):
    return jax.vmap(lambda token: live_x0(config, embedding_VD, token[None])[0, 0])(ids_U)


@functools.partial(jax.jit, static_argnames="config")
def _layer(config, entry, source_U):
    def row(source):
        one = source[None, None] if source.ndim else source[None]  # an embedding, or an id
        return live_layer(config, entry, one).reshape(-1)

    return jax.vmap(row)(source_U)


class FileSource:
    """Rows of an existing ToL file, decoded on one device. Dropped layers are zero.

    Args:
      tol: the file, which the caller closes.
      repair: as of `RowReader`.
    """

    def __init__(self, tol: TolFile, repair: "Repair | None" = None):
        meta, layout = tol.metadata, tol.layout
        self.mesh = sharding.make_mesh(MeshConfig(1, 1, 1), devices.find()[:1])
        self.vocab_size = tol.vocab_size
        self.dim, self.layers, self.has_x0 = layout.dim, layout.layers, layout.has_x0
        self.identity = Identity(
            architecture=meta["architecture"],
            step=tol.step,
            dtype=meta["dtype"],
            rows_digest=meta["rows_digest"],
            decoder_digest=meta["decoder_digest"],
            tokenizer=tol.tokenizer(),
        )
        self.bits = max(band.bits for tier in layout.tiers for part in tier.parts for band in part.bands)
        self.counts = tol.read("counts") if "counts" in tol.tensors else None
        self._layout = layout
        self._reader = RowReader(tol, repair=repair)
        self._bases = {name: jnp.asarray(tol.basis(name)) for name in layout.rotated}
        self._decode = jax.jit(lambda raw, tier_U, bases: decode_rows(layout, raw, tier_U, bases))

    def vectors(self, ids_U) -> dict:
        raw, tier_U = self._reader.read(np.asarray(ids_U))
        vectors = self._decode(self._layout.view(raw), tier_U, self._bases)
        zeros = jnp.zeros((len(raw), self.dim), jnp.float32)  # a layer that the whole file drops has no vectors
        return {f"ffn.{layer}": zeros for layer in range(self.layers)} | vectors

    def close(self) -> None:
        """Ends the threads that read rows."""
        self._reader.close()


def full_vectors(source: Source, ids: np.ndarray) -> dict:
    """The rows of any number n of token ids: {part name: float32 [n, D]}."""
    pieces = [source.vectors(jnp.asarray(chunk.ids)) for chunk in vocabulary.chunks(ids, _CHUNK_ROWS)]
    return {
        name: jnp.concatenate([piece[name].astype(jnp.float32) for piece in pieces])[: len(ids)] for name in pieces[0]
    }


def read_rows(tol: TolFile, ids: np.ndarray) -> np.ndarray:
    """Reads and decodes FFN-M's rows of tokens.

    Args:
      ids: int32 [n], distinct token ids.
    Returns: float32 [n, layers, D]; dropped layers are zero.
    """
    source = FileSource(tol)
    vectors = source.vectors(ids)
    source.close()
    return np.stack([np.asarray(vectors[f"ffn.{layer}"], np.float32) for layer in range(source.layers)], 1)


class Repair:
    """Computes damaged rows of a file again from the checkpoint. FFN-M's weights are loaded only for that.

    Args:
      trained: the model that runs, whose workdir and step are used.
      tol: the damaged file.
    """

    def __init__(self, trained: TrainedModel, tol: TolFile):
        self._trained, self._tol = trained, tol
        # Rows made so far: a damaged row that the cache drops is asked for again.
        self._mended: dict[int, np.ndarray] = {}

    def __call__(self, ids: np.ndarray) -> list[np.ndarray]:
        """Encoded rows of the ids. Raises: UserError if the weights are not those the file was made from."""
        new = np.array([token for token in ids.tolist() if token not in self._mended], np.int32)
        if len(new):
            self._mended.update(zip(new.tolist(), self._compute(new)))
        return [self._mended[token] for token in ids.tolist()]

    def _compute(self, ids):
        tol = self._tol
        print(f"{tol.path}: {len(ids)} damaged rows, token {ids[0]} first: computed from the weights", file=sys.stderr)
        weights = row_weights_for(tol, self._trained)
        if weights.digest != tol.metadata["rows_digest"]:
            raise UserError(f"{tol.path}: token {ids[0]}: its row is damaged, and the checkpoint has other weights")
        with jax.set_mesh(self._trained.mesh):
            vectors = live_vectors(weights.config, weights.params, jnp.asarray(ids))
        bases = {name: jnp.asarray(tol.basis(name)) for name in tol.layout.rotated}
        tiers = tol.tier_of_row[tol.row_of_token[ids]]
        encoded = {k: np.asarray(codec.encode(tol.layout.tiers[k].parts, vectors, bases)) for k in np.unique(tiers)}
        return [encoded[tier][i] for i, tier in enumerate(tiers)]
