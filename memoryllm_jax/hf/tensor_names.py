"""Which of our parameters each tensor of the Hugging Face layout is.

The names are Llama's; FFN-M adds `model.layers.N.memory.{norm,gate_proj,up_proj,down_proj}.weight`, and `mlp.*` is
base's FFN or FFN-C. Their matrices are [outputs, inputs], ours [inputs, outputs]; heads and the rotary embedding's
halves lie in the same order.
"""

import dataclasses

import numpy as np

from memoryllm_jax.config import ModelConfig

_SWIGLU = ("gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of the layout.

    leaf: our parameter's name.  layer: its index in a stacked one, or None.  axis: of our (stacked) parameter, the one
    that cuts the tensor into rows.  rows_a_step: rows for each step on it.
    """

    name: str
    leaf: str
    layer: int | None
    shape: tuple[int, ...]
    axis: int = 0
    rows_a_step: int = 1

    @property
    def _turned(self):
        return len(self.shape) == 2 and self.layer is not None

    def from_ours(self, part: np.ndarray) -> np.ndarray:
        """A layer's parameter, or some of it along `axis` -> the tensor's rows."""
        return part.reshape(self.shape[1], -1).T if self._turned else part

    def to_ours(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor -> the parameter of one layer, in its shape."""
        return (tensor.T if self._turned else tensor).reshape(shape)


def tensors(c: ModelConfig) -> list[Tensor]:
    """All tensors of a model, in the order of Llama's state dict."""
    query, keys = c.heads * c.head_dim, c.key_heads * c.head_dim
    out = [Tensor("model.embed_tokens.weight", "embedding", None, (c.vocab_size, c.dim))]
    for layer in range(c.layers):

        def add(name, leaf, *how, layer=layer):
            out.append(Tensor(f"model.layers.{layer}.{name}.weight", leaf, layer, *how))

        def add_swiglu(name, leaf, width, add=add):
            for part in _SWIGLU:
                add(f"{name}.{part}_proj", f"{leaf}/{part}", (c.dim, width) if part == "down" else (width, c.dim), 2)

        for name, width in (("q", query), ("k", keys), ("v", keys)):
            add(f"self_attn.{name}_proj", f"layers/attention/{name}", (width, c.dim), 2, c.head_dim)
        add("self_attn.o_proj", "layers/attention/out", (c.dim, query), 3)
        if c.compute_dim:
            add_swiglu("mlp", "layers/ffn", c.compute_dim)
        add("input_layernorm", "layers/attention_norm/scale", (c.dim,))
        if c.compute_dim:
            add("post_attention_layernorm", "layers/ffn_norm/scale", (c.dim,))
        if c.memory_dim:
            add("memory.norm", "memory/norm/scale", (c.dim,))
            add_swiglu("memory", "memory/ffn", c.memory_dim)
    out.append(Tensor("model.norm.weight", "final_norm/scale", None, (c.dim,)))
    if not c.tie_embeddings:
        out.append(Tensor("lm_head.weight", "head", None, (c.vocab_size, c.dim)))
    return out
