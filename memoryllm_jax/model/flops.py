"""FLOPs and parameters of a model, by formula.

FLOPs of a forward pass over N tokens that evaluates R rows of the token memory, a multiply-add counted as two:

    N L (4 h^2 (1 + G) + 2 h T S + 6 h W_C)  +  R L (6 h W_M)  +  N 2 h V

with L layers of width h, sequences of T tokens and V token ids. The terms are attention's projections, with G key-value
heads for each query head (G = 1 unless `model.kv_heads` is set); attention's scores and values, counted at half as
attention is causal, times the share S of these pairs that lie inside documents (1 without config.data.document_mask);
FFN-C of width W_C; FFN-M of width W_M; and the output head. Gates of per-layer embeddings of width P add N L (4 h P).
In bov-B, layers without a projection to values have 2 h^2 (2 + G) in the place of 4 h^2 (1 + G). Lookups, norms and
element-wise work are not counted. A training step counts as three forward passes, whatever rematerialisation computes
again. Frozen weights (`optimizer.train`) have no gradients, so that their products count as two; so they do below the
first layer with rows too, where nothing is trained and no backward pass is needed.
"""

from typing import NamedTuple

from memoryllm_jax.config import Config
from memoryllm_jax.model import memories


class Forward(NamedTuple):
    """FLOPs of a forward pass.

    Attributes:
      weights: products with the weights of decoder layers and head.
      attention: scores and values.
      memory: products with the weights of the token memory.
    """

    weights: float
    attention: float
    memory: float


def forward(config: Config, tokens: int, rows: int, attention_share: float = 1.0) -> Forward:
    """FLOPs of a forward pass. The arguments are those of `train_flops`."""
    m = config.model
    memory = memories.of(m)
    weights = _projections(m) + m.layers * (3 * m.dim * m.compute_dim + memory.gate_weights) + m.dim * m.vocab_size
    return Forward(
        weights=tokens * 2 * weights,
        attention=tokens * m.layers * 2 * m.dim * config.seq_len * attention_share,
        memory=rows * len(m.row_layers) * 2 * memory.row_weights,
    )


def train_flops(config: Config, tokens: int, rows: int, attention_share: float = 1.0) -> float:
    """FLOPs of a training step.

    Args:
      tokens: tokens of the step.
      rows: rows of the token memory that it evaluates.
      attention_share: share of the pairs of causal attention that lie inside documents.
    """
    once = forward(config, tokens, rows, attention_share)
    of_weights = 3.0 if config.optimizer.train == "all" else 2.0
    return of_weights * once.weights + 3.0 * (once.attention + once.memory)


def parameters(config: Config) -> dict[str, int]:
    """Counts a model's parameters by part, without padding.

    Returns: the parts "attention", "ffn_c", "norms", "gates", "memory" (FFN-M, or tables of embeddings, with their
      norms) and "embedding_and_head"; then "active", the sum of the first four, and "total", the sum of all parts.
    """
    m = config.model
    norms_a_layer = 1  # before attention
    if m.compute_dim:
        norms_a_layer += 1
    memory = memories.of(m)
    if memory.gate_weights:
        norms_a_layer += 1
    of_heads = 2 * m.head_dim if m.qk_norm else 0  # of queries and of keys
    tables = 1 if m.tie_embeddings else 2
    parts = {
        "attention": _projections(m),
        "ffn_c": m.layers * 3 * m.dim * m.compute_dim,
        "norms": m.layers * (norms_a_layer * m.dim + of_heads) + m.dim,  # and the final one
        "gates": m.layers * memory.gate_weights,
        "memory": 0 if m.rows == "frozen" else len(m.row_layers) * memory.parameters,
        "embedding_and_head": tables * m.vocab_size * m.dim,
    }
    active = sum(parts[name] for name in ("attention", "ffn_c", "norms", "gates"))
    return parts | {"active": active, "total": sum(parts.values())}


def _projections(m) -> int:
    """Weights of attention's projections in all layers."""
    without_values = len(m.row_layers) if memories.of(m).replaces_values else 0
    to_values = m.dim * m.key_heads * m.head_dim
    return m.layers * 2 * m.dim * (m.heads + m.key_heads) * m.head_dim - without_values * to_values
