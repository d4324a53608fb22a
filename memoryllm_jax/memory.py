"""The token memory: token id -> one row [layers, dim], computed live here and looked up from a file after training.

In training the memory is evaluated once per distinct token id of a batch shard, and positions take their rows
from the result. Ids and rows carry a leading axis S, one entry per batch shard, so that nothing crosses devices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class TokenRows(NamedTuple):
    """What the decoder reads: row u of shard s belongs to the u-th distinct token id of that shard.

    x0_SUD: embeddings, the X_0 of the paper's equations.
    ffn_LSUD: FFN-M_l(NM_l(X_0)) of every layer; None for base, which has no token memory.
    """

    x0_SUD: jax.Array
    ffn_LSUD: jax.Array | None


@jax.custom_vjp
def take_rows(rows_SUD, index_SN):
    """rows[s, index[s, n]] -> [S, N, D]. Gradients of a row are summed in float32, however many positions share it."""
    return jax.vmap(lambda rows, index: rows.at[index].get(mode="promise_in_bounds"))(rows_SUD, index_SN)


def _take_forward(rows_SUD, index_SN):
    # The zero-sized slice carries shape and dtype of the rows, not the rows, to the backward pass.
    return take_rows(rows_SUD, index_SN), (index_SN, rows_SUD[..., :0])


def _take_backward(residuals, g_SND):
    index_SN, like = residuals
    zeros = jnp.zeros((*like.shape[:2], g_SND.shape[-1]), jnp.float32)
    add = jax.vmap(lambda z, i, g: z.at[i].add(g, mode="promise_in_bounds"))
    return add(zeros, index_SN, g_SND.astype(jnp.float32)).astype(like.dtype), None


take_rows.defvjp(_take_forward, _take_backward)
