"""Rows of the token memory, which maps a token id to one row [layers, dim], and how positions take them.

In training the memory is evaluated once for each distinct token id of a batch shard, and positions take their rows from
the result. After training, rows may also be looked up in a ToL file.

Shapes: S batch shards, U distinct token ids of a shard, N positions of a shard, L layers, D width, V token ids as
stored. Ids and rows have a leading axis S, so that of the functions here only `embed` communicates between devices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from memoryllm_jax.model.sharding import constrain, spec


class TokenRows(NamedTuple):
    """The rows that the decoder reads. Row u of shard s belongs to the u-th distinct token id of that shard.

    After training one set of rows may serve all batch shards: S is then 1.

    Attributes:
      x0_SUD: embeddings, the X_0 of the paper's equations.
      rows_LSUP: FFN-M_l(NM_l(X_0)) of each layer or, in architectures with tables, the tables' rows of width P; None if
        layers read nothing by token id. After training it may be a sequence by layer.
    """

    x0_SUD: jax.Array
    rows_LSUP: jax.Array | None


def embed(table_VD, ids_SU, dtype):
    """Looks up rows of a table that is split by rows over the tensor axis and by columns over the fsdp axis.

    A device looks up the ids of its whole fsdp group in its part of the table, and an all-to-all brings each shard all
    columns of its rows. Each step moves as many numbers as the U rows of one shard have, however many shards there are.
    XLA's own lookup would replicate the rows of all shards on data x fsdp meshes.

    Args:
      table_VD: float32, as stored.
      ids_SU: int32 token ids.
      dtype: dtype of the result.
    Returns: table[ids], [S, U, D], with the padding of D as stored.
    """

    def local(table_vd, ids_su):
        # F: devices of the fsdp group; s, u, v, d: the parts of S, U, V, D on this device.
        ids_Fsu = jax.lax.all_gather(ids_su, "fsdp") - jax.lax.axis_index("tensor") * len(table_vd)
        is_here = (ids_Fsu >= 0) & (ids_Fsu < len(table_vd))
        part_Fsud = table_vd.at[jnp.where(is_here, ids_Fsu, 0)].get(mode="promise_in_bounds").astype(dtype)
        # One device of the tensor axis holds the row of an id, and the others add zero.
        part_Fsud = jax.lax.psum(jnp.where(is_here[..., None], part_Fsud, 0), "tensor")
        return jax.lax.all_to_all(part_Fsud, "fsdp", 0, 3, tiled=True)[0]

    in_specs = (spec("vocab", "embed"), spec("shard", None))
    return jax.shard_map(local, in_specs=in_specs, out_specs=spec("shard", None, None))(table_VD, ids_SU)


@jax.custom_vjp
def take_rows(rows_SUD, index_SN):
    """Takes the row of each position: rows[s, index[s, n]], [S, N, D].

    The gradient of a row is summed in float32 over the positions that share it. Rows with S = 1 serve all shards of the
    index; this is for inference, and has no gradient.
    """
    with jax.named_scope("take_rows"):
        S = index_SN.shape[0]
        if rows_SUD.shape[0] < S:
            rows_SUD = jnp.broadcast_to(constrain(rows_SUD, None, None, None), (S, *rows_SUD.shape[1:]))
            rows_SUD = constrain(rows_SUD, "shard", None, None)
        return jax.vmap(lambda rows, index: rows.at[index].get(mode="promise_in_bounds"))(rows_SUD, index_SN)


def _take_forward(rows_SUD, index_SN):
    # The backward pass needs the rows' shape and dtype. A slice of no columns has them without keeping the rows.
    return take_rows(rows_SUD, index_SN), (index_SN, rows_SUD[..., :0])


def _take_backward(residuals, g_SND):
    index_SN, like = residuals
    with jax.named_scope("take_rows"):
        zeros = jnp.zeros((*like.shape[:2], g_SND.shape[-1]), jnp.float32)
        add = jax.vmap(lambda z, i, g: z.at[i].add(g, mode="promise_in_bounds"))
        # Summed in bfloat16, many small gradients would stop adding up: rows of frequent tokens were off by 2%.
        return add(zeros, index_SN, g_SND.astype(jnp.float32)).astype(like.dtype), None


take_rows.defvjp(_take_forward, _take_backward)
