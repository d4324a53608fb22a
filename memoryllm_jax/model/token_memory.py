"""The token memory: token id -> one row [layers, dim], computed live here and looked up from a file after training.

In training the memory is evaluated once per distinct token id of a batch shard, and positions take their rows
from the result. Ids and rows carry a leading axis S, one entry per batch shard, so that nothing crosses devices.
Where the distinct ids of a shard reach the vocabulary, its rows are evaluated once for all shards instead: the leading
axis is 1, each shard evaluates its part of the vocabulary, and the rows of a layer are gathered when it needs them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from memoryllm_jax.model.sharding import constrain, spec


class TokenRows(NamedTuple):
    """What the decoder reads: row u of shard s belongs to the u-th distinct token id of that shard.

    x0_SUD: embeddings, the X_0 of the paper's equations; with a leading 1 in place of S, all shards share the rows.
    ffn_LSUD: FFN-M_l(NM_l(X_0)) of every layer, or rows of its table; None where a layer reads nothing of a token.
    """

    x0_SUD: jax.Array
    ffn_LSUD: jax.Array | None


def rows_axes(rows_SUD) -> tuple[str | None, ...]:
    """Logical axes of rows: those of each shard, or those that all shards share and hold a part of."""
    return (None, "shard", None) if rows_SUD.shape[0] == 1 else ("shard", None, None)


def embed(table_VD, ids_SU, dtype):
    """table[ids] in `dtype`, D as stored. A device looks up its columns for all ids of its fsdp group and sends them.

    What crosses devices is U rows, however many shards there are; left to XLA, data x fsdp meshes replicate all rows.
    """

    def local(table_vd, ids_su):
        ids_Fsu = jax.lax.all_gather(ids_su, "fsdp") - jax.lax.axis_index("tensor") * len(table_vd)
        here = (ids_Fsu >= 0) & (ids_Fsu < len(table_vd))
        part_Fsud = table_vd.at[jnp.where(here, ids_Fsu, 0)].get(mode="promise_in_bounds").astype(dtype)
        part_Fsud = jax.lax.psum(jnp.where(here[..., None], part_Fsud, 0), "tensor")
        return jax.lax.all_to_all(part_Fsud, "fsdp", 0, 3, tiled=True)[0]

    rows = spec(*rows_axes(ids_SU[..., None]))
    ids = spec(*rows_axes(ids_SU[..., None])[:2])
    specs = {"in_specs": (spec("vocab", "embed"), ids), "out_specs": rows}
    return jax.shard_map(local, **specs)(table_VD, ids_SU)


@jax.custom_vjp
def take_rows(rows_SUD, index_SN):
    """rows[s, index[s, n]] -> [S, N, D]. Gradients of a row are summed in float32, however many positions share it."""
    with jax.named_scope("take_rows"):
        S = index_SN.shape[0]
        if rows_SUD.shape[0] < S:
            rows_SUD = jnp.broadcast_to(constrain(rows_SUD, None, None, None), (S, *rows_SUD.shape[1:]))
            rows_SUD = constrain(rows_SUD, "shard", None, None)
        return jax.vmap(lambda rows, index: rows.at[index].get(mode="promise_in_bounds"))(rows_SUD, index_SN)


def _take_forward(rows_SUD, index_SN):
    # The zero-sized slice carries shape and dtype of the rows, not the rows, to the backward pass.
    return take_rows(rows_SUD, index_SN), (index_SN, rows_SUD[..., :0])


def _take_backward(residuals, g_SND):
    index_SN, like = residuals
    with jax.named_scope("take_rows"):
        zeros = jnp.zeros((len(index_SN), like.shape[1], g_SND.shape[-1]), jnp.float32)
        add = jax.vmap(lambda z, i, g: z.at[i].add(g, mode="promise_in_bounds"))
        d_SUD = add(zeros, index_SN, g_SND.astype(jnp.float32))
        if len(like) < len(index_SN):
            d_SUD = constrain(d_SUD.sum(0, keepdims=True), None, "shard", None)
        return d_SUD.astype(like.dtype), None


take_rows.defvjp(_take_forward, _take_backward)
