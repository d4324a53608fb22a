"""Muon for the matrices of the layers (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

For a matrix W with `fan_in` rows that reads a vector and returns one of `fan_out` numbers, with the gradient G:

    M <- momentum M + G
    O  = NewtonSchulz(G + momentum M)
    W <- W - rate (sqrt(max(1, fan_out / fan_in)) O + weight_decay W)

NewtonSchulz brings all singular values close to 1 by five steps of x <- a x + b x^3 + c x^5. The factor of O is that of
Jordan's code and of torch.optim.Muon. With it a rate serves all widths: O changes the root mean square of an output in
proportion to that of its input, whatever the width is (Bernstein and Newhouse 2024, arXiv 2409.20325).

A matrix is all heads of a projection together, not each head for itself, as in Jordan's code, in Moonlight (Liu et al.
2025, arXiv 2502.16982) and in MaxText: this is the form that was compared with AdamW at scale.

Newton-Schulz needs whole matrices, which the mesh splits. Products of split matrices would gather a matrix in each of
the five steps. Instead an all-to-all gives each device whole matrices of some of the layers, and another one brings the
results back. Replicas along the data axis share the matrices too. So each is orthogonalised once, on one device.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from memoryllm_jax.config import Config
from memoryllm_jax.model import transformer

# (a, b, c) of each step of Newton-Schulz: those of Jordan et al. 2024. With a tuple for each step, optax loops over the
# steps, so that less code is compiled.
_STEPS = ((3.4445, -4.7750, 2.0315),) * 5


class Matrices(NamedTuple):
    """A parameter that stacks a matrix of each layer, [L, ...].

    Attributes:
      layers: number of matrices.
      numbers: the axes of one layer's array that the matrix reduces over, and those of its output.
      fan_in, fan_out: sizes of the matrix, without padding.
      spec: how the stacked parameter is split over the mesh.
    """

    layers: int
    numbers: MuonDimensionNumbers
    fan_in: int
    fan_out: int
    spec: P


def is_matrix(path) -> bool:
    """Whether a parameter is one of Muon: a matrix of the layers or of FFN-M, by its path in the tree.

    Embeddings, the tables of token memories, the head and the scales of norms are AdamW's. Rows of a table are
    vectors of their own: what a matrix does to them is a choice of one row, so its singular values say nothing.
    """
    names = [key.key for key in path]
    return names[0] in (*transformer.LAYERS, "memory") and names[-1] not in ("scale", "table")


def matrices(config: Config, params, mesh: Mesh):
    """The tree of parameters with `Matrices` in place of those of Muon, and optax.MaskedNode() in place of the others.

    Args:
      params: abstract parameters that are trained, with their shardings, as stored.
    """
    whole = transformer.unpadded_params(config.model, mesh.devices.flat[0])
    return jax.tree_util.tree_map_with_path(_matrices, {name: whole[name] for name in params}, params)


def _matrices(path, whole, stored) -> Matrices | optax.MaskedNode:
    if not is_matrix(path):
        return optax.MaskedNode()
    # Projections to heads are [L, D, H, K], that from heads is [L, H, K, D], and all others are [L, from, to].
    inputs = len(whole.shape) - 2 if path[-1].key == "out" else 1
    axes = tuple(range(len(whole.shape) - 1))
    numbers = MuonDimensionNumbers(axes[:inputs], axes[inputs:])
    fan_in, fan_out = (math.prod(whole.shape[1 + axis] for axis in side) for side in numbers)
    return Matrices(whole.shape[0], numbers, fan_in, fan_out, stored.sharding.spec)


class Work(NamedTuple):
    """What Muon adds to a step on the device with the most matrices.

    Attributes:
      stored: bytes of Muon's parameters that the device stores. AdamW has a second moment of its own, Muon has none.
      flops: FLOPs of Newton-Schulz.
    """

    stored: int = 0
    flops: float = 0.0


def work(config: Config, params, mesh: Mesh) -> Work:
    """Counts the work of `make`; none with another optimizer.

    A step of Newton-Schulz on an [m, n] matrix with m <= n has two products of 2 m^2 n FLOPs and one of 2 m^3.

    Args:
      params: abstract parameters with their shardings, as stored.
    """
    if config.optimizer.name != "muon":
        return Work()
    stored, flops = 0, 0.0
    of_params = jax.tree.leaves(matrices(config, params, mesh), is_leaf=lambda node: isinstance(node, Matrices))
    leaves = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if is_matrix(path)]
    for of, leaf in zip(of_params, leaves, strict=True):
        stored += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        layers = -(-of.layers // parts(of.spec, mesh.shape))
        layers = -(-layers // mesh.shape["data"])
        m, n = sorted((of.fan_in, of.fan_out))
        flops += layers * len(_STEPS) * (4.0 * m**2 * n + 2.0 * m**3)
    return Work(stored, flops)


def parts(spec: P, mesh_shape: Mapping[str, int]) -> int:
    """Number of parts that the axes of a stacked parameter are split into."""
    return math.prod(mesh_shape[name] for name in spec if name)


def make(config: Config, matrices, rate: optax.Schedule) -> optax.GradientTransformation:
    """Muon, for a tree of gradients with optax.MaskedNode() in place of those of other parameters.

    Args:
      matrices: as the function of this name returns them.
      rate: learning rate.
    """
    o = config.optimizer

    def orthogonalise(updates, params):
        del params
        return jax.tree.map(lambda x, of: _orthogonalised(x, of, config), updates, matrices)

    return optax.chain(
        optax.trace(o.muon_momentum, nesterov=True),
        optax.stateless(orthogonalise),
        optax.add_decayed_weights(o.muon_weight_decay),
        optax.scale_by_learning_rate(rate),
    )


def _orthogonalised(x, of: Matrices, config: Config):
    """The scaled O of each matrix of a stacked parameter x, float32. Call it inside jit and a mesh.

    Padding stays zero: rows and columns of zeros stay zeros in each product of Newton-Schulz.
    """
    # Newton-Schulz tolerates bfloat16 (Jordan et al. 2024), but XLA for CPUs multiplies it slowly.
    on_cpu = jax.sharding.get_abstract_mesh().abstract_device.platform == "cpu"
    dtype = jnp.float32 if on_cpu else config.model.dtype
    local = jax.shard_map(lambda part: _local(part, of), in_specs=of.spec, out_specs=of.spec)
    with jax.named_scope("newton_schulz"):
        return max(1, of.fan_out / of.fan_in) ** 0.5 * local(x.astype(dtype)).astype(jnp.float32)


def _local(x, of: Matrices):
    """Orthogonalises the matrices of which x, [L, ...], is this device's part. Returns: its part of the results."""
    split = [(at, name) for at, name in enumerate(of.spec) if name]
    layers = len(x)
    padding = -layers % parts(of.spec, jax.sharding.get_abstract_mesh().shape)
    x = jnp.pad(x, [(0, padding), *[(0, 0)] * (x.ndim - 1)])
    for at, name in split:
        x = jax.lax.all_to_all(x, name, split_axis=0, concat_axis=at, tiled=True)
    x = _shared_by_replicas(x, of.numbers)
    for at, name in reversed(split):
        x = jax.lax.all_to_all(x, name, split_axis=at, concat_axis=0, tiled=True)
    return x[:layers]


def _shared_by_replicas(x, numbers: MuonDimensionNumbers):
    """Orthogonalises whole matrices, each on one replica, and sends the results to all."""

    def one(matrix):
        # Without momentum, this is Newton-Schulz alone.
        muon = scale_by_muon(_STEPS, beta=0.0, nesterov=False, weight_dimension_numbers=numbers)
        return muon.update(matrix, muon.init(matrix))[0]

    # One after the other: the products of one matrix are large enough for a device, and all at once need more memory.
    replicas = jax.lax.axis_size("data")
    if replicas == 1:
        return jax.lax.map(one, x)
    share = -(-len(x) // replicas)
    first = share * jax.lax.axis_index("data")
    # Replicas past the last matrix, and the one with a part of a share, repeat some; only the first result counts.
    start = jnp.minimum(first, len(x) - share)
    results = jax.lax.map(one, jax.lax.dynamic_slice_in_dim(x, start, share))
    is_first = (start + jnp.arange(share) >= first).reshape(-1, *[1] * (x.ndim - 1))
    results = jnp.where(is_first, results, 0)
    zeros = jax.lax.pcast(jnp.zeros_like(x), "data", to="varying")
    return jax.lax.psum(jax.lax.dynamic_update_slice_in_dim(zeros, results, start, 0), "data")
