"""Parameters and FLOPs of a model, by formula."""

from memoryllm_jax.config import Config


def train_flops(config: Config, tokens: int, rows: int) -> float:
    """Model FLOPs of a training step (the formula above)."""
    m = config.model
    projections = 4 * m.dim**2 * (1 + m.key_heads / m.heads)
    per_token = m.layers * (projections + 2 * m.dim * config.seq_len + 6 * m.dim * m.compute_dim)
    per_token += m.layers * 4 * m.dim * m.table_dim * (m.token_memory == "per_layer")
    per_token += 2 * m.dim * m.vocab_size
    return 3.0 * (tokens * per_token + rows * m.layers * 6 * m.dim * m.memory_dim)


def parameters(config: Config) -> dict[str, int]:
    """Numbers of parameters by part, padding left out; `active` leaves out the token memory and the two tables."""
    m = config.model
    per_layer = m.token_memory == "per_layer"
    norms = m.layers * (1 + bool(m.compute_dim) + per_layer) * m.dim + m.dim
    ffn_m = 3 * m.dim * m.memory_dim + (m.dim if m.memory_dim else 0)
    table = m.row_dim * (m.vocab_size + per_layer) if not m.memory_dim else 0
    parts = {
        "attention": m.layers * 2 * m.dim * (m.heads + m.key_heads) * m.head_dim,
        "ffn_c": m.layers * 3 * m.dim * m.compute_dim,
        "norms": norms,
        "gates": m.layers * 2 * m.dim * m.table_dim * per_layer,
        "memory": m.layers * (ffn_m + table),
        "embedding_and_head": (1 if m.tie_embeddings else 2) * m.vocab_size * m.dim,
    }
    active = sum(parts[name] for name in ("attention", "ffn_c", "norms", "gates"))
    return parts | {"active": active, "total": sum(parts.values())}
