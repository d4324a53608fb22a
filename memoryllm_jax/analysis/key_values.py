"""A trained model opened for analysis: keys, values, queries and coefficients of its feed-forward layers.

A layer's SwiGLU is a sum over memories i of c_i v_i: keys k_i are columns of W_up, values v_i rows of W_down, and for a
query q the coefficient is c_i = (q k_i) SiLU(q W_gate)_i (MemoryLLM, arXiv 2602.00398, section 2.3.1; its tilde is left
out). FFN-M ("memory") is asked with q = NM_l(E[t]) of a token t; FFN-C and base's FFN ("compute") with the normalised
residual stream, N2_l(X). Shapes: V token ids, D model width, F memories of a layer, K of them, N queries.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data.tokenizer import token_texts
from memoryllm_jax.model import transformer

_LOGITS = 1 << 25  # of [N, V], that exist at one time


class Inside:
    """The checkpoint's parameters, on the first device.

    Args:
      whole: with attention, which analyses over a corpus need.
    Attributes: saved, config, tokenizer, texts (of every id).
    Raises: UserError.
    """

    def __init__(self, workdir: str, step: int | None = None, dtype: str = "float32", whole: bool = True):
        self.trained = TrainedModel(workdir, step, dtype)
        self.config, self.tokenizer, self.mesh = self.trained.config, self.trained.tokenizer, self.trained.mesh
        if self.config.token_memory in ("value", "per_layer"):
            raise UserError(f"{workdir}: expected base, memory or flex, found {self.config.architecture}")
        self._whole = whole
        self.texts = token_texts(self.tokenizer, range(self.config.vocab_size))
        self._queries = jax.jit(self._queries_body)

    @functools.cached_property
    def params(self) -> dict:
        """As `TrainedModel.load` lays them out; read when first needed, so after options are checked."""
        return self.trained.load(lambda name: self._whole or "/attention/" not in name)[0]

    def ffn_name(self, ffn: str) -> str:
        """memory or compute, as asked or the one there is. Raises: UserError if the model has no such FFN."""
        widths = {"memory": self.config.memory_dim, "compute": self.config.compute_dim}
        there = [name for name, width in widths.items() if width]
        if not ffn:
            return there[0]
        if ffn not in there:
            found = self.config.architecture
            raise UserError(f"--ffn={ffn}: expected {' or '.join(there)}, which {found} has")
        return ffn

    def label(self, ffn: str) -> str:
        """As people call it."""
        return "FFN-M" if ffn == "memory" else "FFN-C" if self.config.memory_dim else "the FFN"

    def need_memory(self, command: str) -> None:
        """Raises: UserError for base, which has no FFN that a token id alone decides."""
        if not self.config.memory_dim:
            raise UserError(
                f"{command}: expected a memory or flex model, found {self.config.architecture}, without FFN-M"
            )

    def need_compute(self, command: str) -> None:
        """Raises: UserError for memory, whose prefixes are single tokens."""
        if not self.config.compute_dim:
            raise UserError(
                f"{command}: expected a base or flex model, found memory, in which a key's prefix is one token"
            )

    def layer(self, ffn: str, layer: int) -> dict:
        """{"gate": [D, F], "up": [D, F], "down": [F, D]}; keys are columns, values rows."""
        return self.params["memory" if ffn == "memory" else "layers"][layer]["ffn"]

    def width(self, ffn: str) -> int:
        return self.config.memory_dim if ffn == "memory" else self.config.compute_dim

    def queries(self, layer: int, ids_N):
        """NM_l(E[t]) of tokens, [N, D]."""
        with jax.set_mesh(self.mesh):
            return self._queries(self.params["embedding"], self.params["memory"][layer]["norm"], ids_N)

    def _queries_body(self, table_VD, norm, ids_N):
        return transformer.Norm(self.config).apply({"params": norm}, table_VD[ids_N][:, : self.config.dim])

    def token_coefficients(self, layer: int, ids_N, keys=None):
        """c [N, F] of FFN-M, or [N, K] of the keys named."""
        ffn = self.layer("memory", layer)
        return _some(self.queries(layer, ids_N), ffn["gate"], ffn["up"], keys)

    def rows(self, layer: int, ids_N):
        """FFN-M_l(NM_l(E[t])) = sum_i c_i v_i, [N, D]."""
        return _product(self.token_coefficients(layer, ids_N), self.layer("memory", layer)["down"])

    def values(self, ffn: str, layer: int) -> jax.Array:
        return self.layer(ffn, layer)["down"]

    @functools.cached_property
    def head(self):
        """The output embedding, [V, D]."""
        table = self.params["embedding" if self.config.tie_embeddings else "head"]
        return table[: self.config.vocab_size, : self.config.dim]

    def logits(self, x_ND, unit: bool):
        """What the output head makes of vectors of the residual stream, the final norm applied: [n, V] blocks.

        Args:
          unit: bring each vector to root mean square 1 first, so that the norm's epsilon does not shrink small values.
        Yields: (slice of N, logits).
        """
        block = max(1, min(len(x_ND), _LOGITS // self.config.vocab_size))
        for start in range(0, len(x_ND), block):
            rows = np.minimum(np.arange(start, start + block), len(x_ND) - 1)  # one shape, so compiled once
            with jax.set_mesh(self.mesh):
                logits = _logits(self.config, self.params["final_norm"], self.head, x_ND[rows], unit)
            count = min(block, len(x_ND) - start)
            yield slice(start, start + count), logits[:count]

    def tokens(self, names: list[str]) -> np.ndarray:
        """Ids of tokens named as text that is one token, as pages show them (␣the), or as #ID. Raises: UserError."""
        size, shown = self.config.vocab_size, {}
        if any("␣" in name for name in names):
            shown = {text: i for i, text in reversed(list(enumerate(self.texts))) if "␣" in text}
        ids = (shown.get(name) for name in names)
        ids = [self.tokenizer.token(n, f"--token={n}", size) if i is None else i for n, i in zip(names, ids)]
        return np.array(ids, np.int32)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _logits(config, norm, head_VD, x_ND, unit):
    if unit:
        x_ND = x_ND * jax.lax.rsqrt(jnp.square(x_ND).mean(-1, keepdims=True) + 1e-30)
    y_ND = transformer.Norm(config).apply({"params": norm}, x_ND)
    return jnp.einsum("nd,vd->nv", y_ND, head_VD, preferred_element_type=jnp.float32)


@jax.jit
def _some(q_ND, gate_DF, up_DF, keys):
    if keys is not None:
        gate_DF, up_DF = gate_DF[:, keys], up_DF[:, keys]
    return transformer.swiglu_coefficients(q_ND, gate_DF, up_DF)


@jax.jit
def _product(c_NF, down_FD):
    return c_NF @ down_FD


def key_coefficients(q_ND, ffn: dict, keys=None):
    """c of queries and some of a layer's keys, [N, K]."""
    return _some(q_ND, ffn["gate"], ffn["up"], keys)
