"""Parameters to start training from: a trained or imported model's, or base's converted to memory or flex-B.

A converted model keeps base's embedding, attention, norms and head. Base's FFN_l has W keys (columns of its gate and up
matrices) with their values (rows of down). FFN-C_l and its norm N2_l take the W_C keys with the largest
|gate| |up| |down|. FFN-M_l takes the other W_M keys, and its norm NM_l the scale of base's N2_l. In the first step
FFN-M_l thus reads X_0 where base's FFN_l read A_l, the residual stream after attention: it lacks what the layers before
l have added. Training makes up for that. With `start.memory=new` FFN-M is initialised as for training from scratch, and
FFN-C is as above.
"""

import jax
import jax.numpy as jnp

from memoryllm_jax.checkpoint.trained import TrainedModel, parameter_name
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import Config
from memoryllm_jax.data.tokenizer import Tokenizer

# Fields in which a model may differ from the one it starts from; the second group only where that one is base.
_MAY_DIFFER = ("attention", "remat", "loss_chunk", "unique_tokens", "dtype", "init_std")
_MAY_DIFFER_FROM_BASE = ("beta", "compute_input")
_PARTS = ("gate", "up", "down")


def starting_params(config: Config, tokenizer: Tokenizer, params, mesh):
    """The parameters of the model that `config.start` names, converted to the model of `config` where it is base.

    Args:
      tokenizer: of the data to train on.
      params: freshly initialised parameters on the mesh, whose shapes and shardings the result has.
    Returns: (params, the part of the description's `source` that stays true of a model trained from it).
    Raises: UserError that names what does not fit.
    """
    start = config.start
    trained = TrainedModel(start.workdir, None if start.step < 0 else start.step, "float32", mesh)
    try:
        converts = trained.config.architecture == "base" and config.model.memory_dim > 0
        _check(config, tokenizer, trained, converts)
        flat, tree = jax.tree_util.tree_flatten_with_path(params)
        leaves = {parameter_name(path): leaf for path, leaf in flat}
        if converts:
            _convert(trained, config, leaves)
        else:
            leaves = {name: trained.leaf(name, jnp.float32, leaf) for name, leaf in leaves.items()}
        source = trained.description.get("source", {})
        stays = {key: source[key] for key in ("special", "files") if key in source}
        return jax.tree.unflatten(tree, leaves.values()), stays
    finally:
        trained.close()


def _check(config, tokenizer, trained, converts):
    where = f"config.start.workdir={config.start.workdir}"
    theirs, ours = trained.config, config.model
    may_differ = _MAY_DIFFER + (_MAY_DIFFER_FROM_BASE if converts else ())
    for field in type(ours).__dataclass_fields__:
        expected, found = getattr(theirs, field), getattr(ours, field)
        if field not in may_differ and found != expected:
            raise UserError(f"config.model.{field}: expected {expected!r} as in {where}, found {found!r}")
    if trained.tokenizer.digest != tokenizer.digest:
        raise UserError(f"{config.data.path}: expected data of the tokenizer in {where}, found another tokenizer's")


def _convert(trained, config, leaves):
    """Replaces the leaves of a memory or flex model by values of base."""
    m = config.model
    for name in leaves:
        if not name.startswith(("layers/ffn", "memory/")):
            leaves[name] = trained.leaf(name, jnp.float32, leaves[name])
    scale = trained.leaf("layers/ffn_norm/scale", jnp.float32)
    ffn = {part: trained.leaf(f"layers/ffn/{part}", jnp.float32) for part in _PARTS}
    with jax.set_mesh(trained.mesh):
        keys_LW = jax.jit(_keys_by_size)(ffn)
        if m.compute_dim:
            _fill_ffn(leaves, "layers/ffn", "layers/ffn_norm/scale", ffn, keys_LW[:, : m.compute_dim], scale)
        if config.start.memory != "new":
            rest_LF = keys_LW[:, m.compute_dim : m.compute_dim + m.memory_dim]
            _fill_ffn(leaves, "memory/ffn", "memory/norm/scale", ffn, rest_LF, scale)


def _fill_ffn(leaves, target, norm, ffn, keys_LF, scale):
    """Gives FFN-C or FFN-M some keys of base's FFN, in base's order, and its norm base's scale."""
    keys_LF = jnp.sort(keys_LF, axis=1)
    for part in _PARTS:
        name = f"{target}/{part}"
        leaves[name] = _take(ffn[part], keys_LF, -2 if part == "down" else -1, leaves[name])
    # A copy, as FFN-C's and FFN-M's norms get the same values: a step donates its state, which must not hold a buffer
    # twice.
    leaves[norm] = jax.device_put(jnp.copy(scale), leaves[norm].sharding)


def _keys_by_size(ffn):
    """Indices [L, W] of each layer's keys, largest |gate| |up| |down| first."""
    gate, up, down = (jnp.square(ffn[part]).sum(-1 if part == "down" else -2) for part in _PARTS)
    return jnp.argsort(-(gate * up * down), axis=-1)


def _take(matrices, keys_LF, axis, like):
    """The keys' columns (axis -1) or rows (axis -2) of each layer's matrix, padded and placed as `like`."""

    def take(matrices, keys_LF):
        taken = jnp.take_along_axis(matrices, jnp.expand_dims(keys_LF, -3 - axis), axis)
        # The width is padded so that the mesh's axes divide it.
        return jnp.pad(taken, [(0, b - a) for a, b in zip(taken.shape, like.shape)])

    return jax.jit(take, out_shardings=like.sharding)(matrices, keys_LF)
