"""Which mesh axes each logical axis is split over, the mesh, and the checks that make a wrong pairing an error."""

import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import Config, MeshConfig, ModelConfig

# Logical axis -> mesh axes. "shard" is the leading axis of arrays that hold something apart for each batch shard.
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


def spec(*axes: str | None) -> P:
    """The PartitionSpec of an array with these logical axes. Raises: ValueError if two claim one mesh axis."""
    physical = [RULES[axis] for axis in axes]
    used = [name for names in physical for name in names]
    if len(set(used)) < len(used):
        raise ValueError(f"logical axes {axes} claim a mesh axis twice: {physical}")
    return P(*(names if names else None for names in physical))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins x to its logical axes inside jit. Raises: ValueError outside a mesh, where it would do nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        raise ValueError("no mesh is set: call inside `with jax.set_mesh(make_mesh(...))`")
    return jax.lax.with_sharding_constraint(x, spec(*axes))


def _parts(axis: str | None) -> int:
    """Number of parts that the current mesh splits a logical axis into."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ValueError("no mesh is set: call inside `with jax.set_mesh(make_mesh(...))`")
    return math.prod(mesh.shape[name] for name in RULES[axis])


def padded(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> tuple[int, ...]:
    """The shape in which a parameter is stored: every size rounded up to what the current mesh divides.

    Padding holds zeros and stays zero in training: zero keys meet zero values, so no gradient reaches them.
    """
    return tuple(_round_up(size, _parts(axis)) for size, axis in zip(shape, axes))


def _round_up(size, multiple):
    return -(-size // multiple) * multiple


def unpadded_embed(w: jax.Array, dim: int, axes: tuple[str | None, ...]) -> jax.Array:
    """w with its "embed" axis whole on every device and cut to `dim`. Padding of other axes stays, as it is harmless.

    A width that needs no padding is left as it is: XLA gathers it where it wants to.
    """
    at = axes.index("embed")
    if w.shape[at] == dim:
        return w
    w = constrain(w, *(None if axis == "embed" else axis for axis in axes))
    return jax.lax.slice_in_dim(w, 0, dim, axis=at)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh over all devices. Raises: UserError."""
    devices = jax.devices() if devices is None else devices
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    known = math.prod(size for size in sizes.values() if size != -1)
    fits = len(devices) % known == 0 if -1 in sizes.values() else len(devices) == known
    if not fits:
        shape = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(f"config.mesh: expected parts whose product is the {len(devices)} devices, found {shape}")
    shape = [len(devices) // known if size == -1 else size for size in sizes.values()]
    return Mesh(_arrange(shape, devices), tuple(sizes), axis_types=(AxisType.Auto,) * 3)


def _arrange(shape: list[int], devices: list[jax.Device]) -> np.ndarray:
    """The devices in this shape. Slices of TPUs and nodes of GPUs lie along its first axes, which send least."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    # The first axis takes as many of the slices as its size allows, and the next ones the rest.
    across, left = [], slices
    for size in shape:
        across.append(math.gcd(size, left))
        left //= across[-1]
    within = [size // parts for size, parts in zip(shape, across)]
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)


def batch_shards(mesh: Mesh) -> int:
    """Number of batch shards: parts that the mesh splits a batch into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_heads(config: ModelConfig, mesh: Mesh) -> None:
    """Refuses grouped heads whose groups padding would break. Raises: UserError that names the field.

    Query heads and key-value heads are each padded to a multiple of the tensor axis. A device holds whole groups only
    if there are as many query heads for each key-value head as before.
    """
    tensor = mesh.shape["tensor"]
    query_heads = _round_up(config.heads, tensor)
    key_heads = _round_up(config.key_heads, tensor)
    if query_heads * config.key_heads != key_heads * config.heads:
        raise UserError(
            f"config.model.kv_heads: expected a multiple of config.mesh.tensor = {tensor}, "
            f"so that each device holds whole groups of heads, found {config.key_heads}"
        )


def check_mesh(config: Config, mesh: Mesh) -> None:
    """Refuses a batch or grouped heads that the mesh does not divide; all other sizes are padded.

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
    """A NamedSharding for each leaf of a tree of logical axes, which are PartitionSpecs as Linen gives them."""

    def sharding(axes):
        return NamedSharding(mesh, spec(*axes))

    return jax.tree.map(sharding, logical_axes, is_leaf=lambda x: isinstance(x, P))
