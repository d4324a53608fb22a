"""A trained model whose feed-forward layers (FFNs) are read as key-value memories.

A layer's SwiGLU is a sum over its memories i of c_i v_i. Keys k_i are the columns of W_up, values v_i the rows of
W_down, and a query q gives the coefficient c_i = (q k_i) SiLU(q W_gate)_i (MemoryLLM, arXiv 2602.00398, section 2.3.1,
which writes c with a tilde). The queries of FFN-M, called "memory" here, are NM_l(E[t]) of tokens t. Those of FFN-C and
of base's FFN, called "compute", are N2_l(X), the normalised residual stream.

Shapes: V token ids, D model width, L layers, F memories of a layer, K some of them, N queries, C token ids of a chunk.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.checkpoint import run_data
from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.common.options import Option
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.data.tokenizer import token_texts
from memoryllm_jax.inference import vocabulary
from memoryllm_jax.inference.rows import LiveRows
from memoryllm_jax.model import memories, modules

# The option --ffn of the analyses that look at one kind of FFN.
FFN = Annotated[
    str,
    Option("memory (FFN-M) or compute (FFN-C, and the FFN of base); by default the first of these that the model has"),
]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is computed at a time, which bounds the memory that an analysis takes."""

    tokens: int = 2048  # token ids whose coefficients [C, F] exist at a time
    neighbours: int = 4096  # token ids whose neighbours are found in one pass over the vocabulary
    positions: int = 2048  # positions of text that run through the layers at a time
    removals: int = 4096  # the same in `mutate`: positions of prefixes from which a token was removed
    logits: int = 1 << 25  # elements of the logits [N, V] that exist at a time


class Parameters(Mapping):
    """A model's groups of parameters by name, in the layout of `TrainedModel.load`.

    Groups that are not at hand are read from the checkpoint: all of them together, at the first use of one.

    Args:
      trained: the model.
      at_hand: groups that are in memory already, such as those of an `Engine`, which are used as they are.
      wanted: whether a parameter is to be read, by its name.
    """

    def __init__(self, trained: TrainedModel, at_hand: dict, wanted: Callable[[str], bool] = lambda name: True):
        self._trained, self._groups, self._wanted = trained, dict(at_hand), wanted
        self._names = {_group(name) for name in trained.names()}
        self._reading = threading.Lock()  # threads of a server share the parameters

    def __getitem__(self, group: str):
        if group not in self._groups and group in self._names:
            self.read()
        return self._groups[group]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def missing(self) -> set[str]:
        """Names of the groups that are not at hand."""
        return self._names - self._groups.keys()

    def read(self, report: Callable[[float], None] | None = None) -> None:
        """Reads the groups that are not at hand.

        Args:
          report: called with the share that is read, from 0 to 1. An exception of it ends the reading.
        Raises: UserError.
        """
        with self._reading:
            missing = self.missing
            if missing:
                self._groups |= self._trained.load(
                    lambda name: _group(name) in missing and self._wanted(name), report=report
                )


def _group(name: str) -> str:
    """The group of a parameter, such as "layers" of layers/ffn/gate."""
    return name.partition("/")[0]


class KeyValueModel:
    """The keys, values, queries and coefficients of a checkpoint, on the first device.

    Args:
      trained: the model.
      params: its parameters, in the layout of `TrainedModel.load`.
      sizes: how much is computed at a time.
    Attributes:
      trained, params, sizes: as given.
      config: its ModelConfig.
      tokenizer: its Tokenizer.
      every_id: all token ids, int32 [V].
    """

    def __init__(self, trained: TrainedModel, params: Mapping, sizes: Sizes = Sizes()):
        self.trained, self.params, self.sizes = trained, params, sizes
        self.config, self.tokenizer, self.mesh = trained.config, trained.tokenizer, trained.mesh
        self.every_id = np.arange(self.config.vocab_size, dtype=np.int32)
        self._value_norms: dict[tuple[str, int], jax.Array] = {}

    @classmethod
    def open(
        cls,
        workdir: str,
        step: int | None = None,
        dtype: str = "float32",
        with_attention: bool = True,
        sizes: Sizes = Sizes(),
    ) -> "KeyValueModel":
        """Opens a checkpoint for the analyses. Parameters are read when the first one is used.

        They take a while to read, so that an option that is refused is an error at once.

        Args:
          workdir: folder with the checkpoints.
          step: step of the checkpoint; by default the newest.
          dtype: dtype of the computation: float32 or bfloat16.
          with_attention: read the weights of attention too, which are needed to run text through the model.
          sizes: how much is computed at a time.
        Raises: UserError if there is no such checkpoint, or the model's token memory is not made by an FFN.
        """
        trained = TrainedModel(workdir, step, dtype)
        if trained.config.row_dim and not trained.config.memory_dim:
            # Their rows are parameters of their own, and not sums of coefficients times values.
            trained.close()
            raise UserError(f"{workdir}: expected base, memory or flex, found {trained.config.architecture}")
        return cls(trained, Parameters(trained, {}, lambda name: with_attention or "/attention/" not in name), sizes)

    def close(self) -> None:
        """Closes the checkpoint."""
        self.trained.close()

    @functools.cached_property
    def texts(self) -> list[str]:
        """The text of every token id, as pages show it."""
        return token_texts(self.tokenizer, range(self.config.vocab_size))

    # What the model has

    def ffn(self, name: str) -> str:
        """The FFN to look at: `name`, or the first one that the model has if `name` is "".

        Raises: ArgumentError if the model has no such FFN.
        """
        found = [ffn for ffn in ("memory", "compute") if self.width(ffn)]
        if not name:
            return found[0]
        if name not in found:
            raise ArgumentError(
                "ffn", f"expected {' or '.join(found)}, which {self.config.architecture} has, found {name}"
            )
        return name

    def label(self, ffn: str) -> str:
        """The FFN's name in the text of pages."""
        if ffn == "memory":
            return "FFN-M"
        return "FFN-C" if self.config.memory_dim else "the FFN"

    def width(self, ffn: str) -> int:
        """F, memories of a layer; 0 if the model has no such FFN."""
        return self.config.memory_dim if ffn == "memory" else self.config.compute_dim

    def require_memory(self, command: str) -> None:
        """Refuses base, which has no FFN whose output depends on the token id alone. Raises: UserError."""
        if not self.config.memory_dim:
            raise UserError(
                f"{command}: expected a memory or flex model, found {self.config.architecture}, which has no FFN-M"
            )

    def require_compute(self, command: str) -> None:
        """Refuses memory, whose keys read single tokens and not prefixes. Raises: UserError."""
        if not self.config.compute_dim:
            raise UserError(f"{command}: expected a base or flex model, found memory, whose keys read single tokens")

    # Its parameters

    def weights(self, ffn: str, layer: int) -> dict[str, jax.Array]:
        """{"gate": [D, F], "up": [D, F], "down": [F, D]}: keys are columns of "up", values are rows of "down"."""
        return self.params["memory" if ffn == "memory" else "layers"][layer]["ffn"]

    def values(self, ffn: str, layer: int) -> jax.Array:
        """The value vectors of a layer, [F, D]."""
        return self.weights(ffn, layer)["down"]

    @functools.cached_property
    def head(self) -> jax.Array:
        """The output embedding [V, D]."""
        table = self.params["embedding" if self.config.tie_embeddings else "head"]
        # Parameters are stored padded to what the mesh divides.
        return table[: self.config.vocab_size, : self.config.dim]

    def value_norms(self, ffn: str, layer: int) -> jax.Array:
        """The lengths |v_i| of a layer's values, float32 [F]; computed at the first use."""
        if (ffn, layer) not in self._value_norms:
            self._value_norms[ffn, layer] = _lengths(self.values(ffn, layer))
        return self._value_norms[ffn, layer]

    # Tokens

    @functools.cached_property
    def _live(self) -> LiveRows:
        return LiveRows(self.config, self.params, self.mesh)

    def x0(self, ids_N) -> jax.Array:
        """The embeddings of tokens, [N, D]."""
        return self._live.fetch(ids_N).x0_SUD[0]

    def rows(self, layer: int, ids_N) -> jax.Array:
        """The rows of tokens in one layer, [N, D]: FFN-M_l(NM_l(E[t])), or those of a table [N, P]."""
        return self._live.fetch(ids_N).rows_LSUP[layer][0]

    def queries(self, layer: int, ids_N) -> jax.Array:
        """The queries NM_l(E[t]) of tokens to FFN-M, [N, D]."""
        with jax.set_mesh(self.mesh):
            norm = self.params["memory"][layer]["norm"]
            return _queries(self.config, self.params["embedding"], norm, memories.row_ids(self.config, ids_N))

    def token_coefficients(self, layer: int, ids_N, keys=None) -> jax.Array:
        """FFN-M's coefficients c of tokens, [N, F], or [N, K] for the numbers `keys` of some keys."""
        return coefficients(self.queries(layer, ids_N), self.weights("memory", layer), keys)

    def chunks(self, ids_N: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields token ids in chunks: (int32 ids [C], bool is_real [C]).

        The last chunk is filled up with ids that are not real. So all chunks have one shape, and what runs on them
        compiles once.
        """
        size = min(self.sizes.tokens, len(ids_N))
        for chunk in vocabulary.chunks(ids_N, size):
            yield chunk.ids, np.arange(size) < chunk.count

    def chunk_count(self, ids: int) -> int:
        """How many chunks `chunks` makes of a number of ids."""
        return -(-ids // min(self.sizes.tokens, ids))

    # What vectors say

    def logits(self, x_ND, unit: bool) -> Iterator[tuple[slice, jax.Array]]:
        """The logits that the final norm and the output head make of vectors of the residual stream, block by block.

        Args:
          x_ND: the vectors.
          unit: bring each vector to root mean square 1 first, so that the norm's epsilon does not shrink small vectors.
        Yields: (which of the N vectors, as a slice; their logits, float32 [n, V]).
        """
        size = max(1, min(len(x_ND), self.sizes.logits // self.config.vocab_size))
        for start in range(0, len(x_ND), size):
            # The last block repeats the last vector: all blocks have one shape, which compiles once.
            at = np.minimum(np.arange(start, start + size), len(x_ND) - 1)
            with jax.set_mesh(self.mesh):
                logits_NV = _logits(self.config, self.params["final_norm"], self.head, x_ND, at, unit)
            count = min(size, len(x_ND) - start)
            yield slice(start, start + count), logits_NV[:count]

    # What options name

    def tokens(self, names: Sequence[str]) -> np.ndarray:
        """The ids, int32, of tokens that are named by their text as pages show it (␣the) or as #ID.

        Raises: ArgumentError if a text is not one token, or the vocabulary has no such id.
        """
        by_text: dict[str, int] = {}
        # A name without ␣ is plain text, which the tokenizer knows.
        if any("␣" in name for name in names):
            for token, text in enumerate(self.texts):
                by_text.setdefault(text, token)  # the first of several tokens that look alike
        ids = []
        for name in names:
            if "␣" in name and name in by_text:
                ids.append(by_text[name])
            else:
                ids.append(self.tokenizer.token(name, "token", self.config.vocab_size))
        return np.array(ids, np.int32)

    def open_data(self, path: str) -> Dataset:
        """Opens prepared data, by default that of the model's run. Arguments and errors are those of `open_data`."""
        return run_data.open_data(self.trained, path)


def coefficients(q_ND, ffn: dict, keys=None) -> jax.Array:
    """The coefficients c of queries, [N, F], or [N, K] for the numbers `keys` of some keys.

    Args:
      q_ND: queries.
      ffn: weights of a layer, {"gate": [D, F], "up": [D, F], ...}.
    """
    return _coefficients(q_ND, ffn["gate"], ffn["up"], keys)


@jax.jit
def _coefficients(q_ND, gate_DF, up_DF, keys):
    if keys is not None:
        # Columns are picked before the products, which then take K / F of the time.
        gate_DF, up_DF = gate_DF[:, keys], up_DF[:, keys]
    return modules.swiglu_coefficients(q_ND, gate_DF, up_DF)


@functools.partial(jax.jit, static_argnums=0)
def _queries(config, table_VD, norm, ids_N):
    return modules.Norm(config).apply({"params": norm}, table_VD[ids_N][:, : config.dim])


@jax.jit
def weighted_sum(c_NF, v_FD):
    """sum_i c_i v_i, what an FFN adds, [N, D]."""
    return c_NF @ v_FD


@jax.jit
def _lengths(v_FD):
    return jnp.linalg.norm(v_FD.astype(jnp.float32), axis=1)


@functools.partial(jax.jit, static_argnames=("config", "unit"))
def _logits(config, norm, head_VD, x_ND, at_n, unit):
    """The logits of vectors number at_n, [n, V]."""
    x_ND = x_ND[at_n]
    if unit:
        # The 1e-30 keeps vectors of zeros, which say nothing, from becoming NaN.
        x_ND = x_ND * jax.lax.rsqrt(jnp.square(x_ND).mean(-1, keepdims=True) + 1e-30)
    y_ND = modules.Norm(config).apply({"params": norm}, x_ND)
    # float32 for a bfloat16 model too: rounded logits would tie.
    logits_NV = jnp.einsum("nd,vd->nv", y_ND, head_VD, preferred_element_type=jnp.float32)
    return modules.softcap(logits_NV, config.logit_softcap)
