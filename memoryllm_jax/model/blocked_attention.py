"""Causal attention in tiles for CPUs, with a backward pass of its own.

Shapes: N groups of G heads, T positions, K head size; a tile of scores [G, q, k] has q query and k key positions. In
einsums the letters are g, q, k, and d for the head size.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# A tile's scores should fit the cache of one CPU core.
TILE_ROWS = 128  # query positions
# Most spans of a sequence in the forward pass. The tiles of a span have the same keys, so that one compiled loop runs
# them, and the time to compile does not grow with the length. Keys after a tile are masked: about 1/8 more work in
# 8 spans.
SPANS = 8
HEADS_PER_TILE = 2
MASKED = -1e30  # not -inf: the difference of two masked scores would be NaN
# Checkpoint name of the values that remat policy `dots` keeps for the backward pass: products with weights, and
# attention's result and log-partition.
SAVED = "saved"
einsum_float32 = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def blocked(q_BTHK, k_BTHK, v_BTHK):
    """Causal attention that holds the scores of one tile at a time, never all [T, T].

    The backward pass recomputes each tile from the log-partition, as in flash attention (Dao et al. 2022).

    Args:
      q_BTHK, k_BTHK, v_BTHK: B sequences with H heads each.
    Returns: [B, T, H, K] in the dtype of q.
    """
    B, T, H, K = q_BTHK.shape
    group = HEADS_PER_TILE if B * H % HEADS_PER_TILE == 0 else 1

    def grouped(x_BTHK):
        return x_BTHK.swapaxes(1, 2).reshape(B * H // group, group, T, K)

    out_NGTK = _attend(grouped(q_BTHK * K**-0.5), grouped(k_BTHK), grouped(v_BTHK))
    return out_NGTK.reshape(B, H, T, K).swapaxes(1, 2)


@jax.custom_vjp
def _attend(q_NGTK, k_NGTK, v_NGTK):
    return jax.lax.map(lambda qkv: _group_forward(*qkv)[0], (q_NGTK, k_NGTK, v_NGTK))


def _attend_forward(q, k, v):
    out, lse = checkpoint_name(jax.lax.map(lambda qkv: _group_forward(*qkv), (q, k, v)), SAVED)
    return out, (q, k, v, out, lse)


def _attend_backward(residuals, d_out):
    return jax.lax.map(lambda args: _group_backward(*args), (*residuals, d_out))


_attend.defvjp(_attend_forward, _attend_backward)


def _tiles(T):
    """The query positions [first, end) of each tile. Its keys are the positions [0, end)."""
    return [(first, min(first + TILE_ROWS, T)) for first in range(0, T, TILE_ROWS)]


def _spans(T):
    """The query positions [first, end) of each span: at most SPANS of whole tiles, and then the rest."""
    whole = T // TILE_ROWS * TILE_ROWS
    step = TILE_ROWS * max(1, -(-whole // (SPANS * TILE_ROWS)))
    ends = [*range(step, whole, step), whole, T]
    return [(first, end) for first, end in zip([0, *ends], ends) if first < end]


def _scores(q_GqK, k_GkK, first):
    """Scores [G, q, k] in float32 of queries from position `first` on, with keys after the query masked."""
    s_Gqk = einsum_float32("gqd,gkd->gqk", q_GqK, k_GkK)
    is_seen = first + jnp.arange(s_Gqk.shape[1])[:, None] >= jnp.arange(s_Gqk.shape[2])[None]
    return jnp.where(is_seen, s_Gqk, MASKED)


def _group_forward(q, k, v):
    """Attention of one group of heads; q, k and v are [G, T, K].

    Returns: (result [G, T, K] in the dtype of q, log-partition [G, T, 1] in float32).
    """
    spans = [_span_forward(q[:, first:end], k[:, :end], v[:, :end], first) for first, end in _spans(q.shape[1])]
    return tuple(jnp.concatenate(parts, 1) for parts in zip(*spans))


def _span_forward(q_GqK, k_GkK, v_GkK, first):
    """Attention of the queries from position `first` on, tile by tile. Returns: as `_group_forward`."""
    G, rows, K = q_GqK.shape
    if rows <= TILE_ROWS:
        return _tile_forward(q_GqK, k_GkK, v_GkK, first)

    def tile_forward(tile):
        q_GqK, first = tile
        return _tile_forward(q_GqK, k_GkK, v_GkK, first)

    q_NGqK = q_GqK.reshape(G, -1, TILE_ROWS, K).swapaxes(0, 1)
    results = jax.lax.map(tile_forward, (q_NGqK, first + jnp.arange(0, rows, TILE_ROWS)))
    return tuple(x_NGqx.swapaxes(0, 1).reshape(G, rows, -1) for x_NGqx in results)


def _tile_forward(q_GqK, k_GkK, v_GkK, first):
    s_Gqk = _scores(q_GqK, k_GkK, first)
    top_Gq1 = s_Gqk.max(-1, keepdims=True)
    p_Gqk = jnp.exp(s_Gqk - top_Gq1)
    total_Gq1 = p_Gqk.sum(-1, keepdims=True)
    out_GqK = einsum_float32("gqk,gkd->gqd", p_Gqk.astype(v_GkK.dtype), v_GkK) / total_Gq1
    return out_GqK.astype(q_GqK.dtype), top_Gq1 + jnp.log(total_Gq1)


def _group_backward(q, k, v, out, lse, d_out):
    """Gradients of q, k and v, each [G, T, K], from the gradient d_out of the result."""
    # The gradient of a softmax's input is p * (dp - sum(p * dp)); the sum equals that of d_out * out.
    delta = (d_out.astype(jnp.float32) * out).sum(-1, keepdims=True)
    dq = []
    # [G, K, T] and not [G, T, K]: XLA's CPU products run twice as fast that way round.
    dk = jnp.zeros(k.swapaxes(1, 2).shape)
    dv = jnp.zeros(v.swapaxes(1, 2).shape)
    for first, end in _tiles(q.shape[1]):
        p = jnp.exp(_scores(q[:, first:end], k[:, :end], first) - lse[:, first:end])
        d = d_out[:, first:end]
        ds = p * (einsum_float32("gqd,gkd->gqk", d, v[:, :end]) - delta[:, first:end])
        p, ds = p.astype(q.dtype), ds.astype(q.dtype)
        dq.append(einsum_float32("gqk,gkd->gqd", ds, k[:, :end]))
        dv = dv.at[:, :, :end].add(einsum_float32("gqd,gqk->gdk", d, p))
        dk = dk.at[:, :, :end].add(einsum_float32("gqd,gqk->gdk", q[:, first:end], ds))
    gradients = (jnp.concatenate(dq, 1), dk.swapaxes(1, 2), dv.swapaxes(1, 2))
    return tuple(g.astype(q.dtype) for g in gradients)
