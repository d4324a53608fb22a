"""Initial parameters from another model: a trained or imported one, or base converted to memory or flex-B.

A converted model keeps base's embedding, attention, norms and head. Base's FFN_l has W keys (columns of its gate and up
matrices), each with a value (a row of its down matrix). FFN-C_l gets the W_C keys with the largest |gate| |up| |down|,
and FFN-M_l the other W_M. Their norms, N2_l of FFN-C and NM_l of FFN-M, both get the scale of base's N2_l.

FFN-M_l reads X_0 where base's FFN_l read the residual stream after attention, so the copy misses what the earlier
layers have added. With `start.memory=distill`, training/distillation.py fits FFN-M to base's FFN before training. With
`start.memory=new`, FFN-M is initialised as for training from scratch instead. FFN-C is as above in both.

An adapter, with `start.memory=zero`, keeps all parameters of base and adds a table of zeros, rows-8: the model begins
as base. Its run trains the rows alone, with `optimizer.train=memory`.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memoryllm_jax.checkpoint.digest import array_name
from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import Config
from memoryllm_jax.data.tokenizer import Tokenizer

# Fields of ModelConfig in which a model may differ from the one that it starts from
_MAY_DIFFER = ("attention", "remat", "loss_chunk", "reduce_dtype", "unique_tokens", "dtype", "init_std")
_MAY_DIFFER_FROM_BASE = ("beta", "compute_input")  # only where base is converted
_MAY_DIFFER_IN_ADAPTER = ("token_memory", "table_dim", "rows")
_PARTS = ("gate", "up", "down")


class Start(NamedTuple):
    """What a run starts from.

    Attributes:
      params: the parameters.
      source: the parts of the description's `source` that also hold for a model trained from it.
      base_layers: "ffn" and "ffn_norm" of base, stacked over the layers, with start.memory=distill; else None.
    """

    params: dict
    source: dict
    base_layers: dict | None


def starting_params(config: Config, tokenizer: Tokenizer, params, mesh) -> Start:
    """Reads the parameters of the model that `config.start` names; those of base are converted to memory or flex-B.

    Args:
      config: the run, whose `start` names a workdir.
      tokenizer: Tokenizer of the data to train on.
      params: freshly initialised parameters on the mesh, float32. The result has their shapes and shardings.
      mesh: devices of the run.
    Raises: UserError that names a field or a tokenizer which does not fit.
    """
    start = config.start
    trained = TrainedModel(start.workdir, None if start.step < 0 else start.step, "float32", mesh)
    try:
        is_base = trained.config.architecture == "base"
        has_ffn_m = config.model.token_memory == "ffn" and config.model.row_dim > 0
        adapts, converts = start.memory == "zero", is_base and has_ffn_m
        if adapts and not is_base:
            raise UserError(
                f"config.start.workdir={start.workdir}: expected base, beside whose FFNs config.start.memory=zero adds "
                f"rows, found {trained.config.architecture}"
            )
        if start.memory in ("new", "distill") and not converts:
            raise UserError(
                f"config.start.memory: expected copy, as only base becomes memory or flex-B, found {start.memory}, and "
                f"{trained.config.architecture} in {start.workdir} to become {config.model.architecture}"
            )
        may_differ = set(_MAY_DIFFER)
        if adapts:
            may_differ.update(_MAY_DIFFER_IN_ADAPTER)
        elif converts:
            may_differ.update(_MAY_DIFFER_FROM_BASE)
        _check(config, tokenizer, trained, may_differ)
        flat, tree = jax.tree_util.tree_flatten_with_path(params)
        leaves = {array_name(path): leaf for path, leaf in flat}
        base_layers = None
        if adapts:
            leaves = {name: _of_base_or_zero(trained, name, leaf) for name, leaf in leaves.items()}
        elif converts:
            base_layers = _convert(trained, config, leaves)
        else:
            leaves = {name: trained.leaf(name, leaf) for name, leaf in leaves.items()}
        source = trained.description.source
        kept = {key: source[key] for key in ("special", "files") if key in source}
        return Start(jax.tree.unflatten(tree, leaves.values()), kept, base_layers)
    finally:
        trained.close()


def _of_base_or_zero(trained, name, like):
    """Base's parameter, or zeros for one of the token memory, as `like`."""
    if not name.startswith("memory/"):
        return trained.leaf(name, like)
    return jax.jit(jnp.zeros_like, out_shardings=like.sharding)(like)


def _check(config, tokenizer, trained, may_differ):
    """Raises: UserError if the model or the tokenizer of `config` does not fit the trained model's."""
    where = f"config.start.workdir={config.start.workdir}"
    for field in dataclasses.fields(config.model):
        expected = getattr(trained.config, field.name)
        found = getattr(config.model, field.name)
        if field.name not in may_differ and found != expected:
            raise UserError(f"config.model.{field.name}: expected {expected!r} as in {where}, found {found!r}")
    if trained.tokenizer.digest != tokenizer.digest:
        raise UserError(f"{config.data.path}: expected data of the tokenizer in {where}, found another tokenizer's")


def _convert(trained, config, leaves):
    """Replaces the parameters of a memory or flex model with base's. With start.memory=new, FFN-M's are kept.

    Returns: `Start.base_layers`.
    """
    m = config.model
    for name in leaves:
        if not name.startswith(("layers/ffn", "memory/")):
            leaves[name] = trained.leaf(name, leaves[name])
    scale = trained.leaf("layers/ffn_norm/scale")
    ffn = {part: trained.leaf(f"layers/ffn/{part}") for part in _PARTS}
    with jax.set_mesh(trained.mesh):
        keys_LW = jax.jit(_keys_by_size)(ffn)
        if m.compute_dim:
            _fill_ffn(leaves, "layers/ffn", "layers/ffn_norm/scale", ffn, keys_LW[:, : m.compute_dim], scale)
        if config.start.memory != "new":
            rest_LF = keys_LW[:, m.compute_dim : m.compute_dim + m.memory_dim]
            _fill_ffn(leaves, "memory/ffn", "memory/norm/scale", ffn, rest_LF, scale)
    return {"ffn": ffn, "ffn_norm": {"scale": scale}} if config.start.memory == "distill" else None


def _fill_ffn(leaves, target, norm, ffn, keys_LF, scale):
    """Gives FFN-C or FFN-M its keys of base's FFN, and its norm the scale of base's.

    Args:
      leaves: {name: parameter} to change.
      target: name of the FFN, before /gate, /up and /down.
      norm: name of its norm's scale.
      ffn: base's matrices by part, stacked over the layers.
      keys_LF: indices of the F keys to take in each layer.
      scale: base's norm scale [L, D].
    """
    keys_LF = jnp.sort(keys_LF, axis=1)  # base's order
    for part in _PARTS:
        name = f"{target}/{part}"
        leaves[name] = _take_keys(ffn[part], keys_LF, part, leaves[name])
    # Both norms get the same values, but not the same buffer: a training step donates its state, and a buffer can be
    # donated only once.
    leaves[norm] = jax.device_put(jnp.copy(scale), leaves[norm].sharding)


def _keys_by_size(ffn):
    """Indices [L, W] of each layer's keys, largest |gate| |up| |down| first."""
    # Squared norms, which have the same order. Keys are columns of gate and up, and rows of down.
    gate = jnp.square(ffn["gate"]).sum(-2)
    up = jnp.square(ffn["up"]).sum(-2)
    down = jnp.square(ffn["down"]).sum(-1)
    return jnp.argsort(-(gate * up * down), axis=-1)


def _take_keys(matrices, keys_LF, part, like):
    """The keys' columns of gate or up, or their rows of down, in each layer; padded and sharded as `like`."""

    def take(matrices, keys_LF):
        if part == "down":
            taken = jnp.take_along_axis(matrices, keys_LF[:, :, None], axis=-2)
        else:
            taken = jnp.take_along_axis(matrices, keys_LF[:, None, :], axis=-1)
        # The width is padded so that the mesh's axes divide it.
        return jnp.pad(taken, [(0, b - a) for a, b in zip(taken.shape, like.shape)])

    return jax.jit(take, out_shardings=like.sharding)(matrices, keys_LF)
