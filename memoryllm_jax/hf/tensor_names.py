"""Which of our parameters each tensor of the Hugging Face layout is.

The names are Llama's; FFN-M adds `model.layers.N.memory.{norm,gate_proj,up_proj,down_proj}.weight`, and `mlp.*` is
base's FFN or FFN-C. Their matrices are [outputs, inputs], ours [inputs, outputs]. Heads, and the two halves that the
rotary embedding turns, have the same order in both.
"""

import dataclasses

import numpy as np

from memoryllm_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of the Hugging Face layout.

    Attributes:
      name: in the files.
      leaf: name of our parameter that holds it.
      layer: its index in a parameter that is stacked over the layers, else None.
      shape: in the files.
    """

    name: str
    leaf: str
    layer: int | None
    shape: tuple[int, ...]

    @property
    def _transposed(self):
        # Embedding and head are [vocabulary, width] on both sides.
        return len(self.shape) == 2 and self.layer is not None

    def from_ours(self, value: np.ndarray) -> np.ndarray:
        """The tensor, from our parameter of this layer."""
        return value.reshape(self.shape[1], self.shape[0]).T if self._transposed else value

    def to_ours(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Our parameter of this layer, which has this shape, from the tensor."""
        return (tensor.T if self._transposed else tensor).reshape(shape)


def tensors(c: ModelConfig) -> dict[str, Tensor]:
    """All tensors of a model by name, in the order of Llama's state dict."""
    out = [Tensor("model.embed_tokens.weight", "embedding", None, (c.vocab_size, c.dim))]
    for layer in range(c.layers):
        out += [Tensor(f"model.layers.{layer}.{name}.weight", leaf, layer, shape) for name, leaf, shape in _layer(c)]
    out.append(Tensor("model.norm.weight", "final_norm/scale", None, (c.dim,)))
    if not c.tie_embeddings:
        out.append(Tensor("lm_head.weight", "head", None, (c.vocab_size, c.dim)))
    return {tensor.name: tensor for tensor in out}


def _layer(c):
    """[(name, leaf, shape)] of one layer's tensors."""
    query, keys = c.heads * c.head_dim, c.key_heads * c.head_dim
    out = [
        ("self_attn.q_proj", "layers/attention/q", (query, c.dim)),
        ("self_attn.k_proj", "layers/attention/k", (keys, c.dim)),
        ("self_attn.v_proj", "layers/attention/v", (keys, c.dim)),
        ("self_attn.o_proj", "layers/attention/out", (c.dim, query)),
    ]
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
