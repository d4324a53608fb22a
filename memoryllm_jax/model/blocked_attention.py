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


def _scores(q_GTK, k_GTK, first, end):
    """Scores [G, q, k] of one tile in float32, with keys after the query masked."""
    s_Gqk = einsum_float32("gqd,gkd->gqk", q_GTK[:, first:end], k_GTK[:, :end])
    is_seen = jnp.arange(first, end)[:, None] >= jnp.arange(end)[None]
    return jnp.where(is_seen, s_Gqk, MASKED)


def _group_forward(q, k, v):
    """Attention of one group of heads; q, k and v are [G, T, K].

    Returns: (result [G, T, K] in the dtype of q, log-partition [G, T, 1] in float32).
    """
    outs, lses = [], []
    for first, end in _tiles(q.shape[1]):
        s = _scores(q, k, first, end)
        top = s.max(-1, keepdims=True)
        p = jnp.exp(s - top)
        total = p.sum(-1, keepdims=True)
        outs.append((einsum_float32("gqk,gkd->gqd", p.astype(v.dtype), v[:, :end]) / total).astype(q.dtype))
        lses.append(top + jnp.log(total))
    return jnp.concatenate(outs, 1), jnp.concatenate(lses, 1)


def _group_backward(q, k, v, out, lse, d_out):
    """Gradients of q, k and v, each [G, T, K], from the gradient d_out of the result."""
    # The gradient of a softmax's input is p * (dp - sum(p * dp)); the sum equals that of d_out * out.
    delta = (d_out.astype(jnp.float32) * out).sum(-1, keepdims=True)
    dq = []
    # [G, K, T] and not [G, T, K]: XLA's CPU products run twice as fast that way round.
    dk = jnp.zeros(k.swapaxes(1, 2).shape)
    dv = jnp.zeros(v.swapaxes(1, 2).shape)
    for first, end in _tiles(q.shape[1]):
        p = jnp.exp(_scores(q, k, first, end) - lse[:, first:end])
        d = d_out[:, first:end]
        ds = p * (einsum_float32("gqd,gkd->gqk", d, v[:, :end]) - delta[:, first:end])
        p, ds = p.astype(q.dtype), ds.astype(q.dtype)
        dq.append(einsum_float32("gqk,gkd->gqd", ds, k[:, :end]))
        dv = dv.at[:, :, :end].add(einsum_float32("gqd,gqk->gdk", d, p))
        dk = dk.at[:, :, :end].add(einsum_float32("gqd,gqk->gdk", q[:, first:end], ds))
    gradients = (jnp.concatenate(dq, 1), dk.swapaxes(1, 2), dv.swapaxes(1, 2))
    return tuple(g.astype(q.dtype) for g in gradients)
