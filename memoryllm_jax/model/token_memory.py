"""The token memory: token id -> one row [layers, dim], computed live here and looked up from a file after training.

In training the memory is evaluated once per distinct token id of a batch shard, and positions take their rows
from the result. Ids and rows carry a leading axis S, one entry per batch shard, so that only `embed` crosses devices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from memoryllm_jax.model.sharding import constrain, spec


class TokenRows(NamedTuple):
    """What the decoder reads: row u of shard s belongs to the u-th distinct token id of that shard.

    After training one set of rows may serve all batch shards: S is then 1.

    x0_SUD: embeddings, the X_0 of the paper's equations.
    ffn_LSUD: FFN-M_l(NM_l(X_0)) of every layer, or rows of its table; None where a layer reads nothing of a token.
    """

    x0_SUD: jax.Array
    ffn_LSUD: jax.Array | None


def embed(table_VD, ids_SU, dtype):
    """table[ids] as [S, U, D] in `dtype`; D as stored, padding included.

    The table is split into rows over the tensor axis and into columns over the fsdp axis. A device looks up the ids of
    its whole fsdp group in its part of the table, and an all-to-all brings each shard the columns of its rows. So U
    rows cross devices, however many shards there are; XLA, left to itself, replicates the rows of all shards on
    data x fsdp meshes.
    """

    def local(table_vd, ids_su):
        # F: devices of the fsdp group; s, u, v, d: the parts of S, U, V, D on this device.
        ids_Fsu = jax.lax.all_gather(ids_su, "fsdp") - jax.lax.axis_index("tensor") * len(table_vd)
        here = (ids_Fsu >= 0) & (ids_Fsu < len(table_vd))
        part_Fsud = table_vd.at[jnp.where(here, ids_Fsu, 0)].get(mode="promise_in_bounds").astype(dtype)
        part_Fsud = jax.lax.psum(jnp.where(here[..., None], part_Fsud, 0), "tensor")
        return jax.lax.all_to_all(part_Fsud, "fsdp", 0, 3, tiled=True)[0]

    in_specs = (spec("vocab", "embed"), spec("shard", None))
    return jax.shard_map(local, in_specs=in_specs, out_specs=spec("shard", None, None))(table_VD, ids_SU)


@jax.custom_vjp
def take_rows(rows_SUD, index_SN):
    """rows[s, index[s, n]] -> [S, N, D]. Gradients of a row are summed in float32, however many positions share it.

    Rows with S = 1 serve all shards of the index; then there is no gradient.
    """
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
        zeros = jnp.zeros((*like.shape[:2], g_SND.shape[-1]), jnp.float32)
        add = jax.vmap(lambda z, i, g: z.at[i].add(g, mode="promise_in_bounds"))
        # In bfloat16 a sum of many small gradients would stop growing: rows of frequent tokens were off by 2%.
        return add(zeros, index_SN, g_SND.astype(jnp.float32)).astype(like.dtype), None


take_rows.defvjp(_take_forward, _take_backward)
