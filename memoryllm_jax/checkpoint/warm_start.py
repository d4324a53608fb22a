"""Parameters to start training from: a trained or imported model's, or base's converted to memory or flex-B.

A converted model keeps base's embedding, attention, norms and head. Base's FFN_l has W keys (columns of its gate and up
matrices) with their values (rows of down). FFN-M_l takes W_M of them, and NM_l the scale of base's N2_l; FFN-C_l and
its N2_l take the other W_C keys, those with the largest |gate| |up| |down|. So in the first step each layer adds

    FFN_l(N2_l(A_l))  with X_0 in the place of A_l, for the keys of FFN-M

which is wrong by what the layers before l have added to the residual stream; training makes up for that. With
`start.memory=new` FFN-M is initialised as for training from scratch, and FFN-C is as above.
"""

import jax
import jax.numpy as jnp

from memoryllm_jax.checkpoint.trained import TrainedModel, parameter_name
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import Config
from memoryllm_jax.data.tokenizer import Tokenizer

# Fields in which a model may differ from the one it starts from; `beta` and `compute_input` only where that is base.
_FREE = ("attention", "remat", "loss_chunk", "unique_tokens", "dtype", "init_std")


def starting_params(config: Config, tokenizer: Tokenizer, params, mesh):
    """`params`, freshly initialised on the mesh, with the values of `config.start` in their places.

    Returns: (params, what the model's import brought along and stays true of what is trained from it).
    Raises: UserError that names what does not fit.
    """
    start = config.start
    trained = TrainedModel(start.workdir, None if start.step < 0 else start.step, "float32", mesh)
    try:
        converts = _check(config, tokenizer, trained)
        flat, tree = jax.tree_util.tree_flatten_with_path(params)
        leaves = {parameter_name(path): leaf for path, leaf in flat}
        if not converts:
            leaves = {name: trained.leaf(name, jnp.float32, leaf) for name, leaf in leaves.items()}
        else:
            _convert(trained, config, leaves)
        source = trained.description.get("source", {})
        return jax.tree.unflatten(tree, leaves.values()), {k: source[k] for k in ("special", "files") if k in source}
    finally:
        trained.close()


def _check(config, tokenizer, trained) -> bool:
    """Whether base is to be converted."""
    where = f"config.start.workdir={config.start.workdir}"
    theirs, ours = trained.config, config.model
    converts = theirs.architecture == "base" and ours.memory_dim > 0
    free = (*_FREE, *(("beta", "compute_input") if converts else ()))
    for field in type(ours).__dataclass_fields__:
        if field not in free and getattr(ours, field) != getattr(theirs, field):
            values = f"expected {getattr(theirs, field)!r} as in {where}, found {getattr(ours, field)!r}"
            raise UserError(f"config.model.{field}: {values}")
    if trained.tokenizer.digest != tokenizer.digest:
        raise UserError(f"{config.data.path}: expected data of the tokenizer in {where}, found another tokenizer's")
    return converts


def _convert(trained, config, leaves):
    """Fills the leaves of a memory or flex model from base's."""
    m, mesh = config.model, trained.mesh
    for name in leaves:
        if not name.startswith(("layers/ffn", "memory/")):
            leaves[name] = trained.leaf(name, jnp.float32, leaves[name])
    scale = trained.leaf("layers/ffn_norm/scale", jnp.float32)
    ffn = {part: trained.leaf(f"layers/ffn/{part}", jnp.float32) for part in ("gate", "up", "down")}
    with jax.set_mesh(mesh):
        keys = jax.jit(_keys_by_size)(ffn)
        for target, count, first in (("layers/ffn", m.compute_dim, 0), ("memory/ffn", m.memory_dim, m.compute_dim)):
            if not count or (target == "memory/ffn" and config.start.memory == "new"):
                continue
            chosen = jnp.sort(keys[:, first : first + count], axis=1)
            for part in ffn:
                like = leaves[f"{target}/{part}"]
                leaves[f"{target}/{part}"] = _take(ffn[part], chosen, -2 if part == "down" else -1, like)
            norm = "layers/ffn_norm/scale" if target == "layers/ffn" else "memory/norm/scale"
            # A copy: a step donates its state, which must not hold a buffer twice.
            leaves[norm] = jax.device_put(jnp.copy(scale), leaves[norm].sharding)


def _keys_by_size(ffn):
    """[L, W]: each layer's keys, largest |gate| |up| |down| first."""
    squares = [jnp.square(ffn[part]).sum(-1 if part == "down" else -2) for part in ("gate", "up", "down")]
    return jnp.argsort(-(squares[0] * squares[1] * squares[2]), axis=-1)


def _take(matrices, keys_LF, axis, like):
    """The keys' columns or rows of each layer's matrix, padded and placed as `like`."""

    def take(matrices, keys_LF):
        taken = jnp.take_along_axis(matrices, jnp.expand_dims(keys_LF, -3 - axis), axis)
        taken = taken[tuple(slice(0, size) for size in like.shape)]
        return jnp.pad(taken, [(0, b - a) for a, b in zip(taken.shape, like.shape)])

    return jax.jit(take, out_shardings=like.sharding)(matrices, keys_LF)
