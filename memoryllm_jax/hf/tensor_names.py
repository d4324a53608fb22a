"""The tensors of the Hugging Face layout, and the parameter of ours that each belongs to.

The names are Llama's: `mlp.*` is base's FFN or FFN-C, and FFN-M adds
`model.layers.N.memory.{norm,gate_proj,up_proj,down_proj}.weight`. Norms of queries and keys are Qwen3's
`self_attn.{q_norm,k_norm}.weight`. Hugging Face's matrices are [outputs, inputs], ours
[inputs, outputs]. Heads, and the two halves of a head that the rotary embedding rotates, have the same order in both.
"""

import dataclasses

import numpy as np

from memoryllm_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of the Hugging Face layout.

    Attributes:
      name: its name in the files.
      leaf: name of our parameter that holds it, such as layers/ffn/gate.
      layer: its layer where that parameter is stacked over the layers, else None.
      shape: its shape in the files.
    """

    name: str
    leaf: str
    layer: int | None
    shape: tuple[int, ...]

    @property
    def _transposed(self):
        # Embedding and head, which belong to no layer, are [vocabulary, width] in both layouts.
        return len(self.shape) == 2 and self.layer is not None

    def from_ours(self, value: np.ndarray) -> np.ndarray:
        """The tensor, from the values of our parameter in this layer."""
        if not self._transposed:
            return value
        return value.reshape(self.shape[1], self.shape[0]).T  # heads and their width become one axis

    def to_ours(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Our parameter in this layer, of the given shape, from the tensor."""
        matrix = tensor.T if self._transposed else tensor
        return matrix.reshape(shape)


def tensors(c: ModelConfig) -> dict[str, Tensor]:
    """{name: Tensor} of a model, in the order of Llama's state dict."""
    out = [Tensor("model.embed_tokens.weight", "embedding", None, (c.vocab_size, c.dim))]
    for layer in range(c.layers):
        for name, leaf, shape in _layer(c):
            out.append(Tensor(f"model.layers.{layer}.{name}.weight", leaf, layer, shape))
    out.append(Tensor("model.norm.weight", "final_norm/scale", None, (c.dim,)))
    if not c.tie_embeddings:
        out.append(Tensor("lm_head.weight", "head", None, (c.vocab_size, c.dim)))
    return {tensor.name: tensor for tensor in out}


def _layer(c):
    """[(name, leaf, shape)] of one layer's tensors."""
    query = c.heads * c.head_dim
    keys = c.key_heads * c.head_dim
    out = [
        ("self_attn.q_proj", "layers/attention/q", (query, c.dim)),
        ("self_attn.k_proj", "layers/attention/k", (keys, c.dim)),
        ("self_attn.v_proj", "layers/attention/v", (keys, c.dim)),
        ("self_attn.o_proj", "layers/attention/out", (c.dim, query)),
    ]
    if c.qk_norm:
        out += [(f"self_attn.{name}", f"layers/attention/{name}/scale", (c.head_dim,)) for name in ("q_norm", "k_norm")]
    if c.compute_dim:
        out += _swiglu("mlp", "layers/ffn", c.dim, c.compute_dim)
    out.append(("input_layernorm", "layers/attention_norm/scale", (c.dim,)))
    if c.compute_dim:
        out.append(("post_attention_layernorm", "layers/ffn_norm/scale", (c.dim,)))
    if c.memory_dim:
        out.append(("memory.norm", "memory/norm/scale", (c.dim,)))
        out += _swiglu("memory", "memory/ffn", c.dim, c.memory_dim)
    return out


def _swiglu(name, leaf, dim, width):
    return [
        (f"{name}.gate_proj", f"{leaf}/gate", (width, dim)),
        (f"{name}.up_proj", f"{leaf}/up", (width, dim)),
        (f"{name}.down_proj", f"{leaf}/down", (dim, width)),
    ]
