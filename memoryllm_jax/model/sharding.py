"""The device mesh, the mesh axes that each logical axis is split over, and checks that a config fits the mesh."""

import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from memoryllm_jax.common import devices as devices_lib
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import Config, MeshConfig, ModelConfig

# Logical axis -> mesh axes. "shard" is the leading axis of arrays with one entry for each batch shard.
RULES = {
    "batch": ("data", "fsdp"),
    "shard": ("data", "fsdp"),
    "embed": ("fsdp",),
    "norm": (),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "layers": (),
    "head_dim": (),
    None: (),
}


# XLA multiplies bfloat16 matrices on NVIDIA GPUs only if the sizes are multiples of 8. It would copy others into padded
# ones in each step. Multiples of 128, the width of the GPUs' tiles and of a TPU's layouts, would only store the zeros
# that both compute with anyway.
PRODUCT_MULTIPLE = 8
_PRODUCT_AXES = ("mlp", "vocab")  # those with arbitrary sizes


def spec(*axes: str | None) -> P:
    """The PartitionSpec of an array with these logical axes. Raises: ValueError if two are split over one mesh axis."""
    physical = [RULES[axis] for axis in axes]
    used = [name for names in physical for name in names]
    if len(set(used)) < len(used):
        raise ValueError(f"logical axes {axes} claim a mesh axis twice: {physical}")
    return P(*(names if names else None for names in physical))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Fixes the sharding of x inside jit, by its logical axes.

    Raises: ValueError outside a mesh, where JAX would ignore the constraint.
    """
    _current_mesh()  # raises
    return jax.lax.with_sharding_constraint(x, spec(*axes))


def parts(axis: str | None) -> int:
    """Number of parts that the current mesh splits a logical axis into. Raises: ValueError outside a mesh."""
    mesh = _current_mesh()
    return math.prod(mesh.shape[name] for name in RULES[axis])


def _current_mesh():
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ValueError("no mesh is set: call inside `with jax.set_mesh(make_mesh(...))`")
    return mesh


def padded(shape: tuple[int, ...], axes: tuple[str | None, ...], multiple: int = 1) -> tuple[int, ...]:
    """The shape in which a parameter is stored: each size rounded up to a multiple of the current mesh's parts.

    Padding is zero and stays zero in training. A padded column of one matrix is multiplied with a padded row of the
    next; as both are zero, neither gets a gradient.

    Args:
      multiple: what each part of an FFN's width and of the vocabulary is a multiple of: PRODUCT_MULTIPLE in training.
    """

    def stored(size, axis):
        return _round_up(size, parts(axis) * (multiple if axis in _PRODUCT_AXES else 1))

    return tuple(stored(size, axis) for size, axis in zip(shape, axes))


def _round_up(size, multiple):
    return -(-size // multiple) * multiple


def unpadded_embed(w: jax.Array, dim: int, axes: tuple[str | None, ...]) -> jax.Array:
    """Cuts the padding off the "embed" axis of w. Padding of other axes stays, as it does not change results.

    Args:
      w: a parameter as stored.
      dim: size of the "embed" axis without padding.
      axes: logical axes of w.
    Returns: w with the "embed" axis whole on every device or, if there is no padding, w as it is.
    """
    at = axes.index("embed")
    if w.shape[at] == dim:
        return w  # XLA chooses where to gather it
    w = constrain(w, *(None if axis == "embed" else axis for axis in axes))
    return jax.lax.slice_in_dim(w, 0, dim, axis=at)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Makes a (data, fsdp, tensor) mesh.

    Args:
      config: sizes of the axes; -1 on one of them stands for all remaining devices.
      devices: devices of the mesh; by default all.
    Raises: UserError if the sizes do not fit the number of devices.
    """
    devices = devices_lib.find() if devices is None else devices
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    known = math.prod(size for size in sizes.values() if size != -1)
    has_rest = -1 in sizes.values()
    fits = len(devices) % known == 0 if has_rest else len(devices) == known
    if not fits:
        shape = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(f"config.mesh: expected parts whose product is the {len(devices)} devices, found {shape}")
    shape = [len(devices) // known if size == -1 else size for size in sizes.values()]
    return Mesh(_arrange(shape, devices), tuple(sizes), axis_types=(AxisType.Auto,) * 3)


def _arrange(shape: list[int], devices: list[jax.Device]) -> np.ndarray:
    """The devices in this shape, so that the mesh axes that communicate most lie within a TPU slice or a GPU node.

    Slices and nodes are connected by the slower network, so they are laid along the first axes, which communicate
    least.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    # The first axis spans as many of the slices as its size allows, and the next axes the remaining ones.
    across, left = [], slices
    for size in shape:
        spanned = math.gcd(size, left)
        across.append(spanned)
        left //= spanned
    within = [size // parts for size, parts in zip(shape, across)]
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)


def batch_shards(mesh: Mesh) -> int:
    """Number of batch shards, which are the parts that the mesh splits a batch into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_heads(config: ModelConfig, mesh: Mesh) -> None:
    """Refuses grouped heads that the tensor axis does not divide. Heads without groups are padded, so they always fit.

    Query heads and key-value heads would be padded each for themselves, which could tear a group of heads apart.

    Raises: UserError that names the field.
    """
    tensor = mesh.shape["tensor"]
    if config.key_heads != config.heads and config.key_heads % tensor:
        raise UserError(
            f"config.model.kv_heads: expected a multiple of config.mesh.tensor = {tensor}, "
            f"so that each device holds whole groups of heads, found {config.key_heads}"
        )


def check_mesh(config: Config, mesh: Mesh) -> None:
    """Refuses a batch size or grouped heads that do not fit the mesh. All other sizes are padded, so they always fit.

    Raises: UserError that names the field.
    """
    check_heads(config.model, mesh)
    parts = batch_shards(mesh) * config.accumulate
    if config.batch_size % parts:
        raise UserError(
            f"config.batch_size: expected a multiple of mesh.data * mesh.fsdp * accumulate = {parts}, "
            f"found {config.batch_size}"
        )


def shardings(mesh: Mesh, logical_axes):
    """The NamedShardings of a tree of logical axes, as `nn.get_partition_spec` returns them (PartitionSpecs)."""

    def sharding(axes):
        return NamedSharding(mesh, spec(*axes))

    return jax.tree.map(sharding, logical_axes, is_leaf=lambda x: isinstance(x, P))
