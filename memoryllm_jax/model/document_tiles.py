"""Causal attention inside documents, in tiles for CPUs: `blocked` for sequences that hold several documents.

A tile of scores has TILE query and TILE key positions. Tiles in which no query's document reaches the keys are skipped,
in both passes: a loop over the tiles of a query tile begins at the one where the document of its first query begins.
Whole sequences keep the kernel of blocked_attention.py, whose loops have lengths known when they are compiled: on a CPU
it is faster up to about 1,000 positions, and slower above.

Shapes: N groups of G heads, T positions, K head size; a tile of scores [G, q, k] has q query and k key positions. In
einsums the letters are g, q, k, and d for the head size.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from memoryllm_jax.model.blocked_attention import HEADS_PER_TILE, MASKED, SAVED, einsum_float32

TILE = 128  # positions; shorter sequences are one tile


def blocked_in_documents(q_BTHK, k_BTHK, v_BTHK, start_BT):
    """Causal attention inside documents, one tile of scores at a time, without the tiles that are masked whole.

    The backward pass recomputes each tile from the log-partition, as in flash attention (Dao et al. 2022). Key tiles
    are summed one by one with a running maximum, as there.

    Args:
      q_BTHK, k_BTHK, v_BTHK: B sequences with H heads each.
      start_BT: int32, the position at which each position's document begins.
    Returns: [B, T, H, K] in the dtype of q.
    """
    B, T, H, K = q_BTHK.shape
    group = HEADS_PER_TILE if H % HEADS_PER_TILE == 0 else 1  # heads of one sequence, as they share its documents
    padding = -T % min(TILE, T)

    def grouped(x_BTHK):
        x_BTHK = jnp.pad(x_BTHK, [(0, 0), (0, padding), (0, 0), (0, 0)])
        return x_BTHK.swapaxes(1, 2).reshape(B * H // group, group, T + padding, K)

    # The padding is a document of its own.
    start_BT = jnp.pad(start_BT, [(0, 0), (0, padding)], constant_values=T)
    start_NT = jnp.repeat(start_BT, H // group, 0)
    out_NGTK = _attend(grouped(q_BTHK * K**-0.5), grouped(k_BTHK), grouped(v_BTHK), start_NT)
    return out_NGTK.reshape(B, H, T + padding, K)[:, :, :T].swapaxes(1, 2)


@jax.custom_vjp
def _attend(q_NGTK, k_NGTK, v_NGTK, start_NT):
    return jax.lax.map(lambda group: _group_forward(*group)[0], (q_NGTK, k_NGTK, v_NGTK, start_NT))


def _attend_forward(q, k, v, start):
    out, lse = checkpoint_name(jax.lax.map(lambda group: _group_forward(*group), (q, k, v, start)), SAVED)
    return out, (q, k, v, start, out, lse)


def _attend_backward(residuals, d_out):
    return *jax.lax.map(lambda group: _group_backward(*group), (*residuals, d_out)), None


_attend.defvjp(_attend_forward, _attend_backward)


def _tile(x, number, axis=1):
    """The tile `number` of an array along the positions."""
    size = min(TILE, x.shape[axis])
    return jax.lax.dynamic_slice_in_dim(x, number * size, size, axis)


def _scores(q_GqK, k_GkK, start_q, query_tile, key_tile):
    """Scores [G, q, k] in float32, with keys after the query and keys of earlier documents masked."""
    s_Gqk = einsum_float32("gqd,gkd->gqk", q_GqK, k_GkK)
    offset_q = jnp.arange(len(start_q))
    query_q = query_tile * TILE + offset_q
    key_k = key_tile * TILE + offset_q
    is_seen = (key_k >= start_q[:, None]) & (key_k <= query_q[:, None])
    return jnp.where(is_seen, s_Gqk, MASKED)


class _Sums(NamedTuple):
    """Attention of a tile's queries over some key tiles: the largest score, and sums of exponentials relative to it."""

    top_Gq1: jax.Array
    weight_Gq1: jax.Array
    sum_GqK: jax.Array


def _group_forward(q, k, v, start_T):
    """Attention of one group of heads; q, k and v are [G, T, K].

    Returns: (result [G, T, K] in the dtype of q, log-partition [G, T, 1] in float32).
    """
    G, T, _ = q.shape

    def over_keys(query_tile):
        q_GqK, start_q = _tile(q, query_tile), _tile(start_T, query_tile, 0)

        def part(key_tile):
            s_Gqk = _scores(q_GqK, _tile(k, key_tile), start_q, query_tile, key_tile)
            return s_Gqk, s_Gqk.max(-1, keepdims=True), _tile(v, key_tile)

        def sums(s_Gqk, top_Gq1, v_GkK):
            p_Gqk = jnp.exp(s_Gqk - top_Gq1)
            return p_Gqk.sum(-1, keepdims=True), einsum_float32("gqk,gkd->gqd", p_Gqk.astype(v_GkK.dtype), v_GkK)

        def add(key_tile, before):
            s_Gqk, top_Gq1, v_GkK = part(key_tile)
            top_Gq1 = jnp.maximum(before.top_Gq1, top_Gq1)
            shrink_Gq1 = jnp.exp(before.top_Gq1 - top_Gq1)
            weight_Gq1, sum_GqK = sums(s_Gqk, top_Gq1, v_GkK)
            return _Sums(top_Gq1, before.weight_Gq1 * shrink_Gq1 + weight_Gq1, before.sum_GqK * shrink_Gq1 + sum_GqK)

        # The query's own tile comes first: there each query sees itself, so that the maximum is a real score from then
        # on, and the exponential of a masked score is 0.
        s_Gqk, top_Gq1, v_GkK = part(query_tile)
        own = _Sums(top_Gq1, *sums(s_Gqk, top_Gq1, v_GkK))
        found = jax.lax.fori_loop(start_q[0] // TILE, query_tile, add, own)
        return (found.sum_GqK / found.weight_Gq1).astype(q.dtype), found.top_Gq1 + jnp.log(found.weight_Gq1)

    results = jax.lax.map(over_keys, jnp.arange(-(-T // TILE)))
    return tuple(x_nGqx.swapaxes(0, 1).reshape(G, T, -1) for x_nGqx in results)


def _group_backward(q, k, v, start_T, out, lse, d_out):
    """Gradients of q, k and v, each [G, T, K], from the gradient d_out of the result."""
    G, T, K = q.shape
    # The gradient of a softmax's input is p * (dp - sum(p * dp)); the sum equals that of d_out * out.
    delta = (d_out.astype(jnp.float32) * out).sum(-1, keepdims=True)

    def over_keys(gradients, query_tile):
        tile = functools.partial(_tile, number=query_tile)
        q_GqK, lse_Gq1, delta_Gq1, d_GqK = tile(q), tile(lse), tile(delta), tile(d_out)
        start_q = tile(start_T, axis=0)

        def add(key_tile, gradients):
            dq_GqK, dk_GTK, dv_GTK = gradients
            k_GkK, v_GkK = _tile(k, key_tile), _tile(v, key_tile)
            p = jnp.exp(_scores(q_GqK, k_GkK, start_q, query_tile, key_tile) - lse_Gq1)
            ds = p * (einsum_float32("gqd,gkd->gqk", d_GqK, v_GkK) - delta_Gq1)
            p, ds = p.astype(q.dtype), ds.astype(q.dtype)
            dq_GqK += einsum_float32("gqk,gkd->gqd", ds, k_GkK)
            dv_GTK = _add_to_tile(dv_GTK, key_tile, einsum_float32("gqd,gqk->gkd", d_GqK, p))
            dk_GTK = _add_to_tile(dk_GTK, key_tile, einsum_float32("gqd,gqk->gkd", q_GqK, ds))
            return dq_GqK, dk_GTK, dv_GTK

        zeros = jnp.zeros(q_GqK.shape, jnp.float32)
        dq_GqK, dk_GTK, dv_GTK = jax.lax.fori_loop(start_q[0] // TILE, query_tile + 1, add, (zeros, *gradients))
        return (dk_GTK, dv_GTK), dq_GqK

    zeros = jnp.zeros((G, T, K), jnp.float32)
    (dk, dv), dq = jax.lax.scan(over_keys, (zeros, zeros), jnp.arange(-(-T // TILE)))
    gradients = dq.swapaxes(0, 1).reshape(G, T, K), dk, dv
    return tuple(g.astype(q.dtype) for g in gradients)


def _add_to_tile(x, number, part):
    """x with `part` added to its tile `number`."""
    return jax.lax.dynamic_update_slice_in_dim(x, _tile(x, number) + part, number * TILE, 1)
