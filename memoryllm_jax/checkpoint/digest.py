"""Digests of arrays over their exact bits, by which damage to a stored checkpoint is found.

An array has two 32-bit sums over its elements, modulo 2^32. Each element adds a hash of its bits and its place:

- The order of a sum does not matter, so every mesh gives the same digest, and each device hashes its own part.
- A zero adds nothing, so neither does the padding with which meshes round sizes up.
- The hash is one-to-one in the bits, so a change of one element always changes the first sum.

Arrays on devices are hashed there, those in host memory by NumPy, with the same result.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from memoryllm_jax.common import threads

_BLOCK = 1 << 16  # elements that NumPy hashes at once: they and their hashes fit into a core's cache
_BLOCKS = 16  # blocks that a thread hashes before it takes the next ones
_UNSIGNED = {1: "uint8", 2: "uint16", 4: "uint32"}  # by the bytes of an element


def of_tree(tree) -> dict[str, str]:
    """The digest of each array of a tree, by its `array_name`."""
    # One after another: many programs with collectives under way at once can block each other on emulated devices.
    return {array_name(path): of(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def of(array: jax.Array | np.ndarray) -> str:
    """The digest of one array: 16 hexadecimal digits."""
    if isinstance(array, jax.Array):
        mesh = array.sharding.mesh if isinstance(array.sharding, NamedSharding) else None
        sums = jax.device_get(_on_devices(mesh)(array))
    else:
        sums = _on_host(np.asarray(array))
    return "".join(f"{int(part):08x}" for part in sums)


def array_name(path) -> str:
    """The name of an array, such as params/layers/ffn/gate, from its path in the tree as `jax.tree_util` gives it."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def mixed(hashes):
    """MurmurHash3's finalizer, a one-to-one map of 32-bit numbers; of a NumPy or JAX array of them."""
    hashes = (hashes ^ (hashes >> 16)) * np.uint32(0x85EBCA6B)
    hashes = (hashes ^ (hashes >> 13)) * np.uint32(0xC2B2AE35)
    return hashes ^ (hashes >> 16)


@functools.cache
def _on_devices(mesh):
    """The compiled sums; for a mesh they are copied to all of its devices, so that each process can read them."""
    return jax.jit(_sums, out_shardings=None if mesh is None else NamedSharding(mesh, P()))


def _sums(array):
    bits = _bits(array, jax.lax.bitcast_convert_type)
    place = jnp.zeros(array.shape, jnp.uint32)
    for axis in range(array.ndim):
        place += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * _factor(axis)
    # One reduction of both: with two, XLA would keep the hashes in memory between them.
    zeros = np.uint32(0), np.uint32(0)
    return jax.lax.reduce(_hashes(bits, place, jnp), zeros, _add_pairs, tuple(range(array.ndim)))


def _add_pairs(a, b):
    return a[0] + b[0], a[1] + b[1]


def _bits(array, view):
    """The elements' bits as unsigned numbers of 32 bits; view(array, dtype) reads the bits as another dtype."""
    if array.dtype == bool:
        return array.astype("uint32")
    return view(array, np.dtype(_UNSIGNED[array.dtype.itemsize])).astype("uint32")


def _factor(axis):
    """What an index along an axis is multiplied by: an element's place is the sum of the products."""
    # Powers of an odd number, so that no few steps along one axis are a step along another.
    return np.uint32(pow(0x9E3779B1, axis + 1, 2**32))


def _hashes(bits, place, numpy):
    """Two hashes of each element; zeros where the bits are."""
    first = numpy.where(bits == 0, np.uint32(0), mixed(bits ^ place))
    second = (first ^ (first >> 15)) * np.uint32(0x27D4EB2F)
    return first, second ^ (second >> 16)


def _on_host(array: np.ndarray) -> tuple[int, int]:
    """The two sums of an array in host memory, computed block by block in several threads."""
    bits = array if array.ndim else array[None]
    # A block is a run of rows along one axis: the first one whose rows are no larger than a block.
    axis = next(a for a in range(bits.ndim) if math.prod(bits.shape[a + 1 :]) <= _BLOCK or a == bits.ndim - 1)
    rows = max(1, _BLOCK // max(1, math.prod(bits.shape[axis + 1 :])))
    place = np.zeros((rows, *bits.shape[axis + 1 :]), np.uint32)
    for inner in range(place.ndim):
        place += (np.indices(place.shape, np.uint32, sparse=True)[inner]) * _factor(axis + inner)
    starts = [(outer, start) for outer in np.ndindex(bits.shape[:axis]) for start in range(0, bits.shape[axis], rows)]

    def sums_of(starts):
        sums = [0, 0]
        for outer, start in starts:
            block = bits[outer][start : start + rows]
            origin = sum(int(i) * int(_factor(a)) for a, i in enumerate((*outer, start))) % 2**32
            block = _bits(np.ascontiguousarray(block), np.ndarray.view)
            for k, hashes in enumerate(_hashes(block, place[: len(block)] + np.uint32(origin), np)):
                sums[k] += int(hashes.sum(dtype=np.uint32))
        return sums

    parts = threads.in_threads(sums_of, [starts[i : i + _BLOCKS] for i in range(0, len(starts), _BLOCKS)])
    return sum(part[0] for part in parts) % 2**32, sum(part[1] for part in parts) % 2**32
