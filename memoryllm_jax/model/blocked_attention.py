"""Causal attention in tiles for CPUs, with a backward pass of its own."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

BLOCK = 128  # query rows a tile: with 2 heads, a tile's scores fit the cache of one CPU core
HEADS_A_TILE = 2
MASKED = -1e30
einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
SAVED = "saved"  # name of what the backward pass finds: products with weights, attention's output and log-partition


def blocked(q_BTHK, k_BTHK, v_BTHK):
    """Attention in causal tiles that never holds [T, T]: the scores of one tile, for a few heads at a time.

    The backward pass recomputes each tile from the log-partition, as in flash attention (Dao et al. 2022).
    """
    B, T, H, K = q_BTHK.shape
    group = HEADS_A_TILE if B * H % HEADS_A_TILE == 0 else 1

    def tiles(x):
        return x.swapaxes(1, 2).reshape(B * H // group, group, T, K)

    out = _tiled(tiles(q_BTHK * K**-0.5), tiles(k_BTHK), tiles(v_BTHK))
    return out.reshape(B, H, T, K).swapaxes(1, 2)


@jax.custom_vjp
def _tiled(q_NGTK, k_NGTK, v_NGTK):
    return jax.lax.map(lambda qkv: _forward(*qkv)[0], (q_NGTK, k_NGTK, v_NGTK))


def _tiled_forward(q, k, v):
    out, lse = checkpoint_name(jax.lax.map(lambda qkv: _forward(*qkv), (q, k, v)), SAVED)
    return out, (q, k, v, out, lse)


def _tiled_backward(residuals, d_out):
    return jax.lax.map(lambda args: _backward(*args), (*residuals, d_out))


_tiled.defvjp(_tiled_forward, _tiled_backward)


def _tile_rows(T):
    return [(low, min(low + BLOCK, T)) for low in range(0, T, BLOCK)]


def _scores(q, k, low, high):
    s = einsum("gqd,gkd->gqk", q[:, low:high], k[:, :high])
    causal = jnp.arange(low, high)[:, None] >= jnp.arange(high)[None]
    return jnp.where(causal, s, MASKED)


def _forward(q, k, v):
    outs, lses = [], []
    for low, high in _tile_rows(q.shape[1]):
        s = _scores(q, k, low, high)
        top = s.max(-1, keepdims=True)
        p = jnp.exp(s - top)
        total = p.sum(-1, keepdims=True)
        outs.append((einsum("gqk,gkd->gqd", p.astype(v.dtype), v[:, :high]) / total).astype(q.dtype))
        lses.append(top + jnp.log(total))
    return jnp.concatenate(outs, 1), jnp.concatenate(lses, 1)


def _backward(q, k, v, out, lse, d_out):
    delta = (d_out.astype(jnp.float32) * out).sum(-1, keepdims=True)
    # Keys' and values' gradients are held [G, K, T]: XLA's CPU products run twice as fast that way round.
    dq, dk, dv = [], jnp.zeros(k.swapaxes(1, 2).shape), jnp.zeros(v.swapaxes(1, 2).shape)
    for low, high in _tile_rows(q.shape[1]):
        p = jnp.exp(_scores(q, k, low, high) - lse[:, low:high])
        d = d_out[:, low:high]
        ds = p * (einsum("gqd,gkd->gqk", d, v[:, :high]) - delta[:, low:high])
        p, ds = p.astype(q.dtype), ds.astype(q.dtype)
        dq.append(einsum("gqk,gkd->gqd", ds, k[:, :high]))
        dv = dv.at[:, :, :high].add(einsum("gqd,gqk->gdk", d, p))
        dk = dk.at[:, :, :high].add(einsum("gqd,gqk->gdk", q[:, low:high], ds))
    grads = jnp.concatenate(dq, 1), dk.swapaxes(1, 2), dv.swapaxes(1, 2)
    return tuple(g.astype(q.dtype) for g in grads)
