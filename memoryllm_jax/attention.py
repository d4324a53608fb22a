"""Causal self-attention by backend name. An unavailable backend is an error, never a fallback."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from memoryllm_jax.cli import UserError
from memoryllm_jax.sharding import spec

BLOCK = 128  # query rows a tile: with 2 heads, a tile's scores fit the cache of one CPU core
HEADS_A_TILE = 2
MASKED = -1e30
_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
SAVED = "attention"  # name of the results that the remat policy `dots` keeps


def resolve_backend(name: str, dtype: str) -> str:
    """The backend that `auto` stands for on this machine and dtype; another name is checked. Raises: UserError."""
    platform = jax.default_backend()
    has_cudnn = platform == "gpu" and "NVIDIA" in jax.devices()[0].device_kind
    if name == "cudnn" and not has_cudnn:
        raise UserError(f"config.model.attention: cudnn needs an NVIDIA GPU, found {platform}")
    if name == "cudnn" and dtype != "bfloat16":
        raise UserError(f"config.model.attention: cudnn needs config.model.dtype bfloat16, found {dtype}")
    return ("cudnn" if has_cudnn and dtype == "bfloat16" else "blocked") if name == "auto" else name


def causal_attention(q_BTHK, k_BTHK, v_BTHK, backend: str):
    """softmax(q k^T / sqrt(K)) v over earlier positions and itself; each device works on its rows and heads."""
    kernel = {"plain": plain, "blocked": blocked, "cudnn": cudnn}[resolve_backend(backend, q_BTHK.dtype.name)]
    qkv = spec("batch", None, "heads", None)
    return jax.shard_map(kernel, in_specs=(qkv, qkv, qkv), out_specs=qkv, check_vma=False)(q_BTHK, k_BTHK, v_BTHK)


class Cache(NamedTuple):
    """Keys and values of one layer's earlier positions, for attention of one new position a sequence.

    Attending and writing are for two jitted functions: in one, XLA copies a cache that it reads and updates.
    """

    k_BHSK: jax.Array
    v_BHSK: jax.Array

    def attend(self, q_BHK, k_BHK, v_BHK, position_B):
        """Attention of the new positions over what came before, in the cache, and over themselves: [B, H, K]."""
        q_BHK = q_BHK * q_BHK.shape[-1] ** -0.5
        earlier = jnp.arange(self.k_BHSK.shape[2]) < position_B[:, None, None]
        s_BHS = jnp.where(earlier, _einsum("bhk,bhsk->bhs", q_BHK, self.k_BHSK), MASKED)
        own_BH1 = (q_BHK * k_BHK).sum(-1, keepdims=True, dtype=jnp.float32)
        top = jnp.maximum(s_BHS.max(-1, keepdims=True), own_BH1)
        p_BHS, p_own = jnp.exp(s_BHS - top), jnp.exp(own_BH1 - top)
        y = _einsum("bhs,bhsk->bhk", p_BHS.astype(self.v_BHSK.dtype), self.v_BHSK) + p_own * v_BHK
        return (y / (p_BHS.sum(-1, keepdims=True) + p_own)).astype(q_BHK.dtype)

    def write(self, new: "Cache", position_B) -> "Cache":
        """With the keys and values [B, H, 1, K] of each sequence's new position."""

        def put(cache_HSK, new_H1K, position):
            return jax.lax.dynamic_update_slice(cache_HSK, new_H1K, (0, position, 0))

        return Cache(*(jax.vmap(put)(old, added, position_B) for old, added in zip(self, new)))


def plain(q_BTHK, k_BTHK, v_BTHK):
    return jax.nn.dot_product_attention(q_BTHK, k_BTHK, v_BTHK, is_causal=True, implementation="xla")


def cudnn(q_BTHK, k_BTHK, v_BTHK):
    """cuDNN flash attention; it wants head sizes that are multiples of 8, so zeros fill the rest."""
    head_dim = q_BTHK.shape[-1]
    pad = [(0, 0), (0, 0), (0, 0), (0, -head_dim % 8)]
    q, k, v = (jnp.pad(x, pad) for x in (q_BTHK, k_BTHK, v_BTHK))
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn", scale=head_dim**-0.5)
    return out[..., :head_dim]


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
    s = _einsum("gqd,gkd->gqk", q[:, low:high], k[:, :high])
    causal = jnp.arange(low, high)[:, None] >= jnp.arange(high)[None]
    return jnp.where(causal, s, MASKED)


def _forward(q, k, v):
    outs, lses = [], []
    for low, high in _tile_rows(q.shape[1]):
        s = _scores(q, k, low, high)
        top = s.max(-1, keepdims=True)
        p = jnp.exp(s - top)
        total = p.sum(-1, keepdims=True)
        outs.append((_einsum("gqk,gkd->gqd", p.astype(v.dtype), v[:, :high]) / total).astype(q.dtype))
        lses.append(top + jnp.log(total))
    return jnp.concatenate(outs, 1), jnp.concatenate(lses, 1)


def _backward(q, k, v, out, lse, d_out):
    delta = (d_out.astype(jnp.float32) * out).sum(-1, keepdims=True)
    # Keys' and values' gradients are held [G, K, T]: XLA's CPU products run twice as fast that way round.
    dq, dk, dv = [], jnp.zeros(k.swapaxes(1, 2).shape), jnp.zeros(v.swapaxes(1, 2).shape)
    for low, high in _tile_rows(q.shape[1]):
        p = jnp.exp(_scores(q, k, low, high) - lse[:, low:high])
        d = d_out[:, low:high]
        ds = p * (_einsum("gqd,gkd->gqk", d, v[:, :high]) - delta[:, low:high])
        p, ds = p.astype(q.dtype), ds.astype(q.dtype)
        dq.append(_einsum("gqk,gkd->gqd", ds, k[:, :high]))
        dv = dv.at[:, :, :high].add(_einsum("gqd,gqk->gdk", d, p))
        dk = dk.at[:, :, :high].add(_einsum("gqd,gqk->gdk", q[:, low:high], ds))
    grads = jnp.concatenate(dq, 1), dk.swapaxes(1, 2), dv.swapaxes(1, 2)
    return tuple(g.astype(q.dtype) for g in grads)
